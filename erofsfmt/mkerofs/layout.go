package mkerofs

import (
	"cmp"
	"fmt"
	"iter"
	"maps"
	"math"
	"slices"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// A place is where a node will lie.
type place struct {
	ino       uint32 // its number in the order of the disk, from 1; 0 before the walk came to it
	nlink     uint32
	compact   bool
	chunks    int64  // of a chunk-based file
	chunkBits uint8  // as its inode says how long they are: 1<<chunkBits blocks
	offset    int64  // of the inode
	block     uint32 // the first of its blocks
	blocks    int64
	tail      int64 // bytes of its content that lie behind the inode; the others fill the blocks
}

func (p *place) nid() uint64 { return uint64(p.offset / ondisk.InodeSlot) }

// A stamp is a time as inodes have it.
type stamp struct {
	sec  int64
	nsec uint32
}

func (n *node) stamp() stamp { return stamp{n.Mtime.Unix(), uint32(n.Mtime.Nanosecond())} }

// A layout is the whole image but its content.
type layout struct {
	nodes     []*node // in the order of the tree
	inodes    []*node // in the order of the disk
	files     []*node // with data, in the order of the disk
	shared    []byte  // xattrs of many inodes, then the table of long prefixes
	prefixes  int64   // where in shared that is
	sharedAt  int64   // where in the image shared is
	spools    *spools // of a compressed image
	epoch     stamp   // of the compact inodes
	metaStart int64
	dataBlock int64 // where regular files begin
	blocks    int64 // of the image
}

// plan decides where everything will lie.
func (b *Builder) plan(nodes []*node, spools *spools) (*layout, error) {
	l := &layout{nodes: nodes, shared: b.encodeXattrs(nodes)}
	if !b.options.MetadataOnly {
		l.files = b.dataOrder(nodes)
	}
	l.prefixes = int64(len(l.shared))
	l.shared = append(l.shared, encodePrefixes(b.prefixes)...)
	for _, n := range l.nodes {
		if n.children != nil {
			n.Size = dirSize(n.names, b.options.BlockSize)
		}
	}
	l.epoch = mostFrequent(l.nodes)
	bs := int64(b.options.BlockSize)
	// The superblock's checksum is over its whole block, so nothing else is in it.
	l.metaStart = roundUp(ondisk.SuperOffset+ondisk.SuperSize, bs)
	room := space{blockSize: bs, end: l.metaStart}
	for _, n := range l.nodes {
		n.compact = n.fitsCompact() && n.stamp() == l.epoch
		b.splitNode(n)
		n.offset = room.place(n.headSize(), n.tail)
	}
	l.sharedAt = roundUp(room.end, bs)
	next := roundUp(l.sharedAt+int64(len(l.shared)), bs) / bs
	l.inodes = slices.SortedFunc(slices.Values(l.nodes), func(a, b *node) int { return cmp.Compare(a.offset, b.offset) })
	next = placeBlocks(l.nodes, next, func(n *node) bool { return n.Mode&ModeType != ModeRegular })
	l.dataBlock = next
	if spools == nil {
		l.blocks = placeBlocks(l.files, next, func(n *node) bool { return n.chunks == 0 })
	} else {
		l.spools = spools
		l.blocks = placeStored(l.nodes, next) + (spools.data.size+spools.packed.size)/bs
	}
	if l.blocks > math.MaxUint32 || l.blocks < 0 {
		return nil, fmt.Errorf("more than %d blocks of %d bytes: take a larger block size", uint32(math.MaxUint32), bs)
	}
	return l, nil
}

// walk gives all inodes, the entries of a directory side by side and by name, and counts their links.
func (b *Builder) walk() []*node {
	b.root.parent = b.root
	b.root.ino, b.root.nlink = 1, 2
	nodes := []*node{b.root}
	for dirs := []*node{b.root}; len(dirs) > 0; {
		dir := dirs[len(dirs)-1]
		dirs = dirs[:len(dirs)-1]
		below := len(dirs)
		dir.names = slices.Sorted(maps.Keys(dir.children))
		for _, name := range dir.names {
			n := dir.children[name]
			if n.ino == 0 {
				nodes = append(nodes, n)
				n.ino = uint32(len(nodes))
			}
			n.nlink++
			if n.children != nil {
				n.nlink, n.parent = 2, dir
				dir.nlink++
				dirs = append(dirs, n)
			}
		}
		slices.Reverse(dirs[below:]) // the first one by name is the next
		dir.names = append(dir.names, ".", "..")
		slices.Sort(dir.names)
	}
	return nodes
}

func (n *node) child(name string) *node {
	switch name {
	case ".":
		return n
	case "..":
		return n.parent
	}
	return n.children[name]
}

// fitsCompact leaves out the time, which depends on all the others.
func (n *node) fitsCompact() bool {
	return n.UID <= math.MaxUint16 && n.GID <= math.MaxUint16 && n.nlink <= math.MaxUint16 && n.Size <= math.MaxUint32
}

// mostFrequent gives the time that lets most inodes be compact, the earliest of several.
func mostFrequent(nodes []*node) stamp {
	counts := make(map[stamp]int)
	var best stamp
	for _, n := range nodes {
		if n.fitsCompact() {
			counts[n.stamp()]++
		}
	}
	for s, count := range counts {
		earlier := s.sec < best.sec || s.sec == best.sec && s.nsec < best.nsec
		if count > counts[best] || count == counts[best] && earlier {
			best = s
		}
	}
	return best
}

// headSize is the inode's, its xattrs' and its index's.
func (n *node) headSize() int64 {
	switch start := n.indexStart(); {
	case n.encoded():
		return start + n.stored.length(start+ondisk.MapHeaderSize)
	case n.chunks > 0:
		return start + n.chunks*ondisk.ChunkIndexSize
	}
	return n.xattrStart() + int64(len(n.xattrs))
}

func (n *node) xattrStart() int64 {
	if n.compact {
		return ondisk.InodeCompactSize
	}
	return ondisk.InodeExtendedSize
}

// indexStart is where the map header of a compressed file, or the index of a chunk-based one, begins behind its inode's beginning.
func (n *node) indexStart() int64 {
	return roundUp(n.xattrStart()+int64(len(n.xattrs)), ondisk.MapHeaderSize)
}

// encoded says that n is a file with compressed data.
func (n *node) encoded() bool { return n.stored != nil && !n.stored.plain }

// split says how many blocks a regular file that is stored as it is takes, and how many bytes lie behind its inode.
func (b *Builder) split(size int64) (blocks, tail int64) {
	return b.splitTail(size, b.options.InlineMax)
}

func (b *Builder) splitTail(size int64, most int) (blocks, tail int64) {
	bs := int64(b.options.BlockSize)
	if blocks, tail = size/bs, size%bs; tail > int64(min(most, maxTail(b.options.BlockSize))) {
		return blocks + 1, 0
	}
	return blocks, tail
}

// splitNode decides what of n's content goes with its inode.
func (b *Builder) splitNode(n *node) {
	switch {
	case n.stored != nil:
		n.blocks, n.tail = n.stored.blocks, n.stored.tail
	case n.Mode&ModeType == ModeRegular:
		n.blocks, n.tail = b.split(n.Size)
		b.splitChunks(n)
	default:
		n.blocks, n.tail = b.splitTail(n.Size, b.options.BlockSize/2)
	}
}

// A space is where inodes are placed, one behind the other. A tail must not cross a block's end (fs/erofs/data.c
// erofs_map_blocks), so an inode may have to leave a gap, which later ones fill.
type space struct {
	blockSize int64
	end       int64
	gaps      []gap
}

type gap struct{ from, to int64 }

// maxGaps is how many gaps are remembered: the inodes of a directory are to stay close together.
const maxGaps = 64

// place finds room for an inode of head bytes and then tail bytes, in the smallest gap where it fits or at the end.
func (s *space) place(head, tail int64) int64 {
	best := -1
	for i, g := range s.gaps {
		at := s.fit(g.from, head, tail)
		if at+head+tail <= g.to && (best < 0 || g.to-g.from < s.gaps[best].to-s.gaps[best].from) {
			best = i
		}
	}
	if best >= 0 {
		g := s.gaps[best]
		s.gaps = slices.Delete(s.gaps, best, best+1)
		at := s.fit(g.from, head, tail)
		s.leave(g.from, at)
		s.leave(at+head+tail, g.to)
		return at
	}
	from := roundUp(s.end, ondisk.InodeSlot)
	at := s.fit(from, head, tail)
	s.leave(from, at)
	s.end = at + head + tail
	return at
}

// fit is the first slot from pos on from where a tail behind head would not cross a block's end. It does not begin
// with a block either: where blocks are smaller than pages, Linux (6.18, fs/erofs/decompressor.c z_erofs_fixup_insize)
// takes an encoded tail in the second block of a page for one without data.
func (s *space) fit(pos, head, tail int64) int64 {
	at := roundUp(pos, ondisk.InodeSlot)
	if tail == 0 {
		return at
	}
	if off := (at + head) % s.blockSize; off+tail > s.blockSize {
		at += roundUp(s.blockSize-off, ondisk.InodeSlot)
	}
	if (at+head)%s.blockSize == 0 {
		at += ondisk.InodeSlot
	}
	return at
}

// leave remembers a gap. Of too many the smallest is forgotten.
func (s *space) leave(from, to int64) {
	from = roundUp(from, ondisk.InodeSlot)
	if to-from < ondisk.InodeSlot {
		return
	}
	s.gaps = append(s.gaps, gap{from, to})
	if len(s.gaps) > maxGaps {
		least := 0
		for i, g := range s.gaps {
			if g.to-g.from < s.gaps[least].to-s.gaps[least].from {
				least = i
			}
		}
		s.gaps = slices.Delete(s.gaps, least, least+1)
	}
}

// placeBlocks gives the nodes of which is true their blocks, from next on, and says which block is free then. Those
// without blocks get address 0. The sum cannot overflow before it is too large for an image.
func placeBlocks(nodes []*node, next int64, which func(*node) bool) int64 {
	for _, n := range nodes {
		if !which(n) || n.blocks == 0 {
			continue
		}
		if next < 0 || n.blocks > math.MaxUint32-min(next, math.MaxUint32) {
			return -1
		}
		n.block = uint32(next)
		next += n.blocks
	}
	return next
}

// placeStored says where in the image what lies in spools will be, from block next on.
func placeStored(nodes []*node, next int64) int64 {
	for _, n := range nodes {
		if n.stored != nil && n.blocks > 0 {
			n.block = uint32(next) + n.stored.block
		}
	}
	return next
}

// dirBlocks cuts the names of a directory into blocks: names [from, to) fill one of used bytes
// (fs/erofs/dir.c erofs_fill_dentries: the entries, then their names).
func dirBlocks(names []string, blockSize int) iter.Seq2[[2]int, int] {
	return func(yield func([2]int, int) bool) {
		from, used := 0, 0
		for i, name := range names {
			need := ondisk.DirentSize + len(name)
			if used+need > blockSize {
				if !yield([2]int{from, i}, used) {
					return
				}
				from, used = i, 0
			}
			used += need
		}
		yield([2]int{from, len(names)}, used)
	}
}

// dirSize is whole blocks, and of the last what is used.
func dirSize(names []string, blockSize int) int64 {
	var size, last int64
	for _, used := range dirBlocks(names, blockSize) {
		size, last = size+int64(blockSize), int64(used)
	}
	return size - int64(blockSize) + last
}

func roundUp(n, to int64) int64 { return (n + to - 1) / to * to }
