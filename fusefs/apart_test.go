package fusefs_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/tests/require"
)

// stuckOverlay is an overlay over a file system of this process that hangs, and
// says so, when the overlay asks for its root directory's attributes (GETATTR), or
// from within mount(2) for the file system's (STATFS).
func stuckOverlay(operation string) backend.Backend {
	return backend.Overlay{Inner: stuckBackend(operation), Tmpfs: true}
}

type stuckBackend string

func (b stuckBackend) Mount(_ context.Context, _ backend.Volume, target string, _ backend.Options) (backend.Mount, error) {
	dev, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	data := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", dev)
	if err := unix.Mount("stuck", target, "fuse.stuck", unix.MS_RDONLY, data); err != nil {
		return nil, err
	}
	fsys := &stuckFileSystem{RawFileSystem: fuse.NewDefaultRawFileSystem(), operation: string(b)}
	server, err := fuse.NewServer(fsys, fmt.Sprintf("/dev/fd/%d", dev), &fuse.MountOptions{})
	if err != nil {
		return nil, err
	}
	go server.Serve()
	fsys.mounted.Store(true)
	return stuckMount(target), nil
}

type stuckMount string

func (m stuckMount) Wait() error            { return nil }
func (m stuckMount) Unmount() error         { return unix.Unmount(string(m), unix.MNT_DETACH) }
func (m stuckMount) Device() backend.Device { return "" }

// stuckFileSystem has an empty root directory.
type stuckFileSystem struct {
	fuse.RawFileSystem
	operation string
	mounted   atomic.Bool
}

func (f *stuckFileSystem) stick(operation string) {
	if f.mounted.Load() && operation == f.operation {
		fmt.Println("stuck")
		select {}
	}
}

func (f *stuckFileSystem) GetAttr(_ <-chan struct{}, _ *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	f.stick("GETATTR")
	out.Attr = fuse.Attr{Ino: 1, Mode: syscall.S_IFDIR | 0o755, Nlink: 2}
	return fuse.OK
}

func (f *stuckFileSystem) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	f.stick("STATFS")
	return fuse.OK
}

// TestOverlayKilledWhileMounting: a server that mounts an overlay over its own file
// system, and waits for its own answer, can be killed.
func TestOverlayKilledWhileMounting(t *testing.T) {
	require.Has(t, "root", "fuse", "overlay")
	for _, operation := range []string{"GETATTR", "STATFS"} {
		t.Run(operation, func(t *testing.T) {
			hidden := t.TempDir()
			t.Cleanup(func() { unmountBelow(t, hidden) })
			s := startUntil(t, "stuck", "overlay, stuck in "+operation, writeImage(t, "plain"), "TMPDIR="+hidden)
			if err := s.cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- s.cmd.Wait() }()
			select {
			case <-ended:
			case <-time.After(20 * time.Second):
				t.Errorf("process %d does not die", s.cmd.Process.Pid)
				for _, m := range mountsBelow(t, hidden) {
					abort(t, m.device)
				}
				<-ended
			}
			noMount(t, s.dir)
		})
	}
}

// A mounted is a line of /proc/self/mountinfo.
type mounted struct{ device, dir, fsType string }

func mountsBelow(t *testing.T, dir string) []mounted {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var found []mounted
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		_, rest, _ := strings.Cut(line, " - ")
		if strings.HasPrefix(fields[4], dir) {
			found = append(found, mounted{fields[2], fields[4], strings.Fields(rest)[0]})
		}
	}
	return found
}

// unmountBelow takes away what a killed server left.
func unmountBelow(t *testing.T, dir string) {
	t.Helper()
	for _, m := range mountsBelow(t, dir) {
		if err := unix.Unmount(m.dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}
}

// abort ends the FUSE connection of the file system with this device number.
func abort(t *testing.T, device string) {
	t.Helper()
	_, minor, _ := strings.Cut(device, ":")
	control := t.TempDir()
	if err := unix.Mount("fusectl", control, "fusectl", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(control, 0); err != nil {
			t.Error(err)
		}
	}()
	if _, err := strconv.Atoi(minor); err != nil {
		t.Fatal(err)
	}
	err := os.WriteFile(filepath.Join(control, minor, "abort"), []byte("1"), 0)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
}
