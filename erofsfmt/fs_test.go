package erofsfmt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"
	"unicode/utf8"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
)

// without hides names that fstest.TestFS cannot test, for the reasons given.
type without struct {
	fs.ReadDirFS
	names map[string]string // path: reason
}

func (w without) hide(dir string, list []fs.DirEntry) []fs.DirEntry {
	return slices.DeleteFunc(list, func(e fs.DirEntry) bool { return w.names[path.Join(dir, e.Name())] != "" })
}

func (w without) ReadDir(name string) ([]fs.DirEntry, error) {
	list, err := w.ReadDirFS.ReadDir(name)
	return w.hide(name, list), err
}

func (w without) Open(name string) (fs.File, error) {
	f, err := w.ReadDirFS.Open(name)
	if d, ok := f.(fs.ReadDirFile); ok {
		return withoutDir{d, w, name}, err
	}
	return f, err
}

func (w without) Stat(name string) (fs.FileInfo, error)  { return fs.Stat(w.ReadDirFS, name) }
func (w without) ReadFile(name string) ([]byte, error)   { return fs.ReadFile(w.ReadDirFS, name) }
func (w without) Lstat(name string) (fs.FileInfo, error) { return fs.Lstat(w.ReadDirFS, name) }
func (w without) ReadLink(name string) (string, error)   { return fs.ReadLink(w.ReadDirFS, name) }

type withoutDir struct {
	fs.ReadDirFile
	w    without
	name string
}

func (d withoutDir) ReadDir(n int) ([]fs.DirEntry, error) {
	for {
		list, err := d.ReadDirFile.ReadDir(n)
		if list = d.w.hide(d.name, list); len(list) > 0 || n <= 0 || err != nil {
			return list, err
		}
	}
}

// shortFS are the images that TestFS looks at under -short.
var shortFS = []string{"inline", "48bit-lz4-frag"}

