package e2e

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// writeImage puts an image of the corpus, and its device, into the session's
// directory, which is where its commands run.
func (s *session) writeImage(im corpus.Image) (image string, devices []string) {
	s.t.Helper()
	image = filepath.Join(s.dir, im.Name+".erofs")
	must(s.t, os.WriteFile(image, im.Data, 0o644))
	if im.Blob != nil {
		device := filepath.Join(s.dir, im.Name+".blob")
		must(s.t, os.WriteFile(device, im.Blob, 0o644))
		devices = []string{"--device=" + device}
	}
	return image, devices
}

// showsListing fails the test unless dir shows what the kernel shows of the image.
func showsListing(t *testing.T, im corpus.Image, dir string, except ...tree.Field) {
	t.Helper()
	got, err := tree.Walk(dir)
	must(t, err)
	for _, d := range tree.Diff(im.Listing(t), got, except...) {
		t.Error(d)
	}
}

// TestLocalFile mounts images in files, by each backend that this machine has, with
// and without an extra device.
func TestLocalFile(t *testing.T) {
	require.Has(t, "root", "fuse", "kernel-erofs", "loop")
	for _, backend := range []string{"fuse", "file"} {
		for _, name := range []string{"zstd", "multidev"} {
			t.Run(backend+" "+name, func(t *testing.T) {
				s := newSession(t)
				im := corpus.Get(t, name)
				image, devices := s.writeImage(im)
				dir := s.mount("./"+filepath.Base(image), append([]string{"--backend=" + backend, "--memory=1MiB"}, devices...)...)
				showsListing(t, im, dir)
				if said := s.must("list"); !strings.HasPrefix(strings.Split(said, "\n")[1], "file:"+image+" ") {
					t.Errorf("listed as %s", said)
				}
				server := s.pidfd(dir)
				s.must("umount", dir)
				awaitEnd(t, server)
				s.nothingLeft(dir)
				if !isEmpty(filepath.Join(s.dir, "cache")) {
					t.Error("a cache was made for a file")
				}
			})
		}
	}
}

// TestLocalBlockDevice mounts an image on a block device.
func TestLocalBlockDevice(t *testing.T) {
	require.Has(t, "root", "fuse", "loop")
	s := newSession(t)
	im := corpus.Get(t, "lz4")
	image, _ := s.writeImage(im)
	said, err := exec.Command("losetup", "--find", "--show", "--read-only", image).Output()
	must(t, err)
	device := strings.TrimSpace(string(said))
	t.Cleanup(func() { must(t, exec.Command("losetup", "--detach", device).Run()) })
	showsListing(t, im, s.mount(device))
}

// TestLocalOverlay: what is written over an image in a file stays for that image
// and no other.
func TestLocalOverlay(t *testing.T) {
	require.Has(t, "root", "fuse", "overlay")
	s := newSession(t)
	image, _ := s.writeImage(corpus.Get(t, "lz4"))
	other, _ := s.writeImage(corpus.Get(t, "zstd"))
	upper := "--overlay=" + filepath.Join(s.dir, "upper")
	dir := s.mount(image, upper)
	must(t, os.WriteFile(filepath.Join(dir, "note"), []byte("written"), 0o644))
	s.must("umount", dir)
	dir = s.mount("file:"+image, upper)
	if got, err := os.ReadFile(filepath.Join(dir, "note")); err != nil || string(got) != "written" {
		t.Errorf("read %q, %v", got, err)
	}
	s.must("umount", dir)
	if r := s.run(binary, "mount", upper, other, s.target()); r.code != 1 || !strings.Contains(r.stderr, "upper") {
		t.Errorf("another image over the same changes: %d, %s", r.code, r.stderr)
	}
}

// TestLocalChanged: an image that is cut short, or written to, while it is mounted
// is an I/O error wherever it has not been read before, and never other bytes.
func TestLocalChanged(t *testing.T) {
	require.Has(t, "root", "fuse")
	im := corpus.Get(t, "plain")
	for what, change := range map[string]func(image string) error{
		"cut short": func(image string) error { return os.Truncate(image, 64<<10) },
		"cut short and grown again": func(image string) error {
			return errors.Join(os.Truncate(image, 64<<10), os.Truncate(image, int64(len(im.Data))))
		},
		"written to": func(image string) error {
			return os.WriteFile(image, make([]byte, len(im.Data)), 0o644)
		},
	} {
		t.Run(what, func(t *testing.T) {
			s := newSession(t)
			image, _ := s.writeImage(im)
			dir := s.mount(image)
			s.must("list")
			must(t, change(image))
			failed := 0
			for _, e := range im.Listing(t) {
				if e.Mode&unix.S_IFMT != unix.S_IFREG || e.Size == 0 {
					continue
				}
				got, err := os.ReadFile(filepath.Join(dir, e.Path))
				switch {
				case errors.Is(err, unix.EIO):
					failed++
				case err != nil:
					t.Errorf("%q: %v, want EIO", e.Path, err)
				case hexSum(got) != e.SHA256:
					t.Errorf("%q: other bytes, and no error", e.Path)
				}
			}
			if failed == 0 {
				t.Error("everything was read from a file that is not there any more")
			}
			if log := s.serverLog(dir); !strings.Contains(log, "after it was opened") {
				t.Errorf("the log does not say why: %s", log)
			}
		})
	}
}

func hexSum(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// TestLocalServed: an image in a file is what an NBD client gets.
func TestLocalServed(t *testing.T) {
	require.Has(t, "nbdcopy")
	s := newSession(t)
	im := corpus.Get(t, "lz4")
	image, _ := s.writeImage(im)
	server := s.serve("--nbd=unix:"+filepath.Join(s.dir, "socket"), image)
	copied := filepath.Join(s.dir, "copy")
	if r := s.run("nbdcopy", server.uri, copied); r.code != 0 {
		t.Fatal(r.stderr)
	}
	server.stop(unix.SIGTERM)
	got, err := os.ReadFile(copied)
	must(t, err)
	if !bytes.Equal(got, im.Data) {
		t.Error("the copy differs")
	}
}
