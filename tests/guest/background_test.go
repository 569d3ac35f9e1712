package guest

import (
	"encoding/json"
	"errors"
	"io/fs"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// testBackground: what was fetched in the background the kernel does not wait for, over nbd: listing takes no request
// after its metadata came, and nothing does after all came, not even the mount; also not of a server that takes over.
func testBackground(t *testing.T, _ version) {
	r, ref := serveTree(t)
	want := largeListing(t)
	dir, cache := t.TempDir(), t.TempDir()
	mount := []string{"mount", "--backend=nbd", "--on-error=wait:2s", "--cache-dir", cache}

	program(t, append(mount, "--prefetch=meta", ref, dir)...)
	awaitPrefetched(t)
	r.ResetStats()
	if n := list(t, dir); n != len(want) {
		t.Errorf("%d entries, want %d", n, len(want))
	}
	if n := r.Stats().Requests; n != 0 {
		t.Errorf("listing took %d requests", n)
	}
	program(t, "umount", dir)

	program(t, append(mount, "--prefetch=all", ref, dir)...)
	awaitPrefetched(t)
	program(t, "umount", dir)
	r.Stop()
	if _, err := tryProgram(t, append(mount, ref, dir)...); err == nil {
		t.Error("a tag was mounted without its registry")
	}
	program(t, append(mount, "--offline", ref, dir)...)
	same(t, want, dir, tree.Ino, tree.DirNlink)
	before := onlyEntry(t, "running")
	if err := syscall.Kill(before.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, before.PID)
	dropCaches(t)
	program(t, "reattach", dir)
	same(t, want, dir, tree.Ino, tree.DirNlink)
	program(t, "umount", dir)
	leftInRunDir(t)
}

// list does what ls -lR does, and counts the entries.
func list(t *testing.T, dir string) (n int) {
	t.Helper()
	names := make([]byte, 64<<10)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		n++
		var st unix.Stat_t
		_, attributes := unix.Llistxattr(path, names)
		_, link := unix.Readlink(path, names)
		if errors.Is(link, unix.EINVAL) { // it is none
			link = nil
		}
		return errors.Join(unix.Lstat(path, &st), attributes, link)
	})
	if err != nil {
		t.Error(err)
	}
	return n
}

// awaitPrefetched waits until the only mount has fetched what it was to fetch in the background.
func awaitPrefetched(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		text := program(t, "list", "--json")
		var all []struct {
			Status struct {
				Prefetch struct {
					State string `json:"state"`
				} `json:"prefetch"`
			} `json:"status"`
		}
		if err := json.Unmarshal([]byte(text), &all); err != nil || len(all) != 1 {
			t.Fatalf("listed %s (%v)", text, err)
		}
		if all[0].Status.Prefetch.State == "done" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after a minute: %s", text)
		}
	}
}
