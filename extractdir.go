package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
)

type extractOptions struct {
	keep      keep
	overwrite bool
	step      *step
}

// An extractor makes files of an image below a directory. Each is made in its
// directory by its name alone, and no directory is entered through a symbolic
// link: neither an image nor what is there already can lead it elsewhere.
type extractor struct {
	extractOptions
	ctx context.Context
	im  *erofsfmt.Image
	way []openDir // from the top directory to the one that is being filled

	made  []imageFile             // directories, whose attributes are set when they are full
	first map[erofsfmt.Nid]string // of the files with more names than one, the first

	contents *errgroup.Group // regular files being filled
	refused  int             // devices that may not be made
}

type openDir struct {
	path string
	fd   int
}

// extractAtATime is how many files are filled at a time.
const extractAtATime = 8

// extract copies the paths of im, or all of it, below dir.
func extract(ctx context.Context, im *erofsfmt.Image, dir string, paths []string, o extractOptions) (err error) {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	left, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	top, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: dir, Err: err}
	}
	x := &extractor{extractOptions: o, im: im, way: []openDir{{".", top}}, first: map[erofsfmt.Nid]string{}}
	x.contents, x.ctx = errgroup.WithContext(ctx)
	x.contents.SetLimit(max(extractAtATime, runtime.GOMAXPROCS(0)))
	err = walkPaths(x.ctx, im, paths, x.add)
	// The reason for the end of all is that of the file that failed first.
	if fillErr := x.contents.Wait(); fillErr != nil {
		err = fillErr
	}
	x.leave(1)
	x.ctx = ctx // the other one ends with Wait
	if err == nil {
		err = x.finishDirs(len(left) == 0)
	}
	if err == nil && x.refused > 0 {
		err = fmt.Errorf("%s: %d device nodes were left out: only root can make them; all else is there", dir, x.refused)
	}
	return errors.Join(err, unix.Close(top))
}

// leave closes the directories below the first n of the way.
func (x *extractor) leave(n int) {
	for _, d := range x.way[n:] {
		unix.Close(d.fd)
	}
	x.way = x.way[:n]
}

// add makes one file. It is called for a directory before what is in it.
func (x *extractor) add(name string, ino *erofsfmt.Inode) error {
	x.step.file(x.im.Super().Inodes)
	if err := x.ctx.Err(); err != nil {
		return err
	}
	if name == "." {
		x.made = append(x.made, imageFile{name, *ino})
		return nil
	}
	parent := path.Dir(name)
	n := len(x.way)
	for n > 1 && x.way[n-1].path != parent {
		n--
	}
	x.leave(n)
	return notThere(name, x.make(x.way[n-1].fd, name, ino))
}

// make makes a file in the directory dir, which is that of name.
func (x *extractor) make(dir int, name string, ino *erofsfmt.Inode) error {
	base := path.Base(name)
	if ino.IsDir() {
		fd, err := x.makeDir(dir, base)
		if err == nil {
			x.way = append(x.way, openDir{name, fd})
			x.made = append(x.made, imageFile{name, *ino})
		}
		return err
	}
	if first, ok := x.first[ino.Nid]; ok {
		return x.link(first, dir, base)
	}
	if ino.Nlink > 1 {
		x.first[ino.Nid] = name
	}
	if fileType(ino) == unix.S_IFREG {
		return x.makeRegular(dir, name, ino)
	}
	err := x.anew(dir, base, func() error { return x.makeSpecial(dir, base, ino) })
	if errors.Is(err, unix.EPERM) && isDevice(ino) {
		delete(x.first, ino.Nid)
		x.refused++
		return nil
	}
	if err != nil {
		return err
	}
	return x.setAttributes(target{dir: dir, name: base}, ino)
}

func isDevice(ino *erofsfmt.Inode) bool {
	return fileType(ino) == unix.S_IFCHR || fileType(ino) == unix.S_IFBLK
}

