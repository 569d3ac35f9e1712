package erofsfmt

import (
	"context"
	"errors"
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

// shortFS are the images that TestFS looks at under -short: one of each kind.
var shortFS = []string{"plain", "inline", "chunked", "zstd-all", "48bit-lz4-frag", "metabox-zstd", "dot-omitted"}

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
			for _, e := range c.Listing(t) {
				if strings.Contains(e.Path, `\`) {
					names[e.Path] = "TestFS takes a backslash for an error"
				}
			}
			if err := fstest.TestFS(without{im.FS().(fs.ReadDirFS), names}, "sizes/t1", "ln-short", "dev/null"); err != nil {
				t.Error(err)
			}
		})
	}
}

// What TestFS cannot test: every path of the listing is there, by its name or, if
// it has none that io/fs takes, in its directory.
func TestFSShowsAll(t *testing.T) {
	c := corpus.Get(t, "48bit-lz4-frag")
	im := openCorpus(t, c)
	seen := map[string]bool{}
	fs.WalkDir(im.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			t.Error(err)
			return nil
		}
		info, err := d.Info()
		if err != nil {
			t.Error(err)
			return nil
		}
		seen[name] = true
		if _, ok := info.Sys().(*Inode); !ok {
			t.Errorf("%q: Sys is %T", name, info.Sys())
		}
		_, err = fs.Lstat(im.FS(), name)
		if valid := utf8.ValidString(name); valid != (err == nil) {
			t.Errorf("%q: valid %v, %v", name, valid, err)
		}
		return nil
	})
	for _, e := range c.Listing(t) {
		if !seen[e.Path] {
			t.Errorf("%q is missing", e.Path)
		}
		delete(seen, e.Path)
	}
	if len(seen) != 0 {
		t.Errorf("too many: %v", seen)
	}
}

func TestFSModes(t *testing.T) {
	fsys := openCorpus(t, corpus.Get(t, "extended")).FS()
	for _, c := range corpus.Get(t, "extended").Listing(t) {
		if !utf8.ValidString(c.Path) {
			continue
		}
		info, err := fs.Lstat(fsys, c.Path)
		if err != nil {
			t.Error(err)
			continue
		}
		if got := posix(info.Mode()); got != c.Mode {
			t.Errorf("%q: mode %#o, want %#o", c.Path, got, c.Mode)
		}
		if !info.ModTime().Equal(time.Unix(0, c.MtimeNs)) {
			t.Errorf("%q: time %v, want %v", c.Path, info.ModTime(), time.Unix(0, c.MtimeNs))
		}
	}
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
