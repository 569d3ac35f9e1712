package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/dockerregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// TestGoToolchain is the real thing: the Go toolchain's tree (16,000 files, 270
// MB) packed by mkfs.erofs, pushed to Debian's docker-registry, mounted from
// there. Every path equals the source tree's, and every stat field and inode
// number the kernel's own mount of the same image.
func TestGoToolchain(t *testing.T) {
	require.Has(t, "root", "fuse", "kernel-erofs", "loop", "mkfs.erofs", "docker-registry")
	registryAddr := dockerregistry.Start(t)
	out, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	goroot := strings.TrimSpace(string(out))
	source := sourceTree(t, goroot)
	for name, flags := range map[string][]string{
		"plain": nil,
		"lz4":   {"-zlz4"},
		// The old index form, and several blocks to a cluster.
		"lz4-full-16k": {"-zlz4hc", "-C16384", "-Elegacy-compress"},
	} {
		if testing.Short() && name != "lz4" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			image := filepath.Join(t.TempDir(), "image.erofs")
			mkfs := exec.Command("mkfs.erofs", append(append([]string{"--quiet", "-T1600000000"}, flags...), image, goroot)...)
			if said, err := mkfs.CombinedOutput(); err != nil {
				t.Fatalf("mkfs.erofs: %v: %s", err, said)
			}
			pushFile(t, "http://"+registryAddr, "go/"+name+":v1", image)
			s := newSession(t)
			dir := s.mount(registryAddr + "/go/" + name + ":v1")
			kernels := kernelMount(t, image)
			sameTree(t, kernels, dir)
			sameSource(t, source, dir)
		})
	}
}

// packedAt is the one time that mkfs.erofs was told to give to everything.
const packedAt = 1600000000e9

// sourceTree is the tree that images are made of, as an image will show it.
func sourceTree(t *testing.T, dir string) []corpus.Entry {
	t.Helper()
	entries, err := tree.Walk(dir)
	if err != nil {
		t.Fatal(err)
	}
	for i := range entries {
		entries[i].MtimeNs = packedAt
	}
	return entries
}

// sameSource compares a mount with the source tree; inode numbers are each file
// system's own.
func sameSource(t *testing.T, want []corpus.Entry, dir string) {
	t.Helper()
	got, err := tree.Walk(dir)
	if err != nil {
		t.Fatal(err)
	}
	for i, d := range tree.Diff(want, got, tree.Ino, tree.DirNlink) {
		if i < 10 {
			t.Error(d)
		}
	}
}

func pushFile(t *testing.T, base, name, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	layer := ocipush.Layer{MediaType: registry.MediaTypeErofs, Data: f, Size: st.Size()}
	if _, err := ocipush.Push(context.Background(), base, name, []ocipush.Layer{layer}, ocipush.Options{}); err != nil {
		t.Fatal(err)
	}
}
