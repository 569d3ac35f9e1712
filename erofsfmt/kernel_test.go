package erofsfmt

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/backend/kmount"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// The kernel, where it knows what an image made by hand needs, shows the very
// same tree: every field of stat(2), xattrs, links, and the bytes of the files.
func TestHandmadeEqualsKernel(t *testing.T) {
	require.Has(t, "root", "kernel-erofs", "loop")
	asked := 0
	for _, h := range handmadeImages(t) {
		if reason := h.notJudged(t); reason != "" {
			t.Logf("%s: not asked: %s", h.name, reason)
			continue
		}
		asked++
		t.Run(h.name, func(t *testing.T) {
			var o Options
			for _, d := range h.devices {
				o.Devices = append(o.Devices, memory(d))
			}
			im, _ := h.fake.open(t, o)
			var got []corpus.Entry
			visit(t, im, func(name string, ino *Inode) { got = append(got, describe(t, im, name, ino)) })
			want, err := kernelWalk(t, h.fake.image(t), h.devices)
			if err != nil {
				t.Fatal(err)
			}
			compare(t, got, want)
		})
	}
	if asked < 20 {
		t.Errorf("the kernel was asked about %d images", asked)
	}
}

// notJudged says why the running kernel is not asked about an image.
func (h *handmade) notJudged(t testing.TB) string {
	if h.why != "" {
		return h.why
	}
	if v := kernelVersion(t); slices.Compare(v[:], h.linux[:]) < 0 {
		return fmt.Sprintf("needs Linux %d.%d", h.linux[0], h.linux[1])
	}
	for _, f := range h.features {
		if _, err := os.Stat(filepath.Join("/sys/fs/erofs/features", f)); err != nil {
			return err.Error()
		}
	}
	return ""
}

func kernelVersion(t testing.TB) (v [2]int) {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &v[0], &v[1]); err != nil {
		t.Fatal(err)
	}
	return v
}

// kernelWalk is what the kernel shows of an image. The files are on a tmpfs: not
// every file system has files of many TiB.
func kernelWalk(t testing.TB, image sparse, devices [][]byte) ([]corpus.Entry, error) {
	t.Helper()
	files := t.TempDir()
	if err := unix.Mount("tmpfs", files, "tmpfs", 0, "size=64m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// A loop device lets go of its file a moment after its last user.
		if err := unix.Unmount(files, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	var o kmount.Options
	for i, d := range devices {
		name := filepath.Join(files, fmt.Sprintf("device%d", i))
		if err := os.WriteFile(name, d, 0o600); err != nil {
			t.Fatal(err)
		}
		o.Devices = append(o.Devices, name)
	}
	dir := t.TempDir()
	if _, err := kmount.MountFile(image.write(t, files), dir, o); err != nil {
		return nil, err
	}
	entries, err := tree.Walk(dir)
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	return entries, err
}
