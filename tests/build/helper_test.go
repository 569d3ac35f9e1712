package build

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/built"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/debian"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// binary is the program under test.
var binary string

func TestMain(m *testing.M) { os.Exit(built.Main(m, map[*string]string{&binary: built.ErofsOCI})) }

// A user has directories of its own, in which nothing may be left.
type user struct {
	t   testing.TB
	tmp string // for temporary files of the program
	env []string
}

func newUser(t testing.TB) *user {
	t.Helper()
	dir := t.TempDir()
	u := &user{t: t, tmp: filepath.Join(dir, "tmp")}
	for _, d := range []string{"run", "cache", "home", "tmp"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	u.env = append(os.Environ(), "EROFS_OCI_RUN_DIR="+filepath.Join(dir, "run"), "XDG_CACHE_HOME="+filepath.Join(dir, "cache"),
		"HOME="+filepath.Join(dir, "home"), "TMPDIR="+u.tmp)
	return u
}

// result is how a command ended.
type result struct {
	stdout, stderr string
	code           int
}

// command is the program with arguments, in a directory where temporary files have no business.
func (u *user) command(args ...string) *exec.Cmd {
	cmd := exec.CommandContext(u.t.Context(), binary, args...)
	cmd.Dir, cmd.Env = filepath.Dir(u.tmp), u.env
	return cmd
}

// run runs the program to its end, whatever that is.
func (u *user) run(args ...string) result {
	u.t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := u.command(args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	return u.ended(cmd.Run(), &stdout, &stderr)
}

func (u *user) ended(err error, stdout, stderr *bytes.Buffer) result {
	u.t.Helper()
	r := result{stdout: stdout.String(), stderr: stderr.String()}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		r.code = exit.ExitCode()
	case err != nil:
		u.t.Fatal(err)
	}
	u.nothingLeft()
	return r
}

// nothingLeft fails the test for a temporary file with a name.
func (u *user) nothingLeft() {
	u.t.Helper()
	if left, err := os.ReadDir(u.tmp); err != nil || len(left) > 0 {
		u.t.Errorf("temporary files are left: %v, %v", left, err)
	}
}

// must runs the program, which must succeed, and returns what it prints.
func (u *user) must(args ...string) string {
	u.t.Helper()
	r := u.run(args...)
	if r.code != 0 {
		u.t.Fatalf("erofs-oci %q: exit code %d: %s%s", args, r.code, r.stderr, r.stdout)
	}
	return r.stdout
}

// digest runs the program with --quiet after the command, and returns the digest that it prints.
func (u *user) digest(command string, args ...string) string {
	u.t.Helper()
	out := u.must(append([]string{command, "--quiet"}, args...)...)
	d := strings.TrimSpace(out)
	if !strings.HasPrefix(d, "sha256:") || strings.ContainsAny(d, " \n") {
		u.t.Fatalf("%s --quiet prints %q", command, out)
	}
	return d
}

// fails runs the program, which must say in one line why it cannot do it. It returns the line.
func (u *user) fails(code int, args ...string) string {
	u.t.Helper()
	r := u.run(args...)
	if r.code != code || strings.Count(r.stderr, "\n") != 1 || !strings.HasPrefix(r.stderr, "erofs-oci: ") || r.stdout != "" {
		u.t.Errorf("erofs-oci %q: exit code %d, want %d and one line: %q, %q", args, r.code, code, r.stderr, r.stdout)
	}
	return r.stderr
}

// same fails the test unless the program's own diff finds none between two trees.
func (u *user) same(a, b string, flags ...string) {
	u.t.Helper()
	r := u.run(append(append([]string{"diff"}, flags...), a, b)...)
	if r.code != 0 || !strings.Contains(r.stdout, "no differences in ") {
		u.t.Errorf("diff %s %s: exit code %d: %.2000s%.2000s", a, b, r.code, r.stderr, r.stdout)
	}
}

// other runs somebody else's program, which must succeed.
func other(t testing.TB, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v: %s", name, args, err, stderr.Bytes())
	}
	return string(out)
}

// digestOf is what a manifest is known by.
func digestOf(text string) string { return digest.FromString(text).String() }

func must(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// sound fails the test unless fsck.erofs and our own check find nothing wrong with an image.
func (u *user) sound(utils *debian.Utils, image string) {
	u.t.Helper()
	if said, err := utils.Command(u.t.Context(), "fsck.erofs", image).CombinedOutput(); err != nil || bytes.Contains(said, []byte("<W>")) {
		u.t.Errorf("fsck.erofs: %v: %s", err, said)
	}
	if r := u.run("check", image); r.code != 0 {
		u.t.Errorf("check: %s%s", r.stdout, r.stderr)
	}
}

// kernelShows fails the test unless the kernel's own mount of an image shows want.
func kernelShows(t testing.TB, image string, want []corpus.Entry, except ...tree.Field) {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount(image, dir, "erofs", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, ""); err != nil {
		t.Fatalf("mount %s: %v", image, err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	shows(t, dir, want, except...)
}

// shows fails the test unless a directory has what want says, but for what no copy has in common with its original.
func shows(t testing.TB, dir string, want []corpus.Entry, except ...tree.Field) {
	t.Helper()
	diffs := tree.Diff(want, walk(t, dir), append(except, tree.Ino, tree.DirNlink)...)
	for i, d := range diffs {
		if i == 10 {
			t.Errorf("and %d more", len(diffs)-i)
			break
		}
		t.Error(d)
	}
}

func walk(t testing.TB, dir string) []corpus.Entry {
	t.Helper()
	entries, err := tree.Walk(dir)
	must(t, err)
	if len(entries) < 2 {
		t.Fatalf("%s has %d paths: nothing to compare", dir, len(entries))
	}
	return entries
}
