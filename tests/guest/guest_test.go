package guest

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// insideEnv is set in the guest, where this same program runs again: it names the
// group of tests.
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

// guests are booted side by side, with the kernels that are tested: Linux 6.1 and
// 6.12. What reads much has guests of its own, which get on while others wait for
// the kernel's timeouts.
var guests = []struct{ suite, group string }{
	{"bookworm", "life"},
	{"bookworm-backports", "life"},
	{"bookworm-backports", "reading"},
	{"bookworm", "reading"},
	{"bookworm-backports", "layers"},
	{"bookworm", "layers"},
}

// bootPatience bounds one guest, from boot to power off.
const bootPatience = 9 * time.Minute

// TestGuest boots the guests and runs in each what inside lists.
func TestGuest(t *testing.T) {
	if group := os.Getenv(insideEnv); group != "" {
		runInside(t, inside[group].tests)
		return
	}
	require.Has(t, "nbd-guest", "debian", "mkfs.erofs")
	cache, err := Cache()
	if err != nil {
		t.Fatal(err)
	}
	jobs := newJobs(t, cache)
	booted := 0
	for _, g := range guests {
		if !selected(t, inside[g.group].tests) {
			continue
		}
		booted++
		t.Run(g.suite+" "+g.group, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeoutCause(t.Context(), bootPatience, fmt.Errorf("the guest ran for %v", bootPatience))
			defer cancel()
			kernel, err := Fetch(ctx, cache, g.suite)
			if err != nil {
				t.Fatal(err)
			}
			begin := time.Now()
			exit, err := kernel.Run(ctx, jobs[g.group], t.Output())
			if errors.Is(err, ErrDied) {
				// qemu's emulation of two processors was seen to lose a guest.
				// What our code does to a kernel it does twice.
				t.Logf("booting the guest again: %v", err)
				exit, err = kernel.Run(ctx, jobs[g.group], t.Output())
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
	if booted == 0 {
		t.Errorf("no test in the guests matches -inside %s", *only)
	}
}

// selected reports whether -inside wants one of the tests.
func selected(t *testing.T, all []check) bool {
	t.Helper()
	name, _, _ := strings.Cut(*only, "/")
	re, err := regexp.Compile(name)
	if err != nil {
		t.Fatalf("-inside: %v", err)
	}
	return slices.ContainsFunc(all, func(c check) bool { return re.MatchString(c.name) })
}

// newJobs builds what the guests run, and makes what they read.
func newJobs(t *testing.T, cache string) map[string]Job {
	t.Helper()
	dir := t.TempDir()
	files := map[string]string{
		"/bin/guest.test": build(t, dir, "guest.test", "test", "-c", "."),
		programFile:       build(t, dir, "erofs-oci", "build", "../.."),
	}
	initProgram := build(t, dir, "init", "build", InitPackage)
	jobs := make(map[string]Job)
	for name, g := range inside {
		jobs[name] = Job{
			Init:       initProgram,
			Files:      maps.Clone(files),
			Disks:      make(map[string]string),
			Argv:       []string{"/bin/guest.test", "-test.v", "-test.run=^TestGuest$/" + *only, "-test.timeout=" + bootPatience.String()},
			Env:        []string{insideEnv + "=" + name, "HOME=/tmp", "GOTRACEBACK=all"},
			Memory:     1536,
			Processors: g.processors,
		}
	}
	addLargeTree(t, dir, jobs["life"])
	addDebian(t, dir, cache, jobs["reading"])
	return jobs
}

// build makes a program for the guest.
func build(t *testing.T, dir, name string, args ...string) string {
	t.Helper()
	out := filepath.Join(dir, name)
	if err := Build(t.Context(), out, args...); err != nil {
		t.Fatal(err)
	}
	return out
}

// addLargeTree gives the job an lz4 image of the Go compiler's sources, and what a
// walk of them finds.
func addLargeTree(t *testing.T, dir string, job Job) {
	t.Helper()
	root, err := exec.CommandContext(t.Context(), "go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	source := filepath.Join(strings.TrimSpace(string(root)), "src", "cmd", "compile")
	image, listing := filepath.Join(dir, "tree.erofs"), filepath.Join(dir, "listing")
	if said, err := exec.CommandContext(t.Context(), "mkfs.erofs", "-zlz4", image, source).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.erofs: %v\n%s", err, said)
	}
	entries, err := tree.Walk(source)
	if err != nil {
		t.Fatal(err)
	}
	if err := writeJSON(listing, entries); err != nil {
		t.Fatal(err)
	}
	job.Disks[filepath.Base(treeFile)] = image
	job.Files[listingFile] = listing
}

// Where the guest finds the image that addLargeTree made, and what it found.
const (
	treeFile    = "/disks/tree"
	listingFile = "/listing"
)

func largeListing(t *testing.T) []corpus.Entry {
	t.Helper()
	var entries []corpus.Entry
	readJSON(t, listingFile, &entries)
	return entries
}

func readJSON(t *testing.T, file string, v any) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, v); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
}
