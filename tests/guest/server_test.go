package guest

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/backend/kmount"
	"github.com/erofs-oci/erofs-oci/nbdserve"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// serverEnv makes this program a server: a process that can be killed.
const serverEnv = "EROFS_OCI_TEST_SERVER"

// A task is what a server process is to do.
type task struct {
	Image, Target            string
	Connections              int
	Timeout, DeadConnTimeout time.Duration
	Ioctl                    bool
	// Reattach is the mount to take over, if there is one.
	Reattach []nbdserve.Attachment
	// HalfReply has the server die in the middle of a reply while this file is
	// there.
	HalfReply string
}

// serverMain serves until the mount ends. It prints the attachments when it is
// ready.
func serverMain(text string) error {
	var todo task
	if err := json.Unmarshal([]byte(text), &todo); err != nil {
		return err
	}
	f, err := backend.OpenFile(todo.Image)
	if err != nil {
		return err
	}
	defer f.Close()
	if todo.HalfReply != "" {
		return serveHalf(f, todo)
	}
	b := nbdserve.Backend{Connections: todo.Connections, Timeout: todo.Timeout, DeadConnTimeout: todo.DeadConnTimeout, Ioctl: todo.Ioctl}
	m, err := mountOrReattach(b, backend.Volume{Primary: f}, todo)
	if err != nil {
		return err
	}
	if err := json.NewEncoder(os.Stdout).Encode(m.Attachments()); err != nil {
		return err
	}
	return m.Wait()
}

func mountOrReattach(b nbdserve.Backend, v backend.Volume, todo task) (*nbdserve.Mount, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	o := backend.Options{Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	if todo.Reattach != nil {
		return b.Reattach(ctx, v, todo.Reattach, todo.Target, o)
	}
	m, err := b.Mount(ctx, v, todo.Target, o)
	if err != nil {
		return nil, err
	}
	return m.(*nbdserve.Mount), nil
}

// serveHalf mounts, and serves by hand: each read is answered rightly, until the
// file HalfReply is there; then the process dies after a part of the data.
func serveHalf(f *backend.File, todo task) error {
	ctx := context.Background()
	d, conns, err := nbdserve.Connect(ctx, nbdserve.DeviceOptions{
		Size: (f.Size() + 511) &^ 511, Timeout: todo.Timeout, DeadConnTimeout: todo.DeadConnTimeout,
	})
	if err != nil {
		return err
	}
	served := make(chan error, 1)
	go func() { served <- answer(conns[0], f, todo.HalfReply) }()
	if err := kmount.Mount(d.Path(), todo.Target, kmount.Options{}); err != nil {
		return errors.Join(err, d.Disconnect(ctx))
	}
	a, _ := d.Attachment()
	if err := json.NewEncoder(os.Stdout).Encode([]nbdserve.Attachment{a}); err != nil {
		return err
	}
	return <-served
}

// answer speaks the transmission phase: a request is magic, flags, command, cookie,
// offset and length in 28 bytes; a reply is magic, error and cookie in 16, and data.
func answer(conn io.ReadWriter, f *backend.File, half string) error {
	request := make([]byte, 28)
	for {
		if _, err := io.ReadFull(conn, request); err != nil {
			return err
		}
		if binary.BigEndian.Uint16(request[6:]) != 0 {
			return nil
		}
		reply := make([]byte, 16+binary.BigEndian.Uint32(request[24:]))
		binary.BigEndian.PutUint32(reply, 0x67446698)
		copy(reply[8:16], request[8:16])
		if err := f.ReadAt(context.Background(), reply[16:], int64(binary.BigEndian.Uint64(request[16:]))); err != nil {
			return err
		}
		if _, err := os.Lstat(half); err == nil {
			if _, err := conn.Write(reply[:16+len(reply[16:])/2]); err != nil {
				return err
			}
			return syscall.Kill(os.Getpid(), syscall.SIGKILL)
		}
		if _, err := conn.Write(reply); err != nil {
			return err
		}
	}
}

// A server is a process that serves a mount.
type server struct {
	cmd     *exec.Cmd
	stderr  strings.Builder
	devices []nbdserve.Attachment
}

// startServer returns when the server is ready.
func startServer(t *testing.T, todo task) (*server, error) {
	t.Helper()
	text, err := json.Marshal(todo)
	if err != nil {
		t.Fatal(err)
	}
	s := &server{cmd: exec.Command("/proc/self/exe")}
	s.cmd.Env = append(os.Environ(), serverEnv+"="+string(text))
	s.cmd.Stderr = &s.stderr
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &s.devices)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w: %s", err, s.cmd.Wait(), s.stderr.String())
	}
	return s, nil
}

