package blobcache

import (
	"context"
	"hash/maphash"
)

// Passed says whether the chunk of off has passed in this process, and where the run of chunks of which that is true
// ends: it lies on disk, and what the blob is verified by was content with it, be it the hook, a Fetcher that vouches
// for what it brings, or an examination of the whole. What an earlier mount has kept, and this one did not look at, has
// not. off lies in the blob.
func (b *Blob) Passed(off int64) (passed bool, end int64) {
	return b.store.run(b.store.passed, off)
}

// run says whether the chunk of off is in m, and where the run of chunks ends of which that is true.
func (s *store) run(m bitmap, off int64) (in bool, end int64) {
	c := off / s.chunkSize
	return m.has(c), min(runEnd(m, c, s.chunks)*s.chunkSize, s.size)
}

// Examine has check read the blob from front to back, in whatever pieces. If check is content, the chunks that it was
// given have passed, but for those that were taken in anew meanwhile and were not the same.
func (b *Blob) Examine(check func(readAt func(ctx context.Context, p []byte, off int64) error) error) error {
	s := b.store
	e := &exam{blob: b, given: newBitmap(s.chunks)}
	s.mu.Lock()
	s.exams[e] = struct{}{}
	s.mu.Unlock()
	err := check(e.readAt)
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.exams, e)
	if err != nil {
		return err
	}
	for c, was := range s.intakes {
		if !e.given.has(c) {
			continue
		}
		was.passed = true
		s.intakes[c] = was
		if s.known.has(c) {
			s.passed.set(c)
		}
	}
	return nil
}

// An exam is an examination of the whole.
type exam struct {
	blob  *Blob
	given bitmap // chunks whose bytes it was given, if they were not other ones since
}

// examTries is how often a chunk is read that changes while it is read.
const examTries = 3

// readAt reads, and notes before it does which chunks begin in p: what comes as other bytes from then on clears
// that, and was perhaps not read.
func (e *exam) readAt(ctx context.Context, p []byte, off int64) error {
	s := e.blob.store
	if err := s.check(off, len(p)); err != nil {
		return err
	}
	first, end := ceil(off, s.chunkSize), ceil(off+int64(len(p)), s.chunkSize)
	for range examTries {
		for c := first; c < end; c++ {
			e.given.set(c)
		}
		if err := e.blob.ReadAt(ctx, p, off); err != nil {
			return err
		}
		if e.given.all(first, end) {
			break
		}
	}
	return nil
}

// An intake is what a chunk was when it was taken in the last time, of a blob of which only the whole is verified.
type intake struct {
	print  uint64 // of the bytes
	passed bool
}

// takeIn notes that a chunk was taken in, and whether it has passed by itself. If it has not, it is compared with what
// it was before: what an examination was content with need not be examined again because it was evicted, or lent to
// other processes, and came back. The hash's seed is known to nobody who could make up bytes that have it, too. The
// caller holds s.mu.
func (s *store) takeIn(chunk int64, data []byte, passed, onDisk bool) {
	if !passed {
		now := intake{print: maphash.Bytes(s.seed, data)}
		before, again := s.intakes[chunk]
		switch {
		case again && before.print == now.print:
			now = before
		case again:
			s.changed = true
			for e := range s.exams {
				e.given.clear(chunk)
			}
		}
		s.intakes[chunk] = now
		passed = now.passed
	}
	if passed && onDisk {
		s.passed.set(chunk)
	} else {
		s.passed.clear(chunk)
	}
}

// Changed says whether a part of the blob was taken in twice and was not the same, of a blob without a hook: then
// somebody may have read what is wrong, even if the whole is right now.
func (b *Blob) Changed() bool {
	b.store.mu.Lock()
	defer b.store.mu.Unlock()
	return b.store.changed
}
