// Package dockerregistry runs a real registry for a test: the docker-registry
// that Debian packages, which is the distribution project's.
//
// It serves plain HTTP on a free port of 127.0.0.1 from a directory of the test,
// and ends with the test. A test that uses it is skipped where the program is
// missing, unless the program is demanded (see package require).
package dockerregistry

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"syscall"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/tests/require"
)

// Options of a registry. The zero value is an open, empty one.
type Options struct {
	// Upstream makes it a pull-through cache of the registry at this URL.
	Upstream string
	// Config is more of its configuration, in YAML: auth, say.
	Config string
}

// A Registry serves until the test ends, or Kill.
type Registry struct {
	Addr string // host:port
	kill func()
}

// Kill ends the registry at once, in the middle of whatever it does.
func (r *Registry) Kill() { r.kill() }

// Start returns the host:port of a fresh, empty registry, once it accepts
// connections.
func Start(t testing.TB) string {
	t.Helper()
	return StartWith(t, Options{}).Addr
}

// StartWith starts a registry and returns once it accepts connections.
func StartWith(t testing.TB, o Options) *Registry {
	t.Helper()
	require.Has(t, "docker-registry")
	dir := t.TempDir()
	config := filepath.Join(dir, "config.yml")
	text := fmt.Appendf(nil, configuration, filepath.Join(dir, "data"))
	if o.Upstream != "" {
		text = fmt.Appendf(text, "proxy:\n  remoteurl: %s\n", o.Upstream)
	}
	text = append(text, o.Config...)
	if err := os.WriteFile(config, text, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("docker-registry", "serve", config)
	// Its telemetry looks for a collector and complains when there is none.
	cmd.Env = append(os.Environ(), "OTEL_TRACES_EXPORTER=none")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	r, w := io.Pipe()
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		t.Fatalf("docker-registry: %v", err)
	}
	addr := make(chan string, 1)
	logDone := make(chan struct{})
	go func() {
		defer close(logDone)
		watch(r, addr)
	}()
	ended := make(chan error, 1)
	go func() {
		err := cmd.Wait()
		_ = w.Close() // ends watch; a pipe's Close cannot fail
		ended <- err
	}()
	kill := func() {
		_ = cmd.Process.Kill() // fails only if it has ended by itself
		<-logDone
	}
	t.Cleanup(kill)
	select {
	case a := <-addr:
		return &Registry{Addr: a, kill: kill}
	case err := <-ended:
		t.Fatalf("docker-registry ended: %v", err)
	case <-time.After(30 * time.Second):
		t.Fatal("docker-registry does not listen after 30 seconds")
	}
	panic("unreachable")
}

const configuration = `version: 0.1
log:
  level: info
storage:
  filesystem:
    rootdirectory: %s
http:
  addr: 127.0.0.1:0
`

var listening = regexp.MustCompile(`listening on (127\.0\.0\.1:\d+)`)

// watch reads the log to its end, so that the registry never blocks on it, and
// sends the address that it says it listens on.
func watch(log io.Reader, addr chan<- string) {
	lines := bufio.NewScanner(log)
	found := false
	for lines.Scan() {
		if m := listening.FindSubmatch(lines.Bytes()); m != nil && !found {
			found = true
			addr <- string(m[1])
		}
	}
	_, _ = io.Copy(io.Discard, log) // a line too long for the scanner is no reason to stop
}
