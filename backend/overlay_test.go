package backend_test

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/backend/kmount"
	"github.com/erofs-oci/erofs-oci/fusefs"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// bench is a place for overlays of which nothing may be left in the end.
type bench struct {
	t                     *testing.T
	hidden, upper, target string
}

func newBench(t *testing.T) *bench {
	t.Helper()
	require.Has(t, "root", "fuse", "overlay")
	dir, err := backend.RealDir(t.TempDir())
	must(t, err)
	b := &bench{t: t, hidden: filepath.Join(dir, "hidden"), upper: filepath.Join(dir, "upper"), target: filepath.Join(dir, "target")}
	must(t, errors.Join(os.Mkdir(b.hidden, 0o700), os.Mkdir(b.target, 0o700)))
	// Before the directory is removed.
	t.Cleanup(func() { b.nothingMounted(dir) })
	return b
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (b *bench) nothingMounted(dir string) {
	b.t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		b.t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		fields := strings.Fields(line)
		if strings.HasPrefix(fields[4], dir) {
			b.t.Errorf("left mounted: %s", line)
			unix.Unmount(fields[4], unix.MNT_DETACH)
		}
	}
	if left, err := os.ReadDir(b.hidden); err != nil || len(left) != 0 {
		b.t.Errorf("left of the hidden directories: %v, %v", left, err)
	}
}

// mount mounts an image of the corpus, and fails the test if that does not end.
func (b *bench) mount(image string, o backend.Overlay) backend.Mount {
	b.t.Helper()
	m, err := b.try(image, o)
	if err != nil {
		b.t.Fatal(err)
	}
	return m
}

func (b *bench) try(image string, o backend.Overlay) (backend.Mount, error) {
	b.t.Helper()
	o.Hidden = b.hidden
	if o.Inner == nil {
		o.Inner = fusefs.Backend{}
	}
	v := backend.Volume{Primary: sourcetest.Memory(corpus.Get(b.t, image).Data)}
	return o.Mount(b.t.Context(), v, b.target, backend.Options{Name: "test", Flags: backend.MountOptions{Flags: unix.MS_NOSUID}})
}

// ended waits for the end of a mount that was taken away.
func (b *bench) ended(m backend.Mount) {
	b.t.Helper()
	done := make(chan error, 1)
	go func() { done <- m.Wait() }()
	select {
	case err := <-done:
		if err != nil {
			b.t.Error(err)
		}
	case <-time.After(20 * time.Second):
		b.t.Fatal("the mount does not end")
	}
}

func (b *bench) umount(m backend.Mount) {
	b.t.Helper()
	err := unix.Unmount(b.target, 0)
	// A program that a test beside this one is just starting has our descriptors until it begins.
	for begun := time.Now(); errors.Is(err, unix.EBUSY) && time.Since(begun) < 5*time.Second; err = unix.Unmount(b.target, 0) {
		runtime.Gosched()
	}
	must(b.t, err)
	b.ended(m)
}

// shows fails the test unless the mount shows the image.
func (b *bench) shows(image string) {
	b.t.Helper()
	want := asLower(corpus.Get(b.t, image).Listing(b.t))
	got, err := tree.Walk(b.target)
	must(b.t, err)
	// Overlayfs counts no links of directories, and has numbers of its own.
	for i, d := range tree.Diff(want, got, tree.Ino, tree.DirNlink) {
		if i < 10 {
			b.t.Error(d)
		}
	}
}

// asLower is what overlayfs shows of entries: it takes the marks of overlayfs in an
// image for its own, and hides them.
func asLower(entries []corpus.Entry) []corpus.Entry {
	whiteout := func(e corpus.Entry) bool { return e.Mode&unix.S_IFMT == unix.S_IFCHR && *e.Rdev == [2]uint32{} }
	shown := slices.DeleteFunc(slices.Clone(entries), whiteout)
	for i, e := range shown {
		shown[i].Xattrs = maps.Clone(e.Xattrs)
		maps.DeleteFunc(shown[i].Xattrs, func(name string, _ []byte) bool { return strings.HasPrefix(name, "trusted.overlay.") })
	}
	return shown
}

// emptied is a directory of the corpus's tree.
const emptied = "sizes"

// change writes a file, removes something and puts an empty directory in the place
// of a full one.
func (b *bench) change() {
	b.t.Helper()
	must(b.t, os.WriteFile(filepath.Join(b.target, "written"), []byte("new"), 0o640))
	must(b.t, os.RemoveAll(filepath.Join(b.target, "deep")))
	must(b.t, os.RemoveAll(filepath.Join(b.target, emptied)))
	must(b.t, os.Mkdir(filepath.Join(b.target, emptied), 0o700))
}

