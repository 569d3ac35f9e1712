package e2e

import (
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/layered"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// layeredRegistry is a registry for images of several layers.
func layeredRegistry(t *testing.T) *fakeregistry.Registry {
	t.Helper()
	r, err := fakeregistry.New(fakeregistry.Options{})
	must(t, err)
	t.Cleanup(func() { r.Close() })
	return r
}

// pushLayers pushes the layers of a stack as one image and returns its reference.
func pushLayers(t *testing.T, r *fakeregistry.Registry, name string, stack layered.Stack) string {
	t.Helper()
	layered.Push(t, r.URL(), name+":v1", stack.Layers(t, mkerofs.Options{}))
	r.ResetStats()
	return r.Addr() + "/" + name + ":v1"
}

// mountSquashed has the kernel mount the one image that shows what the stack shows.
func mountSquashed(t *testing.T, stack layered.Stack) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "squashed")
	must(t, os.WriteFile(file, stack.Squashed(t, mkerofs.Options{}), 0o600))
	return kernelMount(t, file)
}

// TestLayers: an image of several layers shows through each backend what the kernel
// shows of one image that they were merged to. umount(8) ends it all.
func TestLayers(t *testing.T) {
	require.Has(t, "root", "fuse", "kernel-erofs", "loop", "overlay")
	r := layeredRegistry(t)
	n := 0
	for name, stack := range layered.Cases() {
		n++
		t.Run(name, func(t *testing.T) {
			want := mountSquashed(t, stack)
			ref := pushLayers(t, r, "case"+string(rune('a'+n)), stack)
			for _, backend := range []string{"fuse", "file"} {
				s := newSession(t)
				dir := s.mount(ref, "--backend="+backend)
				sameTree(t, want, dir, tree.Ino, tree.DirNlink)
				listsAlike(t, want, dir)
				s.endsWith(dir, "umount", dir)
				if left, err := filepath.Glob(filepath.Join(s.dir, "erofs-oci-*")); err != nil || len(left) > 0 {
					t.Errorf("left behind: %v, %v", left, err)
				}
			}
		})
	}
}

// listsAlike asks for a few entries at a time, and compares the types that directories
// give, and the numbers, with those of stat(2).
func listsAlike(t *testing.T, want, got string) {
	t.Helper()
	entries, err := tree.Walk(want)
	must(t, err)
	for _, e := range entries {
		if e.Mode&unix.S_IFMT != unix.S_IFDIR {
			continue
		}
		fd, err := unix.Open(filepath.Join(got, e.Path), unix.O_RDONLY|unix.O_DIRECTORY, 0)
		must(t, err)
		var names []string
		b := make([]byte, 600) // two entries of the longest name
		for {
			n, err := unix.Getdents(fd, b)
			must(t, err)
			if n == 0 {
				break
			}
			_, _, names = unix.ParseDirent(b[:n], -1, names)
		}
		must(t, unix.Close(fd))
		expected, err := tree.List(filepath.Join(want, e.Path))
		must(t, err)
		slices.Sort(expected)
		if slices.Sort(names); !slices.Equal(names, expected) {
			t.Errorf("%q lists %q, want %q", e.Path, names, expected)
		}
	}
}

// TestLayersSeek: a position that no entry has is refused, and does no harm.
func TestLayersSeek(t *testing.T) {
	require.Has(t, "root", "fuse")
	dir := newSession(t).mount(pushLayers(t, layeredRegistry(t), "seek", layered.Cases()["files"]))
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	must(t, err)
	defer unix.Close(fd)
	for _, pos := range []int64{4, 1 << 40, 7<<54 | 3} {
		_, err := unix.Seek(fd, pos, unix.SEEK_SET)
		must(t, err)
		if n, err := unix.Getdents(fd, make([]byte, 4096)); !errors.Is(err, unix.EINVAL) {
			t.Errorf("from %#x: %d bytes, %v", pos, n, err)
		}
	}
	_, err = unix.Seek(fd, 0, unix.SEEK_SET)
	must(t, err)
	if n, err := unix.Getdents(fd, make([]byte, 4096)); n == 0 || err != nil {
		t.Errorf("from the start: %d bytes, %v", n, err)
	}
}

// TestLayersRandom: the same for layers that nobody thought of, with our own reader
// below FUSE.
func TestLayersRandom(t *testing.T) {
	require.Has(t, "root", "fuse", "kernel-erofs", "loop")
	r := layeredRegistry(t)
	for seed := range uint64(8) {
		stack := layered.Random(1000+seed, 3+int(seed))
		dir := newSession(t).mount(pushLayers(t, r, "random"+string(rune('a'+seed)), stack), "--backend=fuse")
		want := mountSquashed(t, stack)
		sameTree(t, want, dir, tree.Ino, tree.DirNlink)
		listsAlike(t, want, dir)
	}
}

