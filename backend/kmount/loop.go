package kmount

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// MountFile mounts the image in a regular file: directly where the kernel can,
// else through a loop device that ends with the mount. It tells which: device is
// the loop device, or "" for a direct mount.
func MountFile(file, target string, o Options) (device string, err error) {
	err = Mount(file, target, o)
	if !errors.Is(err, unix.ENOTBLK) {
		return "", err
	}
	return MountByLoop(file, target, o)
}

// MountByLoop mounts the image in a regular file through a loop device, which ends
// with the mount.
func MountByLoop(file, target string, o Options) (device string, err error) {
	over := Options{Flags: o.Flags}
	for i, name := range append([]string{file}, o.Devices...) {
		var size int64
		if i < len(o.Sizes) {
			size = o.Sizes[i]
		}
		l, err := AttachLoop(name, size)
		if err != nil {
			return "", err
		}
		// Held open until the mount holds it.
		defer l.Close()
		if i == 0 {
			device = l.Path()
		} else {
			over.Devices = append(over.Devices, l.Path())
		}
	}
	return device, Mount(device, target, over)
}

// A Loop is a read-only loop device that ends when nobody has it open any more.
type Loop struct{ f *os.File }

// loopAttempts bounds how often a free device may be snatched away before it is
// ours.
const loopAttempts = 64

// sector is what a loop device counts in.
const sector = 512

// AttachLoop makes a loop device of the first size bytes of a file, in whole
// sectors; of all of it if size is 0.
func AttachLoop(file string, size int64) (*Loop, error) {
	backing, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer backing.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("loop devices are not to be had here (%w): load the loop module", err)
	}
	defer control.Close()
	for range loopAttempts {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find a free loop device: %w", err)
		}
		l, err := attach(fmt.Sprintf("/dev/loop%d", n), backing, size)
		if !errors.Is(err, unix.EBUSY) {
			return l, err
		}
	}
	return nil, fmt.Errorf("no loop device stays free for long enough: %w", unix.EBUSY)
}

func attach(device string, backing *os.File, size int64) (*Loop, error) {
	f, err := os.OpenFile(device, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	info := unix.LoopInfo64{
		Sizelimit: uint64(size+sector-1) / sector * sector,
		// Direct, a read that the file answers with an error in the middle is an
		// error, and not zeros from there on (drivers/block/loop.c, before Linux
		// 6.15 lo_read_simple); and reads do not wait for each other.
		Flags: unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_DIRECT_IO,
	}
	// For losetup(8) to show; the last byte stays zero.
	copy(info.File_name[:len(info.File_name)-1], backing.Name())
	if err := configure(int(f.Fd()), int(backing.Fd()), info); err != nil {
		return nil, errors.Join(fmt.Errorf("attach %s to %s: %w", device, backing.Name(), err), f.Close())
	}
	return &Loop{f}, nil
}

// configure is LOOP_CONFIGURE, or before Linux 5.8 the two calls that came
// before it, which leave LO_FLAGS_DIRECT_IO out.
func configure(loop, backing int, info unix.LoopInfo64) error {
	err := unix.IoctlLoopConfigure(loop, &unix.LoopConfig{Fd: uint32(backing), Info: info})
	if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOTTY) {
		return err
	}
	if err := unix.IoctlSetInt(loop, unix.LOOP_SET_FD, backing); err != nil {
		return err
	}
	if err := unix.IoctlLoopSetStatus64(loop, &info); err != nil {
		return errors.Join(err, unix.IoctlSetInt(loop, unix.LOOP_CLR_FD, 0))
	}
	return nil
}

// Path is the device's path.
func (l *Loop) Path() string { return l.f.Name() }

// Close lets go of the device, which ends unless it is mounted.
func (l *Loop) Close() error { return l.f.Close() }
