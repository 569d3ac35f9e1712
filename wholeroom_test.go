package main

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/registry/blobcache"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/thin"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

// newWholeShelf has a layer that is read as a whole, see pushWhole.
func newWholeShelf(t *testing.T, n, size int) *shelf {
	t.Helper()
	s := newShelf(t)
	s.pushWhole(n, size)
	return s
}

// pushWhole has the tag lead to one layer that is read as a whole: n bytes that do not compress, and zeros behind them
// up to size.
func (s *shelf) pushWhole(n, size int) {
	s.t.Helper()
	image := make([]byte, size)
	copy(image, noise(n))
	b := verifiable.Make(s.t, image, verifiable.Options{Zstd: true})
	s.blobs, s.want = []*verifiable.Blob{b}, [][]byte{b.Plain}
	_, err := ocipush.Push(s.t.Context(), s.registry.URL(), "x:v1", b.Layers(), ocipush.Options{})
	must(s.t, err)
}

// smallDisk has the cache be on a file system of this size.
func (s *shelf) smallDisk(size string) {
	s.t.Helper()
	require.Has(s.t, "root")
	dir := s.t.TempDir()
	must(s.t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size))
	s.t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			s.t.Error(err)
		}
	})
	s.dir = dir + "/cache"
}

// TestWholeTakesTwice: a layer that is decompressed as a whole needs room for itself and for what it decompresses to,
// once each, whether it is kept or not, the first time and later.
func TestWholeTakesTwice(t *testing.T) {
	const mib = 1 << 20
	s := newWholeShelf(t, 18*mib, 42*mib)
	s.smallDisk("68M")
	s.size, s.free = "40M", "1M"
	for k, gets := range []int{1, 0} {
		o := s.mustOpen(false)
		if st := s.registry.Stats(); st.BlobGETs != gets {
			t.Errorf("mount %d: %+v, want %d GETs of blobs", k, st, gets)
		}
		if failed := s.readAll(o); failed > 0 {
			t.Errorf("mount %d: %d reads failed", k, failed)
		}
		must(t, o.Close())
	}
	s.registry.Stop()
	if failed := s.readAll(s.mustOpen(true)); failed > 0 {
		t.Errorf("offline: %d reads failed", failed)
	}
}

// TestCacheGivesWay: what was not read for longest makes room for what a layer decompresses to; not offline, since it
// could not be had again.
func TestCacheGivesWay(t *testing.T) {
	const mib = 1 << 20
	s := newWholeShelf(t, 18*mib, 20*mib)
	s.smallDisk("68M")
	s.size, s.free = "40M", "1M"
	s.fill()
	s.pushWhole(17*mib, 20*mib)
	s.fill()
	if there := s.kept(); len(there) != 2 {
		t.Fatalf("the test proves nothing: kept are %v", there)
	}
	ballast, err := os.Create(filepath.Dir(s.dir) + "/ballast")
	must(t, err)
	defer ballast.Close()
	must(t, unix.Fallocate(int(ballast.Fd()), 0, 0, 14*mib))
	if _, err := s.open(true); !errors.Is(err, unix.ENOSPC) || len(s.kept()) != 2 {
		t.Errorf("offline: %v; kept are %v", err, s.kept())
	}
	if failed := s.readAll(s.mustOpen(false)); failed > 0 {
		t.Errorf("%d reads failed", failed)
	}
	if st := s.registry.Stats(); st.BlobGETs != 0 || len(s.kept()) != 1 || s.kept()[0] != digest.FromBytes(s.blobs[0].Data).String() {
		t.Errorf("%+v; kept are %v", st, s.kept())
	}
}

// TestWholeOnThinDisk: what a layer decompresses to is on the disk before anybody reads it, or the mount fails; and so is
// what was fetched of it and not kept.
func TestWholeOnThinDisk(t *testing.T) {
	const mib = 1 << 20
	for name, size := range map[string]string{"kept": "100M", "not kept": "20M"} {
		t.Run(name, func(t *testing.T) {
			s := newWholeShelf(t, 18*mib, 20*mib)
			s.dir = thin.Disk(t, 128*mib, 8*mib) + "/cache"
			s.size, s.free = size, "1M"
			o, err := s.open(false)
			if err == nil {
				t.Errorf("it was mounted; %d reads failed, %v", s.readAll(o), o.Close())
			} else if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EIO) || !strings.Contains(err.Error(), "--cache-dir") {
				t.Error(err)
			}
			if left := openFiles(t, s.dir); len(left) != 0 {
				t.Errorf("left behind: %q", left)
			}
		})
	}
}

// kept are the blobs of more than a MiB all of which is in the cache.
func (s *shelf) kept() (found []string) {
	s.t.Helper()
	c, err := blobcache.New(s.dir, blobcache.Options{})
	must(s.t, err)
	defer c.Close()
	list, err := c.List()
	must(s.t, err)
	for _, k := range list {
		if k.Size > 1<<20 && k.Present == k.Size {
			found = append(found, k.Digest)
		}
	}
	return found
}

// TestWholeBesideWhatIsInUse: where the cache has no room for a layer, since another process uses it up, the rest of the
// layer comes by one request more, or two, whether the server knows ranges or not.
func TestWholeBesideWhatIsInUse(t *testing.T) {
	const mib = 1 << 20
	for name, fault := range map[string]fakeregistry.Plan{"ranges": nil, "no ranges": fakeregistry.NoRanges().OnBlobs()} {
		t.Run(name, func(t *testing.T) {
			s := newWholeShelf(t, 40*mib, 41*mib)
			s.size = "90M"
			other, err := blobcache.New(s.dir, blobcache.Options{})
			must(t, err)
			defer other.Close()
			data := noise(76 * mib)
			used, err := other.Open(digest.FromBytes(data).String(), int64(len(data)), liar{data}, blobcache.OpenOptions{})
			must(t, err)
			must(t, used.ReadAt(t.Context(), make([]byte, len(data)), 0))
			s.registry.SetFault(fault)
			o := s.mustOpen(false)
			// There may be one more of the piece that is asked for just when the room ends.
			if st := s.registry.Stats(); st.BlobGETs != 2 && st.BlobGETs != 3 {
				t.Errorf("%+v, want 2 GETs of blobs", st)
			}
			if failed := s.readAll(o); failed > 0 {
				t.Errorf("%d reads failed", failed)
			}
			if all := openFiles(t, s.dir); len(all) != 1 {
				t.Errorf("open are %q", all)
			}
		})
	}
}

// noise are bytes that do not compress.
func noise(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(n)}).Read(b)
	return b
}
