package nbdserve

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// sysBlock is where the kernel describes its block devices.
const sysBlock = "/sys/block"

// A State is what the kernel says of an nbd device.
type State struct {
	Index     int
	Connected bool
	// PID is the process (or thread) that connected the device. It may be gone:
	// a device outlives it.
	PID int
	// Identifier is what Reattach compares; empty before Linux 5.14, and of the
	// devices of those who set none.
	Identifier string
	Size       int64
	Number     string // of the block device, as "major:minor"
}

// Path is the path of the device.
func (s State) Path() string { return devicePath(s.Index) }

// DeviceState says how the device with this number is. Anybody may ask, and the
// device is not opened, which could wait for its server.
func DeviceState(index int) (State, error) { return readState(sysBlock, index) }

// Devices returns the connected devices that this program made, whoever serves
// them now.
func Devices() ([]State, error) { return readDevices(sysBlock) }

// Strays returns those of Devices that a crash left between connecting one and
// recording it: their identifier is none of known, and who connected them is gone.
//
// The kernel tells that by its number in the first pid namespace. Elsewhere nobody
// can say, and there are none.
func Strays(known []string) ([]State, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/pid", &st); err != nil || st.Ino != initialPIDNS {
		return nil, err
	}
	return readStrays(sysBlock, known, exists)
}

// initialPIDNS is the inode number of the first pid namespace (linux/nsfs.h
// PID_NS_INIT_INO).
const initialPIDNS = 0xEFFFFFFC

// exists tells whether there is a process, or a thread, of this number.
func exists(pid int) bool { return !errors.Is(unix.Kill(pid, 0), unix.ESRCH) }

func readStrays(root string, known []string, exists func(pid int) bool) ([]State, error) {
	all, err := readDevices(root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // no sysfs
	}
	return slices.DeleteFunc(all, func(s State) bool {
		return slices.Contains(known, s.Identifier) || exists(s.PID)
	}), err
}

// readDevices is Devices.
func readDevices(root string) ([]State, error) {
	all, err := readStates(root)
	return slices.DeleteFunc(all, func(s State) bool {
		return !s.Connected || !strings.HasPrefix(s.Identifier, identifierPrefix)
	}), err
}

// readStates returns every nbd device of the kernel by number.
func readStates(root string) ([]State, error) {
	entries, err := os.ReadDir(root)
	if err != nil {
		return nil, err
	}
	var all []State
	for _, e := range entries {
		number, ok := strings.CutPrefix(e.Name(), "nbd")
		index, err := strconv.Atoi(number)
		if !ok || err != nil {
			continue
		}
		s, err := readState(root, index)
		if errors.Is(err, fs.ErrNotExist) {
			continue // gone since
		}
		if err != nil {
			return all, err
		}
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b State) int { return a.Index - b.Index })
	return all, nil
}

func readState(root string, index int) (State, error) {
	s := State{Index: index}
	dir := filepath.Join(root, fmt.Sprintf("nbd%d", index))
	sectors, err := os.ReadFile(filepath.Join(dir, "size"))
	if err != nil {
		return s, fmt.Errorf("nbd device %d: %w", index, err)
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(sectors)), 10, 64)
	if err != nil {
		return s, fmt.Errorf("nbd device %d: its size: %w", index, err)
	}
	s.Size = n * 512
	if s.Number, err = attribute(dir, "dev"); err != nil {
		return s, err
	}
	// drivers/block/nbd.c nbd_start_device makes the file "pid", and with
	// an identifier "backend"; both go when the device is disconnected.
	pid, err := attribute(dir, "pid")
	if err != nil || pid == "" {
		return s, err
	}
	s.Connected = true
	if s.PID, err = strconv.Atoi(pid); err != nil {
		return s, fmt.Errorf("nbd device %d: its process: %w", index, err)
	}
	s.Identifier, err = attribute(dir, "backend")
	return s, err
}

// attribute reads a file that may not be there, or go away while it is read.
func attribute(dir, name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return "", nil
	}
	return strings.TrimSpace(string(b)), err
}

// awaitPatience bounds the wait for a device that the kernel has already agreed
// to, and awaitPause is when it is looked at again where nobody may listen to the
// kernel's events.
const (
	awaitPatience = 10 * time.Second
	awaitPause    = 5 * time.Millisecond
)

// awaitDevice returns the number of the device when it has its size and its node.
// Kernels that have them when CONNECT returns are not waited for; others say so by
// an event.
func awaitDevice(ctx context.Context, index int, size int64) (number string, err error) {
	ctx, cancel := context.WithTimeout(ctx, awaitPatience)
	defer cancel()
	events, err := listenUevents()
	if err != nil {
		return "", err
	}
	defer events.Close()
	for {
		s, err := readState(sysBlock, index)
		if err != nil {
			return "", err
		}
		if s.Connected && s.Size == size {
			break
		}
		if err := events.wait(ctx, fmt.Sprintf("nbd%d", index)); err != nil {
			return "", fmt.Errorf("%s has %d bytes instead of %d: %w", s.Path(), s.Size, size, err)
		}
	}
	number, err = deviceNumber(index)
	if err != nil {
		return "", err
	}
	return number, checkNode(devicePath(index), number)
}

// deviceNumber is the number of the block device, as "major:minor".
func deviceNumber(index int) (string, error) {
	b, err := os.ReadFile(filepath.Join(sysBlock, fmt.Sprintf("nbd%d", index), "dev"))
	return strings.TrimSpace(string(b)), err
}

// uevents is the stream of what the kernel announces of its devices; without a
// file, a stream of pauses.
type uevents struct{ f *os.File }

func listenUevents() (*uevents, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return &uevents{}, nil
	}
	// Group 1 is the kernel's; udev speaks to group 2.
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("listen to the kernel's events: %w", err)
	}
	return &uevents{os.NewFile(uintptr(fd), "uevent")}, nil
}

// wait returns after the next event of a device, and when some may have been lost.
func (u *uevents) wait(ctx context.Context, device string) error {
	if u.f == nil {
		return pause(ctx, awaitPause)
	}
	stop := context.AfterFunc(ctx, func() { u.f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	b := make([]byte, 64<<10)
	for {
		n, err := u.f.Read(b)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, unix.ENOBUFS):
			return nil
		case err != nil:
			return fmt.Errorf("listen to the kernel's events: %w", err)
		case about(b[:n], device):
			return nil
		}
	}
}

// about tells whether an event, ACTION@PATH and KEY=VALUE each ended by a zero
// byte, is of the device.
func about(event []byte, device string) bool {
	for field := range bytes.SplitSeq(event, []byte{0}) {
		if string(field) == "DEVNAME="+device {
			return true
		}
	}
	return false
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Close ends the listening.
func (u *uevents) Close() error {
	if u.f == nil {
		return nil
	}
	return u.f.Close()
}
