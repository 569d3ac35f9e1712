package mkerofs

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"strings"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

const bufferSize = 1 << 20

// Finish writes the image and gives its size in bytes, whole blocks. Nothing can be added after it, and it cannot be
// called twice.
func (b *Builder) Finish(ctx context.Context) (size int64, err error) {
	if b.finished {
		return 0, errors.New("the image is finished")
	}
	b.finished = true
	b.progress.report = b.options.Progress
	nodes := b.walk()
	var s *spools
	if b.options.Compression.Algorithm != Uncompressed {
		if s, err = b.compress(ctx, b.dataOrder(nodes)); err != nil {
			return 0, fmt.Errorf("compress: %w", err)
		}
		defer func() { err = errors.Join(err, s.Close()) }()
		if b.packed != nil {
			nodes = append(nodes, b.packed)
			b.packed.ino = uint32(len(nodes))
		}
	}
	l, err := b.plan(nodes, s)
	if err != nil {
		return 0, fmt.Errorf("lay out image: %w", err)
	}
	w := &writer{
		ctx: ctx, to: b.w, pos: l.metaStart, content: sha256.New(),
		blockSize: int64(b.options.BlockSize), chunkSize: b.options.ChunkSize, metadataOnly: b.options.MetadataOnly,
		workers: b.workers(), progress: &b.progress,
	}
	w.out = bufio.NewWriterSize(io.NewOffsetWriter(b.w, w.pos), bufferSize)
	for _, step := range []func(*layout) error{w.metadata, w.data, func(l *layout) error { return b.writeSuper(l, w) }} {
		if err := step(l); err != nil {
			return 0, fmt.Errorf("write image: %w", err)
		}
	}
	b.stats = b.count(l)
	return l.blocks * w.blockSize, nil
}

// progress counts for Options.Progress what is consumed.
type progress struct {
	report       func(files, bytes int64)
	files, bytes int64
}

func (p *progress) add(bytes int) {
	p.bytes += int64(bytes)
	p.say()
}

func (p *progress) file() {
	p.files++
	p.say()
}

func (p *progress) say() {
	if p.report != nil {
		p.report(p.files, p.bytes)
	}
}

// find gives what is at a path, or nil.
func (b *Builder) find(path string) *node {
	n := b.root
	for name := range strings.SplitSeq(path, "/") {
		if n == nil {
			return nil
		}
		n = n.children[name] // nil for what is no directory
	}
	return n
}

// dataOrder gives the files that have data, in the order in which that lies on the disk.
func (b *Builder) dataOrder(nodes []*node) []*node {
	var files []*node
	ordered := make(map[*node]bool)
	add := func(n *node) {
		if n != nil && n.Mode&ModeType == ModeRegular && n.Size > 0 && !ordered[n] && n != b.packed {
			files = append(files, n)
			ordered[n] = true
		}
	}
	for _, path := range b.options.Order {
		add(b.find(path))
	}
	for _, n := range nodes {
		add(n)
	}
	return files
}

// A writer writes an image from the first inode to the end.
type writer struct {
	ctx          context.Context
	to           io.WriterAt
	out          *bufio.Writer // to, from pos on
	pos          int64
	blockSize    int64
	chunkSize    int
	metadataOnly bool
	workers      int
	progress     *progress
	content      hash.Hash // of the metadata, and of the files' checksums
}

// Write is for what follows the last byte.
func (w *writer) Write(p []byte) (int, error) {
	n, err := w.out.Write(p)
	w.pos += int64(n)
	return n, err
}

