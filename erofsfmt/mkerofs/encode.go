package mkerofs

import (
	"encoding/binary"
	"hash/crc32"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// encodeInode writes the inode behind b, without its xattrs.
func (n *node) encodeInode(b []byte) []byte {
	format := uint16(ondisk.LayoutPlain << ondisk.FormatLayoutBit)
	if n.tail > 0 {
		format = ondisk.LayoutInline << ondisk.FormatLayoutBit
	}
	icount := uint16(0)
	if len(n.xattrs) > 0 {
		icount = uint16((len(n.xattrs)-ondisk.XattrHeaderSize)/4 + 1)
	}
	if n.compact {
		return ondisk.InodeCompact{
			Format: format, XattrIcount: icount, Mode: uint16(n.Mode), Nb: uint16(n.nlink), Size: uint32(n.Size),
			U: n.u(), Ino: n.ino, UID: uint16(n.UID), GID: uint16(n.GID),
		}.Append(b)
	}
	t := n.stamp()
	return ondisk.InodeExtended{
		Format: format | ondisk.FormatExtended, XattrIcount: icount, Mode: uint16(n.Mode), Size: uint64(n.Size),
		U: n.u(), Ino: n.ino, UID: n.UID, GID: n.GID, Mtime: t.sec, MtimeNsec: t.nsec, Nlink: n.nlink,
	}.Append(b)
}

// u is the first block, or the number of a device as include/linux/kdev_t.h new_encode_dev has it.
func (n *node) u() uint32 {
	switch n.Mode & ModeType {
	case ModeChar, ModeBlock:
		return n.Minor&0xff | n.Major<<8 | n.Minor&^0xff<<12
	}
	return n.block
}

// encodeDirents writes a block of a directory behind b, without what fills it up.
func (n *node) encodeDirents(b []byte, names []string) []byte {
	nameOff := ondisk.DirentSize * len(names)
	for _, name := range names {
		c := n.child(name)
		b = ondisk.Dirent{Nid: c.nid(), NameOff: uint16(nameOff), FileType: fileType(c.Mode)}.Append(b)
		nameOff += len(name)
	}
	for _, name := range names {
		b = append(b, name...)
	}
	return b
}

func fileType(mode uint32) uint8 {
	switch mode & ModeType {
	case ModeRegular:
		return ondisk.FtRegular
	case ModeDir:
		return ondisk.FtDir
	case ModeChar:
		return ondisk.FtChrdev
	case ModeBlock:
		return ondisk.FtBlkdev
	case ModeFifo:
		return ondisk.FtFifo
	case ModeSocket:
		return ondisk.FtSock
	default:
		return ondisk.FtSymlink
	}
}

// writeSuper writes all that is in front of the first inode.
func (b *Builder) writeSuper(l *layout, w *writer) error {
	super := ondisk.Super{
		Magic:         ondisk.Magic,
		FeatureCompat: ondisk.CompatSbChksum | ondisk.CompatMtime,
		BlkSzBits:     uint8(b.blockBits),
		RootNid2b:     uint16(l.nodes[0].nid()),
		Inos:          uint64(len(l.nodes)),
		Epoch:         l.epoch.sec,
		FixedNsec:     l.epoch.nsec,
		BlocksLo:      uint32(l.blocks),
		UUID:          b.options.UUID,
	}
	copy(super.VolumeName[:], b.options.Label)
	w.content.Write(super.Append(nil))
	if super.UUID == [16]byte{} {
		super.UUID = deriveUUID(w.content.Sum(nil))
	}
	front := make([]byte, l.metaStart)
	copy(front[ondisk.SuperOffset:], super.Append(nil))
	// fs/erofs/super.c erofs_superblock_csum_verify: CRC-32C to the end of the superblock's block, not inverted at
	// the end, with zeros in the checksum's place.
	sum := ^crc32.Checksum(front[ondisk.SuperOffset:], crc32.MakeTable(crc32.Castagnoli))
	binary.LittleEndian.PutUint32(front[ondisk.SuperOffset+ondisk.ChecksumOffset:], sum)
	_, err := w.to.WriteAt(front, 0)
	return err
}

// deriveUUID makes a UUID of version 8 (RFC 9562, 5.8) from a digest.
func deriveUUID(digest []byte) (uuid [16]byte) {
	copy(uuid[:], digest)
	uuid[6] = uuid[6]&0x0f | 0x80
	uuid[8] = uuid[8]&0x3f | 0x80
	return uuid
}
