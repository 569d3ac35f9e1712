package debian

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Mount mounts an image with erofsfuse for the rest of the test.
func (u *Utils) Mount(t testing.TB, image string) string {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	// The test's own context ends before its cleanups.
	cmd := u.Command(context.Background(), "erofsfuse", "-f", image, dir)
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	if err := waitForMount(dir, ended); err != nil {
		t.Fatalf("erofsfuse: %v: %s", errors.Join(err, stop(cmd, ended)), said.String())
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount erofsfuse: %v", errors.Join(err, stop(cmd, ended)))
			return
		}
		if err := <-ended; err != nil {
			t.Errorf("erofsfuse: %v: %s", err, said.String())
		}
	})
	return dir
}

// stop ends a server that is not to be had otherwise.
func stop(cmd *exec.Cmd, ended <-chan error) error {
	if err := cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return <-ended
}

// mountPatience is how long a server may take to mount.
const mountPatience = 20 * time.Second

// waitForMount returns when something is mounted on dir: the kernel says when its
// list of mounts has changed.
func waitForMount(dir string, ended chan error) error {
	// Not os.Open: its poller would take the change for itself.
	fd, err := unix.Open("/proc/self/mounts", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for deadline := time.Now().Add(mountPatience); time.Now().Before(deadline); {
		list, err := os.ReadFile("/proc/self/mounts")
		if err != nil {
			return err
		}
		if strings.Contains(string(list), " "+dir+" ") {
			return nil
		}
		select {
		case err := <-ended:
			ended <- err
			return errors.New("it ended without a mount")
		default:
		}
		changed := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLPRI}}
		if _, err := unix.Poll(changed, 100); err != nil && err != unix.EINTR {
			return fmt.Errorf("poll: %w", err)
		}
	}
	return fmt.Errorf("nothing was mounted on %s in %v", dir, mountPatience)
}
