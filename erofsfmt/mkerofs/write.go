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
)

const bufferSize = 1 << 20

// Finish writes the image and gives its size in bytes, whole blocks. Nothing can be added after it, and it cannot be
// called twice.
func (b *Builder) Finish(ctx context.Context) (int64, error) {
	if b.finished {
		return 0, errors.New("the image is finished")
	}
	b.finished = true
	l, err := b.plan()
	if err != nil {
		return 0, fmt.Errorf("lay out image: %w", err)
	}
	w := &writer{ctx: ctx, to: b.w, pos: l.metaStart, blockSize: int64(b.options.BlockSize), content: sha256.New()}
	w.out = bufio.NewWriterSize(io.NewOffsetWriter(b.w, w.pos), bufferSize)
	for _, step := range []func(*layout) error{w.metadata, w.data, func(l *layout) error { return b.writeSuper(l, w) }} {
		if err := step(l); err != nil {
			return 0, fmt.Errorf("write image: %w", err)
		}
	}
	return l.blocks * w.blockSize, nil
}

// A writer writes an image from the first inode to the end.
type writer struct {
	ctx       context.Context
	to        io.WriterAt
	out       *bufio.Writer // to, from pos on
	pos       int64
	blockSize int64
	content   hash.Hash // of the metadata, and of the files' checksums
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
	for _, n := range l.nodes {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		buf = append(n.encodeInode(buf[:0]), n.xattrs...)
		if n.tail > 0 && n.Mode&ModeType != ModeRegular {
			content := n.metaContent(w.blockSize)
			buf = append(buf, content[n.blocks*w.blockSize:]...)
		}
		if err := w.put(n.offset, buf); err != nil {
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
	buf := make([]byte, bufferSize)
	for _, n := range l.nodes {
		if n.Mode&ModeType != ModeRegular || n.Size == 0 {
			continue
		}
		if err := w.file(n, buf); err != nil {
			return fmt.Errorf("%q, a file of %d bytes: %w", n.Path, n.Size, err)
		}
	}
	if err := w.padTo(l.blocks * w.blockSize); err != nil {
		return err
	}
	return w.out.Flush()
}

func (w *writer) file(n *node, buf []byte) (err error) {
	r, err := n.Open()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()

	sum := crc32.New(crc32.MakeTable(crc32.Castagnoli))
	src := io.TeeReader(ctxReader{w.ctx, r}, sum)
	if whole := n.Size - n.tail; whole > 0 {
		if err := w.padTo(int64(n.block) * w.blockSize); err != nil {
			return err
		}
		m, err := io.CopyBuffer(w, io.LimitReader(src, whole), buf)
		if err == nil && m < whole {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return fmt.Errorf("its source, after %d bytes: %w", m, err)
		}
	}
	if n.tail > 0 {
		if err := w.tail(n, src, buf[:n.tail]); err != nil {
			return err
		}
	}
	switch m, err := io.ReadFull(r, buf[:1]); {
	case m > 0:
		return errors.New("its source goes on after that")
	case err != io.EOF:
		return fmt.Errorf("its source, at its end: %w", err)
	}
	w.content.Write(sum.Sum(nil))
	return nil
}

// tail puts the end of a file behind its inode: the metadata has been written, with a gap there.
func (w *writer) tail(n *node, src io.Reader, buf []byte) error {
	if m, err := io.ReadFull(src, buf); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("its source, after %d bytes: %w", n.Size-n.tail+int64(m), err)
	}
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
