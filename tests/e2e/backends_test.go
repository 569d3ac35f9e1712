package e2e

import (
	"path/filepath"
	"strings"
	"testing"

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
