package erofsfmt

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
)

// Each refusal names what is refused.
func TestOpenRefuses(t *testing.T) {
	le := binary.LittleEndian
	at := func(off int, edit func(b []byte)) func([]byte) []byte {
		return func(b []byte) []byte { edit(b[ondisk.SuperOffset+off:]); return b }
	}
	for _, c := range []struct {
		name string
		from string // image of the corpus
		edit func([]byte) []byte
		want error
		text string
	}{
		{"empty", "nosbcrc", func([]byte) []byte { return nil }, ErrNotErofs, "0 bytes hold no superblock"},
		{"short", "nosbcrc", func(b []byte) []byte { return b[:1151] }, ErrNotErofs, "1151 bytes hold no superblock"},
		{"magic", "nosbcrc", at(0, func(b []byte) { b[0]++ }), ErrNotErofs, "magic 0xe0f5e1e3"},
		{"gzip", "nosbcrc", func(b []byte) []byte { return slices.Repeat([]byte{0x1f, 0x8b}, 4096) }, ErrNotErofs, "magic"},
		{"checksum", "plain", at(4, func(b []byte) { b[0] ^= 1 }), ErrCorrupt, "superblock checksum"},
		{"byte under the checksum", "plain", at(0x30, func(b []byte) { b[0] ^= 1 }), ErrCorrupt, "superblock checksum"},
		{"last byte under the checksum", "plain", at(4095-1024, func(b []byte) { b[0] ^= 1 }), ErrCorrupt, "superblock checksum"},
		{"blocks of 256 bytes", "nosbcrc", at(12, func(b []byte) { b[0] = 8 }), ErrUnsupported, "block size 2^8"},
		{"blocks of 128 KiB", "nosbcrc", at(12, func(b []byte) { b[0] = 17 }), ErrUnsupported, "block size 2^17"},
		{"unknown feature", "nosbcrc", at(0x50, func(b []byte) { le.PutUint32(b, 1<<9|1<<31) }), ErrUnsupported, "incompatible feature 0x200 0x80000000"},
		{"large directory blocks", "nosbcrc", at(0x5a, func(b []byte) { b[0] = 1 }), ErrUnsupported, "directory blocks"},
		{"large superblock", "nosbcrc", at(13, func(b []byte) { b[0] = 200 }), ErrCorrupt, "superblock of 3328 bytes"},
		{"metabox without a slot", "nosbcrc", at(0x50, func(b []byte) { le.PutUint32(b, 0x100) }), ErrCorrupt, "a metabox, but"},
		{"packed inode in the metabox", "nosbcrc", at(0x60, func(b []byte) { b[7] = 0x80 }), ErrCorrupt, "packed inode is in the metabox"},
		{"inode sharing", "nosbcrc", at(8, func(b []byte) { b[0] = 0x20 }), ErrCorrupt, "inode sharing by prefix 0 of 0"},
		{"algorithm", "nosbcrc", func(b []byte) []byte {
			le.PutUint32(b[1024+0x50:], 2)
			le.PutUint16(b[1024+0x54:], 0x10)
			return b
		}, ErrUnsupported, "compression algorithms 0x10"},
		{"root is a file", "nosbcrc", at(14, func(b []byte) { le.PutUint16(b, fileNid(t)) }), ErrCorrupt, "is not a directory"},
		{"root is nowhere", "nosbcrc", at(0x28, func(b []byte) { b[3] = 0xff }), nil, "root directory: nid 38"},
		{"devices past the end", "multidev", func(b []byte) []byte {
			b[1024+8] &^= 1
			le.PutUint16(b[1024+0x56:], 0xffff)
			return b
		}, ErrCorrupt, "65535 device slots"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Open(context.Background(), memory(c.edit(bytes.Clone(corpus.Get(t, c.from).Data))))
			if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("%v, want %v with %q", err, c.want, c.text)
			}
			var fe *FormatError
			if !errors.As(err, &fe) {
				t.Errorf("%T is not a FormatError", err)
			}
		})
	}
}

