package blobcache

import (
	"context"
	"io"
	"os"
	"slices"
	"sync"
	"testing"
	"time"
)

// TestSizes: a blob is found by its digest and origin, whatever somebody else says of it.
func TestSizes(t *testing.T) {
	dir := t.TempDir() + "/cache"
	c := openCacheAt(t, dir, Options{ChunkSize: cs, Readahead: -1})
	for _, b := range []struct {
		size   int
		origin string
		unit   int64
	}{{10, "one", cs}, {3*cs + 1, "one", cs}, {3*cs + 1, "one", 2 * cs}, {99, "two", cs}} {
		s := newServer(b.size)
		kept := openWith(t, c, s, OpenOptions{Origin: b.origin, ChunkSize: b.unit})
		if err := readNow(ctx, kept, s, 0, int64(b.size)); err != nil {
			t.Fatal(err)
		}
	}
	sizes := func(want ...int64) {
		t.Helper()
		for i, origin := range []string{"one", "two", "three"} {
			expect := [][]int64{want[:len(want)-1], want[len(want)-1:], nil}[i]
			if got, err := c.Sizes(testDigest, origin); err != nil || !slices.Equal(got, expect) {
				t.Errorf("%s: %v, %v; want %v", origin, got, err, expect)
			}
		}
	}
	sizes(10, 3*cs+1, 99)
	if _, err := c.Sizes("sha256:short", "one"); err == nil {
		t.Error("found something that is no digest")
	}
	// A header that is damaged says nothing.
	name := dir + "/" + version + "/" + fileName(nameOf(testDigest, 10, "one"), cs)
	if err := os.Truncate(name, 100); err != nil {
		t.Fatal(err)
	}
	sizes(3*cs+1, 99)
}

// A resting is a Fetcher of data that is verified by another blob, which it reads before it answers.
type resting struct {
	*server
	beneath *Blob
	waiting *sync.WaitGroup // until all have a slot
}

func (r *resting) Fetch(ctx context.Context, off, n int64) (io.ReadCloser, int64, int64, error) {
	r.waiting.Done()
	r.waiting.Wait()
	if err := r.beneath.ReadAt(ctx, make([]byte, cs), off); err != nil {
		return nil, 0, 0, err
	}
	return r.server.Fetch(ctx, off, n)
}

// TestBeneath: flights that have all the slots there are get what they verify by, and do not have to wait until it is
// said that nothing goes on.
func TestBeneath(t *testing.T) {
	stage(t, func(t *testing.T) {
		const flights = 2
		c := openCache(t, Options{ChunkSize: cs, MaxFetches: flights, Readahead: -1})
		tree := newServer(flights * cs)
		var waiting sync.WaitGroup
		waiting.Add(flights)
		data := newServer(flights * cs)
		r := &resting{data, openWith(t, c, tree, OpenOptions{Origin: "tree", Beneath: true}), &waiting}
		b, err := c.Open(testDigest, flights*cs, r, OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { b.Close() })
		began := time.Now()
		var readers sync.WaitGroup
		for i := range int64(flights) {
			readers.Go(func() {
				if err := readNow(ctx, b, data, i*cs, cs); err != nil {
					t.Error(err)
				}
			})
		}
		readers.Wait()
		if d := time.Since(began); d > 0 {
			t.Errorf("it took %v, and nobody was slow", d)
		}
		tree.checkOnce(t)
	})
}