// TestFS reads each file byte by byte, which takes its time.
func TestFS(t *testing.T) {
	hidden := map[string]string{
		"names/raw-\xff\xfe": "not UTF-8, so fs.ValidPath refuses it",
		"ln-dangling":        "its target does not exist, and TestFS opens it",
		"ln-long":            "its target does not exist, and TestFS opens it",
	}
	for _, c := range corpus.Images(t) {
		if testing.Short() && !slices.Contains(shortFS, c.Name) {
			continue
		}
		t.Run(c.Name, func(t *testing.T) {
			t.Parallel()
			im := openCorpus(t, c)
			names := map[string]string{}
			for name, why := range hidden {
				names[name] = why
			}
			var all []string
			for _, e := range c.Listing(t) {
				if strings.Contains(e.Path, `\`) {
					names[e.Path] = "TestFS takes a backslash for an error"
				}
				if names[e.Path] == "" && e.Path != "." {
					all = append(all, e.Path)
				}
			}
			if err := fstest.TestFS(without{im.FS().(fs.ReadDirFS), names}, all...); err != nil {
				t.Error(err)
			}
		})
	}
}

// What TestFS cannot test: every path of the listing is there and is what the
// kernel says, by its name or, if it has none that io/fs takes, in its directory;
// ReadDir of a file gives the order of the image, that of the file system the
// order of the names; Info, Lstat and ReadLink agree.
func TestFSShowsAll(t *testing.T) {
	for _, c := range corpus.Images(t) {
		t.Run(c.Name, func(t *testing.T) {
			im := openCorpus(t, c)
			want := map[string]corpus.Entry{}
			for _, e := range c.Listing(t) {
				want[e.Path] = e
			}
			err := fs.WalkDir(im.FS(), ".", func(name string, d fs.DirEntry, err error) error {
				if err != nil {
					return err
				}
				info, err := d.Info()
				if err != nil {
					return err
				}
				if e, ok := want[name]; ok {
					sameInfo(t, e, info, d)
				} else {
					t.Errorf("%q is too much", name)
				}
				delete(want, name)
				if valid, err := utf8.ValidString(name), sameByName(im, name, info); valid != (err == nil) {
					t.Errorf("%q: valid %v, %v", name, valid, err)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
			for name := range want {
				t.Errorf("%q is missing", name)
			}
		})
	}
}

// sameInfo compares what io/fs says of a file with what the kernel does.
func sameInfo(t *testing.T, want corpus.Entry, info fs.FileInfo, d fs.DirEntry) {
	t.Helper()
	ino, ok := info.Sys().(*Inode)
	if !ok || ino.Ino != want.Ino || ino.UID != want.UID || ino.GID != want.GID || ino.Nlink != want.Nlink {
		t.Errorf("%q: %+v, want %+v", want.Path, info.Sys(), want)
	}
	if posix(info.Mode()) != want.Mode || d.Type() != info.Mode().Type() || d.IsDir() != info.IsDir() {
		t.Errorf("%q: mode %v, type %v; want %#o", want.Path, info.Mode(), d.Type(), want.Mode)
	}
	if !info.ModTime().Equal(time.Unix(0, want.MtimeNs)) || !info.IsDir() && info.Size() != want.Size {
		t.Errorf("%q: %v, %d bytes; want %+v", want.Path, info.ModTime(), info.Size(), want)
	}
	if info.Name() != path.Base(want.Path) && want.Path != "." || d.Name() != info.Name() {
		t.Errorf("%q is called %q and %q", want.Path, info.Name(), d.Name())
	}
}

// sameByName looks a file up by its name and compares it with info.
func sameByName(im *Image, name string, info fs.FileInfo) error {
	got, err := fs.Lstat(im.FS(), name)
	if err != nil {
		return err
	}
	if *got.Sys().(*Inode) != *info.Sys().(*Inode) || got.Mode() != info.Mode() {
		return fmt.Errorf("Lstat says %v, ReadDir %v", got, info)
	}
	switch {
	case info.Mode()&fs.ModeSymlink != 0:
		target, err := fs.ReadLink(im.FS(), name)
		if err != nil || int64(len(target)) != info.Size() {
			return fmt.Errorf("link to %q of %d bytes: %w", target, info.Size(), err)
		}
	case info.IsDir():
		return sameOrder(im, name, info.Sys().(*Inode))
	}
	return nil
}

// sameOrder compares the two ways to read a directory with Image.ReadDir.
func sameOrder(im *Image, name string, dir *Inode) error {
	f, err := im.FS().Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	var got, want []string
	list, err := f.(fs.ReadDirFile).ReadDir(-1)
	for _, d := range list {
		got = append(got, d.Name())
	}
	if err == nil {
		err = im.ReadDir(context.Background(), dir, 0, func(e Dirent) bool {
			if e.Name != "." && e.Name != ".." {
				want = append(want, e.Name)
			}
			return true
		})
	}
	if err != nil || !slices.Equal(got, want) {
		return fmt.Errorf("File.ReadDir: %q, want %q: %w", got, want, err)
	}
	sorted, err := fs.ReadDir(im.FS(), name)
	got = got[:0]
	for _, d := range sorted {
		got = append(got, d.Name())
	}
	if slices.Sort(want); err != nil || !slices.Equal(got, want) {
		return fmt.Errorf("ReadDir: %q, want %q: %w", got, want, err)
	}
	return nil
}

// posix undoes fileMode.
func posix(m fs.FileMode) uint32 {
	mode := uint32(m.Perm())
	for bit, p := range map[fs.FileMode]uint32{
		fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000,
		fs.ModeDir: modeDir, fs.ModeSymlink: modeLnk, fs.ModeNamedPipe: modeFifo, fs.ModeSocket: modeSock,
	} {
		if m&bit != 0 {
			mode |= p
		}
	}
	switch {
	case m&fs.ModeCharDevice != 0:
		mode |= modeChr
	case m&fs.ModeDevice != 0:
		mode |= modeBlk
	case mode&modeType == 0:
		mode |= modeReg
	}
	return mode
}

// linkTree is an image of links: the file f is a link to target.
func linkTree(t *testing.T, target string) fs.FS {
	f := newFake(ondisk.LayoutInline, uint64(len(target)))
	f.inode.Mode, f.body = modeLnk|0o777, []byte(target)
	im, _ := f.open(t, Options{})
	return im.FS()
}

func TestFSLinks(t *testing.T) {
	for _, c := range []struct {
		target string
		want   error
	}{
		{"/", nil},
		{"/../..", nil},
		{"./.", nil},
		{"..//", nil},
		{"f", errLoop},
		{"/f/x", errLoop},
		{"none", fs.ErrNotExist},
		{"/none/..", fs.ErrNotExist},
	} {
		fsys := linkTree(t, c.target)
		info, err := fs.Stat(fsys, "f")
		if !errors.Is(err, c.want) {
			t.Errorf("%q: %v, want %v", c.target, err, c.want)
		} else if err == nil && !info.IsDir() {
			t.Errorf("%q: %v", c.target, info)
		}
		if got, err := fs.ReadLink(fsys, "f"); err != nil || got != c.target {
			t.Errorf("%q: %q, %v", c.target, got, err)
		}
	}
	im := openCorpus(t, corpus.Get(t, "lz4"))
	data, err := fs.ReadFile(im.FS(), "ln-short") // sizes/t1
	if err != nil || len(data) != 1 {
		t.Errorf("%d bytes, %v", len(data), err)
	}
	if _, err := fs.ReadFile(im.FS(), "sizes/t1/x"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file as a directory: %v", err)
	}
	if _, err := im.FS().Open("../x"); !errors.Is(err, fs.ErrInvalid) {
		t.Errorf("an invalid path: %v", err)
	}
}

func TestFSFileSeeks(t *testing.T) {
	im := openCorpus(t, corpus.Get(t, "lz4"))
	f, err := im.FS().Open("sizes/t4097")
	if err != nil {
		t.Fatal(err)
	}
	s := f.(io.ReadSeeker)
	if n, err := s.Seek(-1, io.SeekEnd); n != 4096 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if b, err := io.ReadAll(s); len(b) != 1 || err != nil {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	if _, err := s.Seek(-1, io.SeekStart); err == nil {
		t.Error("a seek before the beginning")
	}
	if _, err := s.Seek(0, 9); err == nil {
		t.Error("a seek from nowhere")
	}
	f.Close()
	if _, err := f.Read(make([]byte, 1)); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("a closed file: %v", err)
	}
}

// Where a directory does not say what an entry is, the inode does.
func TestFSUnknownType(t *testing.T) {
	for _, c := range []struct {
		mode uint16
		want fs.FileMode
	}{{modeReg, 0}, {modeLnk, fs.ModeSymlink}, {modeChr, fs.ModeDevice | fs.ModeCharDevice}, {modeFifo, fs.ModeNamedPipe}} {
		f := newFake(ondisk.LayoutPlain, 0)
		f.inode.Mode = c.mode | 0o600
		f.more[fakeRoot*32+64+2*ondisk.DirentSize+10] = []byte{0} // the type of the third entry
		im, _ := f.open(t, Options{})
		list, err := fs.ReadDir(im.FS(), ".")
		if err != nil || len(list) != 1 || list[0].Type() != c.want {
			t.Errorf("%v, %v; want %v", list, err, c.want)
		}
	}
	f := newFake(ondisk.LayoutPlain, 0)
	f.inode.Mode = 0 // not an inode at all
	f.more[fakeRoot*32+64+2*ondisk.DirentSize+10] = []byte{0}
	im, err := Open(context.Background(), memory(f.bytes(t)))
	if err != nil {
		t.Fatal(err)
	}
	if list, err := fs.ReadDir(im.FS(), "."); !errors.Is(err, ErrCorrupt) {
		t.Errorf("%v, %v", list, err)
	}
}
