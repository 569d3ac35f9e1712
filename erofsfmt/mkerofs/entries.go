package mkerofs

import (
	"iter"
	"maps"
	"slices"
)

// Entries lists the tree, as it will be written, in the order of paths: a directory before what is in it, names in byte
// order, the root first as ".". An inode's second and later names come with Link set to its first one, and nothing else.
// Entry.Open is what was added. The tree must not be changed meanwhile.
func (b *Builder) Entries() iter.Seq[Entry] {
	return func(yield func(Entry) bool) {
		walk := entryWalk{yield: yield, first: make(map[*node]string)}
		walk.visit(b.root, ".")
	}
}

type entryWalk struct {
	yield func(Entry) bool
	first map[*node]string // the first name of what may have more
}

// visit gives n and what is below it. It says whether more is wanted. That it calls itself, and makes a path for each
// entry, takes no more than maxPath has room for.
func (w *entryWalk) visit(n *node, path string) bool {
	if n.children == nil {
		if link, ok := w.first[n]; ok {
			return w.yield(Entry{Path: path, Link: link})
		}
		w.first[n] = path
		return w.yield(n.entry(path))
	}
	if !w.yield(n.entry(path)) {
		return false
	}
	prefix := ""
	if path != "." {
		prefix = path + "/"
	}
	for _, name := range slices.Sorted(maps.Keys(n.children)) {
		if !w.visit(n.children[name], prefix+name) {
			return false
		}
	}
	return true
}

// entry is what would have to be added for n.
func (n *node) entry(path string) Entry {
	e := n.Entry
	e.Path = path
	if n.Mode&ModeType != ModeRegular {
		e.Size = 0
	}
	if len(n.attrs) > 0 {
		e.Xattrs = make(map[string][]byte, len(n.attrs))
		for i := range n.attrs {
			e.Xattrs[n.attrs[i].name()] = []byte(n.attrs[i].value)
		}
	}
	return e
}

// name is the full one.
func (x *xattr) name() string {
	for prefix, base := range xattrBases() {
		if base == x.base {
			return prefix + x.infix + x.suffix
		}
	}
	return ""
}

// Stats are what Finish has written.
type Stats struct {
	Inodes  int64 // of all kinds
	Files   int64 // those that are regular files
	Content int64 // bytes that these hold; of a file with several names once
	Stored  int64 // bytes of the image that they are in: blocks, and what lies behind inodes
	Blocks  int64 // of the image, metadata included
}

// Stats are zero before Finish.
func (b *Builder) Stats() Stats { return b.stats }

func (b *Builder) count(l *layout) Stats {
	s := Stats{Inodes: int64(len(l.nodes)), Blocks: l.blocks, Stored: (l.blocks - l.dataBlock) * int64(b.options.BlockSize)}
	seen := make(map[*stored]bool) // files of the same content share it
	for _, n := range l.nodes {
		if n.Mode&ModeType != ModeRegular {
			continue
		}
		if n != b.packed {
			s.Files++
			s.Content += n.Size
		}
		if n.stored == nil || !seen[n.stored] {
			s.Stored += n.tail
		}
		seen[n.stored] = true
	}
	return s
}
