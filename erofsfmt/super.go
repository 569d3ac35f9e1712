package erofsfmt

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math/bits"
	"strings"
	"time"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// A Nid is the number of an inode: where it lies, in units of 32 bytes. Nid 0
// is legal, and bit 63 marks an inode of the metabox.
type Nid uint64

func (n Nid) inMetabox() bool { return n&ondisk.MetaboxBit != 0 }

// A Superblock is what an image says of itself.
type Superblock struct {
	Checksum        uint32
	FeatureCompat   uint32
	FeatureIncompat uint32
	BlockBits       uint8  // log2 of the block size
	Blocks          uint64 // as the image says; it may be 0
	Inodes          uint64
	Epoch           int64  // seconds that the times of compact inodes count from
	FixedNsec       uint32 // nanoseconds of every compact inode
	BuildTime       uint32 // seconds since Epoch
	UUID            [16]byte
	VolumeName      string
	MetaBlkaddr     uint32
	XattrBlkaddr    uint32
	RootNid         Nid
	PackedNid       Nid // 0: there is no packed inode
	MetaboxNid      Nid // meaningful with the metabox feature
	ComprAlgs       uint16
	Devices         []Device // extra devices, in order: device id 1 is Devices[0]

	lz4ZeroPadded    bool
	lzmaDict         uint32
	zstdWindowLog    uint8
	xattrPrefixCount int
	xattrPrefixStart int64
	xattrFilter      bool
	extraDevices     int
	devTable         int64
	size             int64 // of the superblock with its extension slots
}

// A Device is a blob that an image keeps data in beside itself.
type Device struct {
	Tag     string
	Blocks  uint64
	Uniaddr uint64 // where its blocks are in the image's own address space; 0 if nowhere
}

// BlockSize is the block size in bytes.
func (s *Superblock) BlockSize() int64 { return 1 << s.BlockBits }

// Built is when the image was built.
func (s *Superblock) Built() time.Time {
	return time.Unix(s.Epoch+int64(s.BuildTime), int64(s.FixedNsec))
}

func (s *Superblock) compat(bit uint32) bool   { return s.FeatureCompat&bit != 0 }
func (s *Superblock) incompat(bit uint32) bool { return s.FeatureIncompat&bit != 0 }

var (
	compatNames = []string{"sb_chksum", "mtime", "xattr_filter", "shared_ea_in_metabox", "plain_xattr_prefixes", "ishare_xattrs"}
	// Two names on one bit mean that the format cannot tell which was meant.
	incompatNames = []string{"lz4_0padding", "compr_cfgs/big_pcluster", "chunked_file", "device_table/compr_head2",
		"ztailpacking", "fragments/dedupe", "xattr_prefixes", "48bit", "metabox"}
	algNames = []string{"lz4", "lzma", "deflate", "zstd"}
)

// CompatFeatures names the set bits of FeatureCompat.
func (s *Superblock) CompatFeatures() []string { return bitNames(s.FeatureCompat, compatNames) }

// IncompatFeatures names the set bits of FeatureIncompat.
func (s *Superblock) IncompatFeatures() []string { return bitNames(s.FeatureIncompat, incompatNames) }

// Algorithms names the compression algorithms that files of the image may use.
func (s *Superblock) Algorithms() []string { return bitNames(uint32(s.ComprAlgs), algNames) }

// bitNames names each set bit; one without a name is given as a number.
func bitNames(v uint32, names []string) []string {
	var out []string
	for ; v != 0; v &= v - 1 {
		if bit := bits.TrailingZeros32(v); bit < len(names) {
			out = append(out, names[bit])
		} else {
			out = append(out, fmt.Sprintf("%#x", uint32(1)<<bit))
		}
	}
	return out
}

// superAt is where errors of the superblock are.
var superAt = place{0, ondisk.SuperOffset}

