package integrity

import (
	"crypto/sha256"
	"crypto/sha512"
	"fmt"
	"hash"
	"sync"
)

// An Algorithm makes digests.
type Algorithm uint8

const (
	SHA256 Algorithm = iota
	SHA512
)

// maxDigest is the size of the largest digest.
const maxDigest = sha512.Size

// Size is that of a digest, in bytes.
func (a Algorithm) Size() int {
	if a == SHA512 {
		return sha512.Size
	}
	return sha256.Size
}

// String is the name that dm-verity and OCI digests have for it.
func (a Algorithm) String() string {
	switch a {
	case SHA256:
		return "sha256"
	case SHA512:
		return "sha512"
	}
	return fmt.Sprintf("algorithm %d", uint8(a))
}

func (a Algorithm) check() error {
	if a > SHA512 {
		return fmt.Errorf("integrity: %v: %w", a, ErrUnsupported)
	}
	return nil
}

func (a Algorithm) new() hash.Hash {
	if a == SHA512 {
		return sha512.New()
	}
	return sha256.New()
}

// sum is the digest of p, in as many bytes as it has. It does not allocate.
func (a Algorithm) sum(p []byte) (d [maxDigest]byte) {
	if a == SHA512 {
		return sha512.Sum512(p)
	}
	s := sha256.Sum256(p)
	copy(d[:], s[:])
	return d
}

// A saltedHash makes digests of a salt and a block, for many at a time.
type saltedHash struct {
	alg  Algorithm
	salt []byte
	pool sync.Pool // of *hashState
}

// hashState holds the digest, too: what an interface's method is handed escapes, and
// would be allocated anew for each block.
type hashState struct {
	h   hash.Hash
	sum [maxDigest]byte
}

// sum is the digest of salt and p. It does not allocate.
func (s *saltedHash) sum(p []byte) [maxDigest]byte {
	if len(s.salt) == 0 {
		return s.alg.sum(p)
	}
	st, ok := s.pool.Get().(*hashState)
	if !ok {
		st = &hashState{h: s.alg.new()}
	}
	st.h.Reset()
	st.h.Write(s.salt) // a hash never fails: see hash.Hash
	st.h.Write(p)
	st.h.Sum(st.sum[:0])
	d := st.sum
	s.pool.Put(st)
	return d
}
