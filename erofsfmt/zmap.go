package erofsfmt

import (
	"context"
	"encoding/binary"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// A zindex is what the map header of a compressed file says. The header is read
// when the first byte of the file is mapped.
type zindex struct {
	ready  bool
	advise uint16
	bits   uint     // log2 of the logical cluster size
	alg    [2]uint8 // of HEAD1 and HEAD2
	start  place    // of the index, after the header

	records uint64 // encoded extents: how many, where they are counted

	// The tail of the file may lie elsewhere: after the index (inlineLen > 0) or
	// in the packed inode (fragment). tailHead is the lcluster where the extent
	// of the last byte begins.
	tailHead  int64
	inlineAt  place
	inlineLen int64
	fragment  bool
	fragOff   uint64

	sumRecord int64 // of 4 bytes: the address of this record is sumPa
	sumPa     uint64
}

func (z *zindex) is(bit uint16) bool { return z.advise&bit != 0 }

// indexed says that the file has an entry for each lcluster, not one for each
// extent.
func (m *mapper) indexed() bool {
	return m.ino.layout == ondisk.LayoutCompressedCompact || !m.z.is(ondisk.AdviseExtents)
}

// compressedAt maps a compressed file (fs/erofs/zmap.c z_erofs_map_blocks_iter).
func (m *mapper) compressedAt(ctx context.Context, off int64) (extent, error) {
	if !m.z.ready {
		if err := m.readHeader(ctx); err != nil {
			return extent{}, err
		}
	}
	if m.z.fragment && m.z.tailHead == 0 {
		return m.fragmentFrom(0)
	}
	if m.indexed() {
		return m.indexedAt(ctx, off)
	}
	return m.recordAt(ctx, off)
}

// readHeader follows fs/erofs/zmap.c z_erofs_fill_inode.
func (m *mapper) readHeader(ctx context.Context) error {
	at := m.im.bodyAt(m.ino, 8)
	b, err := m.meta.bytes(ctx, at, ondisk.MapHeaderSize)
	if err != nil {
		return err
	}
	h := ondisk.DecodeMapHeader(b)
	z := &m.z
	z.tailHead = -1
	z.start = at.plus(ondisk.MapHeaderSize)
	if h.ClusterBits&ondisk.ClusterBitsFragment != 0 {
		z.fragment, z.tailHead = true, 0
		z.fragOff = binary.LittleEndian.Uint64(b) ^ 1<<63
		z.ready = true
		return nil
	}
	z.advise = h.Advise
	z.bits = uint(m.im.sb.BlockBits) + uint(h.ClusterBits&ondisk.ClusterBitsMask)
	if !m.indexed() {
		z.records = uint64(h.Lo) | uint64(h.AlgorithmType)<<32 | uint64(h.ClusterBits)<<40
		z.ready = true
		return nil
	}
	z.alg = [2]uint8{h.AlgorithmType & 15, h.AlgorithmType >> 4}
	big1, big2 := z.is(ondisk.AdviseBigPcluster1), z.is(ondisk.AdviseBigPcluster2)
	if (big1 || big2) && !m.im.sb.incompat(ondisk.IncompatBigPcluster) {
		return at.corrupt("big pclusters, which the image does not announce")
	}
	if m.ino.layout == ondisk.LayoutCompressedCompact && big1 != big2 {
		return at.corrupt("a compact index with big pclusters for one head only")
	}
	switch {
	case z.is(ondisk.AdviseFragment):
		z.fragment, z.fragOff = true, uint64(h.Lo)
	case z.is(ondisk.AdviseInline):
		z.inlineLen = int64(h.Lo >> 16)
	}
	if z.fragment || z.inlineLen != 0 {
		if err := m.findTail(ctx); err != nil {
			return err
		}
	}
	z.ready = true
	return nil
}

// findTail finds the extent of the last byte.
func (m *mapper) findTail(ctx context.Context) error {
	h, err := m.findHead(ctx, m.ino.Size-1)
	if err != nil {
		return err
	}
	m.z.tailHead = h.lcn
	m.z.inlineAt = h.indexEnd
	if m.z.fragment && m.ino.layout == ondisk.LayoutCompressedFull {
		m.z.fragOff |= h.pblk << 32
	}
	return nil
}

// fragmentFrom is the extent of the packed inode that holds the rest of the file.
func (m *mapper) fragmentFrom(la int64) (extent, error) {
	if m.ino.Nid == m.im.sb.PackedNid {
		return extent{}, nowhere.corrupt("the packed inode is a fragment of itself")
	}
	e := extent{la: la, llen: m.ino.Size - la, kind: stored, at: place{inPacked, farAway}}
	if m.z.fragOff < uint64(farAway) {
		e.at.off = int64(m.z.fragOff)
	}
	return e, nil
}

// An lcluster is one entry of an index.
type lcluster struct {
	lcn      int64
	typ      uint8
	partial  bool
	hole     bool
	ofs      int64  // of a head: where in the lcluster the extent begins
	pblk     uint64 // of a head
	back     int64  // of a NONHEAD: lclusters to its head, or to a NONHEAD on the way
	ahead    int64  // of a NONHEAD: lclusters to the next head, or to a NONHEAD on the way
	hasBlks  bool   // of the NONHEAD after a head of a big pcluster:
	blks     uint32 // how many blocks the pcluster has
	indexEnd place  // where the entry, or the pack it is in, ends
}

func (l *lcluster) head() bool { return l.typ != ondisk.LclusterNonhead }

func (m *mapper) lcluster(ctx context.Context, lcn int64) (lcluster, error) {
	if m.ino.layout == ondisk.LayoutCompressedFull {
		return m.fullEntry(ctx, lcn)
	}
	return m.compactEntry(ctx, lcn)
}

// fullEntry reads an entry of the full index, 8 bytes an lcluster
// (fs/erofs/zmap.c z_erofs_load_full_lcluster).
func (m *mapper) fullEntry(ctx context.Context, lcn int64) (lcluster, error) {
	at := m.z.start.plus(8 + lcn*ondisk.LclusterIndexSize)
	b, err := m.meta.bytes(ctx, at, ondisk.LclusterIndexSize)
	if err != nil {
		return lcluster{}, err
	}
	d := ondisk.DecodeLclusterIndex(b)
	l := lcluster{lcn: lcn, typ: uint8(d.Advise & ondisk.LclusterTypeMask), indexEnd: at.plus(ondisk.LclusterIndexSize)}
	if l.head() {
		l.partial = d.Advise&ondisk.LclusterPartial != 0
		l.hole = d.Advise&ondisk.LclusterHole != 0
		l.ofs, l.pblk = int64(d.ClusterOfs), uint64(d.U)
		if l.ofs >= 1<<m.z.bits {
			return l, at.corrupt("extent at %d of an lcluster of %d bytes", l.ofs, 1<<m.z.bits)
		}
		return l, nil
	}
	l.back, l.ahead = int64(d.U&0xffff), int64(d.U>>16)
	if l.back&ondisk.DeltaCblkcnt != 0 {
		if !m.z.is(ondisk.AdviseBigPcluster1 | ondisk.AdviseBigPcluster2) {
			return l, at.corrupt("a pcluster's block count in a file without big pclusters")
		}
		l.hasBlks, l.blks, l.back = true, uint32(l.back&^ondisk.DeltaCblkcnt), 1
	}
	return l, nil
}

// findHead finds the entry of the head of the extent that holds byte off
// (fs/erofs/zmap.c z_erofs_extent_lookback). Its indexEnd is that of the
// lcluster of off.
func (m *mapper) findHead(ctx context.Context, off int64) (lcluster, error) {
	l, err := m.lcluster(ctx, off>>m.z.bits)
	if err != nil {
		return l, err
	}
	indexEnd := l.indexEnd
	back := l.back
	if l.head() && off&(1<<m.z.bits-1) >= l.ofs {
		back = 0
	} else if l.head() {
		back = 1 // the extent before this head reaches into its lcluster
	} else if back == 0 {
		return l, l.indexEnd.corrupt("lcluster %d is 0 lclusters from its head", l.lcn)
	}
	for back != 0 {
		if back > l.lcn {
			return l, l.indexEnd.corrupt("lcluster %d is %d lclusters from its head", l.lcn, back)
		}
		if l, err = m.lcluster(ctx, l.lcn-back); err != nil {
			return l, err
		}
		if back = l.back; !l.head() && back == 0 {
			return l, l.indexEnd.corrupt("lcluster %d is 0 lclusters from its head", l.lcn)
		}
	}
	l.indexEnd = indexEnd
	return l, nil
}

// indexedAt maps a file with a full or compact index (fs/erofs/zmap.c
// z_erofs_map_blocks_fo).
func (m *mapper) indexedAt(ctx context.Context, off int64) (extent, error) {
	h, err := m.findHead(ctx, off)
	if err != nil {
		return extent{}, err
	}
	e := extent{la: h.lcn<<m.z.bits + h.ofs, kind: encoded, partial: h.partial}
	if m.z.fragment && h.lcn == m.z.tailHead {
		return m.fragmentFrom(e.la)
	}
	if err := m.extentEnd(ctx, &e, &h, off); err != nil {
		return e, err
	}
	if m.z.inlineLen != 0 && h.lcn == m.z.tailHead {
		e.at, e.plen = m.z.inlineAt, m.z.inlineLen
		if bs := m.im.sb.BlockSize(); e.at.off&(bs-1)+e.plen > bs {
			return e, e.at.corrupt("inline pcluster of %d bytes crosses its block", e.plen)
		}
	} else if err := m.pcluster(ctx, &e, &h); err != nil || e.kind == hole {
		return e, err
	}
	if h.typ == ondisk.LclusterPlain {
		return m.plain(e, off, m.z.is(ondisk.AdviseInterlaced))
	}
	e.alg = m.z.alg[0]
	if h.typ == ondisk.LclusterHead2 {
		e.alg = m.z.alg[1]
	}
	return e, m.checkEncoded(&e)
}

// extentEnd finds where the extent of head h, which holds byte off, ends: at the
// next head or with the file (fs/erofs/zmap.c
// z_erofs_get_extent_decompressedlen).
func (m *mapper) extentEnd(ctx context.Context, e *extent, h *lcluster, off int64) error {
	lcn := max(h.lcn+1, off>>m.z.bits)
	for lcn<<m.z.bits < m.ino.Size {
		l, err := m.lcluster(ctx, lcn)
		if err != nil {
			return err
		}
		if l.head() {
			e.llen = min(lcn<<m.z.bits+l.ofs, m.ino.Size) - e.la
			return nil
		}
		if h.hole && lcn<<m.z.bits > off+ondisk.MaxPclusterPlain {
			e.llen = lcn<<m.z.bits - e.la // enough for now
			return nil
		}
		lcn += max(l.ahead, 1) // old builders wrote 0 for 1
	}
	e.llen = m.ino.Size - e.la
	return nil
}

// pcluster finds where the pcluster of head h is and how many bytes it has
// (fs/erofs/zmap.c z_erofs_get_extent_compressedlen).
func (m *mapper) pcluster(ctx context.Context, e *extent, h *lcluster) error {
	blks := uint32(1)
	big := m.z.is(ondisk.AdviseBigPcluster2)
	if h.typ == ondisk.LclusterHead1 {
		big = m.z.is(ondisk.AdviseBigPcluster1)
	}
	if big && !h.hole && (h.lcn+1)<<m.z.bits < m.ino.Size {
		next, err := m.lcluster(ctx, h.lcn+1)
		if err != nil {
			return err
		}
		// A bare distance of 1 is refused by all kernels but 6.17 and 6.18, which
		// take it for one block.
		if !next.head() && !next.hasBlks {
			return next.indexEnd.corrupt("lcluster %d follows a head and has no block count, but distance %d", next.lcn, next.back)
		}
		if next.hasBlks {
			blks = next.blks
		}
	}
	if h.hole || blks == 0 {
		e.kind = hole
		return nil
	}
	e.plen = int64(blks) << m.im.sb.BlockBits
	var err error
	e.at, err = m.im.deviceAt(0, m.im.blockOff(h.pblk))
	return err
}

// recordAt maps a file with a record for each extent (fs/erofs/zmap.c
// z_erofs_map_blocks_ext).
func (m *mapper) recordAt(ctx context.Context, off int64) (extent, error) {
	size := int64(4) << (m.z.advise >> ondisk.AdviseRecordBit & ondisk.AdviseRecordMask)
	at := m.z.start
	at.off = (at.off + size - 1) &^ (size - 1)
	var r record
	var err error
	if size <= 8 {
		r, err = m.countRecords(ctx, at, size, off)
	} else {
		r, err = m.searchRecords(ctx, at, size, off)
	}
	if err != nil {
		return extent{}, err
	}
	e := extent{la: r.la, llen: r.end - r.la, kind: encoded, plen: int64(r.plen & ondisk.ExtentPlenMask)}
	if r.last && m.z.is(ondisk.AdviseFragment) {
		m.z.fragOff = uint64(r.plen)
		if size > 4 {
			m.z.fragOff |= r.pa << 32
		}
		return m.fragmentFrom(e.la)
	}
	if e.plen == 0 {
		e.kind = hole
		return e, nil
	}
	pa := farAway
	if r.pa < uint64(farAway) {
		pa = int64(r.pa)
	}
	if e.at, err = m.im.deviceAt(0, pa); err != nil {
		return e, err
	}
	e.partial = r.plen&ondisk.ExtentPartial != 0
	if format := r.plen >> ondisk.ExtentFmtShift; format != 0 {
		e.alg = uint8(format - 1)
		return e, m.checkEncoded(&e)
	}
	aligned := (pa|e.plen)&(m.im.sb.BlockSize()-1) == 0
	return m.plain(e, off, aligned && m.z.is(ondisk.AdviseInterlaced))
}

// A record is one encoded extent as it is on disk.
type record struct {
	la, end int64
	plen    uint32 // with its flags
	pa      uint64
	last    bool
}

// countRecords finds a record of 4 or 8 bytes. Each stands for one lcluster;
// those of 4 bytes hold only lengths, after the address of the first, so their
// addresses are a sum.
func (m *mapper) countRecords(ctx context.Context, at place, size, off int64) (record, error) {
	want := off >> m.z.bits
	r := record{la: want << m.z.bits}
	r.end = min(r.la+1<<m.z.bits, m.ino.Size)
	r.last = r.end == m.ino.Size
	if size == 8 {
		b, err := m.meta.bytes(ctx, at.plus(want*size), 8)
		if err != nil {
			return r, err
		}
		r.plen, r.pa = binary.LittleEndian.Uint32(b), uint64(binary.LittleEndian.Uint32(b[4:]))
		return r, nil
	}
	if m.z.sumRecord == 0 || m.z.sumRecord > want {
		b, err := m.meta.bytes(ctx, at, 8)
		if err != nil {
			return r, err
		}
		m.z.sumRecord, m.z.sumPa = 0, binary.LittleEndian.Uint64(b)
	}
	at = at.plus(8)
	for {
		b, err := m.meta.bytes(ctx, at.plus(m.z.sumRecord*size), 4)
		if err != nil {
			return r, err
		}
		r.plen, r.pa = binary.LittleEndian.Uint32(b), m.z.sumPa
		if m.z.sumRecord == want {
			return r, nil
		}
		m.z.sumRecord++
		m.z.sumPa += uint64(r.plen & ondisk.ExtentPlenMask)
	}
}

// searchRecords finds a record of 16 or 32 bytes, which say where they begin.
func (m *mapper) searchRecords(ctx context.Context, at place, size, off int64) (record, error) {
	r := record{la: -1, end: m.ino.Size}
	lo, hi := uint64(0), m.z.records
	for lo < hi {
		mid := lo + (hi-lo)/2
		b, err := m.meta.bytes(ctx, at.plus(int64(mid)*size), int(min(size, 20)))
		if err != nil {
			return r, err
		}
		la := uint64(binary.LittleEndian.Uint32(b[12:]))
		if size == 32 {
			la |= uint64(binary.LittleEndian.Uint32(b[16:])) << 32
		}
		if la > uint64(off) {
			if la > uint64(r.end) {
				return r, at.corrupt("extent records out of order at %d", la)
			}
			hi, r.end = mid, int64(la)
			continue
		}
		lo = mid + 1
		r.la = int64(la)
		r.plen, r.pa = binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint64(b[4:])
	}
	if r.la < 0 {
		r.la = 0 // what precedes the first record is a hole
		return r, nil
	}
	r.last = lo == m.z.records
	return r, nil
}

// plain turns a pcluster that is not compressed into a stored extent. Interlaced
// data keep their place within a block: what stands before the first block
// boundary of the file is at the end of the pcluster, the rest at its beginning
// (fs/erofs/decompressor.c z_erofs_transform_plain).
func (m *mapper) plain(e extent, off int64, interlaced bool) (extent, error) {
	if e.llen > e.plen {
		return e, e.at.corrupt("%d bytes of plain data for an extent of %d", e.plen, e.llen)
	}
	if err := checkSize(&e); err != nil {
		return e, err
	}
	room := e.plen
	e.kind, e.plen = stored, 0
	if !interlaced {
		return e, nil
	}
	bs := m.im.sb.BlockSize()
	first := bs - e.la&(bs-1)
	if off >= e.la+first {
		e.la, e.llen = e.la+first, e.llen-first
		return e, nil
	}
	if first > room {
		return e, e.at.corrupt("%d bytes of interlaced data, too few for the end of a block", room)
	}
	e.at = e.at.plus(room - first)
	e.llen = min(first, e.llen)
	return e, nil
}

// checkEncoded follows fs/erofs/zmap.c z_erofs_map_sanity_check.
func (m *mapper) checkEncoded(e *extent) error {
	if e.alg >= ondisk.AlgCount {
		return e.at.unsupported("compression algorithm %d", e.alg)
	}
	if m.im.sb.ComprAlgs&(1<<e.alg) == 0 {
		return e.at.corrupt("compressed with %s, which the image does not announce", algNames[e.alg])
	}
	if !e.partial && e.llen < e.plen && e.end() < m.ino.Size {
		return e.at.corrupt("%d bytes compressed to %d", e.llen, e.plen)
	}
	return checkSize(e)
}

// checkSize bounds what is allocated for an extent.
func checkSize(e *extent) error {
	if e.plen > ondisk.MaxPcluster || e.llen > ondisk.MaxPclusterPlain {
		return e.at.unsupported("a pcluster of %d bytes for %d", e.plen, e.llen)
	}
	return nil
}
