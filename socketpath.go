package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
)

// maxSocketPath is what fits into an address (unix(7)).
const maxSocketPath = 107

// listenAt makes a socket at path, for this user alone. One whose server is gone is in nobody's way. The socket is
// removed with the listener; another one that has its name by then is not.
//
// It gets its name when it listens: whoever finds one that refuses knows that its server is gone.
func listenAt(path string) (_ net.Listener, err error) {
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("the path has %d bytes, and that of a socket may have %d", len(path), maxSocketPath)
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	first := fmt.Sprintf("/proc/self/fd/%d/.%s", dir.Fd(), rand.Text()) // however long the path is
	l, err := listenPrivately(first)
	if err != nil {
		return nil, fmt.Errorf("make a socket in %s: %w", filepath.Dir(path), withoutAddress(err))
	}
	made, err := os.Lstat(first)
	if err == nil {
		err = placeSocket(dir, first, path)
	}
	if err != nil {
		return nil, errors.Join(err, removeIfThere(first), l.Close())
	}
	if err := removeIfThere(first); err != nil {
		return nil, errors.Join(err, os.Remove(path), l.Close())
	}
	return &socketListener{UnixListener: l, path: path, made: made}, nil
}

// placeSocket gives a socket its name, if nobody has it, or nobody who lives. Of several who are about to replace one that was
// left, one does: the others come too late. It is the directory that is locked, so that no lock is left in it.
func placeSocket(dir *os.File, first, path string) error {
	err := os.Link(first, path)
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	err = syscall.Flock(int(dir.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if err != nil && !errors.Is(err, syscall.EWOULDBLOCK) {
		return fmt.Errorf("lock %s: %w", dir.Name(), err)
	}
	if err != nil || !abandoned(path) {
		return syscall.EADDRINUSE
	}
	return os.Rename(first, path)
}

func removeIfThere(path string) error {
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// withoutAddress is why, without an address that nobody has asked for.
func withoutAddress(err error) error {
	var at *net.OpError
	if errors.As(err, &at) {
		return at.Err
	}
	return err
}

// listenPrivately makes a socket that nobody else can connect to: the file gets the mode that the socket has when it is
// bound, less the umask (net/unix/af_unix.c unix_bind_bsd). So the umask, which is for all threads, stays as it is.
func listenPrivately(path string) (*net.UnixListener, error) {
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		controlErr := c.Control(func(fd uintptr) { err = syscall.Fchmod(int(fd), 0o600) })
		return errors.Join(controlErr, err)
	}}
	l, err := config.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	unix := l.(*net.UnixListener)
	unix.SetUnlinkOnClose(false) // it goes by the name
	return unix, nil
}

// abandoned says whether path is a socket whose server is gone.
func abandoned(path string) bool {
	st, err := os.Lstat(path)
	if err != nil || st.Mode().Type() != os.ModeSocket {
		return false
	}
	conn, err := net.Dial("unix", path)
	if err == nil {
		conn.Close()
	}
	return errors.Is(err, syscall.ECONNREFUSED)
}

// A socketListener removes its socket when it is closed.
type socketListener struct {
	*net.UnixListener
	path    string
	made    os.FileInfo
	closing sync.Once
	err     error
}

// Addr is where it can be found.
func (l *socketListener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

// Close may be called again. As long as it listens nobody takes the place, so that what is removed is its own.
func (l *socketListener) Close() error {
	l.closing.Do(func() {
		if now, err := os.Lstat(l.path); err == nil && os.SameFile(now, l.made) {
			l.err = os.Remove(l.path)
		}
		l.err = errors.Join(l.err, l.UnixListener.Close())
	})
	return l.err
}
