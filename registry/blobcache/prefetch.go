package blobcache

import (
	"context"
	"errors"
	"fmt"
)

// Prefetch brings the bytes [off, off+n) onto the disk, behind every read that somebody waits for. It returns when all
// of them are on disk (what already is costs nothing), or with the error of the first chunk that could not be had or
// kept: ErrNoRoom if there is no room for it beside what is in use and what was brought lately. It begins nothing after
// ctx has ended; what is under way then goes on to its end, or to Close.
func (b *Blob) Prefetch(ctx context.Context, off, n int64) error {
	s := b.store
	if off < 0 || n < 0 || off > s.size || n > s.size-off {
		return fmt.Errorf("prefetch %d bytes at %d of %s: outside its %d bytes", n, off, s.digest, s.size)
	}
	if n == 0 {
		return nil
	}
	s.cache.tick()
	s.cache.background.join(s.cache.clock.Load())
	defer s.cache.background.part()
	err := b.prefetchAll(ctx, off/s.chunkSize, ceil(off+n, s.chunkSize))
	if b.closed.Load() || b.ctx.Err() != nil {
		return b.closedError()
	}
	if err != nil {
		return fmt.Errorf("prefetch %d bytes at %d of %s: %w", n, off, s.digest, err)
	}
	return nil
}

// Unit is how many bytes a chunk has, but for the last one.
func (b *Blob) Unit() int64 { return b.store.chunkSize }

// maxPasses is how often a chunk is tried anew that was given up, or that another process had.
const maxPasses = 3

// prefetchAll goes over the chunks until all are there. What could be had the next time is tried anew, a few times
// where that gets nowhere.
func (b *Blob) prefetchAll(ctx context.Context, first, end int64) error {
	for tries, stuck := 0, int64(-1); ; tries++ {
		p := &prefetch{blob: b, next: first, end: end, again: end}
		if err := p.pass(ctx); err != nil {
			return err
		}
		if p.again == end {
			return nil
		}
		if p.again > stuck {
			tries, stuck = 0, p.again
		}
		most := maxPasses
		if errors.As(p.why, new(*refusedError)) {
			most = maxRefetches
		}
		if tries >= most {
			return p.why
		}
		first = p.again
	}
}

// A prefetch is one pass over a range.
type prefetch struct {
	blob      *Blob
	next, end int64 // chunks to look at
	looked    int64 // up to where the disk was asked what is there
	awaited   []awaited
	again     int64 // the first chunk that is to be tried anew
	why       error // it was not had
}

type awaited struct {
	chunk int64
	pend  *pending
}

// lookChunks is how many entries are read at once.
const lookChunks = 4096

// pass begins a flight for each piece of what is absent, as soon as one may begin, and waits for all that is in flight.
func (p *prefetch) pass(ctx context.Context) error {
	b := p.blob
	g := b.store.cache.background
	for p.skip() {
		if err := g.begin(ctx, b.ctx); err != nil {
			return err
		}
		begun := false
		err := p.settle(ctx, len(p.awaited), false) // a flight that failed has given back its slot after it said so
		if err == nil {
			begun, err = p.begin()
		}
		if !begun {
			g.end()
		}
		if err == nil {
			err = p.settle(ctx, b.store.prefetchChunks()*(g.most+1), true)
		}
		if err != nil {
			return err
		}
	}
	return p.settle(ctx, 0, true)
}

// skip passes over what is on disk, and says whether something is left. What is on disk counts as used, so that it is
// not evicted for the rest.
func (p *prefetch) skip() bool {
	s := p.blob.store
	s.mu.Lock()
	defer s.mu.Unlock()
	for ; p.next < p.end; p.next++ {
		if p.next >= p.looked {
			p.looked = min(p.next+lookChunks, p.end)
			s.lookAgain(p.next, p.looked)
		}
		if s.inflight[p.next] != nil || !s.known.has(p.next) {
			return true
		}
		s.use(p.next, p.next+1)
	}
	return false
}

