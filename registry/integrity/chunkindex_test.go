package integrity

import (
	"bytes"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"
)

// SHA-256 of "abc" and of "d", from FIPS 180 and from sha256sum.
const (
	sumABC    = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
	sumD      = "18ac3e7343f016890c510e93f935261169d9e3f565436429830faf0934f4f8e4"
	sumABC512 = "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a" +
		"2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f"
)

// abcd is the index of "abcd", cut into "abc" and "d", not compressed.
const abcd = `
	cde4ec67 01 00 0000  0400000000000000  02000000 01 20 00000000000000000000
	0000000000000000 0000000000000000 ` + sumABC + `
	0300000000000000 0300000000000000 ` + sumD

// frames is an index of 10 bytes in two chunks, 6 and 4, whose "frames" are "abc", at 5,
// and "d", at 8 of a blob in which the index begins at 9.
const frames = `
	cde4ec67 01 01 0000  0a00000000000000  02000000 01 20 00000000000000000000
	0500000000000000 0000000000000000 ` + sumABC + `
	0800000000000000 0600000000000000 ` + sumD

// bare is that of "abcd" in one chunk, without checksums.
const bare = `
	cde4ec67 01 00 0000  0400000000000000  01000000 00 00 00000000000000000000
	0000000000000000 0000000000000000`

func TestParseChunkIndex(t *testing.T) {
	for _, c := range []struct {
		name    string
		raw     string
		dataEnd int64
		size    int64
		comp    Compression
		chunks  []Chunk
		find    []int // the chunk of each byte of the image
	}{
		{"none", abcd, 4, 4, None, []Chunk{{0, 3, 0, 3}, {3, 1, 3, 1}}, []int{0, 0, 0, 1}},
		{"none, and more in the blob", abcd, 100, 4, None, []Chunk{{0, 3, 0, 3}, {3, 1, 3, 1}}, []int{0, 0, 0, 1}},
		{"zstd", frames, 9, 10, Zstd, []Chunk{{0, 6, 5, 3}, {6, 4, 8, 1}}, []int{0, 0, 0, 0, 0, 0, 1, 1, 1, 1}},
		{"zstd, padded", frames, 30, 10, Zstd, []Chunk{{0, 6, 5, 3}, {6, 4, 8, 22}}, []int{0, 0, 0, 0, 0, 0, 1, 1, 1, 1}},
		{"without checksums", bare, 4, 4, None, []Chunk{{0, 4, 0, 4}}, []int{0, 0, 0, 0}},
		{"empty", "cde4ec67 01 00 0000 0000000000000000 00000000 01 20 00000000000000000000", 0, 0, None, nil, nil},
		{"empty, zstd", "cde4ec67 01 01 0000 0000000000000000 00000000 01 40 00000000000000000000", 0, 0, Zstd, nil, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			x, err := ParseChunkIndex(unhex(t, c.raw), c.dataEnd, ChunkLimits{})
			if err != nil {
				t.Fatal(err)
			}
			var chunks []Chunk
			for i := range x.Len() {
				chunks = append(chunks, x.Chunk(i))
			}
			if !slices.Equal(chunks, c.chunks) || x.Size() != c.size || x.Compression() != c.comp {
				t.Errorf("chunks %v of %d bytes, compression %d; want %v of %d, %d", chunks, x.Size(), x.Compression(), c.chunks, c.size, c.comp)
			}
			for off, want := range c.find {
				if got := x.Find(int64(off)); got != want {
					t.Errorf("byte %d is in chunk %d, want %d", off, got, want)
				}
			}
			for _, off := range []int64{-1, c.size, c.size + 1, math.MaxInt64, math.MinInt64} {
				if got := x.Find(off); got != -1 {
					t.Errorf("byte %d is in chunk %d, want none", off, got)
				}
			}
		})
	}
}

