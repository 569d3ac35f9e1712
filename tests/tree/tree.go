// Package tree reads a mounted or local directory tree through system calls, all
// that stat(2), readlink(2), getxattr(2) and read(2) say of it, and compares two.
package tree

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/corpus"
)

// Walk returns every path below root, depth first, names in byte order, in the
// form of the corpus's listings. A path that cannot be read ends it.
func Walk(root string) ([]corpus.Entry, error) {
	var entries []corpus.Entry
	err := walk(root, ".", &entries)
	return entries, err
}

func walk(root, rel string, entries *[]corpus.Entry) error {
	e, err := entry(filepath.Join(root, rel), rel)
	if err != nil {
		return err
	}
	*entries = append(*entries, e)
	if e.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil
	}
	names, err := List(filepath.Join(root, rel))
	if err != nil {
		return err
	}
	slices.Sort(names)
	for _, name := range names {
		if err := walk(root, path.Join(rel, name), entries); err != nil {
			return err
		}
	}
	return nil
}

// List returns the names in dir in the order of readdir(3), without "." and "..".
func List(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}

func entry(name, rel string) (corpus.Entry, error) {
	var st unix.Stat_t
	if err := unix.Lstat(name, &st); err != nil {
		return corpus.Entry{}, fmt.Errorf("lstat %s: %w", name, err)
	}
	e := corpus.Entry{
		Path: rel, Mode: st.Mode, UID: st.Uid, GID: st.Gid, Nlink: uint32(st.Nlink), Ino: st.Ino,
		MtimeNs: st.Mtim.Sec*1e9 + st.Mtim.Nsec,
	}
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		e.Size = st.Size
		e.SHA256, err = hash(name, st.Size)
	case unix.S_IFLNK:
		e.Size = st.Size
		e.Target, err = os.Readlink(name)
	case unix.S_IFCHR, unix.S_IFBLK:
		e.Rdev = &[2]uint32{unix.Major(st.Rdev), unix.Minor(st.Rdev)}
	}
	if err != nil {
		return e, err
	}
	e.Xattrs, err = xattrs(name)
	return e, err
}

// hash reads the whole file; fewer or more bytes than stat(2) says are an error.
func hash(name string, size int64) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	if err != nil {
		return "", err
	}
	if n != size {
		return "", fmt.Errorf("%s: read %d bytes of %d", name, n, size)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func xattrs(name string) (map[string][]byte, error) {
	list := make([]byte, 64<<10)
	n, err := unix.Llistxattr(name, list)
	if errors.Is(err, unix.ENOTSUP) || n == 0 && err == nil {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listxattr %s: %w", name, err)
	}
	all := make(map[string][]byte)
	for attr := range strings.SplitSeq(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(name, attr, value)
		if err != nil {
			return nil, fmt.Errorf("getxattr %s %s: %w", name, attr, err)
		}
		all[attr] = value[:n]
	}
	return all, nil
}

// A Field is a part of an entry that Diff may be told to leave out.
type Field int

// What two trees may rightly differ in: a copy has other inode numbers, and the
// link count of a directory is each file system's own affair.
const (
	Ino Field = iota
	DirNlink
	Xattrs
	// RootMtime is for a root directory in which something was written.
	RootMtime
)

// Diff says in what got differs from want, a line a difference.
func Diff(want, got []corpus.Entry, except ...Field) []string {
	var diffs []string
	have := make(map[string]corpus.Entry, len(got))
	for _, e := range got {
		have[e.Path] = e
	}
	for _, w := range want {
		g, ok := have[w.Path]
		if !ok {
			diffs = append(diffs, fmt.Sprintf("%q is missing", w.Path))
			continue
		}
		delete(have, w.Path)
		if d := differences(fields(w, except), fields(g, except)); d != "" {
			diffs = append(diffs, fmt.Sprintf("%.80q:%s", w.Path, d))
		}
	}
	for p := range have {
		diffs = append(diffs, fmt.Sprintf("%q should not be there", p))
	}
	return diffs
}

// fields are an entry's facts as text, those in except left out.
func fields(e corpus.Entry, except []Field) []string {
	isDir := e.Mode&unix.S_IFMT == unix.S_IFDIR
	for _, f := range except {
		switch {
		case f == Ino:
			e.Ino = 0
		case f == DirNlink && isDir:
			e.Nlink = 0
		case f == Xattrs:
			e.Xattrs = nil
		case f == RootMtime && e.Path == ".":
			e.MtimeNs = 0
		}
	}
	var rdev [2]uint32
	if e.Rdev != nil {
		rdev = *e.Rdev
	}
	return []string{
		fmt.Sprintf("mode %#o", e.Mode), fmt.Sprintf("uid %d", e.UID), fmt.Sprintf("gid %d", e.GID),
		fmt.Sprintf("nlink %d", e.Nlink), fmt.Sprintf("ino %d", e.Ino), fmt.Sprintf("mtime %d", e.MtimeNs),
		fmt.Sprintf("size %d", e.Size), "sha256 " + e.SHA256, fmt.Sprintf("target %q", e.Target),
		fmt.Sprintf("rdev %v", rdev), fmt.Sprintf("xattrs %x", e.Xattrs),
	}
}

func differences(want, got []string) string {
	var d strings.Builder
	for i := range want {
		if want[i] != got[i] {
			fmt.Fprintf(&d, " %.100s, want %.100s;", got[i], want[i])
		}
	}
	return d.String()
}
