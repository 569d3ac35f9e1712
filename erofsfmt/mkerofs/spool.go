package mkerofs

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
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

// readAt fills p from off on, of what was flushed.
func (s *spool) readAt(p []byte, off int64) error {
	if _, err := s.f.ReadAt(p, off); err != nil {
		return fmt.Errorf("read the temporary file: %w", err)
	}
	return nil
}

// copyTo writes all to a place in w, in pieces side by side. Nothing is written after the first call.
func (s *spool) copyTo(ctx context.Context, w io.WriterAt, pos int64, workers int) error {
	if err := s.w.Flush(); err != nil {
		return err
	}
	var next atomic.Int64 // where the next piece begins
	copyPieces := func() error {
		buf := make([]byte, min(bufferSize, s.size))
		for {
			off := next.Add(bufferSize) - bufferSize
			if off >= s.size {
				return nil
			}
			p := buf[:min(bufferSize, s.size-off)]
			err := ctx.Err()
			if err == nil {
				err = s.readAt(p, off)
			}
			if err == nil {
				_, err = w.WriteAt(p, pos+off)
			}
			if err != nil {
				next.Store(s.size) // the others end, too
				return err
			}
		}
	}
	var wait sync.WaitGroup
	errs := make([]error, workers)
	for i := range errs {
		wait.Go(func() { errs[i] = copyPieces() })
	}
	wait.Wait()
	return errors.Join(errs...)
}

func (s *spool) Close() error {
	if s == nil {
		return nil
	}
	return s.f.Close()
}