func TestChunkIndexRefused(t *testing.T) {
	none, zstd, without := unhex(t, abcd), unhex(t, frames), unhex(t, bare)
	long := bytes.Repeat([]byte{0xff}, 8)
	for _, c := range []struct {
		name    string
		raw     []byte
		dataEnd int64
		limits  ChunkLimits
		kind    error
		off     int64
	}{
		{"nothing", nil, 4, ChunkLimits{}, ErrCorrupt, 0},
		{"half a header", none[:31], 4, ChunkLimits{}, ErrCorrupt, 31},
		{"magic", replaced(none, 3, 0x68), 4, ChunkLimits{}, ErrCorrupt, 0},
		{"version 0", replaced(none, 4, 0), 4, ChunkLimits{}, ErrUnsupported, 4},
		{"version 2", replaced(none, 4, 2), 4, ChunkLimits{}, ErrUnsupported, 4},
		{"compression 2", replaced(none, 5, 2), 4, ChunkLimits{}, ErrUnsupported, 5},
		{"flag 0", replaced(none, 6, 1), 4, ChunkLimits{}, ErrUnsupported, 6},
		{"flag 15", replaced(none, 7, 0x80), 4, ChunkLimits{}, ErrUnsupported, 6},
		{"size", replaced(none, 8, long...), 4, ChunkLimits{}, ErrCorrupt, 8},
		{"size is the first one that is not signed", replaced(none, 8, 0, 0, 0, 0, 0, 0, 0, 0x80), 4, ChunkLimits{}, ErrCorrupt, 8},
		{"hash algorithm 2", replaced(none, 20, 2), 4, ChunkLimits{}, ErrUnsupported, 20},
		{"SHA-2 of 0 bytes", replaced(none, 21, 0), 4, ChunkLimits{}, ErrCorrupt, 21},
		{"SHA-2 of 31 bytes", replaced(none, 21, 31), 4, ChunkLimits{}, ErrCorrupt, 21},
		{"SHA-2 of 48 bytes", replaced(none, 21, 48), 4, ChunkLimits{}, ErrCorrupt, 21},
		{"SHA-512 with entries of SHA-256", replaced(none, 21, 64), 4, ChunkLimits{}, ErrCorrupt, 16},
		{"no algorithm of 32 bytes", replaced(none, 20, 0), 4, ChunkLimits{}, ErrCorrupt, 21},
		{"first reserved byte", replaced(none, 22, 1), 4, ChunkLimits{}, ErrCorrupt, 22},
		{"last reserved byte", replaced(none, 31, 1), 4, ChunkLimits{}, ErrCorrupt, 22},
		{"a byte is missing", none[:len(none)-1], 4, ChunkLimits{}, ErrCorrupt, 16},
		{"a byte too many", append(bytes.Clone(none), 0), 4, ChunkLimits{}, ErrCorrupt, 16},
		{"an entry is missing", none[:32+48], 4, ChunkLimits{}, ErrCorrupt, 16},
		{"one chunk in the header", replaced(none, 16, 1), 4, ChunkLimits{}, ErrCorrupt, 16},
		{"four thousand million chunks", replaced(none, 16, 0xff, 0xff, 0xff, 0xff), 4, ChunkLimits{}, ErrCorrupt, 16},
		{"four thousand million chunks without checksums", replaced(without, 16, 0xff, 0xff, 0xff, 0xff), 4, ChunkLimits{}, ErrCorrupt, 16},
		{"no chunk of some bytes", replaced(none, 16, 0)[:32], 4, ChunkLimits{}, ErrCorrupt, 16},
		{"chunks of no byte", replaced(none, 8, 0), 4, ChunkLimits{}, ErrCorrupt, 16},
		{"image longer than its blob", none, 3, ChunkLimits{}, ErrCorrupt, 8},
		{"blob of a negative size", none, -1, ChunkLimits{}, ErrCorrupt, 8},
		{"first chunk not at 0", replaced(none, 40, 1), 4, ChunkLimits{}, ErrCorrupt, 40},
		{"second chunk where the first one is", replaced(none, 88, 0), 4, ChunkLimits{}, ErrCorrupt, 40},
		{"second chunk at the end", replaced(none, 88, 4), 4, ChunkLimits{}, ErrCorrupt, 88},
		{"second chunk behind the end", replaced(none, 88, 5), 4, ChunkLimits{}, ErrCorrupt, 40},
		{"second chunk far behind the end", replaced(none, 88, long...), 4, ChunkLimits{}, ErrCorrupt, 40},
		{"chunk elsewhere in its blob", replaced(none, 80, 2), 4, ChunkLimits{}, ErrCorrupt, 80},
		{"first chunk elsewhere in its blob", replaced(none, 32, 1), 4, ChunkLimits{}, ErrCorrupt, 32},
		{"chunk over the limit", none, 4, ChunkLimits{MaxChunk: 2}, ErrCorrupt, 40},
		{"frames in the same place", replaced(zstd, 80, 5), 9, ChunkLimits{}, ErrCorrupt, 32},
		{"frames backwards", replaced(zstd, 80, 4), 9, ChunkLimits{}, ErrCorrupt, 32},
		{"frame behind the data", replaced(zstd, 80, 10), 9, ChunkLimits{}, ErrCorrupt, 32},
		{"last frame at the end", zstd, 8, ChunkLimits{}, ErrCorrupt, 80},
		{"frame far behind the data", replaced(zstd, 80, long...), 9, ChunkLimits{}, ErrCorrupt, 32},
		{"data ends before the frames", zstd, 0, ChunkLimits{}, ErrCorrupt, 32},
		{"frame over the limit", zstd, 1 << 20, ChunkLimits{MaxChunk: 1 << 10}, ErrCorrupt, 80},
		{"chunk of a frame over the limit", zstd, 9, ChunkLimits{MaxChunk: 5}, ErrCorrupt, 40},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := ParseChunkIndex(c.raw, c.dataEnd, c.limits)
			wantFormatError(t, err, c.kind, c.off)
		})
	}
}

