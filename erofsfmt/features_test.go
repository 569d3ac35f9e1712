package erofsfmt

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
)

// Everything that the format has, in words that a census finds in an image.
var formatFeatures = []string{
	"lz4 with zero padding", "lz4 without zero padding", "lzma", "deflate", "zstd", "two algorithms in one file",
	"full index", "compact index, 4 byte packs", "compact index, 2 byte packs", "lclusters of more than a block",
	"pclusters of more than a block", "pclusters of 1 MiB", "HEAD2", "block count after a head",
	"a tail after the index", "a tail in the packed inode", "a whole file in the packed inode", "a partial reference",
	"plain pcluster, interlaced", "plain pcluster, shifted",
	"records of 4 bytes", "records of 8 bytes", "records of 16 bytes", "records of 32 bytes",
	"48bit", "an address beyond 2^32 blocks", "metabox", "compressed metabox", "metadata zone", "compressed directory", "dot omitted",
	"plain layout", "inline layout", "chunks by block map", "chunks by index", "a hole in a chunk map", "a hole by Z_EROFS_LI_HOLE",
	"a hole by a pcluster of 0 blocks", "a hole by a record", "a plain file that is a hole",
	"data on a given device", "data on a flat device",
	"blocks of 512 bytes", "blocks of 1024 bytes", "blocks of 2048 bytes", "blocks of 4096 bytes", "blocks of 8192 bytes",
	"blocks of 16384 bytes", "blocks of 32768 bytes", "blocks of 65536 bytes",
	"xattr prefixes in the image", "xattr prefixes in the packed inode", "xattr prefixes in the metabox",
	"shared xattrs", "shared xattrs in the metabox", "xattr name filter",
	"compact inode", "extended inode", "nid 0", "a time before 1970", "a time beyond 32 bits", "nanoseconds", "ids of 32 bits",
}

// TestFormatFeatures has an image for each. With -v it says which: the tests of
// the corpus and of the images made by hand compare these with the kernel.
func TestFormatFeatures(t *testing.T) {
	found := map[string][]string{}
	count := func(name string, im *Image) {
		c := census{t: t, im: im, seen: map[string]bool{}}
		c.image()
		for f := range c.seen {
			found[f] = append(found[f], name)
		}
	}
	for _, c := range corpus.Images(t) {
		count(c.Name, openCorpus(t, c))
	}
	for _, h := range handmadeImages(t) {
		var o Options
		for _, d := range h.devices {
			o.Devices = append(o.Devices, memory(d))
		}
		im, _ := h.fake.open(t, o)
		count("by hand: "+h.name, im)
	}
	for _, f := range formatFeatures {
		if len(found[f]) == 0 {
			t.Errorf("no image has: %s", f)
		}
		t.Logf("%-40s %3d images: %s", f, len(found[f]), strings.Join(found[f][:min(3, len(found[f]))], "; "))
		delete(found, f)
	}
	for f := range found {
		t.Errorf("not in the list: %s", f)
	}
}

// A census notes what an image uses.
type census struct {
	t    *testing.T
	im   *Image
	seen map[string]bool
}

func (c *census) note(yes bool, format string, args ...any) {
	if yes {
		c.seen[fmt.Sprintf(format, args...)] = true
	}
}

func (c *census) image() {
	sb := c.im.sb
	c.note(true, "blocks of %d bytes", sb.BlockSize())
	c.note(sb.incompat(ondisk.Incompat48Bit), "48bit")
	c.note(sb.incompat(ondisk.IncompatMetabox), "metabox")
	c.note(sb.MetaBlkaddr != 0, "metadata zone")
	c.note(sb.xattrFilter, "xattr name filter")
	if sb.incompat(ondisk.IncompatXattrPrefixes) && sb.xattrPrefixCount > 0 {
		c.note(true, "xattr prefixes in the %s", map[int]string{0: "image", inPacked: "packed inode", inMetabox: "metabox"}[c.im.prefixSource()])
	}
	if sb.incompat(ondisk.IncompatMetabox) {
		box, err := c.im.metaboxInode(context.Background())
		if err != nil {
			c.t.Fatal(err)
		}
		c.note(box.layout == compact || box.layout == full, "compressed metabox")
	}
	visit(c.t, c.im, func(name string, ino *Inode) {
		if err := c.inode(ino); err != nil {
			c.t.Errorf("%q: %v", name, err)
		}
	})
}

