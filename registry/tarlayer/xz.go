package tarlayer

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"hash/crc64"
	"io"
	"slices"

	"github.com/ulikunitz/xz/lzma"
)

// An xzReader reads the xz format (https://tukaani.org/xz/xz-file-format.txt), whose LZMA2 data is decoded by a library.
//
//	stream:  header, blocks, index, footer, zeros; then another one, or the end
//	block:   header with sizes and the dictionary, LZMA2 data, zeros, check
//	index:   the sizes of all blocks
//
// That library's own reader of the format makes a dictionary as large as a block asks for, up to 4 GiB, and there is no
// telling from outside where the next block begins, since that depends on what the decoder took. This one refuses
// large dictionaries in time, and remembers of blocks a hash alone.
type xzReader struct {
	in    *bufio.Reader
	flags [2]byte          // of the stream
	check func() hash.Hash // that a block ends with
	index xzIndex
	block *xzBlock // the current one
	ended error
}

// xzIndex is what the index of a stream has to say.
type xzIndex struct {
	blocks uint64
	sizes  hash.Hash // of all records
}

func (x *xzIndex) add(packed, size uint64) {
	var b []byte
	b = binary.LittleEndian.AppendUint64(b, packed)
	x.sizes.Write(binary.LittleEndian.AppendUint64(b, size)) // a hash does not fail
}

type xzBlock struct {
	header       int
	packed, size int64 // of the data, as the header has it; -1 for unknown
	from         *xzCounter
	data         *lzma.Reader2
	n            int64 // bytes of data so far
	sum          hash.Hash
}

// An xzCounter gives n bytes to the decoder, and counts down.
type xzCounter struct {
	r *bufio.Reader
	n int64
}

func (c *xzCounter) ReadByte() (byte, error) {
	if c.n <= 0 {
		return 0, io.EOF
	}
	b, err := c.r.ReadByte()
	if err == nil {
		c.n--
	}
	return b, err
}

func (c *xzCounter) Read(p []byte) (int, error) {
	if c.n <= 0 {
		return 0, io.EOF
	}
	n, err := c.r.Read(p[:min(int64(len(p)), c.n)])
	c.n -= int64(n)
	return n, err
}

const (
	xzMagic       = "\xfd7zXZ\x00"
	xzFooterMagic = "YZ"
	// maxDictionary is the largest dictionary of an xz block. That of xz -9 is half of it.
	maxDictionary = 128 << 20
	minDictionary = 4 << 10
	xzMaxSize     = 1<<63 - 1
	xzLZMA2       = 0x21
)

func newXZReader(in *bufio.Reader) (*xzReader, error) {
	x := &xzReader{in: in}
	var magic [4]byte
	err := x.full(magic[:])
	if err == nil {
		err = x.begin(magic)
	}
	return x, err
}

// full fills p.
func (x *xzReader) full(p []byte) error {
	_, err := io.ReadFull(x.in, p)
	return cut(err)
}

