package blobcache

import (
	"iter"
	"slices"
	"time"
)

// quiet is how long a flight may be without a byte before a reader takes a chunk that it fetches ahead away from it,
// to wait for a flight of its own; it is also what separates the trouble that such a flight met by itself from the
// trouble that its readers have sat out with it.
const quiet = 5 * time.Second

// touch is called by a reader of present chunks of which one was fetched ahead and is read for the first time.
func (b *Blob) touch(first, end int64) {
	s := b.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.closed.Load() {
		return
	}
	news := end
	for c := first; c < end; c++ {
		if s.read(c) {
			news = min(news, c)
		}
	}
	if news < end {
		b.start(b.readAhead(news, end, nil))
	}
}

// read notes that a chunk is read, and says whether it was fetched ahead for that. The caller holds s.mu.
func (s *store) read(chunk int64) bool {
	if !s.fresh.has(chunk) {
		return false
	}
	s.fresh.clear(chunk)
	return true
}

// wasRead says whether somebody has asked for the chunk. The caller holds s.mu.
func (s *store) wasRead(chunk int64) bool {
	return (s.present.has(chunk) || s.inflight[chunk] != nil) && !s.fresh.has(chunk)
}

// maxStrays is how many reads of what is not planned have nothing guessed.
const maxStrays = 8

// A hold keeps what is planned from being guessed.
type hold struct {
	planned bitmap // chunks; nil: all
	strays  int    // first reads of others
}

// HoldReadahead has nothing of the blob guessed until release is called: nothing from reads of what is planned, which are
// ranges of so many bytes from an offset, nor from a few others. It is for who knows what will be read, and has that
// fetched; but others may read other things meanwhile. A nil plan has all.
func (b *Blob) HoldReadahead(planned iter.Seq2[int64, int64]) (release func()) {
	s := b.store
	h := new(hold)
	if planned != nil {
		h.planned = newBitmap(s.chunks)
		for off, n := range planned {
			for c := off / s.chunkSize; c < min(ceil(off+n, s.chunkSize), s.chunks); c++ {
				h.planned.set(c)
			}
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.holds = append(s.holds, h)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.holds = slices.DeleteFunc(s.holds, func(other *hold) bool { return other == h })
	}
}

// isHeld says whether nothing is to be guessed from the first read of a chunk. The caller holds s.mu.
func (s *store) isHeld(chunk int64) (held bool) {
	for _, h := range s.holds {
		if h.planned != nil && !h.planned.has(chunk) {
			h.strays++
		}
		held = held || h.planned == nil || h.planned.has(chunk) || h.strays <= maxStrays
	}
	return held
}

// readAhead puts in flight what is guessed to be read after the chunks [first, end), of which first is being read for
// the first time. begun are the flights that bring them. What no slot is free for is left for the next time: demand
// does not queue behind a guess, and guesses do not queue. The caller holds s.mu and starts the flights.
func (b *Blob) readAhead(first, end int64, begun []*flight) []*flight {
	s := b.store
	if s.guesser.max == 0 || b.noReadahead || s.isHeld(first) || s.troubled || s.whole {
		return begun
	}
	cursor := s.guesser.follow(first, end)
	from, to := s.guesser.next(cursor)
	begun, cursor.ahead = b.claimAhead(begun, from, to)
	from, to = s.guesser.region(end - 1)
	begun, _ = b.claimAhead(begun, from, to)
	return begun
}

// claimAhead puts the absent ones of the chunks [first, end) in flight, behind those of a flight that has just begun
// where that ends there, and says how far it came.
func (b *Blob) claimAhead(begun []*flight, first, end int64) ([]*flight, int64) {
	s := b.store
	var run *flight
	for c := first; c < end; c++ {
		if s.present.has(c) || s.inflight[c] != nil {
			run = nil
			continue
		}
		if run == nil || c-run.first == s.perFlight() {
			if !s.cache.ahead.TryAcquire(1) {
				return begun, c
			}
			if run = s.endingAt(begun, c); run == nil {
				run = b.newFlight(c)
				begun = append(begun, run)
			}
			run.ahead = true
		}
		run.end = c + 1
		pend := s.claim(c, run)
		pend.ahead, pend.cause = true, Readahead
		s.fresh.set(c)
	}
	return begun, end
}

// endingAt finds a flight that can go on with chunk.
func (s *store) endingAt(begun []*flight, chunk int64) *flight {
	for _, f := range begun {
		if f.end == chunk && !f.ahead && chunk-f.first < s.perFlight() {
			return f
		}
	}
	return nil
}

// forgo lets go of the chunks of f that nobody has asked for. The caller holds s.mu.
func (s *store) forgo(f *flight) {
	for c, pend := range s.inflight {
		if pend.flight == f && s.fresh.has(c) {
			pend.failure = f.unkept
			s.drop(c, pend, errAbandoned)
		}
	}
}
