package backend

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// FuseType is the type under which /proc/mounts shows our FUSE mounts.
const FuseType = "fuse.erofs-oci"

// RealDir is dir as /proc/self/mountinfo writes it: absolute and without
// links. The directory itself may be a mount whose server is dead, so only its
// parent is looked into where it cannot be.
func RealDir(dir string) (string, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	real, err := filepath.EvalSymlinks(abs)
	if err == nil {
		return real, nil
	}
	if !deadErr(err) {
		return "", err
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(abs))
	if err != nil {
		return "", err
	}
	return filepath.Join(parent, filepath.Base(abs)), nil
}

// deadErr tells the errors of a FUSE mount without a server, and of one that
// belongs to another user.
func deadErr(err error) bool {
	return errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED) || errors.Is(err, unix.EACCES)
}

// CheckTarget says why dir cannot be mounted on, and returns it as RealDir does.
func CheckTarget(dir string) (string, error) {
	st, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("mount target %s does not exist; mkdir it", dir)
	case errors.Is(err, unix.ENOTCONN):
		return "", deadMount(dir)
	case err != nil:
		return "", fmt.Errorf("mount target: %w", err)
	case !st.IsDir():
		return "", fmt.Errorf("mount target %s is not a directory", dir)
	}
	return RealDir(dir)
}

// deadMount is the error of mounting on a mount of ours that nobody serves.
func deadMount(dir string) error {
	return fmt.Errorf("mount target %s is a mount whose server is gone; erofs-oci umount it first", dir)
}

// mountAt returns the topmost mount on dir, or nil.
func mountAt(dir string) (*mountinfo.Info, error) {
	all, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(dir))
	if err != nil || len(all) == 0 {
		return nil, err
	}
	return all[len(all)-1], nil
}

// isMounted tells whether one of our mounts is on dir. The record's word is not
// enough: another file system may have been mounted there since.
func isMounted(dir string) (bool, error) {
	m, err := mountAt(dir)
	if err != nil || m == nil {
		return false, err
	}
	return m.FSType == FuseType, nil
}

// Detach takes the mount on dir away: with lazy at once, the file system itself
// ending with its last user. Where the right to unmount is missing, fusermount3
// does it for the owner of a FUSE mount.
func Detach(dir string, lazy bool) error {
	flags := unix.UMOUNT_NOFOLLOW
	if lazy {
		flags |= unix.MNT_DETACH
	}
	err := unix.Unmount(dir, flags)
	if !errors.Is(err, unix.EPERM) {
		return wrapUmount(dir, err)
	}
	helper, lookErr := Fusermount()
	if lookErr != nil {
		return wrapUmount(dir, err)
	}
	args := []string{"-u"}
	if lazy {
		args = append(args, "-z")
	}
	cmd := exec.Command(helper, append(args, "--", dir)...)
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Run(); err != nil {
		if bytes.Contains(said.Bytes(), []byte("busy")) {
			return wrapUmount(dir, unix.EBUSY)
		}
		return fmt.Errorf("unmount %s: %w: %s", dir, err, bytes.TrimSpace(said.Bytes()))
	}
	return nil
}

func wrapUmount(dir string, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("unmount %s: %w: a process has a file or its working directory there (fuser -vm %s shows it); end it, or umount --lazy", dir, err, dir)
	}
	return fmt.Errorf("unmount %s: %w", dir, err)
}

// Fusermount finds the helper that mounts FUSE file systems for plain users.
func Fusermount() (string, error) {
	for _, name := range []string{"fusermount3", "fusermount"} {
		if p, err := exec.LookPath(name); err == nil {
			return p, nil
		}
		if p, err := exec.LookPath("/bin/" + name); err == nil {
			return p, nil
		}
	}
	return "", errors.New("fusermount3 is not installed")
}

// Unmount ends the mount on dir and waits until its server has ended, too, for
// at most patience. Dead mounts are cleared.
func (r *RunDir) Unmount(ctx context.Context, dir string, lazy bool, patience time.Duration) error {
	real, err := RealDir(dir)
	if err != nil {
		return err
	}
	id := id(real)
	rec, recorded, err := r.read(id)
	if err != nil {
		return err
	}
	mounted, err := isMounted(real)
	if err != nil {
		return err
	}
	if !mounted && !recorded {
		return fmt.Errorf("%s is not mounted by erofs-oci; erofs-oci list shows what is", dir)
	}
	alive, err := r.alive(id)
	if err != nil {
		return err
	}
	if mounted {
		// Nobody can close a file of a dead server: there is no use in waiting.
		if err := Detach(real, lazy || !alive); err != nil {
			return err
		}
	}
	if !alive {
		return r.sweep(id)
	}
	wait, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := r.waitEnd(wait, id); err != nil {
		if lazy {
			return nil
		}
		return fmt.Errorf("%s is unmounted, but its server (pid %d) still runs: another mount namespace or bind mount may hold the file system: %w",
			dir, rec.PID, err)
	}
	return r.sweep(id)
}
