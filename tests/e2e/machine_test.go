package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/tests/built"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// The programs under test, built once.
var (
	binary string // erofs-oci, static
	demo   string
)

func TestMain(m *testing.M) {
	os.Exit(built.Main(m, map[*string]string{&binary: built.ErofsOCI, &demo: built.Demo}))
}

// session is a user's environment of its own: state, cache and home directory.
type session struct {
	t   *testing.T
	dir string
	env []string
	// wrap runs a command as somebody else, or somewhere else.
	wrap []string
}

func newSession(t *testing.T) *session {
	t.Helper()
	dir, err := os.MkdirTemp("", "erofs-oci-session-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	s := &session{t: t, dir: dir}
	for _, d := range []string{"run", "cache", "home"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	s.env = append(os.Environ(),
		"EROFS_OCI_RUN_DIR="+filepath.Join(dir, "run"),
		"XDG_CACHE_HOME="+filepath.Join(dir, "cache"),
		"HOME="+filepath.Join(dir, "home"),
		"TMPDIR="+dir,
		"EROFS_OCI_BACKEND=fuse",
	)
	return s
}

// result is how a command ended.
type result struct {
	stdout, stderr string
	code           int
}

func (s *session) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	all := append(append([]string{}, s.wrap...), append([]string{name}, args...)...)
	cmd := exec.CommandContext(ctx, all[0], all[1:]...)
	cmd.Env = s.env
	cmd.Dir = s.dir
	return cmd
}

// run runs a command to its end, however it ends.
func (s *session) run(name string, args ...string) result {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := s.command(ctx, name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if ctx.Err() != nil {
		s.t.Fatalf("%s %q does not end", name, args)
	}
	if cmd.ProcessState == nil {
		s.t.Fatalf("%s %q: %v", name, args, err)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// must runs erofs-oci and fails the test unless it succeeds without a word on
// standard error.
func (s *session) must(args ...string) string {
	s.t.Helper()
	r := s.run(binary, args...)
	if r.code != 0 || r.stderr != "" {
		s.t.Fatalf("erofs-oci %q: exit code %d, %s", args, r.code, r.stderr)
	}
	return r.stdout
}

// target makes a directory to mount on, and sees to it that nothing is left on
// it when the test ends.
func (s *session) target() string {
	s.t.Helper()
	dir, err := os.MkdirTemp(s.dir, "mnt-")
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		if mounted(s.t, dir) {
			if !s.t.Failed() {
				s.t.Errorf("%s is left mounted", dir)
			}
			s.run("umount", "-l", dir)
		}
	})
	return dir
}

// mount mounts ref on a new directory and unmounts it when the test ends, unless
// the test has.
func (s *session) mount(ref string, flags ...string) string {
	s.t.Helper()
	dir := s.target()
	s.must(append(append([]string{"mount"}, flags...), ref, dir)...)
	s.t.Cleanup(func() {
		if mounted(s.t, dir) {
			s.must("umount", dir)
		}
	})
	return dir
}

func mounted(t *testing.T, dir string) bool {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Contains(string(b), " "+dir+" ")
}

// kernelMount mounts an image file with the kernel's erofs on a loop device.
func kernelMount(t *testing.T, image string) string {
	t.Helper()
	require.Has(t, "root", "kernel-erofs", "loop")
	dir := t.TempDir()
	if said, err := exec.Command("mount", "-t", "erofs", "-o", "ro,loop", image, dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, said)
	}
	t.Cleanup(func() {
		if said, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, said)
		}
	})
	return dir
}

// sameTree fails the test unless two directories show the same.
func sameTree(t *testing.T, want, got string, except ...tree.Field) {
	t.Helper()
	w, err := tree.Walk(want)
	if err != nil {
		t.Fatal(err)
	}
	g, err := tree.Walk(got)
	if err != nil {
		t.Fatal(err)
	}
	if len(w) < 2 {
		t.Fatalf("%s has %d paths: nothing to compare", want, len(w))
	}
	diffs := tree.Diff(w, g, except...)
	for i, d := range diffs {
		if i == 10 {
			t.Errorf("and %d more", len(diffs)-i)
			break
		}
		t.Error(d)
	}
	t.Logf("%d paths equal", len(w)-len(diffs))
}

// listed is an entry of list --json.
type listed struct {
	Dir     string `json:"dir"`
	PID     int    `json:"pid"`
	State   string `json:"state"`
	Log     string `json:"log"`
	Backend string `json:"backend"`
}

func (s *session) list() []listed {
	s.t.Helper()
	var all []listed
	if err := json.Unmarshal([]byte(s.must("list", "--json")), &all); err != nil {
		s.t.Fatal(err)
	}
	return all
}

// entry is the listed mount on dir.
func (s *session) entry(dir string) listed {
	s.t.Helper()
	for _, e := range s.list() {
		if e.Dir == dir {
			return e
		}
	}
	s.t.Fatalf("%s is not listed", dir)
	return listed{}
}

func (s *session) serverLog(dir string) string {
	s.t.Helper()
	b, err := os.ReadFile(s.entry(dir).Log)
	if err != nil {
		s.t.Fatal(err)
	}
	return string(b)
}
