package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/tests/debian"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/layered"
	"github.com/erofs-oci/erofs-oci/tests/require"
)

// mountStatus is what list says of the mount on dir.
func (s *session) mountStatus(dir string) backend.MountStatus {
	s.t.Helper()
	var all []struct {
		Dir    string               `json:"dir"`
		Status *backend.MountStatus `json:"status"`
	}
	must(s.t, json.Unmarshal([]byte(s.run(binary, "list", "--json").stdout), &all))
	for _, e := range all {
		if e.Dir == dir && e.Status != nil {
			return *e.Status
		}
	}
	s.t.Fatalf("%s has no status: %+v", dir, all)
	return backend.MountStatus{}
}

// prefetched waits until the fetching in the background of the mount on dir is in a state.
func (s *session) prefetched(dir string, state backend.PrefetchState) backend.PrefetchStatus {
	s.t.Helper()
	var st *backend.PrefetchStatus
	await(s.t, fmt.Sprintf("prefetch %s", state), func() bool {
		st = s.mountStatus(dir).Prefetch
		if st == nil {
			s.t.Fatalf("nothing is fetched in the background of %s", dir)
		}
		return st.State == state || st.State == backend.PrefetchStopped || st.State == backend.PrefetchDone
	})
	if st.State != state {
		s.t.Fatalf("prefetch: %+v, want %s", st, state)
	}
	return *st
}

// rangesOf are the GETs of blobs so far.
func rangesOf(r *fakeregistry.Registry) (ranges []string) {
	for _, q := range r.Requests() {
		if q.Method == http.MethodGet && strings.Contains(q.Path, "/blobs/") {
			ranges = append(ranges, q.Range)
		}
	}
	return ranges
}

// serveFile serves an image as it is.
func serveFile(t *testing.T, path string) servedImage {
	t.Helper()
	r, err := fakeregistry.New(fakeregistry.Options{})
	must(t, err)
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	pushFile(t, r.URL(), "tree:v1", path)
	return servedImage{r, r.Addr() + "/tree:v1"}
}

// goTree is the Go toolchain's tree: 16,000 files.
func goTree(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("go", "env", "GOROOT").Output()
	must(t, err)
	return strings.TrimSpace(string(out))
}

// metadataOf is how much of an image is metadata, by the page.
func metadataOf(t *testing.T, path string) int64 {
	t.Helper()
	f, err := backend.OpenFile(path)
	must(t, err)
	defer f.Close()
	stats, err := erofsfmt.LoadMetadata(t.Context(), f, erofsfmt.MetadataOptions{Gap: -1},
		func(context.Context, []erofsfmt.Range) error { return nil })
	must(t, err)
	return stats.Bytes
}

// lists has everything below dir listed, by ls and with all attributes, and fails the test if that costs a request.
func (s *session) lists(r *fakeregistry.Registry, dir string) {
	s.t.Helper()
	before := r.Stats()
	ls := s.run("ls", "-lR", dir)
	if ls.code != 0 || ls.stderr != "" {
		s.t.Fatalf("ls -lR: %d, %s", ls.code, ls.stderr)
	}
	values := 0
	list, value := make([]byte, 1<<16), make([]byte, 1<<16)
	must(s.t, filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		n := 0
		if err == nil {
			n, err = unix.Llistxattr(path, list)
		}
		for name := range strings.SplitSeq(string(list[:max(n, 0)]), "\x00") {
			if err == nil && name != "" {
				_, err = unix.Lgetxattr(path, name, value)
				values++
			}
		}
		return err
	}))
	s.t.Logf("%d lines, %d attributes", strings.Count(ls.stdout, "\n"), values)
	if after := r.Stats(); after != before {
		s.t.Errorf("listing took %d GETs more, of %d bytes: %v", after.BlobGETs-before.BlobGETs, after.BlobBytes-before.BlobBytes,
			rangesOf(r)[before.BlobGETs:])
	}
}

