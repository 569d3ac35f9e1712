package e2e

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/erofs-oci/erofs-oci/tests/require"
)

// inMachine has the session's commands run in a mount namespace of their own, where
// /sbin is empty but for what they put there.
func (s *session) inMachine() {
	s.t.Helper()
	require.Has(s.t, "root", "fuse", "unshare")
	sbin := filepath.Join(s.dir, "sbin")
	must(s.t, os.Mkdir(sbin, 0o755))
	holder := exec.Command("unshare", "-m", "sh", "-c", `mount --bind "$0" /sbin && echo ready && exec cat >/dev/null`, sbin)
	stdin, err := holder.StdinPipe()
	must(s.t, err)
	stdout, err := holder.StdoutPipe()
	must(s.t, err)
	holder.Stderr = os.Stderr
	must(s.t, holder.Start())
	s.t.Cleanup(func() {
		// Its namespace ends with it and with the servers in it.
		stdin.Close()
		if err := holder.Wait(); err != nil {
			s.t.Error(err)
		}
	})
	if said, err := io.ReadAll(io.LimitReader(stdout, int64(len("ready\n")))); err != nil || string(said) != "ready\n" {
		s.t.Fatalf("a mount namespace: %q, %v", said, err)
	}
	s.wrap = []string{"nsenter", "--mount=/proc/" + strconv.Itoa(holder.Process.Pid) + "/ns/mnt", "--"}
	// Also where the test fails.
	s.t.Cleanup(func() {
		for _, e := range s.list() {
			syscall.Kill(e.PID, syscall.SIGTERM)
		}
	})
}

// mountsOn are the lines of /proc/mounts about dir, where the session is.
func (s *session) mountsOn(dir string) []string {
	s.t.Helper()
	var lines []string
	for line := range strings.Lines(s.run("cat", "/proc/self/mounts").stdout) {
		if strings.Fields(line)[1] == dir {
			lines = append(lines, line)
		}
	}
	return lines
}

func (s *session) quiet(name string, args ...string) string {
	s.t.Helper()
	r := s.run(name, args...)
	if r.code != 0 || r.stderr != "" {
		s.t.Fatalf("%s %q: %d, %s", name, args, r.code, r.stderr)
	}
	return r.stdout
}

// reads fails the test unless dir shows the image.
func (s *session) reads(dir string) {
	s.t.Helper()
	if got := s.quiet("cat", filepath.Join(dir, deepFile)); got != string(content(deepFile, deepSize)) {
		s.t.Errorf("%s: %d bytes", deepFile, len(got))
	}
}

// unmount ends a mount by umount(8), and waits for its server.
func (s *session) unmount(dir string) {
	s.t.Helper()
	server := s.pidfd(dir)
	s.quiet("umount", dir)
	awaitEnd(s.t, server)
}

// TestHelper: mount(8) mounts by the helper, with its options and ours, and hands
// on what went wrong.
func TestHelper(t *testing.T) {
	im := serveImage(t)
	s := newSession(t)
	s.inMachine()
	if out := s.must("helper", "install"); !strings.Contains(out, "/sbin/mount.erofs-oci now leads to "+binary) {
		t.Errorf("install says %q", out)
	}
	dir := s.target()
	s.quiet("mount", "-t", "erofs-oci", im.ref, dir, "-o", "backend=fuse,plain_http,nosuid,on_error=wait:5s,cache_dir="+filepath.Join(s.dir, "cache"))
	s.reads(dir)
	if on := s.mountsOn(dir); len(on) != 1 || !strings.HasPrefix(on[0], im.ref+" ") || !strings.Contains(on[0], "ro,nosuid") {
		t.Errorf("mounted as %q", on)
	}
	// Mounting there again is a failure, and changes nothing.
	wantHelper(t, s.run("mount", "-t", "erofs-oci", im.ref, dir), 32, "already mounted")
	s.unmount(dir)

	s.quiet("mount", "-f", "-t", "erofs-oci", im.ref, dir)
	if on := s.mountsOn(dir); len(on) != 0 {
		t.Errorf("mount -f mounts %q", on)
	}
	for options, want := range map[string]string{
		"password=" + secret:                 "a password is not taken here",
		"username=alice,password=" + secret:  "nobody can be asked for the password",
		"backend=zfs":                        "not known",
		"nosuch":                             `"nosuch" is not known`,
		"remount,nosuid":                     "unmount it and mount it anew",
		"tmpfs_overlay,overlay=" + s.dir:     "overlay",
		"layer=-1":                           "counted from 0",
		"on_error=never":                     "want wait:DURATION",
		"blob=sha256:nonsense,backend=fuse":  "sha256:HEX",
		"cache_dir=,backend=fuse,plain_http": "needs a value",
	} {
		r := s.run("mount", "-t", "erofs-oci", im.ref, dir, "-o", options)
		wantHelper(t, r, 1, want)
		if strings.Contains(r.stderr, secret) {
			t.Errorf("the password is in %q", r.stderr)
		}
	}
	wantHelper(t, s.run("mount", "-t", "erofs-oci", im.Addr()+"/net/nosuch:v1", dir), 32, "nosuch")
	s.must("helper", "remove")
	if r := s.run("ls", "/sbin"); r.stdout != "" {
		t.Errorf("left in /sbin: %q", r.stdout)
	}
}

