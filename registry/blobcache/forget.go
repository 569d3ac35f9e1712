package blobcache

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Forget is for a range that turned out to be wrong after it was read, where nothing but the reader can tell: the chunks
// that it touches are absent, and are fetched again by the next who wants them. The rest of the blob stays. Where another
// process may be reading such a chunk just now, that one stays on disk as it is, and this process does without keeping
// its own. A read of these chunks that is under way meanwhile may get some of the old bytes and some of the new ones:
// whoever reads what may be forgotten verifies all that he reads.
func (b *Blob) Forget(off, n int64) error {
	s := b.store
	if off < 0 || n <= 0 || off > s.size || n > s.size-off {
		return fmt.Errorf("forget %d bytes at %d of %s: outside its %d bytes", n, off, s.digest, s.size)
	}
	first, end := off/s.chunkSize, (off+n-1)/s.chunkSize+1
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := first; c < end; c++ {
		s.present.clear(c)
		s.fresh.clear(c)
		s.unlearn(c)
	}
	s.generation.Add(1) // before the disk changes
	left := false
	for c := first; c < end; c++ {
		if s.unkeep(c) {
			continue
		}
		left = true
		if pend := s.inflight[c]; pend != nil {
			pend.disputed = true
		}
	}
	if left {
		s.cache.options.Logger.Warn("what is wrong in the cache cannot be removed, since others may read it; it is fetched again, and not kept", "blob", s.digest, "offset", off, "bytes", n)
	}
	return nil
}

// unkeep takes a chunk off the disk whose bytes are wrong, and says whether that went well. Where not, it is tried again
// when the chunk is wanted. The caller holds s.mu, and the chunk is not present.
func (s *store) unkeep(chunk int64) bool {
	if s.disk.nowhere {
		return true
	}
	done := s.alone(chunk, func() error { return s.disk.erase(chunk, chunk+1) }) == nil
	if done {
		delete(s.wrong, chunk)
	} else {
		s.wrong[chunk] = struct{}{}
	}
	return done
}

// alone calls f while no other process can read a chunk or fetch it; it is an error where one may do so just now. The
// caller holds s.mu.
func (s *store) alone(chunk int64, f func() error) (err error) {
	region, before := chunk/s.disk.perRegion, int16(unix.F_UNLCK)
	if s.leased.has(region) {
		before = unix.F_RDLCK
	}
	if err := s.disk.lockRegion(unix.F_WRLCK, region); err != nil {
		return err
	}
	defer func() {
		if unlockErr := s.disk.lockRegion(before, region); unlockErr != nil {
			s.cache.options.Logger.Warn("a part of the cache cannot be shared again", "blob", s.digest, "offset", region*s.disk.perRegion*s.chunkSize, "err", unlockErr)
		}
	}()
	if s.locks[chunk] > 0 {
		return f() // its fetch is ours
	}
	if err := s.disk.lockChunk(unix.F_WRLCK, chunk); err != nil {
		return err
	}
	defer func() {
		if unlockErr := s.disk.lockChunk(unix.F_UNLCK, chunk); err == nil {
			err = unlockErr
		}
	}()
	return f()
}
