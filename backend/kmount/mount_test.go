package kmount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

func TestData(t *testing.T) {
	for _, c := range []struct {
		devices []string
		want    string
		err     string
	}{
		{},
		{devices: []string{"/dev/nbd1"}, want: "device=/dev/nbd1"},
		{devices: []string{"/dev/nbd1", "/a b"}, want: "device=/dev/nbd1,device=/a b"},
		{devices: []string{"/a,b"}, err: "comma"},
		{devices: []string{strings.Repeat("x", os.Getpagesize()-len("device="))}, err: "mount(2) takes"},
	} {
		got, err := Options{Devices: c.devices}.data()
		if got != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%.40q: %.40q, %v", c.devices, got, err)
		}
	}
	// One byte shorter fits.
	if _, err := (Options{Devices: []string{strings.Repeat("x", os.Getpagesize()-len("device=")-1)}}).data(); err != nil {
		t.Error(err)
	}
}

func write(t *testing.T, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// backingOf returns the loop devices that serve file.
func backingOf(t *testing.T, file string) []string {
	t.Helper()
	names, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, n := range names {
		if b, err := os.ReadFile(n); err == nil && strings.TrimSpace(string(b)) == file {
			found = append(found, n)
		}
	}
	return found
}

func TestMountFile(t *testing.T) {
	require.Has(t, "root", "kernel-erofs", "loop")
	for _, name := range []string{"plain", "lz4", "multidev"} {
		t.Run(name, func(t *testing.T) {
			im := corpus.Get(t, name)
			file := write(t, "image", im.Data)
			var o Options
			if im.Blob != nil {
				o.Devices = []string{write(t, "blob", im.Blob)}
			}
			dir := t.TempDir()
			o.Flags = unix.MS_NOSUID
			device, err := MountFile(file, dir, o)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("through %q", device)
			got, err := tree.Walk(dir)
			if err != nil {
				t.Error(err)
			}
			for _, d := range tree.Diff(im.Listing(t), got) {
				t.Error(d)
			}
			var st unix.Statfs_t
			if err := unix.Statfs(dir, &st); err != nil || st.Flags&unix.ST_RDONLY == 0 || st.Flags&unix.ST_NOSUID == 0 {
				t.Errorf("statfs: flags %#x, %v", st.Flags, err)
			}
			if err := unix.Unmount(dir, 0); err != nil {
				t.Fatal(err)
			}
			if left := backingOf(t, file); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// TestMountByLoop is the older way, which MountFile does not take on a new kernel.
func TestMountByLoop(t *testing.T) {
	require.Has(t, "root", "kernel-erofs", "loop")
	for _, name := range []string{"lz4", "multidev"} {
		im := corpus.Get(t, name)
		// More follows in the files than what is mounted.
		more := make([]byte, 1<<20)
		file := write(t, "image", append(more[:0:0], append(im.Data, more...)...))
		o := Options{Sizes: []int64{int64(len(im.Data))}}
		if im.Blob != nil {
			o.Devices = []string{write(t, "blob", append(more[:0:0], append(im.Blob, more...)...))}
			o.Sizes = append(o.Sizes, int64(len(im.Blob)))
		}
		dir := t.TempDir()
		device, err := MountByLoop(file, dir, o)
		if err != nil {
			t.Fatal(err)
		}
		sys := filepath.Join("/sys/block", filepath.Base(device))
		for attribute, want := range map[string]string{
			"size": fmt.Sprint(len(im.Data) / 512), "loop/sizelimit": fmt.Sprint(len(im.Data)), "loop/autoclear": "1", "ro": "1",
		} {
			if got, err := os.ReadFile(filepath.Join(sys, attribute)); err != nil || strings.TrimSpace(string(got)) != want {
				t.Errorf("%s: %s is %q, %v; want %s", name, attribute, got, err, want)
			}
		}
		got, err := tree.Walk(dir)
		if err != nil {
			t.Error(err)
		}
		for _, d := range tree.Diff(im.Listing(t), got) {
			t.Error(d)
		}
		if err := unix.Unmount(dir, 0); err != nil {
			t.Fatal(err)
		}
		if left := backingOf(t, file); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
}

// TestLoopSize: a device has whole sectors, and the file's end is its end.
func TestLoopSize(t *testing.T) {
	require.Has(t, "root", "loop")
	file := write(t, "file", make([]byte, 4096))
	for size, want := range map[int64]string{0: "8", 1: "1", 512: "1", 513: "2", 4096: "8", 1 << 40: "8"} {
		l, err := AttachLoop(file, size)
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(l.Path()), "size"))
		if err != nil || strings.TrimSpace(string(got)) != want {
			t.Errorf("%d bytes: %q sectors, %v; want %s", size, got, err, want)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestRefusals(t *testing.T) {
	require.Has(t, "root", "kernel-erofs", "loop")
	dir := t.TempDir()
	garbage := write(t, "garbage", make([]byte, 64<<10))
	_, err := MountFile(garbage, dir, Options{})
	if !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "dmesg") {
		t.Errorf("garbage: %v", err)
	}
	if left := backingOf(t, garbage); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if _, err := MountFile(filepath.Join(dir, "no"), dir, Options{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no such file: %v", err)
	}
	file := write(t, "image", corpus.Get(t, "plain").Data)
	if _, err := MountFile(file, dir, Options{}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	damaged := corpus.Get(t, "plain").Data
	damaged = append([]byte(nil), damaged...)
	damaged[1024+0x30] ^= 1 // of the UUID, which the checksum covers
	if _, err := MountFile(write(t, "damaged", damaged), dir, Options{}); !errors.Is(err, unix.EBADMSG) || !strings.Contains(err.Error(), "checksum") {
		t.Errorf("a wrong checksum: %v", err)
	}
}
