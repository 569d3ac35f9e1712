package backend

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// FuseType is the type under which /proc/mounts shows our FUSE mounts.
const FuseType = "fuse.erofs-oci"

// A Device is the st_dev of a mounted file system, as "major:minor". It tells a
// mount of ours from whatever else is, or comes to be, on the same directory.
type Device string

func deviceOf(m *mountinfo.Info) Device { return Device(fmt.Sprintf("%d:%d", m.Major, m.Minor)) }

// RealDir is dir as /proc/self/mountinfo writes it: absolute and without links.
// It asks nothing of the file system that dir may be the root of, since the
// server of that may be dead.
func RealDir(dir string) (string, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(fd)
	return os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
}

// CheckTarget says why dir cannot be mounted on, and returns it as RealDir does.
func CheckTarget(dir string) (string, error) {
	st, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("mount target %s does not exist; mkdir it", dir)
	case errors.Is(err, unix.ENOTCONN):
		return "", fmt.Errorf("mount target %s is a FUSE mount whose server is gone; unmount it first", dir)
	case err != nil:
		return "", fmt.Errorf("mount target: %w", err)
	case !st.IsDir():
		return "", fmt.Errorf("mount target %s is not a directory", dir)
	}
	real, err := RealDir(dir)
	if err == nil && real == "/" {
		err = fmt.Errorf("mount target %s is the root directory, which no mount can cover", dir)
	}
	return real, err
}

// stack is what is mounted on one directory, the topmost last.
type stack []*mountinfo.Info

func mountsOn(dir string) (stack, error) {
	// In the order of mounting, as the kernel lists them.
	return mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) { return m.Mountpoint != dir, false })
}

func (s stack) has(d Device) bool {
	return slices.ContainsFunc(s, func(m *mountinfo.Info) bool { return deviceOf(m) == d })
}

// top is the device of the topmost mount, "" where there is none.
func (s stack) top() Device {
	if len(s) == 0 {
		return ""
	}
	return deviceOf(s[len(s)-1])
}

// fuse tells whether the topmost mount is a FUSE mount of ours, whoever recorded
// it: its type says so. Other mounts of ours are known by their record only.
func (s stack) fuse() bool { return len(s) > 0 && s[len(s)-1].FSType == FuseType }

// MountedDevice is the device of the mount that was just made on dir.
func MountedDevice(dir, fsType string) (Device, error) {
	on, err := mountsOn(dir)
	if err != nil {
		return "", err
	}
	if len(on) == 0 || on[len(on)-1].FSType != fsType {
		return "", fmt.Errorf("%s: the new mount is not there", dir)
	}
	return on.top(), nil
}

// MountsOf returns the directories on which the file system of device d is to be
// seen.
func MountsOf(d Device) ([]string, error) {
	on, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) { return deviceOf(m) != d, false })
	var dirs []string
	for _, m := range on {
		dirs = append(dirs, m.Mountpoint)
	}
	return dirs, err
}

// Gone says what is the matter where the mount of device d is still on dir when its
// server has nobody to serve any more. It is left there, for its users to get
// errors and not what may be below it.
func Gone(dir string, d Device) error {
	on, err := mountsOn(dir)
	if err != nil || !on.has(d) {
		return err
	}
	return fmt.Errorf("%s is still mounted, but the kernel has ended the connection to its server, as after an abort or a disconnect: erofs-oci umount clears it", dir)
}

// serverless tells whether nobody serves the FUSE mount on dir any more.
func serverless(dir string) bool {
	var st unix.Statfs_t
	return errors.Is(unix.Statfs(dir, &st), unix.ENOTCONN)
}
