package e2e

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/tree"

	"github.com/erofs-oci/erofs-oci/registry"
)

// TestBackends mounts one image by each backend that this machine has, and by the
// one that is chosen when none is named.
func TestBackends(t *testing.T) {
	require.Has(t, "root", "fuse", "kernel-erofs", "loop")
	r, err := fakeregistry.New(fakeregistry.Options{})
	must(t, err)
	t.Cleanup(func() { r.Close() })
	im := corpus.Get(t, "zstd")
	_, err = ocipush.Push(t.Context(), r.URL(), "zstd:v1", []ocipush.Layer{ocipush.Bytes(registry.MediaTypeErofs, im.Data)}, ocipush.Options{})
	must(t, err)
	for _, name := range []string{"fuse", "file", "auto"} {
		t.Run(name, func(t *testing.T) {
			s := newSession(t)
			dir := s.target()
			said := s.must("mount", "--backend="+name, r.Addr()+"/zstd:v1", dir)
			if line := strings.HasPrefix(said, "backend ") && strings.Count(said, "\n") == 1; line != (name == "auto") {
				t.Errorf("mount said %q", said)
			}
			got, err := tree.Walk(dir)
			must(t, err)
			for _, d := range tree.Diff(im.Listing(t), got) {
				t.Error(d)
			}
			e := s.entry(dir)
			if e.State != "running" || name != "auto" && e.Backend != name {
				t.Errorf("listed as %+v", e)
			}
			server := s.pidfd(dir)
			// umount(8) of the one visible mount ends everything.
			if u := s.run("umount", dir); u.code != 0 {
				t.Fatal(u.stderr)
			}
			awaitEnd(t, server)
			s.nothingLeft(dir)
			if left, err := filepath.Glob(filepath.Join(s.dir, "erofs-oci-*")); err != nil || len(left) > 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		})
	}
}

// TestKernelDoesNotKnowImage: where nobody named a backend, an image that the kernel does not read is mounted by our own
// reader, and nothing is left of the first try. Linux takes no blocks that are larger than a page.
func TestKernelDoesNotKnowImage(t *testing.T) {
	require.Has(t, "root", "fuse", "kernel-erofs")
	s := newSession(t)
	image := filepath.Join(t.TempDir(), "image.erofs")
	f, err := os.Create(image)
	must(t, err)
	b, err := mkerofs.New(f, mkerofs.Options{BlockSize: 4 * os.Getpagesize()})
	must(t, err)
	must(t, b.Add(mkerofs.Entry{Path: "a", Mode: mkerofs.ModeRegular | 0o644, Mtime: time.Unix(1600000000, 0), Size: 7,
		Open: func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("content")), nil }}))
	_, err = b.Finish(t.Context())
	must(t, errors.Join(err, f.Close()))

	r := s.run(binary, "mount", "--backend=file", image, s.target())
	wantLine(t, r, "of a kind that it does not know")
	for _, flags := range [][]string{nil, {"--tmpfs-overlay"}} {
		dir := s.target()
		r := s.run(binary, append(append([]string{"mount", "--backend=auto"}, flags...), image, dir)...)
		if r.code != 0 || strings.Count(r.stderr, "\n") != 1 || !strings.Contains(r.stderr, "level=WARN") || !strings.Contains(r.stderr, "our own reader does") {
			t.Fatalf("%+v", r)
		}
		if got, err := os.ReadFile(filepath.Join(dir, "a")); err != nil || string(got) != "content" {
			t.Errorf("%q, %v", got, err)
		}
		if e := s.entry(dir); e.Backend != backend.FUSE {
			t.Errorf("listed as %+v", e)
		}
		s.must("umount", dir)
		s.nothingLeft(dir)
	}
}
