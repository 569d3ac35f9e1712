package blobcache

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"sync"
	"testing"
)

// quietCaches are n processes, as far as locks go, that fetch nothing ahead.
func quietCaches(t *testing.T, dir string, n int) []*Cache {
	t.Helper()
	var all []*Cache
	for range n {
		all = append(all, openCacheAt(t, dir, Options{ChunkSize: cs, Readahead: -1}))
	}
	return all
}

// kept is how much of the test's blob can be found by who opens it.
func kept(t *testing.T, c *Cache) (present int64) {
	t.Helper()
	list, err := c.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range list {
		present += k.Present
	}
	return present
}

func TestPurge(t *testing.T) {
	s := newServer(4 * cs)
	c := openCache(t, Options{ChunkSize: cs, Readahead: -1})
	b := openBlob(t, c, s)
	if err := errors.Join(readNow(ctx, b, s, 0, 4*cs), b.Purge()); err != nil {
		t.Fatal(err)
	}
	if err := b.ReadAt(ctx, make([]byte, 1), 0); !errors.Is(err, os.ErrClosed) || b.ReadResident(make([]byte, 1), 0) {
		t.Errorf("a purged blob is read: %v", err)
	}
	if n, err := c.occupied(); err != nil || n > 16<<10 {
		t.Errorf("%d bytes are occupied, %v", n, err)
	}
	again := openBlob(t, c, s)
	if err := readNow(ctx, again, s, 0, 4*cs); err != nil {
		t.Error(err)
	}
	if got := s.asked(); !slices.Equal(got, []request{{0, 4 * cs}, {0, 4 * cs}}) {
		t.Errorf("requests %v", got)
	}
	if err := errors.Join(b.Purge(), b.Close()); err != nil || kept(t, c) != 4*cs {
		t.Errorf("a second purge took %d bytes of another file, %v", 4*cs-kept(t, c), err)
	}
}

