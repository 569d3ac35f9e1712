package backend

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// staging is where the parts of an overlay are mounted while it is made: hidden
// directories in one that nobody else can enter.
type staging struct {
	dir    string
	lower  []string // for Inner, called by their number in dir
	memory string   // a tmpfs, or "" where there is none
	lock   *os.File // held for as long as this process uses dir
}

// Names in staging.dir, and of it.
const (
	memoryName    = "memory"
	lockName      = "lock"
	stagingPrefix = "erofs-oci-overlay-"
)

// stage always returns what is to be closed.
func (o Overlay) stage(name string, layers int) (*staging, error) {
	s := &staging{}
	dir, err := os.MkdirTemp(o.Hidden, stagingPrefix)
	if err != nil {
		return s, err
	}
	s.dir = dir
	if err := s.hold(); err != nil {
		return s, err
	}
	// As /proc/self/mountinfo will show it.
	real, err := RealDir(dir)
	if err != nil {
		return s, err
	}
	s.dir = real
	for i := range layers {
		lower := filepath.Join(real, strconv.Itoa(i))
		if err := os.Mkdir(lower, 0o700); err != nil {
			return s, err
		}
		s.lower = append(s.lower, lower)
	}
	if !o.Tmpfs && (o.Upper != "" || layers > 1) {
		return s, nil
	}
	memory := filepath.Join(real, memoryName)
	if err := os.Mkdir(memory, 0o700); err != nil {
		return s, err
	}
	if err := unix.Mount(name, memory, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0700"); err != nil {
		return s, errors.Join(fmt.Errorf("mount a tmpfs for the overlay: %w%s", err, overlayAdvice(err, true)), os.Remove(memory))
	}
	s.memory = memory
	return s, nil
}

// close takes the hidden directories away; never what may be mounted on one.
func (s *staging) close() error {
	var errs []error
	if s.memory != "" {
		if err := unix.Unmount(s.memory, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", s.memory, err))
		}
	}
	for _, dir := range append(slices.Clone(s.lower), s.memory) {
		if dir == "" {
			continue
		}
		if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if s.lock != nil {
		errs = append(errs, os.Remove(filepath.Join(s.dir, lockName)), s.lock.Close())
	}
	if s.dir != "" {
		errs = append(errs, os.Remove(s.dir))
	}
	return errors.Join(errs...)
}

// hold makes the lock. It has its name only when it is locked: nobody may take the
// directory for one that was left.
func (s *staging) hold() error {
	f, err := os.OpenFile(filepath.Join(s.dir, lockName+".new"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = tryLock(f)
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(s.dir, lockName))
	}
	if err != nil {
		return errors.Join(err, f.Close(), os.Remove(f.Name()))
	}
	s.lock = f
	return nil
}

// sweepStaged takes away what processes left in parent that were killed while they
// mounted: nobody else knows of it.
func sweepStaged(parent string) error {
	if parent == "" {
		parent = os.TempDir()
	}
	names, err := os.ReadDir(parent)
	if err != nil {
		return err
	}
	var errs []error
	for _, n := range names {
		if strings.HasPrefix(n.Name(), stagingPrefix) {
			errs = append(errs, sweepOne(filepath.Join(parent, n.Name())))
		}
	}
	return errors.Join(errs...)
}

// sweepOne leaves alone what is not ours, and what somebody uses.
func sweepOne(dir string) error {
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil || st.Mode != unix.S_IFDIR|0o700 || int(st.Uid) != os.Geteuid() {
		return nil
	}
	lock, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := tryLock(lock); heldByOther(err) {
		return nil
	} else if err != nil {
		return err
	}
	real, err := RealDir(dir)
	if err != nil {
		return err
	}
	left, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return !strings.HasPrefix(m.Mountpoint, real+"/"), false
	})
	if err != nil {
		return err
	}
	for _, m := range slices.Backward(left) {
		if err := unix.Unmount(m.Mountpoint, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); err != nil {
			return wrapUmount(m.Mountpoint, err)
		}
	}
	err = removeStaged(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // its process was just taking it away itself
	}
	return err
}

// removeStaged removes empty directories, and the lock last but for dir itself.
func removeStaged(dir string) error {
	names, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, n := range names {
		if n.Name() == lockName {
			continue
		}
		if err := os.Remove(filepath.Join(dir, n.Name())); err != nil {
			return err
		}
	}
	return errors.Join(os.Remove(filepath.Join(dir, lockName)), os.Remove(dir))
}
