package erofsfmt

import (
	"cmp"
	"context"
	"fmt"
	"io/fs"
	"slices"
)

// maxDepth is how many directories can be in each other: a path of more exceeds
// PATH_MAX. An image in which ".." leads in a circle seems to have more.
const maxDepth = 2048

// stack returns the directories that are merged into one: itself, and those of lower
// layers at the same path. nid need not be the topmost there.
//
// What is below a directory follows from what is below its parent, which ".." leads
// to within the layer:
//
//	layer 0     /a ────────── b        stack(/a/b in 0) = b in 0, b in 2
//	layer 1     /a (no b)     │        since stack(/a in 0) = a in 0, a in 1, a in 2
//	layer 2     /a ────────── b        (but for what is opaque, or no directory)
//
// Where the parent has nothing below it, which is so for the lowest layer and for
// everything in an opaque directory, nor has the directory.
func (u *union) stack(ctx context.Context, nid Nid) ([]dirAt, error) {
	return u.stackOf(ctx, nid, maxDepth)
}

func (u *union) stackOf(ctx context.Context, nid Nid, depth int) ([]dirAt, error) {
	if s, ok := u.stacks.get(nid); ok {
		return s, nil
	}
	layer, n := u.apart(nid)
	if n == u.layers[layer].Root() {
		return u.rootStack(layer), nil
	}
	self, err := u.dir(ctx, layer, n)
	if err != nil {
		return nil, err
	}
	s := []dirAt{self}
	if self.opaque || layer == len(u.layers)-1 {
		return s, nil
	}
	up, err := u.up(ctx, &self, depth)
	if err != nil {
		return nil, err
	}
	above, err := u.stackOf(ctx, u.nid(layer, up), depth-1)
	if err != nil {
		return nil, err
	}
	if len(above) > 1 {
		name, err := u.name(ctx, &above[0], n)
		if err != nil {
			return nil, err
		}
		if s, err = u.merge(ctx, s, above[1:], name); err != nil {
			return nil, err
		}
	}
	u.stacks.put(nid, s, int64(cap(s))*dirAtBytes)
	return s, nil
}

// rootStack is the stack of a layer's root directory.
func (u *union) rootStack(layer int) []dirAt {
	end := layer + 1
	for end < len(u.roots) && !u.roots[end-1].opaque {
		end++
	}
	return u.roots[layer:end:end]
}

// dir reads a directory of a layer.
func (u *union) dir(ctx context.Context, layer int, n Nid) (dirAt, error) {
	l := u.layers[layer]
	ino, err := l.Inode(ctx, n)
	if err == nil && !ino.IsDir() {
		err = l.locate(n).corrupt("nid %d is not a directory: mode %#o", uint64(n), ino.Mode)
	}
	if err == nil {
		err = u.refuse(ctx, layer, &ino)
	}
	d := dirAt{layer: layer, ino: ino}
	if err == nil {
		d.opaque, err = u.opaque(ctx, layer, &ino)
	}
	return d, u.numbered(layer, err)
}

// up is where ".." of a directory leads in its layer. depth is how far up it may be
// gone.
func (u *union) up(ctx context.Context, d *dirAt, depth int) (Nid, error) {
	l := u.layers[d.layer]
	if depth == 0 {
		return 0, u.located(l, l.locate(d.ino.Nid).corrupt("nid %d: more than %d directories in each other", uint64(d.ino.Nid), maxDepth))
	}
	n, err := l.Lookup(ctx, &d.ino, "..")
	if err == fs.ErrNotExist {
		err = l.locate(d.ino.Nid).corrupt("nid %d: a directory without \"..\"", uint64(d.ino.Nid))
	}
	return n, u.located(l, err)
}

// merge adds to s what the directories in above have by a name, as far as it is
// merged.
func (u *union) merge(ctx context.Context, s, above []dirAt, name string) ([]dirAt, error) {
	for i := range above {
		l := u.layers[above[i].layer]
		n, err := l.Lookup(ctx, &above[i].ino, name)
		if err == fs.ErrNotExist {
			continue
		}
		if err != nil {
			return nil, u.located(l, err)
		}
		ino, err := l.Inode(ctx, n)
		if err != nil {
			return nil, u.located(l, err)
		}
		if !ino.IsDir() {
			break // a whiteout, or a file that is hidden itself
		}
		d, err := u.dir(ctx, above[i].layer, n)
		if err != nil {
			return nil, err
		}
		if s = append(s, d); d.opaque {
			break
		}
	}
	return s, nil
}

// About what a dirAt and a childAt take in memory.
const (
	dirAtBytes   = 104
	childAtBytes = 16
)

