package guest

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// testPoisonedReattached: a blob that nothing vouches for turns out to be wrong when all of it was read. What the
// kernel asks for after that is EIO, from the server that found out as from the one that takes its place, and whoever
// asks hears of it.
func testPoisonedReattached(t *testing.T, _ version) {
	r, ref := serveTree(t)
	r.SetFault(fakeregistry.Always(fakeregistry.FlipBit(openTree(t).Size() - 1)).OnBlobs())
	dir := t.TempDir()
	program(t, "mount", "--backend=nbd", "--on-error=wait:2s", "--cache-dir", t.TempDir(), ref, dir)
	before := onlyEntry(t, "running")
	readDevice(t)
	awaitWrong(t)
	poisoned(t, dir)
	if err := syscall.Kill(before.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, before.PID)
	program(t, "reattach", dir)
	poisoned(t, dir)
	if _, err := tryProgram(t, "umount", dir); exitCode(err) != 3 {
		t.Errorf("umount: %v; want exit code 3", err)
	}
	leftInRunDir(t)
}

// readDevice has the kernel ask for all bytes of the only nbd device.
func readDevice(t *testing.T) {
	t.Helper()
	pids, err := filepath.Glob("/sys/block/nbd*/pid")
	if err != nil || len(pids) != 1 {
		t.Fatalf("devices %v, %v; want one", pids, err)
	}
	f, err := os.Open("/dev/" + filepath.Base(filepath.Dir(pids[0])))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := io.Copy(io.Discard, f); err != nil && !errors.Is(err, unix.EIO) {
		t.Error(err)
	}
}

// awaitWrong waits until the only mount says that its bytes were wrong.
func awaitWrong(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		_, err := tryProgram(t, "list")
		if exitCode(err) == 3 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("a minute after all was read the mount does not say that it is wrong: %v", err)
		}
	}
}

// poisoned fails the test unless all that is not in the page cache is EIO, and list says why.
func poisoned(t *testing.T, dir string) {
	t.Helper()
	dropCaches(t)
	if _, err := tree.Walk(dir); !errors.Is(err, unix.EIO) {
		t.Errorf("what the poisoned mount reads: %v", err)
	}
	out, err := exec.CommandContext(t.Context(), programFile, "list", "--json").Output()
	var all []struct {
		State string `json:"state"`
		Wrong string `json:"wrong"`
	}
	if jsonErr := json.Unmarshal(out, &all); exitCode(err) != 3 || jsonErr != nil || len(all) != 1 || all[0].State != "running" || !strings.Contains(all[0].Wrong, "not what the manifest says") {
		t.Errorf("list: %v, %v: %s; want one mount that runs and is wrong, and exit code 3", err, jsonErr, out)
	}
}

func exitCode(err error) int {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return 0
	}
	return exit.ExitCode()
}
