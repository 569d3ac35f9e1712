package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
)

// roomStep is how much is decompressed before somebody looks how much room there is: as much as what others write
// meanwhile may take of what is to stay free.
const roomStep = 4 << 20

// A roomWriter writes to a file as long as its file system has room.
type roomWriter struct {
	ctx    context.Context
	opener *layerOpener
	file   *os.File
	left   int64 // of a step
}

func (w *roomWriter) Write(p []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	if w.left < int64(len(p)) {
		room, err := w.opener.checkRoom(w.file, int64(len(p)))
		if err != nil {
			return 0, err
		}
		w.left = min(room, max(roomStep, int64(len(p))))
	}
	n, err := w.file.Write(p)
	w.left -= int64(n)
	return n, err
}

// checkRoom says how much may be written where f is: n bytes at least. It is an error if the file
// system had less than --cache-min-free left after them, and the cache could not make room.
func (o *layerOpener) checkRoom(f *os.File, n int64) (most int64, err error) {
	keep := max(o.cache.MinFree(), 0)
	room := o.room
	if room == nil {
		room = roomOf
	}
	for {
		free, err := room(f)
		if err != nil {
			return 0, err
		}
		if free >= keep && n <= free-keep {
			return free - keep, nil
		}
		freed := int64(0)
		if !o.offline { // when nothing of what goes could be had again
			freed, err = o.giveWay(n, keep-free)
		}
		if err != nil {
			return 0, err
		}
		if freed == 0 {
			return 0, fmt.Errorf("%s has %d bytes free, of which %d are to stay free (--cache-min-free), and %d more are needed at least: %w", o.dir, free, keep, n, syscall.ENOSPC)
		}
	}
}

// giveWay has the cache make room for n bytes and some more, which may be negative, by what was not read for longest.
// It gives nothing where that would not be enough.
func (o *layerOpener) giveWay(n, more int64) (freed int64, err error) {
	u, err := o.cache.Usage()
	if err != nil || n > u.Occupied || more > u.Occupied-n {
		return 0, err
	}
	// Some more than is needed, so that this is not done for each step.
	return o.cache.Prune(max(u.Occupied-n-more-u.Occupied/64, 0))
}

// restart empties a file.
func restart(f *os.File) error {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	return f.Truncate(0)
}

// roomOf is how much can be written where f is.
func roomOf(f *os.File) (int64, error) {
	var st syscall.Statfs_t
	if err := syscall.Fstatfs(int(f.Fd()), &st); err != nil {
		return 0, fmt.Errorf("statfs %s: %w", f.Name(), err)
	}
	return int64(st.Bavail) * int64(st.Frsize), nil
}

// unnamedFile is a file in dir that nobody else can open.
func unnamedFile(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "decompressed."+rand.Text()), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
