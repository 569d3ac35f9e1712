package fusefs_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/backend/kmount"
	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/fusefs"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
)

// bothWays runs a test with FileBackend as it is and over loop devices, and looks
// for loop devices that were left behind.
func bothWays(t *testing.T, test func(t *testing.T, name string)) {
	require.Has(t, "root", "fuse", "kernel-erofs", "loop")
	for _, name := range []string{"file", "loop"} {
		t.Run(name, func(t *testing.T) {
			test(t, name)
			if left := loopDevices(t); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// loopDevices are those over a served blob.
func loopDevices(t *testing.T) []string {
	t.Helper()
	names, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(names, func(name string) bool {
		b, err := os.ReadFile(name)
		return err != nil || !strings.HasPrefix(string(b), "/erofs-oci.")
	})
}

// noMount fails if something is mounted on dir.
func noMount(t *testing.T, dir string) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(b), " "+dir+" ") {
		t.Errorf("something is mounted on %s", dir)
	}
}

// TestFileCorpus: the kernel shows of every image through us what it shows of it
// on a disk.
func TestFileCorpus(t *testing.T) {
	bothWays(t, func(t *testing.T, name string) {
		for _, im := range corpus.Images(t) {
			t.Run(im.Name, func(t *testing.T) {
				s := startServer(t, name, writeImage(t, im.Name))
				defer s.end(t)
				sameTree(t, im, s.dir)
			})
		}
	})
}

// TestFileOneProcessor: a server that must answer its own mount(2) and open(2)
// does so with one thread of Go at a time, on one CPU.
func TestFileOneProcessor(t *testing.T) {
	bothWays(t, func(t *testing.T, name string) {
		for _, im := range []string{"lz4", "multidev"} {
			s := startOnOneCPU(t, name, writeImage(t, im))
			sameTree(t, corpus.Get(t, im), s.dir)
			s.end(t)
		}
	})
}

// startOnOneCPU starts the server from a thread that is bound to one CPU.
func startOnOneCPU(t *testing.T, name, image string) *server {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var all, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		t.Fatal(err)
	}
	for cpu := 0; one.Count() == 0; cpu++ {
		if all.IsSet(cpu) {
			one.Set(cpu)
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		t.Fatal(err)
	}
	defer unix.SchedSetaffinity(0, &all)
	return startServer(t, name, image, "GOMAXPROCS=1")
}

// largest is the path of the largest regular file of an image and its size.
func largest(t *testing.T, name string) (string, int64) {
	t.Helper()
	var big corpus.Entry
	for _, e := range corpus.Get(t, name).Listing(t) {
		if e.Mode&unix.S_IFMT == unix.S_IFREG && e.Size > big.Size {
			big = e
		}
	}
	return big.Path, big.Size
}

// TestFileErrorsReachReaders: a source in trouble is EIO, and reading goes on
// where the trouble ends, on the same open file.
func TestFileErrorsReachReaders(t *testing.T) {
	bothWays(t, func(t *testing.T, name string) {
		for _, im := range []string{"plain", "lz4"} {
			image := writeImage(t, im)
			s := startServer(t, name, image)
			path, size := largest(t, im)
			f, err := os.Open(filepath.Join(s.dir, path))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(image+".broken", nil, 0o644); err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, 4096)
			if n, err := f.ReadAt(buf, size/2); !errors.Is(err, syscall.EIO) {
				t.Errorf("%s: a read of a broken source: %d bytes, %v", im, n, err)
			}
			if err := os.Remove(image + ".broken"); err != nil {
				t.Fatal(err)
			}
			if _, err := f.ReadAt(buf, size/2); err != nil {
				t.Errorf("%s: after the trouble: %v", im, err)
			}
			f.Close()
			sameTree(t, corpus.Get(t, im), s.dir)
			s.end(t)
			if said := s.stderr.String(); !strings.Contains(said, "broken by the test") {
				t.Errorf("%s: the reason is not in the log: %q", im, said)
			}
		}
	})
}

// TestFileServerKilled: readers see errors, what is in the page cache stays, and
// umount(8) clears all that is left.
func TestFileServerKilled(t *testing.T) {
	bothWays(t, func(t *testing.T, name string) {
		s := startServer(t, name, writeImage(t, "plain"))
		path, size := largest(t, "plain")
		f, err := os.Open(filepath.Join(s.dir, path))
		if err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 4096)
		if _, err := f.ReadAt(buf, 0); err != nil {
			t.Fatal(err)
		}
		if err := s.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		s.cmd.Wait()
		if _, err := f.ReadAt(buf, 0); err != nil {
			t.Errorf("cached data: %v", err)
		}
		if n, err := f.ReadAt(buf, size/2); !errors.Is(err, syscall.EIO) {
			t.Errorf("data: %d bytes, %v", n, err)
		}
		f.Close()
		failed := 0
		for _, e := range corpus.Get(t, "plain").Listing(t) {
			var st unix.Stat_t
			err := unix.Lstat(filepath.Join(s.dir, e.Path), &st)
			if err == nil {
				continue // its inode shares a block with one that was read
			}
			failed++
			if !errors.Is(err, syscall.EIO) && !errors.Is(err, syscall.ENOTCONN) {
				t.Errorf("metadata: %v", err)
			}
		}
		if failed == 0 {
			t.Error("no metadata is missing")
		}
		umount(t, s.dir)
	})
}

