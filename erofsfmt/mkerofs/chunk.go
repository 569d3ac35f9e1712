package mkerofs

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math"
	"math/bits"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// Chunk-based files have behind their inodes where each of their chunks begins (fs/erofs/data.c erofs_map_blocks):
//
//	| inode | xattrs | to 8 | 0 u16 | device u16 | block u32 | … a chunk
//
// This is written when the data has been, since only then is known which chunks are new.

// noBlock is where a chunk of zeros is.
const noBlock = math.MaxUint32

func (o *Options) checkChunks() error {
	switch {
	case o.MetadataOnly && (o.ChunkSize != 0 || o.Compression.Algorithm != Uncompressed):
		return errors.New("an image without data has neither chunks nor compression: drop these")
	case o.ChunkSize == 0:
		return nil
	case o.Compression.Algorithm != Uncompressed:
		return errors.New("chunks and compression: take one of them")
	case o.ChunkSize < o.BlockSize || o.ChunkSize > maxSegment || bits.OnesCount(uint(o.ChunkSize)) != 1:
		return fmt.Errorf("chunks of %d bytes: must be a power of two from a block, %d, to %d", o.ChunkSize, o.BlockSize, maxSegment)
	}
	return nil
}

// splitChunks lays a regular file out in chunks, unless it is not to be, or so short that it fits behind its inode.
// Where there is no data, one chunk is as long as the file, if an inode can say that.
func (b *Builder) splitChunks(n *node) {
	switch {
	case b.options.MetadataOnly && n.Size > 0:
		n.chunkBits = uint8(min(max(bits.Len64(uint64(n.Size-1))-b.blockBits, 0), ondisk.ChunkBlkBitsMask))
	case b.options.ChunkSize > 0 && n.blocks > 0:
		n.chunkBits = uint8(bits.Len(uint(b.options.ChunkSize)) - 1 - b.blockBits)
	default:
		return
	}
	n.blocks, n.tail = 0, 0
	n.chunks = (n.Size-1)>>(int(n.chunkBits)+b.blockBits) + 1
}

// appendHoles writes the index of a file without data behind b.
func appendHoles(b []byte, chunks int64) []byte {
	for range chunks {
		b = hole().Append(b)
	}
	return b
}

func hole() ondisk.ChunkIndex {
	return ondisk.ChunkIndex{StartBlkHi: math.MaxUint16, StartBlkLo: noBlock}
}

// A chunkWriter writes chunks that are new.
type chunkWriter struct {
	*writer
	size int
	seen map[[sha256.Size]byte]uint32
}

// A holeSkipper is a reader that knows of zeros which it need not read.
type holeSkipper interface {
	SkipHole() (int64, error)
}

// skipHole passes over zeros that r knows of, of at most the given bytes.
func skipHole(r io.Reader, most int64) (int64, error) {
	s, ok := r.(holeSkipper)
	if !ok {
		return 0, nil
	}
	n, err := s.SkipHole()
	if err == nil && (n < 0 || n > most) {
		err = fmt.Errorf("its source skips a hole of %d bytes, where it has %d left", n, most)
	}
	return n, err
}

// file writes the chunks of n, then where they are.
func (c *chunkWriter) file(n *node, buf []byte) (err error) {
	r, err := n.Open()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	index := make([]byte, 0, min(n.chunks, 1<<16)*ondisk.ChunkIndexSize)
	for off := int64(0); off < n.Size; {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		zeros, err := skipHole(r, n.Size-off)
		if err != nil {
			return fmt.Errorf("after %d bytes: %w", off, err)
		}
		holes := zeros / int64(c.size)
		index = appendHoles(index, holes)
		off += holes * int64(c.size)
		zeros -= holes * int64(c.size)
		c.progress.add(int(holes) * c.size)
		if off == n.Size {
			break
		}
		p := buf[:min(int64(c.size), n.Size-off)]
		clear(p[:zeros])
		if err := readSome(ctxReader{c.ctx, r}, p[zeros:], off+zeros); err != nil {
			return err
		}
		d := hole()
		if !zero(p) {
			if d, err = c.chunk(p); err != nil {
				return err
			}
		}
		index = d.Append(index)
		off += int64(len(p))
		c.progress.add(len(p))
	}
	if err := expectEnd(r); err != nil {
		return err
	}
	c.content.Write(index)
	_, err = c.to.WriteAt(index, n.offset+n.indexStart())
	return err
}

// chunk writes p, if it is new, and says where it is.
func (c *chunkWriter) chunk(p []byte) (ondisk.ChunkIndex, error) {
	digest := sha256.Sum256(p)
	if block, ok := c.seen[digest]; ok {
		return ondisk.ChunkIndex{StartBlkLo: block}, nil
	}
	if err := c.padTo(roundUp(c.pos, c.blockSize)); err != nil {
		return ondisk.ChunkIndex{}, err
	}
	block := c.pos / c.blockSize
	if block >= noBlock {
		return ondisk.ChunkIndex{}, fmt.Errorf("more than %d blocks of %d bytes: take a larger block size", uint32(math.MaxUint32), c.blockSize)
	}
	c.seen[digest] = uint32(block)
	c.content.Write(digest[:])
	_, err := c.Write(p)
	return ondisk.ChunkIndex{StartBlkLo: uint32(block)}, err
}