func wantHelper(t *testing.T, r result, code int, word string) {
	t.Helper()
	if r.code != code || !strings.Contains(r.stderr, word) || !strings.HasPrefix(r.stderr, "erofs-oci: ") || strings.Count(r.stderr, "\n") != 1 {
		t.Errorf("exit code %d, %q; want %d and one line with %q", r.code, r.stderr, code, word)
	}
}

// TestFstab: mount -a mounts what fstab(5) has, once, and those who want no network
// leave it alone.
func TestFstab(t *testing.T) {
	im := serveImage(t)
	s := newSession(t)
	s.inMachine()
	s.must("helper", "install")
	plain, writable, later := s.target(), s.target(), s.target()
	fstab := filepath.Join(s.dir, "fstab")
	// mount -a compares these with what is mounted, as they are written.
	must(t, os.WriteFile(fstab, fmt.Appendf(nil, "# a comment\ndocker://%s %s erofs-oci defaults,_netdev,backend=fuse 0 0\n"+
		"%s %s erofs-oci _netdev,nofail,x-systemd.requires=network-online.target,backend=fuse,tmpfs_overlay 0 0\n"+
		"%s %s erofs-oci noauto,ro,noexec,backend=fuse 0 0\n", im.ref, plain, im.ref, writable, im.ref, later), 0o644))

	s.quiet("mount", "-T", fstab, "-a", "-O", "no_netdev")
	if l := s.list(); len(l) != 0 {
		t.Errorf("without a network: %+v", l)
	}
	for range 2 {
		s.quiet("mount", "-T", fstab, "-a")
		if l := s.list(); len(l) != 2 || len(s.mountsOn(plain)) != 1 || len(s.mountsOn(writable)) != 1 {
			t.Fatalf("mount -a: %+v", l)
		}
	}
	s.reads(plain)
	s.reads(writable)
	s.quiet("touch", filepath.Join(writable, "written"))
	if r := s.run("touch", filepath.Join(plain, "written")); r.code == 0 {
		t.Error("the other mount is writable")
	}
	s.quiet("mount", "-T", fstab, later)
	if on := s.mountsOn(later); len(on) != 1 || !strings.Contains(on[0], "noexec") {
		t.Errorf("mounted as %q", on)
	}
	for _, dir := range []string{plain, writable, later} {
		s.unmount(dir)
	}
	if l := s.list(); len(l) != 0 {
		t.Errorf("after all: %+v", l)
	}
}

// TestFstabUser: a plain user mounts, and unmounts, what fstab(5) has for users.
func TestFstabUser(t *testing.T) {
	require.Has(t, "setpriv", "fusermount3")
	im := serveImage(t)
	s := newSession(t)
	s.asNobody()
	s.wrap = nil
	s.inMachine()
	s.must("helper", "install")
	dir := s.nobodysTarget()
	fstab := filepath.Join(s.dir, "fstab")
	must(t, os.WriteFile(fstab, fmt.Appendf(nil, "%s %s erofs-oci user,noauto,backend=fuse 0 0\n", im.ref, dir), 0o644))
	s.quiet("mount", "--bind", fstab, "/etc/fstab")
	s.wrap = append(s.wrap, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")
	s.quiet("mount", dir)
	s.reads(dir)
	if on := s.mountsOn(dir); len(on) != 1 || !strings.Contains(on[0], "ro,nosuid,nodev,noexec") || !strings.Contains(on[0], "user_id=65534") {
		t.Errorf("mounted as %q", on)
	}
	s.unmount(dir)
}
