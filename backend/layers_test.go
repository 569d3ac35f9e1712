package backend_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
	"github.com/erofs-oci/erofs-oci/fusefs"
	"github.com/erofs-oci/erofs-oci/tests/layered"
	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// layersOf is the volume of a stack.
func layersOf(t *testing.T, stack layered.Stack) backend.Volume {
	t.Helper()
	var v backend.Volume
	for _, im := range stack.Layers(t, mkerofs.Options{}) {
		below := v
		v = backend.Volume{Primary: sourcetest.Memory(im)}
		if below.Primary != nil {
			v.Below = below.Layers()
		}
	}
	return v
}

// mountLayers mounts a stack, each layer by itself, and fails the test if that does
// not end.
func (b *bench) mountLayers(stack layered.Stack, o backend.Overlay) backend.Mount {
	b.t.Helper()
	o.Hidden, o.Each = b.hidden, true
	m, err := o.Mount(b.t.Context(), layersOf(b.t, stack), b.target, backend.Options{Name: "test"})
	if err != nil {
		b.t.Fatal(err)
	}
	return m
}

// showsStack fails the test unless the mount shows what the layers were merged to.
func (b *bench) showsStack(stack layered.Stack) {
	b.t.Helper()
	dir := filepath.Join(b.t.TempDir(), "squashed")
	must(b.t, os.Mkdir(dir, 0o700))
	m, err := fusefs.Backend{}.Mount(b.t.Context(), backend.Volume{Primary: sourcetest.Memory(stack.Squashed(b.t, mkerofs.Options{}))}, dir, backend.Options{})
	must(b.t, err)
	want, err := tree.Walk(dir)
	must(b.t, errors.Join(err, m.Unmount(), m.Wait()))
	got, err := tree.Walk(b.target)
	must(b.t, err)
	for i, d := range tree.Diff(want, got, tree.Ino, tree.DirNlink) {
		if i < 10 {
			b.t.Error(d)
		}
	}
}

// TestOverlayOfLayers: layers are laid over each other, as many as the kernel takes and
// whatever their hidden directories are called; umount(2) of the one mount ends all.
func TestOverlayOfLayers(t *testing.T) {
	many := layered.Many(3)
	for range 100 {
		many = append(many, []layered.Entry{layered.Dir(".", 0o755)})
	}
	for _, c := range []struct {
		name   string
		stack  layered.Stack
		hidden string
	}{
		{"two", layered.Cases()["files"], "plain"},
		{"strange", layered.Cases()["deleted and back"], `a,b:c\d"e f`},
		{"long", layered.Cases()["opaque"], strings.Repeat("long/", 300)},
		{"many", many, "plain"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, o := range []backend.Overlay{{}, {Tmpfs: true}, {Upper: "upper"}} {
				b := newBench(t)
				b.hidden = filepath.Join(b.hidden, c.hidden)
				must(t, os.MkdirAll(b.hidden, 0o700))
				if o.Upper != "" {
					o.Upper = b.upper
				}
				inner := &watched{Backend: fusefs.Backend{}}
				o.Inner = inner
				m := b.mountLayers(c.stack, o)
				b.showsStack(c.stack)
				err := os.WriteFile(filepath.Join(b.target, "new"), nil, 0o600)
				if readOnly := !o.Tmpfs && o.Upper == ""; readOnly != errors.Is(err, unix.EROFS) || !readOnly && err != nil {
					t.Errorf("a write: %v", err)
				}
				b.umount(m)
				if inner.made != len(c.stack) || inner.ended != len(c.stack) {
					t.Errorf("%d layers were mounted and %d ended, of %d", inner.made, inner.ended, len(c.stack))
				}
			}
		})
	}
}

// TestOverlayOfOneLayer: what a single layer hides is hidden, although there is nothing
// below it.
func TestOverlayOfOneLayer(t *testing.T) {
	b := newBench(t)
	stack := layered.Stack{{layered.Dir(".", 0o755), layered.File("f", "1"), layered.Removed("gone")}}
	m := b.mountLayers(stack, backend.Overlay{Inner: fusefs.Backend{}})
	b.showsStack(stack)
	b.umount(m)
}

// brokenAt is a backend that fails at a layer.
type brokenAt struct {
	*watched
	layer int
	fail  func() error // nil: it goes on
}

