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
		data, err := c.fill(ctx, key(n), 1, func() ([]byte, error) { made = true; return bytes.Repeat([]byte{byte(n)}, 1000), nil })
		if err != nil || len(data) != 1000 || data[0] != byte(n) {
			t.Fatalf("%d bytes, %v", len(data), err)
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
	if _, err := c.fill(ctx, key(99), 1, func() ([]byte, error) { return make([]byte, 1<<20), nil }); err != nil {
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
		data, err := c.fill(context.Background(), key(1), n, func() ([]byte, error) { return make([]byte, n), nil })
		if err != nil || int64(len(data)) < n {
			t.Fatalf("%d bytes for %d, %v", len(data), n, err)
		}
	}
	if data, ok := c.get(key(1), 100); !ok || len(data) != 100 || len(c.entries) != 1 {
		t.Errorf("%d bytes, %v, %d entries", len(data), ok, len(c.entries))
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
		_, err := c.fill(context.Background(), key(1), 1, func() ([]byte, error) { close(began); <-release; return nil, bad })
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
			data, err := c.fill(context.Background(), key(1), 1, func() ([]byte, error) { made++; return []byte{1}, nil })
			if err != nil || len(data) != 1 {
				t.Errorf("a waiter: %d bytes, %v", len(data), err)
			}
		})
	}
	close(release)
	wg.Wait()
	if made != 1 || len(c.flights) != 0 {
		t.Errorf("made %d times, %d flights left", made, len(c.flights))
	}
}