// TestLayersParents: ".." is listed with the number that the parent has by stat(2), and
// numbers do not change with a new server.
func TestLayersParents(t *testing.T) {
	require.Has(t, "root", "fuse")
	ref := pushLayers(t, layeredRegistry(t), "parents", layered.Cases()["deep"])
	numbers := func() (all []uint64) {
		s := newSession(t)
		dir := s.mount(ref)
		entries, err := tree.Walk(dir)
		must(t, err)
		for _, e := range entries {
			if all = append(all, e.Ino); e.Mode&unix.S_IFMT != unix.S_IFDIR || e.Path == "." {
				continue
			}
			var self, parent unix.Stat_t
			must(t, errors.Join(unix.Stat(filepath.Join(dir, e.Path), &self), unix.Stat(filepath.Join(dir, e.Path, ".."), &parent)))
			if n := s.quiet("ls", "-aiU", filepath.Join(dir, e.Path)); !hasNumber(n, self.Ino, ".") || !hasNumber(n, parent.Ino, "..") {
				t.Errorf("%s: %d in %d is listed as %q", e.Path, self.Ino, parent.Ino, n)
			}
			if self.Nlink != 1 {
				t.Errorf("%s has %d links", e.Path, self.Nlink)
			}
		}
		s.must("umount", dir)
		return all
	}
	first := numbers()
	if again := numbers(); !slices.Equal(first, again) || len(first) < 40 {
		t.Errorf("%d, and then %d", first, again)
	}
}

// hasNumber says whether what ls -i prints has a name with a number.
func hasNumber(listing string, ino uint64, name string) bool {
	for line := range strings.Lines(listing) {
		f := strings.Fields(line)
		if len(f) == 2 && f[1] == name && f[0] == jsonNumber(ino) {
			return true
		}
	}
	return false
}

func jsonNumber(n uint64) string {
	b, err := json.Marshal(n)
	if err != nil {
		panic(err)
	}
	return string(b)
}

// TestLayersCost: a mount is usable after one GET for each layer, all of which are
// under way at the same time.
func TestLayersCost(t *testing.T) {
	require.Has(t, "root", "fuse", "kernel-erofs", "overlay")
	stack := layered.Many(6)
	for _, backend := range []string{"fuse", "file"} {
		t.Run(backend, func(t *testing.T) {
			r := layeredRegistry(t)
			ref := pushLayers(t, r, "cost", stack)
			var mu sync.Mutex
			waiting, all := 0, make(chan struct{})
			r.SetFault(func(q *http.Request) *fakeregistry.Fault {
				if !strings.Contains(q.URL.Path, "/blobs/") || q.Method != http.MethodGet {
					return nil
				}
				mu.Lock()
				if waiting++; waiting == len(stack) {
					close(all)
				}
				mu.Unlock()
				select {
				case <-all:
				case <-time.After(20 * time.Second):
					t.Error("the layers are fetched one after the other")
				}
				return nil
			})
			dir := newSession(t).mount(ref, "--backend="+backend)
			if stats := r.Stats(); stats.BlobGETs != len(stack) {
				t.Errorf("%d GETs for %d layers", stats.BlobGETs, len(stack))
			}
			if got, err := os.ReadFile(filepath.Join(dir, "etc/version")); err != nil || string(got) != "5" {
				t.Errorf("read %q, %v", got, err)
			}
			if stats := r.Stats(); stats.BlobGETs != len(stack) {
				t.Errorf("%d GETs for %d layers after a read of what was there", stats.BlobGETs, len(stack))
			}
		})
	}
}

// TestLayersWritable: an overlay has all layers below it; what was written is there at
// the next mount, and not under another stack.
func TestLayersWritable(t *testing.T) {
	require.Has(t, "root", "fuse", "kernel-erofs", "overlay", "loop")
	r := layeredRegistry(t)
	stack := layered.Cases()["files"]
	ref, other := pushLayers(t, r, "writable", stack), pushLayers(t, r, "other", stack[:1])
	want := mountSquashed(t, stack)
	for _, backend := range []string{"fuse", "file"} {
		t.Run(backend, func(t *testing.T) {
			s := newSession(t)
			upper := filepath.Join(s.dir, "upper")
			for _, flags := range [][]string{{"--tmpfs-overlay"}, {"--overlay", upper}} {
				dir := s.mount(ref, append(flags, "--backend="+backend)...)
				sameTree(t, want, dir, tree.Ino, tree.DirNlink)
				must(t, errors.Join(os.WriteFile(filepath.Join(dir, "d", "new"), []byte("new"), 0o600),
					os.Remove(filepath.Join(dir, "d", "low")), os.RemoveAll(filepath.Join(dir, "kept"))))
				s.endsWith(dir, "umount", dir)
			}
			dir := s.mount(ref, "--overlay", upper, "--backend="+backend)
			names, err := tree.List(filepath.Join(dir, "d"))
			if slices.Sort(names); err != nil || !slices.Equal(names, []string{"high", "new"}) {
				t.Errorf("at the next mount: %q, %v", names, err)
			}
			s.endsWith(dir, binary, "umount", dir)
			wantLine(t, s.run(binary, "mount", "--overlay", upper, other, s.target()), "changes of another image")
		})
	}
}

