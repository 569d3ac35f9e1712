package e2e

import (
	"errors"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long a test waits for another process.
const patience = 20 * time.Second

// awaitMounts waits until cond holds, asking again whenever the mounts change.
func awaitMounts(t *testing.T, what string, cond func() bool) {
	t.Helper()
	// Not os.Open, which has the runtime poll the file too: each change of the mounts
	// is told once to each open file, so it is gone when the runtime was first.
	fd, err := unix.Open("/proc/self/mounts", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLPRI}}
	for deadline := time.Now().Add(patience); !cond(); {
		left := time.Until(deadline)
		if left <= 0 {
			t.Fatalf("%s: not within %v", what, patience)
		}
		if _, err := unix.Poll(fds, int(left.Milliseconds())+1); err != nil && !errors.Is(err, unix.EINTR) {
			t.Fatal(err)
		}
	}
}

// awaitDir waits until cond holds, asking again whenever something changes in dir.
func awaitDir(dir, what string, cond func() bool) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_CREATE|unix.IN_DELETE|unix.IN_MOVED_TO|unix.IN_MOVED_FROM|unix.IN_CLOSE_WRITE); err != nil {
		return err
	}
	events := make([]byte, 4096)
	for deadline := time.Now().Add(patience); !cond(); {
		left := time.Until(deadline)
		if left <= 0 {
			return errors.New(what + ": not within " + patience.String())
		}
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if _, err := unix.Read(fd, events); err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	return nil
}

// isEmpty tells whether a directory is there and has nothing in it.
func isEmpty(dir string) bool {
	left, err := os.ReadDir(dir)
	return err == nil && len(left) == 0
}