// fileNid is the nid of a regular file of the image "nosbcrc".
func fileNid(t *testing.T) uint16 {
	return uint16(find(t, openCorpus(t, corpus.Get(t, "nosbcrc")), "sizes", "t1").Nid)
}

// Configurations of the algorithms, each a 16-bit length and its bytes.
func TestCompressionConfigurations(t *testing.T) {
	for _, c := range []struct {
		name string
		algs uint16
		cfg  []byte
		want error
		text string
	}{
		{"all", 15, le(uint16(14), uint16(65535), uint16(16), [10]byte{}, uint16(14), uint32(8<<20), [10]byte{},
			uint16(6), [6]byte{15}, uint16(6), [6]byte{0, 10}), nil, ""},
		{"aligned to 4", 12, le(uint16(7), [7]byte{15}, [3]byte{}, uint16(6), [6]byte{0, 10}), nil, ""},
		{"lz4 too short", 1, le(uint16(13), [13]byte{}), ErrCorrupt, "lz4 configuration of 13 bytes"},
		{"lz4 of 2 MiB", 1, le(uint16(14), uint16(0), uint16(512), [10]byte{}), ErrCorrupt, "lz4 pclusters of 512 blocks"},
		{"lzma format", 2, le(uint16(14), uint32(4096), uint16(1), [8]byte{}), ErrUnsupported, "lzma format 1"},
		{"lzma dictionary", 2, le(uint16(14), uint32(8<<20+1), uint16(0), [8]byte{}), ErrCorrupt, "lzma dictionary of 8388609 bytes"},
		{"deflate window", 4, le(uint16(6), [6]byte{16}), ErrUnsupported, "deflate window 2^16"},
		{"zstd format", 8, le(uint16(6), [6]byte{1, 10}), ErrUnsupported, "zstd format 1"},
		{"zstd window", 8, le(uint16(6), [6]byte{0, 11}), ErrUnsupported, "zstd window 2^21"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFake(ondisk.LayoutPlain, 0)
			f.super.FeatureIncompat, f.super.ComprAlgs = ondisk.IncompatComprCfgs, c.algs
			f.more[ondisk.SuperOffset+ondisk.SuperSize] = c.cfg
			_, err := Open(context.Background(), memory(f.bytes(t)))
			if !errors.Is(err, c.want) || err != nil && !strings.Contains(err.Error(), c.text) {
				t.Errorf("%v, want %v with %q", err, c.want, c.text)
			}
		})
	}
}

func TestSuperblock(t *testing.T) {
	for _, c := range []struct {
		image            string
		compat, incompat string
		algs             string
		inodes, blocks   uint64
	}{
		{"plain", "sb_chksum mtime xattr_filter", "", "", 269, 365},
		{"lz4", "sb_chksum mtime xattr_filter", "lz4_0padding", "lz4", 269, 77},
		{"multi-algo", "sb_chksum mtime xattr_filter", "lz4_0padding compr_cfgs/big_pcluster", "lz4 lzma zstd", 269, 63},
		{"zstd-all", "sb_chksum mtime xattr_filter", "lz4_0padding compr_cfgs/big_pcluster fragments/dedupe", "zstd", 270, 35},
		{"fingerprint", "sb_chksum mtime xattr_filter plain_xattr_prefixes ishare_xattrs", "xattr_prefixes", "", 269, 178},
		{"metabox", "sb_chksum mtime xattr_filter", "lz4_0padding 48bit metabox", "lz4", 270, 69},
		{"multidev", "sb_chksum mtime xattr_filter", "chunked_file device_table/compr_head2", "", 269, 11},
	} {
		sb := openCorpus(t, corpus.Get(t, c.image)).Super()
		if got := strings.Join(sb.CompatFeatures(), " "); got != c.compat {
			t.Errorf("%s: compat %q, want %q", c.image, got, c.compat)
		}
		if got := strings.Join(sb.IncompatFeatures(), " "); got != c.incompat {
			t.Errorf("%s: incompat %q, want %q", c.image, got, c.incompat)
		}
		if got := strings.Join(sb.Algorithms(), " "); got != c.algs {
			t.Errorf("%s: algorithms %q, want %q", c.image, got, c.algs)
		}
		if sb.Inodes != c.inodes || sb.Blocks != c.blocks || sb.BlockSize() != 4096 || sb.Built().Unix() != 1700000000 {
			t.Errorf("%s: %+v, built %v", c.image, sb, sb.Built())
		}
	}
}

