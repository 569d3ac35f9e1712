package integrity

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"testing"
	"testing/iotest"
)

func TestChunkIndexWriter(t *testing.T) {
	empty := unhex(t, "cde4ec67 01 00 0000 0000000000000000 00000000 01 20 00000000000000000000")
	one := unhex(t, `
		cde4ec67 01 00 0000  0300000000000000  01000000 01 40 00000000000000000000
		0000000000000000 0000000000000000 `+sumABC512)
	for _, c := range []struct {
		image string
		alg   Algorithm
		want  []byte
	}{
		{"abcd", SHA256, unhex(t, abcd)},
		{"abc", SHA512, one}, // a last chunk that is full
		{"", SHA256, empty},
	} {
		for name, wrap := range map[string]func(io.Reader) io.Reader{"at once": func(r io.Reader) io.Reader { return r }, "bytewise": iotest.OneByteReader} {
			t.Run(fmt.Sprintf("%q, %s", c.image, name), func(t *testing.T) {
				w, err := NewChunkIndexWriter(3, c.alg)
				if err != nil {
					t.Fatal(err)
				}
				// The struct hides WriteTo, which would write at once.
				r := struct{ io.Reader }{wrap(bytes.NewReader([]byte(c.image)))}
				if n, err := io.Copy(w, r); err != nil || n != int64(len(c.image)) {
					t.Fatalf("%d bytes, %v", n, err)
				}
				for range 2 { // the second time it is the same
					if got, err := w.Marshal(); err != nil || !bytes.Equal(got, c.want) {
						t.Errorf("index\n%x, %v; want\n%x", got, err, c.want)
					}
				}
				if n, err := w.Write([]byte("e")); n != 0 || err == nil {
					t.Errorf("writing after the end: %d, %v", n, err)
				}
			})
		}
	}
}

// What is written is read back, and verifies the image and no other.
func TestChunkIndexRoundTrip(t *testing.T) {
	for _, size := range []int{1, 4095, 4096, 4097, 3 * 4096, 100_000} {
		image := random(size, 1)
		w, err := NewChunkIndexWriter(4096, SHA256)
		if err != nil {
			t.Fatal(err)
		}
		for rest := image; len(rest) > 0; {
			n := min(len(rest), 777)
			if _, err := w.Write(rest[:n]); err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		raw, err := w.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		x, err := ParseChunkIndex(raw, int64(size), ChunkLimits{MaxChunk: 4096})
		if err != nil {
			t.Fatal(err)
		}
		if want := (size + 4095) / 4096; x.Len() != want {
			t.Errorf("%d bytes: %d chunks, want %d", size, x.Len(), want)
		}
		if !verifies(x, image) || verifies(x, flipped(image, size*8-1)) {
			t.Errorf("%d bytes: it verifies the image: %v; another: %v", size, verifies(x, image), verifies(x, flipped(image, size*8-1)))
		}
	}
}

func TestChunkIndexBuilder(t *testing.T) {
	type chunk struct {
		blobOff, off int64
		sum          string
	}
	for _, c := range []struct {
		name          string
		comp          Compression
		chunks        []chunk
		size, dataEnd int64
		want          string // or an error
	}{
		{"none", None, []chunk{{0, 0, sumABC}, {3, 3, sumD}}, 4, 4, abcd},
		{"zstd", Zstd, []chunk{{5, 0, sumABC}, {8, 6, sumD}}, 10, 9, frames},
		{"overlap", Zstd, []chunk{{5, 0, sumABC}, {5, 6, sumD}}, 10, 9, ""},
		{"backwards", Zstd, []chunk{{5, 0, sumABC}, {8, 0, sumD}}, 10, 9, ""},
		{"hole", Zstd, []chunk{{5, 1, sumABC}}, 10, 9, ""},
		{"behind the data", Zstd, []chunk{{5, 0, sumABC}, {8, 6, sumD}}, 10, 8, ""},
		{"no chunk", Zstd, nil, 10, 9, ""},
		{"negative", Zstd, []chunk{{-1, 0, sumABC}}, 10, 9, ""},
		{"negative size", Zstd, nil, -1, 9, ""},
		{"an unknown compression", 2, []chunk{{0, 0, sumABC}}, 4, 4, ""},
		{"moved", None, []chunk{{1, 0, sumABC}}, 4, 5, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := NewChunkIndexBuilder(c.comp, SHA256)
			for _, ch := range c.chunks {
				if err := b.Add(ch.blobOff, ch.off, unhex(t, ch.sum)); err != nil {
					t.Fatal(err)
				}
			}
			got, err := b.Marshal(c.size, c.dataEnd)
			if c.want == "" {
				if !errors.As(err, new(*FormatError)) {
					t.Errorf("error %v", err)
				}
				return
			}
			if err != nil || !bytes.Equal(got, unhex(t, c.want)) {
				t.Errorf("index\n%x, %v", got, err)
			}
		})
	}
	if err := NewChunkIndexBuilder(Zstd, SHA512).Add(0, 0, unhex(t, sumABC)); err == nil {
		t.Error("a checksum of 32 bytes is taken for SHA-512")
	}
	if err := NewChunkIndexBuilder(Zstd, 2).Add(0, 0, unhex(t, sumABC)); !errors.Is(err, ErrUnsupported) {
		t.Errorf("an unknown algorithm: %v", err)
	}
}

func TestChunkIndexWriterRefuses(t *testing.T) {
	for _, size := range []int64{-1, 0, 16<<20 + 1} {
		if _, err := NewChunkIndexWriter(size, SHA256); err == nil {
			t.Errorf("a chunk size of %d is taken", size)
		}
	}
	if _, err := NewChunkIndexWriter(4096, 2); !errors.Is(err, ErrUnsupported) {
		t.Errorf("an unknown algorithm: %v", err)
	}
}
