// Package chunked reads an EROFS image out of a blob in which it is compressed in chunks,
// each as one zstd frame, as far as it is wanted:
//
//	image   | chunk 0 | chunk 1 | chunk 2 | … | last, may be short |
//	            │          │         │                │
//	blob    | frame 0 | frame 1| frame 2 | …   | last frame | skippable frame: the index |
//
// A Fetch of image bytes is a Fetch of the frames that hold them. It gives what a cache
// takes (package blobcache), so the cache keeps decompressed chunks, and knows of nothing.
//
// The frames are decompressed here and verified elsewhere, before they come here (package
// verified): a decompressor should not see what somebody may have made up for it. It is
// bounded all the same: a chunk takes the memory that the index says and no more, whatever
// its frame says, and what is too long or too short is an error.
package chunked

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"

	"github.com/erofs-oci/erofs-oci/registry/integrity"
)

// A Fetcher brings stored bytes of the blob. Its methods may be called in parallel.
type Fetcher interface {
	// Fetch asks for n bytes from off. start says where the body really begins: at off, or
	// at 0, with all that there is. total is how much that is. A body may have an
	// *integrity.GapError in the place of a frame, and go on behind it.
	Fetch(ctx context.Context, off, n int64) (body io.ReadCloser, start, total int64, err error)
}

// An Image is a Fetcher of the image's bytes. It may be used by many at a time.
type Image struct {
	index   *integrity.ChunkIndex
	stored  Fetcher
	decoder *zstd.Decoder
}

// New is the image whose frames stored brings.
func New(index *integrity.ChunkIndex, stored Fetcher) (*Image, error) {
	if index.Compression() != integrity.Zstd {
		return nil, errors.New("the chunk index is of an image that is not compressed, in a blob that is said to be")
	}
	decoder, err := zstd.NewReader(nil, zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		return nil, fmt.Errorf("zstd: %w", err)
	}
	return &Image{index: index, stored: stored, decoder: decoder}, nil
}

// Size is that of the image.
func (m *Image) Size() int64 { return m.index.Size() }

// Close frees what the decompressor holds. Nothing may be read any more.
func (m *Image) Close() error {
	m.decoder.Close()
	return nil
}

// Fetch is a Fetcher's, of the image. In the place of a chunk whose frame does not come, or
// cannot be decompressed, a body has an *integrity.GapError, and goes on behind it.
func (m *Image) Fetch(ctx context.Context, off, n int64) (body io.ReadCloser, start, total int64, err error) {
	x, size := m.index, m.index.Size()
	if off < 0 || n <= 0 || off > size || n > size-off {
		return nil, 0, 0, fmt.Errorf("%d bytes at %d are not within the image's %d", n, off, size)
	}
	first, last := x.Find(off), x.Find(off+n-1)
	from := x.Chunk(first).BlobOff
	to := x.Chunk(last).BlobOff + x.Chunk(last).BlobLen
	frames, start, _, err := m.stored.Fetch(ctx, from, to-from)
	if err != nil {
		return nil, 0, 0, err
	}
	b := &imageBody{image: m, frames: frames, next: first, skip: off - x.Chunk(first).Off, left: n}
	switch {
	case start < 0 || start > from:
		return nil, 0, 0, errors.Join(fmt.Errorf("%d bytes at %d: the body starts at %d", to-from, from, start), frames.Close())
	case start < from && start == x.Chunk(0).BlobOff:
		// All frames come: whoever wants the whole image can have it.
		b.next, b.skip, b.left = 0, 0, size
		return b, 0, size, nil
	}
	b.pass = from - start
	return b, off, size, nil
}

// A imageBody is decompressed as it is read. It belongs to one goroutine.
type imageBody struct {
	image         *Image
	frames        io.ReadCloser
	pass          int64 // stored bytes before the next chunk
	next          int   // chunk
	skip          int64 // bytes of the next chunk that are not wanted
	left          int64 // bytes that are wanted
	stored, plain []byte
	ready         []byte // of plain
	err           error
}

func (b *imageBody) Read(p []byte) (int, error) {
	if b.left == 0 && b.err == nil {
		b.err = b.end()
	}
	if b.err == nil && len(b.ready) == 0 {
		gap, err := b.chunk()
		if gap != nil {
			return 0, gap
		}
		b.err = err
	}
	if b.err != nil {
		return 0, b.err
	}
	n := copy(p, b.ready)
	b.ready = b.ready[n:]
	b.left -= int64(n)
	return n, nil
}

// end reads the end of what was asked for, for only then can its connection serve again.
func (b *imageBody) end() error {
	var one [1]byte
	if n, err := b.frames.Read(one[:]); n == 0 && err != nil && err != io.EOF {
		return err
	}
	return io.EOF
}

