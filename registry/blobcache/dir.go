package blobcache

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// version is the directory inside the cache's in which everything is, so that another format finds its own place.
const version = "v1"

// openDir opens dir, which must be ours alone to write, and in it the directory of this version. The check and the
// opening are two steps, so what was opened is compared with what was checked; from then on everything is relative to
// the open directory. If they are to exist, none of the two is made.
func openDir(dir string, existing bool) (*os.File, error) {
	dir = filepath.Clean(dir) // a trailing slash would make Lstat follow a link
	if !existing {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return nil, err
	}
	if err := checkDir(info, 0o022); err != nil {
		return nil, fmt.Errorf("directory %s %w; name another one", dir, err)
	}
	outer, err := os.OpenFile(dir, unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer outer.Close()
	opened, err := outer.Stat()
	if err == nil && !os.SameFile(info, opened) {
		err = fmt.Errorf("directory %s was replaced while it was opened", dir)
	}
	if err != nil {
		return nil, err
	}
	name := filepath.Join(dir, version)
	if !existing {
		if err := unix.Mkdirat(int(outer.Fd()), version, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, &fs.PathError{Op: "mkdir", Path: name, Err: err}
		}
	}
	inner, err := openAt(outer, version, unix.O_RDONLY|unix.O_DIRECTORY, name)
	if err != nil {
		return nil, err
	}
	if info, err = inner.Stat(); err == nil {
		err = checkDir(info, 0o077)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("directory %s %w; name another one", name, err), inner.Close())
	}
	return inner, nil
}

// checkDir refuses a directory that is not ours, or has one of the bits in mode.
func checkDir(info os.FileInfo, mode os.FileMode) error {
	st, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case info.Mode()&os.ModeSymlink != 0:
		return errors.New("is a symbolic link")
	case !info.IsDir():
		return errors.New("is not a directory")
	case !ok:
		return errors.New("has no owner that can be checked")
	case int(st.Uid) != os.Geteuid():
		return fmt.Errorf("belongs to uid %d, and we are %d", st.Uid, os.Geteuid())
	case info.Mode().Perm()&mode != 0:
		return fmt.Errorf("has mode %04o, which lets others in", info.Mode().Perm())
	}
	return nil
}

// openAt opens a file of a directory, and follows no link.
func openAt(dir *os.File, name string, flags int, shown string) (*os.File, error) {
	fd, err := unix.Openat(int(dir.Fd()), name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: shown, Err: err}
	}
	return os.NewFile(uintptr(fd), shown), nil
}

// openPrivate opens a file of the cache, which must be a file, ours, and nobody else's.
func (c *Cache) openPrivate(name string, flags int) (*os.File, error) {
	f, err := openAt(c.dir, name, unix.O_RDWR|flags, filepath.Join(c.dir.Name(), name))
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !info.Mode().IsRegular():
		err = errors.New("is not a file")
	case !ok || int(st.Uid) != os.Geteuid():
		err = errors.New("belongs to somebody else")
	case info.Mode().Perm()&0o077 != 0:
		err = fmt.Errorf("has mode %04o, which lets others in", info.Mode().Perm())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s %w; remove it", f.Name(), err), f.Close())
	}
	return f, nil
}

// nameOf is what a blob is kept under: its digest and, in short, its size and what let its bytes in. A manifest that
// lies about the size, or vouches for other bytes under the digest of somebody else's blob, has a file of its own.
func nameOf(digest string, size int64, origin string) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%d\n%s", size, origin))
	return digest + "+" + hex.EncodeToString(sum[:originSize/2])
}

const originSize = 32 // hex digits

// checkName allows what nameOf makes.
func checkName(name string) error {
	digest, origin, _ := strings.Cut(name, "+")
	if err := checkDigest(digest); err != nil {
		return err
	}
	if len(origin) != originSize || strings.Trim(origin, "0123456789abcdef") != "" {
		return fmt.Errorf("name %.200q: want a + behind the digest, and %d lower-case hex digits", name, originSize)
	}
	return nil
}

// fileName is the name of a blob's file: the blob's name and its unit.
func fileName(name string, unit int64) string {
	return strings.ReplaceAll(name, ":", "-") + "." + strconv.FormatInt(unit, 10)
}

// parseFileName reads what fileName made.
func parseFileName(file string) (name string, unit int64, ok bool) {
	blob, number, _ := strings.Cut(file, ".")
	name = strings.Replace(blob, "-", ":", 1)
	unit, err := strconv.ParseInt(number, 10, 64)
	ok = err == nil && checkName(name) == nil && checkUnit(unit) == nil && fileName(name, unit) == file
	return name, unit, ok
}

