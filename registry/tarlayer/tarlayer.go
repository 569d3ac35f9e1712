// Package tarlayer reads the layers of ordinary container images: tar archives, as they are or compressed, which are
// known by a digest.
//
//	blob ──▶ size, digest ──▶ gzip, zstd, xz, bzip2 or nothing ──▶ diff ID ──▶ tar archive
//	         (descriptor)      (by the first bytes)                 (config)
//
// A Reader is at its end only when everything agrees: the blob has the size and the digest that the manifest gives, and
// what came out of it has the digest that the image's configuration gives. Until then what was read is unverified, and
// whoever puts it to use must be able to take that back.
//
// How a layer is compressed its first bytes say, as other tools have it: the media type is often wrong about that. What
// is a tar layer at all, the media type says (Check). A layer without a byte is an archive without an entry; of a file
// that is known by nothing else, the caller may find that wrong (Size is 0 at the end).
//
// Memory is bounded: a zstd frame may ask for a window of 128 MiB, and an xz block for a dictionary of as much.
//
// The package does not fetch and does not look into the archive.
package tarlayer

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Compression is how an archive was compressed.
type Compression string

const (
	None  Compression = "uncompressed"
	Gzip  Compression = "gzip"
	Zstd  Compression = "zstd"
	XZ    Compression = "xz"
	Bzip2 Compression = "bzip2"
)

// maxWindow is the largest window that a zstd frame may ask for: that of zstd --ultra --long.
const maxWindow = 128 << 20

// Check says why a layer of this media type cannot be read as a tar archive, or nil. The types are those of OCI and
// Docker; for an unknown one the bytes decide.
func Check(mediaType string) error {
	switch {
	case strings.Contains(mediaType, ".nondistributable."), strings.Contains(mediaType, ".foreign."):
		return fmt.Errorf("%s: a layer that registries must not hand out; get the image from its vendor with the layer in it", mediaType)
	case strings.HasSuffix(mediaType, "+encrypted"):
		return fmt.Errorf("%s: an encrypted layer; decrypt the image first", mediaType)
	case strings.HasPrefix(mediaType, "application/vnd.erofs"), strings.HasSuffix(mediaType, ".erofs"):
		return fmt.Errorf("%s: an EROFS image, not a tar archive", mediaType)
	case strings.HasPrefix(mediaType, "application/vnd.in-toto"), strings.HasSuffix(mediaType, "+json"):
		return fmt.Errorf("%s: not a file system", mediaType)
	}
	return nil
}

// A Reader is the tar archive in a layer.
type Reader struct {
	blob   *meter // what is known by the descriptor
	tar    *meter // what is known by the diff ID
	kind   Compression
	close  func()
	ended  error // the last word of Read
	desc   ocispec.Descriptor
	diffID digest.Digest
}

// Open reads the layer desc from blob, which begins with its first byte. Where diffID is empty the content is known by
// the blob's digest alone. The Reader must be closed; blob is the caller's to close.
func Open(blob io.Reader, desc ocispec.Descriptor, diffID digest.Digest) (*Reader, error) {
	for _, d := range []digest.Digest{desc.Digest, diffID} {
		if err := d.Validate(); err != nil && d != "" {
			return nil, fmt.Errorf("digest %.80q: %w", d, err)
		}
	}
	r := &Reader{blob: newMeter(blob, desc.Digest), desc: desc, diffID: diffID}
	archive, kind, done, err := decompress(r.blob)
	if err != nil {
		return nil, r.located(err)
	}
	r.kind, r.close = kind, done
	r.tar = newMeter(archive, diffID)
	return r, nil
}

// Compression is what the first bytes said.
func (r *Reader) Compression() Compression { return r.kind }

