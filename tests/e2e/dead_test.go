package e2e

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/require"
)

// abort ends the FUSE connection of the mount on dir.
func abort(t *testing.T, dir string) {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Stat(dir, &st))
	control := t.TempDir()
	must(t, unix.Mount("fusectl", control, "fusectl", 0, ""))
	defer func() { must(t, unix.Unmount(control, 0)) }()
	must(t, os.WriteFile(filepath.Join(control, strconv.Itoa(int(unix.Minor(st.Dev))), "abort"), []byte("1"), 0))
}

// TestAborted: the server of a mount whose connection somebody aborts ends and says
// why. The mount stays, for its users to get errors; list shows it until it is
// unmounted.
func TestAborted(t *testing.T) {
	im, s := served(t)
	dir := s.target()
	cmd := s.serveHere(im.ref, dir)
	abort(t, dir)
	if err := cmd.Wait(); err == nil || !strings.Contains(cmd.stderr.String(), dir+" is still mounted") {
		t.Errorf("%v, %q", err, cmd.stderr.String())
	}
	if _, err := os.ReadFile(filepath.Join(dir, deepFile)); err == nil {
		t.Error("a read that nobody answers succeeds")
	}
	if e := s.entry(dir); e.State != "dead" {
		t.Errorf("listed as %+v", e)
	}
	s.must("umount", dir)
	s.nothingLeft(dir)

	// One in the background keeps its log for as long.
	dir = s.mount(im.ref)
	server := s.pidfd(dir)
	abort(t, dir)
	awaitEnd(t, server)
	if said := s.serverLog(dir); !strings.Contains(said, dir+" is still mounted") {
		t.Errorf("the log says %q", said)
	}
	s.must("umount", dir)
	s.nothingLeft(dir)
}

// TestOverlayOfTheDead: where the server of a writable mount was killed, the kernel
// still writes to its directory, which another mount cannot have.
func TestOverlayOfTheDead(t *testing.T) {
	require.Has(t, "overlay")
	im, s := served(t)
	upper := filepath.Join(s.dir, "upper")
	dir, other := s.mount(im.ref, "--overlay", upper), s.target()
	written := filepath.Join("mine", "written")
	must(t, os.Mkdir(filepath.Join(dir, "mine"), 0o700))
	s.end(dir, syscall.SIGKILL)
	must(t, os.WriteFile(filepath.Join(dir, written), []byte("by the kernel alone"), 0o600))
	wantLine(t, s.run(binary, "mount", "--overlay", upper, im.ref, other), "the mount on "+dir+", which is dead, keeps in "+upper, "erofs-oci umount "+dir)
	s.must("umount", dir)
	s.must("mount", "--overlay", upper, im.ref, other)
	if got, err := os.ReadFile(filepath.Join(other, written)); err != nil || string(got) != "by the kernel alone" {
		t.Errorf("%q, %v", got, err)
	}
	s.endsWith(other, binary, "umount", other)
}
