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
	child, err := AsChild()
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
		log, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			return 9
		}
		if child.Ready(log) != nil {
			return 9
		}
		cwd, _ := os.Getwd()
		fmt.Fprintf(os.Stderr, "read %q in %s\n", said, cwd)
		if os.Rename(path, path+".done") != nil {
			return 9
		}
	}
	return 0
}

func TestStartInBackground(t *testing.T) {
	start := func(ctx context.Context, role string, stdin io.Reader) error {
		t.Setenv(roleEnv, role)
		return StartInBackground(ctx, stdin)
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
	log := filepath.Join(t.TempDir(), "log")
	if err := start(t.Context(), "ready="+log, strings.NewReader("secret")); err != nil {
		t.Fatal(err)
	}
	if got := awaitFile(t, log+".done"); got != "read \"secret\" in /\n" {
		t.Errorf("the child wrote %q", got)
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
	if c, err := AsChild(); c != nil || err != nil {
		t.Errorf("AsChild = %v, %v", c, err)
	}
	t.Setenv(reportEnv, "three")
	if _, err := AsChild(); err == nil {
		t.Error("a descriptor that is no number is taken")
	}
}