// Read gives bytes of the archive, and io.EOF only when all of the layer is what it should be.
func (r *Reader) Read(p []byte) (int, error) {
	if r.ended != nil {
		return 0, r.ended
	}
	n, err := r.tar.Read(p)
	switch {
	case err == io.EOF:
		r.ended = r.verify()
	case err != nil:
		r.ended = r.located(err)
	}
	if n > 0 {
		return n, nil
	}
	return 0, r.ended
}

// verify reads what of the blob is behind the compressed data, and gives io.EOF if all is well.
func (r *Reader) verify() error {
	if _, err := io.Copy(io.Discard, r.blob); err != nil {
		return r.located(err)
	}
	switch {
	case r.desc.Digest != "" && r.blob.n != r.desc.Size:
		return r.located(fmt.Errorf("%w: it has %d bytes, not %d", ErrMismatch, r.blob.n, r.desc.Size))
	case !r.blob.agrees():
		return r.located(fmt.Errorf("%w: its bytes have the digest %s", ErrMismatch, r.blob.digest()))
	case !r.tar.agrees():
		return r.located(fmt.Errorf("%w: the archive in it has the digest %s, not the diff ID %s", ErrMismatch, r.tar.digest(), r.diffID))
	}
	return io.EOF
}

// Size is how many bytes of the archive were read so far.
func (r *Reader) Size() int64 { return r.tar.n }

// Close gives free what decompression took.
func (r *Reader) Close() error {
	r.close()
	if r.ended == nil {
		r.ended = errors.New("layer is closed")
	}
	return nil
}

// ErrMismatch is the error of a layer that is not what its digests say.
var ErrMismatch = errors.New("is not what its digest says")

func (r *Reader) located(err error) error {
	if r.desc.Digest == "" {
		return err
	}
	return fmt.Errorf("layer %s: %w", r.desc.Digest, err)
}

// A meter counts and hashes what passes through.
type meter struct {
	r    io.Reader
	n    int64
	want digest.Digest
	sum  digest.Digester // nil where there is nothing to compare
}

func newMeter(r io.Reader, want digest.Digest) *meter {
	m := &meter{r: r, want: want}
	if want != "" {
		m.sum = want.Algorithm().Digester()
	}
	return m
}

func (m *meter) Read(p []byte) (int, error) {
	n, err := m.r.Read(p)
	m.n += int64(n)
	if m.sum != nil {
		m.sum.Hash().Write(p[:n]) // a hash does not fail
	}
	return n, err
}

func (m *meter) digest() digest.Digest { return m.sum.Digest() }
func (m *meter) agrees() bool          { return m.sum == nil || m.sum.Digest() == m.want }

// magicSize is how many bytes tell the compressions apart.
const magicSize = 6

// Detect says how an archive that begins with head is compressed.
func Detect(head []byte) Compression {
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		return Gzip
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}), len(head) >= 4 && binary.LittleEndian.Uint32(head)&^0xf == 0x184d2a50:
		return Zstd
	case bytes.HasPrefix(head, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		return XZ
	case bytes.HasPrefix(head, []byte("BZh")):
		return Bzip2
	}
	return None
}

// bufferSize is how much of a blob is read at a time.
const bufferSize = 256 << 10

func decompress(blob io.Reader) (archive io.Reader, kind Compression, done func(), err error) {
	in := bufio.NewReaderSize(blob, bufferSize)
	head, err := in.Peek(magicSize)
	if err != nil && err != io.EOF {
		return nil, "", nil, err
	}
	kind, done, err = Detect(head), func() {}, nil
	switch kind {
	case Gzip:
		archive, err = gzip.NewReader(in)
		err = cut(err)
	case Zstd:
		// One goroutine decodes while another reads; frames of their own are decoded side by side by neither.
		d, zErr := zstd.NewReader(in, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderConcurrency(2))
		if zErr == nil {
			archive, done = d, d.Close
		}
		err = zErr
	case XZ:
		archive, err = newXZReader(in)
	case Bzip2:
		archive = bzip2.NewReader(in)
	default:
		archive = in
	}
	return archive, kind, done, err
}
