package blobcache

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// BenchmarkHit reads at random places that are present, and the same of a plain file of the same content.
func BenchmarkHit(b *testing.B) {
	const size = 64 << 20
	s := newServer(size)
	blob := openBlob(b, openCache(b, Options{}), s)
	if err := blob.ReadAt(ctx, make([]byte, size), 0); err != nil {
		b.Fatal(err)
	}
	name := filepath.Join(b.TempDir(), "plain")
	if err := os.WriteFile(name, s.content, 0o600); err != nil {
		b.Fatal(err)
	}
	plain, err := os.Open(name)
	if err != nil {
		b.Fatal(err)
	}
	defer plain.Close()
	for _, n := range []int{4 << 10, 128 << 10} {
		run := func(name string, read func(p []byte, off int64) error) {
			b.Run(fmt.Sprintf("%s/%dKiB", name, n>>10), func(b *testing.B) {
				p := make([]byte, n)
				rng := rand.New(rand.NewPCG(1, 1))
				b.SetBytes(int64(n))
				b.ReportAllocs()
				for b.Loop() {
					if err := read(p, rng.Int64N(size-int64(n))); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
		run("cache", func(p []byte, off int64) error { return blob.ReadAt(ctx, p, off) })
		run("pread", func(p []byte, off int64) error { _, err := plain.ReadAt(p, off); return err })
	}
}

// BenchmarkFresh is what a hit pays for readahead: a look whether it is the first read of what was fetched ahead.
func BenchmarkFresh(b *testing.B) {
	const chunks = 4096
	m := make(bitmap, chunks/64)
	for i := int64(0); b.Loop(); i++ {
		if m.any(i%chunks, i%chunks+1) {
			b.Fatal("nothing was fetched ahead")
		}
	}
}

// BenchmarkColdFill is what the cache adds to a server that costs nothing.
func BenchmarkColdFill(b *testing.B) {
	const size = 32 << 20
	s := newServer(size)
	c := openCache(b, Options{})
	p := make([]byte, size)
	b.SetBytes(size)
	for b.Loop() {
		blob := openBlob(b, c, s)
		if err := blob.ReadAt(ctx, p, 0); err != nil {
			b.Fatal(err)
		}
		if err := blob.Close(); err != nil {
			b.Fatal(err)
		}
	}
}