// anew calls a function that makes a file of this name, after taking away what is
// there if the user wants that.
func (x *extractor) anew(dir int, base string, create func() error) error {
	err := create()
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	if !x.overwrite {
		return errors.New("it is there already; --overwrite replaces it")
	}
	if err := unix.Unlinkat(dir, base, 0); err != nil {
		return fmt.Errorf("replace what is there already: %w", err)
	}
	return create()
}

func (x *extractor) makeDir(dir int, base string) (int, error) {
	create := func() error { return unix.Mkdirat(dir, base, 0o700) }
	open := func() (int, error) { return openBelow(dir, base) }
	err := create()
	if errors.Is(err, unix.EEXIST) {
		// A directory is filled up; a link to one is not a directory.
		if fd, err := open(); err == nil {
			return fd, nil
		}
		err = x.anew(dir, base, create)
	}
	if err != nil {
		return -1, err
	}
	return open()
}

// openBelow opens a directory by its name in dir, and nothing else.
func openBelow(dir int, base string) (int, error) {
	return unix.Openat(dir, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}

// link makes another name of the file that was made as first.
func (x *extractor) link(first string, dir int, base string) error {
	from, err := x.openPath(path.Dir(first))
	if err != nil {
		return fmt.Errorf("link to %s: %w", printable(first), err)
	}
	defer unix.Close(from)
	err = x.anew(dir, base, func() error { return unix.Linkat(from, path.Base(first), dir, base, 0) })
	if err != nil {
		return fmt.Errorf("link to %s: %w", printable(first), err)
	}
	return nil
}

// openPath opens a directory that was made before.
func (x *extractor) openPath(name string) (int, error) {
	fd, err := unix.Openat(x.way[0].fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil || name == "." {
		return fd, err
	}
	for part := range strings.SplitSeq(name, "/") {
		next, err := openBelow(fd, part)
		unix.Close(fd)
		if err != nil {
			return -1, err
		}
		fd = next
	}
	return fd, nil
}

func (x *extractor) makeSpecial(dir int, base string, ino *erofsfmt.Inode) error {
	if fileType(ino) == unix.S_IFLNK {
		target, err := x.im.Readlink(x.ctx, ino)
		if err != nil {
			return err
		}
		return unix.Symlinkat(target, dir, base)
	}
	device := 0
	if isDevice(ino) {
		device = int(unix.Mkdev(ino.Major(), ino.Minor()))
	}
	return unix.Mknodat(dir, base, fileType(ino)|0o600, device)
}

// makeRegular makes an empty file, so that links to it can be made, and has it
// filled beside others.
func (x *extractor) makeRegular(dir int, name string, ino *erofsfmt.Inode) error {
	fd := -1
	err := x.anew(dir, path.Base(name), func() (err error) {
		fd, err = unix.Openat(dir, path.Base(name), unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		return err
	})
	if err != nil {
		return err
	}
	f, file := os.NewFile(uintptr(fd), name), *ino
	x.contents.Go(func() error {
		return notThere(name, errors.Join(x.fill(f, &file), f.Close()))
	})
	return nil
}

func (x *extractor) fill(f *os.File, ino *erofsfmt.Inode) error {
	err := stream(x.ctx, x.im, ino, func(p []byte, off int64) error {
		x.step.add(len(p))
		return writeSparsely(f, p, off)
	})
	if err != nil {
		return err
	}
	// A hole at the end has not been written.
	if err := f.Truncate(ino.Size); err != nil {
		return err
	}
	return x.setAttributes(target{fd: int(f.Fd()), open: true}, ino)
}

// holeUnit is the shortest run of zeros that is not written, a page.
const holeUnit = 4096

// writeSparsely writes p to a new file, and leaves out what is zeros only.
func writeSparsely(f *os.File, p []byte, off int64) error {
	for len(p) > 0 {
		n := runLength(p, true)
		p, off = p[n:], off+int64(n)
		n = runLength(p, false)
		if _, err := f.WriteAt(p[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// runLength is how many bytes at the beginning of p are, or are not, units of zeros.
func runLength(p []byte, zeros bool) (n int) {
	for n < len(p) {
		unit := p[n:min(len(p), n+holeUnit)]
		if isZero(unit) != zeros {
			break
		}
		n += len(unit)
	}
	return n
}

func isZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// target is a file whose attributes are to be set: an open one, or a name.
type target struct {
	fd, dir int
	open    bool
	name    string
}

// path is a path of the file that leads nowhere else; with a name, if a last
// symbolic link is not followed.
func (t target) path() string {
	if t.open {
		return "/proc/self/fd/" + strconv.Itoa(t.fd)
	}
	return "/proc/self/fd/" + strconv.Itoa(t.dir) + "/" + t.name
}

// setAttributes gives a file what the image says of it, in the order in which one
// does not undo another: a new owner takes set-id bits and capabilities away, and
// whatever is set changes times only of the status.
func (x *extractor) setAttributes(t target, ino *erofsfmt.Inode) error {
	if err := x.setOwnerAndMode(t, ino); err != nil {
		return err
	}
	if err := x.setXattrs(t, ino); err != nil {
		return err
	}
	if !x.keep.times {
		return nil
	}
	times := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Sec: ino.Mtime, Nsec: int64(ino.MtimeNsec)}}
	flags := unix.AT_SYMLINK_NOFOLLOW
	if t.open {
		flags = 0 // the link of an open file leads to it
	}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, t.path(), times, flags); err != nil {
		return fmt.Errorf("set the time: %w", err)
	}
	return nil
}

func (x *extractor) setOwnerAndMode(t target, ino *erofsfmt.Inode) (err error) {
	mode := ino.Mode & 0o7777
	if !x.keep.owner {
		mode &^= unix.S_ISUID | unix.S_ISGID
	} else if t.open {
		err = unix.Fchown(t.fd, int(ino.UID), int(ino.GID))
	} else {
		err = unix.Lchown(t.path(), int(ino.UID), int(ino.GID))
	}
	if err != nil {
		return fmt.Errorf("set the owner %d:%d: %w; --keep without owner leaves it out", ino.UID, ino.GID, err)
	}
	switch {
	case t.open:
		err = unix.Fchmod(t.fd, mode)
	case fileType(ino) != unix.S_IFLNK:
		// It was made a moment ago and is no link; who may put one in its place
		// may do as much.
		err = unix.Fchmodat(t.dir, t.name, mode, 0)
	}
	if err != nil {
		return fmt.Errorf("set the mode %#o: %w", mode, err)
	}
	return nil
}

func (x *extractor) setXattrs(t target, ino *erofsfmt.Inode) error {
	if !x.keep.xattrs {
		return nil
	}
	all, err := readXattrs(x.ctx, x.im, ino)
	if err != nil {
		return err
	}
	for _, a := range all {
		if x.keep.userXattrs && !strings.HasPrefix(a.name, "user.") {
			continue
		}
		set := unix.Lsetxattr
		if t.open {
			set = unix.Setxattr
		}
		if err := set(t.path(), a.name, a.value, 0); err != nil {
			return fmt.Errorf("set the extended attribute %s: %w; --keep without xattrs leaves them out", printable(a.name), err)
		}
	}
	return nil
}

// finishDirs sets the attributes of the directories, now that nothing in them
// changes any more, the deepest first: after that they may be closed to us. The top
// directory gets those of the image's root if there was nothing in it.
func (x *extractor) finishDirs(top bool) error {
	for i := len(x.made) - 1; i >= 0; i-- {
		d := x.made[i]
		if d.path == "." && !top {
			continue
		}
		fd, err := x.openPath(d.path)
		if err == nil {
			err = errors.Join(x.setAttributes(target{fd: fd, open: true}, &d.ino), unix.Close(fd))
		}
		if err != nil {
			return notThere(d.path, err)
		}
	}
	return nil
}