// readSuper reads and checks the superblock, the compression configurations
// and the device table (fs/erofs/super.c erofs_read_superblock).
func readSuper(ctx context.Context, src ReaderAt) (Superblock, error) {
	if src.Size() < ondisk.SuperOffset+ondisk.SuperSize {
		return Superblock{}, &FormatError{Off: -1, What: fmt.Sprintf("%d bytes hold no superblock", src.Size()), Err: ErrNotErofs}
	}
	// One read fetches the superblock and, in nearly every image, all that
	// belongs to it.
	head := make([]byte, min(src.Size(), ondisk.SuperMaxEnd))
	if err := readSource(ctx, src, head, 0); err != nil {
		return Superblock{}, err
	}
	var d ondisk.Super
	raw := make([]byte, ondisk.SuperBoxedSize)
	copy(raw, head[ondisk.SuperOffset:])
	if _, err := binary.Decode(raw, binary.LittleEndian, &d); err != nil {
		return Superblock{}, err
	}
	if d.Magic != ondisk.Magic {
		return Superblock{}, &FormatError{Off: ondisk.SuperOffset, What: fmt.Sprintf("magic %#08x", d.Magic), Err: ErrNotErofs}
	}
	if d.BlkSzBits < ondisk.MinBlockBits || d.BlkSzBits > ondisk.MaxBlockBits {
		return Superblock{}, superAt.unsupported("block size 2^%d", d.BlkSzBits)
	}
	if unknown := d.FeatureIncompat &^ ondisk.IncompatAll; unknown != 0 {
		return Superblock{}, superAt.unsupported("incompatible feature %s", strings.Join(bitNames(unknown, nil), " "))
	}
	if d.DirBlkBits != 0 {
		return Superblock{}, superAt.unsupported("directory blocks of 2^%d blocks", d.DirBlkBits)
	}
	if d.FeatureCompat&ondisk.CompatSbChksum != 0 {
		if err := verifyChecksum(ctx, src, d.Checksum, 1<<d.BlkSzBits); err != nil {
			return Superblock{}, err
		}
	}
	s, err := decodeSuper(&d)
	if err != nil {
		return s, err
	}
	if err := s.readCompression(ctx, src, &d); err != nil {
		return s, err
	}
	return s, s.readDevices(ctx, src)
}

// verifyChecksum checks the CRC32C of the first block from the superblock on,
// with the checksum itself taken as zero and without the final inversion
// (fs/erofs/super.c erofs_superblock_csum_verify).
func verifyChecksum(ctx context.Context, src ReaderAt, want uint32, blockSize int64) error {
	n := blockSize
	if n > ondisk.SuperOffset {
		n -= ondisk.SuperOffset
	}
	b := make([]byte, n)
	if err := readSource(ctx, src, b, ondisk.SuperOffset); err != nil {
		return err
	}
	clear(b[ondisk.ChecksumOffset : ondisk.ChecksumOffset+4])
	if got := ^crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)); got != want {
		return superAt.corrupt("superblock checksum %#08x, its bytes give %#08x", want, got)
	}
	return nil
}

func decodeSuper(d *ondisk.Super) (Superblock, error) {
	s := Superblock{
		Checksum: d.Checksum, FeatureCompat: d.FeatureCompat, FeatureIncompat: d.FeatureIncompat,
		BlockBits: d.BlkSzBits, Blocks: uint64(d.BlocksLo), Inodes: d.Inos,
		Epoch: d.Epoch, FixedNsec: d.FixedNsec, BuildTime: d.BuildTime,
		UUID: d.UUID, VolumeName: cString(d.VolumeName[:]),
		MetaBlkaddr: d.MetaBlkaddr, XattrBlkaddr: d.XattrBlkaddr,
		RootNid: Nid(d.RootNid2b), PackedNid: Nid(d.PackedNid),
		xattrPrefixCount: int(d.XattrPrefixCount), xattrPrefixStart: int64(d.XattrPrefixStart) * 4,
		size: ondisk.SuperSize + int64(d.ExtSlots)*ondisk.SuperSlotSize,
	}
	s.xattrFilter = s.compat(ondisk.CompatXattrFilter) && d.XattrFilterReserved == 0
	if s.incompat(ondisk.IncompatDeviceTable) {
		s.extraDevices = int(d.ExtraDevices)
		s.devTable = int64(d.DevtSlotOff) * ondisk.DeviceSize
	}
	if s.size > ondisk.SuperMaxEnd-ondisk.SuperOffset {
		return s, superAt.corrupt("superblock of %d bytes", s.size)
	}
	if s.incompat(ondisk.Incompat48Bit) && d.RootNid8b != 0 {
		s.RootNid = Nid(d.RootNid8b)
		s.Blocks |= uint64(d.RootNid2b) << 32
	}
	if s.incompat(ondisk.IncompatMetabox) {
		if s.size < ondisk.SuperBoxedSize {
			return s, superAt.corrupt("a metabox, but a superblock of only %d bytes", s.size)
		}
		s.MetaboxNid = Nid(d.MetaboxNid)
		if s.MetaboxNid.inMetabox() {
			return s, superAt.corrupt("the metabox is inside itself")
		}
	}
	if s.PackedNid.inMetabox() {
		return s, superAt.corrupt("the packed inode is in the metabox")
	}
	if s.compat(ondisk.CompatIshareXattrs) && d.IsharePrefixID >= d.XattrPrefixCount {
		return s, superAt.corrupt("inode sharing by prefix %d of %d", d.IsharePrefixID, d.XattrPrefixCount)
	}
	return s, nil
}

