package backend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
)

// File is a local file as a Source.
type File struct {
	f    *os.File
	size int64
}

// OpenFile opens the regular file or block device at path.
func OpenFile(path string) (*File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	// A block device has no size of its own in stat(2), but it has an end.
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &File{f, size}, nil
}

// Size is the length of the file when it was opened.
func (s *File) Size() int64 { return s.size }

// ReadAt fills p from off. A file that was cut short since is an error.
func (s *File) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if off < 0 || off > s.size || int64(len(p)) > s.size-off {
		return fmt.Errorf("read %s: %d bytes at %d lie outside its %d bytes: %w", s.f.Name(), len(p), off, s.size, io.ErrUnexpectedEOF)
	}
	n, err := s.f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// Close closes the file.
func (s *File) Close() error { return s.f.Close() }
