package erofsfmt

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"sync"
	"testing"

	"github.com/erofs-oci/erofs-oci/tests/corpus"
)

// TestPrefetch: what was prefetched is read without the source, but for what is not
// worth it.
func TestPrefetch(t *testing.T) {
	ctx := context.Background()
	for _, name := range []string{"zstd-64k", "lzma", "lz4", "plain"} {
		src := &counted{memory: memory(corpus.Get(t, name).Data)}
		im, err := Open(ctx, src)
		if err != nil {
			t.Fatal(err)
		}
		ino := find(t, im, "mixed", "half")
		want := make([]byte, ino.Size)
		if err := openReadFile(t, name, want); err != nil {
			t.Fatal(err)
		}
		if err := im.Prefetch(ctx, ino, 0, ino.Size+1); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		got, before := make([]byte, ino.Size), src.reads
		for off := int64(0); off < ino.Size; off += 5000 {
			if err := im.ReadFile(ctx, ino, got[off:min(off+5000, ino.Size)], off); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s: other bytes", name)
		}
		if reads := src.reads - before; (reads == 0) != (name != "lz4" && name != "plain") {
			t.Errorf("%s: %d reads of the source", name, reads)
		}
		for _, off := range []int64{-1, ino.Size, ino.Size + 1} {
			if err := im.Prefetch(ctx, ino, off, 100); err != nil {
				t.Errorf("%s: at %d: %v", name, off, err)
			}
		}
	}
}

// openReadFile fills p with the file by an image of its own.
func openReadFile(t *testing.T, name string, p []byte) error {
	im := openCorpus(t, corpus.Get(t, name))
	return im.ReadFile(context.Background(), find(t, im, "mixed", "half"), p, 0)
}

// TestParallelReaders: readers of one file that wait for each other's pclusters, with
// prefetches between them and a cache that forgets.
func TestParallelReaders(t *testing.T) {
	for _, limit := range []int64{0, 1 << 18, -1} {
		for _, name := range []string{"zstd-64k", "lzma", "lz4-frag", "lz4-dedupe"} {
			if !slices.ContainsFunc(corpus.Images(t), func(c corpus.Image) bool { return c.Name == name }) {
				continue
			}
			im, err := OpenWith(context.Background(), memory(corpus.Get(t, name).Data), Options{CacheBytes: limit})
			if err != nil {
				t.Fatal(err)
			}
			ino := find(t, im, "mixed", "half")
			want := make([]byte, ino.Size)
			if err := openReadFile(t, name, want); err != nil {
				t.Fatal(err)
			}
			var readers sync.WaitGroup
			for i := range int64(6) {
				readers.Go(func() {
					p := make([]byte, 7000+i*3000)
					for off := i * 100; off < ino.Size; off += int64(len(p)) {
						p := p[:min(int64(len(p)), ino.Size-off)]
						if i == 0 {
							if err := im.Prefetch(context.Background(), ino, off, 50_000); err != nil {
								t.Error(err)
							}
						}
						if err := im.ReadFile(context.Background(), ino, p, off); err != nil || !bytes.Equal(p, want[off:off+int64(len(p))]) {
							t.Errorf("%s: %d bytes at %d: %v", name, len(p), off, err)
						}
					}
				})
			}
			readers.Wait()
			if used := im.pclusters.used; limit > 0 && used > limit || len(im.pclusters.flights) != 0 {
				t.Errorf("%s: %d bytes remembered, %d flights left", name, used, len(im.pclusters.flights))
			}
		}
	}
}

// TestParallelFault: a pcluster that cannot be decoded fails a read of many, and the
// ones beside it are read as before.
func TestParallelFault(t *testing.T) {
	ctx := context.Background()
	for _, name := range []string{"lz4", "zstd-64k", "lzma"} {
		data := slices.Clone(corpus.Get(t, name).Data)
		im, err := OpenWith(ctx, memory(data), Options{CacheBytes: -1})
		if err != nil {
			t.Fatal(err)
		}
		ino := find(t, im, "mixed", "half")
		e := encodedExtent(t, im, ino)
		clear(data[e.at.off : e.at.off+e.plen])
		p := make([]byte, ino.Size)
		if err := im.ReadFile(ctx, ino, p, 0); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: all of it: %v, want %v", name, err, ErrCorrupt)
		}
		if err := im.ReadFile(ctx, ino, p[:min(100, e.la)], 0); err != nil {
			t.Errorf("%s: before it: %v", name, err)
		}
		if err := im.ReadFile(ctx, ino, p[:1], min(e.end(), ino.Size-1)); err != nil && e.end() < ino.Size {
			t.Errorf("%s: behind it: %v", name, err)
		}
		if n := len(im.helpers); n != 0 {
			t.Errorf("%s: %d helpers left", name, n)
		}
	}
}

// encodedExtent is the second encoded extent of a file, or the first if it has no
// other.
func encodedExtent(t *testing.T, im *Image, ino *Inode) extent {
	t.Helper()
	m := im.mapper(ino)
	defer m.release()
	var found []extent
	for off := int64(0); off < ino.Size && len(found) < 2; {
		e, err := m.extentAt(context.Background(), off)
		if err != nil {
			t.Fatal(err)
		}
		if e.kind == encoded {
			found = append(found, e)
		}
		off = e.end()
	}
	if len(found) == 0 {
		t.Fatal("the file is not compressed")
	}
	return found[len(found)-1]
}
