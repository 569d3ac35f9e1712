package integrity

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"sort"
)

// Compression is how the chunks of an image are stored.
type Compression uint8

const (
	None Compression = 0 // as they are
	Zstd Compression = 1 // each as one zstd frame
)

const (
	chunkMagic   = "\xcd\xe4\xec\x67"
	chunkVersion = 1
	chunkHeader  = 32 // bytes
	entryFixed   = 16 // bytes of an entry before its checksum

	hashNone = 0 // on-disk names of hash families
	hashSHA2 = 1
)

// DefaultMaxChunk is the length that a chunk may have unless ChunkLimits say another.
const DefaultMaxChunk = 16 << 20

// MaxChunkIndex is the size of an index that a reader should take: that of 350 GiB in chunks
// of 256 KiB and SHA-256. It is in memory twice while it is read, and once afterwards.
const MaxChunkIndex = 64 << 20

// ChunkLimits say what an index may demand of its reader.
type ChunkLimits struct {
	// MaxChunk bounds the length of a chunk, stored as well as decompressed, since a
	// chunk is verified as a whole and has to be in memory for it. 0 stands for
	// DefaultMaxChunk.
	MaxChunk int64
}

// A ChunkIndex is an index whose every entry has been looked at. It does not change,
// and may be used by many at a time.
type ChunkIndex struct {
	entries     []byte // as they are on disk
	entrySize   int
	count       int
	size        int64 // of the image
	dataEnd     int64
	compression Compression
	checksums   bool
	alg         Algorithm
}

// A Chunk is a part of an image.
type Chunk struct {
	Off, Len         int64 // in the image
	BlobOff, BlobLen int64 // as it is stored, in the blob
}

// ParseChunkIndex reads an index, of which raw is all and nothing else. dataEnd is where
// the stored chunks end: where the index begins (for zstd: the skippable frame around
// it), or the size of the blob, for an index in another one.
//
// Nothing of raw is kept. The index is not verified by being read: see the package's
// documentation.
func ParseChunkIndex(raw []byte, dataEnd int64, limits ChunkLimits) (*ChunkIndex, error) {
	x, err := parseChunkHeader(raw)
	if err != nil {
		return nil, err
	}
	if dataEnd < 0 {
		return nil, corruptIndex(8, "it is for a blob of %d bytes", dataEnd)
	}
	x.dataEnd = dataEnd
	if x.compression == None && x.size > dataEnd {
		return nil, corruptIndex(8, "the image has %d bytes, where the blob has %d for it", x.size, dataEnd)
	}
	if limits.MaxChunk == 0 {
		limits.MaxChunk = DefaultMaxChunk
	}
	x.entries = raw[chunkHeader:]
	for i := range x.count {
		if err := x.checkEntry(i, limits.MaxChunk); err != nil {
			return nil, err
		}
	}
	x.entries = bytes.Clone(x.entries)
	return x, nil
}

// parseChunkHeader checks all that the entries have no part in but their number.
func parseChunkHeader(raw []byte) (*ChunkIndex, error) {
	if len(raw) < chunkHeader {
		return nil, corruptIndex(int64(len(raw)), "it ends within its header of %d bytes", chunkHeader)
	}
	if string(raw[:4]) != chunkMagic {
		return nil, corruptIndex(0, "the magic number is %x", raw[:4])
	}
	if raw[4] != chunkVersion {
		return nil, unsupportedIndex(4, "version %d", raw[4])
	}
	x := &ChunkIndex{compression: Compression(raw[5])}
	if x.compression > Zstd {
		return nil, unsupportedIndex(5, "compression type %d", raw[5])
	}
	if flags := binary.LittleEndian.Uint16(raw[6:]); flags != 0 {
		return nil, unsupportedIndex(6, "flags %#x", flags)
	}
	size := binary.LittleEndian.Uint64(raw[8:])
	if size > math.MaxInt64 {
		return nil, corruptIndex(8, "the image has %d bytes", size)
	}
	x.size = int64(size)
	if err := x.parseHash(raw[20], raw[21]); err != nil {
		return nil, err
	}
	if reserved := raw[22:chunkHeader]; !allZero(reserved) {
		return nil, corruptIndex(22, "reserved bytes are %x", reserved)
	}
	count := uint64(binary.LittleEndian.Uint32(raw[16:]))
	if want := chunkHeader + count*uint64(x.entrySize); want != uint64(len(raw)) {
		return nil, corruptIndex(16, "%d chunks take %d bytes, and there are %d", count, want, len(raw))
	}
	if (count == 0) != (size == 0) {
		return nil, corruptIndex(16, "an image of %d bytes has %d chunks", size, count)
	}
	x.count = int(count) // it is less than len(raw)
	return x, nil
}

func (x *ChunkIndex) parseHash(family, size byte) error {
	x.entrySize = entryFixed + int(size)
	switch {
	case family == hashNone && size == 0:
		return nil
	case family == hashSHA2 && int(size) == SHA256.Size():
		x.checksums, x.alg = true, SHA256
		return nil
	case family == hashSHA2 && int(size) == SHA512.Size():
		x.checksums, x.alg = true, SHA512
		return nil
	case family > hashSHA2:
		return unsupportedIndex(20, "hash algorithm %d", family)
	}
	return corruptIndex(21, "hash algorithm %d with digests of %d bytes", family, size)
}

