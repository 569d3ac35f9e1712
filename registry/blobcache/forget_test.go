package blobcache

import (
	"errors"
	"slices"
	"testing"
)

// TestForget: what is forgotten is fetched again, and kept as it comes then; the rest stays as it is.
func TestForget(t *testing.T) {
	dir := t.TempDir()
	bad, good := newServer(4*cs), newServer(4*cs)
	for i := range bad.content {
		bad.content[i] ^= 1
	}
	o := Options{ChunkSize: cs, Readahead: -1}
	c := openCacheAt(t, dir, o)
	old := openWith(t, c, bad, OpenOptions{})
	if err := errors.Join(readNow(ctx, old, bad, 0, 4*cs), old.Close()); err != nil {
		t.Fatal(err)
	}
	b := openWith(t, c, good, OpenOptions{})
	if err := readNow(ctx, b, bad, 0, 4*cs); err != nil {
		t.Fatal(err)
	}
	if err := b.Forget(cs+1, cs); err != nil { // parts of two chunks
		t.Fatal(err)
	}
	if present, end := b.Present(0); !present || end != cs {
		t.Errorf("present %v up to %d", present, end)
	}
	if b.ReadResident(make([]byte, 1), 2*cs) {
		t.Error("what was forgotten is here")
	}
	if err := errors.Join(readNow(ctx, b, good, cs, 2*cs), readNow(ctx, b, bad, 0, cs), readNow(ctx, b, bad, 3*cs, cs)); err != nil {
		t.Error(err)
	}
	if got, want := good.asked(), []request{{cs, 2 * cs}}; !slices.Equal(got, want) {
		t.Errorf("requests %v, want %v", got, want)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	again := openWith(t, openCacheAt(t, dir, o), good, OpenOptions{})
	if err := errors.Join(readNow(ctx, again, good, cs, 2*cs), readNow(ctx, again, bad, 3*cs, cs)); err != nil {
		t.Errorf("what is kept: %v", err)
	}
	for _, outside := range [][2]int64{{-1, 1}, {0, 0}, {4 * cs, 1}, {1, 4 * cs}, {1, 1<<63 - 1}} {
		if b.Forget(outside[0], outside[1]) == nil {
			t.Errorf("%v was forgotten", outside)
		}
	}
}

// TestForgetShared: what another process may be reading is left to it, and this one does without it until that one does
// not read it any more.
func TestForgetShared(t *testing.T) {
	dir := t.TempDir()
	caches := quietCaches(t, dir, 2)
	bad, good := newServer(2*cs), newServer(2*cs)
	for i := range bad.content {
		bad.content[i] ^= 1
	}
	other, b := openBlob(t, caches[0], bad), openBlob(t, caches[1], good)
	if err := errors.Join(readNow(ctx, other, bad, 0, 2*cs), readNow(ctx, b, bad, 0, 2*cs), b.Forget(0, cs)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := errors.Join(readNow(ctx, b, good, 0, cs), readNow(ctx, other, bad, 0, 2*cs)); err != nil {
			t.Error(err)
		}
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := readNow(ctx, b, good, 0, cs); err != nil {
			t.Error(err)
		}
	}
	if got, want := good.asked(), []request{{0, cs}, {0, cs}, {0, cs}}; !slices.Equal(got, want) {
		t.Errorf("requests %v, want %v", got, want)
	}
	if err := readNow(ctx, openBlob(t, openCacheAt(t, dir, Options{ChunkSize: cs}), bad), good, 0, cs); err != nil {
		t.Errorf("what is kept: %v", err)
	}
}
