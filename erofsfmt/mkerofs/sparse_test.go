package mkerofs

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
)

// A sparse reader has data at places that it knows, and zeros everywhere else.
type holey struct {
	size int64
	data map[int64][]byte
	pos  int64
	tell bool // of its holes
}

// next is where the next data begins that is not wholly behind pos, or the end.
func (s *holey) next() int64 {
	next := s.size
	for off, p := range s.data {
		if off+int64(len(p)) > s.pos {
			next = min(next, max(off, s.pos))
		}
	}
	return next
}

func (s *holey) Read(p []byte) (int, error) {
	if s.pos == s.size {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), s.size-s.pos)]
	clear(p)
	for off, data := range s.data {
		switch {
		case off >= s.pos && off < s.pos+int64(len(p)):
			copy(p[off-s.pos:], data)
		case off < s.pos && off+int64(len(data)) > s.pos:
			copy(p, data[s.pos-off:])
		}
	}
	s.pos += int64(len(p))
	return len(p), nil
}

func (s *holey) Close() error { return nil }

type tellingHoley struct{ *holey }

func (s tellingHoley) SkipHole() (int64, error) {
	n := s.next() - s.pos
	s.pos += n
	return n, nil
}

func (s holey) open() (io.ReadCloser, error) {
	if s.tell {
		return tellingHoley{&s}, nil
	}
	return &s, nil
}

// An image does not show whether a source told of its holes.
func TestHolesThatAreTold(t *testing.T) {
	const chunk = 8192
	data := map[int64][]byte{0: []byte("a"), chunk - 1: []byte("bcd"), 5*chunk + 100: content(1, 2*chunk), 20 * chunk: []byte("e"), 30*chunk - 1: {1}}
	for _, size := range []int64{30 * chunk, 40 * chunk, 40*chunk + 5} {
		var told, read memory
		for _, c := range []struct {
			to   *memory
			tell bool
		}{{&told, true}, {&read, false}} {
			e := Entry{Path: "f", Mode: ModeRegular | 0o644, Mtime: time.Unix(0, 0), Size: size, Open: holey{size: size, data: data, tell: c.tell}.open}
			var consumed int64
			buildTo(t, c.to, Options{ChunkSize: chunk, Progress: func(_, n int64) { consumed = n }}, []Entry{e})
			if consumed != size {
				t.Errorf("%d bytes of %d were consumed", consumed, size)
			}
		}
		if !bytes.Equal(told, read) {
			t.Errorf("%d bytes: another image", size)
		}
	}
}

type wrongHole struct{ holey }

func (w *wrongHole) SkipHole() (int64, error) { return w.size + 1, nil }

type failingHole struct{ holey }

func (w *failingHole) SkipHole() (int64, error) { return 0, errTest }

func TestHolesThatAreWrong(t *testing.T) {
	build := func(r io.ReadCloser) error {
		b, err := New(new(memory), Options{ChunkSize: 4096})
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Add(Entry{Path: "f", Mode: ModeRegular, Size: 9000, Open: func() (io.ReadCloser, error) { return r, nil }}); err != nil {
			t.Fatal(err)
		}
		_, err = b.Finish(t.Context())
		return err
	}
	if err := build(&wrongHole{holey{size: 9000}}); err == nil {
		t.Error("a hole that is longer than the file was believed")
	}
	if err := build(&failingHole{holey{size: 9000}}); !errors.Is(err, errTest) {
		t.Errorf("an error became %v", err)
	}
}

// A file of 5 TiB: its size and its places need more than 32 bits. Its index is 10 MiB, its data a few chunks.
func TestHugeFile(t *testing.T) {
	const size = 5<<40 + 3
	data := map[int64][]byte{0: []byte("first"), 1<<32 - 1: []byte("at 4 GiB"), 3<<40 + 12345: []byte("in the middle"), size - 4: []byte("last")}
	file := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	entries := []Entry{{Path: "huge", Mode: ModeRegular | 0o644, Mtime: time.Unix(0, 0), Size: size, Open: holey{size: size, data: data, tell: true}.open}}
	// 5 chunks and a block of 3 bytes, since two pieces lie in two chunks; the superblock's block; 2560 of the index and
	// one of its last entries and of the inodes.
	if n, want := buildTo(t, f, Options{ChunkSize: maxSegment}, entries), int64(5*maxSegment+4096+(1+2560+1)*4096); n != want {
		t.Errorf("an image of %d bytes, want %d", n, want)
	}
	image, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	img, err := erofsfmt.Open(t.Context(), sourcetest.Memory(image))
	if err != nil {
		t.Fatal(err)
	}
	nid, err := img.Lookup(t.Context(), rootInode(t, img), "huge")
	if err != nil {
		t.Fatal(err)
	}
	ino, err := img.Inode(t.Context(), nid)
	if err != nil || ino.Size != size {
		t.Fatalf("size %d, %v", ino.Size, err)
	}
	checkSparse(t, data, func(p []byte, off int64) error { return img.ReadFile(t.Context(), &ino, p, off) })
	t.Run("kernel", func(t *testing.T) {
		require.Has(t, "root", "kernel-erofs")
		dir := t.TempDir()
		if err := unix.Mount(file, dir, "erofs", unix.MS_RDONLY, ""); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := unix.Unmount(dir, 0); err != nil {
				t.Error(err)
			}
		}()
		huge, err := os.Open(filepath.Join(dir, "huge"))
		if err != nil {
			t.Fatal(err)
		}
		defer huge.Close()
		if st, err := huge.Stat(); err != nil || st.Size() != size {
			t.Errorf("size %v, %v", st, err)
		}
		checkSparse(t, data, func(p []byte, off int64) error {
			_, err := huge.ReadAt(p, off)
			return err
		})
	})
}

// checkSparse reads each piece of data with what is around it.
func checkSparse(t *testing.T, data map[int64][]byte, read func(p []byte, off int64) error) {
	t.Helper()
	for off, want := range data {
		before := min(off, 10_000)
		got := make([]byte, before+int64(len(want)))
		if err := read(got, off-before); err != nil || !zeroOrEmpty(got[:before]) || !bytes.Equal(got[before:], want) {
			t.Errorf("at %d: %q, %v, want %q after zeros", off, got[before:], err, want)
		}
	}
	for _, off := range []int64{1 << 20, 1 << 33, 4 << 40} {
		got := bytes.Repeat([]byte{1}, 5000)
		if err := read(got, off); err != nil || !zero(got) {
			t.Errorf("at %d: something else than zeros, %v", off, err)
		}
	}
}

func zeroOrEmpty(p []byte) bool { return len(p) == 0 || zero(p) }
