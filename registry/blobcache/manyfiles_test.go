package blobcache

import (
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"
)

// limitFiles has this process open no file whose number would be as high, until the test ends.
func limitFiles(t *testing.T, most uint64) {
	t.Helper()
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	few := before
	few.Cur = most
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &few); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
			t.Error(err)
		}
	})
}

// TestManyFiles: what is kept of many blobs is evicted by who may have a few files open; and a file that cannot be opened
// is none that is broken.
func TestManyFiles(t *testing.T) {
	const blobs = 100
	c := openCache(t, Options{ChunkSize: cs, Readahead: -1})
	s := newServer(cs)
	for i := range blobs {
		b, err := c.Open("sha256:"+fmt.Sprintf("%064x", i), cs, s, OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(readNow(ctx, b, s, 0, cs), b.Close()); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("none", func(t *testing.T) {
		tenants, err := c.tenants()
		if err != nil || len(tenants) != blobs {
			t.Fatalf("%d tenants, %v", len(tenants), err)
		}
		limitFiles(t, 0)
		if _, err := tenants[0].victims(); !errors.Is(err, unix.EMFILE) {
			t.Errorf("%v", err)
		}
	})
	if n := kept(t, c); n != blobs*cs {
		t.Errorf("%d bytes are kept, want %d", n, blobs*cs)
	}
	t.Run("few", func(t *testing.T) {
		limitFiles(t, 40)
		if _, err := c.Prune(0); err != nil {
			t.Error(err)
		}
	})
	if n := kept(t, c); n != 0 {
		t.Errorf("%d bytes are kept", n)
	}
}