func mustStart(t *testing.T, todo task) *server {
	t.Helper()
	s, err := startServer(t, todo)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *server) signal(t *testing.T, sig syscall.Signal) {
	t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		t.Error(err)
	}
}

// killed waits for the death of a server that was sent SIGKILL.
func (s *server) killed(t *testing.T) {
	t.Helper()
	var exit *exec.ExitError
	if err := s.cmd.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Errorf("the server: %v: %s", err, s.stderr.String())
	}
}

// unmount expects the server to end by itself.
func (s *server) unmount(t *testing.T, dir string) {
	t.Helper()
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Wait(); err != nil {
		t.Errorf("the server: %v: %s", err, s.stderr.String())
	}
}

// Timeouts that make tests short: a read that was under way when the server was
// killed goes on after two to four seconds.
const (
	shortTimeout = 2 * time.Second
	shortDead    = 15 * time.Second
)

func shortTask(image, dir string) task {
	return task{Image: image, Target: dir, Timeout: shortTimeout, DeadConnTimeout: shortDead}
}

// readers read the whole tree again and again, past the cache, until stop.
type readers struct {
	all    sync.WaitGroup
	ended  atomic.Bool
	rounds chan error // the end of a round of some reader
	// longest is how long a round took at most, in nanoseconds.
	longest atomic.Int64
}

func startReaders(n int, want []corpus.Entry, dir string) *readers {
	r := &readers{rounds: make(chan error)}
	for range n {
		r.all.Go(func() {
			for !r.ended.Load() {
				r.rounds <- r.read(want, dir)
			}
		})
	}
	return r
}

func (r *readers) read(want []corpus.Entry, dir string) error {
	begin := time.Now()
	got, err := tree.Walk(dir)
	took := int64(time.Since(begin))
	for longest := r.longest.Load(); took > longest && !r.longest.CompareAndSwap(longest, took); {
		longest = r.longest.Load()
	}
	if diffs := tree.Diff(want, got); err == nil && len(diffs) > 0 {
		err = fmt.Errorf("%d differences: %s", len(diffs), diffs[0])
	}
	return err
}

// round returns after n rounds more, the first of them with a cold cache.
func (r *readers) round(t *testing.T, n int) {
	t.Helper()
	dropCaches(t)
	for range n {
		if err := <-r.rounds; err != nil {
			t.Errorf("a reader saw %v", err)
		}
	}
}

// stop returns when the last reader has ended.
func (r *readers) stop(t *testing.T) {
	r.ended.Store(true)
	go func() {
		r.all.Wait()
		close(r.rounds)
	}()
	for err := range r.rounds {
		if err != nil {
			t.Errorf("a reader saw %v", err)
		}
	}
}

func writeImage(t *testing.T, name string) (path string, listing []corpus.Entry) {
	t.Helper()
	im := corpus.Get(t, name)
	path = filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, im.Data, 0o644); err != nil {
		t.Fatal(err)
	}
	return path, im.Listing(t)
}

// testKilledServer kills the server under eight readers, four times; none of them
// notices but by waiting.
func testKilledServer(t *testing.T, _ version) {
	for _, connections := range []int{1, 3} {
		image, want := writeImage(t, "lz4")
		dir := t.TempDir()
		todo := task{Image: image, Target: dir, Connections: connections, Timeout: shortTimeout, DeadConnTimeout: shortDead}
		s := mustStart(t, todo)
		todo.Reattach = s.devices
		r := startReaders(8, want, dir)
		for range 2 {
			r.round(t, 8)
			dropCaches(t)
			s.signal(t, syscall.SIGKILL)
			s.killed(t)
			s = mustStart(t, todo)
		}
		r.round(t, 8)
		r.stop(t)
		t.Logf("%d connections: the longest walk took %v", connections, time.Duration(r.longest.Load()))
		s.unmount(t, dir)
		nothingLeft(t)
	}
}

