package mkerofs

import (
	"bufio"
	"fmt"
	"io"
	"os"
)

// A spool holds what cannot be written yet, in a temporary file without a name.
type spool struct {
	f    *os.File
	w    *bufio.Writer
	size int64
}

func newSpool(dir string) (*spool, error) {
	f, err := os.CreateTemp(dir, "erofs-build-*")
	if err != nil {
		return nil, fmt.Errorf("make a temporary file: %w", err)
	}
	// The file goes with its last user, however that ends.
	if err := os.Remove(f.Name()); err != nil {
		return nil, fmt.Errorf("unlink the temporary file: %w", err)
	}
	return &spool{f: f, w: bufio.NewWriterSize(f, 256<<10)}, nil
}

func (s *spool) Write(p []byte) (int, error) {
	n, err := s.w.Write(p)
	s.size += int64(n)
	return n, err
}

// reader gives n bytes from off on. Nothing is written after the first call.
func (s *spool) reader(off, n int64) (io.Reader, error) {
	if err := s.w.Flush(); err != nil {
		return nil, err
	}
	return io.NewSectionReader(s.f, off, n), nil
}

// readAt fills p from off on. Nothing is written after the first call.
func (s *spool) readAt(p []byte, off int64) error {
	if err := s.w.Flush(); err != nil {
		return err
	}
	if _, err := s.f.ReadAt(p, off); err != nil {
		return fmt.Errorf("read the temporary file: %w", err)
	}
	return nil
}

func (s *spool) Close() error {
	if s == nil {
		return nil
	}
	return s.f.Close()
}
