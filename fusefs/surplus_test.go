package fusefs

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
)

func TestBeside(t *testing.T) {
	const k = 1 << 10
	for _, c := range []struct {
		name           string
		off, n         int // the extent
		from, to, size int // asked for, and the file
		want           string
	}{
		{"in the middle", 0, 64 * k, 16 * k, 20 * k, 100 * k, "[0 16384) [20480 65536) "},
		{"not whole pages", 100, 64 * k, 16*k + 1, 20*k + 1, 100 * k, "[4096 16384) [24576 65536) "},
		{"at the beginning", 0, 64 * k, 0, 4 * k, 100 * k, "[4096 65536) "},
		{"at the end", 0, 64 * k, 60 * k, 64 * k, 100 * k, "[0 61440) "},
		{"the end of the file", 0, 64*k + 10, 0, 4 * k, 64*k + 10, "[4096 65546) "},
		{"it begins before", 8 * k, 64 * k, 4 * k, 12 * k, 100 * k, "[12288 73728) "},
		{"it ends behind", 0, 64 * k, 60 * k, 70 * k, 100 * k, "[0 61440) "},
		{"all of it", 0, 8 * k, 0, 8 * k, 100 * k, ""},
		{"less than a page", 100, 1000, 5000, 6000, 100 * k, ""},
	} {
		data := make([]byte, c.n)
		got := ""
		for _, r := range beside(run{int64(c.off), data}, int64(c.from), int64(c.to), int64(c.size), 4*k) {
			got += fmt.Sprintf("[%d %d) ", r.off, r.off+int64(len(r.data)))
		}
		if got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

// TestSurplus: what is stored are the file's bytes, in whole pages, and never one
// that was asked for.
func TestSurplus(t *testing.T) {
	page := int64(os.Getpagesize())
	stored := 0
	for _, name := range []string{"zstd-64k", "deflate-64k", "lz4hc-64k", "lzma", "lz4", "plain"} {
		image := corpus.Get(t, name)
		im, err := erofsfmt.OpenWith(t.Context(), sourcetest.Memory(image.Data), erofsfmt.Options{CacheBytes: -1})
		if err != nil {
			t.Fatal(err)
		}
		f := newFileSystem(t.Context(), im, nil)
		for _, e := range image.Listing(t) {
			ino := inodeAt(t, im, e.Path)
			if ino.Mode>>12 != erofsfmt.DT_REG || ino.Size < surplusExtent {
				continue
			}
			whole := make([]byte, ino.Size)
			if err := im.ReadFile(t.Context(), &ino, whole, 0); err != nil {
				t.Fatal(err)
			}
			in := fuse.ReadIn{Size: uint32(page)}
			in.NodeId = f.ids.node(ino.Nid)
			var mu sync.Mutex
			f.surplus = &surplus{store: func(node uint64, off int64, data []byte) fuse.Status {
				mu.Lock()
				defer mu.Unlock()
				end := off + int64(len(data))
				if node != in.NodeId || off%page != 0 || end%page != 0 && end != ino.Size || !bytes.Equal(data, whole[off:end]) {
					t.Errorf("%s: %s: stored %d bytes at %d of %d for node %d", name, e.Path, len(data), off, ino.Size, node)
				}
				if off < int64(in.Offset)+page && end > int64(in.Offset) {
					t.Errorf("%s: %s: stored %d bytes at %d, asked for %d", name, e.Path, len(data), off, in.Offset)
				}
				stored++
				return fuse.OK
			}}
			for range 2 * denseReads {
				in.Offset = uint64(rand.Int64N((ino.Size+page-1)/page) * page)
				buf := make([]byte, page)
				got, st := f.Read(nil, &in, buf)
				if b, _ := got.Bytes(nil); st != fuse.OK || !bytes.Equal(b, whole[in.Offset:][:len(b)]) {
					t.Fatalf("%s: %s: %v", name, e.Path, st)
				}
				f.surplus.wg.Wait()
			}
		}
	}
	if stored == 0 {
		t.Error("nothing was stored")
	}
}

// TestAround: windows are read of a file that a lot is read of, a page at a time.
func TestAround(t *testing.T) {
	s := &surplus{}
	around := func(node uint64, size, off, n int64) string {
		begin, end := s.around(node, size, off, n)
		return fmt.Sprintf("%d to %d KiB", begin>>10, end>>10)
	}
	const none, page = "0 to 0 KiB", 4 << 10
	// Of 10,000 windows a quarter is 2500.
	for i := range int64(2499) {
		if got := around(1, 10_000*window, i*window, page); got != none {
			t.Fatalf("read %d: %s", i, got)
		}
	}
	for i, c := range []struct {
		node         uint64
		size, off, n int64
		want         string
	}{
		{1, 10_000 * window, 3*window + 2*page, page, "192 to 256 KiB"},
		{1, 10_000 * window, 3*window + 60<<10, page, "192 to 256 KiB"},
		{1, 10_000 * window, 3 * window, 2 * page, none},
		{1, 10_000 * window, 4*window - 1, page, none},
		{1, 10_000 * window, 10_000*window - page, page, "639936 to 640000 KiB"},
		{2, 10_000 * window, 0, page, none},
	} {
		if got := around(c.node, c.size, c.off, c.n); got != c.want {
			t.Errorf("%d: %s, want %s", i, got, c.want)
		}
	}
	// A small file takes a few reads all the same, and ends before its window.
	for i := range denseReads - 1 {
		if got := around(3, 100<<10, 68<<10, page); got != none {
			t.Errorf("small, read %d: %s", i, got)
		}
	}
	if got := around(3, 100<<10, 68<<10, page); got != "64 to 100 KiB" {
		t.Errorf("small: %s", got)
	}
}
