package mkerofs

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/crc32"
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

// file writes the chunks of n, then where they are.
func (c *chunkWriter) file(n *node, buf []byte) (err error) {
	r, err := n.Open()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	checksum := uint32(0)
	var index []byte
	for off := int64(0); off < n.Size; off += int64(c.size) {
		p := buf[:min(int64(c.size), n.Size-off)]
		if err := readSome(ctxReader{c.ctx, r}, p, off); err != nil {
			return err
		}
		checksum = crc32.Update(checksum, castagnoli, p)
		block, err := c.chunk(p)
		if err != nil {
			return err
		}
		d := ondisk.ChunkIndex{StartBlkLo: block}
		if block == noBlock {
			d = hole()
		}
		index = d.Append(index)
		c.progress.add(len(p))
	}
	if err := expectEnd(r); err != nil {
		return err
	}
	c.content.Write(le.AppendUint32(nil, checksum))
	_, err = c.to.WriteAt(index, n.offset+n.indexStart())
	return err
}

// chunk writes p, if it is new, and says where it is.
func (c *chunkWriter) chunk(p []byte) (uint32, error) {
	if zero(p) {
		return noBlock, nil
	}
	digest := sha256.Sum256(p)
	if block, ok := c.seen[digest]; ok {
		return block, nil
	}
	if err := c.padTo(roundUp(c.pos, c.blockSize)); err != nil {
		return 0, err
	}
	block := c.pos / c.blockSize
	if block >= noBlock {
		return 0, fmt.Errorf("more than %d blocks of %d bytes: take a larger block size", uint32(math.MaxUint32), c.blockSize)
	}
	c.seen[digest] = uint32(block)
	_, err := c.Write(p)
	return uint32(block), err
}
