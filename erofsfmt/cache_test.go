package erofsfmt

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
)

func key(n int64) cacheKey { return cacheKey{at: place{0, n}} }

func TestCacheLimit(t *testing.T) {
	c := newCache(10 * 1160) // ten values of 1000 bytes
	ctx := context.Background()
	fill := func(n int64) bool {
		made := false
		b, err := c.fill(ctx, key(n), 1, func() (*block, error) {
			made = true
			return &block{data: bytes.Repeat([]byte{byte(n)}, 1000)}, nil
		})
		if err != nil || len(b.data) != 1000 || b.data[0] != byte(n) {
			t.Fatalf("%v", err)
		}
		return made
	}
	for n := range int64(10) {
		if !fill(n) {
			t.Errorf("%d was there", n)
		}
	}
	fill(0) // now 1 is the oldest
	fill(10)
	if _, ok := c.get(key(1), 1); ok {
		t.Error("1 was kept")
	}
	for _, n := range []int64{0, 2, 9, 10} {
		if fill(n) {
			t.Errorf("%d was forgotten", n)
		}
	}
	if c.used != c.limit || len(c.entries) != 10 {
		t.Errorf("%d bytes in %d entries, want %d in 10", c.used, len(c.entries), c.limit)
	}
	if _, err := c.fill(ctx, key(99), 1, func() (*block, error) { return &block{data: make([]byte, 1<<20)}, nil }); err != nil {
		t.Fatal(err)
	}
	if _, ok := c.get(key(99), 1); ok || len(c.entries) != 10 {
		t.Error("a value above the limit was kept")
	}
}

// A value that is too short is made again and replaced.
func TestCacheGrows(t *testing.T) {
	c := newCache(1 << 20)
	for _, n := range []int64{10, 100, 50} {
		b, err := c.fill(context.Background(), key(1), n, func() (*block, error) { return &block{data: make([]byte, n)}, nil })
		if err != nil || int64(len(b.data)) < n {
			t.Fatalf("too few bytes for %d, %v", n, err)
		}
	}
	if b, ok := c.get(key(1), 100); !ok || len(b.data) != 100 || len(c.entries) != 1 {
		t.Errorf("%v, %d entries", ok, len(c.entries))
	}
}

// Parallel callers make a value once; a caller whose leader fails makes it
// itself; one whose ctx ends leaves.
func TestCacheFlights(t *testing.T) {
	c := newCache(1 << 20)
	bad := errors.New("bad")
	began, release := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		_, err := c.fill(context.Background(), key(1), 1, func() (*block, error) { close(began); <-release; return nil, bad })
		if err != bad {
			t.Errorf("the leader: %v", err)
		}
	})
	<-began
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := c.fill(ended, key(1), 1, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("a waiter whose ctx ended: %v", err)
	}
	made := 0 // written by one leader at a time
	for range 4 {
		wg.Go(func() {
			b, err := c.fill(context.Background(), key(1), 1, func() (*block, error) { made++; return &block{data: []byte{1}}, nil })
			if err != nil || len(b.data) != 1 {
				t.Errorf("a waiter: %v", err)
			}
		})
	}
	close(release)
	wg.Wait()
	if made != 1 || len(c.flights) != 0 {
		t.Errorf("made %d times, %d flights left", made, len(c.flights))
	}
}