// changed fails the test unless the mount shows that, and the image otherwise.
func (b *bench) changed(image string) {
	b.t.Helper()
	want := []string{"written", emptied}
	full := false
	for _, e := range corpus.Get(b.t, image).Listing(b.t) {
		full = full || path.Dir(e.Path) == emptied
		if path.Dir(e.Path) == "." && e.Path != "." && e.Path != "deep" && e.Path != emptied {
			want = append(want, e.Path)
		}
	}
	if len(want) < 5 || !full {
		b.t.Fatalf("the image has %q only", want)
	}
	slices.Sort(want)
	if got := b.list("."); !slices.Equal(got, want) {
		b.t.Errorf("the mount has %q, want %q", got, want)
	}
	if got := b.list(emptied); len(got) != 0 {
		b.t.Errorf("the emptied directory has %q", got)
	}
	if got, err := os.ReadFile(filepath.Join(b.target, "written")); err != nil || string(got) != "new" {
		b.t.Errorf("what was written: %q, %v", got, err)
	}
}

func (b *bench) list(dir string) []string {
	b.t.Helper()
	names, err := tree.List(filepath.Join(b.target, dir))
	must(b.t, err)
	slices.Sort(names)
	return names
}

// TestOverlayShowsTheImage: the writable mount shows what the image holds, through
// both kinds of backends and both kinds of upper directories; umount(2) of the one
// mount ends it all.
func TestOverlayShowsTheImage(t *testing.T) {
	for _, image := range []string{"plain", "lz4"} {
		for _, memory := range []bool{false, true} {
			for name, inner := range map[string]backend.Backend{"fuse": fusefs.Backend{}, "kernel": kernelBackend{t}} {
				t.Run(image+"/"+name, func(t *testing.T) {
					b := newBench(t)
					o := backend.Overlay{Inner: inner, Tmpfs: memory}
					if !memory {
						o.Upper = b.upper
					}
					m := b.mount(image, o)
					b.shows(image)
					b.change()
					b.changed(image)
					if d, err := backend.MountedDevice(b.target, backend.OverlayType); err != nil || d != m.Device() {
						t.Errorf("device %s, %v; the mount says %s", d, err, m.Device())
					}
					b.flagged("nosuid")
					b.umount(m)
				})
			}
		}
	}
}

// flagged fails the test unless the mount is writable and has an option.
func (b *bench) flagged(word string) {
	b.t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	must(b.t, err)
	for line := range strings.Lines(string(mounts)) {
		fields := strings.Fields(line)
		if fields[1] != b.target {
			continue
		}
		options := strings.Split(fields[3], ",")
		if fields[0] != "test" || fields[2] != "overlay" || !slices.Contains(options, word) || !slices.Contains(options, "rw") {
			b.t.Errorf("mounted as %q", line)
		}
		return
	}
	b.t.Errorf("%s is not mounted", b.target)
}

// kernelBackend mounts with the kernel's EROFS. Its mounts have nothing to wait for.
type kernelBackend struct{ t *testing.T }

type kernelMount struct{ dir string }

func (k kernelBackend) Mount(ctx context.Context, v backend.Volume, target string, o backend.Options) (backend.Mount, error) {
	require.Has(k.t, "kernel-erofs", "loop")
	data := make([]byte, v.Primary.Size())
	if err := v.Primary.ReadAt(ctx, data, 0); err != nil {
		return nil, err
	}
	file := filepath.Join(k.t.TempDir(), "image")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		return nil, err
	}
	_, err := kmount.MountFile(file, target, kmount.Options{Flags: o.Flags.Flags})
	return kernelMount{target}, err
}

func (m kernelMount) Wait() error            { return nil }
func (m kernelMount) Unmount() error         { return unix.Unmount(m.dir, 0) }
func (m kernelMount) Device() backend.Device { return "" }

