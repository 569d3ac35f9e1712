package mkerofs

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/pierrec/lz4/v4"
)

func lz4Encoders() []encoder { return []encoder{&lz4Fast{}, &lz4HC{attempts: 16}, &lz4HC{attempts: 3}} }

// unLz4 fails unless block is exactly a block of want, with literals where LZ4 wants them.
func unLz4(t testing.TB, block, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	n, err := lz4.UncompressBlock(block, got)
	if err != nil || !bytes.Equal(got[:n], want) {
		t.Fatalf("%d bytes in a block of %d: decoded to %d, %v", len(want), len(block), n, err)
	}
	// The end of a block, which decoders that copy 8 bytes at a time rely on.
	pos, lastMatch, lastLiterals := 0, -1, 0
	for i := 0; i < len(block); {
		length := func(n int) int {
			for more := n == 15; more; i++ {
				n += int(block[i])
				more = block[i] == 255
			}
			return n
		}
		token := int(block[i])
		i++
		lastLiterals = length(token >> 4)
		i, pos = i+lastLiterals, pos+lastLiterals
		if i < len(block) {
			i += 2
			lastMatch = pos
			pos += length(token&15) + lz4MinMatch
		}
	}
	if lastMatch >= 0 && (lastLiterals < lz4LastBytes || len(want)-lastMatch < lz4LastMatch) {
		t.Fatalf("block ends with %d literals, its last match begins %d before the end", lastLiterals, len(want)-lastMatch)
	}
}

// fillAll encodes src in blocks of up to size bytes and checks each. It gives how many there are.
func fillAll(t testing.TB, e encoder, src []byte, size int) (blocks int) {
	t.Helper()
	e.begin(src)
	dst := bytes.Repeat([]byte{0xEE}, size+8)
	for from := 0; from < len(src); blocks++ {
		n, c := e.fill(dst[:size:size], src, from)
		if n <= 0 || n > len(src)-from || c > size {
			t.Fatalf("%T: %d of %d bytes became %d, with room for %d", e, n, len(src)-from, c, size)
		}
		unLz4(t, dst[:c], src[from:from+n])
		from += n
	}
	if !bytes.Equal(dst[size:], bytes.Repeat([]byte{0xEE}, 8)) {
		t.Fatalf("%T wrote behind the output", e)
	}
	return blocks
}

func TestLZ4FillsBlocks(t *testing.T) {
	period := []byte(strings.Repeat("abcdefghijklmnop", 20_000))
	for _, c := range []struct {
		name string
		src  []byte
		size int
		most int // blocks
	}{
		{"a byte", []byte("x"), 16, 1},
		{"too short for a match", []byte("aaaaaaaaaaaa"), 16, 1},
		// 13 equal bytes: a literal, a match of 7 and 5 literals.
		{"one match", []byte("aaaaaaaaaaaaa"), 13, 1},
		{"zeros", make([]byte, 1<<20), 4200, 1}, // 4113 and a little
		{"zeros, full blocks", make([]byte, 1<<20), 1024, 5},
		{"period", period, 1300, 1},
		{"noise", content(1, 100_000), 4096, 25},
		{"text", words(1, 200_000), 4096, 30},
		{"mixed", mixed(1, 1<<20), 65536, 16},
	} {
		for _, e := range lz4Encoders() {
			if got := fillAll(t, e, c.src, c.size); got > c.most {
				t.Errorf("%s, %T: %d blocks of %d bytes, want %d at most", c.name, e, got, c.size, c.most)
			}
		}
	}
}

// By hand: 20 times the same byte is a literal, a match of 14 and 5 literals.
func TestLZ4BlockByHand(t *testing.T) {
	want := []byte{0x1a, 'a', 1, 0, 0x50, 'a', 'a', 'a', 'a', 'a'}
	for _, e := range lz4Encoders() {
		src, dst := bytes.Repeat([]byte{'a'}, 20), make([]byte, 64)
		e.begin(src)
		if n, c := e.fill(dst, src, 0); n != 20 || !bytes.Equal(dst[:c], want) {
			t.Errorf("%T: %d bytes became %x, want %x", e, n, dst[:c], want)
		}
	}
}