// testHalfReply: the server dies between the header of a reply and the end of its
// data.
func testHalfReply(t *testing.T, _ version) {
	image, want := writeImage(t, "plain")
	dir := t.TempDir()
	todo := task{Image: image, Target: dir, Timeout: shortTimeout, DeadConnTimeout: shortDead, HalfReply: image + ".half"}
	s := mustStart(t, todo)
	dropCaches(t)
	if err := os.WriteFile(todo.HalfReply, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	r := startReaders(4, want, dir)
	s.killed(t)
	todo.HalfReply, todo.Reattach = "", s.devices
	s = mustStart(t, todo)
	r.round(t, 8)
	r.stop(t)
	t.Logf("the longest walk took %v", time.Duration(r.longest.Load()))
	s.unmount(t, dir)
}

// testStoppedServer stops the server for longer than the kernel waits for a reply:
// the kernel gives the connection up, and the server makes it anew.
func testStoppedServer(t *testing.T, _ version) {
	image, want := writeImage(t, "lz4")
	dir := t.TempDir()
	s := mustStart(t, task{Image: image, Target: dir, Timeout: time.Second, DeadConnTimeout: shortDead})
	r := startReaders(4, want, dir)
	r.round(t, 4)
	s.signal(t, syscall.SIGSTOP)
	time.AfterFunc(4*time.Second, func() { s.signal(t, syscall.SIGCONT) })
	r.round(t, 8)
	r.stop(t)
	s.unmount(t, dir)
	if log := s.stderr.String(); !strings.Contains(log, "gave up a connection") || strings.Contains(log, "not made anew") {
		t.Errorf("the server's log: %q", log)
	}
}

// testReattachRefused: neither a living server's device nor somebody else's can be
// taken over, and asking does no harm.
func testReattachRefused(t *testing.T, _ version) {
	image, want := writeImage(t, "plain")
	dir := t.TempDir()
	s := mustStart(t, shortTask(image, dir))
	a := s.devices[0]
	other, larger, gone := a, a, a
	other.Identifier += "x"
	larger.Size += 512
	gone.Index++
	for _, c := range []struct {
		a    nbdserve.Attachment
		want string
	}{
		{a, "does the old server run?"}, {other, "belongs to somebody else"}, {larger, "were recorded"}, {gone, "is not connected"},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		_, _, err := nbdserve.Reattach(ctx, c.a)
		cancel()
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("got %v, want %q", err, c.want)
		}
	}
	dropCaches(t)
	same(t, want, dir)
	s.unmount(t, dir)
}

// testOrphanUnmounted: umount frees the device of a server that is dead.
func testOrphanUnmounted(t *testing.T, _ version) {
	image, _ := writeImage(t, "plain")
	dir := t.TempDir()
	s := mustStart(t, shortTask(image, dir))
	s.signal(t, syscall.SIGKILL)
	s.killed(t)
	state, err := nbdserve.DeviceState(s.devices[0].Index)
	if err != nil || !state.Connected || state.Identifier != s.devices[0].Identifier || state.PID == 0 {
		t.Errorf("the orphan: %+v, %v", state, err)
	}
	if all, err := nbdserve.Devices(); err != nil || len(all) != 1 || all[0] != state {
		t.Errorf("all devices: %+v, %v", all, err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Error(err)
	}
}

// testOrphanDisconnected: a reader who waits for a dead server gets EIO when the
// device is disconnected.
func testOrphanDisconnected(t *testing.T, _ version) {
	image, _ := writeImage(t, "plain")
	dir := t.TempDir()
	s := mustStart(t, shortTask(image, dir))
	s.signal(t, syscall.SIGKILL)
	s.killed(t)
	dropCaches(t)
	read := make(chan error, 1)
	go func() {
		_, err := tree.Walk(dir)
		read <- err
	}()
	awaitBlocked(t)
	if err := nbdserve.Disconnect(t.Context(), s.devices[0].Index); err != nil {
		t.Error(err)
	}
	if err := <-read; !errors.Is(err, unix.EIO) {
		t.Errorf("the reader: %v", err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Error(err)
	}
}

// awaitBlocked returns when a thread of this process waits for a device. The
// kernel announces no such thing.
func awaitBlocked(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		threads, err := filepath.Glob("/proc/self/task/*/stat")
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range threads {
			// PID (NAME) STATE …; D is the state of an uninterruptible wait.
			if b, err := os.ReadFile(name); err == nil && strings.Contains(string(b), ") D ") {
				return
			}
		}
	}
	t.Error("nobody waits")
}

// testWithoutNetlink makes devices by ioctl.
func testWithoutNetlink(t *testing.T, _ version) {
	image, want := writeImage(t, "plain")
	dir := t.TempDir()
	todo := shortTask(image, dir)
	todo.Ioctl = true
	for todo.Connections = range 3 {
		s := mustStart(t, todo)
		if s.devices != nil {
			t.Errorf("devices that could be reattached: %+v", s.devices)
		}
		dropCaches(t)
		same(t, want, dir)
		s.unmount(t, dir)
		nothingLeft(t)
	}
	// The device ends with its process.
	s := mustStart(t, todo)
	dropCaches(t)
	s.signal(t, syscall.SIGKILL)
	s.killed(t)
	if _, err := tree.Walk(dir); !errors.Is(err, unix.EIO) {
		t.Errorf("without a server: %v", err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Error(err)
	}
}
