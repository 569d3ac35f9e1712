package mkerofs

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

const (
	whiteoutPrefix = ".wh."
	whiteoutOpaque = ".wh..wh..opq"
	whiteoutOther  = ".wh..wh." // of aufs itself, which means nothing here
	aufsLinks      = ".wh..wh.plnk"
)

// The removals of a directory are what a layer's whiteouts take away there, of the layers below. They wait for the end
// of the layer, so that it does not matter where it has them; only a path that leads through what is removed by then
// finds nothing there (way).
type removals struct {
	dir    *node
	below  *node // what the layers below have in the place of dir, where that is known
	opaque bool  // all of it
	names  map[string]bool
}

// removed are the removals of a layer, by directory, and in the order in which they came.
type removed struct {
	in   map[*node]*removals
	list []*removals
}

func (r *removed) of(at spot) *removals {
	w := r.in[at.dir]
	if w == nil {
		if r.in == nil {
			r.in = make(map[*node]*removals)
		}
		w = &removals{dir: at.dir, below: at.below, names: make(map[string]bool)}
		r.in[at.dir] = w
		r.list = append(r.list, w)
	}
	return w
}

// has says that name of dir is removed.
func (r *removed) has(dir *node, name string) bool {
	w := r.in[dir]
	return w != nil && (w.opaque || w.names[name])
}

// move is for another node that takes the place of a directory, with what is in it.
func (r *removed) move(from, to *node) {
	if w := r.in[from]; w != nil {
		delete(r.in, from)
		w.dir = to
		r.in[to] = w
	}
}

// remove remembers the whiteout that a name with whiteoutPrefix is.
func (l *Layers) remove(at spot, name string) error {
	hidden := strings.TrimPrefix(name, whiteoutPrefix)
	switch {
	case hidden == "" || hidden == "." || hidden == "..":
		return fmt.Errorf("whiteout of %q, which is no name", hidden)
	case at.gone: // with all that it could remove
	case name == whiteoutOpaque:
		l.removed.of(at).opaque = true
	case !strings.HasPrefix(name, whiteoutOther):
		l.removed.of(at).names[hidden] = true
	}
	return nil
}

// aufs says that the entry at path is in a directory of aufs's own, which is no part of the tree. Hard links may be to
// files of one of these.
func (l *Layers) aufs(path []string, get func() (Entry, error)) (is bool, err error) {
	inside := func(name string) bool { return strings.HasPrefix(name, whiteoutOther) && name != whiteoutOpaque }
	if len(path) < 2 || !slices.ContainsFunc(path[:len(path)-1], inside) {
		return false, nil
	}
	if path[0] != aufsLinks || len(path) != 2 {
		return true, nil
	}
	e, err := get()
	if err != nil || e.Link != "" || e.Mode&ModeType != ModeRegular {
		return true, err
	}
	e.Xattrs = l.storable(e.Path, e.Xattrs)
	n, err := l.b.newNode(e)
	if err != nil {
		return true, err
	}
	if l.plinks == nil {
		l.plinks = make(map[string]*node)
	}
	l.plinks[path[1]] = n
	return true, nil
}

// whiteOut does what the whiteouts of the layer say, when all else of it is there.
func (l *Layers) whiteOut() error {
	pruned := make(map[*node]bool)
	for _, w := range l.removed.list {
		names := slices.Sorted(maps.Keys(w.names))
		switch {
		case l.o.Overlay:
			if err := l.keepWhiteouts(w, names); err != nil {
				return err
			}
		case w.opaque:
			l.prune(w.dir, pruned)
		default:
			for _, name := range names {
				l.pruneName(w.dir, name, pruned)
			}
		}
	}
	return nil
}

// prune removes from a directory what is of lower layers. What this layer put deeper below keeps its directories. A
// directory that was pruned has nothing more to lose.
func (l *Layers) prune(dir *node, pruned map[*node]bool) {
	if pruned[dir] {
		return
	}
	pruned[dir] = true
	for _, name := range slices.Sorted(maps.Keys(dir.children)) {
		l.pruneName(dir, name, pruned)
	}
}

func (l *Layers) pruneName(dir *node, name string, pruned map[*node]bool) {
	n := dir.children[name]
	if n == nil {
		return
	}
	if n.children != nil {
		l.prune(n, pruned)
	}
	if dir.layers[name] != l.layer && len(n.children) == 0 {
		delete(dir.children, name)
	}
}

// keepWhiteouts says what whiteouts do in the words of overlayfs. That lists a mark that hides nothing: those are left
// out.
func (l *Layers) keepWhiteouts(w *removals, names []string) error {
	known := l.below() != nil
	if w.opaque && (!known || w.below.isDir()) {
		if err := l.makeOpaque(w.dir); err != nil {
			return err
		}
	}
	for _, name := range names {
		if known && w.below.has(name) == nil {
			continue
		}
		switch n := w.dir.children[name]; {
		case n == nil:
			l.place(w.dir, name, l.b.makeNode(Entry{Path: name, Mode: ModeChar, Mtime: w.dir.Mtime}, nil))
		case n.children != nil:
			if err := l.makeOpaque(n); err != nil {
				return err
			}
		} // else it hides what is below
	}
	return nil
}

func (l *Layers) makeOpaque(dir *node) error {
	attrs, err := l.b.splitXattrs(map[string][]byte{overlayOpaque: []byte("y")})
	if err != nil {
		return err
	}
	for _, x := range dir.attrs {
		if x.xattrPrefix == attrs[0].xattrPrefix && x.suffix == attrs[0].suffix {
			return nil
		}
	}
	dir.attrs = append(dir.attrs, attrs...)
	return nil
}
