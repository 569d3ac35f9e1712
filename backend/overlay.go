package backend

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// OverlayType is the type under which /proc/mounts shows a writable mount.
const OverlayType = "overlay"

// Overlay makes the mounts of another backend writable, and lays several of them over
// each other, with the kernel's overlayfs:
//
//	target               overlay, the only mount that stays to be seen
//	 ├ upper, work       in the directory Upper, or on a tmpfs of its own
//	 ├ lower 0           what Inner mounts: the topmost layer
//	 ├ lower 1 …         the others
//
// What Inner mounts, and the tmpfs, are mounted on hidden directories for as long as it
// takes to mount the overlay. That holds their file systems from then on, without a
// directory, so that whoever unmounts target, by umount(8) or otherwise, ends
// everything.
//
// The root directory's owner, mode and attributes are the image's when Upper is
// used for the first time.
//
// What an image has of overlayfs's own marks (whiteouts, attributes named
// trusted.overlay.*) is taken for such: it is not shown.
//
// It takes root, or the root of a user namespace with a mount namespace of its
// own.
type Overlay struct {
	Inner Backend
	// Each is for an Inner that mounts one layer only: it is given each layer of a
	// volume by itself. The mount is read-only then if neither Upper nor Tmpfs is
	// set.
	Each bool
	// Upper is the directory that keeps what is written, also for the next
	// mount; it is made if only its parent is there. See upperDir for what is in
	// it. It cannot be on an overlay or on a network's file system.
	Upper string
	// Tmpfs keeps what is written in memory instead, until the mount ends.
	Tmpfs bool
	// Image says of which image the content of Upper are changes, as a digest.
	// Changes of one image make no sense on another: Upper remembers what it
	// belongs to. Empty is not checked.
	Image string
	// Hidden is where the hidden directories are made; os.TempDir if empty.
	Hidden string
}

// maxLayers is how many layers the kernel takes (fs/overlayfs/params.h OVL_MAX_STACK).
const maxLayers = 500

// check says what makes no sense, and returns what Inner is given.
func (o Overlay) check(v Volume) ([]Volume, error) {
	if o.Tmpfs && o.Upper != "" || !o.writable() && !o.Each {
		return nil, errors.New("overlay: what is written is kept either in a directory or in memory")
	}
	layers := []Volume{v}
	if o.Each {
		layers = v.Layers()
	}
	if n := len(layers); n > maxLayers {
		return nil, fmt.Errorf("%d layers: the kernel's overlayfs takes %d at most; --backend=fuse does not use it", n, maxLayers)
	}
	return layers, nil
}

func (o Overlay) writable() bool { return o.Tmpfs || o.Upper != "" }

// Mount mounts v by Inner and the overlay on target. It leaves nothing if it fails.
func (o Overlay) Mount(ctx context.Context, v Volume, target string, opts Options) (Mount, error) {
	layers, err := o.check(v)
	if err != nil {
		return nil, err
	}
	upper, err := o.lock()
	if err != nil {
		return nil, err
	}
	m := newOverlayMount(target, upper, opts.Log)
	if err := sweepStaged(o.Hidden); err != nil {
		m.log.Warn("what a killed server left of an overlay stays", "err", err)
	}
	s, err := o.stage(opts.Name, len(layers))
	if err == nil {
		err = o.mountStaged(ctx, m, s, layers, opts)
	}
	switch closeErr := s.close(); {
	case err != nil:
		return nil, errors.Join(err, closeErr, m.release())
	case closeErr != nil:
		m.log.Warn("a hidden directory of the overlay is left", "dir", s.dir, "err", closeErr)
	}
	return m, nil
}

// lock is nil where no directory keeps what is written.
func (o Overlay) lock() (*upperDir, error) {
	if o.Upper == "" {
		return nil, nil
	}
	return lockUpper(o.Upper, o.Image)
}

