package backend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// File is a local file as a Source. Its bytes must not change: a read that finds
// another length or another time of the last change than when it was opened is an
// error.
type File struct {
	f     *os.File
	state FileState
}

// FileState tells the file at a path from others that may come to be there, and
// from itself before a change.
type FileState struct {
	Path    string `json:"path"` // absolute
	Size    int64  `json:"size"`
	Device  uint64 `json:"device"` // that the file is on
	Inode   uint64 `json:"inode"`
	Rdev    uint64 `json:"rdev,omitempty"`  // of a block device
	MtimeNs int64  `json:"mtime,omitempty"` // of a regular file
}

// OpenFile opens the regular file or block device at path.
func OpenFile(path string) (*File, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	// Of a named pipe that nobody writes to, too, something can be said.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	s := &File{f: f}
	if s.state, err = stateOf(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	s.state.Path = abs
	return s, nil
}

func stateOf(f *os.File) (FileState, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return FileState{}, &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	s := FileState{Size: st.Size, Device: st.Dev, Inode: st.Ino}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		s.MtimeNs = st.Mtim.Nano()
		return s, nil
	case unix.S_IFBLK:
		s.Rdev = st.Rdev
		// A block device has no size of its own in stat(2), but it has an end.
		var err error
		s.Size, err = f.Seek(0, io.SeekEnd)
		return s, err
	}
	return s, fmt.Errorf("%s is neither a regular file nor a block device", f.Name())
}

// Size is the length of the file when it was opened.
func (s *File) Size() int64 { return s.state.Size }

// State is how the file was when it was opened.
func (s *File) State() FileState { return s.state }

// ReadAt fills p from off. A file that was cut short or changed since is an error.
func (s *File) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if off < 0 || off > s.state.Size || int64(len(p)) > s.state.Size-off {
		return fmt.Errorf("read %s: %d bytes at %d lie outside its %d bytes: %w", s.f.Name(), len(p), off, s.state.Size, io.ErrUnexpectedEOF)
	}
	n, err := s.f.ReadAt(p, off)
	if n == len(p) {
		return s.unchanged()
	}
	if errors.Is(err, io.EOF) {
		err = fmt.Errorf("read %s: it was cut short after it was opened: %w", s.f.Name(), io.ErrUnexpectedEOF)
	}
	return err
}

// unchanged is asked after a read: what was read before a change is not affected
// by it. What is behind a block device cannot be asked.
func (s *File) unchanged() error {
	if s.state.Rdev != 0 {
		return nil
	}
	now, err := stateOf(s.f)
	if err == nil && (now.Size != s.state.Size || now.MtimeNs != s.state.MtimeNs) {
		err = fmt.Errorf("read %s: it was changed after it was opened", s.f.Name())
	}
	return err
}

// Close closes the file.
func (s *File) Close() error { return s.f.Close() }