// openDisk opens the file of a blob, and makes it, or makes it anew, where it is not as it should be and nobody else
// uses it. Where there is no room even for that, the blob is read without anything being kept. The caller has the
// directory's lock.
func (c *Cache) openDisk(name string, size, unit int64) (*disk, error) {
	d, err := c.openKept(name, size, unit)
	if !full(err) {
		return d, err
	}
	c.cannotKeep(err)
	fd, err := unix.MemfdCreate("erofs-oci", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), fileName(name, unit))
	d = &disk{layout: newLayout(name, size, unit), handle: f, nowhere: true}
	d.file = c.wrap(osFile{f}, d.layout)
	if err := f.Truncate(d.end); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return d, nil
}

func (c *Cache) openKept(name string, size, unit int64) (_ *disk, err error) {
	f, err := c.openPrivate(fileName(name, unit), unix.O_CREAT)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	d := &disk{layout: newLayout(name, size, unit), handle: f}
	d.file = c.wrap(osFile{f}, d.layout)
	alone := lock(f, unix.F_WRLCK, lockOpen)
	if alone != nil && !errors.Is(alone, errLocked) {
		return nil, alone
	}
	if bad := d.fits(); bad != nil {
		if alone != nil {
			return nil, fmt.Errorf("%s: %w, and another process uses it; unmount what it mounts", f.Name(), bad)
		}
		if err := d.reset(); err != nil {
			return nil, fmt.Errorf("%s: %w", f.Name(), err)
		}
	}
	if err := lock(f, unix.F_RDLCK, lockOpen); err != nil {
		return nil, err
	}
	return d, nil
}

// fits says what is wrong with the file.
func (d *disk) fits() error {
	info, err := d.handle.Stat()
	if err != nil {
		return err
	}
	b := make([]byte, headerSize)
	if _, err := d.file.ReadAt(b, 0); err != nil {
		return fmt.Errorf("read its header: %w", err)
	}
	l, err := parseHeader(b)
	switch {
	case err != nil:
		return err
	case l != d.layout:
		return fmt.Errorf("it is of %s, %d bytes in chunks of %d", l.name, l.size, l.unit)
	case info.Size() != d.end:
		return fmt.Errorf("it is %d bytes long, and should be %d", info.Size(), d.end)
	}
	return nil
}

// reset makes the file that of a blob of which nothing is here.
func (d *disk) reset() error {
	if err := errors.Join(d.handle.Truncate(0), d.handle.Truncate(d.end)); err != nil {
		return err
	}
	_, err := d.file.WriteAt(d.header(), 0)
	return err
}

// A headerError says that a file is no blob's, although it has the name of one.
type headerError struct {
	path string
	err  error
}

func (e *headerError) Error() string { return fmt.Sprintf("%s: %v", e.path, e.err) }

func (e *headerError) Unwrap() error { return e.err }

// openFound opens a file that is there already, as what it says it is. The caller has the directory's lock.
func (c *Cache) openFound(file string) (_ *disk, err error) {
	name, unit, ok := parseFileName(file)
	if !ok {
		return nil, fmt.Errorf("%s is not the name of a cached blob", filepath.Join(c.dir.Name(), file))
	}
	f, err := c.openPrivate(file, 0)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	d := &disk{layout: layout{name: name, unit: unit}, file: osFile{f}, handle: f}
	if err := lock(f, unix.F_RDLCK, lockOpen); err != nil {
		return nil, err
	}
	b := make([]byte, headerSize)
	if _, err := f.ReadAt(b, 0); errors.Is(err, io.EOF) {
		return nil, &headerError{f.Name(), errors.New("it is too short")}
	} else if err != nil {
		return nil, fmt.Errorf("%s: read its header: %w", f.Name(), err)
	}
	l, err := parseHeader(b)
	if err == nil && (l.name != name || l.unit != unit) {
		err = errors.New("it is of another blob")
	}
	if err != nil {
		return nil, &headerError{f.Name(), err}
	}
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() != l.end {
		return nil, &headerError{f.Name(), fmt.Errorf("it is %d bytes long, and should be %d", info.Size(), l.end)}
	}
	d.layout = l
	d.file = c.wrap(d.file, l)
	return d, nil
}

// names lists the files of blobs. The caller has the directory's lock.
func (c *Cache) names() ([]string, error) {
	dir, err := openAt(c.dir, ".", unix.O_RDONLY|unix.O_DIRECTORY, c.dir.Name())
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	all, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	names := all[:0]
	for _, name := range all {
		if _, _, ok := parseFileName(name); ok {
			names = append(names, name)
		}
	}
	return names, nil
}

// unlink removes the file of a blob if nobody has it open but f. The caller has the directory's lock.
func (c *Cache) unlink(f *os.File, name string) error {
	if err := lock(f, unix.F_WRLCK, lockOpen); err != nil {
		return err
	}
	if err := unix.Unlinkat(int(c.dir.Fd()), name, 0); err != nil {
		return &fs.PathError{Op: "remove", Path: f.Name(), Err: err}
	}
	return nil
}
