package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
)

// A dirTree is the tree below a directory of this machine. Nothing outside it is read, whatever symbolic links are
// below it, or come to be there meanwhile.
type dirTree struct {
	root *os.File
	// oneFS leaves out what other file systems have on directories below; these stay as empty directories.
	oneFS bool
	// except is left out: what is made of the tree may be in it.
	except []fileID
}

func openDirTree(dir string, oneFS bool) (*dirTree, error) {
	root, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY, 0)
	return &dirTree{root: root, oneFS: oneFS}, err
}

func (t *dirTree) Close() error { return t.root.Close() }

func (t *dirTree) fill(ctx context.Context, l *mkerofs.Layers) error {
	return l.ApplyEntries(ctx, t.entries(ctx), mkerofs.WhiteoutsNone)
}

// entries gives the files below the directory: a directory before what is in it, names in their order.
func (t *dirTree) entries(ctx context.Context) iter.Seq2[mkerofs.Entry, error] {
	return func(yield func(mkerofs.Entry, error) bool) {
		w := &dirWalk{dirTree: t, ctx: ctx, first: map[fileID]string{}, yield: yield}
		if err := w.all(); err != nil && !errors.Is(err, errStop) {
			yield(mkerofs.Entry{}, err)
		}
	}
}

// open opens a regular file by its path from the top, which no symbolic link is to be on. There may be very many files:
// each is one system call to open, and the runtime's poller hears nothing of them.
func (t *dirTree) open(at string) (io.ReadCloser, error) {
	how := &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS}
	for {
		fd, err := unix.Openat2(int(t.root.Fd()), at, how)
		switch {
		case err == nil:
			return plainFile(fd), nil
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			// EAGAIN: something was renamed meanwhile.
		case errors.Is(err, unix.ENOSYS): // before Linux 5.6
			root, err := os.OpenRoot("/proc/self/fd/" + strconv.Itoa(int(t.root.Fd())))
			if err != nil {
				return nil, err
			}
			defer root.Close()
			return root.OpenFile(at, os.O_RDONLY|unix.O_NOFOLLOW, 0)
		default:
			return nil, located(at, err)
		}
	}
}

// A plainFile is an open file.
type plainFile int

func (f plainFile) Read(p []byte) (int, error) {
	for {
		n, err := unix.Read(int(f), p)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err == nil && n == 0 && len(p) > 0:
			err = io.EOF
		}
		return max(n, 0), err
	}
}

func (f plainFile) Close() error { return unix.Close(int(f)) }

// A fileID tells a file from others, whatever its names are.
type fileID struct{ dev, ino uint64 }

type dirWalk struct {
	*dirTree
	ctx   context.Context
	dev   uint64            // of the top directory
	first map[fileID]string // of the files with more names than one, the first
	yield func(mkerofs.Entry, error) bool
}

func (w *dirWalk) all() error {
	fd, err := openBelow(int(w.root.Fd()), ".")
	if err != nil {
		return located("", err)
	}
	top := os.NewFile(uintptr(fd), ".")
	defer top.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(top.Fd()), &st); err != nil {
		return located("", err)
	}
	w.dev = st.Dev
	e, err := w.entry(int(top.Fd()), ".", ".", &st)
	if err != nil {
		return err
	}
	if !w.yield(e, nil) {
		return errStop
	}
	return w.below(top, "")
}

// below visits what is in the directory dir, which is at path; that of the top is empty.
func (w *dirWalk) below(dir *os.File, at string) error {
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return located(at, err)
	}
	slices.Sort(names)
	for _, name := range names {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		if err := w.visit(int(dir.Fd()), path.Join(at, name), name); err != nil {
			return err
		}
	}
	return nil
}

func (w *dirWalk) visit(dir int, at, name string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return located(at, err)
	}
	if slices.Contains(w.except, fileID{st.Dev, st.Ino}) {
		return nil
	}
	e, err := w.entry(dir, at, name, &st)
	if err != nil {
		return err
	}
	if !w.yield(e, nil) {
		return errStop
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || w.oneFS && st.Dev != w.dev {
		return nil
	}
	fd, err := openBelow(dir, name)
	if err != nil {
		return located(at, err)
	}
	f := os.NewFile(uintptr(fd), at)
	return errors.Join(w.below(f, at), f.Close())
}

func located(at string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", printable(path.Join("./", at)), err)
}

// entry describes the file called name in the directory dir.
func (w *dirWalk) entry(dir int, at, name string, st *unix.Stat_t) (mkerofs.Entry, error) {
	e := mkerofs.Entry{
		Path: at, Mode: st.Mode, UID: st.Uid, GID: st.Gid,
		Mtime: time.Unix(st.Mtim.Unix()),
	}
	kind := st.Mode & unix.S_IFMT
	if id := (fileID{st.Dev, st.Ino}); st.Nlink > 1 && kind != unix.S_IFDIR {
		if first, ok := w.first[id]; ok {
			return mkerofs.Entry{Path: at, Link: first}, nil
		}
		w.first[id] = at
	}
	var err error
	switch kind {
	case unix.S_IFREG:
		e.Size = st.Size
		e.Open = func() (io.ReadCloser, error) { return w.open(at) }
	case unix.S_IFLNK:
		e.Target, err = w.readlink(dir, name)
	case unix.S_IFCHR, unix.S_IFBLK:
		e.Major, e.Minor = unix.Major(st.Rdev), unix.Minor(st.Rdev)
	}
	if err == nil {
		e.Xattrs, err = pathXattrs("/proc/self/fd/" + strconv.Itoa(dir) + "/" + name)
	}
	return e, located(at, err)
}

func (w *dirWalk) readlink(dir int, name string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(dir, name, buf)
	return string(buf[:max(n, 0)]), err
}

// pathXattrs gives the extended attributes of a file, that of a symbolic link its own.
func pathXattrs(file string) (map[string][]byte, error) {
	list, err := grow(func(p []byte) (int, error) { return unix.Llistxattr(file, p) })
	if errors.Is(err, unix.EOPNOTSUPP) || err == nil && len(list) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list its extended attributes: %w", err)
	}
	attrs := map[string][]byte{}
	for name := range bytes.SplitSeq(bytes.TrimSuffix(list, []byte{0}), []byte{0}) {
		value, err := grow(func(p []byte) (int, error) { return unix.Lgetxattr(file, string(name), p) })
		if errors.Is(err, unix.ENODATA) {
			continue // taken away meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("read its extended attribute %s: %w", printable(string(name)), err)
		}
		attrs[string(name)] = value
	}
	return attrs, nil
}

// grow calls a function that fills a buffer until the buffer is large enough. Most attributes fit in the first.
func grow(fill func([]byte) (int, error)) ([]byte, error) {
	for size := 256; ; size *= 4 {
		p := make([]byte, size)
		n, err := fill(p)
		if errors.Is(err, unix.ERANGE) && size <= 1<<20 {
			continue
		}
		return p[:max(n, 0)], err
	}
}
