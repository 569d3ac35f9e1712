package mkerofs

import "slices"

// A layer that is to be mounted over others (LayerOptions.Lower) is filled as overlayfs fills one: before something in a
// directory is changed, the directory is copied up, and before a file gets another name, the file is.

// A spot is a directory of the layer that is being made, and what the layers below have at its path.
type spot struct{ dir, below *node }

// link is the symbolic link that the spot is, of whichever layer.
func (s spot) link() *node {
	for _, n := range []*node{s.dir, s.below} {
		if n != nil {
			if n.Mode&ModeType == ModeSymlink {
				return n
			}
			return nil
		}
	}
	return nil
}

// below is the root of the layers below, or nil.
func (l *Layers) below() *node {
	if l.o.Lower == nil {
		return nil
	}
	return l.o.Lower.root
}

// has is what a directory has by that name; nothing, where there is no directory.
func (n *node) has(name string) *node {
	if n == nil {
		return nil
	}
	return n.children[name]
}

func (n *node) isDir() bool { return n != nil && n.children != nil }

// missingDir is a directory that the layer does not speak of: one like that below, if there is one.
func missingDir(below *node) *node {
	n := impliedDir()
	if below.isDir() {
		n.Entry, n.attrs = below.Entry, slices.Clone(below.attrs)
	}
	return n
}

// copyUp has the layer get the file at path from below, unless it has something there itself. It is nil where there is
// no such file.
func (l *Layers) copyUp(path []string) (*node, error) {
	if l.below() == nil {
		return nil, nil
	}
	at, err := l.way(path[:len(path)-1], false)
	if err != nil {
		return nil, nil // who asked finds out why
	}
	name := path[len(path)-1]
	file := at.below.has(name)
	if at.dir.has(name) != nil || file == nil || file.isDir() {
		return nil, nil
	}
	up, err := l.enter(path[:len(path)-1], true)
	if err != nil {
		return nil, err
	}
	n := &node{Entry: file.Entry, attrs: slices.Clone(file.attrs)}
	l.place(up, name, n)
	return n, nil
}
