package erofsfmt

import (
	"context"
	"errors"
	"io/fs"
	"reflect"
	"strings"
	"testing"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
)

// Directories of every image: sorted, every name is found and nothing else, the
// types are those of the inodes, and reading goes on from every position.
func TestDirectories(t *testing.T) {
	ctx := context.Background()
	for _, c := range corpus.Images(t) {
		t.Run(c.Name, func(t *testing.T) {
			im := openCorpus(t, c)
			visit(t, im, func(name string, dir *Inode) {
				if !dir.IsDir() {
					if err := im.ReadDir(ctx, dir, 0, func(Dirent) bool { return true }); err == nil {
						t.Errorf("%q was read as a directory", name)
					}
					return
				}
				checkDir(t, im, name, dir)
			})
		})
	}
}

func checkDir(t *testing.T, im *Image, name string, dir *Inode) {
	ctx := context.Background()
	entries := readDir(t, im, dir)
	prev := ""
	for i, e := range entries {
		if e.Name <= prev && !(dir.dotOmitted && i == len(entries)-1) {
			t.Errorf("%q: %q after %q", name, e.Name, prev)
		}
		prev = e.Name
		nid, err := im.Lookup(ctx, dir, e.Name)
		if err != nil || nid != e.Nid {
			t.Errorf("%q: %q is nid %d, %v; want %d", name, e.Name, nid, err, e.Nid)
		}
		ino, err := im.Inode(ctx, e.Nid)
		if err != nil || uint32(e.Type)<<12 != ino.Mode&modeType {
			t.Errorf("%q: %q has type %d and mode %#o, %v", name, e.Name, e.Type, ino.Mode, err)
		}
		for _, no := range []string{e.Name + "\x01", strings.TrimSuffix(e.Name, e.Name[len(e.Name)-1:]) + "\x7e\x7e", ""} {
			if _, err := im.Lookup(ctx, dir, no); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%q: lookup of %q: %v", name, no, err)
			}
		}
	}
	// In pieces of three: what fn refuses comes again.
	var again []Dirent
	for pos, more := int64(0), true; more; {
		n := 0
		more = false
		err := im.ReadDir(ctx, dir, pos, func(e Dirent) bool {
			if n++; n > 3 {
				more = true
				return false
			}
			again = append(again, e)
			pos = e.Next
			return true
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if !reflect.DeepEqual(entries, again) {
		t.Errorf("%q in pieces: %v\nwant %v", name, again, entries)
	}
	for i, e := range entries {
		var rest []Dirent
		if err := im.ReadDir(ctx, dir, e.Next, func(e Dirent) bool { rest = append(rest, e); return true }); err != nil {
			t.Fatal(err)
		}
		if len(rest) != len(entries)-i-1 || len(rest) > 0 && rest[0] != entries[i+1] {
			t.Errorf("%q from after %q: %d entries, want %d", name, e.Name, len(rest), len(entries)-i-1)
		}
	}
}

func TestDotOmitted(t *testing.T) {
	im := openCorpus(t, corpus.Get(t, "dot-omitted"))
	root := find(t, im)
	if !root.dotOmitted {
		t.Fatal("the image stores its dots")
	}
	entries := readDir(t, im, root)
	last := entries[len(entries)-1]
	if want := (Dirent{Name: ".", Nid: root.Nid, Type: DT_DIR, Next: root.Size + 1}); last != want {
		t.Errorf("the last entry is %+v, want %+v", last, want)
	}
	if nid, err := im.Lookup(context.Background(), root, "."); nid != root.Nid || err != nil {
		t.Errorf("lookup of the dot: %d, %v", nid, err)
	}
}

// Directory blocks by hand: an entry has 12 bytes.
func TestDirBlock(t *testing.T) {
	good := dirBytes("", ".", 1, "..", 2, "a", 3)
	padded := dirBytes("\x00\x00\x00junk", ".", 1, "..", 2, "a", 3)
	poke := func(b []byte, at int, v byte) []byte {
		b = append([]byte(nil), b...)
		b[at] = v
		return b
	}
	for _, c := range []struct {
		name  string
		block []byte
		want  string // names, or an error
	}{
		{"good", good, ". .. a"},
		{"padded", padded, ". .. a"},
		{"long name", dirBytes("", strings.Repeat("x", 255), 1), strings.Repeat("x", 255)},
		{"too long a name", dirBytes("", strings.Repeat("x", 256), 1), "corrupt"},
		{"empty", nil, "corrupt"},
		{"half an entry", good[:11], "corrupt"},
		{"zeros", make([]byte, 4096), "corrupt"},
		{"first name inside an entry", poke(good, 8, 13), "corrupt"},
		{"first name at the end", poke(good, 8, byte(len(good))), "corrupt"},
		{"first name past the end", poke(good, 9, 0xf0), "corrupt"},
		{"second name before the first", poke(good, 20, 35), "corrupt"},
		{"second name at the first", poke(good, 20, 36), "corrupt"},
		{"third name past the end", poke(good, 32, 200), "corrupt"},
		{"no third name", poke(good, 39, 0), "corrupt"},
		{"a slash", poke(good, 39, '/'), "corrupt"},
		{"a NUL in the middle", poke(good, 38, 0), "corrupt"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b, err := parseDirBlock(c.block)
			var names []string
			for i := 0; err == nil && i < b.n; i++ {
				var name []byte
				_, name, err = b.entry(i)
				names = append(names, string(name))
			}
			if c.want == "corrupt" {
				if !errors.Is(err, ErrCorrupt) {
					t.Errorf("%q, %v; want ErrCorrupt", names, err)
				}
			} else if got := strings.Join(names, " "); err != nil || got != c.want {
				t.Errorf("%q, %v; want %q", got, err, c.want)
			}
		})
	}
}

// A lookup in a directory of several blocks goes to the right one.
func TestLookupAcrossBlocks(t *testing.T) {
	f := newFake(ondisk.LayoutPlain, 3*512)
	f.super.BlkSzBits = 9
	f.inode.Mode, f.inode.U = modeDir|0o755, 8
	zeros := strings.Repeat("\x00", 400)
	f.blocks[8] = dirBytes(zeros, ".", fakeFile, "..", fakeRoot, "b", 1)
	f.blocks[9] = dirBytes(zeros, "c", 2, "e", 3)
	f.blocks[10] = dirBytes("\x00", "g", 4)
	for i := 8; i <= 10; i++ {
		f.blocks[i] = append(f.blocks[i], make([]byte, 512-len(f.blocks[i]))...)
	}
	im, dir := f.open(t, Options{})
	for name, want := range map[string]Nid{".": fakeFile, "..": fakeRoot, "b": 1, "c": 2, "e": 3, "g": 4, "": 0, "a": 0, "bb": 0, "d": 0, "f": 0, "h": 0, "cc": 0} {
		nid, err := im.Lookup(context.Background(), dir, name)
		if nid != want || (want == 0) != errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%q: nid %d, %v; want %d", name, nid, err, want)
		}
	}
	f.blocks[9][8] = 0
	im, dir = f.open(t, Options{})
	if _, err := im.Lookup(context.Background(), dir, "b"); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a corrupt block in the middle: %v", err)
	}
	if err := im.ReadDir(context.Background(), dir, 0, func(Dirent) bool { return true }); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a corrupt block in the middle: %v", err)
	}
}

func TestReadlink(t *testing.T) {
	for _, c := range []struct {
		target string
		want   error
	}{{"a/b", nil}, {strings.Repeat("x", 1900), nil}, {"", ErrCorrupt}, {"a\x00b", ErrCorrupt}} {
		f := newFake(ondisk.LayoutInline, uint64(len(c.target)))
		f.inode.Mode, f.body = modeLnk|0o777, []byte(c.target)
		im, ino := f.open(t, Options{})
		got, err := im.Readlink(context.Background(), ino)
		if !errors.Is(err, c.want) || err == nil && got != c.target {
			t.Errorf("%q: %q, %v", c.target, got, err)
		}
	}
	f := newFake(ondisk.LayoutPlain, 1<<40)
	f.inode.Mode = modeLnk | 0o777
	im, ino := f.open(t, Options{})
	if _, err := im.Readlink(context.Background(), ino); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a link of 1 TiB: %v", err)
	}
}
