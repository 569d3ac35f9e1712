package mkerofs

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// A segment is a part of a file of up to maxSegment bytes, on its way: it is read and encoded by a worker, and then
// put where it belongs. Extents end with it, so segments can be encoded side by side.
type segment struct {
	n     *node
	data  []byte // what it holds; read by the worker if nil
	size  int    // how many bytes that are
	first bool   // of its file
	last  bool

	extents  []extent
	blocks   []byte // the pclusters, or the data as it is
	tail     []byte // what lies behind the inode
	fragment []byte // what goes into the packed inode: the last extent, or everything
	plain    bool   // not encoded at all, the whole of a file

	checksum uint32   // of the data
	digest   [32]byte // of the data, where files with the same content are looked for
	err      error
	done     chan struct{} // closed when all of that is known
}

// whole says that the segment is a file.
func (s *segment) whole() bool { return s.first && s.last }

// A worker encodes segments.
type worker struct {
	*Compression
	builder *Builder
	encoder encoder
	buf     []byte // a pcluster
}

func (b *Builder) newWorker() (*worker, error) {
	e, err := b.options.Compression.newEncoder(b.options.BlockSize)
	if err != nil {
		return nil, err
	}
	return &worker{&b.options.Compression, b, e, make([]byte, b.options.Compression.ClusterSize)}, nil
}

// do reads s, if that was not done, and encodes it.
func (w *worker) do(s *segment) error {
	if s.data == nil {
		data := w.builder.buffers.get(int(s.n.Size))
		if err := s.n.readAll(data); err != nil {
			w.builder.buffers.put(data)
			return fmt.Errorf("%q, a file of %d bytes: %w", s.n.Path, s.n.Size, err)
		}
		s.data = data
		s.checksum = crc32.Checksum(data, castagnoli)
	}
	if w.Dedupe && s.whole() {
		s.digest = sha256.Sum256(s.data)
	}
	if fragments := w.Fragments && s.n != w.builder.packed; s.whole() && w.hopeless(s.data, fragments) {
		w.store(s)
	} else {
		w.encode(s, fragments)
		if s.whole() && s.fragment == nil && w.useless(s) {
			w.store(s)
		}
	}
	if len(s.fragment) == 0 {
		w.builder.buffers.put(s.data)
	}
	s.data = nil
	return nil
}

// readAll fills p, which is as long as n's content says.
func (n *node) readAll(p []byte) (err error) {
	r, err := n.Open()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	if err := readSome(r, p, 0); err != nil {
		return err
	}
	return expectEnd(r)
}

// readSome fills p with what follows the first off bytes of a source.
func readSome(r io.Reader, p []byte, off int64) error {
	m, err := io.ReadFull(r, p)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return fmt.Errorf("its source, after %d bytes: %w", off+int64(m), err)
	}
	return nil
}

// expectEnd makes sure that a source has nothing left.
func expectEnd(r io.Reader) error {
	var one [1]byte
	switch m, err := io.ReadFull(r, one[:]); {
	case m > 0:
		return errors.New("its source goes on after that")
	case err != io.EOF:
		return fmt.Errorf("its source, at its end: %w", err)
	}
	return nil
}

// encode makes pclusters of s.data.
func (w *worker) encode(s *segment, fragments bool) {
	bs := w.builder.options.BlockSize
	s.blocks = w.builder.buffers.get(len(s.data))[:0]
	if fragments && s.whole() && len(s.data) <= w.ClusterSize {
		s.fragment = s.data
		return
	}
	w.encoder.begin(s.data)
	for from := 0; from < len(s.data); {
		rest := len(s.data) - from
		if fragments && s.last && rest <= w.ClusterSize {
			w.keep(s, from)
			return
		}
		if rest <= bs && !(s.last && w.TailPacking) {
			w.plainExtents(s, from, rest)
			return
		}
		n, c := w.encoder.fill(w.buf, s.data, from)
		ends := s.last && n == rest
		blocks := (c + bs - 1) / bs
		switch {
		case c > 0 && c < n && ends && fragments:
			w.keep(s, from)
		case c > 0 && c < n && ends && w.TailPacking && c <= maxTail(bs):
			s.tail = append(s.tail, w.buf[:c]...)
			s.extents = append(s.extents, extent{size: uint32(n), encoded: true})
		case c == 0 || n <= blocks*bs:
			n = min(max(n, 1)+bs-1, rest+bs-1) / bs * bs
			n = min(n, rest)
			w.plainExtents(s, from, n)
		default:
			// Zeros stand before what does not fill the blocks.
			s.blocks = append(s.blocks, make([]byte, blocks*bs-c)...)
			s.blocks = append(s.blocks, w.buf[:c]...)
			s.extents = append(s.extents, extent{uint32(n), uint16(blocks), true})
		}
		from += n
	}
}

// maxTail is how many bytes can lie behind an inode wherever that ends in its slot, and not cross a block's end.
func maxTail(blockSize int) int { return blockSize - ondisk.InodeSlot }

// keep leaves s.data[from:] to the packed inode.
func (w *worker) keep(s *segment, from int) {
	s.fragment = s.data[from:]
	s.extents = append(s.extents, extent{size: uint32(len(s.fragment)), encoded: true})
}

// plainExtents stores n bytes as they are, a block each: an extent must not be longer than its pcluster, and of larger
// ones Linux before 6.1 knows nothing. The very last may lie behind the inode.
func (w *worker) plainExtents(s *segment, from, n int) {
	bs := w.builder.options.BlockSize
	for end := from + n; from < end; from += bs {
		p := s.data[from:min(from+bs, end)]
		if s.last && w.TailPacking && end == len(s.data) && from+bs >= end && len(p) <= maxTail(bs) {
			s.tail = append(s.tail, p...)
			s.extents = append(s.extents, extent{size: uint32(len(p))})
			return
		}
		s.blocks = append(s.blocks, p...)
		s.blocks = append(s.blocks, make([]byte, bs-len(p))...)
		s.extents = append(s.extents, extent{size: uint32(len(p)), blocks: 1})
	}
}

// hopeless says that a file will be stored as it is, since nothing is smaller than a block.
func (w *worker) hopeless(data []byte, fragments bool) bool {
	return len(data) <= w.builder.options.BlockSize && !fragments && !w.TailPacking
}

// useless says that a file takes no more room as it is.
func (w *worker) useless(s *segment) bool {
	x := index{Compression: w.Compression, blockBits: w.builder.blockBits, size: int64(len(s.data))}
	encoded := int64(len(s.blocks)+len(s.tail)) + x.length(0)
	blocks, tail := w.builder.split(x.size)
	return encoded >= blocks*int64(w.builder.options.BlockSize)+tail
}

// store takes s.data as it is.
func (w *worker) store(s *segment) {
	blocks, tail := w.builder.split(int64(len(s.data)))
	whole := len(s.data) - int(tail)
	s.plain, s.extents = true, nil
	if s.blocks == nil {
		s.blocks = w.builder.buffers.get(len(s.data) + w.builder.options.BlockSize)
	}
	s.blocks = append(s.blocks[:0], s.data[:whole]...)
	s.blocks = append(s.blocks, make([]byte, int(blocks)*w.builder.options.BlockSize-whole)...)
	s.tail = append(s.tail[:0], s.data[whole:]...)
}
