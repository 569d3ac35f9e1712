package blobcache

import (
	"context"
	"sync"
	"time"
)

const (
	// longestPause is for how long a flight of the background lets readers go first once its body is there. More would
	// have servers break off, and readers in other processes, who wait for what it has locked, lose their patience. A stream
	// does so for each prefetchPiece.
	longestPause = 2 * time.Second
	// prefetchPiece is the most that a flight of the background asks for, and pieceTime is how long it should take at
	// most: a reader that comes to its last chunk waits for all of it. As long as nobody knows how long, it is firstPiece.
	prefetchPiece = 4 << 20
	firstPiece    = 512 << 10
	pieceTime     = 250 * time.Millisecond
	// measurable is how long a body has to be to tell how fast bytes come: much of a shorter one comes with its header.
	measurable = 128 << 10
	// smoothness is how many reads a second a body is read in that has a rate to keep.
	smoothness = 32
	// campaignGap is how long after one prefetch another belongs to the same campaign.
	campaignGap = time.Minute
)

// A background says when flights may go on that bring what nobody waits for: never while somebody waits, in any blob
// of the cache, for something else; so many at a time; and at a rate that all of them share. What a flight may do is
// asked for before its fetch and before each read of its body. Of those who wait in other processes an outside knows.
//
// A reader who waits for what the background brings itself holds back less. The flight that brings it has the network
// alone from when its body is there; until then others read on, and new ones may ask for what comes next: a program that
// reads what a profile says is always waiting for the next of it, and nothing would ever be fetched in front of it.
type background struct {
	most  int   // flights
	rate  int64 // bytes a second; 0: no limit
	burst time.Duration
	hurry bool // a flight that is under way when a reader comes is to end: the reader needs its connection

	mu      sync.Mutex    // guards what follows; whoever has it takes no other
	waiting int           // readers, for what is not of the background
	served  int           // those who wait for nothing else
	favored int           // flights whose bodies some of these wait for
	flights int           // that have a slot
	next    time.Time     // when the next byte may be read, by the rate
	speed   float64       // of the last bodies, in bytes a second; 0 as long as that is not known
	changed chan struct{} // closed when any of this gets better, or some flight is promoted; nil: nobody looks

	prefetches int       // calls of Prefetch
	over       time.Time // when the last one ended
	since      int64     // when the campaign began, by the cache's clock
}

func newBackground(o Options) *background {
	g := &background{most: o.MaxPrefetches, rate: o.PrefetchRate, hurry: o.OneAtATime}
	if g.rate > 0 {
		g.burst = g.cost(min(g.rate, prefetchPiece))
	}
	return g
}

// cost is how long n bytes take at the rate.
func (g *background) cost(n int64) time.Duration {
	return time.Duration(float64(n) / float64(g.rate) * float64(time.Second))
}

// enter says that a reader begins to wait, and leave that it does so no more.
func (g *background) enter() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.waiting++
	if g.hurry {
		g.tell()
	}
}

func (g *background) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.waiting--; g.waiting == 0 {
		g.tell()
	}
}

// serve says that a reader who has entered waits for nothing but what flights of the background bring. It has to be
// undone before the reader leaves.
func (g *background) serve() (undo func()) {
	g.leave()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.served++
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.waiting++
		if g.served--; g.served == 0 {
			g.tell()
		}
	}
}

// favor says that readers wait for what comes next in the body of a flight, or do so no more.
func (g *background) favor(f *flight, on bool) {
	if f.favored == on {
		return
	}
	f.favored = on
	g.mu.Lock()
	defer g.mu.Unlock()
	if on {
		g.favored++
	} else if g.favored--; g.favored == 0 {
		g.tell()
	}
}

// tell wakes all who look. The caller holds mu.
func (g *background) tell() {
	if g.changed != nil {
		close(g.changed)
		g.changed = nil
	}
}

// wake is for who promotes a flight.
func (g *background) wake() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.tell()
}

// watch gives a channel that is closed at the next change. Who asks for it before looking misses nothing.
func (g *background) watch() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.changed == nil {
		g.changed = make(chan struct{})
	}
	return g.changed
}

// tryBegin takes a slot if nobody waits.
func (g *background) tryBegin() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.waiting > 0 || g.flights >= g.most {
		return false
	}
	g.flights++
	return true
}

// calm says that nobody waits for anything else.
func (g *background) calm() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.waiting == 0
}

// idle says that nobody waits at all.
func (g *background) idle() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.waiting+g.served == 0
}

// free says that a flight that nobody waits for may read on in its body.
func (g *background) free() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.waiting == 0 && (g.served == 0 || g.favored == 0)
}

// begin waits for a slot, and for the end of all waits.
func (g *background) begin(ctx, life context.Context) error {
	for {
		changed := g.watch()
		switch {
		case life.Err() != nil:
			return errAbandoned
		case ctx.Err() != nil:
			return ctx.Err()
		case g.tryBegin():
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
		case <-life.Done():
		}
	}
}

// end gives a slot back.
func (g *background) end() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.flights--
	g.tell()
}

