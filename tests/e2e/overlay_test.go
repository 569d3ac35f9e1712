package e2e

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/require"
)

// TestOverlay: a writable mount shows the image and what is written, until
// umount(8), and again at the next mount.
func TestOverlay(t *testing.T) {
	require.Has(t, "overlay")
	im, s := served(t)
	upper := filepath.Join(s.dir, "upper")
	dir := s.mount(im.ref, "--overlay", upper)
	showsImage(t, dir)
	written := filepath.Join(dir, "small", "written")
	must(t, os.WriteFile(written, []byte("new"), 0o640))
	must(t, os.Remove(filepath.Join(dir, deepFile)))
	if e := s.entry(dir); e.State != "running" {
		t.Errorf("listed as %+v", e)
	}
	// A second one would spoil what is written.
	wantLine(t, s.run(binary, "mount", "--overlay", upper, im.ref, s.target()), "another mount keeps in "+upper)
	s.endsWith(dir, "umount", dir)

	dir = s.mount(im.ref, "--overlay", upper)
	if got, err := os.ReadFile(filepath.Join(dir, "small", "written")); err != nil || string(got) != "new" {
		t.Errorf("at the next mount: %q, %v", got, err)
	}
	if _, err := os.Stat(filepath.Join(dir, deepFile)); !os.IsNotExist(err) {
		t.Errorf("a removed file at the next mount: %v", err)
	}
	s.endsWith(dir, binary, "umount", dir)
	// What was written stays in the directory, and is the user's to use.
	if got, err := os.ReadFile(filepath.Join(upper, "upper", "small", "written")); err != nil || string(got) != "new" {
		t.Errorf("in the directory: %q, %v", got, err)
	}
}

func showsImage(t *testing.T, dir string) {
	t.Helper()
	if got, err := os.ReadFile(filepath.Join(dir, deepFile)); err != nil || !bytes.Equal(got, content(deepFile, deepSize)) {
		t.Errorf("%s: %d bytes, %v", deepFile, len(got), err)
	}
}

// endsWith runs a command that ends the mount on dir, its server, and all traces
// of both.
func (s *session) endsWith(dir, name string, args ...string) {
	s.t.Helper()
	server := s.pidfd(dir)
	if r := s.run(name, args...); r.code != 0 || r.stderr != "" {
		s.t.Errorf("%s %q: %d, %s", name, args, r.code, r.stderr)
	}
	awaitEnd(s.t, server)
	s.nothingLeft(dir)
}

// TestTmpfsOverlay: what is written to memory is gone with the mount, which SIGTERM
// ends, too.
func TestTmpfsOverlay(t *testing.T) {
	require.Has(t, "overlay")
	im, s := served(t)
	dir := s.mount(im.ref, "--tmpfs-overlay")
	showsImage(t, dir)
	must(t, os.WriteFile(filepath.Join(dir, "written"), []byte("new"), 0o640))
	s.end(dir, syscall.SIGTERM)
	s.nothingLeft(dir)
	dir = s.mount(im.ref, "--tmpfs-overlay")
	if _, err := os.Stat(filepath.Join(dir, "written")); !os.IsNotExist(err) {
		t.Errorf("what was written to memory: %v", err)
	}
	s.endsWith(dir, "umount", dir)
}

// TestOverlayKilled: the writable mount of a killed server is dead, and cleared by
// umount.
func TestOverlayKilled(t *testing.T) {
	require.Has(t, "overlay")
	im, s := served(t)
	dir := s.mount(im.ref, "--backend=fuse", "--tmpfs-overlay")
	s.end(dir, syscall.SIGKILL)
	if e := s.entry(dir); e.State != "dead" {
		t.Errorf("listed as %+v", e)
	}
	s.must("umount", dir)
	s.nothingLeft(dir)
}

// TestOverlayFails: one line says what is the matter, and nothing is left.
func TestOverlayFails(t *testing.T) {
	require.Has(t, "overlay")
	im, s := served(t)
	dir := s.target()
	other := s.mount(im.ref, "--tmpfs-overlay")
	wantLine(t, s.run(binary, "mount", "--overlay", filepath.Join(other, "upper"), im.ref, dir), "cannot keep what is written")
	wantLine(t, s.run(binary, "mount", "--overlay", filepath.Join(s.dir, "no", "where"), im.ref, dir), "no such file or directory")
	if r := s.run(binary, "mount", "--overlay", s.dir, "--tmpfs-overlay", im.ref, dir); r.code != 2 || strings.Count(r.stderr, "\n") != 1 {
		t.Errorf("both: %d, %q", r.code, r.stderr)
	}
	if mounted(t, dir) {
		t.Error("mounted all the same")
	}
	s.endsWith(other, "umount", other)
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil || fs.Type == unix.OVERLAYFS_SUPER_MAGIC {
		t.Errorf("the target: %v", err)
	}
}

// TestOverlayInUserNamespace: a plain user, root in a user namespace of its own.
func TestOverlayInUserNamespace(t *testing.T) {
	require.Has(t, "userns", "unshare", "overlay")
	im := serveImage(t)
	s := newSession(t)
	s.asNobody()
	dir := s.nobodysTarget()
	script := `set -e
"$0" mount --overlay "$HOME/upper" "$1" "$2"
rm "$2/` + deepFile + `"
echo new > "$2/written"
umount "$2"
"$0" mount --overlay "$HOME/upper" "$1" "$2"
cat "$2/written"
! [ -e "$2/` + deepFile + `" ]
"$0" umount "$2"
`
	r := s.run("unshare", "-Urm", "sh", "-c", script, binary, im.ref, dir)
	if r.code != 0 || r.stdout != "new\n" || r.stderr != "" {
		t.Errorf("exit code %d, %q: %s", r.code, r.stdout, r.stderr)
	}
}
