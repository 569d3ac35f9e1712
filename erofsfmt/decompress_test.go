package erofsfmt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz/lzma"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// text is n bytes that compress, more or less by seed.
func text(n int, seed uint64) []byte {
	rnd := rand.New(rand.NewPCG(seed, 0))
	words := make([][]byte, 40)
	for i := range words {
		words[i] = fmt.Appendf(nil, "w%d ", rnd.Uint32())
	}
	out := make([]byte, 0, n+20)
	for len(out) < n {
		if rnd.IntN(4) == 0 {
			out = append(out, byte(rnd.Uint32()))
		} else {
			out = append(out, words[rnd.IntN(len(words))]...)
		}
	}
	return out[:n]
}

func compressLz4(t testing.TB, data []byte) []byte {
	out := make([]byte, lz4.CompressBlockBound(len(data))+16)
	var c lz4.CompressorHC
	n, err := c.CompressBlock(data, out)
	if err != nil {
		t.Fatal(err)
	}
	if n == 0 { // it does not compress; a block of literals is as valid
		n = copy(out, literals(data))
	}
	return out[:n]
}

// literals is an LZ4 block without a match.
func literals(data []byte) []byte {
	n := len(data)
	if n < 15 {
		return append([]byte{byte(n) << 4}, data...)
	}
	out := []byte{0xf0}
	for n -= 15; n >= 255; n -= 255 {
		out = append(out, 255)
	}
	return append(append(out, byte(n)), data...)
}

// compressLzma makes MicroLZMA: the library's header of 13 bytes goes, and the
// first byte of the stream becomes the complement of the properties.
func compressLzma(t testing.TB, data []byte, p lzma.Properties) []byte {
	var b bytes.Buffer
	w, err := lzma.WriterConfig{Properties: &p, DictCap: 1 << 16, SizeInHeader: true, Size: int64(len(data))}.NewWriter(&b)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	out := b.Bytes()
	if out[13] != 0 {
		t.Fatalf("the stream begins with %#x", out[13])
	}
	out[13] = ^out[0]
	return out[13:]
}

func compressDeflate(t testing.TB, data []byte) []byte {
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, 9)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(data)
	w.Close()
	return b.Bytes()
}

func compressZstd(t testing.TB, data []byte) []byte {
	w, err := zstd.NewWriter(nil, zstd.WithWindowSize(1<<17), zstd.WithSingleSegment(false))
	if err != nil {
		t.Fatal(err)
	}
	return w.EncodeAll(data, nil)
}

type codec struct {
	alg      int
	d        decompressor
	compress func(testing.TB, []byte) []byte
}

func codecs(t testing.TB) []codec {
	sb := &Superblock{ComprAlgs: 15, lzmaDict: 1 << 16, zstdWindowLog: 20}
	d, err := newDecompressors(sb, &bufferPool{})
	if err != nil {
		t.Fatal(err)
	}
	return []codec{
		{ondisk.AlgLz4, d[ondisk.AlgLz4], compressLz4},
		{ondisk.AlgLzma, d[ondisk.AlgLzma], func(t testing.TB, b []byte) []byte {
			return compressLzma(t, b, lzma.Properties{LC: 3, LP: 0, PB: 2})
		}},
		{ondisk.AlgDeflate, d[ondisk.AlgDeflate], compressDeflate},
		{ondisk.AlgZstd, d[ondisk.AlgZstd], compressZstd},
	}
}

// Every algorithm decodes what a library encoded: whole, as a prefix of any
// length; and refuses a wrong length and a cut input.
func TestDecompressors(t *testing.T) {
	for _, c := range codecs(t) {
		t.Run(algNames[c.alg], func(t *testing.T) {
			for _, n := range []int{1, 2, 15, 100, 4096, 70000, 300000} {
				data := text(n, uint64(n))
				in := c.compress(t, data)
				out := make([]byte, n)
				if err := c.d.decode(out, in, false); err != nil || !bytes.Equal(out, data) {
					t.Fatalf("%d bytes: %v", n, err)
				}
				for _, k := range []int{1, n / 3, n - 1, n} {
					if k == 0 {
						continue
					}
					out := make([]byte, k)
					if err := c.d.decode(out, in, true); err != nil || !bytes.Equal(out, data[:k]) {
						t.Errorf("the first %d bytes of %d: %v", k, n, err)
					}
				}
				if err := c.d.decode(make([]byte, n+1), in, false); err == nil {
					t.Errorf("%d bytes were decoded to %d", n, n+1)
				}
				if n > 15 {
					if err := c.d.decode(make([]byte, n-1), in, false); err == nil {
						t.Errorf("%d bytes were decoded to %d", n, n-1)
					}
					if err := c.d.decode(make([]byte, n), in[:len(in)/2], true); err == nil {
						t.Errorf("half of the input decodes to %d bytes", n)
					}
				}
			}
		})
	}
}

