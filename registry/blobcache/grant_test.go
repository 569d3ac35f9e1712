package blobcache

import (
	"fmt"
	"testing"
)

// What a process is granted at a time, and what may have been granted to others; in KiB, by hand.
func TestShare(t *testing.T) {
	for _, test := range []struct {
		limit           int64 // MiB
		others          int64
		share, one, all int64 // KiB: ours, with so many others; what one other may have; what all of them may have
	}{
		{0, 0, 4096, 4096, 0},
		{0, 39, 4096, 4096, 39 * 4096},
		{20 << 10, 39, 4096, 4096, 39 * 4096}, // a sixteenth is 320 grants
		{64, 0, 4096, 4096, 0},
		{64, 1, 2048, 4096, 4096},
		{64, 3, 1024, 4096, 4096 + 2048 + 1365},
		{256, 7, 2048, 4096, 4*4096 + 3276 + 2730 + 2340},
		{16, 3, 256, 1024, 1024 + 512 + 341},
		{1, 99, 4, 64, 64 + 32 + 21 + 16 + 12 + 10 + 9 + 8 + 7 + 6 + 5 + 5 + 4*87},
	} {
		s := &space{limit: test.limit << 20}
		if got := s.share(test.others+1) >> 10; got != test.share {
			t.Errorf("limit of %d MiB, %d others: a share of %d KiB, want %d", test.limit, test.others, got, test.share)
		}
		if got := s.reserve(1) >> 10; got != test.one {
			t.Errorf("limit of %d MiB: one other may have %d KiB, want %d", test.limit, got, test.one)
		}
		// Fractions of KiB add up.
		if got := s.reserve(test.others) >> 10; got < test.all || got > test.all+test.others {
			t.Errorf("limit of %d MiB: %d others may have %d KiB, want %d", test.limit, test.others, got, test.all)
		}
	}
}

// Many processes have taken a grant each and used little of it. One fills the cache, and then all use what they have: the
// limit holds, and much of it is used.
func TestGrantsOfMany(t *testing.T) {
	for _, test := range []struct {
		caches int
		limit  int64 // MiB
		atOnce bool  // they come before anybody has a grant
	}{
		{2, 64, false},
		{18, 64, false},
		{18, 64, true},
		{31, 128, false},
		{40, 64, false},
	} {
		if testing.Short() && !test.atOnce {
			continue
		}
		t.Run(fmt.Sprintf("%d caches, %d MiB, at once %v", test.caches, test.limit, test.atOnce), func(t *testing.T) {
			limit := test.limit << 20
			dir := t.TempDir()
			o := Options{MaxBytes: limit, MinFree: -1, Readahead: -1}
			small := &pattern{size: 16 << 20}
			var caches []*Cache
			var blobs []*Blob
			come := func() { caches = append(caches, openCacheAt(t, dir, o)) }
			begin := func(c *Cache) {
				b, err := c.Open("sha256:"+fmt.Sprintf("%064x", len(blobs)), small.size, small, OpenOptions{})
				if err == nil {
					err = b.ReadAt(ctx, make([]byte, 1), 0)
				}
				if err != nil {
					t.Fatal(err)
				}
				blobs = append(blobs, b)
			}
			for range test.caches {
				come()
				if !test.atOnce {
					begin(caches[len(caches)-1])
				}
			}
			if test.atOnce {
				for _, c := range caches {
					begin(c)
				}
			}
			for i, c := range caches {
				if n, err := c.space.others(); err != nil || n != int64(test.caches)-1 {
					t.Errorf("cache %d sees %d others, %v; want %d", i, n, err, test.caches-1)
					break
				}
			}
			first := caches[0]
			big := &pattern{size: 2 * limit}
			b, err := first.Open(testDigest, big.size, big, OpenOptions{})
			if err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, 4<<20)
			for off := int64(0); off < big.size; off += int64(len(buf)) {
				if err := b.ReadAt(ctx, buf, off); err != nil {
					t.Fatal(err)
				}
			}
			if kept := b.Stats().ChunksPresent * b.Unit(); kept < limit/2 || b.Stats().Unkept > 0 {
				t.Errorf("who fills the cache has kept %d MiB of it, and not kept %d chunks", kept>>20, b.Stats().Unkept)
			}
			for i, b := range blobs {
				for b.store.cache.space.left.Load() >= b.Unit() {
					off := b.Stats().ChunksPresent * b.Unit()
					if err := b.ReadAt(ctx, make([]byte, 1), off); err != nil {
						t.Fatalf("cache %d: %v", i, err)
					}
				}
			}
			if took := taken(dir); took > limit+16<<20 {
				t.Errorf("the cache took %d MiB, want at most %d and 16", took>>20, limit>>20)
			}
		})
	}
}