// TestFileKilledWhileMounting: a server whose mount(2) waits for its own answer can
// be killed.
func TestFileKilledWhileMounting(t *testing.T) {
	bothWays(t, func(t *testing.T, name string) {
		s := startUntil(t, "stuck", name+", stuck", writeImage(t, "plain"))
		if err := s.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- s.cmd.Wait() }()
		select {
		case <-ended:
		case <-time.After(20 * time.Second):
			t.Fatalf("process %d does not die", s.cmd.Process.Pid)
		}
		noMount(t, s.dir)
	})
}

func umount(t *testing.T, dir string) {
	t.Helper()
	if said, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
		t.Errorf("umount: %v: %s", err, said)
	}
	noMount(t, dir)
}

// TestFileUmount: umount(8) ends the server, and nothing else is to be seen of it
// in between.
func TestFileUmount(t *testing.T) {
	bothWays(t, func(t *testing.T, name string) {
		s := startServer(t, name, writeImage(t, "multidev"))
		var ours []string
		for _, m := range mounts(t) {
			// The FUSE mount would show as "erofs-oci … fuse".
			if strings.Contains(m, " "+s.dir+" ") || strings.HasPrefix(m, "erofs-oci ") {
				ours = append(ours, m)
			}
		}
		if len(ours) != 1 || !strings.Contains(ours[0], " "+s.dir+" erofs ro,") {
			t.Fatalf("mounts: %q", ours)
		}
		if direct := strings.Contains(ours[0], "/erofs-oci.blob "); direct != (name == "file" && kernelMountsFiles(t)) {
			t.Errorf("mounted as %q", ours[0])
		}
		if err := os.WriteFile(filepath.Join(s.dir, "new"), nil, 0o644); !errors.Is(err, syscall.EROFS) {
			t.Errorf("a write: %v, want EROFS", err)
		}
		umount(t, s.dir)
		if err := s.cmd.Wait(); err != nil {
			t.Errorf("the server: %v: %s", err, s.stderr.String())
		}
	})
}

