package blobcache

import (
	"bufio"
	"errors"
)

// A gap is an error of a body that verifies what it gives, and of some bytes only: they do not come, and what is read
// next is what lies behind them. So one chunk that is wrong does not take those behind it with it, nor has them fetched
// once more.
type gap interface {
	error
	Gap() (off, n int64)
}

// gapEnd gives the end of the gap that begins at a byte of the blob, if that is what err says.
func (s *store) gapEnd(err error, at int64) (end int64, ok bool) {
	var g gap
	if !errors.As(err, &g) {
		return 0, false
	}
	off, n := g.Gap()
	return off + n, off == at && n > 0 && n <= s.size-off
}

// passOver refuses the chunks that a gap has a part of, and gives the first one behind it, where r is then. err is what
// the body says at a byte of the blob; if that is no gap, it is the body's end.
func (f *flight) passOver(r *bufio.Reader, at int64, err error) (chunk int64, _ error) {
	s := f.blob.store
	for err != nil {
		end, ok := s.gapEnd(err, at)
		if !ok {
			return 0, broken(err, at)
		}
		chunk = ceil(end, s.chunkSize)
		f.refuseAll(at/s.chunkSize, min(chunk, f.end), err)
		var n int
		n, err = r.Discard(int(min(chunk*s.chunkSize, s.size) - end))
		at = end + int64(n)
	}
	return chunk, nil
}

// refuseAll ends the waits for those of the chunks [first, end) that f was to bring, all at once: who asks for them again
// asks for all of them.
func (f *flight) refuseAll(first, end int64, why error) {
	s := f.blob.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stream == f {
		s.streamNext = max(s.streamNext, end)
	}
	for c := first; c < end; c++ {
		if pend := s.inflight[c]; pend != nil && pend.flight == f {
			s.drop(c, pend, f.refused(c, why))
		}
	}
}
