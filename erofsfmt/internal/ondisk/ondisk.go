// Package ondisk holds the EROFS on-disk structures and constants that the
// reader and the builder share. It knows sizes, offsets and bits; what they
// mean together is the business of its users.
//
// Everything on disk is little-endian. The structures have the fields of the
// disk in the order of the disk and no padding of their own, so encoding/binary
// reads and writes them; those that are decoded for every file have a Decode
// function too, which does the same without reflection.
//
// Names follow fs/erofs/erofs_fs.h of Linux.
package ondisk

import "encoding/binary"

var le = binary.LittleEndian

// Where things are and how large they are, in bytes.
const (
	SuperOffset    = 1024
	SuperSize      = 128
	SuperSlotSize  = 16 // of each of Super.ExtSlots
	SuperMaxEnd    = 4096
	SuperBoxedSize = SuperSize + SuperSlotSize // with MetaboxNid

	ChecksumOffset = 4 // of Super.Checksum

	InodeSlot         = 32 // a nid counts these from the metadata start
	InodeCompactSize  = 32
	InodeExtendedSize = 64
	DeviceSize        = 128
	DirentSize        = 12
	XattrHeaderSize   = 12
	XattrEntrySize    = 4
	MapHeaderSize     = 8
	LclusterIndexSize = 8
	ChunkIndexSize    = 8
	BlockMapEntrySize = 4
)

// Limits of the format.
const (
	Magic            = 0xE0F5E1E2
	MinBlockBits     = 9
	MaxBlockBits     = 16
	NameLen          = 255
	NullAddr         = ^uint64(0)
	MaxPcluster      = 1 << 20  // encoded bytes of a pcluster
	MaxPclusterPlain = 12 << 20 // decoded bytes of a pcluster
	MaxLzmaDict      = 8 << 20
	MinLzmaDict      = 4096
	MaxZstdWindowLog = 10 // above the 10 that every window has
	MaxDeflateBits   = 15
	MetaboxBit       = 1 << 63 // of a nid: the inode is in the metabox
)

// Super.FeatureCompat: bits that a reader may ignore.
const (
	CompatSbChksum           = 0x01
	CompatMtime              = 0x02
	CompatXattrFilter        = 0x04
	CompatSharedEAInMetabox  = 0x08
	CompatPlainXattrPrefixes = 0x10
	CompatIshareXattrs       = 0x20
)

// Super.FeatureIncompat: bits that a reader must know. Some bits have two
// meanings, which came in the same release.
const (
	IncompatLz4ZeroPadding = 0x001
	IncompatComprCfgs      = 0x002
	IncompatBigPcluster    = 0x002
	IncompatChunkedFile    = 0x004
	IncompatDeviceTable    = 0x008
	IncompatComprHead2     = 0x008
	IncompatZtailpacking   = 0x010
	IncompatFragments      = 0x020
	IncompatDedupe         = 0x020
	IncompatXattrPrefixes  = 0x040
	Incompat48Bit          = 0x080
	IncompatMetabox        = 0x100
	IncompatAll            = 0x1ff
)

// Inode.Format.
const (
	FormatExtended   = 1 << 0
	FormatLayoutBit  = 1
	FormatLayoutMask = 7
	FormatNlink1     = 1 << 4 // compact, not a directory: the link count is 1
	FormatDotOmitted = 1 << 4 // directory: "." is not stored
	FormatAll        = 0x1f
)

// Data layouts.
const (
	LayoutPlain             = 0
	LayoutCompressedFull    = 1
	LayoutInline            = 2
	LayoutCompressedCompact = 3
	LayoutChunk             = 4
)

// Inode.U of a chunk based file.
const (
	ChunkBlkBitsMask = 0x1f
	ChunkIndexes     = 0x20
	Chunk48Bit       = 0x40
	ChunkAll         = 0x7f
)

// MapHeader.Advise.
const (
	AdviseCompacted2B   = 0x01 // of the compact layout
	AdviseExtents       = 0x01 // of the full layout
	AdviseBigPcluster1  = 0x02
	AdviseBigPcluster2  = 0x04
	AdviseInline        = 0x08
	AdviseInterlaced    = 0x10
	AdviseFragment      = 0x20
	AdviseRecordBit     = 1 // with AdviseExtents: a record has 4 << these bits bytes
	AdviseRecordMask    = 3
	ClusterBitsMask     = 0x0f
	ClusterBitsFragment = 0x80 // the whole file is in the packed inode
)

