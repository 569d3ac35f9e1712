package format

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/backend/kmount"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/debian"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

func mountFile(image, dir string) (string, error) {
	return kmount.MountFile(image, dir, kmount.Options{})
}

// A mount of ours of a Debian root equals the kernel's.
func TestDebianEqualsKernel(t *testing.T) {
	require.Has(t, "root", "fuse", "kernel-erofs", "loop", "debian", "mkfs.erofs")
	root := oddTree(t)
	utils := debian.Mkfs(t)
	for _, c := range []struct {
		name   string
		debian bool // by the mkfs.erofs of this machine, which knows LZ4 only
		args   []string
	}{
		{"lz4", true, []string{"-zlz4"}},
		{"zstd, fragments, dedupe", false, []string{"-zzstd,3", "-C65536", "-Efragments,dedupe"}},
		{"deflate", false, []string{"-zdeflate,1", "-C65536"}},
		// Half of the files: it is slow to write.
		{"lzma", false, []string{"-zlzma,1", "-C65536", "--exclude-regex=^usr/(share|lib/x86_64-linux-gnu/perl)"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			image := filepath.Join(t.TempDir(), "image")
			args := append([]string{"--quiet"}, append(c.args, image, root)...)
			if !c.debian {
				utils.Run(t, args...)
			} else if said, err := exec.Command("mkfs.erofs", args...).CombinedOutput(); err != nil {
				t.Fatalf("mkfs.erofs %q: %v\n%s", args, err, said)
			}
			same(t, mounted(t, image), served(t, image))
		})
	}
}

// same compares two mounts of one image.
func same(t *testing.T, kernel, ours string) {
	t.Helper()
	want, err := tree.Walk(kernel)
	if err != nil {
		t.Fatal(err)
	}
	got, err := tree.Walk(ours)
	if err != nil {
		t.Fatal(err)
	}
	for i, d := range tree.Diff(want, got) {
		if t.Error(d); i == 20 {
			t.Fatal("and more")
		}
	}
	files, dirs := 0, 0
	for _, e := range want {
		compare := stat
		if e.Mode&unix.S_IFMT == unix.S_IFDIR {
			compare, dirs = list, dirs+1
		}
		files++
		w, g := compare(t, kernel, e), compare(t, ours, e)
		if !slices.Equal(w, g) {
			t.Fatalf("%q: %q, want %q", e.Path, g, w)
		}
	}
	if files < 3000 || dirs < 100 {
		t.Errorf("only %d paths, %d directories", files, dirs)
	}
	t.Logf("%d paths, %d directories", files, dirs)
}

// stat is all that statx(2) says beyond what the walk has compared, but for the
// device.
func stat(t *testing.T, root string, e corpus.Entry) []string {
	t.Helper()
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, filepath.Join(root, e.Path), unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS, &st); err != nil {
		t.Fatal(err)
	}
	return []string{fmt.Sprintf("size %d, %d blocks, blksize %d, device %d:%d, times %v %v %v", st.Size, st.Blocks, st.Blksize,
		st.Rdev_major, st.Rdev_minor, st.Atime, st.Mtime, st.Ctime)}
}

// list is a directory as getdents64(2) has it: in its order, "." and ".." with
// the rest, each with its type and inode number; then its stat.
func list(t *testing.T, root string, e corpus.Entry) []string {
	t.Helper()
	dir, err := os.Open(filepath.Join(root, e.Path))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	var all []string
	for buf := make([]byte, 1<<16); ; {
		n, err := unix.Getdents(int(dir.Fd()), buf)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			return append(all, stat(t, root, e)...)
		}
		for b := buf[:n]; len(b) > 0; {
			length := int(b[16]) | int(b[17])<<8
			ino := uint64(0)
			for i := range 8 {
				ino |= uint64(b[i]) << (8 * i)
			}
			all = append(all, fmt.Sprintf("%d type %d %s", ino, b[18], unix.ByteSliceToString(b[19:length])))
			b = b[length:]
		}
	}
}
