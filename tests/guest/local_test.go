package guest

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// testLocalReattached is the life of a mount of a file: its server is killed, the
// file is touched, which makes it another for all that can be known, and comes back
// to what it was; then the mount goes on.
func testLocalReattached(t *testing.T, _ version) {
	image := filepath.Join(t.TempDir(), "image")
	copyTree(t, image)
	st, err := os.Stat(image)
	if err != nil {
		t.Fatal(err)
	}
	want := largeListing(t)
	dir := t.TempDir()
	program(t, "mount", "--backend=nbd", image, dir)
	if _, err := tree.List(dir); err != nil {
		t.Error(err)
	}
	before := onlyEntry(t, "running")
	if err := syscall.Kill(before.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, before.PID)
	onlyEntry(t, "orphaned")
	dropCaches(t)
	if err := os.Chtimes(image, time.Time{}, time.Now()); err != nil {
		t.Fatal(err)
	}
	if _, err := tryProgram(t, "reattach", dir); err == nil || !strings.Contains(err.Error(), "it was changed or replaced") {
		t.Errorf("reattach to a file that was touched: %v", err)
	}
	if err := os.Chtimes(image, time.Time{}, st.ModTime()); err != nil {
		t.Fatal(err)
	}
	program(t, "reattach", dir)
	same(t, want, dir, tree.Ino, tree.DirNlink)
	program(t, "umount", dir)
	leftInRunDir(t)
}

// copyTree copies the large tree's image to a file.
func copyTree(t *testing.T, name string) {
	t.Helper()
	from, err := os.Open(treeFile)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	to, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	if _, err := io.Copy(to, from); err != nil {
		t.Fatal(err)
	}
}

// testAuto: where no backend is named, the kernel reads what it knows, and our own reader the rest.
func testAuto(t *testing.T, kernel version) {
	for _, name := range []string{"lz4", "zstd", "lzma"} {
		im := corpus.Get(t, name)
		image := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(image, im.Data, 0o600); err != nil {
			t.Fatal(err)
		}
		dir, want := t.TempDir(), backend.NBD
		if kernel.before(since[name]) {
			want = backend.FUSE
		}
		program(t, "mount", image, dir)
		if e := onlyEntry(t, "running"); e.Backend != want {
			t.Errorf("%s is mounted by %s, not %s", name, e.Backend, want)
		}
		same(t, im.Listing(t), dir)
		program(t, "umount", dir)
		nothingLeft(t)
		leftInRunDir(t)
	}
}
