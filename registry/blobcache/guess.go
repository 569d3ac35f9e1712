package blobcache

// A guesser says which chunks will be read next. There are no open files to hang that on, so it watches which chunks
// are read for the first time, and goes by two rules:
//
// A stream is a reader that goes forward. A cursor follows it, and its window is as large as what it has read so far,
// within bounds; a skipped chunk makes it smaller, as a read chunk makes it larger. So no more is fetched ahead than
// was read, but for the first window, and a reader that jumps about has no window:
//
//	| read | read |skip| read |····················|
//	                          ▲ at     ▲ ahead     ▲ at + window
//
// A region is 8, 16 or 32 chunks, aligned. When half of one has been read, in whatever order, the rest follows: the
// metadata of an image lies in heaps, and who lists directories goes all over a heap. At most twice of what was read
// is fetched by that.
//
// It does no fetching, counts in chunks, and is guarded by the store's mutex.
type guesser struct {
	chunks  int64 // of the blob
	start   int64 // the first window of a stream
	max     int64 // the largest; 0: guess nothing
	wasRead func(chunk int64) bool

	cursors [maxCursors]cursor
	count   int   // of cursors in use
	clock   int64 // goes on by one with each new chunk
}

const (
	maxCursors = 16
	// maxSkip is how far from where a stream is expected it may go on; more as its window is larger.
	maxSkip = 2
	// loyalty is for how many turns of the clock a stream with a window outlives newer cursors without one.
	loyalty = 128

	smallRegion, largeRegion = 8, 32
)

func newGuesser(chunks, max int64, wasRead func(int64) bool) guesser {
	// A quarter of the largest window is what one fetch of a stream asks for.
	return guesser{chunks: chunks, start: (max + 15) / 16, max: max, wasRead: wasRead}
}

// A cursor is a place where somebody reads.
type cursor struct {
	at     int64 // behind the last chunk that was read
	ahead  int64 // behind the last chunk that was asked for; at, or later
	run    int64 // chunks read, less chunks skipped
	window int64 // chunks to have ahead of at
	seen   int64 // the clock when it last moved
}

// follow takes note of the first read of the chunks [first, end), and gives the cursor that moved.
func (g *guesser) follow(first, end int64) *cursor {
	g.clock++
	c := g.nearest(first)
	if c == nil {
		c = g.victim()
		*c = cursor{at: end, ahead: end, run: end - first, seen: g.clock}
		return c
	}
	c.seen = g.clock
	c.run += end - first
	for skipped := c.at; skipped < first; skipped++ {
		if !g.wasRead(skipped) {
			c.run--
		}
	}
	c.run = min(max(c.run, 0), max(g.max, 2))
	c.at = max(c.at, end)
	c.ahead = max(c.ahead, c.at)
	c.window = 0
	if c.run > 1 {
		c.window = min(max(c.run, g.start), g.max)
	}
	return c
}

// nearest gives the cursor for which the next read could well be at first.
func (g *guesser) nearest(first int64) *cursor {
	var best *cursor
	for i := range g.cursors[:g.count] {
		c := &g.cursors[i]
		reach := max(c.window, maxSkip)
		if first < c.at-reach || first > c.ahead+reach {
			continue
		}
		if best == nil || distance(first, c.at) < distance(first, best.at) {
			best = c
		}
	}
	return best
}

func distance(a, b int64) int64 { return max(a-b, b-a) }

// victim gives a cursor to use anew.
func (g *guesser) victim() *cursor {
	if g.count < maxCursors {
		g.count++
		return &g.cursors[g.count-1]
	}
	age := func(c *cursor) int64 {
		if c.window > 0 {
			return g.clock - c.seen - loyalty
		}
		return g.clock - c.seen
	}
	oldest := &g.cursors[0]
	for i := range g.cursors {
		if c := &g.cursors[i]; age(c) > age(oldest) {
			oldest = c
		}
	}
	return oldest
}

// next gives what is to be fetched for the stream of c; nothing as long as half of its window is fetched. It is a
// quarter of the largest window at most, so that a reader which skips a part does not wait for all of it.
func (g *guesser) next(c *cursor) (first, end int64) {
	most := max(g.max/4, 1)
	first, end = c.ahead, min(c.at+c.window, g.chunks)
	if end < g.chunks && end-first < min((c.window+1)/2, most) {
		return first, first
	}
	return first, max(min(end, first+most), first)
}

// region gives the largest region around chunk of which half has been read.
func (g *guesser) region(chunk int64) (first, end int64) {
	for size := int64(smallRegion); size <= min(largeRegion, g.max); size *= 2 {
		from := chunk - chunk%size
		to := min(from+size, g.chunks)
		read := int64(0)
		for c := from; c < to; c++ {
			if g.wasRead(c) {
				read++
			}
		}
		if read >= size/2 {
			first, end = from, to
		}
	}
	return first, end
}