func TestDefaultChunkLimit(t *testing.T) {
	b := NewChunkIndexBuilder(Zstd, SHA256)
	if err := b.Add(0, 0, unhex(t, sumABC)); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Marshal(16<<20, 3); err != nil {
		t.Errorf("a chunk of 16 MiB: %v", err)
	}
	_, err := b.Marshal(16<<20+1, 3)
	wantFormatError(t, err, ErrCorrupt, 40)
}

func TestVerifyChunk(t *testing.T) {
	x, err := ParseChunkIndex(unhex(t, frames), 9, ChunkLimits{})
	if err != nil {
		t.Fatal(err)
	}
	if alg, ok := x.Checksums(); alg != SHA256 || !ok {
		t.Errorf("checksums %v, %v", alg, ok)
	}
	if err := x.Verify(0, []byte("abc")); err != nil {
		t.Error(err)
	}
	if err := x.Verify(1, []byte("d")); err != nil {
		t.Error(err)
	}
	for bit := range 24 {
		wantMismatch(t, x.Verify(0, flipped([]byte("abc"), bit)), "chunk", 0, 0, 5)
	}
	err = x.Verify(1, []byte("e"))
	wantMismatch(t, err, "chunk", 0, 1, 8)
	want := "integrity: chunk 1 (1 bytes at 8) was changed: its sha256 is " +
		"3f79bb7b435b05321651daefd374cdc681dc06faa65e374e38337b88ca046dea, want " + sumD
	if err.Error() != want {
		t.Errorf("message %q, want %q", err, want)
	}
	for _, p := range []string{"", "ab", "abcd"} {
		if err := x.Verify(0, []byte(p)); err == nil || errors.As(err, new(*MismatchError)) {
			t.Errorf("%d bytes of a chunk of 3: error %v", len(p), err)
		}
	}
}

func TestVerifyChunkSHA512(t *testing.T) {
	x, err := ParseChunkIndex(unhex(t, `
		cde4ec67 01 00 0000  0300000000000000  01000000 01 40 00000000000000000000
		0000000000000000 0000000000000000 `+sumABC512), 3, ChunkLimits{})
	if err != nil {
		t.Fatal(err)
	}
	if err := x.Verify(0, []byte("abc")); err != nil {
		t.Error(err)
	}
	wantMismatch(t, x.Verify(0, []byte("abd")), "chunk", 0, 0, 0)
}

// Nothing is ever verified by an index that has nothing to do it by.
func TestNoChecksums(t *testing.T) {
	x, err := ParseChunkIndex(unhex(t, bare), 4, ChunkLimits{})
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := x.Checksums(); ok || x.Checksum(0) != nil {
		t.Error("an index without checksums has some")
	}
	if err := x.Verify(0, []byte("abcd")); !errors.Is(err, ErrNoChecksum) {
		t.Errorf("error %v, want %v", err, ErrNoChecksum)
	}
}

// Each bit of an index matters: without it the index is refused, or contradicts the media
// type, or does not verify the image. (The digest of the index tells them all, but that is
// for the caller to check.)
func TestChunkIndexBits(t *testing.T) {
	raw := unhex(t, abcd)
	good, err := ParseChunkIndex(raw, 4, ChunkLimits{})
	if err != nil {
		t.Fatal(err)
	}
	for bit := range len(raw) * 8 {
		x, err := ParseChunkIndex(flipped(raw, bit), 4, ChunkLimits{})
		if err != nil {
			continue
		}
		if verifies(x, []byte("abcd")) {
			t.Errorf("bit %d of byte %d makes no difference", bit%8, bit/8)
		}
	}
	if !verifies(good, []byte("abcd")) {
		t.Error("the index does not verify what it is of")
	}
}

// verifies reads an image that is not compressed as a reader would.
func verifies(x *ChunkIndex, blob []byte) bool {
	if x.Compression() != None || x.Size() != int64(len(blob)) {
		return false
	}
	for i := range x.Len() {
		c := x.Chunk(i)
		if x.Verify(i, blob[c.BlobOff:c.BlobOff+c.BlobLen]) != nil {
			return false
		}
	}
	return true
}

func TestChunkIndexKeepsNothing(t *testing.T) {
	raw := unhex(t, abcd)
	x, err := ParseChunkIndex(raw, 4, ChunkLimits{})
	if err != nil {
		t.Fatal(err)
	}
	clear(raw)
	if !verifies(x, []byte("abcd")) {
		t.Error("the index changed with the bytes it was read from")
	}
}

func TestFormatErrorMessage(t *testing.T) {
	_, err := ParseChunkIndex(replaced(unhex(t, abcd), 80, 2), 4, ChunkLimits{})
	want := "integrity: chunk index: chunk 1 begins at 3 of the image and at 2 of its blob, which is not compressed, at byte 80: corrupt"
	if err == nil || err.Error() != want {
		t.Errorf("message %q, want %q", err, want)
	}
	if strings.Contains(err.Error(), "\n") {
		t.Error("more than a line")
	}
}
