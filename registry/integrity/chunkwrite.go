package integrity

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"math"
)

// A ChunkIndexBuilder makes the index of chunks that somebody else cuts, stores and
// hashes; a ChunkIndexWriter does that itself where nothing is compressed. It is not for
// use by many at a time.
type ChunkIndexBuilder struct {
	compression Compression
	alg         Algorithm
	raw         []byte
	count       uint32
}

// NewChunkIndexBuilder begins an index.
func NewChunkIndexBuilder(c Compression, alg Algorithm) *ChunkIndexBuilder {
	return &ChunkIndexBuilder{compression: c, alg: alg, raw: make([]byte, chunkHeader)}
}

// Add adds the next chunk: where it is stored in the blob, where it begins in the image,
// and the digest of its stored bytes.
func (b *ChunkIndexBuilder) Add(blobOff, off int64, checksum []byte) error {
	if err := b.alg.check(); err != nil {
		return err
	}
	if len(checksum) != b.alg.Size() {
		return fmt.Errorf("integrity: chunk %d has a checksum of %d bytes, and %v has %d", b.count, len(checksum), b.alg, b.alg.Size())
	}
	if b.count == math.MaxUint32 {
		return errors.New("integrity: an index has no room for more chunks: make them larger")
	}
	b.raw = binary.LittleEndian.AppendUint64(b.raw, uint64(blobOff))
	b.raw = binary.LittleEndian.AppendUint64(b.raw, uint64(off))
	b.raw = append(b.raw, checksum...)
	b.count++
	return nil
}

// Marshal is the index of an image of size bytes whose stored chunks end at dataEnd of
// the blob. It does not end the index: more may be added, for another one. What it gives
// has been read as a reader with the default limits will read it, so chunks that overlap,
// leave a hole or are too long are an error here.
func (b *ChunkIndexBuilder) Marshal(size, dataEnd int64) ([]byte, error) {
	if err := b.alg.check(); err != nil {
		return nil, err
	}
	raw := append([]byte(nil), b.raw...)
	copy(raw, chunkMagic)
	raw[4] = chunkVersion
	raw[5] = byte(b.compression)
	binary.LittleEndian.PutUint64(raw[8:], uint64(size))
	binary.LittleEndian.PutUint32(raw[16:], b.count)
	raw[20] = hashSHA2
	raw[21] = byte(b.alg.Size())
	if _, err := ParseChunkIndex(raw, dataEnd, ChunkLimits{}); err != nil {
		return nil, fmt.Errorf("what was added makes no index: %w", err)
	}
	return raw, nil
}

// A ChunkIndexWriter makes the index of an image that is stored as it is, while the image
// passes. It keeps no more of it than the digests. It is not for use by many at a time.
type ChunkIndexWriter struct {
	index *ChunkIndexBuilder
	chunk int64
	h     hash.Hash
	n     int64 // bytes that passed
	ended bool
}

var _ io.Writer = (*ChunkIndexWriter)(nil)

// NewChunkIndexWriter begins the index of an image that is cut into chunks of chunkSize
// bytes; the last one may be shorter.
func NewChunkIndexWriter(chunkSize int64, alg Algorithm) (*ChunkIndexWriter, error) {
	if chunkSize <= 0 || chunkSize > DefaultMaxChunk {
		return nil, fmt.Errorf("integrity: a chunk size of %d bytes: want one of [1, %d]", chunkSize, DefaultMaxChunk)
	}
	if err := alg.check(); err != nil {
		return nil, err
	}
	return &ChunkIndexWriter{index: NewChunkIndexBuilder(None, alg), chunk: chunkSize, h: alg.new()}, nil
}

// Write takes the next bytes of the image.
func (w *ChunkIndexWriter) Write(p []byte) (int, error) {
	if w.ended {
		return 0, errors.New("integrity: the index was made, and the image goes on")
	}
	done := 0
	for done < len(p) {
		n := min(int64(len(p)-done), w.chunk-w.n%w.chunk)
		w.h.Write(p[done : done+int(n)]) // a hash never fails: see hash.Hash
		w.n += n
		done += int(n)
		if w.n%w.chunk == 0 {
			if err := w.endChunk(w.n - w.chunk); err != nil {
				return done, err
			}
		}
	}
	return done, nil
}

func (w *ChunkIndexWriter) endChunk(off int64) error {
	err := w.index.Add(off, off, w.h.Sum(nil))
	w.h.Reset()
	return err
}

// Marshal ends the image, and is its index. Nothing can be written after it.
func (w *ChunkIndexWriter) Marshal() ([]byte, error) {
	if rest := w.n % w.chunk; rest > 0 && !w.ended {
		if err := w.endChunk(w.n - rest); err != nil {
			return nil, err
		}
	}
	w.ended = true
	return w.index.Marshal(w.n, w.n)
}