// Lcluster index entries.
const (
	LclusterPlain     = 0
	LclusterHead1     = 1
	LclusterNonhead   = 2
	LclusterHead2     = 3
	LclusterTypeMask  = 3
	LclusterHole      = 1 << 14
	LclusterPartial   = 1 << 15
	DeltaCblkcnt      = 1 << 11 // in delta[0]: the low bits count compressed blocks
	CompactMinLobits  = 12
	CompactMaxBits4B  = 14
	CompactMaxBits2B  = 12
	CompactPackAlign  = 32
	CompactPackCount2 = 16
)

// Encoded extent records.
const (
	ExtentPlenMask = 1<<21 - 1
	ExtentPartial  = 1 << 27
	ExtentFmtShift = 28
)

// Compression algorithms.
const (
	AlgLz4     = 0
	AlgLzma    = 1
	AlgDeflate = 2
	AlgZstd    = 3
	AlgCount   = 4
)

// Xattr name indices and the name filter.
const (
	XattrUser            = 1
	XattrPosixAclAccess  = 2
	XattrPosixAclDefault = 3
	XattrTrusted         = 4
	XattrLustre          = 5
	XattrSecurity        = 6
	XattrLongPrefix      = 0x80
	XattrFilterSeed      = 0x25BBE08F
	XattrFilterBits      = 32
)

// File types of directory entries.
const (
	FtRegular = 1 + iota
	FtDir
	FtChrdev
	FtBlkdev
	FtFifo
	FtSock
	FtSymlink
)

// Super is the superblock, 1024 bytes into the image. MetaboxNid is on disk
// only where ExtSlots is not 0.
type Super struct {
	Magic               uint32
	Checksum            uint32
	FeatureCompat       uint32
	BlkSzBits           uint8
	ExtSlots            uint8
	RootNid2b           uint16 // the high bits of the block count where RootNid8b is used
	Inos                uint64
	Epoch               int64
	FixedNsec           uint32
	BlocksLo            uint32
	MetaBlkaddr         uint32
	XattrBlkaddr        uint32
	UUID                [16]byte
	VolumeName          [16]byte
	FeatureIncompat     uint32
	ComprAlgs           uint16 // without COMPR_CFGS the LZ4 maximum distance
	ExtraDevices        uint16
	DevtSlotOff         uint16
	DirBlkBits          uint8
	XattrPrefixCount    uint8
	XattrPrefixStart    uint32
	PackedNid           uint64
	XattrFilterReserved uint8
	IsharePrefixID      uint8
	Reserved1           [2]byte
	BuildTime           uint32 // since Epoch
	RootNid8b           uint64
	Reserved2           [8]byte
	MetaboxNid          uint64
	Reserved3           [8]byte
}

// Device is a slot of the device table.
type Device struct {
	Tag       [64]byte
	BlocksLo  uint32
	UniaddrLo uint32
	BlocksHi  uint16
	UniaddrHi uint16
	Reserved  [52]byte
}

// InodeCompact is the 32 byte inode.
type InodeCompact struct {
	Format      uint16
	XattrIcount uint16
	Mode        uint16
	Nb          uint16 // link count, or the high bits of U
	Size        uint32
	Mtime       uint32 // since Super.Epoch
	U           uint32 // start block, compressed blocks, device or chunk format
	Ino         uint32
	UID         uint16
	GID         uint16
	Reserved    uint32
}

// InodeExtended is the 64 byte inode.
type InodeExtended struct {
	Format      uint16
	XattrIcount uint16
	Mode        uint16
	Nb          uint16 // the high bits of U
	Size        uint64
	U           uint32
	Ino         uint32
	UID         uint32
	GID         uint32
	Mtime       int64
	MtimeNsec   uint32
	Nlink       uint32
	Reserved    [16]byte
}

// Dirent is a directory entry; its name is elsewhere in the block.
type Dirent struct {
	Nid      uint64
	NameOff  uint16
	FileType uint8
	Reserved uint8
}