// TestOverlayPersists: what was written is there again at the next mount of the
// same image, whatever characters are in the path, and is refused to another.
func TestOverlayPersists(t *testing.T) {
	for _, name := range []string{"upper", `a,b:c\d"e f`, strings.Repeat("long/", 300) + "upper"} {
		t.Run(name[:5], func(t *testing.T) {
			b := newBench(t)
			b.upper = filepath.Join(filepath.Dir(b.upper), name)
			must(t, os.MkdirAll(filepath.Dir(b.upper), 0o700))
			o := backend.Overlay{Upper: b.upper, Image: "sha256:one"}
			m := b.mount("plain", o)
			b.change()
			b.umount(m)
			m = b.mount("plain", o)
			b.changed("plain")
			b.umount(m)
			o.Image = "sha256:two"
			if _, err := b.try("lz4", o); err == nil || !strings.Contains(err.Error(), "changes of another image") {
				t.Errorf("the changes of another image: %v", err)
			}
			// Not checked, and remembered all the same.
			o.Image = ""
			b.umount(b.mount("plain", o))
			if noted, err := os.ReadFile(filepath.Join(b.upper, ".erofs-oci-image")); err != nil || string(noted) != "sha256:one\n" {
				t.Errorf("noted %q, %v", noted, err)
			}
		})
	}
}

// TestOverlayRoot: the root directory is the image's at first and the user's
// afterwards; where nothing was written the next image's.
func TestOverlayRoot(t *testing.T) {
	b := newBench(t)
	o := backend.Overlay{Upper: b.upper, Image: "sha256:one"}
	b.umount(b.mount("plain", o))
	// As if an image with another root directory had been there before.
	upper := filepath.Join(b.upper, "upper")
	must(t, errors.Join(os.Chmod(upper, 0o701), os.Chown(upper, 7, 7), unix.Setxattr(upper, "trusted.left", []byte("x"), 0)))
	m := b.mount("plain", o)
	if st, err := os.Stat(b.target); err != nil || st.Mode().Perm() != 0o701 {
		t.Errorf("changed by the user: %v, %v", st.Mode(), err)
	}
	b.umount(m)
	o.Image = "sha256:two"
	m = b.mount("lz4", o)
	b.shows("lz4")
	b.umount(m)
}

// TestOverlayLocked: an upper directory has one mount, also one that was resumed.
func TestOverlayLocked(t *testing.T) {
	b, other := newBench(t), newBench(t)
	o := backend.Overlay{Upper: b.upper, Inner: fusefs.Backend{}}
	m := b.mount("plain", o)
	inner := m.(interface{ Inner() []backend.Mount }).Inner()
	if _, err := other.try("plain", o); err == nil || !strings.Contains(err.Error(), "another mount keeps in "+b.upper) {
		t.Errorf("a second mount of an upper directory: %v", err)
	}
	if _, err := o.Resume(inner, b.target, m.Device(), nil); err == nil {
		t.Error("resumed under a living server")
	}
	b.umount(m)
	m = b.mount("plain", backend.Overlay{Tmpfs: true})
	inner = m.(interface{ Inner() []backend.Mount }).Inner()
	resumed, err := o.Resume(inner, b.target, m.Device(), nil)
	must(t, err)
	if _, err := other.try("plain", o); err == nil {
		t.Error("a resumed mount does not lock its directory")
	}
	must(t, resumed.Unmount())
	b.ended(resumed)
	other.umount(other.mount("plain", o))
}

// TestOverlayInUse: Unmount detaches a mount in use, which ends with its user.
func TestOverlayInUse(t *testing.T) {
	b := newBench(t)
	m := b.mount("plain", backend.Overlay{Tmpfs: true})
	f, err := os.Create(filepath.Join(b.target, "open"))
	must(t, err)
	must(t, m.Unmount())
	b.nothingMounted(b.target)
	if _, err := f.WriteString("still here"); err != nil {
		t.Error(err)
	}
	must(t, f.Close())
	b.ended(m)
	must(t, m.Unmount()) // it is gone already
}

// watched tells what became of the mounts of a backend.
type watched struct {
	backend.Backend
	made, ended int
}

func (w *watched) Mount(ctx context.Context, v backend.Volume, target string, o backend.Options) (backend.Mount, error) {
	m, err := w.Backend.Mount(ctx, v, target, o)
	if err != nil {
		return nil, err
	}
	w.made++
	return watchedMount{m, w}, nil
}

type watchedMount struct {
	backend.Mount
	by *watched
}

func (m watchedMount) Wait() error {
	defer func() { m.by.ended++ }()
	return m.Mount.Wait()
}

