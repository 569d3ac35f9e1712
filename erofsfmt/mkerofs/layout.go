package mkerofs

import (
	"fmt"
	"iter"
	"maps"
	"math"
	"slices"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// A place is where a node will lie.
type place struct {
	ino     uint32 // its number in the order of the disk, from 1; 0 before the walk came to it
	nlink   uint32
	compact bool
	offset  int64  // of the inode
	block   uint32 // the first of its blocks
	blocks  int64
	tail    int64 // bytes of its content that lie behind the inode; the others fill the blocks
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
	nodes     []*node // in the order of the disk
	epoch     stamp   // of the compact inodes
	metaStart int64
	dataBlock int64 // where regular files begin
	blocks    int64 // of the image
}

// plan decides where everything will lie.
func (b *Builder) plan() (*layout, error) {
	l := &layout{nodes: b.walk()}
	for _, n := range l.nodes {
		if n.children != nil {
			n.Size = dirSize(n.names, b.options.BlockSize)
		}
	}
	l.epoch = mostFrequent(l.nodes)
	bs := int64(b.options.BlockSize)
	// The superblock's checksum is over its whole block, so nothing else is in it.
	l.metaStart = roundUp(ondisk.SuperOffset+ondisk.SuperSize, bs)
	end := l.metaStart
	for _, n := range l.nodes {
		n.compact = n.fitsCompact() && n.stamp() == l.epoch
		b.placeInode(n, end)
		end = n.offset + n.headSize() + n.tail
	}
	next := roundUp(end, bs) / bs
	next = placeBlocks(l.nodes, next, func(n *node) bool { return n.Mode&ModeType != ModeRegular })
	l.dataBlock = next
	l.blocks = placeBlocks(l.nodes, next, func(n *node) bool { return n.Mode&ModeType == ModeRegular })
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

// headSize is the inode's and its xattrs'.
func (n *node) headSize() int64 {
	if n.compact {
		return ondisk.InodeCompactSize + int64(len(n.xattrs))
	}
	return ondisk.InodeExtendedSize + int64(len(n.xattrs))
}

// placeInode puts n at or behind pos, and decides what of its content goes with it. A tail must not cross a block's
// end (fs/erofs/data.c erofs_map_blocks), so an inode may have to leave a gap. Tails of more than half a block would
// leave too many of these: they get a block.
func (b *Builder) placeInode(n *node, pos int64) {
	bs := int64(b.options.BlockSize)
	n.offset = roundUp(pos, ondisk.InodeSlot)
	n.blocks, n.tail = n.Size/bs, n.Size%bs
	most := bs / 2
	if n.Mode&ModeType == ModeRegular {
		most = int64(b.options.InlineMax)
	}
	if n.tail > most {
		n.blocks, n.tail = n.blocks+1, 0
	}
	for n.tail > 0 && (n.offset+n.headSize())%bs+n.tail > bs {
		n.offset += ondisk.InodeSlot
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
