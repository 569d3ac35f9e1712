package verified_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/integrity"
	"github.com/erofs-oci/erofs-oci/registry/verified"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

func root(t testing.TB, b *verifiable.Blob) integrity.VerityRoot {
	t.Helper()
	digits := strings.TrimPrefix(b.Annotations[registry.AnnotationVerityRoot], "sha256:")
	d, err := hex.DecodeString(digits)
	if err != nil {
		t.Fatal(err)
	}
	return integrity.VerityRoot{HashOffset: int64(b.HashOffset), BlockSize: 4096, Size: int64(len(b.Data)), Digest: d}
}

func openTree(t *testing.T, s *servers, b *verifiable.Blob) *verified.Tree {
	t.Helper()
	tree, err := verified.OpenTree(t.Context(), s, root(t, b))
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// treeSize is that of 40 MiB: two parts of a tree, of which the root is in the first.
const treeSize = 40 << 20

// TestTree: opening is one request; all of the data is verified by one for each part, and
// no byte of the tree comes twice.
func TestTree(t *testing.T) {
	b := verifiable.Make(t, random(treeSize-1000), verifiable.Options{Verity: true})
	s := serve(b.Data, nil)
	tree := openTree(t, s, b)
	if got := s.taken(); !slices.Equal(got, []request{{0, treeSize, 256 << 10}}) {
		t.Errorf("opening: %v", got)
	}
	if tree.Size() != treeSize {
		t.Errorf("it verifies %d bytes", tree.Size())
	}
	const unit = 256 << 10
	var readers sync.WaitGroup
	for r := range 4 {
		readers.Go(func() {
			for off := r * unit; off < len(b.Data); off += 4 * unit {
				if err := tree.Verify(context.Background(), b.Data[off:min(off+unit, len(b.Data))], int64(off)); err != nil {
					t.Errorf("chunk at %d: %v", off, err)
				}
			}
		})
	}
	readers.Wait()
	if got, want := s.taken(), []request{{0, treeSize + 256<<10, int64(len(b.Data)) - treeSize - 256<<10}}; !slices.Equal(got, want) {
		t.Errorf("reading: %v, want %v", got, want)
	}
}

// TestWrongTree flips bits of the tree: what flips once is fetched again, what stays wrong
// is refused, at the opening or when a block is verified by it.
func TestWrongTree(t *testing.T) {
	b := verifiable.Make(t, random(treeSize), verifiable.Options{Verity: true})
	const super, rootBlock = treeSize, treeSize + 4096
	leaf := int64(len(b.Data)) - 4096 // in the second part
	for _, c := range []struct {
		name   string
		flip   int64
		opens  bool // although the bit is always wrong
		places int
	}{
		{"magic", super, false, 1},
		{"version", super + 8, false, 1},
		{"salt", super + 88, false, 1},
		{"blocks", super + 72, false, 1},
		{"root block", rootBlock + 5, false, 1},
		{"third leaf", rootBlock + 3*4096, true, 1},
		{"last leaf", leaf, true, 1},
		{"last leaf, at a mirror", leaf, true, 2},
		{"salt, at a mirror", super + 88, false, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			verify := func(tree *verified.Tree) error {
				// By the first, the third and the last leaf.
				for _, off := range []int64{0, 1 << 20, treeSize - 256<<10} {
					if err := tree.Verify(t.Context(), b.Data[off:off+256<<10], off); err != nil {
						return err
					}
				}
				return nil
			}
			flip := once(c.flip)
			if c.places == 2 {
				flip = func(p int, off int64, _ int) bool { return p == 0 && off == c.flip }
			}
			s := serve(b.Data, flip)
			s.places = c.places
			tree, err := verified.OpenTree(t.Context(), s, root(t, b))
			if err != nil {
				t.Fatalf("flipped once: %v", err)
			}
			if err := verify(tree); err != nil {
				t.Errorf("flipped once: %v", err)
			}
			if n := len(s.taken()); n != 3 {
				t.Errorf("flipped once: %d requests, want 2 parts and one again", n)
			}

			s = serve(b.Data, at(c.flip))
			s.places = c.places
			tree, err = verified.OpenTree(t.Context(), s, root(t, b))
			if (err == nil) != c.opens {
				t.Fatalf("always flipped: %v", err)
			}
			if !c.opens {
				return
			}
			var m *integrity.MismatchError
			var w *verified.WrongError
			if err := verify(tree); !errors.As(err, &m) || m.Level != 1 || !errors.As(err, &w) || w.Temporary() {
				t.Errorf("always flipped: %v", err)
			}
			if n := len(s.taken()); n > 3+c.places {
				t.Errorf("always flipped: %d requests", n)
			}
		})
	}
}

// TestTreeHook: a wrong block is fetched again from elsewhere.
func TestTreeHook(t *testing.T) {
	const unit = 64 << 10
	b := verifiable.Make(t, random(3*unit+100), verifiable.Options{Verity: true})
	s := serve(b.Data, nil)
	s.places = 2
	tree := openTree(t, s, b)
	s.taken()
	wrong := bytes.Clone(b.Data[unit : 2*unit])
	wrong[unit-1] ^= 1
	for try := range 3 {
		var w *verified.WrongError
		err := tree.Verify(t.Context(), wrong, unit)
		if !errors.As(err, &w) || w.Temporary() != (try < 2) {
			t.Fatalf("time %d: %v", try, err)
		}
		if try < 2 {
			if _, err := get(t, tree, 0, 3*unit); err != nil {
				t.Error(err)
			}
		}
	}
	if got := s.taken(); !slices.Equal(got, []request{{1, 0, 3 * unit}, {0, 0, 3 * unit}}) {
		t.Errorf("fetched from %v", got)
	}
	// A chunk of a cache goes on with the tree.
	if err := tree.Verify(t.Context(), b.Data[3*unit:], 3*unit); err != nil {
		t.Errorf("data and tree: %v", err)
	}
	if err := tree.Verify(t.Context(), b.Data[100:4196], 100); err == nil {
		t.Error("half blocks are verified")
	}
}

