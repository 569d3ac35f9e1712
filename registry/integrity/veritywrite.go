package integrity

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"runtime"
	"sync"
	"sync/atomic"
)

// VerityOptions say what tree to make. The same options over the same data make the same
// bytes, so salt and UUID are for the caller to choose; derived from the data, they make
// an image reproducible.
type VerityOptions struct {
	Algorithm Algorithm // the zero value is SHA256
	BlockSize int       // of data and hashes; 0 stands for DefaultVerityBlock
	Salt      []byte    // at most MaxVeritySalt bytes
	UUID      [16]byte
}

func (o VerityOptions) shape(dataSize int64) (*shape, error) {
	if err := o.Algorithm.check(); err != nil {
		return nil, err
	}
	if o.BlockSize == 0 {
		o.BlockSize = DefaultVerityBlock
	}
	return newShape(dataSize, o.BlockSize, o.Algorithm)
}

// VeritySize is how many bytes WriteVerity writes.
func VeritySize(dataSize int64, o VerityOptions) (int64, error) {
	s, err := o.shape(dataSize)
	if err != nil {
		return 0, err
	}
	return s.end - dataSize, nil
}

// WriteVerity writes to w what belongs right behind the data: the superblock, and the
// tree over all of the data, whose size must be a multiple of the block size. It returns
// the root digest and how many bytes it wrote.
//
// Data is read and hashed on all cores. The root level comes first in the tree, and is
// known last, so all digests are in memory until then: 8 MiB for a GiB of data, in blocks
// of 4096 and SHA-256, and up to 1 MiB for each core.
func WriteVerity(ctx context.Context, w io.Writer, data io.ReaderAt, dataSize int64, o VerityOptions) (root []byte, written int64, err error) {
	s, err := o.shape(dataSize)
	if err != nil {
		return nil, 0, err
	}
	if s.blocks > (math.MaxInt-int64(s.block))/int64(s.digest) {
		return nil, 0, fmt.Errorf("integrity: the digests of %d blocks do not fit into memory", s.blocks)
	}
	super := &VeritySuper{UUID: o.UUID, Algorithm: o.Algorithm, DataBlockSize: s.block, HashBlockSize: s.block,
		DataBlocks: uint64(s.blocks), Salt: o.Salt}
	head, err := super.Marshal()
	if err != nil {
		return nil, 0, err
	}
	h := &saltedHash{alg: o.Algorithm, salt: o.Salt}
	levels := make([][]byte, len(s.levels)) // each one's digests of the blocks below it
	below, size := data, dataSize
	for i, l := range s.levels {
		levels[i] = make([]byte, l.blocks*int64(s.block))
		if err := s.hashBlocks(ctx, h, levels[i], below, size); err != nil {
			return nil, 0, err
		}
		below, size = readerAt(levels[i]), int64(len(levels[i]))
	}
	root = make([]byte, s.digest)
	if err := s.hashBlocks(ctx, h, root, below, size); err != nil {
		return nil, 0, err
	}
	written, err = s.write(w, head, levels)
	if err != nil {
		return nil, written, err
	}
	return root, written, nil
}

// write writes the superblock and the levels, from the root's down.
func (s *shape) write(w io.Writer, head []byte, levels [][]byte) (written int64, err error) {
	first := make([]byte, s.block)
	copy(first, head)
	n, err := w.Write(first)
	written = int64(n)
	for i := len(levels) - 1; i >= 0 && err == nil; i-- {
		n, err = w.Write(levels[i])
		written += int64(n)
	}
	if err != nil {
		return written, fmt.Errorf("integrity: writing a dm-verity tree: %w", err)
	}
	return written, nil
}

// hashBytes is how much data is read at once; a block where that is more.
const hashBytes = 1 << 20

// hashBlocks puts the digests of all blocks of data into out, on all cores.
func (s *shape) hashBlocks(ctx context.Context, h *saltedHash, out []byte, data io.ReaderAt, size int64) error {
	piece := max(hashBytes, int64(s.block))
	pieces := (size + piece - 1) / piece
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	var workers sync.WaitGroup
	for range min(int64(runtime.GOMAXPROCS(0)), pieces) {
		workers.Go(func() {
			buf := make([]byte, min(piece, size))
			for p := next.Add(1) - 1; p < pieces && ctx.Err() == nil; p = next.Add(1) - 1 {
				off := p * piece
				b := buf[:min(piece, size-off)]
				if err := readFull(data, b, off); err != nil {
					cancel(err)
					return
				}
				s.hashPiece(h, out[off/int64(s.block)*int64(s.digest):], b)
			}
		})
	}
	workers.Wait()
	return context.Cause(ctx)
}

// hashPiece puts the digest of each block of b into out.
func (s *shape) hashPiece(h *saltedHash, out, b []byte) {
	for ; len(b) > 0; b, out = b[s.block:], out[s.digest:] {
		d := h.sum(b[:s.block])
		copy(out, d[:s.digest])
	}
}

// readFull takes io.ReaderAt at its word: an end of file with all bytes is none.
func readFull(data io.ReaderAt, b []byte, off int64) error {
	n, err := data.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("integrity: hashing for dm-verity: %d of %d bytes read at %d: %w", n, len(b), off, err)
}

// readerAt is a level, to be hashed like data.
type readerAt []byte

func (r readerAt) ReadAt(p []byte, off int64) (int, error) {
	n := copy(p, r[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}
