package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// programFile is where the guest finds erofs-oci.
const programFile = "/bin/erofs-oci"

// program runs erofs-oci and returns what it prints.
func program(t *testing.T, args ...string) string {
	t.Helper()
	said, err := tryProgram(t, args...)
	if err != nil {
		t.Fatal(err)
	}
	return said
}

// tryProgram is program for what may fail: what it complains of is in the error.
func tryProgram(t *testing.T, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, programFile, args...)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("erofs-oci %s: %w: %s", strings.Join(args, " "), err, stderr.String())
	}
	return stdout.String(), nil
}

// startRegistry starts a registry in this process.
func startRegistry(t *testing.T) *fakeregistry.Registry {
	t.Helper()
	r, err := fakeregistry.New(fakeregistry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// serveTree has a registry in this process serve the large tree.
func serveTree(t *testing.T) (r *fakeregistry.Registry, ref string) {
	t.Helper()
	r = startRegistry(t)
	f, err := os.Open(treeFile)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		t.Fatal(err)
	}
	layer := ocipush.Layer{MediaType: registry.MediaTypeErofs, Data: f, Size: size}
	if _, err := ocipush.Push(t.Context(), r.URL(), "tree:v1", []ocipush.Layer{layer}, ocipush.Options{}); err != nil {
		t.Fatal(err)
	}
	return r, r.Addr() + "/tree:v1"
}

// testProgram is the life of a mount, with the program itself: its registry goes
// away in mid-read and comes back, its server is killed and replaced, and umount(2)
// ends it all.
func testProgram(t *testing.T, _ version) {
	const onError = 2 * time.Second
	reg, ref := serveTree(t)
	want := largeListing(t)
	dir := t.TempDir()
	metrics := filepath.Join(t.TempDir(), "metrics")
	program(t, "mount", "--backend=nbd", "--plain-http", "--on-error=wait:"+onError.String(), "--metrics=unix:"+metrics, "--cache-dir", t.TempDir(), ref, dir)

	if _, err := tree.List(dir); err != nil {
		t.Error(err)
	}
	reg.Stop()
	begin := time.Now()
	_, err := tree.Walk(dir)
	// What was read ahead may have been waited for since before begin.
	if took := time.Since(begin); !errors.Is(err, unix.EIO) || took < onError/2 || took > 10*onError {
		t.Errorf("without a registry: %v after %v", err, took)
	}
	if err := reg.Start(); err != nil {
		t.Fatal(err)
	}
	same(t, want, dir, tree.Ino, tree.DirNlink)

	before := onlyEntry(t, "running")
	if err := syscall.Kill(before.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, before.PID)
	onlyEntry(t, "orphaned")
	dropCaches(t)
	program(t, "reattach", dir)
	same(t, want, dir, tree.Ino, tree.DirNlink)
	after := onlyEntry(t, "running")
	if after.PID == before.PID {
		t.Error("the new server is the old one")
	}
	// It counts from its own beginning, and shows that where the old one did.
	if n := scrape(t, metrics, "erofs_oci_cache_reads_total{result=\"miss\"} "); n == "" || n == "0" {
		t.Errorf("the new server has counted %q reads that had to wait", n)
	}

	if err := unix.Unmount(dir, 0); err != nil {
		t.Error(err)
	}
	awaitEnd(t, after.PID)
	if _, err := os.Lstat(metrics); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket of the metrics is left: %v", err)
	}
	leftInRunDir(t)
}

// scrape is what the metrics on a socket have behind a word.
func scrape(t *testing.T, socket, word string) string {
	t.Helper()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	defer transport.CloseIdleConnections()
	resp, err := (&http.Client{Transport: transport}).Get("http://metrics/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, word); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// testSupervised: the server is killed in mid-walk, again and again, and nobody
// has to do anything about it.
func testSupervised(t *testing.T, _ version) {
	_, ref := serveTree(t)
	want := largeListing(t)
	dir := t.TempDir()
	// Requests under way at a kill wait for the kernel's timeout, 30 s and this.
	program(t, "mount", "--backend=nbd", "--supervise", "--on-error=wait:1s", "--cache-dir", t.TempDir(), ref, dir)
	for range 2 {
		before := onlyEntry(t, "running")
		if err := syscall.Kill(before.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		awaitEnd(t, before.PID)
		dropCaches(t)
		same(t, want, dir, tree.Ino, tree.DirNlink)
		if after := onlyEntry(t, "running"); after.PID == before.PID {
			t.Error("the new server is the old one")
		}
	}
	program(t, "umount", dir)
	leftInRunDir(t)
}

func leftInRunDir(t *testing.T) {
	t.Helper()
	if left, err := filepath.Glob("/run/erofs-oci/*"); err != nil || len(left) > 0 {
		t.Errorf("left in the run directory: %v, %v", left, err)
	}
}

// testOverlayReattached: what is written over an nbd mount outlives the server.
func testOverlayReattached(t *testing.T, _ version) {
	_, ref := serveTree(t)
	dir := t.TempDir()
	program(t, "mount", "--backend=nbd", "--tmpfs-overlay", "--cache-dir", t.TempDir(), ref, dir)
	note := filepath.Join(dir, "note")
	if err := os.WriteFile(note, []byte("written"), 0o644); err != nil {
		t.Fatal(err)
	}
	before := onlyEntry(t, "running")
	if err := syscall.Kill(before.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, before.PID)
	onlyEntry(t, "orphaned")
	dropCaches(t)
	program(t, "reattach", "--all")
	if got, err := os.ReadFile(note); err != nil || string(got) != "written" {
		t.Errorf("read %q, %v", got, err)
	}
	if err := os.Remove(note); err != nil {
		t.Error(err)
	}
	same(t, largeListing(t), dir, tree.Ino, tree.DirNlink, tree.RootMtime)
	after := onlyEntry(t, "running")
	if err := unix.Unmount(dir, 0); err != nil {
		t.Error(err)
	}
	awaitEnd(t, after.PID)
	leftInRunDir(t)
}

type entry struct {
	PID     int    `json:"pid"`
	State   string `json:"state"`
	Backend string `json:"backend"`
}

// onlyEntry is the only mount that erofs-oci list shows.
func onlyEntry(t *testing.T, state string) entry {
	t.Helper()
	var all []entry
	text := program(t, "list", "--json")
	if err := json.Unmarshal([]byte(text), &all); err != nil || len(all) != 1 || all[0].State != state {
		t.Fatalf("listed %s; want one mount that is %s (%v)", text, state, err)
	}
	return all[0]
}

// awaitEnd returns when the process has ended: its descriptor is readable then.
func awaitEnd(t *testing.T, pid int) {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(p, int((20 * time.Second).Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			t.Fatalf("process %d does not end (%v)", pid, err)
		}
		return
	}
}
