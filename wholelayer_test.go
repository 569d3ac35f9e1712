package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
	"github.com/erofs-oci/erofs-oci/registry/integrity"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

// openFiles are those of this process below dir, with a name or without.
func openFiles(t *testing.T, dir string) (found []string) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(to, dir+"/decompressed.") {
			found = append(found, to)
		}
	}
	named, err := filepath.Glob(dir + "/decompressed.*")
	must(t, err)
	return append(found, named...)
}

// zeros is a compressed blob that holds n of them.
func zeros(t *testing.T, n int) *verifiable.Blob {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	must(t, err)
	return &verifiable.Blob{Data: w.EncodeAll(make([]byte, n), nil), MediaType: registry.MediaTypeErofsZstd}
}

// TestWholeHasRoom: a compressed layer without an index takes no more of the disk than there
// is to take, whatever it decompresses to, and leaves nothing behind when it is refused.
func TestWholeHasRoom(t *testing.T) {
	const minFree, size = 1 << 30, 3*roomStep + 1
	for _, c := range []struct {
		name string
		free []int64 // at each look: before it is fetched, and for each step
		gets int
		most int64 // of what is written
		ok   bool
	}{
		{"none", []int64{minFree - 1}, 0, 0, false},
		{"none for what is stored", []int64{minFree + 10}, 0, 0, false},
		{"none to decompress", []int64{minFree + 1<<20, minFree}, 1, 0, false},
		{"for two steps", []int64{1 << 40, minFree + 1<<30, minFree + 1<<29, minFree - 1}, 1, 2 * roomStep, false},
		{"enough", []int64{1 << 40, 1 << 40, 1 << 40, 1 << 40, minFree + 1<<20}, 1, size, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := zeros(t, size)
			p := push(t, b, false)
			client, err := registry.New(registry.Options{RegistriesConf: p.conf})
			must(t, err)
			defer client.Close()
			im, err := client.Resolve(t.Context(), p.ref, registry.Selector{})
			must(t, err)
			dir := t.TempDir()
			cache, err := blobcache.New(dir, blobcache.Options{MinFree: minFree})
			must(t, err)
			defer cache.Close()
			looks, written := 0, int64(0)
			o := &layerOpener{client: client, ref: p.ref, image: im, cache: cache, dir: dir, verify: verifyAuto, log: slog.New(slog.DiscardHandler),
				say: func(string, ...any) {}, onWrong: func(error) {},
				room: func(f *os.File) (int64, error) {
					st, err := f.Stat()
					must(t, err)
					written = max(written, st.Size())
					looks++
					return c.free[min(looks, len(c.free))-1], nil
				}}
			p.reset()
			s, err := o.open(t.Context(), im.Layers[0])
			if n, _ := p.gets(); n != c.gets || looks != len(c.free) || written > c.most {
				t.Errorf("%d GETs, %d looks at the room, %d bytes were written; want %d, %d, %d", n, looks, written, c.gets, len(c.free), c.most)
			}
			if c.ok {
				must(t, err)
				if s.Size() != size || len(openFiles(t, dir)) != 1 {
					t.Errorf("%d bytes, open are %q", s.Size(), openFiles(t, dir))
				}
				must(t, s.Close())
			} else if !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "--cache-min-free") || !strings.Contains(err.Error(), "--cache-dir") {
				t.Errorf("opened: %v", err)
			}
			if left := openFiles(t, dir); len(left) != 0 {
				t.Errorf("left behind: %q", left)
			}
		})
	}
}

// TestWholeThatIsNoZstd: a blob that has its digest, and cannot be decompressed, is not
// fetched again.
func TestWholeThatIsNoZstd(t *testing.T) {
	b := &verifiable.Blob{Data: bytes.Repeat([]byte("no frame"), 1000), MediaType: registry.MediaTypeErofsZstd}
	p := push(t, b, false)
	if _, err := p.open(t, verifyAuto); !errors.Is(err, integrity.ErrCorrupt) || exitCode(err) != exitFailure {
		t.Errorf("opened: %v", err)
	}
	if n, _ := p.gets(); n != 1 {
		t.Errorf("%d GETs, want 1", n)
	}
}