// A childAt is where in a directory another one is named.
type childAt struct {
	nid Nid
	at  int64 // a byte of the directory, as in cursor
}

// name finds by what name a directory has another. What is called by two names, as only
// in a corrupt image, is called by the first.
func (u *union) name(ctx context.Context, parent *dirAt, n Nid) (string, error) {
	l := u.layers[parent.layer]
	r, err := l.newDirReader(&parent.ino)
	if err != nil {
		return "", u.located(l, err)
	}
	defer r.m.release()
	c := &cursor{layer: parent.layer, r: r}
	key := u.nid(parent.layer, parent.ino.Nid)
	children, ok := u.children.get(key)
	if !ok {
		if children, err = c.directories(ctx); err != nil {
			return "", u.located(l, c.failed(err))
		}
		u.children.put(key, children, int64(len(children))*childAtBytes)
	}
	i, ok := slices.BinarySearchFunc(children, n, func(c childAt, n Nid) int { return cmp.Compare(c.nid, n) })
	if !ok {
		return "", u.located(l, l.locate(n).corrupt("nid %d is not in nid %d, where its \"..\" leads", uint64(n), uint64(parent.ino.Nid)))
	}
	name, err := c.nameAt(ctx, children[i].at)
	if err != nil {
		err = u.located(l, c.failed(err))
	}
	return string(name), err
}

// directories are those in a directory, by nid and name.
func (c *cursor) directories(ctx context.Context) ([]childAt, error) {
	var found []childAt
	for err := c.seek(ctx, nil); ; err = c.next(ctx) {
		if err != nil {
			return nil, err
		}
		if c.name == nil {
			break
		}
		if t := c.dirType(); t == DT_DIR || t == DT_UNKNOWN {
			found = append(found, childAt{Nid(c.d.Nid), c.at})
		}
	}
	slices.SortStableFunc(found, func(a, b childAt) int { return cmp.Compare(a.nid, b.nid) })
	return slices.Clip(found), nil
}

// top is the nid of what a directory of a layer is a part of: the topmost at its
// path.
func (u *union) top(ctx context.Context, nid Nid, depth int) (Nid, error) {
	layer, n := u.apart(nid)
	if layer == 0 {
		return nid, nil
	}
	if n == u.layers[layer].Root() {
		return u.nid(0, u.layers[0].Root()), nil
	}
	if top, ok := u.tops.get(nid); ok {
		return top, nil
	}
	self, err := u.dir(ctx, layer, n)
	if err != nil {
		return 0, err
	}
	up, err := u.up(ctx, &self, depth)
	if err != nil {
		return 0, err
	}
	parent, err := u.dir(ctx, layer, up)
	if err != nil {
		return 0, err
	}
	name, err := u.name(ctx, &parent, n)
	if err != nil {
		return 0, err
	}
	above, err := u.top(ctx, u.nid(layer, up), depth-1)
	if err != nil {
		return 0, err
	}
	s, err := u.stack(ctx, above)
	if err != nil {
		return 0, err
	}
	top, err := u.find(ctx, s, name)
	if err == nil {
		u.tops.put(nid, top, 0)
	}
	return top, err
}

// parent is where ".." of a directory leads.
func (u *union) parent(ctx context.Context, nid Nid) (Nid, error) {
	layer, n := u.apart(nid)
	self, err := u.dir(ctx, layer, n)
	if err != nil {
		return 0, err
	}
	up, err := u.up(ctx, &self, maxDepth)
	if err != nil {
		return 0, err
	}
	return u.top(ctx, u.nid(layer, up), maxDepth-1)
}

func (u *union) lookup(ctx context.Context, dir *Inode, name string) (Nid, error) {
	if !dir.IsDir() {
		return 0, fmt.Errorf("erofs: nid %d is not a directory: mode %#o", uint64(dir.Nid), dir.Mode)
	}
	switch name {
	case ".":
		return dir.Nid, nil
	case "..":
		return u.parent(ctx, dir.Nid)
	}
	s, err := u.stack(ctx, dir.Nid)
	if err != nil {
		return 0, err
	}
	return u.find(ctx, s, name)
}

// find looks for a name in the directories of a stack.
func (u *union) find(ctx context.Context, s []dirAt, name string) (Nid, error) {
	for i := range s {
		l := u.layers[s[i].layer]
		n, err := l.Lookup(ctx, &s[i].ino, name)
		if err == fs.ErrNotExist {
			continue
		}
		var ino Inode
		if err == nil {
			ino, err = l.Inode(ctx, n)
		}
		if err != nil {
			return 0, u.located(l, err)
		}
		if ino.whiteout() {
			return 0, fs.ErrNotExist
		}
		return u.nid(s[i].layer, n), nil
	}
	return 0, fs.ErrNotExist
}
