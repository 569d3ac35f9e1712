package fusefs_test

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// Where the superblock has what the tests change (fs/erofs/erofs_fs.h
// erofs_super_block).
const (
	superblock      = 1024
	featureCompat   = superblock + 0x08
	blockBits       = superblock + 0x0c
	blocks          = superblock + 0x24
	metaBlock       = superblock + 0x28
	featureIncompat = superblock + 0x50
)

// A broken is an image that the test has patched.
type broken []byte

// breakableCopy is a copy of an image whose superblock may be patched: without its
// checksum.
func breakableCopy(im corpus.Image) broken {
	b := broken(slices.Clone(im.Data))
	b[featureCompat] &^= 1
	return b
}

func (b broken) blockSize() int { return 1 << b[blockBits] }

func (b broken) put32(off int, v uint32) { binary.LittleEndian.PutUint32(b[off:], v) }

// inode is where the inode of a path is: the number that the kernel shows is the
// nid (fs/erofs/internal.h erofs_iloc).
func (b broken) inode(t *testing.T, im corpus.Image, path string) int {
	t.Helper()
	for _, e := range im.Listing(t) {
		if e.Path == path {
			return int(binary.LittleEndian.Uint32(b[metaBlock:]))*b.blockSize() + int(e.Ino)*32
		}
	}
	t.Fatalf("%s has no %s", im.Name, path)
	return 0
}

// Where an inode of either version has what the tests change (erofs_fs.h
// erofs_inode_compact, erofs_inode_extended).
const (
	inodeSize  = 8
	inodeBlock = 16
)

// serveBroken has a child mount the image.
func serveBroken(t *testing.T, name string, b broken, extra []byte) *server {
	t.Helper()
	image := filepath.Join(t.TempDir(), "broken.erofs")
	if err := os.WriteFile(image, b, 0o644); err != nil {
		t.Fatal(err)
	}
	if extra != nil {
		if err := os.WriteFile(image+".blob", extra, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	s := startServer(t, name, image)
	t.Cleanup(func() { s.end(t) })
	return s
}

// wrong tells the errors that a broken image may end in.
func wrong(err error) bool { return errors.Is(err, syscall.EIO) || errors.Is(err, syscall.EUCLEAN) }

// TestPastTheEnd: an image in order but for an address that leads past the end of
// its blob is an error where that address is used.
func TestPastTheEnd(t *testing.T) {
	require.Has(t, "root", "fuse", "kernel-erofs", "loop")
	const gigabyte = 1 << 30
	for _, c := range []struct {
		name, image, path string
		patch             func(b broken, inode int)
		off               int64
		// notByLoop: the address is of metadata. Those the block layer fills with
		// zeros past the end of a device (fs/buffer.c block_read_full_folio).
		notByLoop bool
	}{
		{name: "data, next block", image: "plain", patch: func(b broken, inode int) {
			b.put32(inode+inodeBlock, uint32(len(b)/b.blockSize()))
		}},
		{name: "data, far", image: "plain", patch: func(b broken, inode int) { b.put32(inode+inodeBlock, 0xffff_0000) }},
		{name: "data, second block", image: "plain", off: 4096, patch: func(b broken, inode int) {
			b.put32(inode+inodeBlock, uint32(len(b)/b.blockSize()-1))
		}},
		{name: "data, small blocks", image: "blk512", off: 4096, patch: func(b broken, inode int) {
			b.put32(inode+inodeBlock, uint32(len(b)/b.blockSize()-5))
		}},
		{name: "block map", image: "blockmap", off: 2 * gigabyte, notByLoop: true, patch: func(b broken, inode int) {
			b.put32(inode+inodeSize+4, 1<<8)
		}},
		{name: "chunk indexes", image: "chunk-indexes", off: 2 * gigabyte, notByLoop: true, patch: func(b broken, inode int) {
			b.put32(inode+inodeSize+4, 1<<8)
		}},
		{name: "compressed index", image: "lz4-legacy", off: 2 * gigabyte, notByLoop: true, patch: func(b broken, inode int) {
			b.put32(inode+inodeSize+4, 1<<8)
		}},
	} {
		for _, name := range []string{"file", "loop", "fuse"} {
			if name == "loop" && c.notByLoop {
				continue
			}
			t.Run(c.name+"/"+name, func(t *testing.T) {
				im := corpus.Get(t, c.image)
				b := breakableCopy(im)
				path, _ := largest(t, c.image)
				inode := b.inode(t, im, path)
				if b[inode]&1 == 0 {
					t.Fatalf("%s of %s is no extended inode", path, c.image)
				}
				c.patch(b, inode)
				s := serveBroken(t, name, b, nil)
				f, err := os.Open(filepath.Join(s.dir, path))
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				buf := make([]byte, 512)
				if n, err := f.ReadAt(buf, c.off); !wrong(err) {
					t.Errorf("%d bytes, %v: %.32x", n, err, buf)
				}
				// The rest of the image is there.
				if err := compare(s.dir, find(t, im, "mixed/half")); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

func find(t *testing.T, im corpus.Image, path string) corpus.Entry {
	t.Helper()
	for _, e := range im.Listing(t) {
		if e.Path == path {
			return e
		}
	}
	t.Fatalf("%s has no %s", im.Name, path)
	return corpus.Entry{}
}

// TestCutOff: of an image that leads past the end of its blob in many ways, there is
// what there is, and errors, but nothing made up.
func TestCutOff(t *testing.T) {
	require.Has(t, "root", "fuse", "kernel-erofs", "loop")
	for _, image := range []string{"plain", "inline", "blk512", "chunk-indexes", "multidev", "lz4", "lz4-1m", "lz4-frag"} {
		im := corpus.Get(t, image)
		for _, name := range []string{"file", "loop", "fuse"} {
			t.Run(im.Name+"/"+name, func(t *testing.T) {
				b := breakableCopy(im)
				left := len(b) / b.blockSize() * 3 / 4
				b = b[:left*b.blockSize()]
				b.put32(blocks, uint32(left))
				s := serveBroken(t, name, b, im.Blob)
				right, failed := 0, 0
				for _, e := range im.Listing(t) {
					err := compare(s.dir, e)
					switch {
					case err == nil:
						right++
					case wrong(err):
						failed++
					default:
						t.Errorf("%s: %v", e.Path, err)
					}
				}
				if right == 0 || failed == 0 {
					t.Errorf("%d right, %d failed", right, failed)
				}
			})
		}
	}
}

// compare reads one path, and no other.
func compare(dir string, want corpus.Entry) error {
	path := filepath.Join(dir, want.Path)
	if want.Mode&unix.S_IFMT == unix.S_IFDIR {
		_, err := os.ReadDir(path)
		return err
	}
	got, err := tree.Walk(path)
	if err != nil {
		return err
	}
	want.Path = "."
	if d := tree.Diff([]corpus.Entry{want}, got); len(d) > 0 {
		return errors.New(d[0])
	}
	return nil
}
