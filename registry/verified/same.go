package verified

import (
	"context"
	"crypto/sha256"
	"fmt"
	"sync"
)

// A Same sees to it that a blob stays what it was: where nothing vouches for its parts, they
// are believed as they come, but only once. The bytes of a chunk that come a second time, as
// after it was evicted, have to be those of the first time. So what [CheckWhole] finds right
// in the end is what everybody was given before, and is given after that.
//
// It says nothing of whether the bytes are right, and knows only of what came while it lives.
// It remembers 32 bytes of each chunk that came, and where that is.
type Same struct {
	changed func(error)

	mu    sync.Mutex // guards what follows
	first map[int64]firstSeen
}

// A firstSeen is a chunk, as it came first.
type firstSeen struct {
	n   int
	sum [sha256.Size]byte
}

// NewSame makes one that has seen nothing. It tells changed of each chunk that came as
// another one than before.
func NewSame(changed func(error)) *Same {
	return &Same{changed: changed, first: make(map[int64]firstSeen)}
}

// A ChangedError says that a part of a blob is not what it was.
type ChangedError struct{ Off, Len int64 }

func (e *ChangedError) Error() string {
	return fmt.Sprintf("its %d bytes at %d are others than they were before", e.Len, e.Off)
}

// Temporary says that it makes no sense to fetch it again: nobody knows which was right.
func (e *ChangedError) Temporary() bool { return false }

// Verify is the hook of a cache, for each chunk that it takes in.
func (s *Same) Verify(_ context.Context, p []byte, off int64) error {
	is := firstSeen{len(p), sha256.Sum256(p)}
	s.mu.Lock()
	was, seen := s.first[off]
	if !seen {
		s.first[off] = is
	}
	s.mu.Unlock()
	if !seen || was == is {
		return nil
	}
	err := &ChangedError{Off: off, Len: int64(len(p))}
	s.changed(err)
	return err
}
