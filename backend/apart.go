package backend

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

// Apart runs f on a thread that has everything open but the process's connections
// of FUSE. What a server does with a file system that it serves itself, by mount(2)
// of another one over it or by a mere stat(2), it has to do so.
//
// A thread that waits for an answer of FUSE cannot be killed, and the kernel ends a
// connection when nobody has it open: a process that waits for itself and gets
// SIGKILL would stay for ever.
//
// f must not hand a file that it opens to another goroutine, nor start a process:
// the numbers of its files are its thread's own, and /proc/thread-self/fd leads to
// them, not /proc/self/fd.
func Apart(f func() error) error {
	ended := make(chan error)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The first thread does not end with its goroutine: it is held
			// here, so that another one is taken.
			defer runtime.UnlockOSThread()
			ended <- Apart(f)
			return
		}
		// Still locked when the goroutine ends, so that the thread ends, too.
		err := leaveConnections()
		if err == nil {
			err = f()
		}
		ended <- err
	}()
	return <-ended
}

// The number of /dev/fuse (linux/major.h MISC_MAJOR, linux/miscdevice.h FUSE_MINOR).
const (
	fuseMajor = 10
	fuseMinor = 229
)

// leaveConnections gives this thread a table of open files of its own, without
// those of /dev/fuse.
func leaveConnections() error {
	if err := unix.Unshare(unix.CLONE_FILES); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	names, err := os.ReadDir("/proc/thread-self/fd")
	if err != nil {
		return err
	}
	for _, name := range names {
		fd, err := strconv.Atoi(name.Name())
		if err != nil {
			return err
		}
		var st unix.Statx_t
		// What may be a file of ours is not asked of its server.
		err = unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &st)
		if errors.Is(err, unix.EBADF) {
			continue // the directory that was just read
		}
		if err != nil {
			return fmt.Errorf("statx of descriptor %d: %w", fd, err)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev_major != fuseMajor || st.Rdev_minor != fuseMinor {
			continue
		}
		if err := unix.Close(fd); err != nil {
			return err
		}
	}
	return nil
}
