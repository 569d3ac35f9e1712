package verified_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
)

// A request is one Fetch.
type request struct {
	place  int
	off, n int64
}

// servers are the places where a blob can be had. Those who come from elsewhere go to the
// next place.
type servers struct {
	good   []byte
	places int
	whole  bool // ranges are not known
	// flip says whether the place gives a wrong byte at off the call-th time that it is
	// asked for it.
	flip func(place int, off int64, call int) bool
	hold chan struct{} // every Fetch waits for it, if there is one

	mu      sync.Mutex // guards what follows
	current int
	asked   []request
	calls   map[[2]int64]int
}

func serve(good []byte, flip func(place int, off int64, call int) bool) *servers {
	return &servers{good: good, places: 1, flip: flip, calls: make(map[[2]int64]int)}
}

// at flips the byte at off always; once does so the first time.
func at(off int64) func(int, int64, int) bool {
	return func(_ int, o int64, _ int) bool { return o == off }
}

func once(off int64) func(int, int64, int) bool {
	return func(_ int, o int64, call int) bool { return o == off && call == 0 }
}

func (s *servers) Places() int { return s.places }

func (s *servers) FetchElsewhere(ctx context.Context, off, n int64, why error) (io.ReadCloser, int64, int64, error) {
	if why == nil {
		return nil, 0, 0, errors.New("why elsewhere is not said")
	}
	s.mu.Lock()
	s.current = (s.current + 1) % s.places
	s.mu.Unlock()
	return s.Fetch(ctx, off, n)
}

func (s *servers) Fetch(_ context.Context, off, n int64) (io.ReadCloser, int64, int64, error) {
	size := int64(len(s.good))
	if off < 0 || n <= 0 || off > size || n > size-off {
		return nil, 0, 0, fmt.Errorf("%d bytes at %d of %d", n, off, size)
	}
	if s.hold != nil {
		<-s.hold
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = append(s.asked, request{s.current, off, n})
	start, end := off, off+n
	if s.whole {
		start, end = 0, size
	}
	body := bytes.Clone(s.good[start:end])
	if s.flip != nil {
		for i := range body {
			key := [2]int64{int64(s.current), start + int64(i)}
			if s.flip(s.current, key[1], s.calls[key]) {
				body[i] ^= 0x10
				s.calls[key]++
			}
		}
	}
	return io.NopCloser(bytes.NewReader(body)), start, size, nil
}

// taken gives the requests since the last call.
func (s *servers) taken() []request {
	s.mu.Lock()
	defer s.mu.Unlock()
	asked := s.asked
	s.asked = nil
	return asked
}

// random are bytes that do not compress.
func random(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(n)}).Read(b)
	return b
}

// get reads a body that must begin at off.
func get(t *testing.T, f interface {
	Fetch(ctx context.Context, off, n int64) (io.ReadCloser, int64, int64, error)
}, off, n int64) ([]byte, error) {
	t.Helper()
	body, start, _, err := f.Fetch(t.Context(), off, n)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	if start != off {
		t.Fatalf("%d bytes at %d: the body starts at %d", n, off, start)
	}
	return io.ReadAll(body)
}