// All properties that the format allows.
func TestLzmaProperties(t *testing.T) {
	data := text(20000, 5)
	d := &lzmaDecompressor{dict: 1 << 16}
	for lc := range 5 {
		for lp := 0; lc+lp <= 4; lp++ {
			for pb := range 5 {
				in := compressLzma(t, data, lzma.Properties{LC: lc, LP: lp, PB: pb})
				out := make([]byte, len(data))
				if err := d.decode(out, in, false); err != nil || !bytes.Equal(out, data) {
					t.Errorf("lc %d lp %d pb %d: %v", lc, lp, pb, err)
				}
			}
		}
	}
	for _, props := range []byte{225, 255, 8, 4*9 + 4} { // pb 5, nothing, lc 8, lc+lp 8
		if err := d.decode(make([]byte, 10), []byte{^props, 0, 0, 0, 0, 0, 0}, true); !errors.Is(err, errLzmaProps) {
			t.Errorf("properties %d: %v", props, err)
		}
	}
	// A dictionary smaller than a distance.
	far := append(append(text(9000, 1), make([]byte, 5000)...), text(9000, 1)...)
	in := compressLzma(t, far, lzma.Properties{LC: 3, LP: 0, PB: 2})
	small := &lzmaDecompressor{dict: 4096}
	if err := small.decode(make([]byte, len(far)), in, false); !errors.Is(err, errLzmaMatch) {
		t.Errorf("a match beyond the dictionary: %v", err)
	}
}

// A match of any length and distance, and a stream that is cut anywhere near its end
// or is all near its end.
func TestLzmaEnds(t *testing.T) {
	d := &lzmaDecompressor{dict: 1 << 20}
	for _, data := range [][]byte{repetitions(), text(5000, 3), text(50, 4), text(9, 5), {1}} {
		in := compressLzma(t, data, lzma.Properties{LC: 3, LP: 0, PB: 2})
		for n := len(data); n > 0; n -= 1 + len(data)/100 {
			out := make([]byte, n)
			if err := d.decode(out, in, true); err != nil || !bytes.Equal(out, data[:n]) {
				t.Fatalf("the first %d of %d bytes: %v", n, len(data), err)
			}
		}
		out := make([]byte, len(data))
		if err := d.decode(out, append(bytes.Clone(in), 0), false); err != errLzmaEnd {
			t.Errorf("%d bytes with one more behind them: %v", len(data), err)
		}
		for n := len(in) - 1; n >= max(0, len(in)-100); n-- {
			if err := d.decode(out, in[:n], false); err != errLzmaShort && err != errLzmaEnd {
				t.Errorf("%d bytes cut after %d of %d: %v", len(data), n, len(in), err)
			}
		}
	}
}

// zipped is an image with one file in pclusters of a block, each made of at most
// chunk bytes, as the full index describes them.
func zipped(t testing.TB, data []byte, zeroPadded bool) *fake {
	f := newFake(ondisk.LayoutCompressedFull, uint64(len(data)))
	f.super.ComprAlgs = 0xffff // the LZ4 window
	if zeroPadded {
		f.super.FeatureIncompat = ondisk.IncompatLz4ZeroPadding
	}
	const chunk = 2 * 4096
	var index []byte
	for i := 0; i*chunk < len(data); i++ {
		in := compressLz4(t, data[i*chunk:min((i+1)*chunk, len(data))])
		if len(in) > 4096 {
			t.Fatalf("%d bytes do not fit into a block", len(in))
		}
		block := bytes.Repeat([]byte{0xcc}, 4096)
		if zeroPadded {
			clear(block)
			copy(block[4096-len(in):], in)
		} else {
			copy(block, in)
		}
		f.blocks[10+i] = block
		index = append(index, le(fHead1, uint16(0), uint32(10+i), fNonhead, uint16(0), uint16(1), uint16(1))...)
	}
	f.body = join(mapHeader(full, 0, 0, 0, 0), index)
	return f
}

