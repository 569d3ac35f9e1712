package erofsfmt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// Positions of a directory's entries: "." and ".." come first, the others in the
// order of the bytes of their names. A position says which entry of which layer it
// is behind, so that the name of that tells where each layer goes on:
//
//	0 | afterDot | afterDotDot | layer in bits 62 … 54, byte in the layer's directory + afterDotDot + 1
const (
	afterDot    = 1
	afterDotDot = 2
	afterEntry  = 3
)

func (u *union) readDir(ctx context.Context, dir *Inode, pos int64, fn func(Dirent) bool) error {
	if !dir.IsDir() {
		return fmt.Errorf("erofs: nid %d is not a directory: mode %#o", uint64(dir.Nid), dir.Mode)
	}
	if pos < 0 {
		return fmt.Errorf("erofs: nid %d: directory position %d", uint64(dir.Nid), pos)
	}
	s, err := u.stack(ctx, dir.Nid)
	if err != nil {
		return err
	}
	if pos < afterDot && !fn(Dirent{Name: ".", Nid: dir.Nid, Type: DT_DIR, Next: afterDot}) {
		return nil
	}
	if pos < afterDotDot {
		parent, err := u.parent(ctx, dir.Nid)
		if err != nil {
			return err
		}
		if !fn(Dirent{Name: "..", Nid: parent, Type: DT_DIR, Next: afterDotDot}) {
			return nil
		}
	}
	m := merger{u: u}
	defer m.close()
	if err := m.open(ctx, s, pos); err != nil {
		return err
	}
	return m.walk(ctx, fn)
}

// A merger walks the directories of a stack side by side.
type merger struct {
	u       *union
	cursors []*cursor // the topmost first
}

func (m *merger) close() {
	for _, c := range m.cursors {
		c.r.m.release()
	}
}

// open places a cursor in each directory behind a position.
func (m *merger) open(ctx context.Context, s []dirAt, pos int64) error {
	for i := range s {
		d := &s[i]
		r, err := m.u.layers[d.layer].newDirReader(&d.ino)
		if err != nil {
			return err
		}
		c := &cursor{layer: d.layer, r: r}
		m.cursors = append(m.cursors, c)
		if d.ino.Size >= maxNid-afterEntry {
			return m.u.located(r.m.im, r.m.im.locate(d.ino.Nid).corrupt("nid %d: a directory of %d bytes", uint64(d.ino.Nid), d.ino.Size))
		}
	}
	after, err := m.nameAt(ctx, pos)
	if err != nil {
		return err
	}
	for _, c := range m.cursors {
		if err := c.seek(ctx, after); err != nil {
			return m.u.numbered(c.layer, c.failed(err))
		}
	}
	return nil
}

// nameAt is the name that a position is behind; the empty one is before all others.
func (m *merger) nameAt(ctx context.Context, pos int64) ([]byte, error) {
	if pos < afterEntry {
		return nil, nil
	}
	layer, at := int(pos>>layerShift), pos&maxNid-afterEntry
	for _, c := range m.cursors {
		if c.layer != layer {
			continue
		}
		name, err := c.nameAt(ctx, at)
		if err != nil && !errors.Is(err, fs.ErrInvalid) {
			err = m.u.numbered(layer, c.failed(err))
		}
		return name, err
	}
	return nil, fmt.Errorf("erofs: directory position %d: %w", pos, fs.ErrInvalid)
}

func (m *merger) walk(ctx context.Context, fn func(Dirent) bool) error {
	for {
		var first *cursor
		for _, c := range m.cursors {
			if c.name != nil && (first == nil || bytes.Compare(c.name, first.name) < 0) {
				first = c
			}
		}
		if first == nil {
			return nil
		}
		e, shown, err := m.entry(ctx, first)
		if err != nil {
			return m.u.numbered(first.layer, first.failed(err))
		}
		if shown && !fn(e) {
			return nil
		}
		if err := m.pass(ctx, []byte(e.Name)); err != nil {
			return err
		}
	}
}

// entry is where a cursor is, and whether it is something.
func (m *merger) entry(ctx context.Context, c *cursor) (Dirent, bool, error) {
	e := Dirent{Name: string(c.name), Nid: m.u.nid(c.layer, Nid(c.d.Nid)), Type: c.dirType(), Next: int64(c.layer)<<layerShift | (c.at + afterEntry)}
	if e.Type != DT_CHR && e.Type != DT_UNKNOWN {
		return e, true, nil
	}
	ino, err := m.u.layers[c.layer].Inode(ctx, Nid(c.d.Nid))
	if errors.Is(err, ErrCorrupt) || errors.Is(err, ErrUnsupported) {
		return e, true, nil // who looks at it is told
	}
	return e, !ino.whiteout(), err
}

