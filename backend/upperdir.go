package backend

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// upperDir is a directory that keeps what is written to an overlay:
//
//	upper/             what was written, as overlayfs keeps it
//	work/              overlayfs's own
//	.erofs-oci-image   the digest of the image that was written to; locked for as
//	                   long as a server has the overlay mounted: two mounts of one
//	                   upper directory would spoil it
//
// What else is in it is left alone.
type upperDir struct {
	dir   string
	image string
	lock  *os.File
	// known says that upper/ is this image's already, and noted that the file
	// says so.
	known, noted bool
}

func (u *upperDir) changes() string { return filepath.Join(u.dir, "upper") }
func (u *upperDir) work() string    { return filepath.Join(u.dir, "work") }

const imageFile = ".erofs-oci-image"

// maxImage bounds what is read of that file.
const maxImage = 4096

// lockUpper opens dir for the changes of an image, and makes it unless it is
// there. Nobody else can until close.
func lockUpper(dir, image string) (_ *upperDir, err error) {
	// What others may reach through the mount only, they may not reach around it.
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("overlay: %w", err)
	}
	// A server in the background has another working directory.
	if dir, err = RealDir(dir); err != nil {
		return nil, fmt.Errorf("overlay: %w", err)
	}
	u := &upperDir{dir: dir, image: image}
	if u.lock, err = os.OpenFile(filepath.Join(dir, imageFile), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600); err != nil {
		return nil, fmt.Errorf("overlay: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, u.close())
		}
	}()
	err = lockSoon(u.lock)
	if heldByOther(err) {
		return nil, fmt.Errorf("overlay: another mount keeps in %s what is written to it; choose another directory", dir)
	}
	if err != nil {
		return nil, err
	}
	return u, u.check()
}

// upperPatience is for a mount that is just ending, and for a program that another thread is just starting: until that
// has begun, it holds every lock that this process had a moment ago.
const upperPatience = 500 * time.Millisecond

// lockSoon locks a file that is free or soon will be. No wait for a lock can be given up, so this asks again and again.
func lockSoon(f *os.File) error {
	for begun, pause := time.Now(), time.Millisecond; ; pause *= 2 {
		if err := tryLock(f); !heldByOther(err) || time.Since(begun) > upperPatience {
			return err
		}
		time.Sleep(pause)
	}
}

// close lets go of the directory.
func (u *upperDir) close() error {
	if u == nil {
		return nil
	}
	return u.lock.Close()
}

// check refuses changes of another image. Where nothing was changed yet, it does
// not matter what was there before.
func (u *upperDir) check() error {
	b, err := io.ReadAll(io.LimitReader(u.lock, maxImage))
	if err != nil {
		return err
	}
	was := strings.TrimSpace(string(b))
	names, err := os.ReadDir(u.changes())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("overlay: %w", err)
	}
	u.noted = u.image == "" || was == u.image
	u.known = err == nil && u.noted && was != "" || len(names) > 0
	if u.noted || was == "" || len(names) == 0 {
		return nil
	}
	return fmt.Errorf("overlay: %s holds changes of another image, %.100q, and this one is %s: choose another directory", u.dir, was, u.image)
}

// prepare makes what overlayfs needs, the new root directory in the likeness of
// lower's, and notes which image it is for. It returns why attributes of lower are
// hidden, if any are.
func (u *upperDir) prepare(lower string) (hidden []error, err error) {
	if !u.known {
		if hidden, err = u.begin(lower); err != nil {
			return nil, fmt.Errorf("overlay: %w", err)
		}
	}
	if err := os.Mkdir(u.work(), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("overlay: %w", err)
	}
	if u.noted || u.lock == nil {
		return hidden, nil
	}
	if err := u.lock.Truncate(0); err != nil {
		return nil, err
	}
	_, err = u.lock.WriteAt([]byte(u.image+"\n"), 0)
	return hidden, err
}

// begin makes upper/ anew, which is empty or missing.
func (u *upperDir) begin(lower string) (hidden []error, err error) {
	// The index of hard links would refuse another upper/ (ESTALE).
	for _, dir := range []string{u.changes(), filepath.Join(u.work(), "index")} {
		if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
			return nil, &fs.PathError{Op: "rmdir", Path: dir, Err: err}
		}
	}
	if err := os.Mkdir(u.changes(), 0o700); err != nil {
		return nil, err
	}
	if hidden, err = copyAttributes(lower, u.changes()); err != nil {
		return nil, fmt.Errorf("make %s like the image's root directory: %w", u.changes(), err)
	}
	return hidden, nil
}

// copyAttributes gives directory to what from has: overlayfs shows the upper of
// two directories. It returns why some is missing. Times come last, since the rest
// changes them.
func copyAttributes(from, to string) (missing []error, err error) {
	var st unix.Stat_t
	if err := unix.Stat(from, &st); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: from, Err: err}
	}
	if err := os.Lchown(to, int(st.Uid), int(st.Gid)); err != nil {
		return nil, err
	}
	if missing, err = copyXattrs(from, to); err != nil {
		return nil, err
	}
	if err := unix.Chmod(to, st.Mode&0o7777); err != nil {
		return nil, &fs.PathError{Op: "chmod", Path: to, Err: err}
	}
	times := []unix.Timespec{st.Atim, st.Mtim}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, to, times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return nil, &fs.PathError{Op: "utimensat", Path: to, Err: err}
	}
	return missing, nil
}

// maxXattrs is XATTR_LIST_MAX and XATTR_SIZE_MAX of linux/limits.h.
const maxXattrs = 64 << 10

// copyXattrs copies what the file system and the user's rights permit, and returns
// why it left the rest out.
func copyXattrs(from, to string) (missing []error, err error) {
	names, value := make([]byte, maxXattrs), make([]byte, maxXattrs)
	n, err := unix.Llistxattr(from, names)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil
	}
	if err != nil {
		return nil, &fs.PathError{Op: "listxattr", Path: from, Err: err}
	}
	for b := range bytes.SplitSeq(names[:n], []byte{0}) {
		name := string(b)
		if name == "" || strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.") {
			continue // overlayfs's own say how it has to treat a layer
		}
		size, err := unix.Lgetxattr(from, name, value)
		if err == nil {
			err = unix.Lsetxattr(to, name, value[:size], 0)
		}
		switch {
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
			missing = append(missing, fmt.Errorf("%s: %w", name, err))
		case err != nil:
			return nil, fmt.Errorf("%s of %s: %w", name, from, err)
		}
	}
	return missing, nil
}
