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
