package integrity

import (
	"bytes"
	"context"
	"io"
	"testing"
)

const benchChunk = 256 << 10

func benchIndex(tb testing.TB, alg Algorithm, data []byte) *ChunkIndex {
	tb.Helper()
	w, err := NewChunkIndexWriter(benchChunk, alg)
	if err != nil {
		tb.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		tb.Fatal(err)
	}
	raw, err := w.Marshal()
	if err != nil {
		tb.Fatal(err)
	}
	x, err := ParseChunkIndex(raw, int64(len(data)), ChunkLimits{})
	if err != nil {
		tb.Fatal(err)
	}
	return x
}

// warm is a verifier that has the hash blocks of all data.
func warm(tb testing.TB, f *tree) *Verifier {
	tb.Helper()
	r := f.open(tb).NewVerifier((&reader{blob: f.blob}).read, VerifierOptions{})
	if err := r.Verify(context.Background(), f.blob[:f.size], 0); err != nil {
		tb.Fatal(err)
	}
	return r
}

// Verifying what is right allocates nothing. (The pool of hashes may lose one to the
// garbage collector, or to the race detector: that is less than one allocation a run.)
func TestVerifyAllocatesNothing(t *testing.T) {
	data := random(4*benchChunk, 1)
	ctx := context.Background()
	for _, alg := range []Algorithm{SHA256, SHA512} {
		x := benchIndex(t, alg, data)
		salted := warm(t, newTree(t, data, VerityOptions{Algorithm: alg, Salt: []byte("salt")}))
		plain := warm(t, newTree(t, data, VerityOptions{Algorithm: alg}))
		for name, do := range map[string]func() error{
			"chunk":       func() error { return x.Verify(x.Find(benchChunk), data[benchChunk:2*benchChunk]) },
			"block, salt": func() error { return salted.Verify(ctx, data[8192:12288], 8192) },
			"block":       func() error { return plain.Verify(ctx, data[8192:12288], 8192) },
			"64 blocks":   func() error { return plain.Verify(ctx, data[benchChunk:2*benchChunk], benchChunk) },
		} {
			if n := testing.AllocsPerRun(100, func() {
				if err := do(); err != nil {
					t.Fatal(err)
				}
			}); n >= 1 {
				t.Errorf("%v, %s: %v allocations", alg, name, n)
			}
		}
	}
}

func BenchmarkVerifyChunk(b *testing.B) {
	data := random(4*benchChunk, 1)
	for _, alg := range []Algorithm{SHA256, SHA512} {
		b.Run(alg.String()+"/256KiB", func(b *testing.B) {
			x := benchIndex(b, alg, data)
			b.SetBytes(benchChunk)
			b.ReportAllocs()
			for b.Loop() {
				if err := x.Verify(1, data[benchChunk:2*benchChunk]); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkVerifyBlocks(b *testing.B) {
	data := random(4*benchChunk, 1)
	for name, n := range map[string]int64{"4KiB": 4096, "256KiB": benchChunk} {
		for salted, salt := range map[string][]byte{"": nil, "/salt": random(32, 2)} {
			b.Run(name+salted, func(b *testing.B) {
				r := warm(b, newTree(b, data, VerityOptions{Salt: salt}))
				b.SetBytes(n)
				b.ReportAllocs()
				for b.Loop() {
					if err := r.Verify(context.Background(), data[n:2*n], n); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

func BenchmarkFindChunk(b *testing.B) {
	bld := NewChunkIndexBuilder(None, SHA256)
	const count = 40_000 // 10 GB
	for i := range int64(count) {
		if err := bld.Add(i*benchChunk, i*benchChunk, make([]byte, 32)); err != nil {
			b.Fatal(err)
		}
	}
	raw, err := bld.Marshal(count*benchChunk, count*benchChunk)
	if err != nil {
		b.Fatal(err)
	}
	x, err := ParseChunkIndex(raw, count*benchChunk, ChunkLimits{})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if i := x.Find(12345*benchChunk + 1); i != 12345 {
			b.Fatal(i)
		}
	}
}

func BenchmarkWriteVerity(b *testing.B) {
	data := random(64<<20, 1)
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := WriteVerity(context.Background(), io.Discard, bytes.NewReader(data), int64(len(data)), VerityOptions{Salt: []byte("salt")}); err != nil {
			b.Fatal(err)
		}
	}
}
