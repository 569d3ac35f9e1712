package fusefs_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/erofs-oci/erofs-oci/backend"
	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/fusefs"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/require"
)

// TestRevoke: what the kernel had read is forgotten, under readers, and nothing comes any
// more: file data, links, lists.
func TestRevoke(t *testing.T) {
	require.Has(t, "root", "fuse")
	im := corpus.Get(t, "plain")
	m, dir, err := mountHere(t, fusefs.Backend{Revocable: true}, t.Context(), volume(im))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(m.Unmount(), m.Wait()); err != nil {
			t.Error(err)
		}
	}()
	// Not os.File: its poller asks about a file of ours, and with one processor nobody is left to answer.
	var files []int
	defer func() {
		for _, f := range files {
			unix.Close(f)
		}
	}()
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() || len(files) == 20 {
			return err
		}
		if st, err := e.Info(); err != nil || st.Size() == 0 {
			return err // nothing of an empty file is kept
		}
		f, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		files = append(files, f)
		return nil
	})
	if err != nil || len(files) == 0 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	read := func(f int) error {
		for {
			_, err := unix.Pread(f, make([]byte, 1<<20), 0)
			if !errors.Is(err, unix.EINTR) {
				return err
			}
		}
	}
	var failures []error
	for _, f := range files {
		failures = append(failures, read(f))
	}
	if err := errors.Join(failures...); err != nil {
		t.Fatal(err)
	}
	var readers sync.WaitGroup
	stop := make(chan struct{})
	for range 4 {
		readers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				for _, f := range files {
					if err := read(f); err != nil && !errors.Is(err, syscall.EIO) {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	why := errors.New("the bytes are wrong")
	err = m.(interface{ Revoke(error) error }).Revoke(why)
	close(stop)
	readers.Wait()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if err := read(f); !errors.Is(err, syscall.EIO) {
			t.Errorf("file %d: %v", f, err)
		}
	}
	if _, err := os.ReadDir(dir); !errors.Is(err, syscall.EIO) {
		t.Errorf("the root is listed: %v", err)
	}
}

// TestRevokeUnsupported: the kernel's own reader keeps what it keeps, and this is said.
func TestRevokeUnsupported(t *testing.T) {
	require.Has(t, "root", "fuse", "kernel-erofs")
	for _, b := range []backend.Backend{fusefs.Backend{}, fusefs.FileBackend{}} {
		m, _, err := mountHere(t, b, t.Context(), volume(corpus.Get(t, "plain")))
		if err != nil {
			t.Fatal(err)
		}
		if err := m.(interface{ Revoke(error) error }).Revoke(errors.New("x")); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("%T: %v", b, err)
		}
		if err := errors.Join(m.Unmount(), m.Wait()); err != nil {
			t.Error(err)
		}
	}
}