func (f brokenAt) Mount(ctx context.Context, v backend.Volume, target string, o backend.Options) (backend.Mount, error) {
	if f.made == f.layer {
		if err := f.fail(); err != nil {
			return nil, err
		}
	}
	return f.watched.Mount(ctx, v, target, o)
}

// TestOverlayOfLayersFails: the error names the layer, and those that were mounted
// already have ended.
func TestOverlayOfLayersFails(t *testing.T) {
	stack := layered.Many(4)
	boom := errors.New("broken by the test")
	for _, c := range []struct {
		name string
		fail func(cancel func()) error
		made int
		want string
	}{
		{"a layer", func(func()) error { return boom }, 2, "layer 1: broken by the test"},
		{"cancelled", func(cancel func()) error { cancel(); return nil }, 2, "canceled"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			inner := &watched{Backend: fusefs.Backend{}}
			o := backend.Overlay{Each: true, Hidden: b.hidden, Inner: brokenAt{inner, 2, func() error { return c.fail(cancel) }}}
			m, err := o.Mount(ctx, layersOf(t, stack), b.target, backend.Options{Name: "test"})
			if err == nil || m != nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, %v", m, err)
			}
			if inner.made != c.made || inner.ended != c.made {
				t.Errorf("%d layers were mounted and %d ended, want %d", inner.made, inner.ended, c.made)
			}
			b.nothingMounted(filepath.Dir(b.hidden))
		})
	}
	b := newBench(t)
	v := backend.Volume{Below: make([]backend.Volume, 500)}
	o := backend.Overlay{Each: true, Inner: fusefs.Backend{}, Hidden: b.hidden}
	if _, err := o.Mount(t.Context(), v, b.target, backend.Options{}); err == nil || !strings.Contains(err.Error(), "501 layers") {
		t.Errorf("too many: %v", err)
	}
	// Who takes one layer says so.
	two := layersOf(t, stack[:2])
	if _, err := (fusefs.FileBackend{}).Mount(t.Context(), two, b.target, backend.Options{}); err == nil || !strings.Contains(err.Error(), fmt.Sprint(2)) {
		t.Errorf("two layers for one: %v", err)
	}
}

// staged makes what a server leaves that is killed while it mounts: hidden directories
// on which something is mounted, and a lock that nobody holds.
func (b *bench) staged(name string) (dir string, lock *os.File) {
	b.t.Helper()
	dir = filepath.Join(b.hidden, name)
	must(b.t, errors.Join(os.Mkdir(dir, 0o700), os.Mkdir(filepath.Join(dir, "0"), 0o700), os.Mkdir(filepath.Join(dir, "1"), 0o700)))
	lock, err := os.Create(filepath.Join(dir, "lock"))
	must(b.t, err)
	b.t.Cleanup(func() { lock.Close() })
	must(b.t, unix.Mount("test", filepath.Join(dir, "0"), "tmpfs", 0, ""))
	return dir, lock
}

// TestOverlaySweeps: what a killed server left is taken away by the next; what another
// uses, or another user owns, is not.
func TestOverlaySweeps(t *testing.T) {
	b := newBench(t)
	left, _ := b.staged("erofs-oci-overlay-left")
	used, lock := b.staged("erofs-oci-overlay-used")
	others, _ := b.staged("erofs-oci-overlay-others")
	strange, _ := b.staged("something-else")
	must(t, os.Chown(others, 1, 1))
	held := unix.Flock_t{Type: unix.F_WRLCK}
	must(t, unix.FcntlFlock(lock.Fd(), unix.F_OFD_SETLK, &held))
	b.umount(b.mount("plain", backend.Overlay{Tmpfs: true}))
	if _, err := os.Lstat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what was left is still there: %v", err)
	}
	for _, dir := range []string{used, others, strange} {
		if _, err := backend.MountedDevice(filepath.Join(dir, "0"), "tmpfs"); err != nil {
			t.Errorf("was taken away: %v", err)
		}
	}
	must(t, lock.Close())
	must(t, errors.Join(os.Chown(others, 0, 0), unix.Unmount(filepath.Join(strange, "0"), 0), os.RemoveAll(strange)))
	b.umount(b.mount("plain", backend.Overlay{Tmpfs: true}))
}
