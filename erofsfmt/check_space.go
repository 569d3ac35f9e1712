package erofsfmt

import (
	"context"
	"maps"
	"slices"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// A bitmap holds numbers. Only where there are some it takes memory: a bit for
// each number in reach.
type bitmap map[uint64]*[512]uint64

// add says whether i was not there before.
func (b *bitmap) add(i uint64) bool {
	if *b == nil {
		*b = bitmap{}
	}
	page := (*b)[i>>15]
	if page == nil {
		page = new([512]uint64)
		(*b)[i>>15] = page
	}
	word, bit := &page[i>>6&511], uint64(1)<<(i&63)
	fresh := *word&bit == 0
	*word |= bit
	return fresh
}

// A linkMap holds a number for each inode of the image and of the metabox, 0 where
// none was set.
type linkMap [2]map[uint64]*[512]uint32

func (m *linkMap) at(nid Nid) *uint32 {
	half := &m[uint64(nid)>>63]
	if *half == nil {
		*half = map[uint64]*[512]uint32{}
	}
	slot := uint64(nid) &^ ondisk.MetaboxBit
	page := (*half)[slot>>9]
	if page == nil {
		page = new([512]uint32)
		(*half)[slot>>9] = page
	}
	return &page[slot&511]
}

// all calls fn with the inodes whose number is not 0, in order.
func (m *linkMap) all(fn func(nid Nid, n uint32)) {
	for i, half := range m {
		for _, key := range slices.Sorted(maps.Keys(half)) {
			for j, n := range half[key] {
				if n != 0 {
					fn(Nid(uint64(i)<<63|key<<9|uint64(j)), n)
				}
			}
		}
	}
}

// A metaMap holds slots of 32 bytes of the metadata: of the image, and of the
// metabox.
type metaMap [2]bitmap

// add adds the slots from at to end and says whether all are new.
func (m *metaMap) add(at place, end int64) bool {
	b := &m[0]
	if at.src == inMetabox {
		b = &m[1]
	}
	fresh := true
	for i := at.off / ondisk.InodeSlot; i*ondisk.InodeSlot < end; i++ {
		fresh = b.add(uint64(i)) && fresh
	}
	return fresh
}

// A use is what a block is for.
type use uint8

const (
	useNone use = iota
	useMeta
	useFlat
	useChunk
	usePcluster
	usePlain
	useRecord

	useMask  = 0x3f
	useFirst = 0x40 // the first block of an extent
	useLast  = 0x80
)

func (u use) String() string {
	return [...]string{"nothing", "metadata", "a plain file", "chunks", "a pcluster", "an uncompressed pcluster",
		"pclusters of any length"}[u&useMask]
}

// whole says that extents of this use may be the same but not overlap. Chunks
// have different sizes, and of the others the edges are not known.
func (u use) whole() bool { return u == useFlat || u == usePcluster }

// A blockMap holds the use of the blocks of one source.
type blockMap map[int64]*[4096]use

func (m *blockMap) at(blk int64) *use {
	if *m == nil {
		*m = blockMap{}
	}
	page := (*m)[blk>>12]
	if page == nil {
		page = new([4096]use)
		(*m)[blk>>12] = page
	}
	return &page[blk&4095]
}

// mark notes that blocks first to last are in use. known says that they were, for
// the same; clash is the first block that is in use for something else, or -1.
func (m *blockMap) mark(ctx context.Context, first, last int64, u use) (known bool, clash int64) {
	if u.whole() && *m.at(first)&^useLast == u|useFirst && *m.at(last)&^useFirst == u|useLast {
		return true, -1
	}
	known = true
	for blk := first; blk <= last && ctx.Err() == nil; blk++ {
		now := u
		if u.whole() && blk == first {
			now |= useFirst
		}
		if u.whole() && blk == last {
			now |= useLast
		}
		was := m.at(blk)
		switch *was {
		case useNone:
			*was, known = now, false
		case now:
		default:
			return false, blk
		}
	}
	return known, -1
}

// metadataEnd is where what belongs to an inode ends: its xattrs, and its inline
// data, chunk table or index.
func (m *mapper) metadataEnd(ctx context.Context) (place, error) {
	ino := m.ino
	end := m.im.bodyAt(ino, 1)
	if !ino.hasData() || ino.Size == 0 {
		return end, nil
	}
	switch ino.layout {
	case ondisk.LayoutPlain:
		return end, nil
	case ondisk.LayoutInline:
		bs := m.im.sb.BlockSize()
		return end.plus(ino.Size - (ino.Size-1)/bs*bs), nil
	case ondisk.LayoutChunk:
		entry := int64(ondisk.BlockMapEntrySize)
		if ino.chunkFmt&ondisk.ChunkIndexes != 0 {
			entry = ondisk.ChunkIndexSize
		}
		return m.im.bodyAt(ino, entry).plus(entry * ((ino.Size-1)/m.unit() + 1)), nil
	}
	return m.indexEnd(ctx)
}

func (m *mapper) indexEnd(ctx context.Context) (end place, err error) {
	if err := m.readHeader(ctx); err != nil {
		return end, err
	}
	last := (m.ino.Size - 1) >> m.z.bits
	switch {
	case m.z.bits == 0: // the whole file is a fragment, and the header says where
		return m.z.start, nil
	case m.z.inlineLen != 0:
		return m.z.inlineAt.plus(m.z.inlineLen), nil
	case m.ino.layout == ondisk.LayoutCompressedCompact:
		_, _, end, err = m.compactPack(ctx, last)
		return end, err
	case m.indexed():
		return m.z.start.plus(8 + (last+1)*ondisk.LclusterIndexSize), nil
	}
	size := int64(4) << (m.z.advise >> ondisk.AdviseRecordBit & ondisk.AdviseRecordMask)
	end = m.z.start
	end.off = (end.off + size - 1) &^ (size - 1)
	switch size {
	case 4:
		return end.plus(8 + (last+1)*size), nil
	case 8:
		return end.plus((last + 1) * size), nil
	}
	return end.plus(int64(min(m.z.records, uint64(farAway)/64)) * size), nil
}

// unit is how many bytes of the file at a time are mapped without the help of
// others; 0 if all depend on each other.
func (m *mapper) unit() int64 {
	switch {
	case m.ino.layout == ondisk.LayoutChunk:
		return 1 << (m.im.sb.BlockBits + uint8(m.ino.chunkFmt&ondisk.ChunkBlkBitsMask))
	case m.z.ready && m.z.bits != 0 && m.indexed():
		return 1 << m.z.bits
	}
	return 0
}

// hasData says whether the inode's type has data at all.
func (ino *Inode) hasData() bool {
	switch ino.Mode & modeType {
	case modeReg, modeDir, modeLnk:
		return true
	}
	return false
}

// sizeOf is how many bytes a place can be in.
func (im *Image) sizeOf(ctx context.Context, src int) (int64, error) {
	if src != inPacked {
		return im.metaSize(ctx, src)
	}
	packed, err := im.packedInode(ctx)
	if err != nil {
		return 0, err
	}
	return packed.Size, nil
}
