package guest

import (
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
	"github.com/erofs-oci/erofs-oci/tests/tree"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

// testVerified: what the kernel reads over nbd is verified before, by the server that
// mounted as by the one that takes its place; a byte that somebody changed is EIO.
func testVerified(t *testing.T, _ version) {
	image, err := os.ReadFile(treeFile)
	if err != nil {
		t.Fatal(err)
	}
	want := largeListing(t)
	for by, o := range map[string]verifiable.Options{
		"chunk-index": {Chunk: 256 << 10, Apart: true},
		"dm-verity":   {Verity: true},
	} {
		r := startRegistry(t)
		b := verifiable.Make(t, image, o)
		if _, err := ocipush.Push(t.Context(), r.URL(), "tree:v1", b.Layers(), ocipush.Options{}); err != nil {
			t.Fatal(err)
		}
		ref, dir := r.Addr()+"/tree:v1", t.TempDir()
		mount := []string{"mount", "--backend=nbd", "--verify=require", "--on-error=wait:2s"}
		program(t, append(mount, "--cache-dir", t.TempDir(), ref, dir)...)
		same(t, want, dir, tree.Ino, tree.DirNlink)
		before := onlyEntry(t, "running")
		if err := syscall.Kill(before.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		awaitEnd(t, before.PID)
		dropCaches(t)
		program(t, "reattach", dir)
		same(t, want, dir, tree.Ino, tree.DirNlink)
		if listed := program(t, "list"); !strings.Contains(listed, by) {
			t.Errorf("after reattach: %s", listed)
		}
		program(t, "umount", dir)

		r.SetFault(fakeregistry.Always(fakeregistry.FlipBit(int64(len(image) / 2))).OnBlobs())
		program(t, append(mount, "--cache-dir", t.TempDir(), ref, dir)...)
		if _, err := tree.Walk(dir); !errors.Is(err, unix.EIO) {
			t.Errorf("%s, a flipped bit: %v", by, err)
		}
		program(t, "umount", dir)
		leftInRunDir(t)
	}
}
