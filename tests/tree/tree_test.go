package tree

import (
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/corpus"
)

func TestWalk(t *testing.T) {
	dir := t.TempDir()
	at := func(rel string) string { return filepath.Join(dir, rel) }
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(os.Mkdir(at("a"), 0o755))
	check(os.WriteFile(at("a/file"), []byte("content"), 0o640))
	check(os.Chmod(at("a/file"), 0o640))
	check(os.Chtimes(at("a/file"), time.Time{}, time.Unix(-5, 7)))
	check(os.WriteFile(at("a/\xff\n"), nil, 0o644))
	check(os.Symlink("a/file", at("link")))
	got, err := Walk(dir)
	check(err)
	var paths []string
	for _, e := range got {
		paths = append(paths, e.Path)
	}
	if want := []string{".", "a", "a/file", "a/\xff\n", "link"}; !slices.Equal(paths, want) {
		t.Fatalf("walked %q, want %q", paths, want)
	}
	sum := sha256.Sum256([]byte("content"))
	f := got[2]
	if f.Mode != unix.S_IFREG|0o640 || f.Size != 7 || f.SHA256 != hex.EncodeToString(sum[:]) || f.MtimeNs != -5e9+7 || f.UID != uint32(os.Geteuid()) {
		t.Errorf("a/file: %+v", f)
	}
	if got[4].Target != "a/file" || got[4].Mode&unix.S_IFMT != unix.S_IFLNK {
		t.Errorf("link: %+v", got[4])
	}
}

// TestDiff changes one field after the other.
func TestDiff(t *testing.T) {
	file := corpus.Entry{Path: "f", Mode: unix.S_IFREG | 0o644, Nlink: 1, Size: 3, SHA256: "aa", Xattrs: map[string][]byte{"user.a": {1}}}
	dir := corpus.Entry{Path: "d", Mode: unix.S_IFDIR | 0o755, Nlink: 2}
	want := []corpus.Entry{dir, file}
	if d := Diff(want, slices.Clone(want)); len(d) != 0 {
		t.Fatalf("equal trees differ: %v", d)
	}
	for name, c := range map[string]struct {
		change func(d, f *corpus.Entry)
		except []Field
	}{
		"mode":   {change: func(_, f *corpus.Entry) { f.Mode ^= 1 }},
		"uid":    {change: func(_, f *corpus.Entry) { f.UID = 1 }},
		"gid":    {change: func(_, f *corpus.Entry) { f.GID = 1 }},
		"nlink":  {change: func(_, f *corpus.Entry) { f.Nlink = 2 }, except: []Field{Ino, DirNlink, Xattrs}},
		"mtime":  {change: func(_, f *corpus.Entry) { f.MtimeNs++ }},
		"size":   {change: func(_, f *corpus.Entry) { f.Size++ }},
		"sha256": {change: func(_, f *corpus.Entry) { f.SHA256 = "ab" }},
		"target": {change: func(_, f *corpus.Entry) { f.Target = "x" }},
		"rdev":   {change: func(_, f *corpus.Entry) { f.Rdev = &[2]uint32{1, 3} }},
		"xattr":  {change: func(_, f *corpus.Entry) { f.Xattrs = map[string][]byte{"user.a": {2}} }},
		"noattr": {change: func(_, f *corpus.Entry) { f.Xattrs = nil }},
		"ino":    {change: func(_, f *corpus.Entry) { f.Ino = 9 }},
		"dir":    {change: func(d, _ *corpus.Entry) { d.Nlink = 3 }},
		"path":   {change: func(_, f *corpus.Entry) { f.Path = "g" }},
	} {
		d, f := dir, file
		c.change(&d, &f)
		if len(Diff(want, []corpus.Entry{d, f}, c.except...)) == 0 {
			t.Errorf("%s: not noticed", name)
		}
	}
	excepted := file
	excepted.Ino, excepted.Xattrs = 9, nil
	if d := Diff([]corpus.Entry{file}, []corpus.Entry{excepted}, Ino, Xattrs); len(d) != 0 {
		t.Errorf("exceptions do not hold: %v", d)
	}
	if len(Diff(want[:1], want)) != 1 || len(Diff(want, want[:1])) != 1 {
		t.Error("a missing or extra path is not noticed")
	}
}
