package blobcache

import (
	"errors"
	"time"
)

// What layers are verified by is read once, as a rule, when they are opened; and without it, what is here of them cannot
// be read without the network. So all that is here of a blob that is open Beneath counts as read just now, whoever looks:
// in this process it goes after everything else, and other processes leave it alone as long as the blob is open.

// lastOfAll is the time of use of what goes after everything else.
const lastOfAll = anyTime - 1

// stays says that what is here of the blob is of use as long as it is open. The caller holds s.mu.
func (s *store) stays() bool {
	for b := range s.blobs {
		if b.beneath {
			return true
		}
	}
	return false
}

// lastUse gives the times by which regions go.
func (s *store) lastUse() func(region int64) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stays() {
		return func(int64) int64 { return lastOfAll }
	}
	return s.used.at
}

// keeps says that nothing of the blob is let go of as long as it is open. The caller holds s.mu.
func (s *store) keeps() bool {
	for b := range s.blobs {
		if b.keep {
			return true
		}
	}
	return false
}

// leaseAll keeps what is here from other processes. What one of them is evicting just now it may have. The caller holds
// s.mu.
func (s *store) leaseAll() (err error) {
	for r := range s.knownRegions {
		err = errors.Join(err, ignore(s.lease(r), errLocked))
	}
	return err
}

// remain has what is here stay for some time more, if it is to. What others are verified by counts as used until somebody
// looks again, so that it is newer than what is read meanwhile. The caller holds s.mu.
func (s *store) remain() error {
	stays := s.stays()
	if stays {
		s.touch(s.cache.clock.Load() + houseEvery.Microseconds())
	}
	if !stays && !s.keeps() {
		return nil
	}
	return s.leaseAll()
}

// touch says when all that is here was used.
func (s *store) touch(when int64) {
	for r := range s.knownRegions {
		s.used.set(r, when)
	}
}

// Touch says that all that is here of the blob was of use just now, although nobody read it.
func (b *Blob) Touch() { b.store.touch(time.Now().UnixMicro()) }