// pass moves on all cursors that are at a name.
func (m *merger) pass(ctx context.Context, name []byte) error {
	for _, c := range m.cursors {
		if c.name == nil || !bytes.Equal(c.name, name) {
			continue
		}
		if err := c.next(ctx); err != nil {
			return m.u.numbered(c.layer, c.failed(err))
		}
	}
	return nil
}

// A cursor is at an entry of one directory. Names have to ascend, or a walk in
// several requests might not come to an end.
type cursor struct {
	layer int
	r     dirReader
	block dirBlock
	start int64 // of block, in the directory
	i     int   // the next entry of block

	d    ondisk.Dirent
	at   int64  // of d, in the directory
	name []byte // of d; nil at the end
	last []byte // the name before it
}

func (c *cursor) dirType() uint8 {
	if int(c.d.FileType) < len(dirTypes) {
		return dirTypes[c.d.FileType]
	}
	return DT_UNKNOWN
}

func (c *cursor) failed(err error) error {
	return fmt.Errorf("nid %d: %w", uint64(c.r.m.ino.Nid), err)
}

// load makes the block that begins at start the current one.
func (c *cursor) load(ctx context.Context, start int64) (err error) {
	c.block, err = c.r.block(ctx, start>>c.r.m.im.sb.BlockBits)
	c.start, c.i = start, 0
	return err
}

// nameAt is the name of the entry at a byte of the directory.
func (c *cursor) nameAt(ctx context.Context, at int64) ([]byte, error) {
	start := at &^ (c.r.m.im.sb.BlockSize() - 1)
	i := int(at-start) / ondisk.DirentSize
	invalid := fmt.Errorf("erofs: nid %d: no entry at %d: %w", uint64(c.r.m.ino.Nid), at, fs.ErrInvalid)
	if at < 0 || at >= c.r.m.ino.Size || int(at-start)%ondisk.DirentSize != 0 {
		return nil, invalid
	}
	if err := c.load(ctx, start); err != nil {
		return nil, err
	}
	if i >= c.block.n {
		return nil, invalid
	}
	_, name, err := c.block.entry(i)
	return bytes.Clone(name), err
}

// seek goes to the first entry whose name is above after, by halving like lookup.
func (c *cursor) seek(ctx context.Context, after []byte) error {
	bs := c.r.m.im.sb.BlockSize()
	lo, hi := int64(0), (c.r.m.ino.Size+bs-1)>>c.r.m.im.sb.BlockBits
	for len(after) > 0 && lo < hi {
		mid := lo + (hi-lo)/2
		b, err := c.r.block(ctx, mid)
		if err != nil {
			return err
		}
		_, first, err := b.entry(0)
		if err != nil {
			return fmt.Errorf("block %d: %w", mid, err)
		}
		if bytes.Compare(first, after) > 0 {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	// The block before the first that is wholly above it may have some, too.
	c.last = after
	if c.start = max(0, lo-1) * bs; c.start >= c.r.m.ino.Size {
		return nil
	}
	if err := c.load(ctx, c.start); err != nil {
		return err
	}
	for from, to := 0, c.block.n; len(after) > 0 && from < to; c.i = from {
		mid := from + (to-from)/2
		_, name, err := c.block.entry(mid)
		if err != nil {
			return err
		}
		if bytes.Compare(name, after) > 0 {
			to = mid
		} else {
			from = mid + 1
		}
	}
	return c.next(ctx)
}

// next goes to the next entry that is neither "." nor "..".
func (c *cursor) next(ctx context.Context) error {
	if c.name != nil {
		c.last = append(c.last[:0:0], c.name...)
		c.name = nil
	}
	for {
		if c.i == c.block.n {
			start := c.start + c.r.m.im.sb.BlockSize()
			if start >= c.r.m.ino.Size {
				return nil
			}
			if err := c.load(ctx, start); err != nil {
				return err
			}
		}
		d, name, err := c.block.entry(c.i)
		if err != nil {
			return fmt.Errorf("block %d: %w", c.start>>c.r.m.im.sb.BlockBits, err)
		}
		c.d, c.at = d, c.start+int64(c.i)*ondisk.DirentSize
		c.i++
		if string(name) == "." || string(name) == ".." {
			continue
		}
		if bytes.Compare(name, c.last) <= 0 {
			return nowhere.corrupt("%.40q comes after %.40q in a directory", name, c.last)
		}
		c.name = name
		return nil
	}
}
