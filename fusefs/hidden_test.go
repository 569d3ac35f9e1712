package fusefs_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/backend/kmount"
	"github.com/erofs-oci/erofs-oci/fusefs"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
)

// hiddenFile is the path of the file that FileBackend makes of a source, until the
// test ends. Any process of root's can open it.
func hiddenFile(t *testing.T, s backend.Source) string {
	t.Helper()
	require.Has(t, "root", "fuse")
	seen, done, ended := make(chan string), make(chan struct{}), make(chan error)
	enough := errors.New("the test has seen it")
	b := fusefs.MountingBy(func(file, _ string, _ kmount.Options) (string, error) {
		seen <- file
		<-done
		return "", enough
	})
	go func() {
		_, err := b.Mount(context.Background(), backend.Volume{Primary: s}, "", backend.Options{})
		ended <- err
	}()
	select {
	case file := <-seen:
		t.Cleanup(func() {
			close(done)
			if err := <-ended; !errors.Is(err, enough) {
				t.Error(err)
			}
		})
		return strings.Replace(file, "self", strconv.Itoa(os.Getpid()), 1)
	case err := <-ended:
		t.Fatal(err)
	}
	return ""
}

// oddImage ends 1,234 bytes after an image that says how long it is.
func oddImage(t *testing.T) []byte {
	return append(slices.Clone(corpus.Get(t, "plain").Data), sourcetest.Content(1234)...)
}

// TestHiddenFileReads: file data, as the kernel's EROFS asks for it.
func TestHiddenFileReads(t *testing.T) {
	content := oddImage(t)
	f, err := os.Open(hiddenFile(t, sourcetest.Memory(content)))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size := len(content)
	sector := size / 512 * 512 // where the last one begins
	for _, c := range []struct {
		off, n int
		ok     bool
	}{
		{0, 4096, true},
		{0, size, true},
		{size - 1, 1, true},
		{sector - 512, 1024, true},
		{sector - 512, 1025, false},
		{size, 1, false},
		{sector + 512, 512, false},
		{1 << 50, 4096, false},
	} {
		got := make([]byte, c.n)
		n, err := unix.Pread(int(f.Fd()), got, int64(c.off))
		if c.ok {
			want := append(content[c.off:min(c.off+c.n, size):size], make([]byte, max(0, c.off+c.n-size))...)
			if n != c.n || err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes at %d: %d, %v", c.n, c.off, n, err)
			}
		} else if err != unix.EIO {
			t.Errorf("%d bytes at %d: %d, %v; want EIO", c.n, c.off, n, err)
		}
	}
}

// mapEnv has this program map the file that it names, as mapPages does.
const mapEnv = "EROFS_OCI_TEST_MAP"

// mapPages maps pages of a file, from the one with a number on, and prints of each
// its first and last byte, or "error". A process must not wait for pages from
// itself: nobody could stop it for garbage collection.
func mapPages(path string, args []string) error {
	first, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	page := os.Getpagesize()
	m, err := unix.Mmap(int(f.Fd()), int64(first*page), n*page, unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	if args[2] == "sequential" {
		if err := unix.Madvise(m, unix.MADV_SEQUENTIAL); err != nil {
			return err
		}
	}
	debug.SetPanicOnFault(true)
	for i := range n {
		fmt.Println(ends(m[i*page : (i+1)*page]))
	}
	return nil
}

func ends(page []byte) (s string) {
	defer func() {
		if recover() != nil {
			s = "error"
		}
	}()
	return fmt.Sprintf("%02x %02x", page[0], page[len(page)-1])
}

// TestHiddenFilePages: metadata, as the kernel's EROFS asks for it. However much is
// read ahead, each page that has something is there, and no other.
func TestHiddenFilePages(t *testing.T) {
	content := oddImage(t)
	page := os.Getpagesize()
	path := hiddenFile(t, sourcetest.Memory(content))
	last := len(content) / page
	first := last - 20
	var want []string
	for i := range 40 {
		switch p := first + i; {
		case p < last:
			want = append(want, ends(content[p*page:][:page]))
		case p == last:
			want = append(want, fmt.Sprintf("%02x 00", content[p*page]))
		default:
			want = append(want, "error")
		}
	}
	for _, how := range []string{"around", "sequential"} {
		cmd := exec.Command(os.Args[0], strconv.Itoa(first), "40", how)
		cmd.Env = append(os.Environ(), mapEnv+"="+path)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if got := strings.Split(strings.TrimSpace(string(out)), "\n"); !slices.Equal(got, want) {
			t.Errorf("%s:\ngot  %q\nwant %q", how, got, want)
		}
	}
}

// TestHiddenFileInPieces: of a read that the kernel's EROFS sends, and which takes
// several requests, there is all or an error, never the begin.
func TestHiddenFileInPieces(t *testing.T) {
	const piece = 512 << 10
	content := oddImage(t)
	var broken atomic.Bool
	path := hiddenFile(t, brokenAt{sourcetest.Memory(content), piece, &broken})
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	buf := make([]byte, 2*piece)
	if n := submitRead(t, fd, buf); n != 2*piece || !bytes.Equal(buf, content[:2*piece]) {
		t.Errorf("read %d", n)
	}
	broken.Store(true)
	if n := submitRead(t, fd, buf); n != -int64(unix.EIO) {
		t.Errorf("the second piece fails: read %d, want EIO", n)
	}
}

// brokenAt fails reads at an offset once it is broken.
type brokenAt struct {
	sourcetest.Source
	off    int64
	broken *atomic.Bool
}

func (b brokenAt) ReadAt(ctx context.Context, p []byte, off int64) error {
	if off == b.off && b.broken.Load() {
		return errors.New("broken by the test")
	}
	return b.Source.ReadAt(ctx, p, off)
}

// submitRead reads from the begin of a file by io_submit(2), which like the kernel's
// EROFS does not wait in the call, and returns what io_event has as its result.
func submitRead(t *testing.T, fd int, buf []byte) int64 {
	t.Helper()
	call := func(name string, number, a, b, c, d, e uintptr) {
		t.Helper()
		if n, _, errno := unix.Syscall6(number, a, b, c, d, e, 0); errno != 0 || n > 1 {
			t.Fatalf("%s: %d, %v", name, n, errno)
		}
	}
	var queue uintptr
	call("io_setup", unix.SYS_IO_SETUP, 1, uintptr(unsafe.Pointer(&queue)), 0, 0, 0)
	defer call("io_destroy", unix.SYS_IO_DESTROY, queue, 0, 0, 0, 0)
	// linux/aio_abi.h struct iocb, with IOCB_CMD_PREAD, and struct io_event.
	var iocb [8]uint64
	binary.NativeEndian.PutUint32(unsafe.Slice((*byte)(unsafe.Pointer(&iocb[2])), 8)[4:], uint32(fd))
	iocb[3], iocb[4] = uint64(uintptr(unsafe.Pointer(&buf[0]))), uint64(len(buf))
	iocbs := [1]*[8]uint64{&iocb}
	call("io_submit", unix.SYS_IO_SUBMIT, queue, 1, uintptr(unsafe.Pointer(&iocbs)), 0, 0)
	var event [4]int64
	call("io_getevents", unix.SYS_IO_GETEVENTS, queue, 1, 1, uintptr(unsafe.Pointer(&event)), 0)
	runtime.KeepAlive(&iocb)
	runtime.KeepAlive(buf)
	return event[2]
}