// TestPurgeWhileOthersWrite: what is counted at a purge is never less than what is there or being written, whoever
// writes meanwhile.
func TestPurgeWhileOthersWrite(t *testing.T) {
	const blobs = 20
	c := openCache(t, Options{ChunkSize: cs, Readahead: -1})
	written := newServer(blobs * 16 * cs)
	b := openBlob(t, c, written)
	var writers sync.WaitGroup
	for i := range int64(4) {
		writers.Go(func() {
			for chunk := i; chunk < blobs*16; chunk += 4 {
				if err := readNow(ctx, b, written, chunk*cs, cs); err != nil {
					t.Error(err)
				}
			}
		})
	}
	s := newServer(2 * cs)
	for range blobs {
		bad := openWith(t, c, s, OpenOptions{Origin: "bad"})
		if err := errors.Join(readNow(ctx, bad, s, 0, 2*cs), bad.Purge(), bad.Close()); err != nil {
			t.Error(err)
		}
		err := c.space.locked(ctx, func() error {
			there, err := c.occupied()
			if used, ok := c.space.read(); !ok || used < there {
				t.Errorf("%d bytes are counted, %v, and %d are there", used, ok, there)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
	writers.Wait()
}

// A blob that is purged while another process reads it is left to that one, which can read and complete it; but
// neither its lease, nor what it still writes, comes to who opens the blob later.
func TestPurgeShared(t *testing.T) {
	dir := t.TempDir()
	caches := quietCaches(t, dir, 3)
	s, fresh := newServer(6*cs), newServer(6*cs)
	a, other := openBlob(t, caches[0], s), openBlob(t, caches[1], s)
	complete := make(chan struct{})
	asking := openWith(t, caches[1], s, OpenOptions{OnComplete: func() bool { close(complete); return true }})
	if err := errors.Join(readNow(ctx, a, s, 0, 5*cs), readNow(ctx, other, s, 0, 2*cs), a.Purge()); err != nil {
		t.Fatal(err)
	}
	if n := kept(t, caches[2]); n != 0 {
		t.Errorf("%d bytes of a purged blob are found", n)
	}
	late := openBlob(t, caches[2], fresh)
	if err := errors.Join(readNow(ctx, asking, s, 0, 6*cs), readNow(ctx, late, fresh, 0, cs)); err != nil {
		t.Fatal(err)
	}
	<-complete
	sameCache := openBlob(t, caches[1], fresh)
	if err := readNow(ctx, sameCache, fresh, 5*cs, cs); err != nil {
		t.Error(err)
	}
	if got, want := fresh.asked(), []request{{0, cs}, {5 * cs, cs}}; !slices.Equal(got, want) {
		t.Errorf("later ones asked for %v, want %v", got, want)
	}
	// Both find it wrong.
	if err := errors.Join(asking.Purge(), other.Close(), asking.Close(), a.Close()); err != nil {
		t.Fatal(err)
	}
	if n := kept(t, caches[2]); n != 2*cs {
		t.Errorf("%d bytes are kept, want the %d of who came later", n, 2*cs)
	}
	s.checkOnce(t)
}

// A flight that is in the air when its blob is purged brings nothing back.
func TestPurgeInFlight(t *testing.T) {
	dir := t.TempDir()
	caches := quietCaches(t, dir, 2)
	s := newServer(4 * cs)
	s.gates = map[int64]chan struct{}{2*cs + 1: make(chan struct{})}
	a, b := openBlob(t, caches[0], s), openBlob(t, caches[1], s)
	own, theirs := read(ctx, a, s, 0, 4*cs), read(ctx, b, s, 0, 4*cs)
	if err := errors.Join(readNow(ctx, a, s, 0, 2*cs), readNow(ctx, b, s, 0, 2*cs), a.Purge()); err != nil {
		t.Fatal(err)
	}
	if err := <-own.done; !errors.Is(err, os.ErrClosed) {
		t.Errorf("a read of a purged blob: %v", err)
	}
	close(s.gates[2*cs+1])
	if err := <-theirs.done; err != nil {
		t.Errorf("a read of another process: %v", err)
	}
	if n := kept(t, caches[1]); n != 0 {
		t.Errorf("%d bytes of a purged blob are found", n)
	}
}

// Blobs share chunks only where the same thing has let them in, and are removed all together.
func TestOrigins(t *testing.T) {
	dir := t.TempDir()
	caches := quietCaches(t, dir, 2)
	servers := []*server{newServer(3 * cs), newServer(3 * cs), newServer(3 * cs), newServer(3*cs + 1)}
	for i, o := range []OpenOptions{{Origin: "index a"}, {Origin: "index b"}, {}, {}} {
		for round, c := range caches {
			b := openWith(t, c, servers[i], o)
			if err := errors.Join(readNow(ctx, b, servers[i], 0, 3*cs), b.Close()); err != nil {
				t.Errorf("%+v, round %d: %v", o, round, err)
			}
		}
		if got := servers[i].asked(); !slices.Equal(got, []request{{0, 3 * cs}}) {
			t.Errorf("%d: requests %v", i, got)
		}
	}
	list, err := caches[0].List()
	if err != nil || len(list) != 4 {
		t.Fatalf("%d are kept, want 4: %v", len(list), err)
	}
	for _, k := range list {
		if k.Digest != testDigest {
			t.Errorf("digest %s", k.Digest)
		}
	}
	checks := 0
	err = caches[0].Verify(ctx, func(c Check) error {
		if c.Digest == testDigest && c.Chunks == 3 && c.Damaged == 0 {
			checks++
		}
		return nil
	})
	if err != nil || checks != 4 {
		t.Errorf("%d are sound, %v", checks, err)
	}
	if _, err := caches[0].Remove(testDigest); err != nil || kept(t, caches[0]) != 0 {
		t.Errorf("removed: %d bytes are kept, %v", kept(t, caches[0]), err)
	}
}

func TestNames(t *testing.T) {
	// The hash was computed by sha256sum of "5\nx".
	if got, want := nameOf(testDigest, 5, "x"), testDigest+"+"+"9da7e3f605fe338211706d8973d4a4a2"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	hex := string(bytes.Repeat([]byte("0123456789abcdef"), 4))
	good := "0123456789abcdef0123456789abcdef"
	for file, ok := range map[string]bool{
		"sha256-" + hex + "+" + good + ".4096":        true,
		"sha256-" + hex + ".4096":                     false,
		"sha256-" + hex + "+.4096":                    false,
		"sha256-" + hex + "+" + good[1:] + ".4096":    false,
		"sha256-" + hex + "+" + good + "0.4096":       false,
		"sha256-" + hex + "+" + good[1:] + "A.4096":   false,
		"sha256-" + hex + "+" + good[1:] + "/.4096":   false,
		"sha256-" + hex + "+" + good + "+" + ".4096":  false,
		"sha256-" + hex + "++" + good[1:] + ".4096":   false,
		"sha256-" + hex + "+" + good + ".04096":       false,
		"sha256-" + hex[1:] + "+" + good + "0" + ".4": false,
	} {
		name, unit, got := parseFileName(file)
		if got != ok || ok && fileName(name, unit) != file {
			t.Errorf("%s: %q, %d, %v", file, name, unit, got)
		}
	}
}
