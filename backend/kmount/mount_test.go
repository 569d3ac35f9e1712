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
			if err := Unmount(dir, "", false); err != nil {
				t.Fatal(err)
			}
			if left := backingOf(t, file); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// TestLoop is the older way, which MountFile does not take on a new kernel.
func TestLoop(t *testing.T) {
	require.Has(t, "root", "kernel-erofs", "loop")
	im := corpus.Get(t, "lz4")
	file := write(t, "image", im.Data)
	l, err := AttachLoop(file)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	err = Mount(l.Path(), dir, Options{})
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	got, err := tree.Walk(dir)
	if err != nil {
		t.Error(err)
	}
	for _, d := range tree.Diff(im.Listing(t), got) {
		t.Error(d)
	}
	if err := Unmount(dir, "", false); err != nil {
		t.Fatal(err)
	}
	if left := backingOf(t, file); len(left) > 0 {
		t.Errorf("left behind: %v", left)
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
	held, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := Unmount(dir, "", false); !errors.Is(err, unix.EBUSY) {
		t.Errorf("in use: %v", err)
	}
	if err := Unmount(dir, "", true); err != nil {
		t.Error(err)
	}
	if err := held.Close(); err != nil {
		t.Error(err)
	}
	if err := Unmount(dir, "", false); !errors.Is(err, unix.EINVAL) {
		t.Errorf("nothing mounted: %v", err)
	}
}

// TestUnmountOfOurs mounts two images on one directory.
func TestUnmountOfOurs(t *testing.T) {
	require.Has(t, "root", "kernel-erofs", "loop")
	file := write(t, "image", corpus.Get(t, "plain").Data)
	dir := t.TempDir()
	var devices [2]string
	for i := range devices {
		l, err := AttachLoop(file)
		if err != nil {
			t.Fatal(err)
		}
		if err := Mount(l.Path(), dir, Options{}); err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil {
			t.Fatal(err)
		}
		devices[i] = fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := Unmount(dir, devices[0], false); err == nil || !strings.Contains(err.Error(), "mounted over it") {
		t.Errorf("below another: %v", err)
	}
	for _, d := range []string{devices[1], devices[0], devices[0], "999:999"} {
		if err := Unmount(dir, d, false); err != nil {
			t.Errorf("%s: %v", d, err)
		}
	}
	if err := Unmount(dir, "", false); !errors.Is(err, unix.EINVAL) {
		t.Errorf("something is left: %v", err)
	}
	if left := backingOf(t, file); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
