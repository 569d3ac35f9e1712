package integrity

import (
	"bytes"
	"fmt"
	"math"
)

// VerityRoot says which tree is to be trusted, and where it is. All of it comes from the
// manifest.
type VerityRoot struct {
	HashOffset int64  // where the superblock is, and all the data before it
	BlockSize  int    // of data and hashes; 0 stands for DefaultVerityBlock
	Size       int64  // of data and tree, decompressed: what there is to read
	Digest     []byte // the root digest
}

// A Verity is a tree: where its hash blocks are, and what they must lead up to. It does
// not change, and may be used by many at a time.
type Verity struct {
	shape
	hash saltedHash
	root []byte
}

// OpenVerity reads a superblock, which super begins with, and checks that it is of the
// tree that r speaks of. A superblock that was forged in a way that goes unnoticed here
// has Verifier.Verify find every block wrong.
func OpenVerity(super []byte, r VerityRoot) (*Verity, error) {
	s, err := ParseVeritySuper(super)
	if err != nil {
		return nil, err
	}
	if r.BlockSize == 0 {
		r.BlockSize = DefaultVerityBlock
	}
	if s.DataBlockSize != r.BlockSize || s.HashBlockSize != r.BlockSize {
		return nil, corruptSuper(64, "blocks of %d and %d bytes, where the manifest says %d", s.DataBlockSize, s.HashBlockSize, r.BlockSize)
	}
	if len(r.Digest) != s.Algorithm.Size() {
		return nil, corruptSuper(32, "%v, where the manifest has a root digest of %d bytes", s.Algorithm, len(r.Digest))
	}
	sh, err := newShape(r.HashOffset, r.BlockSize, s.Algorithm)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, ErrCorrupt)
	}
	if s.DataBlocks != uint64(sh.blocks) {
		return nil, corruptSuper(72, "it has %d data blocks, where %d precede it", s.DataBlocks, sh.blocks)
	}
	end := sh.end
	if len(sh.levels) == 0 {
		end = r.HashOffset + VeritySuperSize // nothing comes after it for which veritysetup would fill the block
	}
	if end > r.Size {
		return nil, corruptSuper(72, "the tree ends at %d of %d bytes", end, r.Size)
	}
	return &Verity{shape: *sh, hash: saltedHash{alg: s.Algorithm, salt: s.Salt}, root: bytes.Clone(r.Digest)}, nil
}

// End is where the tree ends.
func (v *Verity) End() int64 { return v.end }

// A shape is how large a tree is, and where its levels are.
type shape struct {
	block  int
	digest int   // bytes of one
	fanout int64 // digests in a hash block
	blocks int64 // of data
	levels []level
	end    int64
}

// A level is a row of hash blocks. Level 0 of a shape is level 1 of the documentation.
type level struct {
	off    int64
	blocks int64
}

// newShape is the tree over dataSize bytes, which begins right behind them.
func newShape(dataSize int64, block int, alg Algorithm) (*shape, error) {
	if !validBlock(int64(block)) {
		return nil, badBlock(block)
	}
	if dataSize <= 0 || dataSize%int64(block) != 0 {
		return nil, fmt.Errorf("integrity: dm-verity over %d bytes: want a multiple of the block size, %d, and not none", dataSize, block)
	}
	s := &shape{block: block, digest: alg.Size(), fanout: int64(block / alg.Size()), blocks: dataSize / int64(block)}
	// A tree has no more blocks than its data has, the superblock's included.
	if dataSize > math.MaxInt64/2 {
		return nil, fmt.Errorf("integrity: dm-verity over %d bytes, which is more than there can be", dataSize)
	}
	for n := s.blocks; n > 1; {
		n = (n + s.fanout - 1) / s.fanout
		s.levels = append(s.levels, level{blocks: n})
	}
	s.end = dataSize + int64(block)
	for i := len(s.levels) - 1; i >= 0; i-- {
		s.levels[i].off = s.end
		s.end += s.levels[i].blocks * int64(block)
	}
	return s, nil
}

func (s *shape) dataSize() int64 { return s.blocks * int64(s.block) }
