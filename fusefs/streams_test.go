package fusefs

import (
	"bytes"
	"context"
	"testing"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
)

// TestAdvance: what is decoded ahead for a row of reads, as {from, to} in KiB.
func TestAdvance(t *testing.T) {
	type read struct{ nid, off, n, from, to int64 }
	for _, c := range []struct {
		name  string
		reads []read
	}{
		{"a stream", []read{
			{1, 0, 128, 0, 0}, // the first is none
			{1, 128, 128, 256, 1280},
			{1, 256, 128, 0, 0}, // enough is ahead
			{1, 384, 128, 0, 0},
			{1, 512, 128, 0, 0},
			{1, 640, 128, 1280, 1792},
		}},
		{"out of order", []read{
			{1, 0, 128, 0, 0},
			{1, 256, 128, 384, 1408},
			{1, 128, 128, 0, 0},
			{1, 384, 128, 0, 0},
		}},
		{"somewhere", []read{{1, 0, 4, 0, 0}, {1, 5000, 4, 0, 0}, {1, 2000, 4, 0, 0}, {1, 9000, 4, 0, 0}}},
		{"two files", []read{
			{1, 0, 128, 0, 0},
			{2, 0, 128, 0, 0},
			{1, 128, 128, 256, 1280},
			{2, 128, 128, 256, 1280},
		}},
		{"the end of a file", []read{
			{1, 9800, 100, 0, 0},
			{1, 9900, 50, 9950, 10000},
			{1, 9950, 50, 0, 0},
		}},
	} {
		s := &streams{}
		for i, r := range c.reads {
			ino := &erofsfmt.Inode{Nid: erofsfmt.Nid(r.nid), Size: 10000 << 10}
			from, to := s.advance(ino, r.off<<10, (r.off+r.n)<<10)
			if from != to {
				s.done()
			}
			if from != r.from<<10 || to != r.to<<10 {
				t.Errorf("%s: read %d: %d to %d KiB, want %d to %d", c.name, i, from>>10, to>>10, r.from, r.to)
			}
		}
	}
}

// TestAdvanceBounds: no more streams than prefetchers are served at once, and none
// after the end.
func TestAdvanceBounds(t *testing.T) {
	s := &streams{}
	started := 0
	for nid := range erofsfmt.Nid(prefetchers + 2) {
		ino := &erofsfmt.Inode{Nid: nid, Size: 1 << 30}
		s.advance(ino, 0, 4096)
		if from, to := s.advance(ino, 4096, 8192); from != to {
			started++
		}
	}
	if started != prefetchers {
		t.Errorf("%d at once, want %d", started, prefetchers)
	}
	for range started {
		s.done()
	}
	s.wait()
	ino := &erofsfmt.Inode{Nid: 99, Size: 1 << 30}
	s.advance(ino, 0, 4096)
	if from, to := s.advance(ino, 4096, 8192); from != to {
		t.Error("one more after the end")
	}
}

// TestStreamsRead: a file that is read in pieces with all that runs beside it has
// the same bytes, and nothing runs on after wait.
func TestStreamsRead(t *testing.T) {
	for _, name := range []string{"zstd-64k", "deflate-64k", "lzma", "lz4", "lz4-frag", "plain"} {
		image := corpus.Get(t, name)
		ctx, cancel := context.WithCancel(t.Context())
		im, err := erofsfmt.Open(ctx, sourcetest.Memory(image.Data))
		if err != nil {
			t.Fatal(err)
		}
		s := &streams{im: im, ctx: ctx}
		for _, e := range image.Listing(t) {
			ino := inodeAt(t, im, e.Path)
			if ino.Mode>>12 != erofsfmt.DT_REG || ino.Size == 0 {
				continue
			}
			whole, got := make([]byte, ino.Size), make([]byte, ino.Size)
			if err := im.ReadFile(ctx, &ino, whole, 0); err != nil {
				t.Fatal(err)
			}
			for off := int64(0); off < ino.Size; off += 10_000 {
				n := min(10_000, ino.Size-off)
				s.saw(&ino, off, n)
				if err := im.ReadFile(ctx, &ino, got[off:off+n], off); err != nil {
					t.Fatal(err)
				}
			}
			if !bytes.Equal(whole, got) {
				t.Errorf("%s: %s: other bytes", name, e.Path)
			}
		}
		cancel()
		s.wait()
	}
}

func inodeAt(t *testing.T, im *erofsfmt.Image, path string) erofsfmt.Inode {
	t.Helper()
	ino, err := im.Inode(t.Context(), im.Root())
	for name := range bytes.SplitSeq([]byte(path), []byte("/")) {
		if err == nil && len(name) > 0 && string(name) != "." {
			var nid erofsfmt.Nid
			if nid, err = im.Lookup(t.Context(), &ino, string(name)); err == nil {
				ino, err = im.Inode(t.Context(), nid)
			}
		}
	}
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return ino
}
