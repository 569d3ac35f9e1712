package guest

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// insideEnv is set in the guest, where this same program runs again.
const insideEnv = "EROFS_OCI_INSIDE_GUEST"

// only passes a -run pattern on to the tests in the guest.
var only = flag.String("inside", "", "run only the tests in the guest that match `PATTERN`")

func TestMain(m *testing.M) {
	if text, ok := os.LookupEnv(serverEnv); ok {
		if err := serverMain(text); err != nil {
			fmt.Fprintln(os.Stderr, "server:", err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// suites have the kernels that are tested: Linux 6.1 and 6.12.
var suites = []string{"bookworm", "bookworm-backports"}

// bootPatience bounds one guest, from boot to power off.
const bootPatience = 5 * time.Minute

// TestGuest boots each kernel and runs in it what inside lists.
func TestGuest(t *testing.T) {
	if os.Getenv(insideEnv) != "" {
		runInside(t)
		return
	}
	require.Has(t, "nbd-guest", "mkfs.erofs")
	cache, err := Cache()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	job := Job{
		Init: build(t, dir, "init", "build", "./init"),
		Files: map[string]string{
			"/bin/guest.test": build(t, dir, "guest.test", "test", "-c", "."),
			programFile:       build(t, dir, "erofs-oci", "build", "../.."),
		},
		Disks:  map[string]string{filepath.Base(treeFile): largeTree(t, dir)},
		Argv:   []string{"/bin/guest.test", "-test.v", "-test.run=^TestGuest$/" + *only, "-test.timeout=" + bootPatience.String()},
		Env:    []string{insideEnv + "=1", "HOME=/tmp", "GOTRACEBACK=all"},
		Memory: 1536,
	}
	job.Files[listingFile] = filepath.Join(dir, "listing")
	for _, suite := range suites {
		t.Run(suite, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeoutCause(t.Context(), bootPatience, fmt.Errorf("the guest ran for %v", bootPatience))
			defer cancel()
			kernel, err := Fetch(ctx, cache, suite)
			if err != nil {
				t.Fatal(err)
			}
			begin := time.Now()
			exit, err := kernel.Run(ctx, job, t.Output())
			if errors.Is(err, ErrDied) {
				// qemu's emulation of two processors was seen to lose a guest.
				// What our code does to a kernel it does twice.
				t.Logf("booting the guest again: %v", err)
				exit, err = kernel.Run(ctx, job, t.Output())
			}
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%s: %v", kernel.Package, time.Since(begin).Round(time.Millisecond))
			if exit != 0 {
				t.Errorf("the tests in the guest ended with status %d", exit)
			}
		})
	}
}

// build has the go command make a static program for the guest.
func build(t *testing.T, dir, name string, args ...string) string {
	t.Helper()
	out := filepath.Join(dir, name)
	last := len(args) - 1
	args = append(append(args[:last:last], "-trimpath", "-ldflags=-s -w", "-o", out), args[last])
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, said)
	}
	return out
}

// largeTree makes an lz4 image of the Go compiler's sources, and writes what a
// walk of them finds to dir/listing.
func largeTree(t *testing.T, dir string) string {
	t.Helper()
	root, err := exec.CommandContext(t.Context(), "go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	source := filepath.Join(strings.TrimSpace(string(root)), "src", "cmd", "compile")
	image := filepath.Join(dir, "tree.erofs")
	if said, err := exec.CommandContext(t.Context(), "mkfs.erofs", "-zlz4", image, source).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.erofs: %v\n%s", err, said)
	}
	entries, err := tree.Walk(source)
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(entries)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "listing"), text, 0o644); err != nil {
		t.Fatal(err)
	}
	return image
}

// Where the guest finds the image that largeTree made, and what it found.
const (
	treeFile    = "/disks/tree"
	listingFile = "/listing"
)

func largeListing(t *testing.T) []corpus.Entry {
	t.Helper()
	text, err := os.ReadFile(listingFile)
	if err != nil {
		t.Fatal(err)
	}
	var entries []corpus.Entry
	if err := json.Unmarshal(text, &entries); err != nil {
		t.Fatal(err)
	}
	return entries
}