// 48-bit images have their root and the high half of their blocks elsewhere.
func Test48BitSuperblock(t *testing.T) {
	d := ondisk.Super{Magic: ondisk.Magic, BlkSzBits: 12, FeatureIncompat: ondisk.Incompat48Bit, BlocksLo: 5, RootNid2b: 2, RootNid8b: 1 << 40}
	s, err := decodeSuper(&d)
	if err != nil || s.RootNid != 1<<40 || s.Blocks != 2<<32|5 {
		t.Errorf("%+v, %v", s, err)
	}
	d.RootNid8b = 0
	if s, err = decodeSuper(&d); err != nil || s.RootNid != 2 || s.Blocks != 5 {
		t.Errorf("%+v, %v", s, err)
	}
}

func TestInodeRefuses(t *testing.T) {
	for _, c := range []struct {
		name string
		edit func(*fake)
		want error
		text string
	}{
		{"format bits", func(f *fake) { f.inode.Format |= 0x20 }, ErrUnsupported, "inode format bits 0x20"},
		{"layout", func(f *fake) { f.inode.Format = 1 | 5<<1 }, ErrUnsupported, "data layout 5"},
		{"negative size", func(f *fake) { f.inode.Size = 1 << 63 }, ErrCorrupt, "size 9223372036854775808"},
		{"mode", func(f *fake) { f.inode.Mode = 0o644 }, ErrCorrupt, "mode 0644"},
		{"chunk format", func(f *fake) { f.inode.Format, f.inode.U = 1|4<<1, 0x80 }, ErrUnsupported, "chunk format bits 0x80"},
		{"no algorithm", func(f *fake) { f.inode.Format = 1 | 1<<1 }, ErrCorrupt, "the image has no algorithm"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFake(ondisk.LayoutPlain, 1)
			c.edit(f)
			im, err := Open(context.Background(), memory(f.bytes(t)))
			if err != nil {
				t.Fatal(err)
			}
			_, err = im.Inode(context.Background(), fakeFile)
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) || !strings.Contains(err.Error(), "nid 64") {
				t.Errorf("%v, want %v with %q", err, c.want, c.text)
			}
		})
	}
	im := openCorpus(t, corpus.Get(t, "plain"))
	for _, nid := range []Nid{1 << 40, 1<<63 - 1, 1 << 63, 1<<64 - 1} {
		if _, err := im.Inode(context.Background(), nid); err == nil {
			t.Errorf("nid %d was read", nid)
		}
	}
}

// st_ino as fs/erofs/internal.h erofs_nid_to_ino64 makes it, by hand.
func TestIno(t *testing.T) {
	plain, boxed := openCorpus(t, corpus.Get(t, "plain")), openCorpus(t, corpus.Get(t, "metabox"))
	for _, c := range []struct {
		nid          Nid
		plain, boxed uint64
	}{
		{0, 0, 0},
		{38, 38, 38},
		{1 << 63, 1 << 63, 0x80000000},
		{1<<63 | 511, 1<<63 | 511, 0x800001ff},
		{0x80000001, 0x80000001, 0x1_0000_0001},
		{0x1_2345_6789, 0x1_2345_6789, 0x2_2345_6789},
	} {
		if got := plain.Ino(c.nid); got != c.plain {
			t.Errorf("%#x: %#x, want %#x", uint64(c.nid), got, c.plain)
		}
		if got := boxed.Ino(c.nid); got != c.boxed {
			t.Errorf("%#x in an image with a metabox: %#x, want %#x", uint64(c.nid), got, c.boxed)
		}
	}
}

func TestRdev(t *testing.T) {
	ino := Inode{Rdev: 70000&0xff | 259<<8 | 70000&^0xff<<12}
	if ino.Major() != 259 || ino.Minor() != 70000 {
		t.Errorf("%d, %d", ino.Major(), ino.Minor())
	}
}
