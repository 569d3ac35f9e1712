package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
)

// build makes an image of a kind, of a directory or of an archive.
func build(ctx context.Context, name string, workers int, args []string) (err error) {
	k, ok := allKinds()[name]
	if !ok || len(args) != 2 {
		return fmt.Errorf("-ours %s takes a kind, an image and its source", name)
	}
	out, err := os.Create(args[0])
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	k.options.Workers = workers
	k.options.TempDir = filepath.Dir(args[0])
	b, err := mkerofs.New(out, k.options)
	if err != nil {
		return err
	}
	st, err := os.Stat(args[1])
	if err != nil {
		return err
	}
	if st.IsDir() {
		if err := addTree(b, args[1]); err != nil {
			return err
		}
		_, err = b.Finish(ctx)
		return err
	}
	archive, err := os.Open(args[1])
	if err != nil {
		return err
	}
	defer archive.Close()
	layers, err := mkerofs.NewLayers(b, mkerofs.LayerOptions{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, layers.Close()) }()
	if err := layers.ApplyAt(ctx, archive, st.Size()); err != nil {
		return err
	}
	_, err = b.Finish(ctx)
	return err
}

// addTree adds a directory, as mkfs.erofs sees it: with hard links and attributes.
func addTree(b *mkerofs.Builder, root string) error {
	first := make(map[[2]uint64]string)
	return filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return &fs.PathError{Op: "lstat", Path: path, Err: err}
		}
		if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			id := [2]uint64{st.Dev, st.Ino}
			if link, ok := first[id]; ok {
				return b.Add(mkerofs.Entry{Path: rel, Link: link})
			}
			first[id] = rel
		}
		e, err := entry(path, &st)
		if err != nil {
			return err
		}
		e.Path = rel
		return b.Add(e)
	})
}

func entry(path string, st *unix.Stat_t) (mkerofs.Entry, error) {
	e := mkerofs.Entry{
		Mode: st.Mode, UID: st.Uid, GID: st.Gid, Mtime: time.Unix(st.Mtim.Unix()),
		Major: unix.Major(st.Rdev), Minor: unix.Minor(st.Rdev),
	}
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		e.Target, err = os.Readlink(path)
	case unix.S_IFREG:
		e.Size = st.Size
		e.Open = func() (io.ReadCloser, error) { return open(path) }
	}
	if err == nil {
		e.Xattrs, err = xattrs(path)
	}
	return e, err
}

// A file is read by system calls alone: os.File makes six more to find out whether it could wait for data, which costs
// a tree of small files a twentieth of the time.
type file int

func open(path string) (io.ReadCloser, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return file(fd), nil
}

func (f file) Read(p []byte) (int, error) {
	for {
		n, err := unix.Read(int(f), p)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return 0, fmt.Errorf("read: %w", err)
		case n == 0 && len(p) > 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
}

func (f file) Close() error { return unix.Close(int(f)) }

func xattrs(path string) (map[string][]byte, error) {
	var list [4096]byte
	n, err := unix.Llistxattr(path, list[:])
	if err != nil || n == 0 {
		if errors.Is(err, unix.ENOTSUP) {
			err = nil
		}
		return nil, err
	}
	attrs := make(map[string][]byte)
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
		value := make([]byte, 65536)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return nil, &fs.PathError{Op: "lgetxattr", Path: path, Err: err}
		}
		attrs[name] = value[:n]
	}
	return attrs, nil
}
