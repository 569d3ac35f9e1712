package erofsfmt

import (
	"context"
	"fmt"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// The type bits of Inode.Mode, which are the same on disk and in POSIX.
const (
	modeType = 0o170000
	modeFifo = 0o010000
	modeChr  = 0o020000
	modeDir  = 0o040000
	modeBlk  = 0o060000
	modeReg  = 0o100000
	modeLnk  = 0o120000
	modeSock = 0o140000
)

// An Inode is what an image says of one file. It is a value: it may be kept
// and copied, and refers to nothing.
type Inode struct {
	Nid       Nid
	Ino       uint64 // st_ino
	Mode      uint32 // st_mode: type, set-id, sticky and permission bits
	UID       uint32
	GID       uint32
	Nlink     uint32
	Size      int64
	Mtime     int64 // seconds since 1970, which may be negative
	MtimeNsec uint32
	Rdev      uint32 // of a device, as Linux encodes it
	Blocks    uint64 // st_blocks, of 512 bytes

	startBlk   uint64 // where plain and inline data begin; ondisk.NullAddr: a hole
	xattrSize  uint32
	chunkFmt   uint16
	layout     uint8
	headSize   uint8 // of the inode itself
	dotOmitted bool
}

// IsDir says whether the inode is a directory.
func (ino *Inode) IsDir() bool { return ino.Mode&modeType == modeDir }

// HasXattrs is false where the inode certainly has no extended attributes.
func (ino *Inode) HasXattrs() bool { return ino.xattrSize != 0 }

// Major is the major number of a device.
func (ino *Inode) Major() uint32 { return ino.Rdev >> 8 & 0xfff }

// Minor is the minor number of a device.
func (ino *Inode) Minor() uint32 { return ino.Rdev&0xff | ino.Rdev>>12&0xfff00 }

// Ino is the st_ino of a nid: the nid itself, or, where there is a metabox, a
// number with the metabox bit at 31, so that small ones stay small
// (fs/erofs/internal.h erofs_nid_to_ino64).
func (im *Image) Ino(nid Nid) uint64 {
	if im.union != nil {
		return im.union.ino(nid)
	}
	n := uint64(nid)
	if !im.sb.incompat(ondisk.IncompatMetabox) {
		return n
	}
	return n<<1&^0xffffffff | n&0x7fffffff | n>>63<<31
}

// locate says where an inode lies.
func (im *Image) locate(nid Nid) place {
	n := uint64(nid) &^ ondisk.MetaboxBit
	off := farAway
	if n < uint64(farAway)/ondisk.InodeSlot {
		off = int64(n) * ondisk.InodeSlot
	}
	if nid.inMetabox() {
		return place{inMetabox, off}
	}
	return place{0, off + int64(im.sb.MetaBlkaddr)<<im.sb.BlockBits}
}

// metaAt is the place n bytes after the beginning of the inode.
func (im *Image) metaAt(ino *Inode, n int64) place { return im.locate(ino.Nid).plus(n) }

// bodyAt is the place after the inode and its xattrs, where its inline data or
// its index begins, rounded up.
func (im *Image) bodyAt(ino *Inode, align int64) place {
	at := im.metaAt(ino, int64(ino.headSize)+int64(ino.xattrSize))
	at.off = (at.off + align - 1) &^ (align - 1)
	return at
}

// Inode reads an inode.
func (im *Image) Inode(ctx context.Context, nid Nid) (Inode, error) {
	if im.union != nil {
		return im.union.inode(ctx, nid)
	}
	ino, err := im.readInode(ctx, nid)
	if err != nil {
		return Inode{}, fmt.Errorf("nid %d: %w", uint64(nid), err)
	}
	return ino, nil
}

// readInode follows fs/erofs/inode.c erofs_read_inode.
func (im *Image) readInode(ctx context.Context, nid Nid) (Inode, error) {
	m := metaReader{im: im}
	at := im.locate(nid)
	b, err := m.bytes(ctx, at, ondisk.InodeCompactSize)
	if err != nil {
		return Inode{}, err
	}
	ino := Inode{Nid: nid, Ino: im.Ino(nid)}
	format := uint16(b[0]) | uint16(b[1])<<8
	if extra := format &^ ondisk.FormatAll; extra != 0 {
		return ino, at.unsupported("inode format bits %#x", extra)
	}
	ino.layout = uint8(format >> ondisk.FormatLayoutBit & ondisk.FormatLayoutMask)
	if ino.layout > ondisk.LayoutChunk {
		return ino, at.unsupported("data layout %d", ino.layout)
	}
	var u uint64
	mask := uint64(1)<<48 - 1
	if format&ondisk.FormatExtended != 0 {
		if b, err = m.bytes(ctx, at, ondisk.InodeExtendedSize); err != nil {
			return ino, err
		}
		d := ondisk.DecodeInodeExtended(b)
		u = uint64(d.U) | uint64(d.Nb)<<32
		if d.Size > uint64(farAway) {
			return ino, at.corrupt("size %d", d.Size)
		}
		ino.setExtended(&d)
	} else {
		d := ondisk.DecodeInodeCompact(b)
		u = uint64(d.U)
		if d.Mode&modeType != modeDir && format&ondisk.FormatNlink1 != 0 {
			u |= uint64(d.Nb) << 32
			d.Nb = 1
		} else {
			mask = 1<<32 - 1
		}
		ino.setCompact(&d, &im.sb)
	}
	return ino, im.setData(&ino, at, u, mask, format)
}

func (ino *Inode) setExtended(d *ondisk.InodeExtended) {
	ino.headSize = ondisk.InodeExtendedSize
	ino.Mode, ino.UID, ino.GID, ino.Nlink = uint32(d.Mode), d.UID, d.GID, d.Nlink
	ino.Size, ino.Mtime, ino.MtimeNsec = int64(d.Size), d.Mtime, d.MtimeNsec
	ino.xattrSize = xattrSize(d.XattrIcount)
}

// setCompact is for a d whose Nb is the link count.
func (ino *Inode) setCompact(d *ondisk.InodeCompact, sb *Superblock) {
	ino.headSize = ondisk.InodeCompactSize
	ino.Mode, ino.UID, ino.GID, ino.Nlink = uint32(d.Mode), uint32(d.UID), uint32(d.GID), uint32(d.Nb)
	ino.Size, ino.Mtime, ino.MtimeNsec = int64(d.Size), sb.Epoch+int64(d.Mtime), sb.FixedNsec
	ino.xattrSize = xattrSize(d.XattrIcount)
}

// xattrSize turns the inode's count, which is one of 4 byte units after a
// header of 12 bytes, into bytes.
func xattrSize(icount uint16) uint32 {
	if icount == 0 {
		return 0
	}
	return ondisk.XattrHeaderSize + 4*uint32(icount-1)
}

// setData sets what depends on the file type. u is the union of the inode with
// its high bits, of which mask are there.
func (im *Image) setData(ino *Inode, at place, u, mask uint64, format uint16) error {
	ino.Blocks = uint64(ino.Size+im.sb.BlockSize()-1) >> im.sb.BlockBits << (im.sb.BlockBits - 9)
	switch ino.Mode & modeType {
	case modeReg, modeLnk:
	case modeDir:
		ino.dotOmitted = format&ondisk.FormatDotOmitted != 0
	case modeChr, modeBlk:
		ino.Rdev = uint32(u)
		return nil
	case modeFifo, modeSock:
		return nil
	default:
		return at.corrupt("mode %#o", ino.Mode)
	}
	switch ino.layout {
	case ondisk.LayoutCompressedFull, ondisk.LayoutCompressedCompact:
		if im.sb.ComprAlgs == 0 {
			return at.corrupt("compressed, but the image has no algorithm")
		}
		ino.Blocks = u << (im.sb.BlockBits - 9)
	case ondisk.LayoutChunk:
		if extra := uint16(u) &^ ondisk.ChunkAll; extra != 0 {
			return at.unsupported("chunk format bits %#x", extra)
		}
		ino.chunkFmt = uint16(u)
	default:
		ino.startBlk = u
		if ino.layout == ondisk.LayoutPlain && u&mask == mask {
			ino.startBlk = ondisk.NullAddr
		}
	}
	return nil
}
