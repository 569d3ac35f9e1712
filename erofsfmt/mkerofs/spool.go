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

// ErrTempLimit is the error of temporary files that would have more than Options.TempLimit.
var ErrTempLimit = errors.New("no room for temporary files")

// tempRoom is what all spools of a builder share. One goroutine at a time writes to them: those of Layers before
// Finish, the others in it.
type tempRoom struct{ limit, used int64 }

func (r *tempRoom) take(n int) error {
	if r.limit > 0 && int64(n) > r.limit-r.used {
		return fmt.Errorf("%w: they have %d bytes, and %d more would be above the limit of %d", ErrTempLimit, r.used, n, r.limit)
	}
	r.used += int64(n)
	return nil
}

// A spool holds what cannot be written yet, in a temporary file without a name.
type spool struct {
	f    *os.File
	w    *bufio.Writer
	size int64
	room *tempRoom
	held int64 // bytes of room: size without the holes
}

func (b *Builder) newSpool() (*spool, error) {
	f, err := os.CreateTemp(b.options.TempDir, "erofs-build-*")
	if err != nil {
		return nil, fmt.Errorf("make a temporary file: %w", err)
	}
	// The file goes with its last user, however that ends.
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(fmt.Errorf("unlink the temporary file: %w", err), f.Close())
	}
	return &spool{f: f, w: bufio.NewWriterSize(f, 256<<10), room: &b.temp}, nil
}

// take is called before n bytes are written.
func (s *spool) take(n int) error {
	if err := s.room.take(n); err != nil {
		return err
	}
	s.held += int64(n)
	return nil
}

func (s *spool) Write(p []byte) (int, error) {
	if err := s.take(len(p)); err != nil {
		return 0, err
	}
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
	s.room.used -= s.held
	s.held = 0
	return s.f.Close()
}
