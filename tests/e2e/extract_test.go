package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// TestExtract: what comes out of each image of the corpus equals what the kernel
// shows of it, and what GNU tar reads of the archive equals that.
func TestExtract(t *testing.T) {
	require.Long(t, "unpacks every image of the corpus")
	require.Has(t, "root")
	s := newSession(t)
	for _, im := range corpus.Images(t) {
		t.Run(im.Name, func(t *testing.T) {
			s.t = t
			image, devices := s.writeImage(im)
			out, archive := filepath.Join(s.dir, "out"), filepath.Join(s.dir, "archive")
			s.must(append(append([]string{"extract"}, devices...), image, out)...)
			showsListing(t, im, out, tree.Ino, tree.DirNlink)

			s.tarTo(archive, append(devices, image)...)
			diff := exec.Command("tar", "--numeric-owner", "--xattrs", "--xattrs-include=*", "--diff", "--file", archive)
			diff.Dir = out
			if said, err := diff.CombinedOutput(); err != nil || len(said) > 0 {
				t.Errorf("tar --diff: %v: %s", err, said)
			}
			must(t, os.RemoveAll(out))
			if im.Name != "plain" && im.Name != "metabox" && im.Name != "xattr-prefix" {
				return
			}
			// GNU tar sets what is in the records, which --diff does not compare.
			must(t, os.Mkdir(out, 0o755))
			unpack := exec.Command("tar", "-C", out, "--numeric-owner", "--xattrs", "--xattrs-include=*", "--warning=no-timestamp", "-xpf", archive)
			if said, err := unpack.CombinedOutput(); err != nil || len(said) > 0 {
				t.Errorf("tar -x: %v: %s", err, said)
			}
			showsListing(t, im, out, tree.Ino, tree.DirNlink)
			must(t, os.RemoveAll(out))
		})
	}
}

// tarTo writes the archive of an image to a file.
func (s *session) tarTo(archive string, args ...string) {
	s.t.Helper()
	f, err := os.Create(archive)
	must(s.t, err)
	defer f.Close()
	cmd := exec.Command(binary, append([]string{"extract", "--tar"}, args...)...)
	var stderr strings.Builder
	cmd.Env, cmd.Stdout, cmd.Stderr = s.env, f, &stderr
	if err := cmd.Run(); err != nil || stderr.Len() > 0 {
		s.t.Fatalf("extract --tar %q: %v: %s", args, err, stderr.String())
	}
}

// TestExtractAsUser: a plain user gets all but device nodes, without owners and
// set-id bits, and hears of what is missing.
func TestExtractAsUser(t *testing.T) {
	require.Has(t, "root", "setpriv")
	s := newSession(t)
	im := corpus.Get(t, "zstd")
	image, _ := s.writeImage(im)
	s.asNobody()
	out := filepath.Join(s.dir, "out")
	r := s.run(binary, "extract", image, out)
	if r.code != 1 || !strings.Contains(r.stderr, " device nodes were left out: only root can make them") || strings.Count(r.stderr, "\n") != 1 {
		t.Errorf("exit code %d, %s", r.code, r.stderr)
	}
	got, err := tree.Walk(out)
	must(t, err)
	var want []corpus.Entry
	for _, e := range im.Listing(t) {
		// Anybody may make a character device 0:0, which is a mark of overlayfs.
		if e.Rdev != nil && *e.Rdev != [2]uint32{} {
			continue
		}
		e.UID, e.GID = nobody, nobody
		e.Mode &^= unix.S_ISUID | unix.S_ISGID
		for name := range e.Xattrs {
			if !strings.HasPrefix(name, "user.") {
				delete(e.Xattrs, name)
			}
		}
		if len(e.Xattrs) == 0 {
			e.Xattrs = nil
		}
		want = append(want, e)
	}
	for _, d := range tree.Diff(want, got, tree.Ino, tree.DirNlink) {
		t.Error(d)
	}
}

// TestExtractPaths: what is named comes out, with the directories on the way to it,
// and nothing else.
func TestExtractPaths(t *testing.T) {
	require.Has(t, "root")
	s := newSession(t)
	im := corpus.Get(t, "zstd")
	image, _ := s.writeImage(im)
	out := filepath.Join(s.dir, "out")
	s.must("extract", image, out, "/dev", "names/../hard", "hard", "deep/..//names/-dash")
	got, err := tree.Walk(out)
	must(t, err)
	want := slices.DeleteFunc(im.Listing(t), func(e corpus.Entry) bool {
		top, _, _ := strings.Cut(e.Path, "/")
		return !slices.Contains([]string{".", "dev", "hard", "names"}, top) || top == "names" && e.Path != "names" && e.Path != "names/-dash"
	})
	for _, d := range tree.Diff(want, got, tree.Ino, tree.DirNlink) {
		t.Error(d)
	}
}

// TestExtractSparse: runs of zeros take no room.
func TestExtractSparse(t *testing.T) {
	s := newSession(t)
	im := corpus.Get(t, "zstd")
	image, _ := s.writeImage(im)
	out := filepath.Join(s.dir, "out")
	s.must("extract", "--keep=times", image, out, "sparse/holes")
	var st unix.Stat_t
	must(t, unix.Stat(filepath.Join(out, "sparse/holes"), &st))
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != 200000 || st.Blocks*512 > st.Size/2 {
		t.Errorf("mode %#o, %d bytes, of which %d take room", st.Mode, st.Size, st.Blocks*512)
	}
}

// TestExtractStaysInside: links that are there already lead nothing out of the
// directory, with and without --overwrite.
func TestExtractStaysInside(t *testing.T) {
	s := newSession(t)
	im := corpus.Get(t, "zstd")
	image, _ := s.writeImage(im)
	outside, out := filepath.Join(s.dir, "outside"), filepath.Join(s.dir, "out")
	must(t, os.Mkdir(outside, 0o755))
	must(t, os.Mkdir(out, 0o755))
	must(t, os.Symlink(outside, filepath.Join(out, "names")))
	r := s.run(binary, "extract", "--keep=times", image, out, "names")
	if r.code != 1 || !strings.Contains(r.stderr, "names: it is there already; --overwrite replaces it") {
		t.Errorf("exit code %d, %s", r.code, r.stderr)
	}
	s.must("extract", "--keep=times", "--overwrite", image, out, "names")
	if st, err := os.Lstat(filepath.Join(out, "names")); err != nil || !st.IsDir() {
		t.Errorf("the link was not replaced: %v, %v", st, err)
	}
	// A file that is a link to another is replaced, not written through.
	victim := filepath.Join(outside, "victim")
	must(t, os.WriteFile(victim, []byte("mine"), 0o644))
	link := filepath.Join(out, "names", "-dash")
	must(t, os.Remove(link))
	must(t, os.Symlink(victim, link))
	s.must("extract", "--keep=times", "--overwrite", image, out, "names/-dash")
	if got, err := os.ReadFile(victim); err != nil || string(got) != "mine" {
		t.Errorf("a file outside was written to: %q, %v", got, err)
	}
	left, err := os.ReadDir(outside)
	must(t, err)
	if len(left) != 1 {
		t.Errorf("outside there are now %v", left)
	}
}
