package erofsfmt

import (
	"go/build"
	"os"
	"path/filepath"
	"testing"

	"github.com/ulikunitz/xz/lzma"
)

// goSources are n bytes of source code, which every machine that runs tests has.
func goSources(b *testing.B, n int) []byte {
	b.Helper()
	names, err := filepath.Glob(filepath.Join(build.Default.GOROOT, "src", "go", "*", "*.go"))
	if err != nil {
		b.Fatal(err)
	}
	var data []byte
	for _, name := range names {
		source, err := os.ReadFile(name)
		if err != nil {
			b.Fatal(err)
		}
		if data = append(data, source...); len(data) >= n {
			return data[:n]
		}
	}
	b.Fatalf("only %d bytes of source code in %s", len(data), build.Default.GOROOT)
	return nil
}

// A fullPcluster is a pcluster's worth of encoded data, and how many bytes it decodes to.
type fullPcluster struct {
	in []byte
	n  int
}

// fillPclusters encodes data as mkfs.erofs does: as much as fits into each pcluster.
func fillPclusters(data []byte, pcluster int, encode func([]byte) []byte) []fullPcluster {
	var out []fullPcluster
	for len(data) > 0 {
		var best fullPcluster
		for low, high := 1, min(len(data), 8*pcluster); low <= high; {
			n := (low + high) / 2
			if in := encode(data[:n]); len(in) <= pcluster {
				best, low = fullPcluster{in, n}, n+1+n/256
			} else {
				high = n - 1
			}
		}
		out = append(out, best)
		data = data[best.n:]
	}
	return out
}

// BenchmarkPclusters decodes pclusters of 64 KiB with source code.
func BenchmarkPclusters(b *testing.B) {
	data := goSources(b, 1<<20)
	for _, c := range []struct {
		name   string
		d      decompressor
		encode func([]byte) []byte
	}{
		{"deflate", &deflateDecompressor{}, func(p []byte) []byte { return deflated(b, p, 6) }},
		{"lzma", &lzmaDecompressor{dict: 1 << 20}, func(p []byte) []byte {
			return compressLzma(b, p, lzma.Properties{LC: 3, LP: 0, PB: 2})
		}},
	} {
		b.Run(c.name, func(b *testing.B) {
			pclusters := fillPclusters(data, 64<<10, c.encode)
			out := make([]byte, len(data))
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				for _, p := range pclusters {
					if err := c.d.decode(out[:p.n], p.in, false); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}
