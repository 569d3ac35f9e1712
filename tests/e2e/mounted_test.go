package e2e

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/erofs-oci/erofs-oci/tests/require"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// served is an image in a registry of its own, and a user who can mount it.
func served(t *testing.T) (servedImage, *session) {
	t.Helper()
	require.Has(t, "root", "fuse")
	return serveImage(t), newSession(t)
}

// servedAndMounted is that, and where the image is mounted.
func servedAndMounted(t *testing.T, flags ...string) (im servedImage, s *session, dir string) {
	t.Helper()
	im, s = served(t)
	return im, s, s.mount(im.ref, flags...)
}

// servedAndOpen is that, and its big file, which keeps the mount in use until the
// test closes it or ends.
func servedAndOpen(t *testing.T, flags ...string) (im servedImage, s *session, dir string, f *os.File) {
	t.Helper()
	im, s, dir = servedAndMounted(t, flags...)
	f, err := os.Open(filepath.Join(dir, bigFile))
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return im, s, dir, f
}

// shows fails the test unless 4 KiB of the big file are right.
func shows(t *testing.T, f *os.File, off int64, when string) {
	t.Helper()
	got := make([]byte, 4096)
	if _, err := f.ReadAt(got, off); err != nil || !bytes.Equal(got, content(bigFile, bigSize)[off:off+4096]) {
		t.Errorf("%s: %v", when, err)
	}
}

// readAndClose reads from a file that no directory leads to any more, and lets
// go of it.
func readAndClose(t *testing.T, f *os.File) {
	t.Helper()
	shows(t, f, bigSize/2, "a reader of a detached mount")
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

// signal sends a signal to the server of the mount on dir.
func (s *session) signal(dir string, sig syscall.Signal) {
	s.t.Helper()
	must(s.t, syscall.Kill(s.entry(dir).PID, sig))
}

// end sends a signal to the server of the mount on dir, and waits for its end.
func (s *session) end(dir string, sig syscall.Signal) {
	s.t.Helper()
	server := s.pidfd(dir)
	s.signal(dir, sig)
	awaitEnd(s.t, server)
}

// A running is a mount command that has not ended.
type running struct {
	*exec.Cmd
	stderr bytes.Buffer
}

// start starts a mount of ref on dir.
func (s *session) start(ref, dir string, flags ...string) *running {
	s.t.Helper()
	r := &running{Cmd: s.command(context.Background(), binary, append(append([]string{"mount"}, flags...), ref, dir)...)}
	r.Stderr = &r.stderr
	must(s.t, r.Start())
	return r
}

// serveHere is start in the foreground, until the mount is recorded as running.
func (s *session) serveHere(ref, dir string, flags ...string) *running {
	s.t.Helper()
	r := s.start(ref, dir, append([]string{"--foreground"}, flags...)...)
	isRunning := func() bool { l := s.list(); return len(l) == 1 && l[0].State == "running" }
	if err := awaitDir(filepath.Join(s.dir, "run"), "running", isRunning); err != nil {
		s.t.Fatalf("%v: %s", err, r.stderr.String())
	}
	return r
}

// nothingLeft fails the test if a mount, a record or a cached byte is left.
func (s *session) nothingLeft(dir string) {
	s.t.Helper()
	if mounted(s.t, dir) {
		s.t.Errorf("%s is still mounted", dir)
	}
	left, err := os.ReadDir(filepath.Join(s.dir, "run"))
	if err != nil && !errors.Is(err, os.ErrNotExist) || len(left) != 0 {
		s.t.Errorf("left in run: %v, %v", left, err)
	}
	s.cacheIdle()
}

// cacheIdle fails the test unless nobody uses what was fetched, which stays.
func (s *session) cacheIdle() {
	s.t.Helper()
	if _, err := os.Stat(filepath.Join(s.dir, "cache/erofs-oci")); errors.Is(err, os.ErrNotExist) {
		return
	}
	kept := s.run(binary, "cache", "ls", "--json")
	if kept.code != 0 || strings.Contains(kept.stdout, `"in_use": true`) {
		s.t.Errorf("cache ls: %+v", kept)
	}
}
