package backend

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/require"
)

// TestApart: what runs apart has everything open but connections of FUSE, and takes
// nothing away from the rest.
func TestApart(t *testing.T) {
	require.Has(t, "fuse")
	connection, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(connection)
	other, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	open := func(fd int) error {
		_, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		return err
	}
	failed := errors.New("as it says")
	thread := 0
	err = Apart(func() error {
		if err := open(connection); err != unix.EBADF {
			t.Errorf("a connection: %v", err)
		}
		if err := open(int(other.Fd())); err != nil {
			t.Errorf("another file: %v", err)
		}
		thread = unix.Gettid()
		return failed
	})
	if err != failed {
		t.Errorf("the error is %v", err)
	}
	if thread == unix.Getpid() {
		t.Error("it ran on the first thread, which does not end")
	}
	if err := errors.Join(open(connection), open(int(other.Fd()))); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	// Files that are opened now do not meet the thread's table.
	if err := Apart(func() error { return open(int(other.Fd())) }); err != nil {
		t.Errorf("a second time: %v", err)
	}
}
