package fusefs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/erofsfmt"
)

// maxRead is the largest READ that the kernel may send. 1 MiB would need
// splicing, which gains nothing here.
const maxRead = 512 << 10

// Backend mounts with our own reader over FUSE.
type Backend struct {
	CacheBytes int64  // as in erofsfmt.Options
	Subtype    string // what /proc/mounts shows after "fuse."; that of backend.FuseType if empty
	MaxRead    int    // the largest read that the kernel may send, where less than the default is wanted
	// Unchecked lets the user who mounts, and nobody else, read all of the image,
	// whatever the modes in it say.
	Unchecked bool
	// Revocable says that the image may turn out to be wrong while it is mounted: see
	// Revoke of the mount.
	Revocable bool
}

// unchecked heeds Unchecked only where others are not let in.
func (b Backend) unchecked(o backend.Options) bool { return b.Unchecked && !o.Flags.AllowOther }

// fuseType is the type of the mount, as /proc/mounts shows it.
func (b Backend) fuseType() string {
	if b.Subtype != "" {
		return "fuse." + b.Subtype
	}
	return backend.FuseType
}

func (b Backend) maxRead() int {
	if b.MaxRead > 0 {
		return min(b.MaxRead, maxRead)
	}
	return maxRead
}

// OpenImage opens the image in a volume, or those in its layers as one.
func OpenImage(ctx context.Context, v backend.Volume, o erofsfmt.Options) (*erofsfmt.Image, error) {
	var layers []erofsfmt.Layer
	for _, one := range v.Layers() {
		l := erofsfmt.Layer{Image: one.Primary, Name: one.Name}
		for _, d := range one.Devices {
			l.Devices = append(l.Devices, d)
		}
		layers = append(layers, l)
	}
	return erofsfmt.OpenLayers(ctx, layers, o)
}

// Mount opens the image in v, or its layers as one, and mounts it on target: by
// mount(2) where that is allowed, else by the fusermount3 helper.
func (b Backend) Mount(ctx context.Context, v backend.Volume, target string, o backend.Options) (backend.Mount, error) {
	im, err := OpenImage(ctx, v, erofsfmt.Options{CacheBytes: b.CacheBytes})
	if err != nil {
		return nil, err
	}
	initial, err := backend.InitialUserNamespace(os.DirFS("/"))
	if err != nil {
		return nil, err
	}
	if o.Name == "" {
		o.Name = "erofs-oci" // mount(2) does not take an empty source
	}
	dev, err := b.attach(target, o)
	if err != nil {
		return nil, err
	}
	id, err := backend.MountedDevice(target, b.fuseType())
	if err != nil {
		return nil, errors.Join(err, unix.Close(dev))
	}
	log := orNone(o.Log)
	life, end := context.WithCancel(context.Background())
	fsys := newFileSystem(life, im, log)
	fsys.trusted, fsys.device, fsys.failed = initial, id, o.Failed
	if b.Revocable {
		fsys.revoking = &revoking{}
	}
	done, err := serve(fsys, dev, log, !b.unchecked(o), func() { end(); fsys.end() })
	if err != nil {
		end()
		return nil, errors.Join(err, backend.Detach(target, id, true))
	}
	return &mount{target: target, device: id, log: log, done: done, revoking: fsys.revoking}, nil
}

// mount is a mount whose end is the end of a FUSE connection.
type mount struct {
	target string
	device backend.Device
	log    *slog.Logger
	done   <-chan struct{}
	// revoking is nil where that cannot be.
	revoking *revoking
}

// serve answers what comes over the connection dev, which it takes over. When the
// kernel ends the connection, it calls end and closes done.
func serve(fsys fuse.RawFileSystem, dev int, log *slog.Logger, acl bool, end func()) (done <-chan struct{}, err error) {
	server, err := fuse.NewServer(fsys, fmt.Sprintf("/dev/fd/%d", dev), &fuse.MountOptions{
		MaxBackground:            64,
		MaxWrite:                 maxRead,
		EnableSymlinkCaching:     true,
		ExplicitDataCacheControl: true,
		// Answers are in memory: go-fuse would fill a pipe and drain it again.
		DisableSplice: true,
		// access(2) heeds the ACLs that GETXATTR shows, as on the kernel's erofs.
		// It makes the kernel heed modes, too, whatever the mount options say.
		EnableAcl: acl,
		// It makes a stacked file system of us, on which the kernel mounts no
		// EROFS (fs/erofs/super.c erofs_fc_fill_super).
		DisabledCapabilities: fuse.CAP_PASSTHROUGH,
		// A read of the kernel's EROFS that takes several requests fails if one of
		// them does. Else it would end there, and not every kernel takes that for
		// an error (fs/erofs/fileio.c erofs_fileio_ki_complete).
		ExtraCapabilities: fuse.CAP_ASYNC_DIO,
		Logger:            slog.NewLogLogger(log.With("from", "go-fuse").Handler(), slog.LevelWarn),
	})
	if err != nil {
		return nil, fmt.Errorf("fuse: %w", err)
	}
	makeUpForReaders()
	served := make(chan struct{})
	go func() {
		defer close(served)
		defer end()
		server.Serve()
	}()
	return served, nil
}

func (m *mount) Wait() error {
	<-m.done
	return backend.Gone(m.target, m.device)
}

func (m *mount) Device() backend.Device { return m.device }

func (m *mount) Unmount() error {
	err := backend.Detach(m.target, m.device, false)
	if errors.Is(err, unix.EBUSY) {
		m.log.Warn("in use: detached; the server ends with the last user", "dir", m.target)
		err = backend.Detach(m.target, m.device, true)
	}
	return err
}