// kernelMountsFiles asks by trying.
func kernelMountsFiles(t *testing.T) bool {
	t.Helper()
	dir := t.TempDir()
	err := kmount.Mount(writeImage(t, "plain"), dir, kmount.Options{})
	if errors.Is(err, syscall.ENOTBLK) {
		return false
	}
	if err == nil {
		err = unix.Unmount(dir, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	return true
}

// mounts are the lines of /proc/self/mounts.
func mounts(t *testing.T) []string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(string(b), "\n")
}

// TestFileForOthers: users without rights read through the mount of root's, and
// through files that are root's alone.
func TestFileForOthers(t *testing.T) {
	bothWays(t, func(t *testing.T, name string) {
		s := startServer(t, name, writeImage(t, "plain"))
		defer s.end(t)
		// The root of the image is closed to them: they start below it.
		dir, err := os.Open(filepath.Join(s.dir, "mixed"))
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		cmd := exec.Command("sha256sum", "/proc/self/fd/3/half")
		cmd.ExtraFiles = []*os.File{dir}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		for _, e := range corpus.Get(t, "plain").Listing(t) {
			if e.Path == "mixed/half" && !strings.HasPrefix(string(out), e.SHA256) {
				t.Errorf("%s, want %s", out, e.SHA256)
			}
		}
	})
}

// mountHere mounts in this process, which must not read the mount.
func mountHere(t *testing.T, b backend.Backend, ctx context.Context, v backend.Volume) (backend.Mount, string, error) {
	t.Helper()
	dir := t.TempDir()
	m, err := b.Mount(ctx, v, dir, backend.Options{Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	return m, dir, err
}

func volume(im corpus.Image) backend.Volume {
	v := backend.Volume{Primary: sourcetest.Memory(im.Data)}
	if im.Blob != nil {
		v.Devices = append(v.Devices, sourcetest.Memory(im.Blob))
	}
	return v
}

func descriptors(t *testing.T) int {
	t.Helper()
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(open)
}

// TestFileCycles: mounting and unmounting leaves nothing.
func TestFileCycles(t *testing.T) {
	bothWays(t, func(t *testing.T, name string) {
		defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
		b, err := backendFor(name)
		if err != nil {
			t.Fatal(err)
		}
		v := volume(corpus.Get(t, "multidev"))
		tmp := t.TempDir()
		t.Setenv("TMPDIR", tmp)
		before := 0
		for i := range 50 {
			m, dir, err := mountHere(t, b, t.Context(), v)
			if err != nil {
				t.Fatal(err)
			}
			if d, err := backend.MountedDevice(dir, kmount.FSType); err != nil || d != m.Device() {
				t.Errorf("device %q, want %q; %v", m.Device(), d, err)
			}
			if err := m.Unmount(); err != nil {
				t.Fatal(err)
			}
			if err := m.Wait(); err != nil {
				t.Error(err)
			}
			noMount(t, dir)
			if err := m.Unmount(); err != nil {
				t.Errorf("a second time: %v", err)
			}
			if i == 0 {
				before = descriptors(t)
			}
		}
		if after := descriptors(t); after != before {
			t.Errorf("%d open descriptors, %d after the first cycle", after, before)
		}
	})
}

// TestFileUnmountInUse: a mount in use is detached, and ends with its last user.
func TestFileUnmountInUse(t *testing.T) {
	bothWays(t, func(t *testing.T, name string) {
		defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
		b, err := backendFor(name)
		if err != nil {
			t.Fatal(err)
		}
		m, dir, err := mountHere(t, b, t.Context(), volume(corpus.Get(t, "plain")))
		if err != nil {
			t.Fatal(err)
		}
		user, err := unix.Open(dir, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Unmount(); err != nil {
			t.Error(err)
		}
		noMount(t, dir)
		// The user can still read: the server is there.
		buf := make([]byte, 4096)
		fd, err := unix.Openat(user, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := unix.Getdents(fd, buf); err != nil || n == 0 {
			t.Errorf("detached: %d bytes, %v", n, err)
		}
		if err := errors.Join(unix.Close(fd), unix.Close(user)); err != nil {
			t.Error(err)
		}
		if err := m.Wait(); err != nil {
			t.Error(err)
		}
	})
}

// TestFileAborted: where somebody aborts the connection, the server ends and says
// so. The mount stays, and is errors until it is unmounted.
func TestFileAborted(t *testing.T) {
	bothWays(t, func(t *testing.T, name string) {
		mountFile := kmount.MountFile
		if name == "loop" {
			mountFile = kmount.MountByLoop
		}
		var device string
		b := fusefs.MountingBy(func(file, target string, o kmount.Options) (string, error) {
			var st unix.Stat_t
			if err := unix.Stat(file, &st); err != nil {
				return "", err
			}
			device = fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
			return mountFile(file, target, o)
		})
		m, dir, err := mountHere(t, b, t.Context(), volume(corpus.Get(t, "plain")))
		if err != nil {
			t.Fatal(err)
		}
		abort(t, device)
		if err := m.Wait(); err == nil || !strings.Contains(err.Error(), dir+" is still mounted") {
			t.Errorf("the server ends with %v", err)
		}
		if _, err := os.ReadFile(filepath.Join(dir, "mixed", "half")); err == nil {
			t.Error("a read that nobody answers succeeds")
		}
		if err := m.Unmount(); err != nil {
			t.Error(err)
		}
		noMount(t, dir)
		if err := m.Wait(); err != nil {
			t.Errorf("after umount: %v", err)
		}
	})
}

// TestFileRefusals: what cannot be mounted is refused with the reason, and leaves
// nothing.
func TestFileRefusals(t *testing.T) {
	plain := corpus.Get(t, "plain").Data
	multi := corpus.Get(t, "multidev")
	unknown := slices.Clone(plain)
	unknown[featureCompat] &^= 1 // no checksum
	unknown[featureIncompat+3] = 0x80
	flipped := slices.Clone(plain)
	flipped[featureCompat+8] ^= 1
	bothWays(t, func(t *testing.T, name string) {
		for what, c := range map[string]struct {
			v    backend.Volume
			is   error
			says string
		}{
			"garbage":         {volume(corpus.Image{Data: make([]byte, 1<<20)}), erofsfmt.ErrNotErofs, "magic"},
			"nothing":         {volume(corpus.Image{}), erofsfmt.ErrNotErofs, "no superblock"},
			"unknown feature": {volume(corpus.Image{Data: unknown}), syscall.EINVAL, "dmesg"},
			"wrong checksum":  {volume(corpus.Image{Data: flipped}), erofsfmt.ErrCorrupt, "checksum"},
			"cut off":         {volume(corpus.Image{Data: plain[:len(plain)-1]}), nil, "was cut off"},
			"device cut off":  {volume(corpus.Image{Data: multi.Data, Blob: multi.Blob[:len(multi.Blob)-1]}), nil, "device 1"},
			"device too many": {volume(corpus.Image{Data: plain, Blob: multi.Blob}), nil, "extra devices"},
			"cannot be read":  {backend.Volume{Primary: sourcetest.Flaky(sourcetest.Memory(plain), 1)}, sourcetest.ErrFlaky, ""},
		} {
			t.Run(what, func(t *testing.T) {
				defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
				b, err := backendFor(name)
				if err != nil {
					t.Fatal(err)
				}
				m, dir, err := mountHere(t, b, t.Context(), c.v)
				if err == nil {
					t.Fatal(errors.Join(errors.New("it was mounted"), m.Unmount(), m.Wait()))
				}
				if c.is != nil && !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.says) {
					t.Errorf("%v; want %v, %q", err, c.is, c.says)
				}
				noMount(t, dir)
			})
		}
	})
}

// TestFileFailures: where the source or the kernel fails while it mounts, or the
// caller gives up, nothing is left.
func TestFileFailures(t *testing.T) {
	bothWays(t, func(t *testing.T, name string) {
		mountFile := kmount.MountFile
		if name == "loop" {
			mountFile = kmount.MountByLoop
		}
		plain := corpus.Get(t, "plain").Data
		for what, c := range map[string]struct {
			fail, hang bool
			mount      func(cancel func(), file, target string, o kmount.Options) (string, error)
			is         []error
		}{
			"no kernel support": {is: []error{syscall.ENODEV}, mount: func(func(), string, string, kmount.Options) (string, error) {
				return "", fmt.Errorf("mount: %w", syscall.ENODEV)
			}},
			"no such target": {is: []error{syscall.ENOENT}, mount: func(_ func(), file, target string, o kmount.Options) (string, error) {
				return mountFile(file, target+"/no", o)
			}},
			"source fails":            {is: []error{syscall.EIO}, fail: true},
			"gives up while it reads": {is: []error{context.Canceled, syscall.EIO}, hang: true},
			"gives up too late": {is: []error{context.Canceled}, mount: func(cancel func(), file, target string, o kmount.Options) (string, error) {
				device, err := mountFile(file, target, o)
				cancel()
				return device, err
			}},
		} {
			t.Run(what, func(t *testing.T) {
				running := goleak.IgnoreCurrent()
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				s := &source{Source: sourcetest.Memory(plain), fail: c.fail, hang: c.hang, reading: cancel}
				b := fusefs.MountingBy(func(file, target string, o kmount.Options) (string, error) {
					s.mounting.Store(true)
					if c.mount == nil {
						return mountFile(file, target, o)
					}
					return c.mount(cancel, file, target, o)
				})
				before := descriptors(t)
				m, dir, err := mountHere(t, b, ctx, backend.Volume{Primary: s})
				if err == nil {
					t.Fatal(errors.Join(errors.New("it was mounted"), m.Unmount(), m.Wait()))
				}
				for _, want := range c.is {
					if !errors.Is(err, want) {
						t.Errorf("%v; want %v", err, want)
					}
				}
				noMount(t, dir)
				goleak.VerifyNone(t, running)
				if after := descriptors(t); after != before {
					t.Errorf("%d open descriptors, %d before", after, before)
				}
			})
		}
	})
}

// source is in trouble as soon as the kernel mounts.
type source struct {
	sourcetest.Source
	fail, hang bool
	reading    func() // called by a read that hangs
	mounting   atomic.Bool
}

func (s *source) ReadAt(ctx context.Context, p []byte, off int64) error {
	switch {
	case s.mounting.Load() && s.fail:
		return errors.New("broken by the test")
	case s.mounting.Load() && s.hang:
		s.reading()
		<-ctx.Done()
		return ctx.Err()
	}
	return s.Source.ReadAt(ctx, p, off)
}