// delay is how long the rate has a reader of bodies wait.
func (g *background) delay() time.Duration {
	if g.rate == 0 {
		return 0
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return time.Until(g.next)
}

// spend counts n bytes that were read. What was not used before counts for one burst at most.
func (g *background) spend(n int) {
	if g.rate == 0 {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if earliest := time.Now().Add(-g.burst); g.next.Before(earliest) {
		g.next = earliest
	}
	g.next = g.next.Add(g.cost(int64(n)))
}

// inAdvance says that the rate has a chunk take longer than it may stay locked: one at a time is then waited for before
// it is locked, and read at once.
func (g *background) inAdvance(chunkSize int64) bool { return g.rate > 0 && g.rate < chunkSize }

// portion is how much of n bytes is read at once.
func (g *background) portion(n int) int {
	if g.rate == 0 {
		return n
	}
	return min(n, int(min(max(g.rate/smoothness, 512), prefetchPiece)))
}

// piece is how many bytes a flight asks for at most: at a rate no more than take a second, since other processes wait
// for what it has locked.
func (g *background) piece() int64 {
	most := int64(prefetchPiece)
	if g.rate > 0 {
		most = min(g.rate, most)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return min(g.quarter(), most)
}

// quarter is how many bytes come in pieceTime. The caller holds mu.
func (g *background) quarter() int64 {
	if g.speed == 0 {
		return firstPiece
	}
	return int64(min(g.speed*pieceTime.Seconds(), prefetchPiece))
}

// took says that a body of n bytes took so long to come, be it of the background or not.
func (g *background) took(n int64, d time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if d <= 0 || n < min(measurable, g.quarter()) {
		return
	}
	speed := float64(n) / d.Seconds()
	if g.speed > 0 {
		speed = (3*g.speed + speed) / 4
	}
	g.speed = speed
}

// join says that a prefetch begins, at a time by the cache's clock, and part that it is over. What is used from the
// beginning of a campaign on, others do not evict for what they prefetch: or each would drive out what was brought a
// moment ago.
func (g *background) join(now int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.prefetches == 0 && time.Since(g.over) > campaignGap {
		g.since = now
		g.next = time.Now() // no credit for the time before
	}
	g.prefetches++
}

func (g *background) part() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.prefetches--
	g.over = time.Now()
}

// began is when the campaign began.
func (g *background) began() int64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.since
}

// mayBegin waits until f's fetch may begin. What of it readers come for meanwhile, they have fetched by themselves.
func (f *flight) mayBegin() error {
	s := f.blob.store
	g := s.cache.background
	yielded := time.Duration(0) // to other processes
	if !f.slot {
		if err := g.begin(f.blob.ctx, f.blob.ctx); err != nil {
			return err
		}
		f.slot = true
	}
	for {
		changed := g.watch()
		if f.blob.ctx.Err() != nil {
			return f.blob.ctx.Err()
		}
		calm, wait := g.calm(), time.Duration(0)
		if g.inAdvance(s.chunkSize) {
			wait = g.delay()
		}
		switch {
		case calm && wait <= 0 && yielded < longestPause && s.cache.outside.waiting():
			began := time.Now()
			f.sleep(glance, changed)
			yielded += time.Since(began)
		case calm && wait <= 0:
			return nil
		case calm:
			f.sleep(wait, changed)
		default:
			select {
			case <-changed:
			case <-f.blob.ctx.Done():
			}
		}
	}
}

// delay is how long the rate has f wait.
func (f *flight) delay() time.Duration {
	g := f.blob.store.cache.background
	if f.ranged && f.end == f.first+1 && g.inAdvance(f.blob.store.chunkSize) {
		return 0 // it has waited; a stream has not
	}
	return g.delay()
}

// mayRead waits until f may read on in its body: while somebody waits for what f is to bring, at once, and then the
// bytes are not of the background any more.
func (f *flight) mayRead() (promoted bool, err error) {
	g, others := f.blob.store.cache.background, f.blob.store.cache.outside
	if g.idle() && f.delay() <= 0 && !others.waiting() {
		g.favor(f, false)
		return false, nil
	}
	f.paused.Store(true)
	defer func() {
		f.heard.Store(time.Now().UnixNano()) // the silence was ours
		f.paused.Store(false)
	}()
	for {
		changed := g.watch()
		if err := f.blob.ctx.Err(); err != nil {
			return false, err
		}
		promoted := f.promoted() || g.hurry && !g.idle()
		g.favor(f, promoted)
		if promoted {
			return true, nil
		}
		wait := f.delay()
		free := g.free()
		outside := free && others.waiting()
		if pause := longestPause - f.rested; !free && pause > 0 {
			wait = max(wait, pause)
		} else if outside && pause > 0 {
			wait = max(wait, glance)
		}
		if wait <= 0 {
			return false, nil
		}
		began := time.Now()
		f.sleep(wait, changed)
		f.slept += time.Since(began)
		if !free || outside {
			f.rested += time.Since(began)
		}
	}
}

// tire has a stream, which is as long as the blob, let others go first anew after each piece of it.
func (f *flight) tire(n int) {
	if !f.stream {
		return
	}
	if f.tired += int64(n); f.tired >= prefetchPiece {
		f.tired, f.rested = 0, 0
	}
}

// sleep waits for a time, a change, or the end.
func (f *flight) sleep(d time.Duration, changed <-chan struct{}) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-changed:
	case <-f.blob.ctx.Done():
	}
}

// promoted says whether a reader waits for what f is to bring.
func (f *flight) promoted() bool {
	s := f.blob.store
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, pend := range s.inflight {
		if pend.flight == f && pend.wanted > 0 {
			return true
		}
	}
	return false
}

// readers is how many wait.
func (g *background) readers() int64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return int64(g.waiting + g.served)
}

// loose says that a reader has a chunk in flight fetched by a flight of its own: what was to bring it stands still, or
// waits for its turn behind all readers. The caller holds store.mu.
func (p *pending) loose() bool {
	f := p.flight
	return p.ahead && f.quiet() || f.background && (f.waits || !f.begun)
}

// readBehind reads when the background may.
func (r flightReader) readBehind(p []byte) (int, error) {
	promoted, err := r.flight.mayRead()
	switch {
	case err != nil:
		return 0, err
	case promoted:
		return r.read(p)
	}
	g := r.flight.blob.store.cache.background
	n, err := r.read(p[:g.portion(len(p))])
	g.spend(n)
	r.flight.tire(n)
	return n, err
}
