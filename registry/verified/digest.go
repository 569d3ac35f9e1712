package verified

import (
	"context"
	_ "crypto/sha256" // of digests
	_ "crypto/sha512"
	"fmt"

	"github.com/opencontainers/go-digest"
)

// A DigestError says that something is not what its digest says.
type DigestError struct {
	What      string // "chunk index", "blob"
	Want, Got string
}

func (e *DigestError) Error() string {
	return fmt.Sprintf("%s was changed: its digest is %s, want %s", e.What, e.Got, e.Want)
}

// parseDigest reads "sha256:HEX" and its like.
func parseDigest(s string) (digest.Digest, error) {
	d := digest.Digest(s)
	if err := d.Validate(); err != nil {
		return "", fmt.Errorf("digest %.80q: %w", s, err)
	}
	return d, nil
}

func checkDigest(what string, want, got digest.Digest) error {
	if got == want {
		return nil
	}
	return &DigestError{What: what, Want: want.String(), Got: got.String()}
}

// A ReaderAt fills all of p from off, or returns an error.
type ReaderAt interface {
	ReadAt(ctx context.Context, p []byte, off int64) error
}

// wholeRead is how much CheckWhole has in memory.
const wholeRead = 1 << 20

// CheckWhole reads a blob of size bytes from front to back, in a bounded piece of memory,
// and returns nil if it has the digest. It returns a *DigestError if it has another.
func CheckWhole(ctx context.Context, blob ReaderAt, size int64, want string) error {
	d, err := parseDigest(want)
	if err != nil {
		return err
	}
	h, buf := d.Algorithm().Hash(), make([]byte, min(wholeRead, size))
	for off := int64(0); off < size; off += int64(len(buf)) {
		buf = buf[:min(int64(len(buf)), size-off)]
		if err := blob.ReadAt(ctx, buf, off); err != nil {
			return fmt.Errorf("check the digest of the blob: %w", err)
		}
		h.Write(buf) // a hash never fails: see hash.Hash
	}
	return checkDigest("the blob", d, digest.NewDigest(d.Algorithm(), h))
}
