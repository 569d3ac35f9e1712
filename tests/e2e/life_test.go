package e2e

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestKilledServer: a mount whose server was killed is shown as dead, says so to
// who mounts there again, and is cleared by umount.
func TestKilledServer(t *testing.T) {
	im, s, dir, f := servedAndOpen(t)
	s.end(dir, syscall.SIGKILL)
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

// TestBusy: umount refuses a mount in use with a reason; --lazy detaches it, and
// its reader goes on.
func TestBusy(t *testing.T) {
	t.Parallel()
	im, s, dir, f := servedAndOpen(t)
	server := s.pidfd(dir)
	wantLine(t, s.run(binary, "umount", dir), "busy", "--lazy")
	if !mounted(t, dir) {
		t.Fatal("a refused umount unmounted")
	}
	// It does not wait for the reader, who goes on.
	s.must("umount", "--lazy", dir)
	if mounted(t, dir) {
		t.Error("still mounted")
	}
	if e := s.entry(dir); e.State != "detached" {
		t.Errorf("listed as %+v", e)
	}
	wantLine(t, s.run(binary, "mount", im.ref, dir), "starting or ending")
	readAndClose(t, f)
	awaitEnd(t, server)
	s.nothingLeft(dir)
}

// TestForeground: the mount is there while the command runs; SIGINT, SIGTERM
// and a closed terminal unmount and end it with success.
func TestForeground(t *testing.T) {
	im, _ := served(t)
	for _, sig := range []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		s := newSession(t)
		dir := s.target()
		cmd := s.serveHere(im.ref, dir)
		showsImage(t, dir)
		if e := s.entry(dir); e.PID != cmd.Process.Pid {
			t.Errorf("listed with pid %d, is %d", e.PID, cmd.Process.Pid)
		}
		must(t, cmd.Process.Signal(sig))
		if err := cmd.Wait(); err != nil || cmd.stderr.Len() != 0 {
			t.Errorf("%v: %v, %q", sig, err, cmd.stderr.String())
		}
		s.nothingLeft(dir)
	}
}

// TestTerminatedInUse: a server that is told to end while a file is open detaches,
// serves the reader until it closes, and ends.
func TestTerminatedInUse(t *testing.T) {
	_, s, dir, f := servedAndOpen(t)
	server := s.pidfd(dir)
	s.signal(dir, syscall.SIGTERM)
	awaitMounts(t, "detached", func() bool { return !mounted(t, dir) })
	readAndClose(t, f)
	awaitEnd(t, server)
	s.nothingLeft(dir)
}

// TestOtherMounts: what somebody mounted over a mount of ours is not ours to take
// away.
func TestOtherMounts(t *testing.T) {
	_, s, dir := servedAndMounted(t)
	server := s.pidfd(dir)
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, ""))
	covered := true
	t.Cleanup(func() {
		if covered {
			unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	must(t, os.WriteFile(filepath.Join(dir, "precious"), nil, 0o600))
	wantLine(t, s.run(binary, "umount", dir), "something else is mounted over it")
	wantLine(t, s.run(binary, "umount", "--lazy", dir), "something else is mounted over it")
	s.signal(dir, syscall.SIGTERM)
	log := s.entry(dir).Log
	must(t, awaitDir(filepath.Dir(log), "the refusal is logged", func() bool {
		b, err := os.ReadFile(log)
		return err == nil && strings.Contains(string(b), "something else is mounted over it")
	}))
	if _, err := os.Stat(filepath.Join(dir, "precious")); err != nil {
		t.Errorf("the other file system is gone: %v", err)
	}
	must(t, unix.Unmount(dir, 0))
	covered = false
	s.must("umount", dir)
	awaitEnd(t, server)
	s.nothingLeft(dir)
}

// TestAnotherRunDir: a mount that this run directory does not know is neither
// taken for a dead one nor detached under its readers.
func TestAnotherRunDir(t *testing.T) {
	im, s, dir, f := servedAndOpen(t)
	other := newSession(t)
	wantLine(t, other.run(binary, "mount", im.ref, dir), "already mounted", "another user")
	wantLine(t, other.run(binary, "umount", dir), "busy")
	readAndClose(t, f)
	server := s.pidfd(dir)
	other.must("umount", dir)
	awaitEnd(t, server)
	s.nothingLeft(dir)
}

// TestStaleRecord: the record of a killed server whose mount somebody else took
// away is not taken for the next server's.
func TestStaleRecord(t *testing.T) {
	im, s, dir := servedAndMounted(t)
	s.end(dir, syscall.SIGKILL)
	must(t, unix.Unmount(dir, 0))
	fault, asked := stall(t)
	im.SetFault(fault)
	cmd := s.start(im.ref, dir, "--foreground")
	<-asked
	if e := s.entry(dir); e.State != "starting" || e.PID != cmd.Process.Pid {
		t.Errorf("listed as %+v, pid is %d", e, cmd.Process.Pid)
	}
	must(t, cmd.Process.Signal(syscall.SIGTERM))
	if err := cmd.Wait(); err == nil {
		t.Error("an interrupted mount succeeds")
	}
	s.nothingLeft(dir)
}

// TestOrphan: a mount whose starter was killed before it was ready gives up.
func TestOrphan(t *testing.T) {
	im, s := served(t)
	fault, asked := stall(t)
	im.SetFault(fault)
	dir := s.target()
	cmd := s.start(im.ref, dir)
	<-asked
	server := s.pidfd(dir)
	must(t, cmd.Process.Kill())
	if err := cmd.Wait(); err == nil {
		t.Error("a killed command succeeds")
	}
	awaitEnd(t, server)
	s.nothingLeft(dir)
}

// TestBrokenStderr: a server outlives the one who read its messages.
func TestBrokenStderr(t *testing.T) {
	t.Parallel()
	im, s := served(t)
	dir := s.target()
	r, w, err := os.Pipe()
	must(t, err)
	cmd := s.command(t.Context(), binary, "mount", "--foreground", "--on-error=wait:1s", im.ref, dir)
	cmd.Stderr = w
	must(t, cmd.Start())
	must(t, w.Close())
	must(t, r.Close())
	awaitMounts(t, "mounted", func() bool { return mounted(t, dir) })
	f, err := os.Open(filepath.Join(dir, bigFile))
	must(t, err)
	im.Stop()
	if _, err := f.ReadAt(make([]byte, 1), bigSize/2); !errors.Is(err, syscall.EIO) {
		t.Errorf("a read without a registry: %v", err)
	}
	must(t, im.Start())
	readAndClose(t, f)
	must(t, cmd.Process.Signal(syscall.SIGTERM))
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	s.nothingLeft(dir)
}

// TestInterruptedMount: Ctrl-C while a mount waits for a registry leaves nothing.
func TestInterruptedMount(t *testing.T) {
	im, s := served(t)
	fault, asked := stall(t)
	im.SetFault(fault)
	dir := s.target()
	cmd := s.start(im.ref, dir)
	<-asked
	must(t, cmd.Process.Signal(os.Interrupt))
	if err := cmd.Wait(); err == nil {
		t.Error("an interrupted mount succeeds")
	}
	if said := cmd.stderr.String(); said != "erofs-oci: interrupted\n" {
		t.Errorf("said %q", said)
	}
	s.nothingLeft(dir)
}
