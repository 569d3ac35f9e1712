package erofsfmt

import (
	"context"
	"errors"
	"io"
	"math"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// run checks everything, and closes the channels when it is done.
func (c *checker) run() {
	defer close(c.order)
	defer close(c.work)
	if c.open() {
		sb := &c.im.sb
		c.superblock(sb)
		if sb.incompat(ondisk.IncompatFragments) && sb.PackedNid != 0 {
			c.special(packedName, sb.PackedNid, c.im.packedInode)
		}
		if sb.incompat(ondisk.IncompatMetabox) {
			c.special("metabox", sb.MetaboxNid, c.im.metaboxInode)
		}
		c.walk()
		c.finish()
	}
	c.flush()
}

// open opens the image, if need be without its checksum.
func (c *checker) open() bool {
	var err error
	c.im, err = OpenWith(c.ctx, c.src, c.o.Options)
	if errors.Is(err, ErrCorrupt) {
		im, again := OpenWith(c.ctx, unsummed{c.src}, c.o.Options)
		if again == nil || again.Error() != err.Error() {
			c.stats.Checksum = true
			c.failed(nil, superAt, err)
			c.im, err = im, again
		}
	}
	if errors.Is(err, ErrNotErofs) {
		c.batch.err = err
		return false
	}
	if err != nil {
		c.failed(nil, superAt, err)
		return false
	}
	c.meta.im = c.im
	c.linkPaths = map[Nid]string{}
	c.space = make([]blockMap, len(c.im.sources))
	return true
}

// unsummed is an image that says it has no checksum.
type unsummed struct{ ReaderAt }

func (u unsummed) ReadAt(ctx context.Context, p []byte, off int64) error {
	err := u.ReaderAt.ReadAt(ctx, p, off)
	const at = ondisk.SuperOffset + 8 // of FeatureCompat
	if err == nil && off <= at && at-off < int64(len(p)) {
		p[at-off] &^= ondisk.CompatSbChksum
	}
	return err
}

// superblock checks what the superblock says of the image as a whole.
func (c *checker) superblock(sb *Superblock) {
	c.stats.Announced = int64(min(sb.Inodes, uint64(farAway)))
	c.stats.Checksum = c.stats.Checksum || sb.compat(ondisk.CompatSbChksum)
	if sb.FixedNsec >= 1e9 {
		c.fault(nil, superAt, "%d nanoseconds in the time of its inodes", sb.FixedNsec)
	}
	for i, src := range c.im.sources {
		blocks := sb.Blocks
		if i > 0 {
			blocks = sb.Devices[i-1].Blocks
		}
		if want := c.im.blockOff(blocks); want > src.Size() {
			c.fault(nil, place{i, src.Size()}, "the end of what should be %d blocks, %d bytes", blocks, want)
		}
	}
	c.space[0].mark(c.ctx, ondisk.SuperOffset>>sb.BlockBits, (ondisk.SuperOffset+sb.size-1)>>sb.BlockBits, useMeta)
	prefixes, err := c.im.longPrefixes(c.ctx)
	if err != nil {
		c.failed(nil, place{c.im.prefixSource(), sb.xattrPrefixStart}, err)
	}
	for i, p := range prefixes {
		if !knownXattr(p.base) && p.base != 0 { // 0: names that builders keep for themselves
			c.fault(nil, place{c.im.prefixSource(), sb.xattrPrefixStart}, "long xattr prefix %d builds on %d, which means nothing", i, p.base)
		}
	}
}

const packedName = "packed inode"

// special checks an inode that holds the data of others.
func (c *checker) special(name string, nid Nid, get func(context.Context) (*Inode, error)) {
	who := &owner{nid: nid, name: name}
	ino, err := get(c.ctx)
	if err != nil {
		c.failed(who, c.im.locate(nid), err)
		c.hidden, c.noPacked = true, c.noPacked || name == packedName
		return
	}
	c.firstSeen(who, ino)
}

// finish checks what is known only when all has been seen.
func (c *checker) finish() {
	c.links.all(func(nid Nid, left uint32) {
		who := &owner{nid: nid, name: c.linkPaths[nid]}
		ino, err := c.im.Inode(c.ctx, nid)
		switch {
		case err != nil:
			c.failed(who, c.im.locate(nid), err)
		case !c.hidden:
			c.fault(who, c.im.locate(nid), "link count %d, but only %d of the names were found", ino.Nlink, ino.Nlink-left)
		}
	})
	// It may count more: an image that was changed in place keeps what has no name.
	if sb := &c.im.sb; sb.Inodes < uint64(c.stats.Inodes) {
		c.fault(nil, superAt, "the superblock counts %d inodes, %d were found", sb.Inodes, c.stats.Inodes)
	}
}

// progressInodes is after how many inodes Progress is told, whatever was found.
const progressInodes = 4096

// firstSeen checks an inode unless that was done. It says whether it was not.
func (c *checker) firstSeen(who *owner, ino *Inode) bool {
	at := c.im.locate(ino.Nid)
	if !c.seen.add(at, at.off+1) {
		return false
	}
	if c.stats.Inodes++; c.stats.Inodes%progressInodes == 0 {
		c.flush()
	}
	if ino.MtimeNsec >= 1e9 {
		c.fault(who, at, "%d nanoseconds in its time", ino.MtimeNsec)
	}
	m := c.im.mapper(ino)
	defer m.release()
	whole := c.metadata(who, m)
	c.xattrs(who, ino)
	if ino.Mode&modeType == modeLnk {
		if _, err := c.im.Readlink(c.ctx, ino); err != nil {
			c.failed(who, at, err)
			return true
		}
	}
	if whole && ino.hasData() {
		c.data(who, m)
	}
	return true
}

// metadata checks where the inode is and what belongs to it. It says whether
// that is all there.
func (c *checker) metadata(who *owner, m *mapper) bool {
	at := c.im.locate(m.ino.Nid)
	end, err := m.metadataEnd(c.ctx)
	if err != nil {
		c.failed(who, at, err)
		return false
	}
	size, err := c.im.metaSize(c.ctx, at.src)
	if err != nil {
		c.failed(who, at, err)
		return false
	}
	if end.off > size {
		c.fault(who, at, "metadata up to %d, past the end, which is at %d", end.off, size)
		return false
	}
	if !c.taken.add(at, end.off) {
		c.fault(who, at, "metadata up to %d, and another inode's is among it", end.off)
	}
	if at.src == 0 {
		c.mark(who, at, end.off-at.off, useMeta)
	}
	return true
}

// mark notes what bytes of a source are for. known says that they were noted
// before.
func (c *checker) mark(who *owner, at place, n int64, u use) (known bool) {
	bits := c.im.sb.BlockBits
	known, clash := c.space[at.src].mark(c.ctx, at.off>>bits, (at.off+n-1)>>bits, u)
	if clash >= 0 {
		c.fault(who, place{at.src, max(at.off, clash<<bits)}, "%v where there is %v", u, *c.space[at.src].at(clash)&useMask)
	}
	return known
}

// data maps all of a file, and has what regular files hold verified: directories
// and symbolic links are read anyway.
func (c *checker) data(who *owner, m *mapper) {
	verify := m.ino.Mode&modeType == modeReg
	if verify && who.dir != nil { // not what holds the data of others
		c.stats.Bytes = int64(min(uint64(c.stats.Bytes)+uint64(m.ino.Size), math.MaxInt64))
	}
	at := c.im.locate(m.ino.Nid)
	last := "" // the same is said of each lcluster of an extent
	failed := func(err error) {
		if s := err.Error(); s != last {
			last = s
			c.failed(who, at, err)
		}
	}
	for off, bad := int64(0), 0; off < m.ino.Size && bad < maxBadBlocks && c.ctx.Err() == nil; {
		e, err := m.extentAt(c.ctx, off)
		if err == nil {
			c.extent(who, m, e, verify)
			off = e.end()
			if err := m.sameInside(c.ctx, &e); err != nil {
				bad++
				failed(err)
			}
			continue
		}
		bad++
		failed(err)
		unit := m.unit()
		if unit == 0 || errors.Is(err, io.ErrUnexpectedEOF) {
			return
		}
		off = (off/unit + 1) * unit
	}
}

// sameInside looks for an extent from the beginning of every lcluster in it: in
// order, a file is read from heads alone, but a random read begins anywhere.
func (m *mapper) sameInside(ctx context.Context, e *extent) error {
	unit := m.unit()
	if unit == 0 || e.kind == hole {
		return nil
	}
	for off := (e.la/unit + 1) * unit; off < e.end(); off += unit {
		inner, err := m.extentAt(ctx, off)
		if err == nil && inner != *e {
			err = m.z.start.corrupt("byte %d of the file leads to an extent at %d of %d bytes, which is at %d of %d bytes",
				off, inner.la, inner.llen, e.la, e.llen)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// extent checks where an extent is, and has it verified.
func (c *checker) extent(who *owner, m *mapper, e extent, verify bool) {
	if e.kind == hole {
		return
	}
	if e.at.src == inPacked && c.noPacked {
		return // that is known
	}
	n := e.plen
	if e.kind == stored {
		n = e.llen
	}
	size, err := c.im.sizeOf(c.ctx, e.at.src)
	if err != nil {
		c.failed(who, e.at, err)
		return
	}
	if e.at.off < 0 || e.at.off > size-n {
		c.fault(who, e.at, "bytes %d to %d of the file, %d bytes, are past the end, which is at %d", e.la, e.end(), n, size)
		return
	}
	if e.at.src == inPacked {
		return // it is checked itself
	}
	known := false
	if u := m.useOf(&e); u != useMeta {
		known = c.mark(who, e.at, n, u)
	}
	if verify && !(known && e.kind == stored) {
		c.add(checkItem{who: who, extent: e})
	}
}

// useOf says what an extent uses its blocks for.
func (m *mapper) useOf(e *extent) use {
	switch l := m.ino.layout; {
	case e.at.src == inMetabox, e.at == m.z.inlineAt && m.z.inlineLen != 0:
		return useMeta // belongs to the inode
	case l == ondisk.LayoutInline && e.at == m.im.bodyAt(m.ino, 1):
		return useMeta
	case l == ondisk.LayoutPlain, l == ondisk.LayoutInline:
		return useFlat
	case l == ondisk.LayoutChunk:
		return useChunk
	case !m.indexed():
		return useRecord
	case e.kind == stored:
		return usePlain
	}
	return usePcluster
}