// TestOverlayFails: whatever fails, nothing is left mounted, and what was served
// has ended.
func TestOverlayFails(t *testing.T) {
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	for _, c := range []struct {
		name    string
		overlay backend.Overlay
		spoil   func(b *bench, o *backend.Overlay)
		image   []byte
		ctx     context.Context
		inner   int // mounts made below
		err     string
	}{
		{name: "neither", err: "either"},
		{name: "both", overlay: backend.Overlay{Tmpfs: true, Upper: "/x"}, err: "either"},
		{name: "no parent", overlay: backend.Overlay{Upper: "/nonexistent/upper"}, err: "/nonexistent/upper"},
		{name: "a file", err: "not a directory", spoil: func(b *bench, o *backend.Overlay) {
			must(b.t, os.WriteFile(b.upper, nil, 0o600))
			o.Upper = b.upper
		}},
		{name: "no image", overlay: backend.Overlay{Tmpfs: true}, image: make([]byte, 8192), err: "EROFS"},
		{name: "no target", overlay: backend.Overlay{Tmpfs: true}, inner: 1, err: "no such file", spoil: func(b *bench, o *backend.Overlay) {
			b.target = filepath.Join(b.target, "nonexistent")
		}},
		{name: "on an overlay", inner: 1, err: "cannot keep what is written", spoil: func(b *bench, o *backend.Overlay) {
			other := newBench(b.t)
			m := other.mount("plain", backend.Overlay{Tmpfs: true})
			b.t.Cleanup(func() { other.umount(m) })
			o.Upper = filepath.Join(other.target, "upper")
		}},
		{name: "cancelled", overlay: backend.Overlay{Tmpfs: true}, ctx: cancelled, err: "canceled"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t)
			o, inner := c.overlay, &watched{Backend: fusefs.Backend{}}
			o.Inner, o.Hidden = inner, b.hidden
			if c.spoil != nil {
				c.spoil(b, &o)
			}
			image, ctx := c.image, c.ctx
			if image == nil {
				image = corpus.Get(t, "plain").Data
			}
			if ctx == nil {
				ctx = t.Context()
			}
			m, err := o.Mount(ctx, backend.Volume{Primary: sourcetest.Memory(image)}, b.target, backend.Options{Name: "test"})
			if err == nil || m != nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%v, %v; want an error with %q", m, err, c.err)
			}
			if inner.made != c.inner || inner.ended != c.inner {
				t.Errorf("%d mounts below, %d ended; want %d", inner.made, inner.ended, c.inner)
			}
			b.nothingMounted(filepath.Dir(b.hidden))
		})
	}
}

// TestOverlayCancelledLate: a cancellation that comes when the inner mount is there
// takes everything away.
func TestOverlayCancelledLate(t *testing.T) {
	b := newBench(t)
	ctx, cancel := context.WithCancel(t.Context())
	inner := &watched{Backend: cancelling{fusefs.Backend{}, cancel}}
	o := backend.Overlay{Inner: inner, Hidden: b.hidden, Upper: b.upper}
	v := backend.Volume{Primary: sourcetest.Memory(corpus.Get(t, "plain").Data)}
	if _, err := o.Mount(ctx, v, b.target, backend.Options{Name: "test"}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if inner.made != 1 || inner.ended != 1 {
		t.Errorf("%d mounts below, %d ended", inner.made, inner.ended)
	}
	b.umount(b.mount("plain", backend.Overlay{Upper: b.upper})) // not locked any more
}

type cancelling struct {
	backend.Backend
	cancel func()
}

func (c cancelling) Mount(ctx context.Context, v backend.Volume, target string, o backend.Options) (backend.Mount, error) {
	defer c.cancel()
	return c.Backend.Mount(ctx, v, target, o)
}

// TestOverlayLeavesAlone: what lies beside in the directory is not touched.
func TestOverlayLeavesAlone(t *testing.T) {
	b := newBench(t)
	must(t, os.MkdirAll(filepath.Join(b.upper, "work", "mine"), 0o755))
	must(t, os.WriteFile(filepath.Join(b.upper, "image"), []byte("a disk"), 0o644))
	b.umount(b.mount("plain", backend.Overlay{Upper: b.upper, Image: "sha256:one"}))
	if got, err := os.ReadFile(filepath.Join(b.upper, "image")); err != nil || !bytes.Equal(got, []byte("a disk")) {
		t.Errorf("a file beside: %q, %v", got, err)
	}
	if _, err := os.Stat(filepath.Join(b.upper, "work", "mine")); err != nil {
		t.Error(err)
	}
}

// TestOverlayInUserNamespace runs the tests of what is kept as root of a user
// namespace.
func TestOverlayInUserNamespace(t *testing.T) {
	require.Has(t, "root", "fuse", "overlay", "userns", "unshare")
	cmd := exec.CommandContext(t.Context(), "unshare", "-Urm", os.Args[0], "-test.v", "-test.run=^TestOverlay(Persists|InUse|Locked)$")
	said, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(said), "--- PASS: TestOverlayPersists") {
		t.Errorf("%v\n%s", err, said)
	}
}
