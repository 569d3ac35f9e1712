package erofsfmt

import (
	"context"
	"encoding/binary"
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
	body   []byte         // at byte 2112 of the image, which is a multiple of 64
	blocks map[int][]byte // by block number
	more   map[int][]byte // by byte
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
	dir := dirBytes("", ".", fakeRoot, "..", fakeRoot, "f", fakeFile)
	put(fakeRoot*32, &ondisk.InodeExtended{
		Format: ondisk.FormatExtended | ondisk.LayoutInline<<ondisk.FormatLayoutBit, Mode: modeDir | 0o755, Nlink: 2, Size: uint64(len(dir)),
	})
	copy(out[fakeRoot*32+64:], dir)
	put(fakeFile*32, &f.inode)
	copy(out[fakeFile*32+64:], f.body)
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
	im, err := OpenWith(context.Background(), memory(f.bytes(t)), o)
	if err != nil {
		t.Fatal(err)
	}
	ino, err := im.Inode(context.Background(), fakeFile)
	if err != nil {
		t.Fatal(err)
	}
	return im, &ino
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