func (c *census) inode(ino *Inode) error {
	c.note(ino.headSize == ondisk.InodeCompactSize, "compact inode")
	c.note(ino.headSize == ondisk.InodeExtendedSize, "extended inode")
	c.note(ino.Nid == 0, "nid 0")
	c.note(ino.Mtime < 0, "a time before 1970")
	c.note(ino.Mtime>>32 > 0, "a time beyond 32 bits")
	c.note(ino.MtimeNsec != 0, "nanoseconds")
	c.note(ino.UID > 65535 && ino.GID > 65535, "ids of 32 bits")
	c.note(ino.dotOmitted, "dot omitted")
	if ino.xattrSize > ondisk.XattrHeaderSize {
		m := metaReader{im: c.im}
		h, err := m.bytes(context.Background(), c.im.metaAt(ino, int64(ino.headSize)), ondisk.XattrHeaderSize)
		if err != nil {
			return err
		}
		c.note(h[4] > 0 && !c.im.sb.compat(ondisk.CompatSharedEAInMetabox), "shared xattrs")
		c.note(h[4] > 0 && c.im.sb.compat(ondisk.CompatSharedEAInMetabox), "shared xattrs in the metabox")
	}
	if kind := ino.Mode & modeType; ino.Size == 0 || kind != modeReg && kind != modeDir && kind != modeLnk {
		return nil
	}
	m := c.im.mapper(ino)
	defer m.release()
	zipped := ino.layout == full || ino.layout == compact
	c.note(ino.layout == ondisk.LayoutPlain, "plain layout")
	c.note(ino.layout == ondisk.LayoutPlain && ino.startBlk == ondisk.NullAddr, "a plain file that is a hole")
	c.note(ino.layout == ondisk.LayoutInline, "inline layout")
	c.note(ino.layout == ondisk.LayoutChunk && ino.chunkFmt&ondisk.ChunkIndexes == 0, "chunks by block map")
	c.note(ino.layout == ondisk.LayoutChunk && ino.chunkFmt&ondisk.ChunkIndexes != 0, "chunks by index")
	c.note(zipped && ino.IsDir(), "compressed directory")
	if err := c.extents(m, zipped); err != nil {
		return err
	}
	if zipped {
		return c.index(m)
	}
	return nil
}

// extents notes what the extents of a file are.
func (c *census) extents(m *mapper, zipped bool) error {
	algs := map[uint8]bool{}
	for off := int64(0); off < m.ino.Size; {
		e, err := m.extentAt(context.Background(), off)
		if err != nil {
			return err
		}
		off = e.end()
		c.note(e.kind == hole && m.ino.layout == ondisk.LayoutChunk, "a hole in a chunk map")
		c.note(e.kind == hole && zipped && !m.indexed(), "a hole by a record")
		c.note(e.kind != hole && e.at.src == 0 && e.at.off>>12 >= 1<<32, "an address beyond 2^32 blocks")
		c.note(e.kind != hole && e.at.src > 0, "data on a given device")
		c.note(e.kind != hole && e.at.src == 0 && len(c.im.sb.Devices) > 0 && len(c.im.sources) == 1 && e.at.off > 0, "data on a flat device")
		c.note(e.at.src == inPacked && m.z.tailHead != 0, "a tail in the packed inode")
		c.note(e.at.src == inPacked && m.z.tailHead == 0, "a whole file in the packed inode")
		if e.kind != encoded {
			inter := zipped && m.z.is(ondisk.AdviseInterlaced)
			c.note(zipped && e.kind == stored && e.at.src >= 0 && inter, "plain pcluster, interlaced")
			c.note(zipped && e.kind == stored && e.at.src >= 0 && !inter, "plain pcluster, shifted")
			continue
		}
		algs[e.alg] = true
		c.note(e.alg == ondisk.AlgLz4 && c.im.sb.lz4ZeroPadded, "lz4 with zero padding")
		c.note(e.alg == ondisk.AlgLz4 && !c.im.sb.lz4ZeroPadded, "lz4 without zero padding")
		c.note(e.alg != ondisk.AlgLz4, "%s", algNames[e.alg])
		c.note(e.partial, "a partial reference")
		c.note(e.plen > c.im.sb.BlockSize(), "pclusters of more than a block")
		c.note(e.plen == ondisk.MaxPcluster, "pclusters of 1 MiB")
		c.note(m.z.inlineLen != 0 && e.at == m.z.inlineAt, "a tail after the index")
	}
	c.note(len(algs) > 1, "two algorithms in one file")
	return nil
}

// index notes in which form a compressed file says where its extents are.
func (c *census) index(m *mapper) error {
	if m.z.bits == 0 {
		return nil // the whole file is a fragment
	}
	if !m.indexed() {
		c.note(true, "records of %d bytes", 4<<(m.z.advise>>ondisk.AdviseRecordBit&ondisk.AdviseRecordMask))
		return nil
	}
	c.note(m.ino.layout == full, "full index")
	c.note(m.z.bits > uint(c.im.sb.BlockBits), "lclusters of more than a block")
	for lcn := int64(0); lcn<<m.z.bits < m.ino.Size; lcn++ {
		l, err := m.lcluster(context.Background(), lcn)
		if err != nil {
			return err
		}
		c.note(l.typ == ondisk.LclusterHead2, "HEAD2")
		c.note(l.hole, "a hole by Z_EROFS_LI_HOLE")
		c.note(l.hasBlks && l.blks > 0, "block count after a head")
		c.note(l.hasBlks && l.blks == 0 && !m.z.fragment, "a hole by a pcluster of 0 blocks")
		if m.ino.layout == compact {
			p, _, _, err := m.compactPack(context.Background(), lcn)
			if err != nil {
				return err
			}
			c.note(true, "compact index, %d byte packs", map[int]int{2: 4, ondisk.CompactPackCount2: 2}[p.count])
		}
	}
	return nil
}

// The words of the list are all different.
func TestFeaturesAreDifferent(t *testing.T) {
	words := slices.Sorted(slices.Values(formatFeatures))
	if len(slices.Compact(words)) != len(formatFeatures) {
		t.Error("a feature is listed twice")
	}
}
