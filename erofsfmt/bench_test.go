package erofsfmt

import (
	"context"
	"testing"

	"github.com/erofs-oci/erofs-oci/tests/corpus"
)

// What a FUSE server does most: look up, stat, list, and read 4 KiB somewhere.

func BenchmarkLookup(b *testing.B) {
	im := openCorpus(b, corpus.Get(b, "lz4"))
	dir := find(b, im, "bigdir")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := im.Lookup(context.Background(), dir, "0080"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkInode(b *testing.B) {
	im := openCorpus(b, corpus.Get(b, "lz4"))
	nid := find(b, im, "bigdir", "0080").Nid
	b.ReportAllocs()
	for b.Loop() {
		if _, err := im.Inode(context.Background(), nid); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkReadDir(b *testing.B) {
	im := openCorpus(b, corpus.Get(b, "lz4"))
	dir := find(b, im, "bigdir")
	n := 0
	b.ReportAllocs()
	for b.Loop() {
		n = 0
		if err := im.ReadDir(context.Background(), dir, 0, func(Dirent) bool { n++; return true }); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/entry")
}

func BenchmarkReadFile(b *testing.B) {
	for _, name := range []string{"plain", "chunked", "lz4", "lz4hc-64k", "zstd-64k", "deflate-64k", "lzma", "lz4-frag"} {
		for _, n := range []int64{4096, 128 << 10} {
			b.Run(name+map[int64]string{4096: "/4KiB", 128 << 10: "/128KiB"}[n], func(b *testing.B) {
				im := openCorpus(b, corpus.Get(b, name))
				ino := find(b, im, "mixed", "half")
				p := make([]byte, n)
				b.SetBytes(n)
				b.ReportAllocs()
				off := int64(0)
				for b.Loop() {
					if err := im.ReadFile(context.Background(), ino, p, off); err != nil {
						b.Fatal(err)
					}
					if off += n; off+n > ino.Size {
						off = 0
					}
				}
			})
		}
	}
}

// BenchmarkDecode reads whole files of which nothing is remembered.
func BenchmarkDecode(b *testing.B) {
	for _, name := range []string{"plain", "lz4", "lz4hc-64k", "zstd-64k", "deflate-64k", "lzma"} {
		b.Run(name, func(b *testing.B) {
			im, err := OpenWith(context.Background(), memory(corpus.Get(b, name).Data), Options{CacheBytes: -1})
			if err != nil {
				b.Fatal(err)
			}
			ino := find(b, im, "mixed", "half")
			p := make([]byte, ino.Size)
			b.SetBytes(ino.Size)
			b.ReportAllocs()
			for b.Loop() {
				if err := im.ReadFile(context.Background(), ino, p, 0); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestAllocations: what a FUSE server does for each request allocates nothing where
// the image remembers what it needs, or next to nothing where it has to decode.
func TestAllocations(t *testing.T) {
	ctx := context.Background()
	for _, name := range []string{"plain", "chunked", "lz4", "lz4hc-64k", "zstd-64k", "deflate-64k", "lzma", "lz4-frag"} {
		im := openCorpus(t, corpus.Get(t, name))
		ino, dir, small := find(t, im, "mixed", "half"), find(t, im, "bigdir"), find(t, im, "bigdir", "0080")
		p := make([]byte, ino.Size)
		entries := 0.0
		if err := im.ReadDir(ctx, dir, 0, func(Dirent) bool { entries++; return true }); err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct {
			name string
			most float64
			do   func() error
		}{
			{"read 4 KiB", 0, func() error { return im.ReadFile(ctx, ino, p[:4096], 8192) }},
			{"read 4 KiB elsewhere", 0, func() error { return im.ReadFile(ctx, ino, p[:4096], ino.Size/2) }},
			// Goroutines that help with decoding are the rest.
			{"read all", 16, func() error { return im.ReadFile(ctx, ino, p, 0) }},
			{"inode", 0, func() error { _, err := im.Inode(ctx, small.Nid); return err }},
			{"lookup", 0, func() error { _, err := im.Lookup(ctx, dir, "0080"); return err }},
			{"list, an allocation for each name", entries, func() error {
				return im.ReadDir(ctx, dir, 0, func(Dirent) bool { return true })
			}},
		} {
			got := testing.AllocsPerRun(100, func() {
				if err := c.do(); err != nil {
					t.Fatal(err)
				}
			})
			if got > c.most {
				t.Errorf("%s: %s: %v allocations, at most %v", name, c.name, got, c.most)
			}
		}
	}
}
