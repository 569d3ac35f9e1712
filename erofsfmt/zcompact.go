package erofsfmt

import (
	"context"
	"encoding/binary"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// The compact index packs the entries of several lclusters and one block
// address:
//
//	4 bytes an lcluster:  2 entries of 16 bits, u32 address           (8 bytes)
//	2 bytes an lcluster: 16 entries of 14 bits, u32 address          (32 bytes)
//
// An entry has its type in the two bits above lo, which has as many bits as an
// lcluster, but at least 12. lo of a head is where in the lcluster the extent
// begins; of a NONHEAD it is the distance to the head, or a pcluster's
// block count, or, in the last entry of a pack, the distance to the next head.
//
// Packs of 2 bytes an lcluster are aligned to 32 bytes: 4 byte packs come before
// the first such boundary and, for what is less than a pack, at the end.
//
//	| 4B | 4B | 2B ............ | 2B ............ | 4B | 4B |
//	          ^ multiple of 32
type zpack struct {
	data   [ondisk.CompactPackAlign]byte
	count  int  // of entries
	stride uint // bits of an entry
	lobits uint
}

// entry returns lo and the type of entry i.
func (p *zpack) entry(i int) (lo uint32, typ uint8) {
	bit := uint(i) * p.stride
	v := binary.LittleEndian.Uint32(p.data[bit/8:]) >> (bit % 8)
	return v & (1<<p.lobits - 1), uint8(v >> p.lobits & ondisk.LclusterTypeMask)
}

// compactPack reads the pack that holds lcluster lcn and says which of its
// entries that is and where the pack ends.
func (m *mapper) compactPack(ctx context.Context, lcn int64) (p zpack, i int, end place, err error) {
	total := (m.ino.Size + 1<<m.z.bits - 1) >> m.z.bits
	if lcn >= total {
		return p, 0, end, m.z.start.corrupt("lcluster %d of %d", lcn, total)
	}
	lead := (ondisk.CompactPackAlign - m.z.start.off%ondisk.CompactPackAlign) / 4 & 7
	short := int64(0) // lclusters in 2 byte packs, which are counted as if an lcluster were a block
	if blocks := (m.ino.Size + m.im.sb.BlockSize() - 1) >> m.im.sb.BlockBits; m.z.is(ondisk.AdviseCompacted2B) && lead < blocks {
		short = (blocks - lead) &^ (ondisk.CompactPackCount2 - 1)
	}
	at := m.z.start
	width := int64(4)
	switch {
	case lcn < lead:
		at = at.plus(lcn * 4)
	case lcn < lead+short:
		width = 2
		at = at.plus(lead*4 + (lcn-lead)*2)
	default:
		at = at.plus(lead*4 + short*2 + (lcn-lead-short)*4)
	}
	p.lobits = max(m.z.bits, ondisk.CompactMinLobits)
	p.count = 2
	limit := uint(ondisk.CompactMaxBits4B)
	if width == 2 {
		p.count, limit = ondisk.CompactPackCount2, ondisk.CompactMaxBits2B
	}
	if m.z.bits > limit {
		return p, 0, end, at.unsupported("a compact index for lclusters of %d bytes", 1<<m.z.bits)
	}
	size := int64(p.count) * width
	p.stride = uint(size-4) * 8 / uint(p.count)
	i = int(at.off % size / width)
	at.off -= at.off % size
	b, err := m.meta.bytes(ctx, at, int(size))
	copy(p.data[:], b)
	return p, i, at.plus(size), err
}

// compactEntry reads an entry of the compact index (fs/erofs/zmap.c
// z_erofs_load_compact_lcluster).
func (m *mapper) compactEntry(ctx context.Context, lcn int64) (lcluster, error) {
	p, i, end, err := m.compactPack(ctx, lcn)
	if err != nil {
		return lcluster{}, err
	}
	big := m.z.is(ondisk.AdviseBigPcluster1)
	lo, typ := p.entry(i)
	l := lcluster{lcn: lcn, typ: typ, indexEnd: end}
	if l.head() {
		l.ofs = int64(lo)
		if l.ofs >= 1<<m.z.bits {
			return l, end.corrupt("extent at %d of an lcluster of %d bytes", l.ofs, 1<<m.z.bits)
		}
		before, ok := p.blocksBefore(i, big)
		if !ok {
			return l, end.corrupt("lcluster %d: no block counts in a pack of big pclusters", lcn)
		}
		address := binary.LittleEndian.Uint32(p.data[p.count*int(p.stride)/8:])
		l.pblk = uint64(address + before)
		return l, nil
	}
	l.ahead = p.toNextHead(i)
	switch {
	case lo&ondisk.DeltaCblkcnt != 0:
		if !big {
			return l, end.corrupt("a pcluster's block count in a file without big pclusters")
		}
		l.hasBlks, l.blks, l.back = true, lo&^ondisk.DeltaCblkcnt, 1
	case i+1 < p.count:
		l.back = int64(lo)
	default:
		l.back = p.lastToHead()
	}
	return l, nil
}

// lastToHead is the distance to its head of the last entry, whose own lo is
// the distance to the next head: one more than that of the entry before it.
func (p *zpack) lastToHead() int64 {
	lo, typ := p.entry(p.count - 2)
	switch {
	case typ != ondisk.LclusterNonhead:
		return 1
	case lo&ondisk.DeltaCblkcnt != 0:
		return 2
	}
	return int64(lo) + 1
}

// toNextHead is the distance from NONHEAD i to the next head: within the pack by
// looking, beyond it by what the last entry says.
func (p *zpack) toNextHead(i int) int64 {
	for d := 0; ; d++ {
		lo, typ := p.entry(i + d)
		if typ != ondisk.LclusterNonhead {
			return int64(d)
		}
		if i+d+1 == p.count {
			if lo&ondisk.DeltaCblkcnt != 0 {
				return int64(d) + 1
			}
			return int64(d) + int64(lo)
		}
	}
}

// blocksBefore counts the blocks from the pack's address to the pcluster of head
// i. The address is one less than that of the first pcluster of the pack where
// each has one block; with big pclusters it is that of the first, and a
// pcluster that begins in an earlier pack is counted if its block count is
// stored in this one. ok is false for an index that counts nothing.
func (p *zpack) blocksBefore(i int, big bool) (n uint32, ok bool) {
	if !big {
		n = 1
		for i--; i >= 0; i-- {
			lo, typ := p.entry(i)
			if typ == ondisk.LclusterNonhead {
				i -= int(lo)
			}
			if i >= 0 {
				n++
			}
		}
		return n, true
	}
	for i--; i >= 0; i-- {
		lo, typ := p.entry(i)
		switch {
		case typ != ondisk.LclusterNonhead:
			n++
		case lo&ondisk.DeltaCblkcnt != 0:
			n += lo &^ ondisk.DeltaCblkcnt
			i-- // its head
		case lo <= 1:
			return 0, false
		default:
			i -= int(lo) - 2 // to the entry with the block count
		}
	}
	return n, true
}
