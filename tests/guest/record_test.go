package guest

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/erofs-oci/erofs-oci/registry/profile"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// testRecordReattached: the profile of a mount has what both of its servers were asked for, the first one's first.
func testRecordReattached(t *testing.T, _ version) {
	_, ref := serveTree(t)
	dir := t.TempDir()
	file := filepath.Join(t.TempDir(), "profile")
	program(t, "mount", "--backend=nbd", "--record="+file, "--cache-dir", t.TempDir(), ref, dir)
	if _, err := os.ReadDir(dir); err != nil {
		t.Error(err)
	}
	before := onlyEntry(t, "running")
	if err := syscall.Kill(before.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, before.PID)
	first, err := profile.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	dropCaches(t)
	program(t, "reattach", dir)
	same(t, largeListing(t), dir, tree.Ino, tree.DirNlink)
	program(t, "umount", dir)
	both, err := profile.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if len(first.Blobs) != 1 || len(both.Blobs) != 1 || first.Blobs[0].Bytes() == 0 {
		t.Fatalf("first %+v, then %+v", first, both)
	}
	d := profile.Diff(first, both)
	if len(d) != 1 || len(d[0].OnlyA) > 0 || len(d[0].OnlyB) == 0 || d[0].Order {
		t.Errorf("the second server: %+v", d)
	}
	t.Logf("%d bytes were recorded by the first server, %d by both", first.Blobs[0].Bytes(), both.Blobs[0].Bytes())
	leftInRunDir(t)
}