// chunk reads the next frame and decompresses it. A gap is what is wanted of a chunk that
// cannot be had; any other error is the end.
func (b *imageBody) chunk() (gap, err error) {
	c := b.image.index.Chunk(b.next)
	if b.pass > 0 {
		if _, err := io.CopyN(io.Discard, b.frames, b.pass); err != nil {
			return nil, broken(err, c.BlobOff)
		}
		b.pass = 0
	}
	// Both lengths are bounded by integrity.ChunkLimits.
	if int64(cap(b.stored)) < c.BlobLen {
		b.stored = make([]byte, c.BlobLen)
	}
	if int64(cap(b.plain)) < c.Len {
		b.plain = make([]byte, c.Len)
	}
	stored, plain := b.stored[:c.BlobLen], []byte(nil)
	n, err := io.ReadFull(b.frames, stored)
	switch {
	case err == nil:
		plain, err = b.image.decompress(b.plain[:0:c.Len], stored, b.next)
	case n > 0 || !isGap(err, c.BlobOff, c.BlobLen):
		return nil, broken(err, c.BlobOff+int64(n))
	}
	from, to := b.skip, min(c.Len, b.skip+b.left)
	b.next++
	b.skip = 0
	if err != nil {
		b.left -= to - from
		return &integrity.GapError{Off: c.Off + from, Len: to - from, Err: err}, nil
	}
	b.ready = plain[from:to]
	return nil, nil
}

// isGap says whether an error is of these bytes only.
func isGap(err error, off, n int64) bool {
	var gap *integrity.GapError
	return errors.As(err, &gap) && gap.Off == off && gap.Len == n
}

// decompress fills the capacity of dst, which is the length of chunk i, from its frame.
func (m *Image) decompress(dst, stored []byte, i int) ([]byte, error) {
	plain, err := m.decoder.DecodeAll(stored, dst)
	switch {
	case errors.Is(err, zstd.ErrDecoderSizeExceeded):
		return nil, corrupt(i, fmt.Errorf("its frame holds more than its %d bytes", cap(dst)))
	case err != nil:
		return nil, corrupt(i, err)
	case len(plain) != cap(dst):
		return nil, corrupt(i, fmt.Errorf("its frame holds %d bytes of its %d", len(plain), cap(dst)))
	}
	return plain, nil
}

func corrupt(i int, err error) error {
	return fmt.Errorf("zstd chunk %d: %w: %w", i, err, integrity.ErrCorrupt)
}

func broken(err error, at int64) error {
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("broke off at %d: %w", at, err)
}

func (b *imageBody) Close() error {
	if b.err == nil {
		b.err = errors.New("body is closed")
	}
	return b.frames.Close()
}

// maxWindow is how far back a frame that is decompressed as a stream may refer: what the
// zstd program takes by default.
const maxWindow = 128 << 20

// Decompress writes to dst what the zstd frames of src hold, of which there is no index:
// limit bytes at most. It returns how many there were. What is wrong with the frames is
// integrity.ErrCorrupt; errors of src and dst are as they are.
func Decompress(dst io.Writer, src io.Reader, limit int64) (int64, error) {
	from, to := &noting{r: src}, &noting{w: dst}
	n, err := decompress(to, from, limit)
	if err != nil && from.err == nil && to.err == nil && !errors.Is(err, integrity.ErrCorrupt) {
		err = fmt.Errorf("%w: %w", err, integrity.ErrCorrupt)
	}
	return n, err
}

// A noting reader or writer remembers its error.
type noting struct {
	r   io.Reader
	w   io.Writer
	err error
}

func (c *noting) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if err != nil && err != io.EOF {
		c.err = err
	}
	return n, err
}

func (c *noting) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	if err != nil {
		c.err = err
	}
	return n, err
}

func decompress(dst io.Writer, src io.Reader, limit int64) (int64, error) {
	d, err := zstd.NewReader(src, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return 0, fmt.Errorf("zstd: %w", err)
	}
	defer d.Close()
	n, err := io.Copy(dst, io.LimitReader(d, limit))
	if err != nil {
		return n, fmt.Errorf("zstd: after %d bytes: %w", n, err)
	}
	var one [1]byte
	if m, err := io.ReadFull(d, one[:]); m > 0 {
		return n, fmt.Errorf("zstd: it holds more than %d bytes, which is too much: %w", limit, integrity.ErrCorrupt)
	} else if err != io.EOF {
		return n, fmt.Errorf("zstd: after %d bytes: %w", n, err)
	}
	return n, nil
}