// padTo writes zeros up to pos.
func (w *writer) padTo(pos int64) error {
	if pos < w.pos {
		return fmt.Errorf("at byte %d of the image, behind %d: the layout overlaps", w.pos, pos)
	}
	_, err := io.CopyN(w, zeros{}, pos-w.pos)
	return err
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// put writes metadata at pos.
func (w *writer) put(pos int64, p []byte) error {
	if err := w.padTo(pos); err != nil {
		return err
	}
	// Where it lies counts as much as what it is.
	w.content.Write(binary.LittleEndian.AppendUint64(nil, uint64(pos)))
	w.content.Write(p)
	_, err := w.Write(p)
	return err
}

// metadata writes all up to the first regular file's block.
func (w *writer) metadata(l *layout) error {
	var buf []byte
	for _, n := range l.inodes {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		var err error
		if buf, err = w.inode(l, n, buf[:0]); err != nil {
			return err
		}
		if err := w.put(n.offset, buf); err != nil {
			return err
		}
	}
	if len(l.shared) > 0 {
		if err := w.put(l.sharedAt, l.shared); err != nil {
			return err
		}
	}
	for _, n := range l.nodes {
		if n.blocks == 0 || n.Mode&ModeType == ModeRegular {
			continue
		}
		content := n.metaContent(w.blockSize)
		content = content[:min(n.blocks*w.blockSize, int64(len(content)))]
		if err := w.put(int64(n.block)*w.blockSize, content); err != nil {
			return err
		}
	}
	if err := w.padTo(l.dataBlock * w.blockSize); err != nil {
		return err
	}
	return w.out.Flush() // the tails of regular files are written into what is on its way here
}

// inode writes all that lies together with n's inode behind b. The tails of files that are not in a spool come later.
func (w *writer) inode(l *layout, n *node, b []byte) ([]byte, error) {
	b = append(n.encodeInode(b), n.xattrs...)
	if n.encoded() {
		b = append(b, make([]byte, n.indexStart()-int64(len(b)))...)
		x := n.stored.index
		x.block = n.block
		b = x.append(b, n.indexStart()+ondisk.MapHeaderSize)
	}
	if w.metadataOnly && n.chunks > 0 {
		b = append(b, make([]byte, n.indexStart()-int64(len(b)))...)
		return appendHoles(b, n.chunks), nil
	}
	switch {
	case n.tail == 0:
	case n.Mode&ModeType != ModeRegular:
		b = append(b, n.metaContent(w.blockSize)[n.blocks*w.blockSize:]...)
	case n.stored != nil:
		b = append(b, make([]byte, n.tail)...)
		return b, l.spools.tails.readAt(b[len(b)-int(n.tail):], n.stored.tailAt)
	}
	return b, nil
}

// metaContent is what a directory or a symbolic link holds.
func (n *node) metaContent(blockSize int64) []byte {
	if n.children == nil {
		return []byte(n.Target)
	}
	content := make([]byte, 0, n.Size)
	for span := range dirBlocks(n.names, int(blockSize)) {
		content = append(content, make([]byte, roundUp(int64(len(content)), blockSize)-int64(len(content)))...)
		content = n.encodeDirents(content, n.names[span[0]:span[1]])
	}
	return content
}

// data writes the regular files.
func (w *writer) data(l *layout) error {
	if l.spools != nil {
		return w.spooled(l)
	}
	buf := make([]byte, max(bufferSize, w.chunkSize))
	chunks := chunkWriter{w, w.chunkSize, make(map[[sha256.Size]byte]uint32)}
	for _, n := range l.files {
		write := w.file
		if n.chunks > 0 {
			write = chunks.file
		}
		if err := write(n, buf); err != nil {
			return fmt.Errorf("%q, a file of %d bytes: %w", n.Path, n.Size, err)
		}
		w.progress.file()
	}
	if w.chunkSize > 0 {
		l.blocks = roundUp(w.pos, w.blockSize) / w.blockSize
	}
	if err := w.padTo(l.blocks * w.blockSize); err != nil {
		return err
	}
	return w.out.Flush()
}

// spooled writes what files were compressed to. Nothing is in w.out any more.
func (w *writer) spooled(l *layout) error {
	for _, n := range l.nodes {
		if n.stored != nil {
			w.content.Write(binary.LittleEndian.AppendUint32(nil, n.stored.checksum))
		}
	}
	for _, s := range []*spool{l.spools.data, l.spools.packed} {
		if err := s.copyTo(w.ctx, w.to, w.pos, w.workers); err != nil {
			return err
		}
		w.pos += s.size
	}
	if end := l.blocks * w.blockSize; w.pos != end {
		return fmt.Errorf("data ends at byte %d of the image, not %d: the layout is wrong", w.pos, end)
	}
	return nil
}

func (w *writer) file(n *node, buf []byte) (err error) {
	r, err := n.Open()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()

	sum := crc32.New(castagnoli)
	src := io.TeeReader(ctxReader{w.ctx, r}, sum)
	whole := n.Size - n.tail
	if whole > 0 {
		if err := w.padTo(int64(n.block) * w.blockSize); err != nil {
			return err
		}
	}
	for off := int64(0); off < whole; {
		p := buf[:min(int64(len(buf)), whole-off)]
		if err := readSome(src, p, off); err != nil {
			return err
		}
		if _, err := w.Write(p); err != nil {
			return err
		}
		off += int64(len(p))
		w.progress.add(len(p))
	}
	if n.tail > 0 {
		if err := w.tail(n, src, buf[:n.tail]); err != nil {
			return err
		}
	}
	if err := expectEnd(r); err != nil {
		return err
	}
	w.content.Write(sum.Sum(nil))
	return nil
}

// tail puts the end of a file behind its inode: the metadata has been written, with a gap there.
func (w *writer) tail(n *node, src io.Reader, buf []byte) error {
	if err := readSome(src, buf, n.Size-n.tail); err != nil {
		return err
	}
	w.progress.add(len(buf))
	_, err := w.to.WriteAt(buf, n.offset+n.headSize())
	return err
}

type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
