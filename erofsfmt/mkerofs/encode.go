package mkerofs

import (
	"encoding/binary"
	"hash/crc32"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// encodeInode writes the inode behind b, without its xattrs.
func (n *node) encodeInode(b []byte) []byte {
	format := uint16(ondisk.LayoutPlain << ondisk.FormatLayoutBit)
	switch {
	case n.encoded():
		format = n.stored.layout() << ondisk.FormatLayoutBit
	case n.chunks > 0:
		format = ondisk.LayoutChunk << ondisk.FormatLayoutBit
	case n.tail > 0:
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

// u is the first block, the number of blocks of compressed data, the format of chunks, or the number of a device as
// include/linux/kdev_t.h new_encode_dev has it.
func (n *node) u() uint32 {
	switch n.Mode & ModeType {
	case ModeChar, ModeBlock:
		return n.Minor&0xff | n.Major<<8 | n.Minor&^0xff<<12
	}
	switch {
	case n.encoded():
		return uint32(n.blocks)
	case n.chunks > 0:
		return uint32(n.chunkBits) | ondisk.ChunkIndexes
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
	var configs []byte
	if z := &b.options.Compression; z.Algorithm != Uncompressed {
		configs = z.describe(&super, b.options.BlockSize)
	}
	l.describeXattrs(&super, b)
	if b.options.ChunkSize > 0 || b.options.MetadataOnly {
		super.FeatureIncompat |= ondisk.IncompatChunkedFile
	}
	if b.packed != nil {
		super.PackedNid = b.packed.nid()
	}
	w.content.Write(super.Append(nil))
	if super.UUID == [16]byte{} {
		super.UUID = deriveUUID(w.content.Sum(nil))
	}
	front := make([]byte, l.metaStart)
	copy(front[ondisk.SuperOffset:], append(super.Append(nil), configs...))
	// fs/erofs/super.c erofs_superblock_csum_verify: CRC-32C to the end of the superblock's block, not inverted at
	// the end, with zeros in the checksum's place.
	sum := ^crc32.Checksum(front[ondisk.SuperOffset:], castagnoli)
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

// describeXattrs puts into the superblock where shared attributes and long prefixes are. The latter have a bit since
// Linux 6.17, without which they would be looked for in the packed inode, if there is one.
func (l *layout) describeXattrs(super *ondisk.Super, b *Builder) {
	for _, n := range l.nodes {
		if len(n.xattrs) > 0 {
			super.FeatureCompat |= ondisk.CompatXattrFilter
		}
	}
	if len(l.shared) > 0 {
		super.XattrBlkaddr = uint32(l.sharedAt >> b.blockBits)
	}
	if len(b.prefixes) > 0 {
		super.FeatureIncompat |= ondisk.IncompatXattrPrefixes
		super.FeatureCompat |= ondisk.CompatPlainXattrPrefixes
		super.XattrPrefixCount = uint8(len(b.prefixes))
		super.XattrPrefixStart = uint32((l.sharedAt + l.prefixes) / 4)
	}
}
