package mkerofs

import "slices"

// A layer that is to be mounted over others (LayerOptions.Lower) is filled as overlayfs fills one: before something in a
// directory is changed, the directory is copied up, and before a file gets another name, the file is.

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
func (l *Layers) missingDir(below *node) *node {
	if !below.isDir() {
		return l.b.impliedDir()
	}
	n := l.b.makeNode(below.Entry, slices.Clone(below.attrs))
	n.children = make(map[string]*node)
	return n
}

// copyUp has the layer get the file at path from below, unless it has something there itself. It is nil where there is
// no such file. Where the layer has removed it already, it gets no more of it than the node.
func (l *Layers) copyUp(path []string) (*node, error) {
	if l.below() == nil {
		return nil, nil
	}
	dir, name := path[:len(path)-1], path[len(path)-1]
	at, err := l.way(dir, toLook)
	if err != nil {
		return nil, nil // who asked finds out why
	}
	file := at.below.has(name)
	if at.dir.has(name) != nil || file == nil || file.isDir() {
		return nil, nil
	}
	n := l.b.makeNode(file.Entry, slices.Clone(file.attrs))
	if at.gone || l.removed.has(at.dir, name) {
		return n, nil
	}
	up, err := l.way(dir, toPut)
	if err != nil {
		return nil, err
	}
	l.place(up.dir, name, n)
	return n, nil
}
