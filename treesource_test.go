package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
	"github.com/erofs-oci/erofs-oci/tests/require"
)

func TestParsePlace(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	if err := errors.Join(os.WriteFile("rootfs.tar.gz", nil, 0o600), os.Mkdir("oci.tar", 0o700)); err != nil {
		t.Fatal(err)
	}
	for typed, want := range map[string]struct {
		kind              placeKind
		at, name, outFile string
	}{
		"-":                            {inStdin, "", "", ""},
		"./d":                          {inPath, dir + "/d", "", "d"},
		".":                            {inPath, dir, "", filepath.Base(dir)},
		"/a/b.tar":                     {inPath, "/a/b.tar", "", "b"},
		"file:x.erofs":                 {inPath, dir + "/x.erofs", "", "x"},
		"rootfs.tar.gz":                {inPath, dir + "/rootfs.tar.gz", "", "rootfs"},
		"missing.tar":                  {inRegistry, "docker.io/library/missing.tar:latest", "", "missing.tar-latest"},
		"oci.tar":                      {inRegistry, "docker.io/library/oci.tar:latest", "", "oci.tar-latest"},
		"docker://rootfs.tar.gz":       {inRegistry, "docker.io/library/rootfs.tar.gz:latest", "", "rootfs.tar.gz-latest"},
		"nginx:1.27":                   {inRegistry, "docker.io/library/nginx:1.27", "", "nginx-1.27"},
		"localhost:5000/a/b:c":         {inRegistry, "localhost:5000/a/b:c", "", "b-c"},
		"oci:lay":                      {inLayout, dir + "/lay", "", "lay"},
		"oci:/lay:a/b:c":               {inLayout, "/lay", "a/b:c", "lay-a-b-c"},
		"oci-archive:x.tar:v1":         {inOCIArchive, dir + "/x.tar", "v1", "x-v1"},
		"docker-archive:/x.tar":        {inDockerArchive, "/x.tar", "", "x"},
		"docker-archive:/x.tar:a:v1":   {inDockerArchive, "/x.tar", "a:v1", "x-a-v1"},
		"oci:dir:h:5000/repo:tag@what": {inLayout, dir + "/dir", "h:5000/repo:tag@what", "dir-h-5000-repo-tag@what"},
	} {
		p, err := parsePlace(typed)
		at := p.path
		if p.kind == inRegistry {
			at = p.ref.String()
		}
		if err != nil || p.kind != want.kind || at != want.at || p.name != want.name || p.baseName() != want.outFile {
			t.Errorf("%s: %+v, %q, %v; want %+v", typed, p, p.baseName(), err, want)
		}
	}
	for _, typed := range []string{"oci:", "docker-archive::x", "file:"} {
		if _, err := parsePlace(typed); exitCode(err) != exitUsage {
			t.Errorf("%q: %v, want an error of usage", typed, err)
		}
	}
	for _, typed := range []string{"./x", "-", "docker-archive:x", "localhost/x@sha256:" + strings.Repeat("a", 64)} {
		if _, err := parseDest(typed); exitCode(err) != exitUsage {
			t.Errorf("to %q: %v, want an error of usage", typed, err)
		}
	}
}

