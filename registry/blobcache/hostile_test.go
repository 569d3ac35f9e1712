package blobcache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// nothingThere is the server of a blob that nobody has.
type nothingThere struct{}

func (nothingThere) Fetch(context.Context, int64, int64) (io.ReadCloser, int64, int64, error) {
	return nil, 0, 0, errServer
}

// allocated is how much f takes from the heap, what is given back included.
func allocated(f func()) int64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return int64(after.TotalAlloc - before.TotalAlloc)
}

// openHostile opens blobs of a size that somebody claims, until one is refused.
func openHostile(c *Cache, size, unit int64) (opened []*Blob, err error) {
	for i := range 200 {
		b, err := c.Open(fmt.Sprintf("sha256:%064x", i), size, nothingThere{}, OpenOptions{ChunkSize: unit})
		if err != nil {
			return opened, err
		}
		opened = append(opened, b)
	}
	return opened, nil
}

// TestHostileSizes: what a manifest claims takes no memory, and no time to look at, but for a few bits for each chunk,
// and there are only so many of those.
func TestHostileSizes(t *testing.T) {
	const tib, most = int64(1) << 40, 128 << 20
	for _, test := range []struct {
		name       string
		size, unit int64
		opened     int
		refused    string
	}{
		{"usual chunks", 15 * tib, 0, 2, "the blobs that are open have 125829120, and may have 134217728 at most"},
		{"large chunks", 15 * tib, MaxChunkSize, 136, "are 983040 chunks; the blobs that are open have 133693440"},
		{"small chunks", 256 << 30, MinChunkSize, 2, "the blobs that are open have 134217728"},
		{"one chunk too many", 256<<30 + 1, MinChunkSize, 0, "are 67108865 chunks, and a blob may have 67108864 at most"},
		{"small ones", 1 << 30, 0, 200, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := openCache(t, Options{})
			var opened []*Blob
			var err error
			took := allocated(func() { opened, err = openHostile(c, test.size, test.unit) })
			if len(opened) != test.opened || (err != nil) != (test.refused != "") || err != nil && !strings.Contains(err.Error(), test.refused) {
				t.Errorf("%d were opened, want %d; then %v, want %q", len(opened), test.opened, err, test.refused)
			}
			if took > most {
				t.Errorf("%d bytes were allocated, %d would do", took, most)
			}
			for _, b := range opened {
				if present, end := b.Present(b.Size() / 2); present || end != b.Size() {
					t.Fatalf("present %v to %d", present, end)
				}
			}
			took = allocated(func() { err = errors.Join(keepAll(c), look(c)) })
			if err != nil || took > int64(len(opened)+1)*(1<<20) {
				t.Errorf("to look after %d of them took %d bytes, %v", len(opened), took, err)
			}
			for _, b := range opened {
				if err := b.Close(); err != nil {
					t.Error(err)
				}
			}
			if c.chunks != 0 {
				t.Errorf("%d chunks are open when no blob is", c.chunks)
			}
		})
	}
}

// keepAll does what is done each 5 s.
func keepAll(c *Cache) (err error) {
	for _, s := range c.hold() {
		err = errors.Join(err, s.keepHouse(true), c.release(s))
	}
	return err
}

// look does what the cache's commands do.
func look(c *Cache) error {
	_, err := c.List()
	_, pruneErr := c.Prune(0)
	return errors.Join(err, pruneErr, c.Verify(ctx, func(Check) error { return nil }))
}

// A counted is a bitmap that counts how often somebody looks at it.
type counted struct {
	bitmap
	looks *int64
}

func (c counted) word(i int64) uint64 {
	*c.looks++
	return c.bitmap.word(i)
}

// TestRunSteps: to see where a run ends takes a look at each 64 chunks and one more.
func TestRunSteps(t *testing.T) {
	m := newBitmap(maxChunks)
	for _, test := range []struct{ first, end, looks int64 }{
		{0, maxChunks, maxChunks/64 + 1}, {100, maxChunks, maxChunks/64 - 1 + 1}, {7, 8, 2},
	} {
		var looks int64
		if end := runEnd(counted{m, &looks}, test.first, test.end); end != test.end || looks != test.looks {
			t.Errorf("from %d to %d: ends at %d after %d looks, want %d", test.first, test.end, end, looks, test.looks)
		}
	}
}

// TestBitmapRuns compares with what a slice of bools says.
func TestBitmapRuns(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		n := rng.Int64N(400) + 1
		m, set := newBitmap(n), make([]bool, n)
		for i := int64(0); i < n; { // runs of all lengths
			run := min(rng.Int64N(150)+1, n-i)
			for in := rng.IntN(2) == 0; run > 0; i, run = i+1, run-1 {
				if set[i] = in; in {
					m.set(i)
				}
			}
		}
		first := rng.Int64N(n)
		end := first + rng.Int64N(n-first) + 1
		runs := first + 1
		for runs < end && set[runs] == set[first] {
			runs++
		}
		if got := runEnd(m, first, end); got != runs {
			t.Fatalf("%v: the run from %d ends at %d, want %d of %d", set, first, got, runs, end)
		}
		var want []int64
		for i := first; i < end; i++ {
			if set[i] {
				want = append(want, i)
			}
		}
		if got := slices.Collect(m.ones(first, end)); !slices.Equal(got, want) {
			t.Fatalf("ones of [%d, %d) are %v, want %v", first, end, got, want)
		}
	}
}

// TestUses: times of use are found again where they were, with holes between them.
func TestUses(t *testing.T) {
	dir := t.TempDir()
	const size = 1 << 40
	want := map[int64]int64{0: 5, 1: 6, 511: 7, 512: 8, 70000: 9, size/regionSize - 1: 10}
	for range 2 {
		c := openCacheAt(t, dir, Options{})
		b, err := c.Open(testDigest, size, nothingThere{}, OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for r, when := range want {
			b.store.used.set(r, when)
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		if b, err = c.Open(testDigest, size, nothingThere{}, OpenOptions{}); err != nil {
			t.Fatal(err)
		}
		found := 0
		for r, when := range b.store.used.used {
			if found++; want[r] != when {
				t.Errorf("region %d was used at %d, want %d", r, when, want[r])
			}
		}
		if found != len(want) || b.store.used.latest() != 10 || b.store.used.at(513) != 0 {
			t.Errorf("%d times of use, the last one %d; want %d", found, b.store.used.latest(), len(want))
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		want[3] = 1 // the second time something is there before
	}
}