// cut is err of what must not end yet.
func cut(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

func (x *xzReader) Read(p []byte) (int, error) {
	for len(p) > 0 && x.ended == nil {
		if x.block == nil {
			x.ended = x.next()
			continue
		}
		n, err := x.block.data.Read(p)
		x.block.n += int64(n)
		x.block.sum.Write(p[:n])
		switch {
		case err == io.EOF && !x.block.data.EOS(): // the decoder does not tell one from the other
			err = io.ErrUnexpectedEOF
		case err == io.EOF:
			err = x.endBlock()
		}
		x.ended = err
		if n > 0 {
			return n, nil
		}
	}
	return 0, x.ended
}

// begin reads the header of a stream behind its first bytes.
func (x *xzReader) begin(first [4]byte) error {
	head := append(first[:], make([]byte, 8)...)
	if err := x.full(head[4:]); err != nil {
		return err
	}
	if !bytes.HasPrefix(head, []byte(xzMagic)) {
		return errors.New("xz: what follows is no stream")
	}
	if crc32.ChecksumIEEE(head[6:8]) != binary.LittleEndian.Uint32(head[8:]) {
		return errors.New("xz: header of the stream has a wrong checksum")
	}
	x.flags = [2]byte(head[6:8])
	checks := map[[2]byte]func() hash.Hash{
		{0, 0}:   func() hash.Hash { return noHash{crc32.NewIEEE()} },
		{0, 1}:   func() hash.Hash { return crc32.NewIEEE() },
		{0, 4}:   func() hash.Hash { return crc64.New(crc64.MakeTable(crc64.ECMA)) },
		{0, 0xa}: sha256.New,
	}
	if x.check = checks[x.flags]; x.check == nil {
		return fmt.Errorf("xz: stream with flags %#x, which are not known", x.flags)
	}
	x.index = xzIndex{sizes: sha256.New()}
	return nil
}

// noHash is the check of blocks that have none.
type noHash struct{ hash.Hash }

func (noHash) Size() int           { return 0 }
func (noHash) Sum(b []byte) []byte { return b }

// next begins the next block, of this stream or another one. io.EOF is behind the last.
func (x *xzReader) next() error {
	size, err := x.in.ReadByte()
	if err != nil {
		return cut(err)
	}
	if size != 0 {
		return x.beginBlock(size)
	}
	if err := x.endStream(); err != nil {
		return err
	}
	for first := [4]byte{}; ; {
		if _, err := io.ReadFull(x.in, first[:]); err != nil {
			return err // io.EOF where the file may end
		}
		if first != [4]byte{} {
			return x.begin(first)
		}
	}
}

// beginBlock reads the header of a block behind its first byte.
func (x *xzReader) beginBlock(size byte) error {
	head := make([]byte, 4*(int(size)+1))
	head[0] = size
	if err := x.full(head[1:]); err != nil {
		return err
	}
	end := len(head) - 4
	if crc32.ChecksumIEEE(head[:end]) != binary.LittleEndian.Uint32(head[end:]) {
		return errors.New("xz: header of a block has a wrong checksum")
	}
	b := &xzBlock{header: len(head), packed: -1, size: -1, sum: x.check()}
	dictionary, err := b.parse(head[1], bytes.NewReader(head[2:end]))
	if err != nil {
		return fmt.Errorf("xz: header of a block: %w", cut(err))
	}
	b.from = &xzCounter{x.in, xzMaxSize}
	if b.packed >= 0 {
		b.from.n = b.packed
	}
	b.data, err = lzma.Reader2Config{DictCap: int(dictionary)}.NewReader2(b.from)
	x.block = b
	return err
}

// parse reads what the header of a block says, and gives how large a dictionary its data takes.
func (b *xzBlock) parse(flags byte, r *bytes.Reader) (dictionary int64, err error) {
	if flags&0x3f != 0 {
		return 0, fmt.Errorf("flags %#x: filters before LZMA2 are not supported", flags)
	}
	for _, field := range []struct {
		flag byte
		size *int64
	}{{0x40, &b.packed}, {0x80, &b.size}} {
		if flags&field.flag != 0 {
			if *field.size, err = xzSize(r); err != nil {
				return 0, err
			}
		}
	}
	var filter [3]byte
	if _, err := io.ReadFull(r, filter[:]); err != nil {
		return 0, err
	}
	if filter[0] != xzLZMA2 || filter[1] != 1 {
		return 0, fmt.Errorf("filter %#x is not LZMA2", filter)
	}
	if dictionary, err = lzma.DecodeDictCap(filter[2]); err != nil {
		return 0, err
	}
	if dictionary > maxDictionary {
		return 0, fmt.Errorf("%w: %d bytes, more than %d; compress the layer with xz -9 or less", errDictionary, dictionary, maxDictionary)
	}
	for r.Len() > 0 {
		if c, _ := r.ReadByte(); c != 0 {
			return 0, errors.New("has more than is known")
		}
	}
	if b.size >= 0 { // what is farther back does not exist
		dictionary = min(dictionary, max(b.size, minDictionary))
	}
	return dictionary, nil
}

var errDictionary = errors.New("dictionary is too large")

// xzSize reads a number of at most 63 bits.
func xzSize(r io.ByteReader) (int64, error) {
	n, err := binary.ReadUvarint(r)
	if err == nil && n > xzMaxSize {
		err = fmt.Errorf("xz: size %d is too large", n)
	}
	return int64(n), err
}

// endBlock reads what is behind the data of a block.
func (x *xzReader) endBlock() error {
	b := x.block
	x.block = nil
	packed := int64(xzMaxSize) - b.from.n
	if b.packed >= 0 {
		packed = b.packed - b.from.n
	}
	if b.packed >= 0 && packed != b.packed || b.size >= 0 && b.n != b.size {
		return fmt.Errorf("xz: a block has %d bytes of %d compressed ones, not %d of %d", b.n, packed, b.size, b.packed)
	}
	tail := make([]byte, int(-packed&3)+b.sum.Size())
	if err := x.full(tail); err != nil {
		return err
	}
	padding, check := tail[:-packed&3], tail[-packed&3:]
	sum := b.sum.Sum(nil)
	if len(sum) <= 8 {
		slices.Reverse(sum) // the checksums are little-endian here
	}
	if !bytes.Equal(check, sum) || !zeros(padding) {
		return errors.New("xz: a block has a wrong checksum")
	}
	x.index.blocks++
	x.index.add(uint64(b.header)+uint64(packed)+uint64(len(check)), uint64(b.n))
	return nil
}

func zeros(p []byte) bool { return len(bytes.Trim(p, "\x00")) == 0 }

// xzSummer counts and sums the bytes of an index.
type xzSummer struct {
	r   *bufio.Reader
	n   int64
	sum uint32
}

func (s *xzSummer) ReadByte() (byte, error) {
	c, err := s.r.ReadByte()
	if err == nil {
		s.n++
		s.sum = crc32.Update(s.sum, crc32.IEEETable, []byte{c})
	}
	return c, cut(err)
}

// endStream reads the index, behind its first byte, and the footer.
func (x *xzReader) endStream() error {
	in := &xzSummer{x.in, 1, crc32.ChecksumIEEE([]byte{0})}
	blocks, err := binary.ReadUvarint(in)
	if err != nil {
		return err
	}
	if blocks != x.index.blocks {
		return fmt.Errorf("xz: index of %d blocks, where %d were", blocks, x.index.blocks)
	}
	index := xzIndex{sizes: sha256.New()}
	for range blocks {
		packed, err := xzSize(in)
		if err != nil {
			return err
		}
		size, err := xzSize(in)
		if err != nil {
			return err
		}
		index.add(uint64(packed), uint64(size))
	}
	for in.n%4 != 0 {
		c, err := in.ReadByte()
		if err != nil {
			return err
		}
		if c != 0 {
			return errors.New("xz: something behind the records of an index")
		}
	}
	if !bytes.Equal(index.sizes.Sum(nil), x.index.sizes.Sum(nil)) {
		return errors.New("xz: index has other sizes than the blocks")
	}
	var foot [16]byte // the checksum of the index, and the footer
	if err := x.full(foot[:]); err != nil {
		return err
	}
	le := binary.LittleEndian
	if le.Uint32(foot[:]) != in.sum || le.Uint32(foot[4:]) != crc32.ChecksumIEEE(foot[8:14]) {
		return errors.New("xz: end of a stream has a wrong checksum")
	}
	// The footer has the size of the index, its checksum included, in units of 4 bytes less one.
	if back := 4 * (int64(le.Uint32(foot[8:])) + 1); back != in.n+4 || [2]byte(foot[12:14]) != x.flags || string(foot[14:]) != xzFooterMagic {
		return errors.New("xz: footer of a stream is not that of what is before it")
	}
	return nil
}
