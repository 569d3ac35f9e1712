package e2e

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/require"
)

const nobody = 65534

// asNobody makes the session a plain user's who may use /dev/fuse, as on every
// desktop and in most containers.
func (s *session) asNobody() {
	s.t.Helper()
	require.Has(s.t, "root", "fuse", "setpriv")
	openFuse(s.t)
	s.wrap = append([]string{"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"}, s.wrap...)
	err := filepath.WalkDir(s.dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, nobody, nobody)
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

// openFuse lets everybody use /dev/fuse until the test ends.
func openFuse(t *testing.T) {
	t.Helper()
	st, err := os.Stat("/dev/fuse")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod("/dev/fuse", 0o666); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Chmod("/dev/fuse", st.Mode().Perm()); err != nil {
			t.Error(err)
		}
	})
}

// nobodysTarget is a directory to mount on that belongs to the plain user.
func (s *session) nobodysTarget() string {
	s.t.Helper()
	dir := s.target()
	if err := os.Chown(dir, nobody, nobody); err != nil {
		s.t.Fatal(err)
	}
	return dir
}

// TestPlainUser mounts through fusermount3, reads, and unmounts: with our own
// command and with the helper itself.
func TestPlainUser(t *testing.T) {
	require.Has(t, "fusermount3")
	im := serveImage(t)
	s := newSession(t)
	s.asNobody()
	for _, unmount := range [][]string{{binary, "umount"}, {"fusermount3", "-u"}} {
		dir := s.nobodysTarget()
		s.must("mount", im.ref, dir)
		sum := s.run("cksum", filepath.Join(dir, deepFile))
		want := s.ownCksum(content(deepFile, deepSize))
		if sum.code != 0 || !strings.HasPrefix(sum.stdout, want+" ") {
			t.Errorf("cksum %q, %s; want %s", sum.stdout, sum.stderr, want)
		}
		if e := s.entry(dir); e.State != "running" {
			t.Errorf("listed as %+v", e)
		}
		server := s.pidfd(dir)
		if r := s.run(unmount[0], append(unmount[1:], dir)...); r.code != 0 || r.stderr != "" {
			t.Errorf("%q: %d, %s", unmount, r.code, r.stderr)
		}
		awaitEnd(t, server)
		if l := s.list(); len(l) != 0 {
			t.Errorf("after %q: %+v", unmount, l)
		}
	}
	// Options that only root may set are refused with a reason.
	r := s.run(binary, "mount", "-o", "nosymfollow", im.ref, s.nobodysTarget())
	if r.code != 1 || !strings.Contains(r.stderr, "only root can set it") || strings.Count(r.stderr, "\n") != 1 {
		t.Errorf("nosymfollow: %d, %q", r.code, r.stderr)
	}
	// A directory of somebody else.
	r = s.run(binary, "mount", im.ref, "/etc")
	if r.code != 1 || !strings.Contains(r.stderr, "/etc") || strings.Count(r.stderr, "\n") != 1 || mounted(t, "/etc") {
		t.Errorf("somebody else's directory: %d, %q", r.code, r.stderr)
	}
}

func (s *session) ownCksum(data []byte) string {
	s.t.Helper()
	path := filepath.Join(s.t.TempDir(), "data")
	if err := os.WriteFile(path, data, 0o644); err != nil {
		s.t.Fatal(err)
	}
	owner := *s
	owner.wrap = nil
	out, _, _ := strings.Cut(owner.run("cksum", path).stdout, " /")
	return out
}

// pidfd refers to the server of the mount on dir.
func (s *session) pidfd(dir string) int {
	s.t.Helper()
	fd, err := unix.PidfdOpen(s.entry(dir).PID, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// awaitEnd waits until a process has ended.
func awaitEnd(t *testing.T, pidfd int) {
	t.Helper()
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 20_000)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || n != 1 {
			t.Errorf("the server does not end: %d, %v", n, err)
		}
		return
	}
}

