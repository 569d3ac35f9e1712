package mkerofs

import (
	"errors"
	"fmt"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// Algorithm says how the data of an image is compressed.
type Algorithm string

const (
	Uncompressed Algorithm = ""
	LZ4          Algorithm = "lz4"
	LZ4HC        Algorithm = "lz4hc" // makes the same format as LZ4: slower to build, smaller, as fast to read
	Zstd         Algorithm = "zstd"
	Deflate      Algorithm = "deflate"
)

// Compression says how regular files are compressed. Its zero value stores them as they are. Data that does not become
// smaller stays plain, file by file.
type Compression struct {
	Algorithm Algorithm
	// Level is 1 to 22 for zstd (default 3), 1 to 9 for DEFLATE (default 3), 3 to 12 for LZ4HC (default 9); LZ4 has
	// none. 0 is the default. An image is about as small as one that mkfs.erofs makes at the same level; of zstd there
	// are only three different ones, from 1, 3 and 8 on.
	Level int
	// ClusterSize is the most bytes that a piece of a file is compressed to, a multiple of the block size up to 1 MiB;
	// a block if zero. Larger ones make smaller images, and more to read and decode for a byte of a file. More than
	// a block takes Linux 5.13.
	ClusterSize int
	// TailPacking puts the end of a file behind its inode where it is small enough when compressed: Linux 5.17.
	TailPacking bool
	// Fragments puts the ends of files, and whole small ones, together into one file, which is compressed: Linux 6.1.
	// It makes images of many small files much smaller. To read one of them is to decode what it lies among.
	Fragments bool
	// Dedupe stores files of up to 4 MiB that have the same content once: Linux 6.1.
	Dedupe bool
	// FullIndex takes 8 bytes a block in place of 2 or 4 to say where data is. Blocks that are not of 4096 to 16384
	// bytes need it and have it.
	FullIndex bool
}

const algLZMA Algorithm = "lzma"

// check completes z, or says what is wrong with it.
func (z *Compression) check(blockSize int) error {
	levels := map[Algorithm]struct{ low, high, normal int }{
		LZ4: {0, 0, 0}, LZ4HC: {3, 12, 9}, Zstd: {1, 22, 3}, Deflate: {1, 9, 3},
	}
	switch l, ok := levels[z.Algorithm]; {
	case z.Algorithm == Uncompressed:
		if *z != (Compression{}) {
			return errors.New("compression without an algorithm: take lz4, lz4hc, zstd or deflate")
		}
		return nil
	case z.Algorithm == algLZMA:
		return errors.New("compression lzma is read but not written: take zstd, which is as small at level 19, or mkfs.erofs")
	case !ok:
		return fmt.Errorf("compression %q: take lz4, lz4hc, zstd or deflate", z.Algorithm)
	case z.Level == 0:
		z.Level = l.normal
	case z.Level < l.low || z.Level > l.high:
		return fmt.Errorf("compression level %d of %s: must be from %d to %d", z.Level, z.Algorithm, l.low, l.high)
	}
	if z.ClusterSize == 0 {
		z.ClusterSize = blockSize
	}
	if z.ClusterSize < 0 || z.ClusterSize%blockSize != 0 || z.ClusterSize > ondisk.MaxPcluster {
		return fmt.Errorf("clusters of %d bytes: must be a multiple of the block size, %d, up to %d", z.ClusterSize, blockSize, ondisk.MaxPcluster)
	}
	// The compact index has 12 to 14 bits for a place in a block.
	if blockSize < 1<<ondisk.CompactMinLobits || blockSize > 1<<ondisk.CompactMaxBits4B {
		z.FullIndex = true
	}
	return nil
}

func (z *Compression) number() uint8 {
	switch z.Algorithm {
	case Zstd:
		return ondisk.AlgZstd
	case Deflate:
		return ondisk.AlgDeflate
	default:
		return ondisk.AlgLz4
	}
}

// describe puts into the superblock what a reader must know, and gives what follows it
// (fs/erofs/decompressor.c z_erofs_parse_cfgs). Images of LZ4 with small clusters do without, for Linux before 5.13.
func (z *Compression) describe(super *ondisk.Super, blockSize int) []byte {
	super.FeatureIncompat |= ondisk.IncompatLz4ZeroPadding
	if z.TailPacking {
		super.FeatureIncompat |= ondisk.IncompatZtailpacking
	}
	if z.Fragments || z.Dedupe {
		super.FeatureIncompat |= ondisk.IncompatFragments
	}
	if z.number() == ondisk.AlgLz4 && z.ClusterSize == blockSize {
		super.ComprAlgs = lz4MaxDistance
		return nil
	}
	super.FeatureIncompat |= ondisk.IncompatComprCfgs
	super.ComprAlgs = 1 << z.number()
	var config []byte
	switch z.number() {
	case ondisk.AlgLz4:
		config = le.AppendUint16(config, lz4MaxDistance)
		config = le.AppendUint16(config, uint16(z.ClusterSize/blockSize))
		config = append(config, make([]byte, 10)...)
	case ondisk.AlgDeflate:
		config = append(config, ondisk.MaxDeflateBits, 0, 0, 0, 0, 0)
	case ondisk.AlgZstd:
		config = append(config, 0, zstdWindowLog-10, 0, 0, 0, 0)
	}
	return append(le.AppendUint16(nil, uint16(len(config))), config...)
}

// An extent is a run of a file's bytes, and the pcluster that they are in. A file is a row of extents, each of which
// begins in another block of the file: an index has room for one a block.
type extent struct {
	size    uint32 // bytes of the file
	blocks  uint16 // of the pcluster; 0 where it is the tail
	encoded bool   // the bytes are stored as they are if not
}

// An index says where the extents of a file are.
type index struct {
	*Compression
	blockBits int
	size      int64 // of the file
	extents   []extent
	block     uint32 // of the first pcluster; each follows the one before
	tail      int64  // bytes behind the index, of the last extent
	fragment  bool   // the last extent is in the packed inode
	fragOff   int64  // there
}

// whole says that the packed inode holds all of the file.
func (x *index) whole() bool { return x.fragment && len(x.extents) == 0 }

// full says that the index takes 8 bytes an lcluster. A place far into the packed inode takes it.
func (x *index) full() bool { return x.FullIndex || x.fragOff > 1<<32-1 }

func (x *index) lclusters() int64 { return (x.size + 1<<x.blockBits - 1) >> x.blockBits }

func (x *index) layout() uint16 {
	if x.whole() || x.full() {
		return ondisk.LayoutCompressedFull
	}
	return ondisk.LayoutCompressedCompact
}

// packs says how many lclusters have 4 bytes before those that have 2, and how many those are
// (fs/erofs/zmap.c z_erofs_load_compact_lcluster). start is where the index begins.
func (x *index) packs(start int64) (lead, short int64) {
	lead = (ondisk.CompactPackAlign - start%ondisk.CompactPackAlign) / 4 & 7
	if x.blockBits > ondisk.CompactMaxBits2B || lead >= x.lclusters() {
		return 0, 0
	}
	return lead, (x.lclusters() - lead) &^ (ondisk.CompactPackCount2 - 1)
}

// length is how many bytes the map header and the index take. start is where the index begins.
func (x *index) length(start int64) int64 {
	switch {
	case x.whole():
		return ondisk.MapHeaderSize
	case x.full():
		return ondisk.MapHeaderSize + 8 + x.lclusters()*ondisk.LclusterIndexSize
	}
	_, short := x.packs(start)
	return ondisk.MapHeaderSize + short*2 + roundUp(x.lclusters()-short, 2)*4
}

// append writes the map header and the index behind b. start is where the index begins.
func (x *index) append(b []byte, start int64) []byte {
	if x.whole() {
		return le.AppendUint64(b, uint64(x.fragOff)|1<<63)
	}
	h := ondisk.MapHeader{AlgorithmType: x.number()}
	if x.ClusterSize > 1<<x.blockBits {
		h.Advise |= ondisk.AdviseBigPcluster1
		if !x.full() {
			h.Advise |= ondisk.AdviseBigPcluster2 // a compact index has both or none
		}
	}
	switch {
	case x.fragment:
		h.Advise |= ondisk.AdviseFragment
		h.Lo = uint32(x.fragOff)
	case x.tail > 0:
		h.Advise |= ondisk.AdviseInline
		h.Lo = uint32(x.tail) << 16
	}
	lead, short := x.packs(start)
	if !x.full() && short > 0 {
		h.Advise |= ondisk.AdviseCompacted2B
	}
	b = h.Append(b)
	entries := x.entries()
	if x.full() {
		return x.appendFull(append(b, make([]byte, 8)...), entries)
	}
	for int64(len(entries)) < roundUp(x.lclusters()-short, 2)+short {
		entries = append(entries, lcluster{})
	}
	at := int64(0)
	for at < int64(len(entries)) {
		width, count := 4, int64(2)
		if at >= lead && at < lead+short {
			width, count = 2, ondisk.CompactPackCount2
		}
		b = x.appendPack(b, entries[at:at+count], width)
		at += count
	}
	return b
}

// An lcluster is an entry of an index.
type lcluster struct {
	kind   uint8
	ofs    uint16 // of a head: where in the block the extent begins
	block  uint32 // of the pcluster, for all lclusters of an extent
	blocks uint16 // of the pcluster, in the first NONHEAD of a big one
	back   uint16 // of a NONHEAD: to the head
	ahead  uint16 // of a NONHEAD: to the next head
}

// entries gives the index an entry for each lcluster. A file that ends within an lcluster has a head there, as if
// another extent followed, unless its last extent begins in the same lcluster: so a reader knows from the entries where
// that extent ends.
func (x *index) entries() []lcluster {
	list := make([]lcluster, 0, x.lclusters()+1)
	pos, block := int64(0), x.block
	big := x.ClusterSize > 1<<x.blockBits
	for _, e := range x.extents {
		head := lcluster{kind: ondisk.LclusterPlain, ofs: uint16(pos & (1<<x.blockBits - 1)), block: block}
		if e.encoded {
			head.kind = ondisk.LclusterHead1
		}
		first := pos >> x.blockBits
		pos += int64(e.size)
		next := pos >> x.blockBits
		list = append(list, head)
		for lcn := first + 1; lcn < next; lcn++ {
			l := lcluster{kind: ondisk.LclusterNonhead, block: block, back: uint16(lcn - first), ahead: uint16(next - lcn)}
			if big && lcn == first+1 {
				l.blocks = max(e.blocks, 1)
			}
			list = append(list, l)
		}
		block += uint32(e.blocks)
	}
	if end := pos >> x.blockBits; int64(len(list)) == end && pos < x.lclusters()<<x.blockBits {
		list = append(list, lcluster{kind: ondisk.LclusterPlain, ofs: uint16(pos & (1<<x.blockBits - 1))})
	}
	return list
}

func (x *index) appendFull(b []byte, entries []lcluster) []byte {
	for i, l := range entries {
		d := ondisk.LclusterIndex{Advise: uint16(l.kind), ClusterOfs: l.ofs, U: l.block}
		switch {
		case l.kind == ondisk.LclusterNonhead:
			d.U = uint32(l.distance(false)) | uint32(l.ahead)<<16
		case x.fragment && x.lastHead(entries, i):
			d.U = uint32(x.fragOff >> 32)
		}
		b = d.Append(b)
	}
	return b
}

// lastHead says that entry i is the head of the last extent.
func (x *index) lastHead(entries []lcluster, i int) bool {
	start := x.size - int64(x.extents[len(x.extents)-1].size)
	return int64(i) == start>>x.blockBits
}

// distance is what the entry of a NONHEAD says, which for the last of a pack is another thing.
func (l *lcluster) distance(last bool) uint16 {
	switch {
	case l.blocks != 0:
		return l.blocks | ondisk.DeltaCblkcnt
	case last:
		return l.ahead
	}
	return l.back
}

// appendPack writes entries of width bytes each: bits of the entries, then an address of which the first head's follows.
func (x *index) appendPack(b []byte, entries []lcluster, width int) []byte {
	size := len(entries) * width
	stride := (size - 4) * 8 / len(entries)
	lobits := max(x.blockBits, ondisk.CompactMinLobits)
	pack := make([]byte, size+8) // the last entry is written 8 bytes at a time
	for i, l := range entries {
		lo := l.ofs
		if l.kind == ondisk.LclusterNonhead {
			lo = l.distance(i == len(entries)-1)
		}
		bit := i * stride
		v := uint64(lo) | uint64(l.kind)<<lobits
		le.PutUint64(pack[bit/8:], le.Uint64(pack[bit/8:])|v<<(bit%8))
	}
	le.PutUint32(pack[size-4:], x.packBlock(entries))
	return append(b, pack[:size]...)
}

// packBlock is the address that readers count from in a pack: with big pclusters that of the first pcluster whose
// length is in the pack, else of the block before the first one.
func (x *index) packBlock(entries []lcluster) uint32 {
	big := x.ClusterSize > 1<<x.blockBits
	for _, l := range entries {
		switch {
		case l.kind != ondisk.LclusterNonhead && big, l.blocks != 0:
			return l.block
		case l.kind != ondisk.LclusterNonhead:
			return l.block - 1
		}
	}
	return 0
}