// TestPrefetchMeta: after --prefetch=meta a whole tree is listed without a request, through our reader and through the
// kernel's, and what that took is little more than the metadata, in a few requests.
func TestPrefetchMeta(t *testing.T) {
	require.Long(t, "builds large images")
	require.Has(t, "root", "fuse", "kernel-erofs")
	image := filepath.Join(t.TempDir(), "go.erofs")
	s := newSession(t)
	if r := s.run(binary, "build", "-o", image, goTree(t)); r.code != 0 {
		t.Fatal(r.stderr)
	}
	im := serveFile(t, image)
	pushed := s.run(binary, "push", "--plain-http", image, im.Addr()+"/verified:v1")
	if pushed.code != 0 {
		t.Fatal(pushed.stderr)
	}
	metadata := metadataOf(t, image)
	for _, c := range []struct {
		name, ref, backend string
		gets               int
	}{
		{"fuse", im.ref, backend.FUSE, 4}, {"file", im.ref, backend.FILE, 4},
		// The chunk index is a request, and has a unit of its own.
		{"verified", im.Addr() + "/verified:v1", backend.FUSE, 5},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSession(t)
			im.ResetStats()
			dir := s.mount(c.ref, "--backend="+c.backend, "--prefetch=meta")
			st := s.prefetched(dir, backend.PrefetchDone)
			fetched := im.Stats()
			t.Logf("%d bytes of metadata: %d GETs of %d bytes: %v; %+v", metadata, fetched.BlobGETs, fetched.BlobBytes, rangesOf(im.Registry), st)
			if fetched.BlobGETs > c.gets {
				t.Errorf("%d GETs for the metadata", fetched.BlobGETs)
			}
			if fetched.BlobBytes > metadata*6/5+chunk {
				t.Errorf("%d bytes for %d of metadata", fetched.BlobBytes, metadata)
			}
			if st.Wanted != st.Fetched || st.Fetched < metadata || st.Error != "" {
				t.Errorf("%+v", st)
			}
			s.lists(im.Registry, dir)
		})
	}
}

// TestPrefetchMetaOfMkfs: images of mkfs.erofs, whose metadata lies between their data, are listed without a request,
// too.
func TestPrefetchMetaOfMkfs(t *testing.T) {
	require.Long(t, "builds large images")
	require.Has(t, "root", "fuse", "kernel-erofs", "mkfs.erofs", "debian")
	root := debian.Root(t)
	for _, c := range []struct {
		name   string
		newest bool // of Debian unstable, not of this machine
		args   []string
	}{
		{"plain", false, nil},
		{"lz4", false, []string{"-zlz4"}},
		{"newest", true, nil},
		{"fragments", true, []string{"-zlz4", "-C65536", "-Efragments,ztailpacking"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			image := filepath.Join(t.TempDir(), "image")
			args := append(append([]string{"--quiet"}, c.args...), image, root)
			if c.newest {
				debian.Mkfs(t).Run(t, args...)
			} else if said, err := exec.Command("mkfs.erofs", args...).CombinedOutput(); err != nil {
				t.Fatalf("mkfs.erofs %q: %v\n%s", args, err, said)
			}
			im := serveFile(t, image)
			st, err := os.Stat(image)
			must(t, err)
			for _, name := range []string{backend.FUSE, backend.FILE} {
				s := newSession(t)
				im.ResetStats()
				dir := s.mount(im.ref, "--backend="+name, "--prefetch=meta")
				s.prefetched(dir, backend.PrefetchDone)
				fetched := im.Stats()
				t.Logf("%s: %d GETs, %d of %d bytes", name, fetched.BlobGETs, fetched.BlobBytes, st.Size())
				if fetched.BlobBytes > st.Size()*3/4 {
					t.Errorf("%d bytes for the metadata of an image of %d", fetched.BlobBytes, st.Size())
				}
				s.lists(im.Registry, dir)
			}
		})
	}
}

// TestPrefetchMetaOfLayers: of several layers all have their metadata fetched.
func TestPrefetchMetaOfLayers(t *testing.T) {
	require.Has(t, "root", "fuse", "kernel-erofs", "overlay")
	r := layeredRegistry(t)
	ref := pushLayers(t, r, "many", layered.Random(1, 5))
	for _, name := range []string{backend.FUSE, backend.FILE} {
		s := newSession(t)
		dir := s.mount(ref, "--backend="+name, "--prefetch=meta")
		s.prefetched(dir, backend.PrefetchDone)
		s.lists(r, dir)
	}
}
