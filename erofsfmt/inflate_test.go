package erofsfmt

import (
	"bytes"
	"compress/flate"
	"encoding/hex"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
)

// deflated compresses data as the standard library does at a level.
func deflated(t testing.TB, data []byte, level int) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, level)
	if err == nil {
		_, err = w.Write(data)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// inflateSamples are data of which each makes an encoder do something else: long
// codes, short distances, long matches, no matches, stored blocks.
func inflateSamples() map[string][]byte {
	r := rand.New(rand.NewPCG(1, 2))
	random, skewed, text := make([]byte, 100_000), make([]byte, 100_000), []byte{}
	for i := range random {
		random[i] = byte(r.Uint32())
		skewed[i] = byte(r.ExpFloat64() * 6) // symbols with codes of 15 bits
	}
	words := [][]byte{[]byte("pcluster "), []byte("lcluster "), []byte("nid\n"), random[:300], random[400:409]}
	for len(text) < 300_000 {
		text = append(text, words[r.IntN(len(words))]...)
	}
	return map[string][]byte{
		"nothing": {}, "one": {7}, "zeros": make([]byte, 200_000), "pairs": bytes.Repeat([]byte("ab"), 5000),
		"sevens": bytes.Repeat([]byte("abcdefg"), 5000), "random": random, "skewed": skewed, "text": text,
	}
}

func TestInflate(t *testing.T) {
	s := &inflater{}
	for name, data := range inflateSamples() {
		for _, level := range []int{flate.HuffmanOnly, flate.NoCompression, 1, 6, 9} {
			in := deflated(t, data, level)
			out := make([]byte, len(data))
			if err := s.inflate(out, in, false); err != nil || !bytes.Equal(out, data) {
				t.Errorf("%s, level %d: %v", name, level, err)
			}
			// Anything behind the stream is not looked at.
			clear(out)
			if err := s.inflate(out, append(in, random(20)...), false); err != nil || !bytes.Equal(out, data) {
				t.Errorf("%s, level %d, with more behind it: %v", name, level, err)
			}
			if err := s.inflate(make([]byte, len(data)+1), in, false); err == nil {
				t.Errorf("%s, level %d: more than there is", name, level)
			}
			for _, n := range []int{len(data) - 1, len(data) / 2, len(data) / 100} {
				if n < 0 || n == len(data) {
					continue
				}
				if err := s.inflate(out[:n], in, true); err != nil || !bytes.Equal(out[:n], data[:n]) {
					t.Errorf("%s, level %d, the first %d: %v", name, level, n, err)
				}
				if err := s.inflate(out[:n], in, false); !errors.Is(err, errLength) {
					t.Errorf("%s, level %d, %d of %d bytes: %v", name, level, n, len(data), err)
				}
			}
			for _, n := range []int{len(in) - 1, len(in) / 2, 1, 0} {
				if err := s.inflate(make([]byte, len(data)), in[:n], false); err == nil {
					t.Errorf("%s, level %d, cut after %d of %d bytes: no error", name, level, n, len(in))
				}
			}
		}
	}
}

func random(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	return b
}

// TestInflateFaults: streams made by hand, lowest bit first.
func TestInflateFaults(t *testing.T) {
	for _, c := range []struct {
		name, in string
		n        int
		want     error
	}{
		{"stored", "01 03 00 fc ff 61 62 63", 3, nil},
		{"stored, other lengths", "01 03 00 fc fe 61 62 63", 3, errInflateBlock},
		{"stored, cut", "01 03 00 fc ff 61 62", 3, errInflateShort},
		{"fixed, empty", "03 00", 0, nil},
		{"fixed, without its end", "03", 0, errInflateShort},
		// 'a' is 0x61+0x30 in 8 bits, from the highest: 10010001.
		{"fixed, one literal", "4b 04 00", 1, nil},
		{"no such block", "07", 0, errInflateBlock},
		// Length 3 (0000001), distance 1 (00000): nothing is before it.
		{"a match at the beginning", "03 02 00 00", 3, errInflateMatch},
		// 286 is 11000110 from the highest bit.
		{"a length that is not used", "1b 03 00 00", 3, errInflateCode},
		{"all codes of one bit", "05 00 92 04 00 00", 1, errInflateBlock},
		{"nothing", "", 0, errInflateShort},
	} {
		in, err := hex.DecodeString(string(bytes.ReplaceAll([]byte(c.in), []byte(" "), nil)))
		if err != nil {
			t.Fatal(err)
		}
		if err := (&inflater{}).inflate(make([]byte, c.n), in, false); err != c.want {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
}

// repetitions has runs of many lengths at every short distance and some longer ones:
// each way to copy a match, and its edges.
func repetitions() []byte {
	r := rand.New(rand.NewPCG(3, 4))
	var data []byte
	for distance := 1; distance <= 40; distance++ {
		for _, length := range []int{3, 4, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 257, 258, 259, 600} {
			start := len(data)
			for range distance {
				data = append(data, byte(r.Uint32()))
			}
			for range length {
				data = append(data, data[len(data)-distance])
			}
			data = append(data, data[start:]...) // the same from farther away
		}
	}
	return data
}

func TestInflateRepetitions(t *testing.T) {
	data, levels := repetitions(), 9
	if testing.Short() {
		levels = 2 // the others take their time with the race detector
	}
	for level := 1; level <= levels; level++ {
		in := deflated(t, data, level)
		// The careful loop decodes what is near the end, so all is near it once.
		for n := len(data); n > 0; n -= 199 {
			out := make([]byte, n)
			if err := (&inflater{}).inflate(out, in, true); err != nil || !bytes.Equal(out, data[:n]) {
				t.Fatalf("level %d, the first %d: %v", level, n, err)
			}
		}
	}
}

// TestHuffmanTable: the code of RFC 1951, 3.2.2, by hand, and one with codes that are
// longer than the table's index.
func TestHuffmanTable(t *testing.T) {
	entries := make([]uint32, 20)
	for i := range entries {
		entries[i] = uint32(i) << 16
	}
	long := []uint8{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 15}
	for _, c := range []struct {
		lens   []uint8
		symbol uint32
		code   string
	}{
		{[]uint8{3, 3, 3, 3, 3, 2, 4, 4}, 0, "010"},
		{[]uint8{3, 3, 3, 3, 3, 2, 4, 4}, 4, "110"},
		{[]uint8{3, 3, 3, 3, 3, 2, 4, 4}, 5, "00"},
		{[]uint8{3, 3, 3, 3, 3, 2, 4, 4}, 6, "1110"},
		{[]uint8{3, 3, 3, 3, 3, 2, 4, 4}, 7, "1111"},
		{[]uint8{0, 1}, 1, "0"},
		{long, 0, "0"},
		{long, 9, "1111111110"},
		{long, 10, "11111111110"},
		{long, 13, "11111111111110"},
		{long, 14, "111111111111110"},
		{long, 15, "111111111111111"},
	} {
		var table huffmanTable
		if err := table.build(c.lens, entries, true); err != nil {
			t.Fatalf("%v: %v", c.lens, err)
		}
		for _, after := range []uint64{0, 1<<20 - 1, 0xaaaaa} {
			buf := after << len(c.code)
			for i, bit := range c.code {
				buf |= uint64(bit-'0') << i
			}
			l := uint32(len(c.code))
			if e := table.find(buf); e != c.symbol<<16|l<<8|l {
				t.Errorf("%v: %s before %x: %#x, want symbol %d", c.lens, c.code, after, e, c.symbol)
			}
		}
	}
	var table huffmanTable
	if err := table.build([]uint8{0, 1}, entries, true); err != nil || table.find(1) != huffmanNone {
		t.Errorf("a code that is not there: %#x, %v", table.find(1), err)
	}
	for _, lens := range [][]uint8{{1, 1, 1}, {1, 2}, {2, 2, 2}, {15}} {
		if err := table.build(lens, entries, true); err != errInflateBlock {
			t.Errorf("%v: %v", lens, err)
		}
	}
	if err := table.build([]uint8{1}, entries, false); err != errInflateBlock {
		t.Errorf("one code where two have to be: %v", err)
	}
}

// FuzzInflate compares with the standard library: what it decodes we decode to
// the same, and where it finds a fault there are no more bytes of ours than
// before the fault.
func FuzzInflate(f *testing.F) {
	for _, data := range inflateSamples() {
		for _, level := range []int{flate.HuffmanOnly, 1, 9} {
			f.Add(deflated(f, data[:min(len(data), 2000)], level))
		}
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		const limit = 1 << 20
		want, err := io.ReadAll(io.LimitReader(flate.NewReader(bytes.NewReader(in)), limit))
		s := &inflater{}
		got := make([]byte, len(want))
		switch ours := s.inflate(got, in, len(want) == limit); {
		case err == nil && ours != nil:
			t.Errorf("%v, but the library decodes %d bytes", ours, len(want))
		case err != nil && ours == nil:
			t.Errorf("no error for %d bytes, but the library: %v", len(want), err)
		}
		if err == nil && !bytes.Equal(got, want) {
			t.Error("other bytes than the library's")
		}
		if err == nil && len(want) < limit {
			if err := s.inflate(make([]byte, len(want)+1), in, true); err == nil {
				t.Error("more bytes than the library's")
			}
		}
	})
}
