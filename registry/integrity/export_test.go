package integrity

// Algorithm is that of the digests.
func (v *Verity) Algorithm() Algorithm { return v.hash.alg }

// BlockSize is that of data and hash blocks, in bytes.
func (v *Verity) BlockSize() int { return v.block }

// DataSize is how many bytes the tree verifies: those before it.
func (v *Verity) DataSize() int64 { return v.dataSize() }

// Path appends to dst where the hash blocks are that verify data block n, from the one
// that has its digest up to the one that the root digest is of. n must be a block of the
// data.
func (v *Verity) Path(dst []int64, n int64) []int64 {
	for _, l := range v.levels {
		n /= v.fanout
		dst = append(dst, l.off+n*int64(v.block))
	}
	return dst
}