func (o Overlay) mountStaged(ctx context.Context, m *overlayMount, s *staging, layers []Volume, opts Options) error {
	err := o.mountLayers(ctx, m, s, layers, opts)
	if err == nil {
		err = m.cover(ctx, o, s, opts)
	}
	// Taken away from the hidden directories they live on in the overlay, or end.
	unmountErr := m.unmountLayers()
	if err == nil && unmountErr != nil {
		err = Detach(m.target, m.device, true)
	}
	if unmountErr != nil {
		return errors.Join(err, unmountErr) // they would not end
	}
	if err != nil {
		return errors.Join(err, m.waitLayers())
	}
	return nil
}

// mountLayers mounts each layer on its hidden directory.
func (o Overlay) mountLayers(ctx context.Context, m *overlayMount, s *staging, layers []Volume, opts Options) error {
	for i, v := range layers {
		inner, err := o.Inner.Mount(ctx, v, s.lower[i], opts)
		if err != nil && len(layers) > 1 {
			err = fmt.Errorf("%s: %w", cmp.Or(v.Name, fmt.Sprintf("layer %d", len(layers)-1-i)), err)
		}
		if err != nil {
			return err
		}
		m.inner = append(m.inner, inner)
	}
	return nil
}

func (m *overlayMount) unmountLayers() error {
	var errs []error
	for _, inner := range m.inner {
		errs = append(errs, inner.Unmount())
	}
	return errors.Join(errs...)
}

func (m *overlayMount) waitLayers() error {
	var errs []error
	for _, inner := range m.inner {
		errs = append(errs, inner.Wait())
	}
	return errors.Join(errs...)
}

// cover mounts the overlay over what is staged.
func (m *overlayMount) cover(ctx context.Context, o Overlay, s *staging, opts Options) error {
	upper := m.upper
	if o.Tmpfs {
		upper = &upperDir{dir: s.memory}
	}
	// What is below may be served by this process.
	var hidden []error
	err := Apart(func() (err error) {
		if upper != nil {
			if hidden, err = upper.prepare(s.lower[0]); err != nil {
				return err
			}
		}
		return s.mount(upper, m.target, opts)
	})
	for _, reason := range hidden {
		m.log.Warn("an attribute of the image's root directory is not to be seen in the writable mount", "err", reason)
	}
	if err != nil {
		return err
	}
	if m.device, err = MountedDevice(m.target, OverlayType); err != nil {
		return err
	}
	if err := context.Cause(ctx); err != nil {
		return errors.Join(err, Detach(m.target, m.device, true))
	}
	return nil
}

// Resume is the Mount of a device on target that another process mounted, and of
// which this process has taken over what is below: inner, the topmost layer first.
func (o Overlay) Resume(inner []Mount, target string, device Device, log *slog.Logger) (Mount, error) {
	upper, err := o.lock()
	if err != nil {
		return nil, err
	}
	m := newOverlayMount(target, upper, log)
	m.inner, m.device = inner, device
	return m, nil
}

// overlayMount is a mounted overlay and what it holds.
type overlayMount struct {
	inner   []Mount // of the layers, the topmost first
	target  string
	device  Device
	log     *slog.Logger
	upper   *upperDir    // nil where no directory keeps what is written
	release func() error // lets go of upper, once
}

func newOverlayMount(target string, upper *upperDir, log *slog.Logger) *overlayMount {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &overlayMount{target: target, log: log, upper: upper, release: sync.OnceValue(upper.close)}
}

// Inner are the mounts below the overlay, the topmost first. They have no directory.
func (m *overlayMount) Inner() []Mount { return m.inner }

func (m *overlayMount) Device() Device { return m.device }

// Wait waits for what is below: that ends after the overlay.
func (m *overlayMount) Wait() error {
	return errors.Join(m.waitLayers(), Gone(m.target, m.device), m.release())
}

func (m *overlayMount) Unmount() error {
	err := Detach(m.target, m.device, false)
	if errors.Is(err, unix.EBUSY) {
		m.log.Warn("in use: detached; the server ends with the last user", "dir", m.target)
		err = Detach(m.target, m.device, true)
	}
	return err
}

