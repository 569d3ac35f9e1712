package build

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// erofsLayers are the files of the EROFS layers of the image that a layout's only index has in the second place, from
// the lowest.
func erofsLayers(t *testing.T, layout string) []string {
	t.Helper()
	blob := func(d ocispec.Descriptor) string {
		return filepath.Join(layout, "blobs", d.Digest.Algorithm().String(), d.Digest.Encoded())
	}
	read := func(file string, v any) {
		t.Helper()
		raw, err := os.ReadFile(file)
		must(t, err)
		must(t, json.Unmarshal(raw, v))
	}
	var top, index ocispec.Index
	read(filepath.Join(layout, "index.json"), &top)
	read(blob(top.Manifests[0]), &index)
	var m ocispec.Manifest
	read(blob(index.Manifests[1]), &m)
	var files []string
	for _, l := range m.Layers {
		files = append(files, blob(l))
	}
	return files
}

// overlaid calls use with a directory where the kernel's overlayfs has the kernel's mounts of layers, the first of them
// the lowest.
func overlaid(t *testing.T, layers []string, use func(dir string)) {
	t.Helper()
	require.Has(t, "overlay")
	base := t.TempDir()
	var lower []string
	defer func() {
		for _, dir := range lower {
			if err := unix.Unmount(dir, 0); err != nil {
				t.Error(err)
			}
		}
	}()
	for i, file := range layers {
		dir := filepath.Join(base, string(rune('a'+i)))
		must(t, os.Mkdir(dir, 0o755))
		if err := unix.Mount(file, dir, "erofs", unix.MS_RDONLY, ""); err != nil {
			t.Fatalf("mount layer %d: %v", i, err)
		}
		lower = append([]string{dir}, lower...)
	}
	all := filepath.Join(base, "all")
	must(t, os.Mkdir(all, 0o755))
	must(t, unix.Mount("overlay", all, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(lower, ":")))
	defer func() {
		if err := unix.Unmount(all, 0); err != nil {
			t.Error(err)
		}
	}()
	use(all)
}

// sameByOverlay compares all but what overlayfs does not unite: the link counts of files with names in several layers.
func sameByOverlay(t *testing.T, dir string, want []corpus.Entry) {
	t.Helper()
	without := func(list []corpus.Entry) (all []corpus.Entry) {
		for _, e := range list {
			e.Nlink = 0
			all = append(all, e)
		}
		return all
	}
	for _, d := range tree.Diff(without(want), without(walk(t, dir)), tree.Ino) {
		t.Error(d)
	}
}