// Images from before Linux 5.4 begin a pcluster at its first byte and leave
// anything behind it; later ones end it with the block.
func TestLz4Padding(t *testing.T) {
	data := text(50000, 3)
	for _, padded := range []bool{true, false} {
		im, ino := zipped(t, data, padded).open(t, Options{})
		p := make([]byte, len(data))
		if err := im.ReadFile(context.Background(), ino, p, 0); err != nil || !bytes.Equal(p, data) {
			t.Errorf("zero padding %v: %v", padded, err)
		}
		if err := im.ReadFile(context.Background(), ino, p[:100], 30001); err != nil || !bytes.Equal(p[:100], data[30001:30101]) {
			t.Errorf("zero padding %v: %v", padded, err)
		}
	}
	f := zipped(t, data, true)
	f.blocks[12] = make([]byte, 4096)
	im, ino := f.open(t, Options{})
	if err := im.ReadFile(context.Background(), ino, make([]byte, len(data)), 0); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a pcluster of zeros: %v", err)
	}
	f = zipped(t, data, true)
	f.blocks[12][4095] ^= 1
	im, ino = f.open(t, Options{})
	if err := im.ReadFile(context.Background(), ino, make([]byte, len(data)), 0); err != nil && !errors.Is(err, ErrCorrupt) {
		t.Errorf("a changed pcluster: %v", err)
	}
}

// Deduplicated files share a pcluster and take different lengths of it; what is
// remembered of the shorter must not serve the longer.
func TestPartialReferences(t *testing.T) {
	data := text(8192, 4)
	in := compressLz4(t, data)
	f := newFake(ondisk.LayoutCompressedFull, 3*4096)
	f.super.ComprAlgs, f.super.FeatureIncompat = 0xffff, ondisk.IncompatLz4ZeroPadding
	f.blocks[10] = append(make([]byte, 4096-len(in)), in...)
	f.body = join(mapHeader(full, 0, 0, 0, 0), le(
		fHead1|ondisk.LclusterPartial, uint16(0), uint32(10),
		fHead1, uint16(0), uint32(10),
		fNonhead, uint16(0), uint16(1), uint16(1)))
	im, ino := f.open(t, Options{})
	want := append(bytes.Clone(data[:4096]), data...)
	for _, c := range []struct{ off, n int64 }{{100, 200}, {5000, 7000}, {0, 4096}, {4095, 2}, {0, 3 * 4096}} {
		p := make([]byte, c.n)
		if err := im.ReadFile(context.Background(), ino, p, c.off); err != nil || !bytes.Equal(p, want[c.off:c.off+c.n]) {
			t.Errorf("%d bytes at %d: %v", c.n, c.off, err)
		}
	}
	// The same without the mark is a length that does not fit.
	f.body[16+1] &^= 0x80
	im, ino = f.open(t, Options{})
	if err := im.ReadFile(context.Background(), ino, make([]byte, 4096), 0); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a partial extent that is not marked: %v", err)
	}
}

// LZ4 by hand: "abcd", a match of 5 at distance 2, "!".
func TestLz4Prefix(t *testing.T) {
	block := []byte{0x41, 'a', 'b', 'c', 'd', 2, 0, 0x10, '!'}
	const want = "abcdcdcdc!"
	for n := 1; n <= len(want); n++ {
		out := make([]byte, n)
		if err := lz4Prefix(out, append(bytes.Clone(block), 0xff, 0xff)); err != nil || string(out) != want[:n] {
			t.Errorf("%d bytes: %q, %v", n, out, err)
		}
	}
	for _, c := range []struct {
		src  []byte
		n    int
		want error
	}{
		{nil, 1, errLz4Short},
		{block, 11, errLz4Short},
		{block[:3], 4, errLz4Short},
		{block[:6], 9, errLz4Short},
		{[]byte{0xf0, 255, 255}, 9, errLz4Short},
		{[]byte{0x1f, 'a', 1, 0, 255}, 40, errLz4Short},
		{[]byte{0x10, 'a', 2, 0, 0}, 9, errLz4Offset},
		{[]byte{0x10, 'a', 0, 0, 0}, 9, errLz4Offset},
	} {
		if err := lz4Prefix(make([]byte, c.n), c.src); !errors.Is(err, c.want) {
			t.Errorf("%x to %d bytes: %v, want %v", c.src, c.n, err, c.want)
		}
	}
	if err := lz4Prefix(nil, nil); err != nil {
		t.Error(err)
	}
}