// mount mounts the overlay of upper, which may be nil, over what is staged. It changes
// the working directory of its thread, which is to be one of Apart.
//
// mount(2) takes a page of options, and there may be hundreds of layers: they are
// named by their numbers in the working directory.
func (s *staging) mount(upper *upperDir, target string, opts Options) error {
	if err := errors.Join(unix.Unshare(unix.CLONE_FS), unix.Chdir(s.dir)); err != nil {
		return fmt.Errorf("enter %s: %w", s.dir, err)
	}
	var lower []string
	for i := range s.lower {
		lower = append(lower, strconv.Itoa(i))
	}
	if upper != nil {
		return upper.mount(lower, target, opts)
	}
	if len(lower) == 1 {
		lower = append(lower, memoryName) // one alone is no overlay; nothing is in it
	}
	// What layers say of each other in attributes, other than what they hide, is
	// not followed: it is EPERM. They need not come from one hand.
	words := "redirect_dir=nofollow,metacopy=off,lowerdir=" + strings.Join(lower, ":")
	err := unix.Mount(opts.Name, target, OverlayType, opts.Flags.Flags|unix.MS_RDONLY, words)
	if err != nil {
		return fmt.Errorf("mount %d layers over each other on %s: %w%s", len(s.lower), target, err, overlayAdvice(err, false))
	}
	return nil
}

// mount mounts the overlay of upper over lower, the names of directories in the
// working directory.
func (u *upperDir) mount(lower []string, target string, opts Options) error {
	var files []*os.File
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	words := []string{"lowerdir=" + strings.Join(lower, ":")}
	for _, part := range []struct{ name, dir string }{{"upperdir", u.changes()}, {"workdir", u.work()}} {
		value := part.dir
		if !plainPath(value) {
			// A path of plain characters that leads to the same directory; of
			// this thread, whose files may be its own.
			f, err := os.OpenFile(part.dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			files = append(files, f)
			value = "/proc/thread-self/fd/" + strconv.Itoa(int(f.Fd()))
		}
		words = append(words, part.name+"="+value)
	}
	initial, err := InitialUserNamespace(os.DirFS("/"))
	if err != nil {
		return err
	}
	if !initial {
		// There overlayfs may not keep its notes in trusted.* attributes.
		words = append(words, "userxattr")
	}
	if err := unix.Mount(opts.Name, target, OverlayType, opts.Flags.Flags, strings.Join(words, ",")); err != nil {
		return fmt.Errorf("mount an overlay on %s, with what is written kept in %s: %w%s", target, u.dir, err, overlayAdvice(err, true))
	}
	return nil
}

// maxPlainPath keeps two paths, the numbers of maxLayers layers and all their names
// within the page that mount(2) takes.
const maxPlainPath = 900

// plainPath tells whether a path can be said in an option of overlayfs as it is.
// What separates options and layers can be escaped, but not in the same way for
// each kernel (fs/overlayfs/params.c ovl_next_opt, ovl_parse_param_split_lowerdirs).
func plainPath(path string) bool {
	return len(path) <= maxPlainPath && !strings.ContainsAny(path, `\,:"`)
}

// overlayAdvice says what an errno of mount(2) means here. The kernel gives its
// reason in its log only.
func overlayAdvice(err error, writable bool) string {
	switch {
	case !writable && errors.Is(err, unix.ENODEV):
		return ": this kernel has no overlayfs; load the module (modprobe overlay), or mount with --backend=fuse, which needs none"
	case errors.Is(err, unix.ENODEV):
		return ": this kernel has no overlayfs; load the module (modprobe overlay)"
	case !writable && errors.Is(err, unix.EPERM):
		return ": it takes root"
	case errors.Is(err, unix.EPERM):
		return ": a writable mount takes root, or a user namespace of your own (unshare -Urm) and Linux 5.11"
	case !writable && errors.Is(err, unix.EINVAL):
		return " (dmesg has the reason)"
	case errors.Is(err, unix.EINVAL):
		return ": the directory's file system cannot keep what is written to an overlay; one on ext4, xfs, btrfs or tmpfs can (dmesg has the reason)"
	}
	return ""
}
