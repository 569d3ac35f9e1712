package e2e

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/erofs-oci/erofs-oci/tests/require"
)

// TestKilledServer: a mount whose server was killed is shown as dead, says so to
// who mounts there again, and is cleared by umount.
func TestKilledServer(t *testing.T) {
	require.Has(t, "root", "fuse")
	im := serveImage(t)
	s := newSession(t)
	dir := s.mount(im.ref)
	f, err := os.Open(filepath.Join(dir, bigFile))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	server := s.pidfd(dir)
	if err := syscall.Kill(s.entry(dir).PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, server)
	if _, err := f.ReadAt(make([]byte, 1), 0); err == nil {
		t.Error("a read of a dead mount succeeds")
	}
	if e := s.entry(dir); e.State != "dead" {
		t.Errorf("listed as %+v", e)
	}
	if out := s.must("list"); !strings.Contains(out, "dead: erofs-oci umount "+dir) {
		t.Errorf("list does not say what to do: %q", out)
	}
	wantLine(t, s.run(binary, "mount", im.ref, dir), "server is gone", "erofs-oci umount")
	// The open file does not keep it: nobody will ever answer it.
	s.must("umount", dir)
	s.nothingLeft(dir)
	s.must("mount", im.ref, dir)
	s.must("umount", dir)
	s.nothingLeft(dir)
}

// nothingLeft fails the test if a mount, a record or a cached byte is left.
func (s *session) nothingLeft(dir string) {
	s.t.Helper()
	if mounted(s.t, dir) {
		s.t.Errorf("%s is still mounted", dir)
	}
	for _, d := range []string{"run", "cache/erofs-oci"} {
		left, err := os.ReadDir(filepath.Join(s.dir, d))
		if err != nil && !errors.Is(err, os.ErrNotExist) || len(left) != 0 {
			s.t.Errorf("left in %s: %v, %v", d, left, err)
		}
	}
}

// TestBusy: umount refuses a mount in use with a reason; --lazy detaches it, and
// its reader goes on.
func TestBusy(t *testing.T) {
	require.Has(t, "root", "fuse")
	im := serveImage(t)
	s := newSession(t)
	dir := s.mount(im.ref)
	f, err := os.Open(filepath.Join(dir, bigFile))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	server := s.pidfd(dir)
	wantLine(t, s.run(binary, "umount", dir), "busy", "--lazy")
	if !mounted(t, dir) {
		t.Fatal("a refused umount unmounted")
	}
	if r := s.runWhile(f, server, binary, "umount", "--lazy", dir); r.code != 0 {
		t.Fatalf("umount --lazy: %d, %s", r.code, r.stderr)
	}
	awaitEnd(t, server)
	s.nothingLeft(dir)
}

// runWhile runs a command that detaches the mount that f is on, and reads f
// before it lets go of it.
func (s *session) runWhile(f *os.File, server int, name string, args ...string) result {
	s.t.Helper()
	done := make(chan result, 1)
	go func() { done <- s.run(name, args...) }()
	for mounted(s.t, args[len(args)-1]) {
	}
	got := make([]byte, 4096)
	if _, err := f.ReadAt(got, bigSize/2); err != nil || !bytes.Equal(got, content(bigFile, bigSize)[bigSize/2:bigSize/2+4096]) {
		s.t.Errorf("a reader of a detached mount: %v", err)
	}
	if err := f.Close(); err != nil {
		s.t.Error(err)
	}
	return <-done
}

// TestForeground: the mount is there while the command runs; SIGINT and SIGTERM
// unmount and end it with success.
func TestForeground(t *testing.T) {
	require.Has(t, "root", "fuse")
	im := serveImage(t)
	for _, sig := range []os.Signal{syscall.SIGINT, syscall.SIGTERM} {
		s := newSession(t)
		dir := s.target()
		cmd := s.command(context.Background(), binary, "mount", "--foreground", im.ref, dir)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for !mounted(t, dir) || len(s.list()) == 0 {
			if cmd.Process.Signal(syscall.Signal(0)) != nil {
				t.Fatalf("ended early: %s", stderr.String())
			}
		}
		if got, err := os.ReadFile(filepath.Join(dir, deepFile)); err != nil || !bytes.Equal(got, content(deepFile, deepSize)) {
			t.Errorf("read %d bytes, %v", len(got), err)
		}
		if e := s.entry(dir); e.PID != cmd.Process.Pid {
			t.Errorf("listed with pid %d, is %d", e.PID, cmd.Process.Pid)
		}
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil || stderr.Len() != 0 {
			t.Errorf("%v: %v, %q", sig, err, stderr.String())
		}
		s.nothingLeft(dir)
	}
}

// TestTerminatedInUse: a server that is told to end while a file is open detaches,
// serves the reader until it closes, and ends.
func TestTerminatedInUse(t *testing.T) {
	require.Has(t, "root", "fuse")
	im := serveImage(t)
	s := newSession(t)
	dir := s.mount(im.ref)
	f, err := os.Open(filepath.Join(dir, bigFile))
	if err != nil {
		t.Fatal(err)
	}
	server := s.pidfd(dir)
	kill := s.runWhile(f, server, "sh", "-c", "kill -TERM $0 # $1", pid(s.entry(dir).PID), dir)
	if kill.code != 0 {
		t.Fatal(kill.stderr)
	}
	awaitEnd(t, server)
	s.nothingLeft(dir)
}

// TestInterruptedMount: Ctrl-C while a mount waits for a registry leaves nothing.
func TestInterruptedMount(t *testing.T) {
	require.Has(t, "root", "fuse")
	im := serveImage(t)
	im.SetFault(stall(t))
	s := newSession(t)
	dir := s.target()
	cmd := s.command(context.Background(), binary, "mount", im.ref, dir)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for im.Stats().Requests == 0 {
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("an interrupted mount succeeds")
	}
	if stderr.String() != "erofs-oci: interrupted\n" {
		t.Errorf("said %q", stderr.String())
	}
	s.nothingLeft(dir)
}