// MapHeader begins the index of a compressed file.
type MapHeader struct {
	Lo            uint32 // fragment offset, inline length in the high half, or extent count
	Advise        uint16
	AlgorithmType uint8 // HEAD1 low, HEAD2 high; the low byte of the extent count's high half
	ClusterBits   uint8
}

// LclusterIndex is an entry of the full index.
type LclusterIndex struct {
	Advise     uint16
	ClusterOfs uint16
	U          uint32 // block address, or delta[0] low and delta[1] high
}

// ChunkIndex says where a chunk is.
type ChunkIndex struct {
	StartBlkHi uint16
	DeviceID   uint16
	StartBlkLo uint32
}

// XattrHeader begins the xattrs of an inode.
type XattrHeader struct {
	NameFilter  uint32
	SharedCount uint8
	Reserved    [7]byte
}

// XattrEntry is followed by the name and the value.
type XattrEntry struct {
	NameLen   uint8
	NameIndex uint8
	ValueSize uint16
}

// DecodeInodeCompact needs InodeCompactSize bytes.
func DecodeInodeCompact(b []byte) InodeCompact {
	_ = b[InodeCompactSize-1]
	return InodeCompact{
		Format: le.Uint16(b), XattrIcount: le.Uint16(b[2:]), Mode: le.Uint16(b[4:]), Nb: le.Uint16(b[6:]),
		Size: le.Uint32(b[8:]), Mtime: le.Uint32(b[12:]), U: le.Uint32(b[16:]), Ino: le.Uint32(b[20:]),
		UID: le.Uint16(b[24:]), GID: le.Uint16(b[26:]), Reserved: le.Uint32(b[28:]),
	}
}

// DecodeInodeExtended needs InodeExtendedSize bytes.
func DecodeInodeExtended(b []byte) InodeExtended {
	_ = b[InodeExtendedSize-1]
	d := InodeExtended{
		Format: le.Uint16(b), XattrIcount: le.Uint16(b[2:]), Mode: le.Uint16(b[4:]), Nb: le.Uint16(b[6:]),
		Size: le.Uint64(b[8:]), U: le.Uint32(b[16:]), Ino: le.Uint32(b[20:]),
		UID: le.Uint32(b[24:]), GID: le.Uint32(b[28:]),
		Mtime: int64(le.Uint64(b[32:])), MtimeNsec: le.Uint32(b[40:]), Nlink: le.Uint32(b[44:]),
	}
	copy(d.Reserved[:], b[48:])
	return d
}

// DecodeDirent needs DirentSize bytes.
func DecodeDirent(b []byte) Dirent {
	_ = b[DirentSize-1]
	return Dirent{Nid: le.Uint64(b), NameOff: le.Uint16(b[8:]), FileType: b[10], Reserved: b[11]}
}

// DecodeMapHeader needs MapHeaderSize bytes.
func DecodeMapHeader(b []byte) MapHeader {
	_ = b[MapHeaderSize-1]
	return MapHeader{Lo: le.Uint32(b), Advise: le.Uint16(b[4:]), AlgorithmType: b[6], ClusterBits: b[7]}
}

// DecodeLclusterIndex needs LclusterIndexSize bytes.
func DecodeLclusterIndex(b []byte) LclusterIndex {
	_ = b[LclusterIndexSize-1]
	return LclusterIndex{Advise: le.Uint16(b), ClusterOfs: le.Uint16(b[2:]), U: le.Uint32(b[4:])}
}

// DecodeChunkIndex needs ChunkIndexSize bytes.
func DecodeChunkIndex(b []byte) ChunkIndex {
	_ = b[ChunkIndexSize-1]
	return ChunkIndex{StartBlkHi: le.Uint16(b), DeviceID: le.Uint16(b[2:]), StartBlkLo: le.Uint32(b[4:])}
}

// DecodeXattrEntry needs XattrEntrySize bytes.
func DecodeXattrEntry(b []byte) XattrEntry {
	_ = b[XattrEntrySize-1]
	return XattrEntry{NameLen: b[0], NameIndex: b[1], ValueSize: le.Uint16(b[2:])}
}