// TestLayersLife: how a mount of several layers is listed, and ends: a busy one, one
// whose server is killed, and one whose server is told to end.
func TestLayersLife(t *testing.T) {
	require.Has(t, "root", "fuse", "kernel-erofs", "overlay")
	r := layeredRegistry(t)
	ref := pushLayers(t, r, "life", layered.Cases()["large"])
	for _, backend := range []string{"fuse", "file"} {
		t.Run(backend, func(t *testing.T) {
			s := newSession(t)
			dir := s.mount(ref, "--backend="+backend)
			var all []struct {
				Digest string
				Layers []struct {
					Digest string
					Size   int64
				}
			}
			must(t, json.Unmarshal([]byte(s.must("list", "--json")), &all))
			if len(all) != 1 || len(all[0].Layers) != 2 || all[0].Digest == all[0].Layers[0].Digest ||
				!strings.HasPrefix(all[0].Layers[1].Digest, "sha256:") || all[0].Layers[1].Size == 0 {
				t.Errorf("listed as %+v", all)
			}
			if err := os.WriteFile(filepath.Join(dir, "new"), nil, 0o600); !errors.Is(err, unix.EROFS) {
				t.Errorf("a write: %v", err)
			}
			f, err := os.Open(filepath.Join(dir, "big"))
			must(t, err)
			defer f.Close()
			wantLine(t, s.run(binary, "umount", dir), "busy", "--lazy")
			s.must("umount", "--lazy", dir)
			if _, err := f.ReadAt(make([]byte, 4096), 65_536); err != nil {
				t.Errorf("a reader of a detached mount: %v", err)
			}
			server := s.pidfd(dir)
			must(t, f.Close())
			awaitEnd(t, server)
			s.nothingLeft(dir)

			s.must("mount", "--backend="+backend, ref, dir)
			s.end(dir, syscall.SIGKILL)
			if e := s.entry(dir); e.State != "dead" {
				t.Errorf("listed as %+v", e)
			}
			s.must("umount", dir)
			s.nothingLeft(dir)

			s.must("mount", "--backend="+backend, ref, dir)
			s.end(dir, syscall.SIGTERM)
			s.nothingLeft(dir)
		})
	}
}

// TestLayersPlainUser: a user without rights mounts several layers.
func TestLayersPlainUser(t *testing.T) {
	require.Has(t, "root", "fuse", "fusermount3", "setpriv")
	ref := pushLayers(t, layeredRegistry(t), "user", layered.Many(130))
	s := newSession(t)
	s.asNobody()
	dir := s.nobodysTarget()
	s.must("mount", ref, dir)
	if r := s.run("cat", filepath.Join(dir, "etc/version")); r.stdout != "129" {
		t.Errorf("read %q, %s", r.stdout, r.stderr)
	}
	if r := s.run("ls", filepath.Join(dir, "all")); strings.Count(r.stdout, "\n") != 130 {
		t.Errorf("listed %q, %s", r.stdout, r.stderr)
	}
	s.endsWith(dir, "fusermount3", "-u", dir)
}

// TestLayersInUserNamespace: a plain user, root in a user namespace of its own, mounts
// several layers writable.
func TestLayersInUserNamespace(t *testing.T) {
	require.Has(t, "userns", "unshare", "overlay")
	ref := pushLayers(t, layeredRegistry(t), "userns", layered.Cases()["opaque"])
	s := newSession(t)
	s.asNobody()
	dir := s.nobodysTarget()
	script := `set -e
"$0" mount --tmpfs-overlay "$1" "$2"
ls "$2/d" "$2/d/sub"
rm -r "$2/d"
! [ -e "$2/d" ]
umount "$2"
`
	r := s.run("unshare", "-Urm", "sh", "-c", script, binary, ref, dir)
	if want := dir + "/d:\nhigh\nmid\nsub\n\n" + dir + "/d/sub:\nhigh\nmid\n"; r.code != 0 || r.stdout != want || r.stderr != "" {
		t.Errorf("exit code %d, %q: %s", r.code, r.stdout, r.stderr)
	}
}

// TestLayersRefused: what layers say of each other beyond what they hide is an error to
// who looks at it, and never another file.
func TestLayersRefused(t *testing.T) {
	require.Has(t, "root", "fuse", "kernel-erofs", "overlay")
	root := layered.Dir(".", 0o755)
	ref := pushLayers(t, layeredRegistry(t), "refused", layered.Stack{
		{root, layered.Dir("secret", 0o755), layered.File("secret/f", "1"), layered.File("data", "1")},
		{root, layered.Dir("moved", 0o755).With("trusted.overlay.redirect", "/secret"),
			layered.File("data", "").With("trusted.overlay.metacopy", ""), layered.File("good", "2")},
	})
	for backend, want := range map[string]error{"fuse": unix.EOPNOTSUPP, "file": unix.EPERM} {
		dir := newSession(t).mount(ref, "--backend="+backend)
		for _, name := range []string{"moved", "data"} {
			if _, err := os.Stat(filepath.Join(dir, name)); !errors.Is(err, want) {
				t.Errorf("%s: %s: %v", backend, name, err)
			}
		}
		if got, err := os.ReadFile(filepath.Join(dir, "good")); err != nil || string(got) != "2" {
			t.Errorf("%s: %q, %v", backend, got, err)
		}
	}
}
