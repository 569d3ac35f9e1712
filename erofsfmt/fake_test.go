package erofsfmt

import (
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// A fake is an image with one file, made by hand, for what no mkfs writes:
//
//	block 0   superblock at 1024, its root at fakeRoot, the file at fakeFile with
//	          body after its 64 bytes
//	block 1…  as the test wants
type fake struct {
	super  ondisk.Super
	inode  ondisk.InodeExtended
	body   []byte           // at byte 2112 of the image, which is a multiple of 64
	blocks map[int][]byte   // by block number
	more   map[int][]byte   // by byte
	far    map[int64][]byte // by byte, where nobody has the memory for what lies before
	file   Nid              // of the file; one in far or in a metabox is put there by the test
}

const (
	fakeRoot = 48 // at byte 1536
	fakeFile = 64 // at byte 2048
)

func newFake(layout int, size uint64) *fake {
	return &fake{
		super: ondisk.Super{Magic: ondisk.Magic, BlkSzBits: 12, RootNid2b: fakeRoot},
		inode: ondisk.InodeExtended{
			Format: ondisk.FormatExtended | uint16(layout)<<ondisk.FormatLayoutBit, Mode: modeReg | 0o644, Nlink: 1, Size: size,
		},
		blocks: map[int][]byte{},
		more:   map[int][]byte{},
		far:    map[int64][]byte{},
		file:   fakeFile,
	}
}

func (f *fake) bytes(t testing.TB) []byte {
	t.Helper()
	n, size := 1, 1<<f.super.BlkSzBits
	for i, b := range f.blocks {
		n = max(n, i+(len(b)+size-1)/size)
	}
	out := make([]byte, max(n*size, 4096))
	put := func(off int, v any) {
		if _, err := binary.Encode(out[off:], binary.LittleEndian, v); err != nil {
			t.Fatal(err)
		}
	}
	put(ondisk.SuperOffset, &f.super)
	dir := dirBytes("", ".", fakeRoot, "..", fakeRoot, "f", int(f.file))
	put(fakeRoot*32, &ondisk.InodeExtended{
		Format: ondisk.FormatExtended | ondisk.LayoutInline<<ondisk.FormatLayoutBit, Mode: modeDir | 0o755, Nlink: 2, Size: uint64(len(dir)),
	})
	copy(out[fakeRoot*32+64:], dir)
	if _, elsewhere := f.far[int64(f.file)*32]; !elsewhere && !f.file.inMetabox() {
		put(int(f.file)*32, &f.inode)
		copy(out[f.file*32+64:], f.body)
	}
	for i, b := range f.blocks {
		copy(out[i*size:], b)
	}
	for off, b := range f.more {
		copy(out[off:], b)
	}
	return out
}

func (f *fake) open(t testing.TB, o Options) (*Image, *Inode) {
	t.Helper()
	im, err := OpenWith(context.Background(), f.image(t), o)
	if err != nil {
		t.Fatal(err)
	}
	ino, err := im.Inode(context.Background(), f.file)
	if err != nil {
		t.Fatal(err)
	}
	return im, &ino
}

// A sparse is an image most of which is a hole.
type sparse struct {
	near memory
	far  map[int64][]byte
}

func (f *fake) image(t testing.TB) sparse { return sparse{f.bytes(t), f.far} }

// Size is that of whole pages: a kernel reads no less.
func (s sparse) Size() int64 {
	size := s.near.Size()
	for off, b := range s.far {
		size = max(size, (off+int64(len(b))+4095)&^4095)
	}
	return size
}

func (s sparse) ReadAt(_ context.Context, p []byte, off int64) error {
	clear(p)
	overlay(p, off, 0, s.near)
	for at, b := range s.far {
		overlay(p, off, at, b)
	}
	return nil
}

// overlay copies to p, which begins at off, what b, which begins at at, has of it.
func overlay(p []byte, off, at int64, b []byte) {
	if skip := off - at; skip < 0 && -skip < int64(len(p)) {
		copy(p[-skip:], b)
	} else if skip >= 0 && skip < int64(len(b)) {
		copy(p, b[skip:])
	}
}

// write makes a file of the image, with holes where it has them.
func (s sparse) write(t testing.TB, dir string) string {
	t.Helper()
	file, err := os.Create(filepath.Join(dir, "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	_, err = file.WriteAt(s.near, 0)
	for at, b := range s.far {
		if err == nil {
			_, err = file.WriteAt(b, at)
		}
	}
	if err == nil {
		err = file.Truncate(s.Size())
	}
	if err != nil {
		t.Fatal(err)
	}
	return file.Name()
}

// dirBytes makes a directory block of names and nids in turn, followed by pad.
func dirBytes(pad string, entries ...any) []byte {
	n := len(entries) / 2
	var heads, names []byte
	for i := range n {
		d := ondisk.Dirent{Nid: uint64(entries[2*i+1].(int)), NameOff: uint16(n*ondisk.DirentSize + len(names)), FileType: ondisk.FtRegular}
		heads, _ = binary.Append(heads, binary.LittleEndian, &d)
		names = append(names, entries[2*i].(string)...)
	}
	return append(append(heads, names...), pad...)
}

// le appends numbers as they are on disk: uint16, uint32, uint64, bytes.
func le(vs ...any) []byte {
	var b []byte
	for _, v := range vs {
		b, _ = binary.Append(b, binary.LittleEndian, v)
	}
	return b
}

// pattern is n bytes that differ from place to place.
func pattern(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i) ^ byte(i>>8)*31 ^ seed
	}
	return b
}