// checkEntry checks that chunk i lies where it may: behind the one before it, and within
// the image and the blob. Those before it have been checked.
func (x *ChunkIndex) checkEntry(i int, maxChunk int64) error {
	at := chunkHeader + int64(i)*int64(x.entrySize)
	blobOff, off := x.entry(i)
	blobEnd, end := uint64(x.dataEnd), uint64(x.size)
	if i+1 < x.count {
		blobEnd, end = x.entry(i + 1)
	}
	switch {
	case i == 0 && off != 0:
		return corruptIndex(at+8, "the first chunk begins at %d of the image", off)
	case end <= off || end > uint64(x.size):
		return corruptIndex(at+8, "chunk %d is [%d, %d) of an image of %d bytes", i, off, end, x.size)
	case end-off > uint64(maxChunk):
		return corruptIndex(at+8, "chunk %d has %d bytes, more than the limit of %d", i, end-off, maxChunk)
	}
	if x.compression == None {
		if blobOff != off {
			return corruptIndex(at, "chunk %d begins at %d of the image and at %d of its blob, which is not compressed", i, off, blobOff)
		}
		return nil
	}
	switch {
	case blobEnd <= blobOff || blobEnd > uint64(x.dataEnd):
		return corruptIndex(at, "chunk %d is stored in [%d, %d) of %d bytes", i, blobOff, blobEnd, x.dataEnd)
	case blobEnd-blobOff > uint64(maxChunk):
		return corruptIndex(at, "chunk %d is stored in %d bytes, more than the limit of %d", i, blobEnd-blobOff, maxChunk)
	}
	return nil
}

// entry gives the two offsets of chunk i, in the blob and in the image.
func (x *ChunkIndex) entry(i int) (blobOff, off uint64) {
	e := x.entries[i*x.entrySize:]
	return binary.LittleEndian.Uint64(e), binary.LittleEndian.Uint64(e[8:])
}

// Len is the number of chunks.
func (x *ChunkIndex) Len() int { return x.count }

// Size is that of the image, decompressed. A blob of an image that is not compressed may
// go on behind it, with the index itself for instance; that part is in no chunk.
func (x *ChunkIndex) Size() int64 { return x.size }

// Compression is how the chunks are stored.
func (x *ChunkIndex) Compression() Compression { return x.compression }

// Checksums reports whether chunks can be verified, and by which algorithm.
func (x *ChunkIndex) Checksums() (Algorithm, bool) { return x.alg, x.checksums }

// Chunk is chunk i of [0, Len). It panics for another.
func (x *ChunkIndex) Chunk(i int) Chunk {
	blobOff, off := x.entry(i)
	blobEnd, end := uint64(x.dataEnd), uint64(x.size)
	if i+1 < x.count {
		blobEnd, end = x.entry(i + 1)
	}
	if x.compression == None {
		blobEnd = end
	}
	return Chunk{Off: int64(off), Len: int64(end - off), BlobOff: int64(blobOff), BlobLen: int64(blobEnd - blobOff)}
}

// Find is the chunk that holds the image's byte off, or -1 where the image has none.
func (x *ChunkIndex) Find(off int64) int {
	if off < 0 || off >= x.size {
		return -1
	}
	return sort.Search(x.count, func(i int) bool {
		_, begin := x.entry(i)
		return begin > uint64(off)
	}) - 1
}

// Checksum is the digest that the stored bytes of chunk i have, or nil without
// checksums. It is a part of the index, not to be written to.
func (x *ChunkIndex) Checksum(i int) []byte {
	if !x.checksums {
		return nil
	}
	at := i * x.entrySize
	return x.entries[at+entryFixed : at+x.entrySize : at+x.entrySize]
}

// Verify returns nil if stored is chunk i as it was when the index was made: all of it,
// as it is stored, before it is decompressed. It returns a *MismatchError if it is not,
// and ErrNoChecksum if the index cannot tell. It does not allocate unless it fails.
func (x *ChunkIndex) Verify(i int, stored []byte) error {
	if !x.checksums {
		return ErrNoChecksum
	}
	c := x.Chunk(i)
	if int64(len(stored)) != c.BlobLen {
		return fmt.Errorf("integrity: chunk %d is stored in %d bytes, and %d of them cannot be verified", i, c.BlobLen, len(stored))
	}
	want := x.Checksum(i)
	got := x.alg.sum(stored)
	if bytes.Equal(got[:len(want)], want) {
		return nil
	}
	return &MismatchError{What: "chunk", Index: int64(i), Off: c.BlobOff, Len: c.BlobLen, Algorithm: x.alg,
		Want: bytes.Clone(want), Got: bytes.Clone(got[:len(want)])}
}

func allZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

func corruptIndex(off int64, format string, args ...any) error {
	return &FormatError{In: "chunk index", Off: off, What: fmt.Sprintf(format, args...), Err: ErrCorrupt}
}

func unsupportedIndex(off int64, format string, args ...any) error {
	return &FormatError{In: "chunk index", Off: off, What: fmt.Sprintf(format, args...), Err: ErrUnsupported}
}
