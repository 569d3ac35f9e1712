package blobcache

import "testing"

// TestPin: what somebody needs again is evicted by nobody until he says so.
func TestPin(t *testing.T) {
	s := newServer(4 * cs)
	dir := t.TempDir()
	o := Options{ChunkSize: cs, Readahead: -1}
	c, other := openCacheAt(t, dir, o), openCacheAt(t, dir, o)
	b := openBlob(t, c, s)
	release := b.Pin()
	again := b.Pin()
	if err := readNow(ctx, b, s, 0, 4*cs); err != nil {
		t.Fatal(err)
	}
	c.clock.Add(2 * idle.Microseconds())
	if err := b.store.keepHouse(true); err != nil {
		t.Fatal(err)
	}
	evictAll(t, c, 0)
	evictAll(t, other, 0)
	again()
	again() // which changes nothing
	evictAll(t, c, 0)
	release()
	evictAll(t, c, 4*cs)
	if n := len(b.store.busy); n != 0 {
		t.Errorf("%d regions are in use", n)
	}
	openBlob(t, c, newServer(0)).Pin()()
}

// TestUnkept: it is counted what found no room.
func TestUnkept(t *testing.T) {
	s := newServer(4 * cs)
	c := openCacheAt(t, t.TempDir(), Options{ChunkSize: cs, Readahead: -1, MaxBytes: 1})
	b := openBlob(t, c, s)
	for k := range int64(4) {
		if err := readNow(ctx, b, s, k*cs, cs); err != nil {
			t.Fatal(err)
		}
		if n := b.Stats().Unkept; n != k+1 {
			t.Errorf("%d chunks found no room, want %d", n, k+1)
		}
	}
}
