package erofsfmt

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// A decompressor decodes pclusters of one algorithm. Its calls may run in
// parallel.
type decompressor interface {
	// decode fills dst from in. Unless prefix is set, in decodes to exactly
	// len(dst) bytes; with it, in decodes to at least that many and the rest
	// is not wanted, or in is followed by bytes that do not belong to it.
	decode(dst, in []byte, prefix bool) error
}

var errLength = errors.New("it decodes to another length")

func newDecompressors(sb *Superblock, buffers *bufferPool) (d [ondisk.AlgCount]decompressor, err error) {
	has := func(alg int) bool { return sb.ComprAlgs&(1<<alg) != 0 }
	if has(ondisk.AlgLz4) {
		d[ondisk.AlgLz4] = lz4Decompressor{}
	}
	if has(ondisk.AlgLzma) {
		d[ondisk.AlgLzma] = &lzmaDecompressor{dict: int(sb.lzmaDict)}
	}
	if has(ondisk.AlgDeflate) {
		d[ondisk.AlgDeflate] = &deflateDecompressor{}
	}
	if has(ondisk.AlgZstd) {
		d[ondisk.AlgZstd], err = newZstdDecompressor(sb.zstdWindowLog, buffers)
	}
	return d, err
}

// decode decodes the pcluster of e, which is in, to dst, which has e.llen bytes.
//
// What does not fill a pcluster is at its end, after zeros; a pcluster of zeros
// alone is corrupt (fs/erofs/decompressor.c z_erofs_fixup_insize). LZ4 before
// Linux 5.4 began at the first byte instead and had anything behind it.
func (im *Image) decode(e *extent, in, dst []byte) error {
	prefix := e.partial
	if e.alg == ondisk.AlgLz4 && !im.sb.lz4ZeroPadded {
		prefix = true
	} else {
		bs := im.sb.BlockSize()
		pad := min(int64(len(in)), bs-e.at.off&(bs-1))
		body := bytes.TrimLeft(in[:pad], "\x00")
		if len(body) == 0 {
			return e.at.corrupt("a pcluster that begins with %d zeros", pad)
		}
		in = in[int(pad)-len(body):]
	}
	if err := im.decoders[e.alg].decode(dst, in, prefix); err != nil {
		return e.at.corrupt("%s pcluster of %d bytes for %d at %d of the file: %v", algNames[e.alg], e.plen, e.llen, e.la, err)
	}
	return nil
}

type lz4Decompressor struct{}

func (lz4Decompressor) decode(dst, in []byte, prefix bool) error {
	if prefix {
		return lz4Prefix(dst, in)
	}
	n, err := lz4.UncompressBlock(in, dst)
	if err == nil && n != len(dst) {
		err = errLength
	}
	return err
}

// A zstdDecompressor decodes whole frames into a buffer of its own: the library
// is twice as fast with room to spare behind the output, which the caller's
// buffer has not.
type zstdDecompressor struct {
	whole    *zstd.Decoder
	prefixes sync.Pool // of *zstd.Decoder
	window   uint64
	buffers  *bufferPool
}

// zstdSpare is the room that the library wants behind the output.
const zstdSpare = 128 << 10

func newZstdDecompressor(windowLog uint8, buffers *bufferPool) (*zstdDecompressor, error) {
	z := &zstdDecompressor{window: 1 << windowLog, buffers: buffers}
	var err error
	z.whole, err = zstd.NewReader(nil, zstd.WithDecoderMaxWindow(z.window), zstd.WithDecodeAllCapLimit(true),
		zstd.WithDecoderConcurrency(0))
	if err != nil {
		return nil, fmt.Errorf("erofs: zstd: %w", err)
	}
	return z, nil
}

func (z *zstdDecompressor) decode(dst, in []byte, prefix bool) error {
	if prefix {
		return z.decodePrefix(dst, in)
	}
	buf := z.buffers.get(int64(len(dst)) + zstdSpare)
	defer z.buffers.put(buf)
	out, err := z.whole.DecodeAll(in, (*buf)[:0])
	if err == nil && len(out) != len(dst) {
		err = errLength
	}
	copy(dst, out)
	return err
}

func (z *zstdDecompressor) decodePrefix(dst, in []byte) error {
	d, _ := z.prefixes.Get().(*zstd.Decoder)
	if d == nil {
		var err error
		// One goroutine, the caller's: a pooled decoder has nothing to close.
		d, err = zstd.NewReader(nil, zstd.WithDecoderMaxWindow(z.window), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true))
		if err != nil {
			return err
		}
	}
	defer z.prefixes.Put(d)
	if err := d.Reset(bytes.NewReader(in)); err != nil {
		return err
	}
	_, err := io.ReadFull(d, dst)
	return err
}

// A deflateDecompressor decodes raw DEFLATE.
type deflateDecompressor struct {
	pool sync.Pool // of *inflater
}

func (d *deflateDecompressor) decode(dst, in []byte, prefix bool) error {
	s, _ := d.pool.Get().(*inflater)
	if s == nil {
		s = &inflater{}
	}
	defer d.pool.Put(s)
	return s.inflate(dst, in, prefix)
}
