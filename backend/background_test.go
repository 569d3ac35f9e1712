package backend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

const roleEnv = "EROFS_OCI_TEST_ROLE"

// TestMain plays the child of TestStartInBackground in the processes that it
// starts.
func TestMain(m *testing.M) {
	if role, ok := os.LookupEnv(roleEnv); ok {
		os.Exit(playChild(role))
	}
	os.Exit(m.Run())
}

func playChild(role string) int {
	child, err := AsChild(func() { syscall.Exit(5) })
	if err != nil || child == nil {
		fmt.Fprintln(os.Stderr, "not a child:", err)
		return 9
	}
	name, path, _ := strings.Cut(role, "=")
	switch name {
	case "fail":
		child.Fail(errors.New("no such luck"), 2)
		return 2
	case "die":
		return 7
	case "wait":
		// Until the parent's signal.
		syscall.Pause()
	case "ready":
		said, err := io.ReadAll(os.Stdin)
		if err != nil {
			return 9
		}
		log, err := OpenLog(path)
		if err != nil {
			return 9
		}
		if child.Ready(log) != nil {
			return 9
		}
		cwd, err := os.Getwd()
		if err != nil {
			return 9
		}
		comm, err := os.ReadFile("/proc/self/comm")
		if err != nil {
			return 9
		}
		// Fill the log so that it is continued: the output goes along.
		if _, err := log.Write(make([]byte, maxLog)); err != nil {
			return 9
		}
		fmt.Fprintf(os.Stderr, "read %q in %s as %sinherited %v\n", said, cwd, comm, inherited())
		if os.Rename(path, path+".done") != nil {
			return 9
		}
	}
	return 0
}

// inherited tells whether a descriptor that the parent left open is here, too.
func inherited() bool {
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return true
	}
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && filepath.Base(to) == "left-open" {
			return true
		}
	}
	return false
}

func TestStartInBackground(t *testing.T) {
	start := func(ctx context.Context, role string, stdin io.Reader) error {
		t.Setenv(roleEnv, role)
		return StartInBackground(ctx, os.Args[1:], stdin)
	}
	var failed *ChildError
	if err := start(t.Context(), "fail", nil); !errors.As(err, &failed) || failed.Code != 2 || failed.Text != "no such luck" {
		t.Errorf("a child that fails: %v", err)
	}
	if err := start(t.Context(), "die", nil); err == nil || !strings.Contains(err.Error(), "exit status 7") {
		t.Errorf("a child that ends early: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := start(ctx, "wait", nil); err == nil || !strings.Contains(err.Error(), syscall.SIGTERM.String()) {
		t.Errorf("a child whose parent gives up: %v", err)
	}
	// Descriptors of the caller without close-on-exec, as a shell's redirection
	// makes them.
	left, err := syscall.Open(filepath.Join(t.TempDir(), "left-open"), syscall.O_CREAT|syscall.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(left)
	log := filepath.Join(t.TempDir(), "log")
	if err := start(t.Context(), "ready="+log, strings.NewReader("secret")); err != nil {
		t.Fatal(err)
	}
	comm := filepath.Base(os.Args[0])
	want := fmt.Sprintf("read \"secret\" in / as %s\ninherited false\n", comm[:min(len(comm), 15)])
	if got := strings.TrimLeft(awaitFile(t, log+".done"), "\x00"); got != want {
		t.Errorf("the child wrote %q, want %q", got, want)
	}
}

// awaitFile waits for a file to appear, for another process has no other way to
// tell us.
func awaitFile(t *testing.T, path string) string {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if b, err := os.ReadFile(path); err == nil {
			return string(b)
		}
	}
	t.Fatalf("%s did not appear", path)
	return ""
}

func TestNoChild(t *testing.T) {
	if c, err := AsChild(nil); c != nil || err != nil {
		t.Errorf("AsChild = %v, %v", c, err)
	}
	t.Setenv(reportEnv, "three")
	if _, err := AsChild(nil); err == nil {
		t.Error("a descriptor that is no number is taken")
	}
}
