package fusefs_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/backend/kmount"
	"github.com/erofs-oci/erofs-oci/fusefs"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// The server runs in a process of its own, as it does in life: a process that
// reads its own FUSE mount can wait for itself.
// The first variable names the image, the second one the backend.
const (
	serveEnv   = "EROFS_OCI_TEST_SERVE"
	backendEnv = "EROFS_OCI_TEST_BACKEND"
)

func backendFor(name string) (backend.Backend, error) {
	switch name {
	case "fuse":
		return fusefs.Backend{}, nil
	case "file":
		return fusefs.FileBackend{}, nil
	case "loop":
		return fusefs.MountingBy(kmount.MountByLoop), nil
	case "file, stuck":
		return fusefs.MountingBy(stuckIn(kmount.MountFile)), nil
	case "overlay, stuck in GETATTR":
		return stuckOverlay("GETATTR"), nil
	case "overlay, stuck in STATFS":
		return stuckOverlay("STATFS"), nil
	case "loop, stuck":
		return fusefs.MountingBy(stuckIn(kmount.MountByLoop)), nil
	}
	return nil, fmt.Errorf("no backend %q", name)
}

func TestMain(m *testing.M) {
	if path, ok := os.LookupEnv(mapEnv); ok {
		if err := mapPages(path, os.Args[1:]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	if image, ok := os.LookupEnv(serveEnv); ok {
		if err := serve(image, os.Args[1]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// serve mounts image on target, with IMAGE.blob as its extra device if that is
// there, and says "ready". While a file IMAGE.broken is there, every read of the
// image fails; once a file IMAGE.stuck is there, reads hang after they said so; with a
// file IMAGE.slow each read waits for a while.
func serve(image, target string) error {
	b, err := backendFor(os.Getenv(backendEnv))
	if err != nil {
		return err
	}
	f, err := backend.OpenFile(image)
	if err != nil {
		return err
	}
	defer f.Close()
	v := backend.Volume{Primary: breakable{f, image}}
	if extra, err := backend.OpenFile(image + ".blob"); err == nil {
		defer extra.Close()
		v.Devices = append(v.Devices, extra)
	}
	m, err := b.Mount(context.Background(), v, target,
		backend.Options{Name: "test", Log: slog.New(slog.NewTextHandler(os.Stderr, nil))})
	if err != nil {
		return err
	}
	fmt.Println("ready")
	return m.Wait()
}

type breakable struct {
	*backend.File
	image string
}

func (b breakable) ReadAt(ctx context.Context, p []byte, off int64) error {
	if _, err := os.Lstat(b.image + ".broken"); err == nil {
		return errors.New("broken by the test")
	}
	if _, err := os.Lstat(b.image + ".stuck"); err == nil {
		fmt.Println("stuck")
		<-ctx.Done()
	}
	if _, err := os.Lstat(b.image + ".slow"); err == nil {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
	}
	return b.File.ReadAt(ctx, p, off)
}

// stuckIn has the source hang while the kernel mounts.
func stuckIn(f mountFunc) mountFunc {
	return func(file, target string, o kmount.Options) (string, error) {
		if err := os.WriteFile(os.Getenv(serveEnv)+".stuck", nil, 0o644); err != nil {
			return "", err
		}
		return f(file, target, o)
	}
}

type mountFunc = func(file, target string, o kmount.Options) (device string, err error)

// server is a child that serves an image on dir.
type server struct {
	dir    string
	cmd    *exec.Cmd
	stderr strings.Builder
}

// startServer returns when the image is mounted. Whoever calls it ends it.
func startServer(t *testing.T, backendName, image string, env ...string) *server {
	t.Helper()
	return startUntil(t, "ready", backendName, image, env...)
}

// startUntil returns when the server says the word.
func startUntil(t *testing.T, word, backendName, image string, env ...string) *server {
	t.Helper()
	s := &server{dir: t.TempDir()}
	s.cmd = exec.Command(os.Args[0], s.dir)
	// The race detector would otherwise have each server linger for a second.
	s.cmd.Env = append(os.Environ(), serveEnv+"="+image, backendEnv+"="+backendName, "GORACE=atexit_sleep_ms=0")
	s.cmd.Env = append(s.cmd.Env, env...)
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	s.cmd.Stderr = &s.stderr
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != word+"\n" {
		s.cmd.Wait()
		t.Fatalf("the server: %q, %v, %s", line, err, s.stderr.String())
	}
	return s
}

// end unmounts, which ends the server.
func (s *server) end(t *testing.T) {
	t.Helper()
	if err := unix.Unmount(s.dir, 0); err != nil {
		t.Error(err)
		unix.Unmount(s.dir, unix.MNT_DETACH)
	}
	if err := s.cmd.Wait(); err != nil {
		t.Errorf("the server: %v: %s", err, s.stderr.String())
	}
}

// mountImage serves image on a new directory until the test ends.
func mountImage(t *testing.T, image string) string {
	t.Helper()
	require.Has(t, "root", "fuse")
	s := startServer(t, "fuse", image)
	t.Cleanup(func() { s.end(t) })
	return s.dir
}

func writeImage(t *testing.T, name string) string {
	t.Helper()
	im := corpus.Get(t, name)
	path := filepath.Join(t.TempDir(), name+".erofs")
	if err := os.WriteFile(path, im.Data, 0o644); err != nil {
		t.Fatal(err)
	}
	if im.Blob != nil {
		if err := os.WriteFile(path+".blob", im.Blob, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

// TestCorpus: every image shows through the mount what the kernel shows of it.
func TestCorpus(t *testing.T) {
	for _, im := range corpus.Images(t) {
		t.Run(im.Name, func(t *testing.T) {
			sameTree(t, im, mountImage(t, writeImage(t, im.Name)))
		})
	}
}

// sameTree compares what dir shows with what the kernel shows of the image.
func sameTree(t *testing.T, im corpus.Image, dir string) {
	t.Helper()
	got, err := tree.Walk(dir)
	if err != nil {
		t.Fatal(err)
	}
	want := im.Listing(t)
	diffs := tree.Diff(want, got)
	for _, d := range diffs[:min(len(diffs), 5)] {
		t.Error(d)
	}
	if len(diffs) > 5 {
		t.Errorf("and %d more of %d paths", len(diffs)-5, len(want))
	}
}

// TestReaddirAgainstKernel: order, types and inode numbers of directory entries,
// and statfs, are those of the kernel's erofs.
func TestReaddirAgainstKernel(t *testing.T) {
	require.Has(t, "root", "fuse", "kernel-erofs", "loop")
	for _, name := range []string{"plain", "lz4", "compact"} {
		image := writeImage(t, name)
		ours, kernels := mountImage(t, image), t.TempDir()
		if said, err := exec.Command("mount", "-t", "erofs", "-o", "ro,loop", image, kernels).CombinedOutput(); err != nil {
			t.Fatalf("mount: %v: %s", err, said)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(kernels, 0); err != nil {
				t.Error(err)
			}
		})
		dirs := 0
		for _, e := range corpus.Get(t, name).Listing(t) {
			if e.Mode&unix.S_IFMT != unix.S_IFDIR {
				continue
			}
			dirs++
			want, got := dirents(t, filepath.Join(kernels, e.Path)), dirents(t, filepath.Join(ours, e.Path))
			if !slices.Equal(want, got) {
				t.Errorf("%s: %s:\n want %q\n got  %q", name, e.Path, want, got)
			}
		}
		if dirs < 10 {
			t.Errorf("only %d directories compared", dirs)
		}
		var want, got unix.Statfs_t
		if err := errors.Join(unix.Statfs(kernels, &want), unix.Statfs(ours, &got)); err != nil {
			t.Fatal(err)
		}
		if got.Bsize != want.Bsize || got.Blocks != want.Blocks || got.Bfree != 0 || got.Namelen != want.Namelen {
			t.Errorf("%s: statfs %+v, the kernel's %+v", name, got, want)
		}
	}
}

// dirents reads a directory with a small buffer, so that it takes many calls.
func dirents(t *testing.T, dir string) []string {
	t.Helper()
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	var all []string
	buf := make([]byte, 600)
	for {
		n, err := unix.Getdents(fd, buf)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			return all
		}
		for b := buf[:n]; len(b) > 0; {
			reclen := int(b[16]) | int(b[17])<<8
			ino := uint64(0)
			for i := range 8 {
				ino |= uint64(b[i]) << (8 * i)
			}
			name, _, _ := strings.Cut(string(b[19:reclen]), "\x00")
			all = append(all, fmt.Sprintf("%s type %d ino %d", name, b[18], ino))
			b = b[reclen:]
		}
	}
}

// TestErrorsReachReaders: a source in trouble is EIO, never zeros or an empty
// file, and reading goes on where the trouble ends, on the same open file.
func TestErrorsReachReaders(t *testing.T) {
	image := writeImage(t, "plain")
	dir := mountImage(t, image)
	var big corpus.Entry
	for _, e := range corpus.Get(t, "plain").Listing(t) {
		if e.Mode&unix.S_IFMT == unix.S_IFREG && e.Size > big.Size {
			big = e
		}
	}
	f, err := os.Open(filepath.Join(dir, big.Path))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := os.WriteFile(image+".broken", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4096)
	if n, err := f.ReadAt(buf, big.Size/2); !errors.Is(err, syscall.EIO) {
		t.Fatalf("a read of a broken source: %d bytes, %v", n, err)
	}
	if err := os.Remove(image + ".broken"); err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(buf, big.Size/2); err != nil {
		t.Fatalf("after the trouble: %v", err)
	}
}

// TestInterrupts: readers in a storm of signals see no failed call, whether or not they have to wait.
func TestInterrupts(t *testing.T) {
	for _, slow := range []bool{false, true} {
		t.Run(fmt.Sprintf("slow=%v", slow), func(t *testing.T) {
			image := writeImage(t, "lz4")
			if slow {
				if err := os.WriteFile(image+".slow", nil, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			readInterrupted(t, mountImage(t, image))
		})
	}
}

func readInterrupted(t *testing.T, dir string) {
	want := corpus.Get(t, "lz4").Listing(t)
	stop := make(chan struct{})
	var storm sync.WaitGroup
	storm.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				syscall.Kill(os.Getpid(), syscall.SIGURG)
				time.Sleep(50 * time.Microsecond)
			}
		}
	})
	var readers sync.WaitGroup
	for range 8 {
		readers.Go(func() {
			got, err := tree.Walk(dir)
			if err != nil {
				t.Error(err)
				return
			}
			if d := tree.Diff(want, got); len(d) > 0 {
				t.Errorf("%d differences, the first: %s", len(d), d[0])
			}
		})
	}
	readers.Wait()
	close(stop)
	storm.Wait()
}

// TestReadPastEnd: the end of a file is its end, however far past it one asks.
func TestReadPastEnd(t *testing.T) {
	dir := mountImage(t, writeImage(t, "plain"))
	for _, e := range corpus.Get(t, "plain").Listing(t) {
		if e.Mode&unix.S_IFMT != unix.S_IFREG {
			continue
		}
		f, err := os.Open(filepath.Join(dir, e.Path))
		if err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 10)
		for _, off := range []int64{e.Size, e.Size + 1, e.Size + 1<<40} {
			if n, err := f.ReadAt(buf, off); n != 0 || err != io.EOF {
				t.Errorf("%q at %d of %d: %d bytes, %v", e.Path, off, e.Size, n, err)
			}
		}
		f.Close()
	}
}

// TestNames: names that are not there, and one that cannot be.
func TestNames(t *testing.T) {
	dir := mountImage(t, writeImage(t, "plain"))
	for name, want := range map[string]error{
		"no-such-name":           syscall.ENOENT,
		strings.Repeat("n", 255): syscall.ENOENT,
		strings.Repeat("n", 256): syscall.ENAMETOOLONG,
	} {
		for range 2 { // the second answer may be the kernel's own
			if _, err := os.Lstat(filepath.Join(dir, name)); !errors.Is(err, want) {
				t.Errorf("a name of %d bytes: %v, want %v", len(name), err, want)
			}
		}
	}
}

// TestMountedAs: what /proc/mounts shows.
func TestMountedAs(t *testing.T) {
	dir := mountImage(t, writeImage(t, "plain"))
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if f[1] != dir {
			continue
		}
		if f[0] != "test" || f[2] != backend.FuseType || !strings.HasPrefix(f[3], "ro,") || !strings.Contains(f[3], "default_permissions") {
			t.Errorf("mounted as %q", line)
		}
		if err := os.WriteFile(filepath.Join(dir, "new"), nil, 0o644); !errors.Is(err, syscall.EROFS) {
			t.Errorf("a write: %v, want EROFS", err)
		}
		return
	}
	t.Error("not in /proc/self/mounts")
}
