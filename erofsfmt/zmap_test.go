package erofsfmt

import (
	"context"
	"reflect"
	"testing"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// Bits of the first 16 bits of a full index entry.
const (
	fPlain   = uint16(ondisk.LclusterPlain)
	fHead1   = uint16(ondisk.LclusterHead1)
	fNonhead = uint16(ondisk.LclusterNonhead)
	fHead2   = uint16(ondisk.LclusterHead2)
)

// mapHeader is the 8 bytes before an index, and the 8 unused ones after it in the
// full layout.
func mapHeader(layout int, lo uint32, advise uint16, algs, bits uint8) []byte {
	b := le(lo, advise, algs, bits)
	if layout == ondisk.LayoutCompressedFull && advise&ondisk.AdviseExtents == 0 {
		b = append(b, make([]byte, 8)...)
	}
	return b
}

func join(bs ...[]byte) []byte {
	var out []byte
	for _, b := range bs {
		out = append(out, b...)
	}
	return out
}

// pack makes a pack of the compact index: entries of stride bits, type above
// lo, then the address. It sets one bit after the other, unlike the reader.
func pack(stride, lobits int, address uint32, entries ...[2]uint32) []byte {
	out := make([]byte, len(entries)*stride/8)
	for i, e := range entries {
		v := e[0] | e[1]<<lobits
		for bit := range stride {
			if v>>bit&1 != 0 {
				out[(i*stride+bit)/8] |= 1 << ((i*stride + bit) % 8)
			}
		}
	}
	return append(out, le(address)...)
}

func nonhead(lo uint32) [2]uint32 { return [2]uint32{lo, ondisk.LclusterNonhead} }
func head(ofs uint32) [2]uint32   { return [2]uint32{ofs, ondisk.LclusterHead1} }

const (
	full    = ondisk.LayoutCompressedFull
	compact = ondisk.LayoutCompressedCompact
	cblk    = ondisk.DeltaCblkcnt
	k4      = 4096
)

func enc(la, llen, pa, plen int64, alg uint8) extent {
	return extent{la: la, llen: llen, kind: encoded, at: place{0, pa}, plen: plen, alg: alg}
}

func sto(la, llen, pa int64) extent {
	return extent{la: la, llen: llen, kind: stored, at: place{0, pa}}
}

// Extents of images made by hand; the answers were worked out with a pencil.
// body is what follows the inode, at byte 2112 of the image.
var extentTests = []struct {
	name   string
	layout int
	size   uint64
	super  ondisk.Super // features
	u      uint32
	nb     uint16
	body   []byte
	want   map[int64]extent // by byte of the file
}{
	{
		name: "plain", layout: ondisk.LayoutPlain, size: 10000, u: 3,
		want: map[int64]extent{0: sto(0, 10000, 3*k4), 9999: sto(0, 10000, 3*k4)},
	}, {
		name: "plain, 48 bits", layout: ondisk.LayoutPlain, size: 10000, u: 3, nb: 2,
		want: map[int64]extent{0: sto(0, 10000, 0x2_0000_0003*k4)},
	}, {
		name: "plain hole", layout: ondisk.LayoutPlain, size: 10000, u: 0xffffffff, nb: 0xffff,
		want: map[int64]extent{5000: {llen: 10000}},
	}, {
		name: "inline", layout: ondisk.LayoutInline, size: 2*k4 + 100, u: 7,
		want: map[int64]extent{8191: sto(0, 8192, 7*k4), 8192: sto(8192, 100, 2112), 8291: sto(8192, 100, 2112)},
	}, {
		name: "inline only", layout: ondisk.LayoutInline, size: 100, u: 7,
		want: map[int64]extent{0: sto(0, 100, 2112)},
	}, {
		name: "block map", layout: ondisk.LayoutChunk, size: 5*k4 + 1, u: 1, // chunks of two blocks
		body: le(uint32(9), uint32(0xffffffff), uint32(4)),
		want: map[int64]extent{0: sto(0, 8192, 9*k4), 8191: sto(0, 8192, 9*k4), 8192: {la: 8192, llen: 8192}, 20480: sto(16384, 4097, 4*k4)},
	}, {
		name: "chunk indexes", layout: ondisk.LayoutChunk, size: 3 * k4, u: ondisk.ChunkIndexes, // the high bits do not count
		body: le(uint16(0xffff), uint16(0), uint32(5), uint16(0), uint16(0), uint32(0xffffffff), uint16(0), uint16(0x8000), uint32(6)),
		want: map[int64]extent{0: sto(0, k4, 5*k4), k4: {la: k4, llen: k4}, 2 * k4: sto(2*k4, k4, 6*k4)},
	}, {
		name: "chunk indexes, 48 bits", layout: ondisk.LayoutChunk, size: 2 * k4, u: ondisk.ChunkIndexes | ondisk.Chunk48Bit,
		body: le(uint16(1), uint16(0), uint32(5), uint16(0xffff), uint16(0), uint32(0xffffffff)),
		want: map[int64]extent{0: sto(0, k4, 0x1_0000_0005*k4), k4: {la: k4, llen: k4}},
	}, {
		name: "full index", layout: full, size: 5*k4 + 10, super: ondisk.Super{ComprAlgs: 1},
		body: join(mapHeader(full, 0, 0, 0, 0), le(
			fHead1, uint16(0), uint32(20),
			fNonhead, uint16(0), uint16(1), uint16(1),
			fHead1, uint16(300), uint32(21), // the extent of lcluster 0 ends 300 bytes into 2
			fNonhead, uint16(0), uint16(1), uint16(1),
			fPlain, uint16(9), uint32(22),
			fHead1, uint16(5), uint32(23))),
		want: map[int64]extent{
			0: enc(0, 2*k4+300, 20*k4, k4, 0), 2*k4 + 299: enc(0, 2*k4+300, 20*k4, k4, 0),
			2*k4 + 300: enc(2*k4+300, 2*k4-291, 21*k4, k4, 0), 4 * k4: enc(2*k4+300, 2*k4-291, 21*k4, k4, 0),
			4*k4 + 9: sto(4*k4+9, k4-4, 22*k4), 5*k4 + 9: enc(5*k4+5, 5, 23*k4, k4, 0),
		},
	}, {
		name: "old builders wrote no distance to the next head", layout: full, size: 4 * k4, super: ondisk.Super{ComprAlgs: 1},
		body: join(mapHeader(full, 0, 0, 0, 0), le(
			fHead1, uint16(0), uint32(20),
			fNonhead, uint16(0), uint16(1), uint16(0),
			fNonhead, uint16(0), uint16(2), uint16(0),
			fHead1, uint16(0), uint32(21))),
		want: map[int64]extent{0: enc(0, 3*k4, 20*k4, k4, 0), 2*k4 + 1: enc(0, 3*k4, 20*k4, k4, 0)},
	}, {
		name: "big pclusters and two algorithms", layout: full, size: 8 * k4,
		super: ondisk.Super{FeatureIncompat: ondisk.IncompatComprCfgs, ComprAlgs: 1<<ondisk.AlgLz4 | 1<<ondisk.AlgDeflate},
		body: join(mapHeader(full, 0, ondisk.AdviseBigPcluster1|ondisk.AdviseBigPcluster2, ondisk.AlgDeflate<<4|ondisk.AlgLz4, 0), le(
			fHead1, uint16(0), uint32(20),
			fNonhead, uint16(0), uint16(cblk|2), uint16(2), // two blocks
			fNonhead, uint16(0), uint16(2), uint16(1),
			fHead2|ondisk.LclusterPartial, uint16(0), uint32(22),
			fHead2, uint16(0), uint32(23), // one block: no count follows
			fNonhead, uint16(0), uint16(cblk|3), uint16(3),
			fNonhead, uint16(0), uint16(2), uint16(2),
			fNonhead, uint16(0), uint16(3), uint16(1))),
		want: map[int64]extent{
			2 * k4: enc(0, 3*k4, 20*k4, 2*k4, ondisk.AlgLz4),
			3 * k4: {la: 3 * k4, llen: k4, kind: encoded, at: place{0, 22 * k4}, plen: k4, alg: ondisk.AlgDeflate, partial: true},
			7 * k4: enc(4*k4, 4*k4, 23*k4, 3*k4, ondisk.AlgDeflate),
		},
	}, {
		name: "holes by flag and by block count", layout: full, size: 6 * k4, super: ondisk.Super{FeatureIncompat: ondisk.IncompatBigPcluster, ComprAlgs: 1},
		body: join(mapHeader(full, 0, ondisk.AdviseBigPcluster1, 0, 0), le(
			fHead1|ondisk.LclusterHole, uint16(0), uint32(20),
			fNonhead, uint16(0), uint16(1), uint16(1),
			fHead1, uint16(0), uint32(20),
			fNonhead, uint16(0), uint16(cblk), uint16(1),
			fHead1, uint16(0), uint32(21),
			fNonhead, uint16(0), uint16(cblk|1), uint16(1))),
		want: map[int64]extent{1: {llen: 2 * k4}, 3 * k4: {la: 2 * k4, llen: 2 * k4}, 5 * k4: enc(4*k4, 2*k4, 21*k4, k4, 0)},
	}, {
		name: "interlaced", layout: full, size: 3*k4 - 700, super: ondisk.Super{ComprAlgs: 1},
		body: join(mapHeader(full, 0, ondisk.AdviseInterlaced, 0, 0), le(
			fHead1, uint16(0), uint32(20),
			fPlain, uint16(1000), uint32(21), // file bytes 5096 to 9192: 3096 at 1000 of the block, then 1000 at 0
			fHead1, uint16(1000), uint32(22))),
		want: map[int64]extent{k4 + 1000: sto(k4+1000, 3096, 21*k4+1000), 2 * k4: sto(2*k4, 1000, 21*k4), 2*k4 + 999: sto(2*k4, 1000, 21*k4)},
	}, {
		name: "inline tail", layout: full, size: 2*k4 + 50, super: ondisk.Super{FeatureIncompat: ondisk.IncompatZtailpacking, ComprAlgs: 1},
		body: join(mapHeader(full, 33<<16, ondisk.AdviseInline, 0, 0), le(
			fHead1, uint16(0), uint32(20),
			fNonhead, uint16(0), uint16(1), uint16(1),
			fHead1, uint16(7), uint32(0))), // index of 16+24 bytes: the tail is at 2152
		want: map[int64]extent{0: enc(0, 2*k4+7, 20*k4, k4, 0), 2*k4 + 7: enc(2*k4+7, 43, 2152, 33, 0)},
	}, {
		name: "fragment tail, 64 bit offset", layout: full, size: 2*k4 + 50,
		super: ondisk.Super{FeatureIncompat: ondisk.IncompatFragments, PackedNid: 99, ComprAlgs: 1},
		body: join(mapHeader(full, 0xf0000001, ondisk.AdviseFragment, 0, 0), le(
			fHead1, uint16(0), uint32(20),
			fHead1, uint16(96), uint32(3),
			fNonhead, uint16(0), uint16(1), uint16(1))),
		want: map[int64]extent{0: enc(0, k4+96, 20*k4, k4, 0), 2 * k4: {la: k4 + 96, llen: k4 - 46, kind: stored, at: place{inPacked, 0x3_f000_0001}}},
	}, {
		name: "whole file in the packed inode", layout: compact, size: 77,
		super: ondisk.Super{FeatureIncompat: ondisk.IncompatFragments, PackedNid: 99, ComprAlgs: 1},
		body:  le(uint64(1<<63 | 0x1234567)),
		want:  map[int64]extent{5: {llen: 77, kind: stored, at: place{inPacked, 0x1234567}}},
	}, {
		// The index begins at 2120: 6 entries of 4 bytes come before the packs of 2.
		name: "compact, 4 bytes", layout: compact, size: 5*k4 + 1, super: ondisk.Super{ComprAlgs: 1},
		body: join(mapHeader(compact, 0, 0, 0, 0),
			pack(16, 12, 19, head(0), nonhead(1)),  // address is one less than the first pcluster's
			pack(16, 12, 20, head(300), head(400)), // lclusters 2 and 3, at 21 and 22
			pack(16, 12, 22, nonhead(1), head(4000))),
		want: map[int64]extent{
			0: enc(0, 2*k4+300, 20*k4, k4, 0), k4: enc(0, 2*k4+300, 20*k4, k4, 0), 2*k4 + 300: enc(2*k4+300, k4+100, 21*k4, k4, 0),
			5 * k4: enc(3*k4+400, 2*k4+1-400, 22*k4, k4, 0), 4 * k4: enc(3*k4+400, 2*k4+1-400, 22*k4, k4, 0),
		},
	}, {
		name: "compact, 2 bytes", layout: compact, size: 23 * k4, super: ondisk.Super{ComprAlgs: 1},
		body: join(mapHeader(compact, 0, ondisk.AdviseCompacted2B, 0, 0),
			pack(16, 12, 9, head(0), head(1)), // 10, 11
			pack(16, 12, 11, head(2), head(3)),
			pack(16, 12, 13, head(4), head(5)), // 14, 15
			pack(14, 12, 15, // lclusters 6 to 21; heads at 6, 9, 10, 20
				head(6), nonhead(1), nonhead(2), head(9), head(10), nonhead(1), nonhead(2), nonhead(3), nonhead(4), nonhead(5),
				nonhead(6), nonhead(7), nonhead(8), nonhead(9), head(20), nonhead(1)), // the last says how far the next head is: 22
			pack(16, 12, 19, head(22), head(0))),
		want: map[int64]extent{
			5*k4 + 5: enc(5*k4+5, k4+1, 15*k4, k4, 0), 6*k4 + 6: enc(6*k4+6, 3*k4+3, 16*k4, k4, 0), 9*k4 + 9: enc(9*k4+9, k4+1, 17*k4, k4, 0),
			15 * k4: enc(10*k4+10, 10*k4+10, 18*k4, k4, 0), 21*k4 + 5: enc(20*k4+20, 2*k4+2, 19*k4, k4, 0), 22*k4 + 30: enc(22*k4+22, k4-22, 20*k4, k4, 0),
		},
	}, {
		name: "compact, big pclusters", layout: compact, size: 22 * k4, super: ondisk.Super{FeatureIncompat: ondisk.IncompatBigPcluster, ComprAlgs: 1},
		body: join(mapHeader(compact, 0, ondisk.AdviseCompacted2B|ondisk.AdviseBigPcluster1|ondisk.AdviseBigPcluster2, 0, 0),
			pack(16, 12, 10, head(0), nonhead(cblk|2)), // 10 and 11; the last entry holds a count here, and says nothing of what is ahead
			pack(16, 12, 12, head(0), head(0)),         // 12, 13
			pack(16, 12, 13, nonhead(cblk|2), head(0)), // the pcluster at 13 began in the pack before and is counted here: 15
			pack(14, 12, 15,
				nonhead(cblk|4), nonhead(2), nonhead(3), head(9), nonhead(cblk|2), head(10), nonhead(cblk|1), nonhead(2), nonhead(3), nonhead(4),
				nonhead(5), nonhead(6), nonhead(7), nonhead(8), head(0), nonhead(cblk|1))),
		want: map[int64]extent{
			0: enc(0, 2*k4, 10*k4, 2*k4, 0), 2 * k4: enc(2*k4, k4, 12*k4, k4, 0), 4 * k4: enc(3*k4, 2*k4, 13*k4, 2*k4, 0),
			// The last pack begins with the count of the pcluster of lcluster 5.
			8 * k4: enc(5*k4, 4*k4+9, 15*k4, 4*k4, 0), 10 * k4: enc(9*k4+9, 2*k4+1, 19*k4, 2*k4, 0),
			11*k4 + 10: enc(11*k4+10, 9*k4-10, 21*k4, k4, 0), 20 * k4: enc(20*k4, 2*k4, 22*k4, k4, 0),
		},
	}, {
		// Records of 4 bytes begin after the header at 2120: address, then lengths.
		name: "records of 4 bytes", layout: full, size: 3*k4 - 1, super: ondisk.Super{FeatureIncompat: ondisk.Incompat48Bit, ComprAlgs: 1},
		body: join(mapHeader(full, 0, ondisk.AdviseExtents, 0, 0), le(uint64(5000), uint32(1<<28|100), uint32(0), uint32(1<<28|1<<27|77))),
		want: map[int64]extent{
			0: enc(0, k4, 5000, 100, 0), k4: {la: k4, llen: k4},
			3*k4 - 2: {la: 2 * k4, llen: k4 - 1, kind: encoded, at: place{0, 5100}, plen: 77, partial: true},
		},
	}, {
		name: "records of 8 bytes", layout: full, size: 5 * k4, super: ondisk.Super{FeatureIncompat: ondisk.Incompat48Bit, ComprAlgs: 1},
		body: join(mapHeader(full, 0, ondisk.AdviseExtents|1<<1, 0, 1), le( // lclusters of two blocks
			uint32(1<<28|100), uint32(5000), uint32(k4*2), uint32(8191), uint32(1<<28|90), uint32(7000))),
		want: map[int64]extent{2*k4 - 1: enc(0, 2*k4, 5000, 100, 0), 2 * k4: sto(2*k4, 2*k4, 8191), 5*k4 - 1: enc(4*k4, k4, 7000, 90, 0)},
	}, {
		// 2120 is not a multiple of 16: the records begin at 2128.
		name: "records of 16 bytes", layout: full, size: 30000, super: ondisk.Super{FeatureIncompat: ondisk.Incompat48Bit, ComprAlgs: 1},
		body: join(mapHeader(full, 3, ondisk.AdviseExtents|2<<1, 0, 0), make([]byte, 8), le(
			uint32(1<<28|100), uint32(5000), uint32(1), uint32(0),
			uint32(0), uint32(0), uint32(0), uint32(12345),
			uint32(1<<28|99), uint32(6000), uint32(0), uint32(20000))),
		want: map[int64]extent{
			12344: enc(0, 12345, 1<<32+5000, 100, 0), 12345: {la: 12345, llen: 7655}, 19999: {la: 12345, llen: 7655}, 29999: enc(20000, 10000, 6000, 99, 0),
		},
	}, {
		name: "records of 32 bytes with a fragment", layout: full, size: 1<<33 + 100,
		super: ondisk.Super{FeatureIncompat: ondisk.Incompat48Bit | ondisk.IncompatFragments, PackedNid: 99, ComprAlgs: 1},
		body: join(mapHeader(full, 3, ondisk.AdviseExtents|3<<1|ondisk.AdviseFragment, 0, 0), make([]byte, 2144-2120), le(
			uint32(0), uint32(0), uint32(0), uint32(0), uint32(0), [12]byte{},
			uint32(1<<28|40), uint32(5000), uint32(0), uint32(0), uint32(2), [12]byte{},
			uint32(0x80000001), uint32(2), uint32(0), uint32(50), uint32(2), [12]byte{})),
		want: map[int64]extent{
			1: {llen: 1 << 33}, 1 << 33: enc(1<<33, 50, 5000, 40, 0),
			1<<33 + 99: {la: 1<<33 + 50, llen: 50, kind: stored, at: place{inPacked, 0x2_8000_0001}},
		},
	}, {
		// Interlaced over two blocks: what precedes the block boundary is at the end.
		name: "interlaced record", layout: full, size: 3 * k4, super: ondisk.Super{FeatureIncompat: ondisk.Incompat48Bit, ComprAlgs: 1},
		body: join(mapHeader(full, 2, ondisk.AdviseExtents|2<<1|ondisk.AdviseInterlaced, 0, 0), make([]byte, 8), le(
			uint32(1), uint32(9000), uint32(0), uint32(0), // not aligned, so not interlaced
			uint32(2*k4), uint32(5*k4), uint32(0), uint32(k4+96))),
		want: map[int64]extent{k4 + 96: sto(k4+96, 4000, 5*k4+2*k4-4000), 2 * k4: sto(2*k4, k4, 5*k4)},
	},
}

func TestExtentAt(t *testing.T) {
	for _, c := range extentTests {
		t.Run(c.name, func(t *testing.T) {
			f := newFake(c.layout, c.size)
			f.super.FeatureIncompat = c.super.FeatureIncompat | ondisk.IncompatLz4ZeroPadding
			f.super.ComprAlgs, f.super.PackedNid = c.super.ComprAlgs, c.super.PackedNid
			if c.super.FeatureIncompat&ondisk.IncompatComprCfgs != 0 {
				f.more[ondisk.SuperOffset+ondisk.SuperSize] = le(uint16(14), [14]byte{}, uint16(6), [6]byte{15})
			}
			f.inode.U, f.inode.Nb, f.body = c.u, c.nb, c.body
			im, ino := f.open(t, Options{})
			for off, want := range c.want {
				m := im.mapper(ino)
				got, err := m.extentAt(context.Background(), off)
				if err != nil {
					t.Errorf("byte %d: %v", off, err)
				} else if !reflect.DeepEqual(got, want) {
					t.Errorf("byte %d: %+v\nwant %+v", off, got, want)
				}
			}
		})
	}
}
