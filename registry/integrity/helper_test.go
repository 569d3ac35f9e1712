package integrity

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
)

// unhex reads bytes in hexadecimal, with spaces and line ends anywhere.
func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// random is n bytes, the same ones each time.
func random(n int, seed uint64) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	r.Read(b)
	return b
}

// replaced is b with other bytes at off.
func replaced(b []byte, off int, with ...byte) []byte {
	c := bytes.Clone(b)
	copy(c[off:], with)
	return c
}

// flipped is b with one bit changed.
func flipped(b []byte, bit int) []byte {
	c := bytes.Clone(b)
	c[bit/8] ^= 1 << (bit % 8)
	return c
}

func wantFormatError(t *testing.T, err error, kind error, off int64) {
	t.Helper()
	var f *FormatError
	if !errors.As(err, &f) || !errors.Is(err, kind) || f.Off != off {
		t.Errorf("error %v, want %q at byte %d", err, kind, off)
	}
}

func wantMismatch(t *testing.T, err error, what string, level int, index, off int64) {
	t.Helper()
	var m *MismatchError
	if !errors.As(err, &m) {
		t.Fatalf("error %v, want a mismatch of %s %d", err, what, index)
	}
	if m.What != what || m.Level != level || m.Index != index || m.Off != off {
		t.Errorf("mismatch %s %d of level %d at %d, want %s %d of level %d at %d", m.What, m.Index, m.Level, m.Off, what, index, level, off)
	}
	if bytes.Equal(m.Want, m.Got) || len(m.Want) != m.Algorithm.Size() || len(m.Got) != m.Algorithm.Size() {
		t.Errorf("digests %x and %x", m.Want, m.Got)
	}
}

// A tree is a blob with a dm-verity tree, and how it was made.
type tree struct {
	blob []byte // data, superblock, levels
	root []byte
	size int64 // of the data
	o    VerityOptions
}

func newTree(t testing.TB, data []byte, o VerityOptions) *tree {
	t.Helper()
	var w bytes.Buffer
	root, n, err := WriteVerity(context.Background(), &w, bytes.NewReader(data), int64(len(data)), o)
	if err != nil {
		t.Fatal(err)
	}
	if n != int64(w.Len()) {
		t.Fatalf("%d bytes written, %d said", w.Len(), n)
	}
	if size, err := VeritySize(int64(len(data)), o); err != nil || size != n {
		t.Fatalf("VeritySize is %d, %v, and %d bytes were written", size, err, n)
	}
	return &tree{blob: append(bytes.Clone(data), w.Bytes()...), root: root, size: int64(len(data)), o: o}
}

func (f *tree) trust() VerityRoot {
	return VerityRoot{HashOffset: f.size, BlockSize: f.o.BlockSize, Size: int64(len(f.blob)), Digest: f.root}
}

func (f *tree) open(t testing.TB) *Verity {
	t.Helper()
	v, err := OpenVerity(f.blob[f.size:], f.trust())
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// A reader reads a blob in memory, counts, and remembers what was read.
type reader struct {
	blob []byte
	fail error

	mu    sync.Mutex
	reads []int64
}

func (r *reader) read(_ context.Context, p []byte, off int64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fail != nil {
		return r.fail
	}
	r.reads = append(r.reads, off)
	if off < 0 || off > int64(len(r.blob)-len(p)) {
		return fmt.Errorf("%d bytes at %d of %d: %w", len(p), off, len(r.blob), io.ErrUnexpectedEOF)
	}
	copy(p, r.blob[off:])
	return nil
}

func (r *reader) took() []int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	reads := r.reads
	r.reads = nil
	return reads
}

// naiveTree is another way to make the levels, straight from the definition: a level at a
// time, all in memory. It gives root and levels, root's first.
func naiveTree(data []byte, block int, alg Algorithm, salt []byte) (root, levels []byte) {
	digest := func(b []byte) []byte {
		salted := append(bytes.Clone(salt), b...)
		if alg == SHA512 {
			s := sha512.Sum512(salted)
			return s[:]
		}
		s := sha256.Sum256(salted)
		return s[:]
	}
	for len(data) > block {
		var above []byte
		for ; len(data) > 0; data = data[block:] {
			above = append(above, digest(data[:block])...)
		}
		for len(above)%block > 0 {
			above = append(above, 0)
		}
		levels = append(bytes.Clone(above), levels...)
		data = above
	}
	return digest(data), levels
}
