package blobcache

import "testing"

// TestCacheStatsOfBlobs: what blobs counted is in the sum, also when they are closed, and what others are verified by is
// told apart.
func TestCacheStatsOfBlobs(t *testing.T) {
	c := openCache(t, Options{})
	read := func(o OpenOptions, size int) {
		t.Helper()
		s := newServer(size)
		b := openWith(t, c, s, o)
		for range 2 { // a miss, a hit
			if err := readNow(ctx, b, s, 0, int64(size)); err != nil {
				t.Fatal(err)
			}
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	}
	read(OpenOptions{}, 2*cs)
	read(OpenOptions{}, 3*cs)
	read(OpenOptions{Beneath: true}, 4*cs)
	s := newServer(5 * cs)
	still := openWith(t, c, s, OpenOptions{})
	if err := readNow(ctx, still, s, 0, 5*cs); err != nil {
		t.Fatal(err)
	}
	got := c.Stats()
	if want := (Stats{Fetches: 3, FetchesDemand: 3, BytesFetched: 10 * cs, BytesDemand: 10 * cs, BytesServed: (2*2 + 2*3 + 5) * cs, Hits: 2, Misses: 3}); got.Blobs != want {
		t.Errorf("%+v, want %+v", got.Blobs, want)
	}
	if want := (Stats{Fetches: 1, FetchesDemand: 1, BytesFetched: 4 * cs, BytesDemand: 4 * cs, BytesServed: 8 * cs, Hits: 1, Misses: 1}); got.Beneath != want {
		t.Errorf("beneath: %+v, want %+v", got.Beneath, want)
	}
}
