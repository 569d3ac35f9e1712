package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
)

// Each directory takes several chunks.
const (
	longNames = 8000
	longName  = 200
)

func longNamed(dir, i int) string { return fmt.Sprintf("d%d/%0*d", dir, longName, i) }

// servedDirs is an image of directories that are far from each other, and a user who can mount it.
func servedDirs(t *testing.T, dirs int) (servedImage, *session) {
	t.Helper()
	im, s := served(t)
	var image memory
	b, err := mkerofs.New(&image, mkerofs.Options{})
	must(t, err)
	add := func(path string, data []byte) {
		must(t, b.Add(mkerofs.Entry{
			Path: path, Mode: mkerofs.ModeRegular | 0o644, Size: int64(len(data)),
			Open: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil },
		}))
	}
	for d := range dirs {
		for i := range longNames {
			add(longNamed(d, i), nil)
		}
	}
	add(deepFile, content(deepFile, deepSize))
	add(bigFile, content(bigFile, bigSize))
	_, err = b.Finish(t.Context())
	must(t, err)
	layer := ocipush.Bytes(registry.MediaTypeErofs, image)
	_, err = ocipush.Push(context.Background(), im.URL(), "net/dirs:v1", []ocipush.Layer{layer}, ocipush.Options{})
	must(t, err)
	im.ref = im.Addr() + "/net/dirs:v1"
	return im, s
}

// silence has the registry take requests and answer none until the silence ends.
func silence(t *testing.T, im servedImage) (end func()) {
	released := make(chan struct{})
	im.SetFault(func(*http.Request) *fakeregistry.Fault { return &fakeregistry.Fault{After: -1, Stall: released} })
	end = sync.OnceFunc(func() {
		im.SetFault(nil)
		close(released)
	})
	t.Cleanup(end)
	return end
}

// awaitProc waits until a file of a process in /proc says something. Nobody tells of that, so it is looked for.
func awaitProc(t *testing.T, cmd *exec.Cmd, file, want string) {
	t.Helper()
	path := fmt.Sprintf("/proc/%d/%s", cmd.Process.Pid, file)
	var last string
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		b, err := os.ReadFile(path)
		must(t, err)
		if last = string(b); strings.Contains(last, want) {
			return
		}
	}
	t.Fatalf("%v: %s does not say %q within %v: %q", cmd.Args, path, want, patience, last)
}

// Where the kernel has a process wait: for the answer to a request, and for a page.
const (
	forAnswer = "request_wait_answer"
	forPage   = "folio_wait_bit"
)

// dies kills a command and fails the test unless it ends soon, by that.
func dies(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	begin := time.Now()
	must(t, cmd.Process.Kill())
	cmd.Wait()
	took := time.Since(begin)
	if st := cmd.ProcessState.Sys().(syscall.WaitStatus); !st.Signaled() || st.Signal() != syscall.SIGKILL {
		t.Errorf("%v: %v", cmd.Args, cmd.ProcessState)
	}
	t.Logf("%s ended %v after it was killed", cmd.Args[0], took.Round(time.Millisecond))
	if took > 5*time.Second {
		t.Errorf("%v lived for %v after it was killed", cmd.Args, took)
	}
}

// TestKilledWhileWaiting: who is killed does not wait for a registry that does not answer, whatever it waits for, also
// where another signal has come before. What is here is served meanwhile, nothing is logged or counted as failed, and
// who waits for the same gets it when the registry answers.
func TestKilledWhileWaiting(t *testing.T) {
	im, s := servedDirs(t, 5)
	dir := s.mount(im.ref, "--prefetch=none", "--log-level=debug")
	at := func(path string) string { return filepath.Join(dir, path) }
	here := func() {
		t.Helper()
		for _, c := range [][]string{{"stat", at(longNamed(0, 0)), at("d1"), at("d2"), at("d3"), at("d4"), at(bigFile)}, {"ls", filepath.Dir(at(deepFile))}} {
			if r := s.run(c[0], c[1:]...); r.code != 0 {
				t.Errorf("%+v", r)
			}
		}
	}
	here() // so that what each command waits for is the first that it asks for
	end := silence(t, im)
	start := func(name string, args ...string) *exec.Cmd {
		cmd := s.command(t.Context(), name, args...)
		must(t, cmd.Start())
		t.Cleanup(func() { cmd.Process.Kill() })
		return cmd
	}
	for _, c := range []struct {
		command []string
		waits   string
	}{
		{[]string{"ls", "-l", at("d1")}, forAnswer},
		{[]string{"stat", at(longNamed(2, longNames/2))}, forAnswer},
		{[]string{"cat", at(bigFile)}, forPage},
		{[]string{"sh", "-c", `trap : USR1; [ -e "$0" ]; exec sleep 100`, at(longNamed(3, longNames/2))}, forAnswer},
	} {
		cmd := start(c.command[0], c.command[1:]...)
		awaitProc(t, cmd, "wchan", c.waits)
		if c.command[0] == "sh" {
			must(t, cmd.Process.Signal(unix.SIGUSR1))
			awaitProc(t, cmd, "status", "State:\tD") // only what kills can wake it now
		}
		dies(t, cmd)
	}
	here()
	// Two wait for the same directory, and one of them is killed.
	var listed bytes.Buffer
	killed, lives := start("ls", at("d4")), s.command(t.Context(), "ls", at("d4"))
	lives.Stdout = &listed
	must(t, lives.Start())
	for _, cmd := range []*exec.Cmd{killed, lives} {
		awaitProc(t, cmd, "wchan", forAnswer)
	}
	dies(t, killed)
	end()
	must(t, lives.Wait())
	if n := strings.Count(listed.String(), "\n"); n != longNames {
		t.Errorf("%d names are listed", n)
	}
	if n := s.metrics(dir).sum(t, "read_errors_total"); n != 0 {
		t.Errorf("%v reads are counted as failed", n)
	}
	if log := s.serverLog(dir); strings.Contains(log, "request failed") {
		t.Errorf("the log says that requests failed: %s", log)
	}
}