// TestUserNamespace is a container of CI: a plain user, root in a user namespace
// of its own, without fusermount3. That root may not read trusted.* attributes and
// is not shown them.
func TestUserNamespace(t *testing.T) {
	require.Has(t, "userns", "unshare")
	im := serveImage(t)
	s := newSession(t)
	s.asNobody()
	dir := s.nobodysTarget()
	script := `set -e
for f in /bin/fusermount3 /bin/fusermount; do [ ! -e $f ] || mount --bind /dev/null $f; done
! [ -x /bin/fusermount3 ]
"$0" mount "$1" "$2"
cksum < "$2/` + deepFile + `"
[ "$(getfattr -m - "$2/` + deepFile + `" | grep -c '\.note$')" = 1 ]
"$0" list
"$0" umount "$2"
"$0" list
`
	r := s.run("unshare", "-Urm", "sh", "-c", script, binary, im.ref, dir)
	if r.code != 0 {
		t.Fatalf("exit code %d: %s", r.code, r.stderr)
	}
	if want := s.ownCksum(content(deepFile, deepSize)); !strings.HasPrefix(r.stdout, want+"\n") || strings.Count(r.stdout, "running") != 1 {
		t.Errorf("got %q, want the checksum %s and one running mount", r.stdout, want)
	}
	left, err := os.ReadDir(filepath.Join(s.dir, "run"))
	if err != nil || len(left) != 0 {
		t.Errorf("left in the run directory: %v, %v", left, err)
	}
}

// TestNoFuse: where mounting cannot work, one line says why and what to do.
func TestNoFuse(t *testing.T) {
	require.Has(t, "root", "fuse", "unshare")
	im := serveImage(t)
	t.Run("no device", func(t *testing.T) {
		s := newSession(t)
		script := `mount -t tmpfs none /dev && mknod /dev/null c 1 3 && exec "$0" mount "$1" "$2"`
		wantLine(t, s.run("unshare", "-m", "sh", "-c", script, binary, im.ref, s.target()),
			"FUSE is not to be had here", "--device /dev/fuse")
	})
	t.Run("no right", func(t *testing.T) {
		s := newSession(t)
		s.asNobody()
		dir := s.nobodysTarget()
		// Without the helper, in a mount namespace where nothing has its place.
		s.wrap = append([]string{"unshare", "-m", "sh", "-c",
			`for f in /bin/fusermount3 /bin/fusermount; do [ ! -e $f ] || mount --bind /dev/null $f || exit 9; done; exec "$0" "$@"`}, s.wrap...)
		wantLine(t, s.run(binary, "mount", im.ref, dir), "no right to mount", "fusermount3 is not installed", "unshare -Urm")
	})
}

func wantLine(t *testing.T, r result, words ...string) {
	t.Helper()
	if r.code != 1 || strings.Count(r.stderr, "\n") != 1 {
		t.Errorf("exit code %d, %q; want 1 and one line", r.code, r.stderr)
	}
	for _, w := range words {
		if !strings.Contains(r.stderr, w) {
			t.Errorf("%q is not in %q", w, r.stderr)
		}
	}
}

// TestDemo runs what make demo runs, as root and as a plain user.
func TestDemo(t *testing.T) {
	require.Has(t, "root", "fuse", "fusermount3")
	for _, user := range []string{"root", "nobody"} {
		t.Run(user, func(t *testing.T) {
			s := newSession(t)
			if user == "nobody" {
				s.asNobody()
			}
			checkDemo(t, s.run(demo, "-binary", binary), "mounted ")
			left, err := filepath.Glob(filepath.Join(s.dir, "erofs-oci-demo-*"))
			if err != nil || len(left) != 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		})
	}
	t.Run("without FUSE", func(t *testing.T) {
		s := newSession(t)
		s.wrap = []string{"unshare", "-m", "sh", "-c", `mount -t tmpfs none /dev && mknod /dev/null c 1 3 && exec "$0" "$@"`}
		checkDemo(t, s.run(demo, "-binary", binary), "no mount ")
	})
}

func checkDemo(t *testing.T, r result, how string) {
	t.Helper()
	if r.code != 0 || !strings.Contains(r.stdout, how) || !strings.Contains(r.stdout, "fetched ") || strings.Count(r.stdout, "\nread ") < 3 {
		t.Errorf("exit code %d:\n%s%s", r.code, r.stdout, r.stderr)
	}
}

// TestNoHome: a service without a home directory gets a private cache directory,
// and is told so once.
func TestNoHome(t *testing.T) {
	im := serveImage(t)
	s := newSession(t)
	s.asNobody()
	s.wrap = append([]string{"env", "-u", "HOME", "-u", "XDG_CACHE_HOME"}, s.wrap...)
	r := s.run(binary, "inspect", im.ref)
	if r.code != 0 || !strings.Contains(r.stdout, "erofs:") || strings.Count(r.stderr, "\n") != 1 || !strings.Contains(r.stderr, "--cache-dir") {
		t.Errorf("exit code %d, %s, %q", r.code, r.stdout, r.stderr)
	}
	private, err := os.Stat(filepath.Join(s.dir, "erofs-oci-65534", "cache"))
	if err != nil || private.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", private, err)
	}
}
