package erofsfmt

import (
	"bytes"
	"errors"
	"io"
	"strings"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// A dirNode is a directory that was found. It is kept as long as something below
// it is to be looked at.
type dirNode struct {
	nid  Nid
	name string
	up   *dirNode // nil: it is the root
}

// maxFaultPath is where the path of a fault is cut: names can be nested deeper
// than any system call takes.
const maxFaultPath = 4096

func (d *dirNode) path() string {
	var names []string
	for n := 0; d.up != nil; d = d.up {
		if n += 1 + len(d.name); n > maxFaultPath {
			names = append(names, "…")
			break
		}
		names = append(names, d.name)
	}
	var b strings.Builder
	for i := len(names) - 1; i >= 0; i-- {
		b.WriteByte('/')
		b.WriteString(names[i])
	}
	return b.String()
}

// An owner is an inode by the name that it was found by.
type owner struct {
	nid  Nid
	dir  *dirNode // nil: the root, or what has no name
	name string
}

// own makes f a fault of the owner, if there is one.
func (o *owner) own(f *Fault) {
	if o == nil {
		return
	}
	f.Nid, f.Path = o.nid, o.name
	if o.dir != nil {
		f.Path = o.dir.path() + "/" + o.name
	}
}

// maxBadBlocks is how many blocks of a directory or extents of a file are not
// understood before the rest of it is left alone: a hostile one has no end.
const maxBadBlocks = 16

// maxLinkPaths bounds what is remembered for the sake of a fault's text.
const maxLinkPaths = 1 << 16

// walk checks all directories and what is in them.
func (c *checker) walk() {
	root := &dirNode{nid: c.im.Root()}
	who := &owner{nid: root.nid, name: "/"}
	ino, err := c.im.Inode(c.ctx, root.nid)
	if err != nil {
		c.failed(who, c.im.locate(root.nid), err)
		return
	}
	c.firstSeen(who, &ino)
	c.dirs = append(c.dirs, root)
	for len(c.dirs) > 0 && c.ctx.Err() == nil {
		d := c.dirs[len(c.dirs)-1]
		c.dirs = c.dirs[:len(c.dirs)-1]
		below := len(c.dirs)
		c.directory(d)
		for i, j := below, len(c.dirs)-1; i < j; i, j = i+1, j-1 { // the first one is the next
			c.dirs[i], c.dirs[j] = c.dirs[j], c.dirs[i]
		}
	}
}

// A dirCheck is the check of one directory.
type dirCheck struct {
	*checker
	node   *dirNode
	who    *owner
	ino    *Inode
	r      dirReader
	last   []byte // name of the entry before
	dot    bool   // seen
	dotdot bool
	subs   uint32
	broken bool // some entries were not seen
}

func (c *checker) directory(node *dirNode) {
	who := &owner{nid: node.nid, dir: node.up, name: node.name}
	if node.up == nil {
		who.name = "/"
	}
	at := c.im.locate(node.nid)
	ino, err := c.im.Inode(c.ctx, node.nid)
	d := &dirCheck{checker: c, node: node, who: who, ino: &ino}
	if err == nil {
		d.r, err = c.im.newDirReader(&ino)
	}
	if err != nil {
		c.failed(who, at, err)
		return
	}
	defer d.r.m.release()
	d.blocks()
	if d.broken {
		c.hidden = true
		return
	}
	if !d.dot && !ino.dotOmitted {
		c.fault(who, at, `no entry "."`)
	}
	if !d.dotdot {
		c.fault(who, at, `no entry ".."`)
	}
	// Some builders count no links of directories, and 1 is how they say so.
	if want := 2 + d.subs; ino.Nlink != 1 && ino.Nlink != want {
		c.fault(who, at, "link count %d of a directory with %d directories in it, want %d", ino.Nlink, d.subs, want)
	}
}

// blocks checks the directory block by block.
func (d *dirCheck) blocks() {
	bs := d.im.sb.BlockSize()
	for blk, bad := int64(0), 0; blk*bs < d.ino.Size && d.ctx.Err() == nil; blk++ {
		b, err := d.r.block(d.ctx, blk)
		if err != nil {
			d.broken = true
			d.failed(d.who, d.place(blk, 0), err)
			if bad++; bad == maxBadBlocks || errors.Is(err, io.ErrUnexpectedEOF) {
				return
			}
			continue
		}
		for i := range b.n {
			e, name, err := b.entry(i)
			if err != nil {
				d.broken = true
				d.failed(d.who, d.place(blk, i), err)
				continue
			}
			d.entry(e, name, blk, i)
		}
	}
}

// place is where an entry of a block of the directory is: for a compressed one,
// where its pcluster is.
func (d *dirCheck) place(blk int64, i int) place {
	off := blk*d.im.sb.BlockSize() + int64(i)*ondisk.DirentSize
	e, err := d.r.m.extentAt(d.ctx, off)
	switch {
	case err != nil || e.kind == hole:
		return d.im.locate(d.node.nid)
	case e.kind == stored:
		return e.at.plus(off - e.la)
	}
	return e.at
}

func (d *dirCheck) entry(e ondisk.Dirent, name []byte, blk int64, i int) {
	at := func() place { return d.place(blk, i) }
	if d.last != nil && bytes.Compare(d.last, name) >= 0 {
		d.fault(d.who, at(), "entry %q comes after %q, so that it is not found", name, d.last)
	}
	d.last = append(d.last[:0], name...)
	nid := Nid(e.Nid)
	up := d.node
	switch string(name) {
	case ".":
		d.dot = true
	case "..":
		d.dotdot = true
		if up.up != nil {
			up = up.up
		}
	default:
		d.child(e, string(name), at)
		return
	}
	if nid != up.nid {
		d.fault(d.who, at(), "entry %q is nid %d, want %d", name, uint64(nid), uint64(up.nid))
	}
	if e.FileType != ondisk.FtDir && e.FileType != 0 {
		d.fault(d.who, at(), "entry %q has file type %d, want %d", name, e.FileType, ondisk.FtDir)
	}
}

// child checks an entry and, when it is met for the first time, the inode.
func (d *dirCheck) child(e ondisk.Dirent, name string, at func() place) {
	nid := Nid(e.Nid)
	who := &owner{nid: nid, dir: d.node, name: name}
	ino, err := d.im.Inode(d.ctx, nid)
	if err != nil {
		d.hidden = true
		if e.FileType == ondisk.FtDir {
			d.subs++
		}
		d.failed(who, at(), err)
		return
	}
	if t := e.FileType; t != 0 && (int(t) >= len(dirTypes) || uint32(dirTypes[t]) != ino.Mode>>12) {
		d.fault(who, at(), "file type %d in the directory, but mode %#o", t, ino.Mode)
	}
	fresh := d.firstSeen(who, &ino)
	if ino.IsDir() {
		d.subs++
		if !fresh {
			d.fault(who, at(), "a directory that has another name already: a loop, or a hard link")
			return
		}
		d.dirs = append(d.dirs, &dirNode{nid, name, d.node})
		return
	}
	d.countLink(who, &ino, fresh)
}

// countLink keeps count of the names of an inode that is no directory.
func (c *checker) countLink(who *owner, ino *Inode, fresh bool) {
	if fresh && ino.Nlink == 1 {
		return // as nearly always
	}
	left := c.links.at(ino.Nid)
	switch {
	case fresh && ino.Nlink > 1:
		*left = ino.Nlink - 1
		if len(c.linkPaths) < maxLinkPaths {
			f := &Fault{}
			who.own(f)
			c.linkPaths[ino.Nid] = f.Path
		}
	case *left == 0:
		c.fault(who, c.im.locate(ino.Nid), "link count %d, which this name exceeds", ino.Nlink)
	default:
		if *left--; *left == 0 {
			delete(c.linkPaths, ino.Nid)
		}
	}
}