// TestWholeWrongOnce: a layer of which wrong bytes came is fetched again, and it is the right one that is kept.
func TestWholeWrongOnce(t *testing.T) {
	for _, verify := range []string{verifyAuto, verifyOff} {
		s := newShelf(t, verifiable.Options{Zstd: true})
		s.verify = verify
		// In the magic number of a frame, so that it is noticed in any case.
		s.registry.SetFault(flips(s.blobs[0], s.blobs[0].Frames[2], false).OnBlobs())
		o := s.mustOpen(false)
		if st := s.registry.Stats(); st.BlobGETs != 2 {
			t.Errorf("%s: %+v, want 2 GETs of blobs", verify, st)
		}
		must(t, o.Close())
		o = s.mustOpen(false)
		if st := s.registry.Stats(); st.BlobGETs != 0 {
			t.Errorf("%s, once more: %+v, want no GET of blobs", verify, st)
		}
		must(t, o.Close())
		s.registry.Stop()
		if failed := s.readAll(s.mustOpen(true)); failed > 0 {
			t.Errorf("%s: %d reads failed", verify, failed)
		}
	}
}

// TestWholeKeptWrong: of a layer that an earlier mount kept wrong no registry is blamed. It goes when the right one is here,
// and not before: who is sent wrong bytes again is no worse off.
func TestWholeKeptWrong(t *testing.T) {
	for _, verify := range []string{verifyAuto, verifyOff} {
		s := newShelf(t, verifiable.Options{Zstd: true})
		s.verify, s.options.Logger = verify, slog.New(slog.NewTextHandler(&s.log, nil))
		o := s.mustOpen(false)
		part := o.layers[0].blob.beside[0].part
		must(t, o.Close())
		s.lie(part, s.blobs[0].Frames[1])
		bad := flips(s.blobs[0], s.blobs[0].Frames[2], true).OnBlobs()
		for _, c := range []struct {
			fault fakeregistry.Plan
			gets  int
			blame bool // the registry
			ok    bool
		}{{bad, 2, true, false}, {nil, 1, false, true}, {bad, 0, false, true}} {
			s.registry.SetFault(c.fault)
			o, err := s.open(false)
			if (err == nil) != c.ok {
				t.Errorf("%s, %+v: %v", verify, c, err)
			}
			if err == nil {
				must(t, o.Close())
			}
			if st := s.registry.Stats(); st.BlobGETs != c.gets {
				t.Errorf("%s: %+v, want %d GETs of blobs", verify, st, c.gets)
			}
			if blame := strings.Contains(s.log.String(), "bytes of a blob are wrong"); blame != c.blame {
				t.Errorf("%s: %s", verify, s.log.String())
			}
			if removed := strings.Contains(s.log.String(), "is removed"); removed != (c.ok && c.gets > 0) {
				t.Errorf("%s: %s", verify, s.log.String())
			}
		}
	}
}

// TestWholeOfHalfTheCache: a layer that takes more than half of the cache is not kept; one that is kept already is used,
// whatever the cache may take now.
func TestWholeOfHalfTheCache(t *testing.T) {
	s := newShelf(t, verifiable.Options{Zstd: true})
	size := int64(len(s.blobs[0].Data))
	s.size = fmt.Sprint(size * 3 / 2)
	s.fill()
	if kept := s.files(func(path string, _ fs.FileInfo) bool {
		return strings.Contains(path, digest.FromBytes(s.blobs[0].Data).Encoded())
	}); len(kept) > 0 {
		t.Errorf("kept are %q", kept)
	}
	s.size = ""
	s.fill()
	s.size = fmt.Sprint(size * 3 / 2)
	for _, offline := range []bool{false, true} {
		o := s.mustOpen(offline)
		if st := s.registry.Stats(); st.BlobGETs != 0 {
			t.Errorf("offline %v: %+v, want no GET of blobs", offline, st)
		}
		if failed := s.readAll(o); failed > 0 {
			t.Errorf("offline %v: %d reads failed", offline, failed)
		}
		must(t, o.Close())
	}
}
