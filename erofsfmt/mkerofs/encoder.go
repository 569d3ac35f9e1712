package mkerofs

import (
	"fmt"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
)

// maxSegment is how much of a file is encoded in one go, and the most that an encoder is given. Reading it takes an
// extent less than 2048 lclusters long, which is what an index can say (fs/erofs/zmap.c z_erofs_load_compact_lcluster).
const maxSegment = 4 << 20

// An encoder makes pclusters. It is used by one goroutine at a time, and what it makes depends on the source alone,
// not on earlier ones.
type encoder interface {
	// begin says that src is what the next calls of fill are about. It has at most maxSegment bytes.
	begin(src []byte)
	// fill encodes as much of src[from:] as has room in dst: n bytes became c. If c is 0, the next n bytes, or a block
	// at least, are not worth it.
	fill(dst, src []byte, from int) (n, c int)
}

// newEncoder makes one of several that make the same.
func (z *Compression) newEncoder(blockSize int) (encoder, error) {
	switch z.Algorithm {
	case LZ4:
		return &lz4Fast{}, nil
	case LZ4HC:
		return &lz4HC{attempts: lz4HCAttempts(z.Level)}, nil
	case Zstd:
		e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstdLevel(z.Level)), zstd.WithEncoderConcurrency(1),
			zstd.WithEncoderCRC(false), zstd.WithWindowSize(1<<zstdWindowLog))
		if err != nil {
			return nil, fmt.Errorf("zstd: %w", err)
		}
		return &searcher{codec: zstdCodec{e}, blockSize: blockSize}, nil
	default:
		w, err := flate.NewWriter(nil, flateLevel(z.Level))
		if err != nil {
			return nil, fmt.Errorf("deflate: %w", err)
		}
		return &searcher{codec: &flateCodec{w: w}, blockSize: blockSize}, nil
	}
}

// zstdLevel says how hard the library tries. It has a few ways only; from each level of libzstd on, the one is taken that
// makes images as small as mkfs.erofs does at that level, in less time. (The library's own table is for speed.)
func zstdLevel(level int) zstd.EncoderLevel {
	switch {
	case level < 3:
		return zstd.SpeedDefault
	case level < 8:
		return zstd.SpeedBetterCompression
	}
	return zstd.SpeedBestCompression
}

// flateLevel does the same for DEFLATE.
func flateLevel(level int) int {
	return [...]int{1: 3, 2: 4, 3: 5, 4: 6, 5: 6, 6: 7, 7: 8, 8: 9, 9: 9}[level]
}

// A codec encodes all of an input. It fails if the output would be longer than the room behind dst.
type codec interface {
	encode(dst, src []byte) []byte
}

// zstdWindowLog bounds what a decoder must hold. Linux takes 20 at most.
const zstdWindowLog = 20

type zstdCodec struct{ e *zstd.Encoder }

func (z zstdCodec) encode(dst, src []byte) []byte { return z.e.EncodeAll(src, dst) }

type flateCodec struct {
	w   *flate.Writer
	out []byte
}

func (f *flateCodec) Write(p []byte) (int, error) {
	f.out = append(f.out, p...)
	return len(p), nil
}

func (f *flateCodec) encode(dst, src []byte) []byte {
	f.out = dst
	f.w.Reset(f)
	// Neither can fail: Write does not.
	_, _ = f.w.Write(src)
	_ = f.w.Close()
	return f.out
}

// A searcher fills pclusters with a codec that wants to know its input beforehand: it encodes, and where much of the
// last block stays empty, tries again with a little more or less. How a source went so far says where to begin.
type searcher struct {
	codec
	blockSize  int
	ratio      float64 // of what was encoded last; 0 at the beginning of a source
	best, next []byte
}

const (
	searchTries    = 4
	searchSlack    = 128  // 1/128 of the output may stay empty
	searchFirst    = 2.5  // the ratio that is expected at first
	searchHopeless = 1.02 // a ratio that is not worth it
)

func (s *searcher) begin([]byte) { s.ratio = 0 }

func (s *searcher) fill(dst, src []byte, from int) (n, c int) {
	src = src[from:]
	room := len(dst)
	if s.ratio == 0 {
		s.ratio = searchFirst
	}
	high := len(src) + 1 // the least input that is known not to fit
	n = 0
	for try, in := 0, min(len(src), int(float64(room)*s.ratio)); try < searchTries && in > n && in < high; try++ {
		s.next = s.encode(s.next[:0], src[:in])
		out := len(s.next)
		s.ratio = float64(in) / float64(out)
		if s.ratio < searchHopeless {
			return in, 0
		}
		if out > room {
			high = in
		} else {
			n = in
			s.best, s.next = s.next, s.best
			if empty := -out & (s.blockSize - 1); in == len(src) || empty <= out/searchSlack {
				break
			}
		}
		in = min(in+int(float64(s.target(out, room)-out)*s.ratio), len(src), high-1)
	}
	if n == 0 || s.best[0] == 0 { // zeros at the beginning would be taken for padding
		return 0, 0
	}
	return n, copy(dst, s.best)
}

// target is the end of a block where the output of another try should be: of the one that is nearest to out.
func (s *searcher) target(out, room int) int {
	end := (out + s.blockSize/2) / s.blockSize * s.blockSize
	end = max(min(end, room), min(s.blockSize, room))
	return end - end/(2*searchSlack)
}