// entriesOf are those that a tree puts into an empty image, by path.
func entriesOf(t *testing.T, from tree) map[string]mkerofs.Entry {
	t.Helper()
	b, err := mkerofs.New(nil, mkerofs.Options{TempDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	l, err := mkerofs.NewLayers(b, mkerofs.LayerOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	if err := from.fill(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	found := map[string]mkerofs.Entry{}
	for e := range b.Entries() {
		found[e.Path] = e
	}
	return found
}

// TestDirTree: what is in a directory is described as it is, and nothing outside it is looked at.
func TestDirTree(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "outside")
	dir := t.TempDir()
	at := unix.Timespec{Sec: -1234567890, Nsec: 987654321}
	err := errors.Join(
		os.WriteFile(outside, []byte("secret"), 0o600),
		os.WriteFile(dir+"/b", []byte("content"), 0o640), os.Link(dir+"/b", dir+"/c"),
		os.Mkdir(dir+"/d", 0o700), os.Link(dir+"/b", dir+"/d/b"), os.Symlink(outside, dir+"/a"), os.Symlink("/", dir+"/d/root"),
		unix.Mkfifo(dir+"/fifo", 0o600), os.WriteFile(dir+"/d/name with \n", nil, 0o600),
		unix.UtimesNanoAt(unix.AT_FDCWD, dir+"/b", []unix.Timespec{at, at}, 0),
		unix.Setxattr(dir+"/b", "user.long", bytes.Repeat([]byte("x"), 3000), 0),
		os.Chmod(dir+"/b", 0o640|os.ModeSetuid), os.Chmod(dir, 0o751),
	)
	if err != nil {
		t.Fatal(err)
	}
	tree, err := openDirTree(dir, false)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	found := entriesOf(t, tree)
	if len(found) != 9 {
		t.Errorf("%d entries, want 9: %v", len(found), found)
	}
	b := found["b"]
	if b.Mode != unix.S_IFREG|0o4640 || b.Size != 7 || b.Mtime.Unix() != at.Sec || int64(b.Mtime.Nanosecond()) != at.Nsec ||
		len(b.Xattrs["user.long"]) != 3000 || int(b.UID) != os.Getuid() || int(b.GID) != os.Getgid() {
		t.Errorf("b is %+v", b)
	}
	if found["c"].Link != "b" || found["d/b"].Link != "b" {
		t.Errorf("hard links: %+v, %+v", found["c"], found["d/b"])
	}
	if found["a"].Target != outside || found["d/root"].Target != "/" || found["fifo"].Mode != unix.S_IFIFO|0o600 || found["."].Mode != unix.S_IFDIR|0o751 {
		t.Errorf("%+v, %+v, %+v, %+v", found["a"], found["d/root"], found["fifo"], found["."])
	}
	// Between the walk and the reading of files a link comes to stand where a file was.
	if err := errors.Join(os.Remove(dir+"/b"), os.Symlink(outside, dir+"/b")); err != nil {
		t.Fatal(err)
	}
	if r, err := b.Open(); err == nil {
		r.Close()
		t.Error("a symbolic link was followed")
	}
}

// TestDirTreeOneFileSystem: a mount below is an empty directory, if that is what the user wants.
func TestDirTreeOneFileSystem(t *testing.T) {
	require.Has(t, "root")
	dir := t.TempDir()
	below := filepath.Join(dir, "below")
	if err := errors.Join(os.Mkdir(below, 0o755), unix.Mount("tmpfs", below, "tmpfs", 0, "")); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(below, 0)
	if err := os.WriteFile(below+"/file", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for one, want := range map[bool]int{true: 2, false: 3} {
		tree, err := openDirTree(dir, one)
		if err != nil {
			t.Fatal(err)
		}
		if found := entriesOf(t, tree); len(found) != want {
			t.Errorf("one file system %v: %d entries, want %d", one, len(found), want)
		}
		tree.Close()
	}
}

// TestScratch: what is too much is refused before the disk is full, and what is given back counts no more.
func TestScratch(t *testing.T) {
	s := &scratch{dir: t.TempDir(), limit: 10}
	a, err := s.create()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Write([]byte("0123456")); err != nil {
		t.Fatal(err)
	}
	b, err := s.create()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Write([]byte("0123")); err == nil || !strings.Contains(err.Error(), "--tmp-limit") {
		t.Errorf("11 bytes of 10: %v", err)
	}
	if left, err := os.ReadDir(s.dir); err != nil || len(left) != 0 {
		t.Errorf("files have names: %v, %v", left, err)
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	if n, err := b.ReadFrom(strings.NewReader("0123456789")); n != 10 || err != nil {
		t.Errorf("10 bytes of 10: %d, %v", n, err)
	}
	if p := make([]byte, 10); b.size != 10 || second(b.section().ReadAt(p, 0)) != nil || string(p) != "0123456789" {
		t.Errorf("%d bytes: %q", b.size, p)
	}
	if err := b.Close(); err != nil || s.used.Load() != 0 {
		t.Errorf("%v, %d bytes left", err, s.used.Load())
	}
}

func second(_ int, err error) error { return err }

func TestSizeText(t *testing.T) {
	for n, want := range map[int64]string{0: "0 bytes", 9999: "9999 bytes", 10000: "10.0 kB", 12_345_678: "12.3 MB", 99_999_999_999: "100.0 GB"} {
		if got := sizeText(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
}
