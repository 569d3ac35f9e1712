package integrity

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"

	"github.com/erofs-oci/erofs-oci/tests/require"
)

const oracleUUID = "01020304-0506-0708-090a-0b0c0d0e0f10"

func oracleOptions(block int, alg Algorithm, salt int) VerityOptions {
	o := VerityOptions{Algorithm: alg, BlockSize: block, Salt: random(salt, 3)}
	for i := range o.UUID {
		o.UUID[i] = byte(i + 1)
	}
	return o
}

type oracleCase struct {
	o      VerityOptions
	blocks int
}

func (c oracleCase) String() string {
	return fmt.Sprintf("%d of %d, %v, salt of %d", c.blocks, c.o.BlockSize, c.o.Algorithm, len(c.o.Salt))
}

// oracleCases are trees of no to four levels, at and around where one more block begins.
func oracleCases() []oracleCase {
	var cases []oracleCase
	add := func(o VerityOptions, blocks ...int) {
		for _, n := range blocks {
			cases = append(cases, oracleCase{o, n})
		}
	}
	add(oracleOptions(4096, SHA256, 32), 1, 2, 127, 128, 129, 255, 256, 257)
	add(oracleOptions(512, SHA256, 0), 1, 15, 16, 17, 255, 256, 257, 4095, 4096, 4097)
	add(oracleOptions(512, SHA512, 256), 7, 8, 9, 63, 64, 65, 512, 513)
	add(oracleOptions(65536, SHA512, 1), 1, 2, 5)
	if !testing.Short() {
		add(oracleOptions(4096, SHA256, 16), 128*128-1, 128*128, 128*128+1)
	}
	return cases
}

// The tree is what `veritysetup format` makes, byte for byte, and what `veritysetup
// verify` takes; ours verifies theirs.
func TestVeritysetup(t *testing.T) {
	require.Has(t, "veritysetup")
	for _, c := range oracleCases() {
		t.Run(c.String(), func(t *testing.T) {
			data := random(c.blocks*c.o.BlockSize, 1)
			f := newTree(t, data, c.o)
			root, tree := veritysetupFormat(t, data, c.o)
			filled := tree
			if c.blocks == 1 && len(tree) < c.o.BlockSize {
				// Without a hash block nothing follows the superblock, and veritysetup
				// does not fill a large block.
				filled = append(bytes.Clone(tree), make([]byte, c.o.BlockSize-len(tree))...)
			}
			if !bytes.Equal(f.blob[f.size:], filled) {
				t.Fatalf("not the tree of veritysetup: %d bytes, and it has %d", int64(len(f.blob))-f.size, len(tree))
			}
			if !bytes.Equal(f.root, root) {
				t.Fatalf("root digest %x, and veritysetup says %x", f.root, root)
			}
			if err := veritysetupVerify(t, f.blob, f.size, f.root); err != nil {
				t.Error(err)
			}
			theirs := append(data, tree...)
			v, err := OpenVerity(tree, VerityRoot{HashOffset: f.size, BlockSize: c.o.BlockSize, Size: int64(len(theirs)), Digest: root})
			if err != nil {
				t.Fatal(err)
			}
			r := v.NewVerifier((&reader{blob: theirs}).read, VerifierOptions{})
			if err := r.Verify(context.Background(), theirs[:f.size], 0); err != nil {
				t.Error(err)
			}
		})
	}
}

// What veritysetup finds wrong, we find wrong, and the other way round.
func TestVeritysetupMismatch(t *testing.T) {
	require.Has(t, "veritysetup")
	const block = 512
	f := newTree(t, random(257*block, 1), oracleOptions(block, SHA256, 32))
	for _, c := range []struct {
		name string
		off  int64 // the byte that is changed
		good bool
	}{
		{"first byte of the data", 0, true},
		{"last byte of the data", 257*block - 1, true},
		{"UUID", 257*block + 16, false},
		{"salt", 257*block + 88, true},
		{"number of blocks", 257*block + 72, true},
		{"highest hash block", 258 * block, true},
		{"middle level", 259*block + 40, true},
		{"last leaf", 277*block + 3, true},
		{"zeros at the end of the last leaf", 278*block - 1, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			blob := flipped(f.blob, int(c.off*8))
			if err := veritysetupVerify(t, blob, f.size, f.root); (err != nil) != c.good {
				t.Errorf("veritysetup says %v", err)
			}
			if err := verifyAll(blob, f.trust()); (err != nil) != c.good {
				t.Errorf("we say %v", err)
			}
		})
	}
}

// verifyAll opens a blob and verifies all of its data.
func verifyAll(blob []byte, trust VerityRoot) error {
	v, err := OpenVerity(blob[trust.HashOffset:], trust)
	if err != nil {
		return err
	}
	r := v.NewVerifier((&reader{blob: blob}).read, VerifierOptions{})
	return r.Verify(context.Background(), blob[:trust.HashOffset], 0)
}

var rootHash = regexp.MustCompile(`Root hash:\s+([0-9a-f]+)`)

// veritysetupFormat is the tree that veritysetup makes, and its root digest.
func veritysetupFormat(t *testing.T, data []byte, o VerityOptions) (root, tree []byte) {
	t.Helper()
	dir := t.TempDir()
	dataFile, treeFile := filepath.Join(dir, "data"), filepath.Join(dir, "tree")
	if err := os.WriteFile(dataFile, data, 0o600); err != nil {
		t.Fatal(err)
	}
	salt := "-"
	if len(o.Salt) > 0 {
		salt = hex.EncodeToString(o.Salt)
	}
	block := strconv.Itoa(o.BlockSize)
	out, err := exec.Command("veritysetup", "format", dataFile, treeFile, "--salt="+salt, "--uuid="+oracleUUID,
		"--hash="+o.Algorithm.String(), "--data-block-size="+block, "--hash-block-size="+block).CombinedOutput()
	if err != nil {
		t.Fatalf("veritysetup format: %v\n%s", err, out)
	}
	m := rootHash.FindSubmatch(out)
	if m == nil {
		t.Fatalf("veritysetup says no root digest:\n%s", out)
	}
	if tree, err = os.ReadFile(treeFile); err != nil {
		t.Fatal(err)
	}
	return unhex(t, string(m[1])), tree
}

// veritysetupVerify is an error if veritysetup finds the blob wrong.
func veritysetupVerify(t *testing.T, blob []byte, hashOffset int64, root []byte) error {
	t.Helper()
	name := filepath.Join(t.TempDir(), "blob")
	if err := os.WriteFile(name, blob, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("veritysetup", "verify", name, name, hex.EncodeToString(root),
		"--hash-offset="+strconv.FormatInt(hashOffset, 10)).CombinedOutput()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		t.Fatal(err) // it did not run
	}
	if err != nil {
		return fmt.Errorf("veritysetup verify: %w: %s", err, out)
	}
	return nil
}