// Every size of the output, so that blocks end at every place of a sequence.
func TestLZ4EveryOutputSize(t *testing.T) {
	src := append(words(2, 3000), append(make([]byte, 2000), words(3, 1000)...)...)
	noise := content(4, 1000)
	for _, e := range lz4Encoders() {
		step := 1
		if testing.Short() {
			step = 7
		}
		for size := 10; size < 900; size += step {
			fillAll(t, e, src, size)
			// Of literals alone as many as fit: a length takes another byte every 255.
			more := 0
			for n := size - 1; n-more >= 15+255*more; {
				more++
			}
			e.begin(noise)
			if n, c := e.fill(make([]byte, size), noise, 0); c > size || n < size-1-more-1 {
				t.Fatalf("%T: %d bytes of noise in %d, which have room for %d", e, n, size, size-1-more)
			}
			fillAll(t, e, noise, size)
		}
	}
}

// What an encoder makes does not depend on what it had before.
func TestEncodersForget(t *testing.T) {
	for _, z := range []Compression{{Algorithm: LZ4}, {Algorithm: LZ4HC}, {Algorithm: Zstd}, {Algorithm: Deflate}, {Algorithm: Deflate, Level: 9}} {
		if err := z.check(4096); err != nil {
			t.Fatal(err)
		}
		run := func(e encoder, src []byte) (out []byte) {
			dst := make([]byte, 4096)
			e.begin(src)
			for from := 0; from < len(src); {
				n, c := e.fill(dst, src, from)
				out = append(out, fmt.Sprint(n, dst[:c])...)
				from += max(n, 1)
			}
			return out
		}
		used, err := z.newEncoder(4096)
		if err != nil {
			t.Fatal(err)
		}
		for seed := range uint64(40) {
			fresh, err := z.newEncoder(4096)
			if err != nil {
				t.Fatal(err)
			}
			src := mixed(seed, 30_000)
			if !bytes.Equal(run(used, src), run(fresh, src)) {
				t.Fatalf("%s: source %d is encoded in another way by an encoder that was used", z.Algorithm, seed)
			}
		}
	}
}

func TestEncoderPlacesDoNotOverflow(t *testing.T) {
	src := words(1, 20_000)
	for _, e := range []encoder{&lz4Fast{base: 1<<31 - 2*maxSegment - 1}, &lz4HC{attempts: 8, base: 1<<31 - 2*maxSegment - 1}} {
		for range 4 {
			fillAll(t, e, src, 4096)
		}
	}
}

func FuzzLZ4(f *testing.F) {
	f.Add([]byte("abcabcabcabcabcabcabcabcabc"), uint16(20))
	f.Add(words(1, 500), uint16(100))
	f.Add(slices.Concat(make([]byte, 300), content(1, 50), make([]byte, 600)), uint16(17))
	f.Fuzz(func(t *testing.T, src []byte, size uint16) {
		if len(src) > 1<<16 {
			return
		}
		for _, e := range lz4Encoders() {
			fillAll(t, e, src, 10+int(size))
			fillAll(t, e, append(src, src...), 10+int(size)) // with what the first one left
		}
	})
}

func BenchmarkEncoders(b *testing.B) {
	rng := rand.New(rand.NewPCG(1, 1))
	src := words(rng.Uint64(), 1<<20)
	for _, z := range []Compression{
		{Algorithm: LZ4}, {Algorithm: LZ4, ClusterSize: 65536}, {Algorithm: LZ4HC, ClusterSize: 65536},
		{Algorithm: Zstd, ClusterSize: 65536}, {Algorithm: Deflate, ClusterSize: 65536},
	} {
		if err := z.check(4096); err != nil {
			b.Fatal(err)
		}
		b.Run(fmt.Sprint(z.Algorithm, z.ClusterSize), func(b *testing.B) {
			e, err := z.newEncoder(4096)
			if err != nil {
				b.Fatal(err)
			}
			dst := make([]byte, z.ClusterSize)
			b.SetBytes(int64(len(src)))
			for b.Loop() {
				e.begin(src)
				for from := 0; from < len(src); {
					n, _ := e.fill(dst, src, from)
					from += n
				}
			}
		})
	}
}
