package blobcache

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
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
				before := cpuTime(b)
				for b.Loop() {
					if err := read(p, rng.Int64N(size-int64(n))); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(cpuTime(b)-before)/float64(b.N), "cpu-ns/op")
			})
		}
		run("cache", func(p []byte, off int64) error { return blob.ReadAt(ctx, p, off) })
		run("pread", func(p []byte, off int64) error { _, err := plain.ReadAt(p, off); return err })
	}
}

// cpuTime is what this process has computed so far, in nanoseconds: it depends less on what else the machine does.
func cpuTime(b *testing.B) int64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return u.Utime.Nano() + u.Stime.Nano()
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

// BenchmarkColdFill fetches a blob over HTTP on this machine, through an empty cache and by a bare GET.
func BenchmarkColdFill(b *testing.B) {
	const size = 64 << 20
	s := newServer(size)
	url := serve(b, s)
	defer http.DefaultClient.CloseIdleConnections()
	far := &remote{url, size}
	buf := make([]byte, 1<<20)
	b.Run("cache", func(b *testing.B) {
		c := openCache(b, Options{})
		b.SetBytes(size)
		for b.Loop() {
			blob, err := c.Open(testDigest, size, far, OpenOptions{})
			if err != nil {
				b.Fatal(err)
			}
			for off := int64(0); off < size; off += int64(len(buf)) {
				if err := blob.ReadAt(ctx, buf, off); err != nil {
					b.Fatal(err)
				}
			}
			if got := blob.Stats().BytesFetched; got != size {
				b.Errorf("%d bytes fetched, want %d", got, size)
			}
			if err := errors.Join(blob.Purge(), blob.Close()); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("bare", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			body, _, _, err := far.Fetch(ctx, 0, size)
			if err != nil {
				b.Fatal(err)
			}
			for err == nil {
				_, err = io.ReadFull(body, buf)
			}
			if err = errors.Join(ignore(err, io.EOF), body.Close()); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkFirstTouch reads 4 KiB of each chunk that an earlier mount left: all of it is read, and its checksum
// compared.
func BenchmarkFirstTouch(b *testing.B) {
	const size = 64 << 20
	p := &pattern{size: size}
	o := Options{Readahead: -1}
	dir := b.TempDir()
	buf := make([]byte, 4<<10)
	chunks := 0
	for b.Loop() {
		c, err := New(dir, o)
		if err != nil {
			b.Fatal(err)
		}
		blob, err := c.Open(testDigest, size, p, OpenOptions{})
		if err != nil {
			b.Fatal(err)
		}
		for off := int64(0); off < size; off += defaultChunkSize {
			if err := blob.ReadAt(ctx, buf, off); err != nil {
				b.Fatal(err)
			}
			chunks++
		}
		if err := c.Close(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(chunks), "ns/chunk")
	if got := p.fetched.Load(); got != size {
		b.Errorf("%d bytes fetched, want %d", got, size)
	}
}

// BenchmarkGuard is what keeps a hole from being read as data, three ways: the generation in memory that readers
// compare, one in the file, and a lock around each pread.
func BenchmarkGuard(b *testing.B) {
	s := newServer(4 * cs)
	blob := openBlob(b, openCache(b, Options{ChunkSize: cs, Readahead: -1}), s)
	if err := readNow(ctx, blob, s, 0, 4*cs); err != nil {
		b.Fatal(err)
	}
	st, d := blob.store, blob.store.disk
	b.Run("memory", func(b *testing.B) {
		for b.Loop() {
			before := st.generation.Load()
			if !st.present.all(0, 1) || st.generation.Load() != before {
				b.Fatal("changed")
			}
		}
	})
	b.Run("file", func(b *testing.B) {
		var e [8]byte
		for b.Loop() {
			for range 2 {
				if _, err := d.file.ReadAt(e[:], d.entryAt(0)); err != nil {
					b.Fatal(err)
				}
			}
		}
	})
	b.Run("lock", func(b *testing.B) {
		for b.Loop() {
			if err := errors.Join(d.lockChunk(unix.F_RDLCK, 0), d.lockChunk(unix.F_UNLCK, 0)); err != nil {
				b.Fatal(err)
			}
		}
	})
}
