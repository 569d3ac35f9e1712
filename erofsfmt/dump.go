package erofsfmt

import (
	"context"
	"math/bits"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// A Stored says how an inode is stored.
type Stored struct {
	Off       int64  // of the inode, in bytes
	In        string // what Off is a byte of, if it is not the image: "metabox"
	Size      int    // of the inode itself: 32 or 64
	Xattrs    int    // bytes after it
	Layout    string // "plain", "compressed full", "inline", "compressed compact" or "chunk"
	Unit      int64  // bytes of a chunk or an lcluster; 0 where the layout has neither
	Record    int    // bytes of an extent record; 0 where there are none
	Flags     []string
	DotHidden bool // a directory that does not store its "."
}

var layoutNames = [...]string{ondisk.LayoutPlain: "plain", ondisk.LayoutCompressedFull: "compressed full", ondisk.LayoutInline: "inline",
	ondisk.LayoutCompressedCompact: "compressed compact", ondisk.LayoutChunk: "chunk"}

// Stored says how an inode is stored.
func (im *Image) Stored(ctx context.Context, ino *Inode) (Stored, error) {
	if im.union != nil {
		return Stored{}, errOneImage
	}
	at := im.locate(ino.Nid)
	s := Stored{
		Off: at.off, In: at.in(), Size: int(ino.headSize), Xattrs: int(ino.xattrSize),
		Layout: layoutNames[ino.layout], DotHidden: ino.dotOmitted,
	}
	m := im.mapper(ino)
	defer m.release()
	switch {
	case !ino.hasData():
		s.Layout = ""
	case ino.layout == ondisk.LayoutChunk:
		s.Unit = m.unit()
		s.Flags = bitNames(uint32(ino.chunkFmt)>>bits.Len(ondisk.ChunkBlkBitsMask), []string{"indexes", "48bit"})
	case ino.compressed() && ino.Size > 0:
		if err := m.readHeader(ctx); err != nil {
			return s, err
		}
		m.describe(&s)
	}
	return s, nil
}

// describe adds what the map header says.
func (m *mapper) describe(s *Stored) {
	names := []string{"compacted_2b", "big_pcluster_1", "big_pcluster_2", "inline_pcluster", "interlaced", "fragment"}
	switch {
	case m.z.bits == 0:
		s.Flags = []string{"whole_file_fragment"}
		return
	case m.indexed():
		s.Unit = 1 << m.z.bits
		s.Flags = bitNames(uint32(m.z.advise), names)
		return
	}
	const length = ondisk.AdviseRecordMask << ondisk.AdviseRecordBit
	names[0] = "extents"
	s.Record = 4 << (m.z.advise & length >> ondisk.AdviseRecordBit)
	s.Flags = bitNames(uint32(m.z.advise&^length), names)
	if s.Record <= 8 {
		s.Unit = 1 << m.z.bits
	}
}

// compressed says whether the inode has one of the compressed layouts.
func (ino *Inode) compressed() bool {
	return ino.layout == ondisk.LayoutCompressedFull || ino.layout == ondisk.LayoutCompressedCompact
}

// An Extent is a run of a file's bytes and where they are.
type Extent struct {
	Off, Len int64  // in the file
	Kind     string // "hole", "stored" or "encoded"

	// Of all but holes:
	PhysOff int64
	PhysLen int64
	Device  int    // 0 is the image itself
	In      string // what PhysOff is a byte of, if it is neither: "packed inode", "metabox"

	// Of those that are encoded:
	Algorithm string
	Partial   bool // the physical bytes decode to more than Len
}

// Extents calls fn with the extents of a file, in order, until it returns false.
// Holes, and stored bytes that lie side by side, are joined.
func (im *Image) Extents(ctx context.Context, ino *Inode, fn func(Extent) bool) error {
	if im.union != nil {
		return errOneImage
	}
	if !ino.hasData() {
		return nil
	}
	m := im.mapper(ino)
	defer m.release()
	var last extent
	for off := int64(0); off < ino.Size; {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		e, err := m.extentAt(ctx, off)
		if err != nil {
			return err
		}
		off = e.end()
		joins := e.kind == last.kind && (e.kind == hole || e.kind == stored && e.at == last.at.plus(last.llen))
		if joins && e.la == last.end() {
			last.llen += e.llen
			continue
		}
		if last.llen != 0 && !fn(last.public()) {
			return nil
		}
		last = e
	}
	if last.llen != 0 {
		fn(last.public())
	}
	return nil
}

func (e *extent) public() Extent {
	x := Extent{Off: e.la, Len: e.llen, Kind: "hole"}
	if e.kind == hole {
		return x
	}
	x.Kind, x.PhysOff, x.PhysLen, x.Device = "stored", e.at.off, e.llen, max(0, e.at.src)
	if e.at.src < 0 {
		x.In = e.at.in()
	}
	if e.kind == encoded {
		x.Kind, x.PhysLen, x.Algorithm, x.Partial = "encoded", e.plen, algNames[e.alg], e.partial
	}
	return x
}

// XattrPrefixes are the image's own long prefixes of xattr names, in order.
func (im *Image) XattrPrefixes(ctx context.Context) ([]string, error) {
	if im.union != nil {
		return nil, errOneImage
	}
	prefixes, err := im.longPrefixes(ctx)
	var names []string
	for _, p := range prefixes {
		names = append(names, basePrefix(p.base)+p.infix)
	}
	return names, err
}
