package guest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
	"github.com/erofs-oci/erofs-oci/nbdserve"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/layered"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// squashedListing is what the kernel shows of the one image that a stack's layers were
// merged to.
func squashedListing(t *testing.T, stack layered.Stack) []corpus.Entry {
	t.Helper()
	dir := t.TempDir()
	m, err := mountHere(t, nbdserve.Backend{}, backend.Volume{Primary: memory(stack.Squashed(t, mkerofs.Options{}))}, dir)
	if err != nil {
		t.Fatal(err)
	}
	defer unmountHere(t, m, dir)
	entries, err := tree.Walk(dir)
	if err != nil {
		t.Fatal(err)
	}
	return entries
}

// testLayers mounts images of several layers, each a device of its own below one
// overlay, and compares; also as files, which older kernels read by loop devices.
// umount(2) ends it all.
func testLayers(t *testing.T, _ version) {
	r := startRegistry(t)
	cases := layered.Cases()
	cases["many"] = layered.Many(40)
	// The others are for our own reader.
	for n, name := range []string{"files", "deleted and back", "directory by file and back", "opaque root", "opaque root alone", "attributes", "many"} {
		stack, repository := cases[name], fmt.Sprintf("case%d", n)
		t.Run(name, func(t *testing.T) {
			want := squashedListing(t, stack)
			layered.Push(t, r.URL(), repository+":v1", stack.Layers(t, mkerofs.Options{}))
			for _, by := range []string{"nbd", "file"} {
				dir := t.TempDir()
				program(t, "mount", "--backend="+by, "--plain-http", "--cache-dir", t.TempDir(), r.Addr()+"/"+repository+":v1", dir)
				same(t, want, dir, tree.Ino, tree.DirNlink)
				server := onlyEntry(t, "running").PID
				if err := unix.Unmount(dir, 0); err != nil {
					t.Error(err)
				}
				awaitEnd(t, server)
				leftInRunDir(t)
				nothingLeft(t)
			}
		})
	}
}

// testLayersReattached kills the server of several layers: another one takes all of
// them over, once because it is told to and once because somebody watches; with a
// writable directory on top, too.
func testLayersReattached(t *testing.T, _ version) {
	r := startRegistry(t)
	// Something of each layer has to be fetched again.
	stack := append(layered.Cases()["large"], layered.Cases()["opaque root"]...)
	stack = append(stack, layered.Cases()["wide"]...)
	layered.Push(t, r.URL(), "reattached:v1", stack.Layers(t, mkerofs.Options{}))
	ref := r.Addr() + "/reattached:v1"
	want := squashedListing(t, stack)
	for _, flags := range [][]string{nil, {"--supervise"}, {"--tmpfs-overlay"}} {
		t.Run(strings.Join(flags, " "), func(t *testing.T) {
			dir := t.TempDir()
			args := append([]string{"mount", "--backend=nbd", "--plain-http", "--on-error=wait:1s", "--cache-dir", t.TempDir()}, flags...)
			program(t, append(args, ref, dir)...)
			writable, supervised := len(flags) > 0 && flags[0] == "--tmpfs-overlay", len(flags) > 0 && flags[0] == "--supervise"
			note := filepath.Join(dir, "note")
			if err := os.WriteFile(note, []byte("written"), 0o644); writable != (err == nil) || !writable && !errors.Is(err, unix.EROFS) {
				t.Fatalf("a write: %v", err)
			}
			before := onlyEntry(t, "running")
			if err := syscall.Kill(before.PID, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			awaitEnd(t, before.PID)
			dropCaches(t)
			if !supervised {
				onlyEntry(t, "orphaned")
				failToReattach(t, dir)
				program(t, "reattach", dir)
			}
			if writable {
				if err := os.Remove(note); err != nil {
					t.Error(err)
				}
			}
			same(t, want, dir, tree.Ino, tree.DirNlink, tree.RootMtime)
			after := onlyEntry(t, "running")
			if after.PID == before.PID {
				t.Error("the new server is the old one")
			}
			program(t, "umount", dir)
			awaitEnd(t, after.PID)
			leftInRunDir(t)
			nothingLeft(t)
		})
	}
	// Nobody takes it over: umount frees all devices.
	dir := t.TempDir()
	program(t, "mount", "--backend=nbd", "--plain-http", "--cache-dir", t.TempDir(), ref, dir)
	server := onlyEntry(t, "running").PID
	if err := syscall.Kill(server, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, server)
	onlyEntry(t, "orphaned")
	program(t, "umount", dir)
	leftInRunDir(t)
}

// failToReattach has a server fail at the last device, when it has all others: it lets
// go of them.
func failToReattach(t *testing.T, dir string) {
	t.Helper()
	records, err := filepath.Glob("/run/erofs-oci/*.json")
	if err != nil || len(records) != 1 {
		t.Fatalf("records %v, %v", records, err)
	}
	good, err := os.ReadFile(records[0])
	if err != nil {
		t.Fatal(err)
	}
	at := strings.LastIndex(string(good), `"identifier":"`) + len(`"identifier":"`)
	bad := append(append(append([]byte{}, good[:at]...), 'x'), good[at:]...)
	if err := os.WriteFile(records[0], bad, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := tryProgram(t, "reattach", dir); err == nil || !strings.Contains(err.Error(), "belongs to somebody else") {
		t.Errorf("with somebody else's device: %v", err)
	}
	if err := os.WriteFile(records[0], good, 0o600); err != nil {
		t.Fatal(err)
	}
	onlyEntry(t, "orphaned")
}