// TestTreeIsNotFetchedTwice: what a cache asks for behind the data comes out of the parts
// that were read.
func TestTreeIsNotFetchedTwice(t *testing.T) {
	b := verifiable.Make(t, random(treeSize), verifiable.Options{Verity: true})
	total := int64(len(b.Data))
	s := serve(b.Data, nil)
	tree := openTree(t, s, b) // reads the first part
	s.taken()
	const part = 256 << 10
	last := request{0, treeSize + part, total - treeSize - part}
	for _, c := range []struct {
		off, n int64
		asked  []request
	}{
		// What verifies the data comes before it, and is there for what is asked for then.
		{treeSize - 1000, 1000, []request{last, {0, treeSize - 1000, 1000}}},
		{treeSize - 1000, 5000, []request{{0, treeSize - 1000, 1000}}},
		{treeSize, part, nil},
		{treeSize + 5, 10, nil},
		{treeSize - 10, total - treeSize + 10, []request{{0, treeSize - 10, 10}}},
		{treeSize + 7, total - treeSize - 7, nil},
	} {
		got, err := get(t, tree, c.off, c.n)
		if err != nil || !bytes.Equal(got, b.Data[c.off:c.off+c.n]) {
			t.Errorf("%d at %d: %d bytes, %v", c.n, c.off, len(got), err)
		}
		if asked := s.taken(); !slices.Equal(asked, c.asked) {
			t.Errorf("%d at %d: fetched %v, want %v", c.n, c.off, asked, c.asked)
		}
	}
	if _, err := get(t, tree, treeSize, total-treeSize+1); err == nil {
		t.Error("more than there is")
	}
}

// TestTreeOfOneBlock has no hash block to be wrong before the data is.
func TestTreeOfOneBlock(t *testing.T) {
	b := verifiable.Make(t, random(100), verifiable.Options{Verity: true})
	tree := openTree(t, serve(b.Data, nil), b)
	if err := tree.Verify(t.Context(), b.Data, 0); err != nil {
		t.Error(err)
	}
	// A forged salt is found as wrong data.
	tree = openTree(t, serve(b.Data, at(4096+88)), b)
	if err := tree.Verify(t.Context(), b.Data, 0); err == nil {
		t.Error("the salt is not looked at")
	}
}

func TestTreeRefuses(t *testing.T) {
	b := verifiable.Make(t, random(100000), verifiable.Options{Verity: true})
	good := root(t, b)
	for name, change := range map[string]func(*integrity.VerityRoot){
		"no data":        func(r *integrity.VerityRoot) { r.HashOffset = 0 },
		"odd offset":     func(r *integrity.VerityRoot) { r.HashOffset++ },
		"past the end":   func(r *integrity.VerityRoot) { r.HashOffset += 1 << 30 },
		"huge":           func(r *integrity.VerityRoot) { r.HashOffset = 1<<63 - 4096 },
		"block size":     func(r *integrity.VerityRoot) { r.BlockSize = 4095 },
		"another root":   func(r *integrity.VerityRoot) { r.Digest = bytes.Repeat([]byte{1}, 32) },
		"no tree so far": func(r *integrity.VerityRoot) { r.HashOffset -= 4096 },
		"cut off":        func(r *integrity.VerityRoot) { r.Size-- },
	} {
		r := good
		change(&r)
		s := serve(b.Data, nil)
		if _, err := verified.OpenTree(t.Context(), s, r); err == nil {
			t.Errorf("%s: opened", name)
		}
		if n := len(s.taken()); n > 2 {
			t.Errorf("%s: %d requests", name, n)
		}
	}
}

// blob is a ReaderAt of bytes.
type blob []byte

func (b blob) ReadAt(_ context.Context, p []byte, off int64) error {
	if n := copy(p, b[off:]); n < len(p) {
		return fmt.Errorf("%d of %d", n, len(p))
	}
	return nil
}

func TestCheckWhole(t *testing.T) {
	data := random(3<<20 + 17)
	size := int64(len(data))
	for _, alg := range []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512} {
		want := alg.FromBytes(data).String()
		if err := verified.CheckWhole(t.Context(), blob(data), size, want); err != nil {
			t.Errorf("%s: %v", alg, err)
		}
		for _, at := range []int{0, 1 << 20, len(data) - 1} {
			changed := bytes.Clone(data)
			changed[at] ^= 0x80
			var d *verified.DigestError
			if err := verified.CheckWhole(t.Context(), blob(changed), size, want); !errors.As(err, &d) || d.Want != want {
				t.Errorf("%s, byte %d changed: %v", alg, at, err)
			}
		}
	}
	if err := verified.CheckWhole(t.Context(), blob(nil), 0, digest.FromBytes(nil).String()); err != nil {
		t.Errorf("nothing: %v", err)
	}
	if err := verified.CheckWhole(t.Context(), blob(data), size+1, digest.FromBytes(data).String()); err == nil {
		t.Error("a blob that cannot be read is right")
	}
	for _, d := range []string{"", "sha256", "sha1:00", "sha256:zz", "sha256:" + strings.Repeat("0", 63)} {
		if err := verified.CheckWhole(t.Context(), blob(nil), 0, d); err == nil {
			t.Errorf("digest %q is taken", d)
		}
	}
}
