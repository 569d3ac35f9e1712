package verified

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"hash"
	"strings"
)

// A DigestError says that something is not what its digest says.
type DigestError struct {
	What      string // "chunk index", "blob"
	Want, Got string
}

func (e *DigestError) Error() string {
	return fmt.Sprintf("%s was changed: its digest is %s, want %s", e.What, e.Got, e.Want)
}

// A digest is one that was parsed.
type digest struct {
	name string // of the algorithm
	new  func() hash.Hash
	want []byte
}

// parseDigest reads "sha256:HEX" and its like.
func parseDigest(s string) (digest, error) {
	name, text, _ := strings.Cut(s, ":")
	d := digest{name: name}
	switch name {
	case "sha256":
		d.new = sha256.New
	case "sha384":
		d.new = sha512.New384
	case "sha512":
		d.new = sha512.New
	default:
		return d, fmt.Errorf("digest %.80q: want sha256:HEX", s)
	}
	var err error
	if d.want, err = hex.DecodeString(text); err != nil || len(d.want) != d.new().Size() {
		return d, fmt.Errorf("digest %.160q: %s is %d hex digits", s, name, 2*d.new().Size())
	}
	return d, nil
}

func (d digest) check(what string, sum []byte) error {
	if bytes.Equal(sum, d.want) {
		return nil
	}
	return &DigestError{What: what, Want: d.name + ":" + hex.EncodeToString(d.want), Got: d.name + ":" + hex.EncodeToString(sum)}
}

func (d digest) of(p []byte) []byte {
	h := d.new()
	h.Write(p) // a hash never fails: see hash.Hash
	return h.Sum(nil)
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
	h, buf := d.new(), make([]byte, min(wholeRead, size))
	for off := int64(0); off < size; off += int64(len(buf)) {
		buf = buf[:min(int64(len(buf)), size-off)]
		if err := blob.ReadAt(ctx, buf, off); err != nil {
			return fmt.Errorf("check the digest of the blob: %w", err)
		}
		h.Write(buf) // a hash never fails: see hash.Hash
	}
	return d.check("the blob", h.Sum(nil))
}
