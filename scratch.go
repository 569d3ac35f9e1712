package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
)

// A scratch is where a command keeps what is too much for memory: files without names in one directory, which go with
// their last user however that ends. Together they may have so many bytes.
type scratch struct {
	dir   string
	limit int64 // 0: none
	used  atomic.Int64
}

// A scratchFile is one of them. What is written is appended; it can be read at random.
type scratchFile struct {
	*os.File
	of   *scratch
	size int64
}

func (s *scratch) create() (*scratchFile, error) {
	f, err := os.CreateTemp(s.dir, "erofs-oci-*")
	if err != nil {
		return nil, fmt.Errorf("make a temporary file: %w; --tmp names another directory", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(fmt.Errorf("unlink the temporary file: %w", err), f.Close())
	}
	return &scratchFile{File: f, of: s}, nil
}

func (f *scratchFile) Write(p []byte) (int, error) {
	if used := f.of.used.Add(int64(len(p))); f.of.limit > 0 && used > f.of.limit {
		f.of.used.Add(-int64(len(p)))
		return 0, fmt.Errorf("more than %s of temporary files in %s; --tmp-limit allows more", sizeText(f.of.limit), f.of.where())
	}
	n, err := f.File.Write(p)
	f.size += int64(n)
	f.of.used.Add(int64(n - len(p)))
	if err != nil {
		// The file's own name is gone and says nothing.
		var path *os.PathError
		if errors.As(err, &path) {
			err = path.Err
		}
		err = fmt.Errorf("temporary files in %s (%s so far): %w; --tmp names another directory", f.of.where(), sizeText(f.of.used.Load()), err)
	}
	return n, err
}

// ReadFrom is Write for all of r: that of os.File would not count.
func (f *scratchFile) ReadFrom(r io.Reader) (int64, error) {
	return io.CopyBuffer(struct{ io.Writer }{f}, r, make([]byte, streamChunk))
}

// section is what was written so far.
func (f *scratchFile) section() *io.SectionReader { return io.NewSectionReader(f.File, 0, f.size) }

func (f *scratchFile) Close() error {
	f.of.used.Add(-f.size)
	f.size = 0
	return f.File.Close()
}

func (s *scratch) where() string {
	if s.dir == "" {
		return os.TempDir()
	}
	return s.dir
}