// lookAgain finds out which of the chunks [first, end) are on disk: other processes may have fetched or evicted some.
// The caller holds s.mu.
func (s *store) lookAgain(first, end int64) {
	there := make(map[int64]struct{})
	for c := range s.disk.present(first, end) {
		there[c] = struct{}{}
		s.learn(c)
	}
	for c := first; c < end; c++ {
		if _, ok := there[c]; !ok && s.inflight[c] == nil {
			s.unlearn(c)
		}
	}
}

// begin puts the next run of absent chunks in flight, and takes note of what is in flight in front of that. It says
// whether there is a flight that has the slot now.
func (p *prefetch) begin() (begun bool, err error) {
	b, s := p.blob, p.blob.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.closed.Load() {
		return false, errAbandoned
	}
	if s.disk.nowhere {
		return false, ErrNoRoom
	}
	most := int64(s.prefetchChunks())
	var run *flight
	for seen := int64(0); p.next < p.looked && seen < most; p.next++ {
		c := p.next
		pend := s.inflight[c]
		if run != nil && (pend != nil || s.known.has(c) || s.passes(c)) {
			break
		}
		switch {
		case pend != nil:
		case s.known.has(c):
			continue
		case s.passes(c):
			pend = s.claimBehind(c, s.stream)
		default:
			if run == nil {
				run = b.newFlight(c)
				run.background, run.slot = true, true
			}
			run.end = c + 1
			pend = s.claimBehind(c, run)
		}
		seen++
		p.awaited = append(p.awaited, awaited{c, pend})
	}
	if run != nil {
		b.start([]*flight{run})
	}
	return run != nil, nil
}

// passes says whether the stream will bring an absent chunk. The caller holds s.mu.
func (s *store) passes(chunk int64) bool { return s.stream != nil && chunk >= s.streamNext }

// claimBehind puts an absent chunk in flight that nobody waits for. The caller holds s.mu.
func (s *store) claimBehind(chunk int64, f *flight) *pending {
	pend := s.claim(chunk, f)
	pend.ahead, pend.cause = true, Prefetch
	s.fresh.set(chunk)
	return pend
}

// prefetchChunks is how many chunks a flight of the background asks for.
func (s *store) prefetchChunks() int {
	n := min(s.cache.background.piece(), s.cache.options.MaxSpan) / s.chunkSize
	return int(max(n, 1))
}

// settle takes the chunks off the list that are there. With wait, it waits until no more than most are left.
func (p *prefetch) settle(ctx context.Context, most int, wait bool) error {
	for len(p.awaited) > 0 && (wait && len(p.awaited) > most || p.awaited[0].ended()) {
		a := p.awaited[0]
		select {
		case <-a.pend.done:
		case <-ctx.Done():
			return ctx.Err()
		case <-p.blob.ctx.Done():
			return errAbandoned
		}
		p.awaited = p.awaited[1:]
		err := a.pend.missing()
		if err != nil && !mayComeYet(err) {
			return err
		}
		if err != nil && a.chunk < p.again {
			p.again, p.why = a.chunk, err
		}
	}
	return nil
}

func (a awaited) ended() bool {
	select {
	case <-a.pend.done:
		return true
	default:
		return false
	}
}

// missing says why a chunk whose flight has ended is not on disk; nil if it is.
func (p *pending) missing() error {
	switch {
	case p.failure != nil:
		return p.failure
	case p.err != nil:
		return p.err
	}
	return p.unkept
}

// mayComeYet says whether a chunk that is missing for this reason may be there, or be had, the next time: its fetch was
// given up, or another process had its lock, or it was not what it should be, and might be.
func mayComeYet(err error) bool {
	var refused *refusedError
	return errors.Is(err, errAbandoned) || errors.Is(err, errLocked) || errors.As(err, &refused) && refused.temporary()
}

// OfOneChunk says of an error of Prefetch that it is of one chunk, and nothing is wrong with how others are had: it came
// and was wrong, or another process is at it.
func OfOneChunk(err error) bool {
	var g gap
	return judgement(err) != nil || errors.Is(err, errLocked) || errors.As(err, &g)
}

// noRoom makes the error of a full disk one that says so.
func noRoom(err error) error {
	if full(err) {
		return fmt.Errorf("%w: %w", ErrNoRoom, err)
	}
	return err
}
