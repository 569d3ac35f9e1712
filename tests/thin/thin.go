// Package thin has a disk for tests that has less room than its file system believes, as a thin volume may, or a loop
// device whose file lies on a full file system: writes go well, and what was written is lost when the kernel writes it
// back.
package thin

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/require"
)

// Disk gives the directory of a mounted ext4 of size bytes of which room can be kept, and what it needs for itself is of
// that. It needs root, and is gone with the test.
func Disk(t *testing.T, size, room int64) (dir string) {
	t.Helper()
	require.Has(t, "root", "loop", "mkfs.ext4")
	host := t.TempDir()
	if err := unix.Mount("tmpfs", host, "tmpfs", 0, fmt.Sprintf("size=%d,mode=700", room)); err != nil {
		t.Fatal(err)
	}
	unmount(t, host)
	image := filepath.Join(host, "image")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, size)); err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	for _, command := range [][]string{
		{"mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-E", "nodiscard", image},
		{"mount", "-t", "ext4", "-o", "loop", image, dir},
	} {
		if said, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", command, err, said)
		}
	}
	unmount(t, dir)
	return dir
}

// unmount ends a mount with the test.
func unmount(t *testing.T, dir string) {
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
}
