package blobcache

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"strings"
)

// The file of one blob, all integers little-endian:
//
//	0        header      4 KiB: what is in the file, and a checksum of that
//	4096     entries     8 bytes a chunk: zeros, or  u32 checksum of the chunk, u32 checksum of this entry
//	         uses        8 bytes a region: when it was last read, in microseconds of Unix time; wrong by some seconds
//	base     the blob    byte i of it at base + i, and holes where chunks are absent
//
// An entry lies within one sector. Both checksums depend on the name, the unit and the chunk's number, so that
// neither the entries nor the data of another chunk, blob or unit pass for this one's.
const (
	magic      = "erofs-oci blob\x01\n" // the last but one byte is the version
	headerSize = 4096
	entrySize  = 8
	useSize    = 8
	// regionSize is what is kept, and let go of, together: one lock and one time of use for each.
	regionSize = 4 << 20
	// baseAlign lets the kernel keep chunks in large pages, as it would if they began at 0: reads of 128 KiB cost 10 %
	// more where it is 64 KiB. What is in front of the blob is mostly a hole.
	baseAlign = 2 << 20
)

// CRC-32C: what is to be noticed is a write that was lost or torn, and a disk that forgot, one in 2^32 of which passes;
// it is computed at the speed of memory, so every chunk can be checked before its first use. It is no defence against
// somebody who may write to the file: that is the user, who needs no wrong chunk to deceive himself.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// A layout says where things are in the file of a blob.
type layout struct {
	name       string // see nameOf
	digest     string // that is in it
	size, unit int64

	chunks, regions int64
	perRegion       int64 // chunks
	uses, base, end int64 // offsets in the file
	seed            uint32
}

func newLayout(name string, size, unit int64) layout {
	digest, _, _ := strings.Cut(name, "+")
	l := layout{name: name, digest: digest, size: size, unit: unit, perRegion: max(regionSize/unit, 1)}
	l.chunks = ceil(size, unit)
	l.regions = ceil(l.chunks, l.perRegion)
	l.uses = headerSize + l.chunks*entrySize
	l.base = ceil(l.uses+l.regions*useSize, baseAlign) * baseAlign
	l.end = l.base + size
	l.seed = crc32.Checksum(l.header()[:headerSize-4], castagnoli)
	return l
}

func ceil(a, b int64) int64 { return (a + b - 1) / b }

func (l *layout) header() []byte {
	b := make([]byte, headerSize)
	copy(b, magic)
	binary.LittleEndian.PutUint64(b[16:], uint64(l.size))
	binary.LittleEndian.PutUint64(b[24:], uint64(l.unit))
	binary.LittleEndian.PutUint64(b[32:], uint64(l.perRegion))
	b[40] = byte(len(l.name))
	copy(b[41:], l.name)
	binary.LittleEndian.PutUint32(b[headerSize-4:], crc32.Checksum(b[:headerSize-4], castagnoli))
	return b
}

// parseHeader reads what may be the header of a blob's file.
func parseHeader(b []byte) (layout, error) {
	if len(b) != headerSize || string(b[:len(magic)]) != magic {
		return layout{}, errors.New("it is not a cached blob of this version")
	}
	if crc32.Checksum(b[:headerSize-4], castagnoli) != binary.LittleEndian.Uint32(b[headerSize-4:]) {
		return layout{}, errors.New("its header is damaged")
	}
	size, unit := binary.LittleEndian.Uint64(b[16:]), binary.LittleEndian.Uint64(b[24:])
	if size > maxBlobSize || unit > MaxChunkSize {
		return layout{}, fmt.Errorf("its header says %d bytes in chunks of %d", size, unit)
	}
	if err := checkSize(int64(size), int64(unit)); err != nil {
		return layout{}, err
	}
	name := string(b[41 : 41+int(b[40])])
	if err := checkName(name); err != nil {
		return layout{}, err
	}
	l := newLayout(name, int64(size), int64(unit))
	if n := binary.LittleEndian.Uint64(b[32:]); n != uint64(l.perRegion) {
		return layout{}, fmt.Errorf("its header says regions of %d chunks", n)
	}
	return l, nil
}

func (l *layout) numbered(chunk int64) uint32 {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], uint64(chunk))
	return crc32.Update(l.seed, castagnoli, b[:])
}

// sum is the checksum of a chunk's bytes.
func (l *layout) sum(chunk int64, data []byte) uint32 {
	return crc32.Update(l.numbered(chunk), castagnoli, data)
}

// putEntry writes the entry of a chunk that is present.
func (l *layout) putEntry(b []byte, chunk int64, sum uint32) {
	binary.LittleEndian.PutUint32(b, sum)
	binary.LittleEndian.PutUint32(b[4:], l.check(chunk, b[:4]))
}

// entry reads an entry. One that is damaged is that of an absent chunk.
func (l *layout) entry(b []byte, chunk int64) (sum uint32, present bool) {
	check := binary.LittleEndian.Uint32(b[4:])
	return binary.LittleEndian.Uint32(b), check == l.check(chunk, b[:4])
}

// check is never 0, so that a hole is the entry of an absent chunk.
func (l *layout) check(chunk int64, sum []byte) uint32 {
	return crc32.Update(^l.numbered(chunk), castagnoli, sum) | 1
}

func (l *layout) entryAt(chunk int64) int64 { return headerSize + chunk*entrySize }

// chunkLen is the unit but for the last chunk, which ends with the blob.
func (l *layout) chunkLen(chunk int64) int64 { return min(l.unit, l.size-chunk*l.unit) }

// region gives the chunks [first, end) of a region.
func (l *layout) region(r int64) (first, end int64) {
	return r * l.perRegion, min((r+1)*l.perRegion, l.chunks)
}
