package backend

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// maxLog bounds one generation of a log file; there are two.
const maxLog = 1 << 20

// LogFile is a log that a server can write for weeks: at maxLog it is renamed
// to NAME.1, over the one before, and begun anew.
type LogFile struct {
	path string

	mu     sync.Mutex // guards what follows
	f      *os.File
	size   int64
	output bool // descriptors 1 and 2 are the log's
}

// OpenLog opens or begins the log at path.
func OpenLog(path string) (*LogFile, error) {
	l := &LogFile{path: path}
	return l, l.open()
}

func (l *LogFile) open() error {
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return errors.Join(err, f.Close())
	}
	l.f, l.size = f, st.Size()
	return nil
}

// takeOutput sends standard output and standard error to the log, and to each
// file that it is continued in.
func (l *LogFile) takeOutput() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.output = true
	return l.redirect()
}

func (l *LogFile) redirect() error {
	for _, fd := range []int{1, 2} {
		if err := unix.Dup3(int(l.f.Fd()), fd, 0); err != nil {
			return fmt.Errorf("redirect descriptor %d: %w", fd, err)
		}
	}
	return nil
}

// Write appends one record.
func (l *LogFile) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.size+int64(len(p)) > maxLog {
		if err := l.rotate(); err != nil {
			return 0, err
		}
	}
	n, err := l.f.Write(p)
	l.size += int64(n)
	return n, err
}

func (l *LogFile) rotate() error {
	// A log that somebody took away is begun anew.
	if err := os.Rename(l.path, l.path+".1"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	old := l.f
	if err := l.open(); err != nil {
		return err
	}
	if l.output {
		if err := l.redirect(); err != nil {
			return err
		}
	}
	return old.Close()
}

// Close ends the log; the file stays.
func (l *LogFile) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.f.Close()
}