// Whatever the library decodes, every prefix of it is what lz4Prefix decodes;
// and what a library encodes comes back.
func FuzzLz4Prefix(f *testing.F) {
	f.Add([]byte{0x41, 'a', 'b', 'c', 'd', 2, 0, 0x10, '!'}, uint16(7))
	f.Add(compressLz4(f, text(300, 1)), uint16(100))
	f.Fuzz(func(t *testing.T, block []byte, n uint16) {
		whole := make([]byte, 1<<16)
		k, err := lz4.UncompressBlock(block, whole)
		if err == nil && k > 0 {
			p := make([]byte, min(int(n), k))
			if err := lz4Prefix(p, block); err != nil || !bytes.Equal(p, whole[:len(p)]) {
				t.Fatalf("prefix of %d of %d bytes: %v", len(p), k, err)
			}
		}
		lz4Prefix(make([]byte, n), block)
		in := compressLz4(t, block)
		p := make([]byte, min(int(n), len(block)))
		if err := lz4Prefix(p, append(in, block...)); err != nil || !bytes.Equal(p, block[:len(p)]) {
			t.Fatalf("prefix of %d of %d bytes: %v", len(p), len(block), err)
		}
	})
}

// Whatever the library decodes we decode to the same, and what it encodes comes back.
func FuzzMicroLzma(f *testing.F) {
	f.Add(compressLzma(f, text(300, 1), lzma.Properties{LC: 3, LP: 0, PB: 2}), uint16(300))
	f.Add(compressLzma(f, text(99, 2), lzma.Properties{LC: 0, LP: 2, PB: 0}), uint16(50))
	f.Fuzz(func(t *testing.T, in []byte, n uint16) {
		d := &lzmaDecompressor{dict: 1 << 16}
		ours := make([]byte, n)
		err := d.decode(ours, in, true)
		if theirs, ok := libraryLzma(in, int(n)); ok && err == nil && !bytes.Equal(ours, theirs) {
			t.Fatalf("%x\nlibrary %x", ours, theirs)
		}
		if len(in) == 0 {
			return
		}
		enc := compressLzma(t, in, lzma.Properties{LC: int(n % 5), LP: 0, PB: int(n / 5 % 5)})
		back := make([]byte, len(in))
		if err := d.decode(back, enc, false); err != nil || !bytes.Equal(back, in) {
			t.Fatalf("%v", err)
		}
	})
}

// libraryLzma decodes n bytes of MicroLZMA with the library.
func libraryLzma(in []byte, n int) ([]byte, bool) {
	if len(in) == 0 {
		return nil, false
	}
	head := le([1]byte{^in[0]}, uint32(1<<16), uint64(n), [1]byte{0})
	r, err := lzma.NewReader(bytes.NewReader(append(head, in[1:]...)))
	if err != nil {
		return nil, false
	}
	out := make([]byte, n)
	if _, err := io.ReadFull(r, out); err != nil {
		return nil, false
	}
	return out, true
}

func BenchmarkDecompress(b *testing.B) {
	for _, c := range codecs(b) {
		for _, n := range []int{8 << 10, 256 << 10} {
			data := text(n, 9)
			in := c.compress(b, data)
			out := make([]byte, n)
			for _, prefix := range []bool{false, true} {
				b.Run(fmt.Sprintf("%s/%dKiB/prefix=%v", algNames[c.alg], n>>10, prefix), func(b *testing.B) {
					b.SetBytes(int64(n))
					b.ReportAllocs()
					for b.Loop() {
						if err := c.d.decode(out, in, prefix); err != nil {
							b.Fatal(err)
						}
					}
				})
			}
		}
	}
}