// readCompression finds out which algorithms there are. Their configurations
// follow the superblock, one for each bit, least significant first, each a
// 4-aligned 16-bit length and that many bytes (fs/erofs/decompressor.c
// z_erofs_parse_cfgs).
func (s *Superblock) readCompression(ctx context.Context, src ReaderAt, d *ondisk.Super) error {
	s.lz4ZeroPadded = s.incompat(ondisk.IncompatLz4ZeroPadding)
	if !s.incompat(ondisk.IncompatComprCfgs) {
		// The field is the LZ4 window here; images of Linux 5.3 have neither.
		if d.ComprAlgs != 0 || s.lz4ZeroPadded {
			s.ComprAlgs = 1 << ondisk.AlgLz4
		}
		return nil
	}
	s.ComprAlgs = d.ComprAlgs
	if unknown := s.ComprAlgs >> ondisk.AlgCount; unknown != 0 {
		return superAt.unsupported("compression algorithms %#x", unknown<<ondisk.AlgCount)
	}
	off := ondisk.SuperOffset + s.size
	for alg := range ondisk.AlgCount {
		if s.ComprAlgs&(1<<alg) == 0 {
			continue
		}
		off = (off + 3) &^ 3
		var b [2]byte
		if err := readSource(ctx, src, b[:], off); err != nil {
			return err
		}
		n := int64(binary.LittleEndian.Uint16(b[:]))
		if n == 0 {
			n = 1 << 16
		}
		cfg := make([]byte, min(n, 16))
		if err := readSource(ctx, src, cfg, off+2); err != nil {
			return err
		}
		if err := s.configure(alg, cfg, place{0, off}); err != nil {
			return err
		}
		off += 2 + n
	}
	return nil
}

// configure checks the configuration of one algorithm.
func (s *Superblock) configure(alg int, cfg []byte, at place) error {
	if need := [...]int{ondisk.AlgLz4: 14, ondisk.AlgLzma: 14, ondisk.AlgDeflate: 6, ondisk.AlgZstd: 6}[alg]; len(cfg) < need {
		return at.corrupt("%s configuration of %d bytes", algNames[alg], len(cfg))
	}
	switch alg {
	case ondisk.AlgLz4:
		if n := int64(binary.LittleEndian.Uint16(cfg[2:])); n > ondisk.MaxPcluster>>s.BlockBits {
			return at.corrupt("lz4 pclusters of %d blocks", n)
		}
	case ondisk.AlgLzma:
		if f := binary.LittleEndian.Uint16(cfg[4:]); f != 0 {
			return at.unsupported("lzma format %d", f)
		}
		s.lzmaDict = binary.LittleEndian.Uint32(cfg)
		if s.lzmaDict < ondisk.MinLzmaDict || s.lzmaDict > ondisk.MaxLzmaDict {
			return at.corrupt("lzma dictionary of %d bytes", s.lzmaDict)
		}
	case ondisk.AlgDeflate:
		if cfg[0] > ondisk.MaxDeflateBits {
			return at.unsupported("deflate window 2^%d", cfg[0])
		}
	case ondisk.AlgZstd:
		if cfg[0] != 0 {
			return at.unsupported("zstd format %d", cfg[0])
		}
		if cfg[1] > ondisk.MaxZstdWindowLog {
			return at.unsupported("zstd window 2^%d", int(cfg[1])+10)
		}
		s.zstdWindowLog = cfg[1] + 10
	}
	return nil
}

// readDevices reads the table of extra devices (fs/erofs/super.c erofs_scan_devices).
func (s *Superblock) readDevices(ctx context.Context, src ReaderAt) error {
	if s.extraDevices == 0 {
		return nil
	}
	if s.devTable+int64(s.extraDevices)*ondisk.DeviceSize > src.Size() {
		return place{0, s.devTable}.corrupt("%d device slots do not fit into the image", s.extraDevices)
	}
	b := make([]byte, s.extraDevices*ondisk.DeviceSize)
	if err := readSource(ctx, src, b, s.devTable); err != nil {
		return err
	}
	s.Devices = make([]Device, s.extraDevices)
	for i := range s.Devices {
		var d ondisk.Device
		if _, err := binary.Decode(b[i*ondisk.DeviceSize:], binary.LittleEndian, &d); err != nil {
			return err
		}
		s.Devices[i] = Device{Tag: cString(d.Tag[:]), Blocks: uint64(d.BlocksLo), Uniaddr: uint64(d.UniaddrLo)}
		if s.incompat(ondisk.Incompat48Bit) {
			s.Devices[i].Blocks |= uint64(d.BlocksHi) << 32
			s.Devices[i].Uniaddr |= uint64(d.UniaddrHi) << 32
		}
	}
	return nil
}

// cString is what stands before the first NUL.
func cString(b []byte) string {
	b, _, _ = bytes.Cut(b, []byte{0})
	return string(b)
}
