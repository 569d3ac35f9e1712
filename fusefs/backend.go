package fusefs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/erofsfmt"
)

// maxRead is the largest READ that the kernel may send. 1 MiB would need
// splicing, which gains nothing here.
const maxRead = 512 << 10

// Backend mounts with our own reader over FUSE.
type Backend struct{}

// Mount opens the image in v and mounts it on target: by mount(2) where that is
// allowed, else by the fusermount3 helper.
func (Backend) Mount(ctx context.Context, v backend.Volume, target string, o backend.Options) (backend.Mount, error) {
	devices := make([]erofsfmt.ReaderAt, len(v.Devices))
	for i, d := range v.Devices {
		devices[i] = d
	}
	im, err := erofsfmt.OpenWith(ctx, v.Primary, erofsfmt.Options{Devices: devices})
	if err != nil {
		return nil, err
	}
	dev, err := attach(target, o)
	if err != nil {
		return nil, err
	}
	id, err := backend.MountedDevice(target, backend.FuseType)
	if err != nil {
		return nil, errors.Join(err, unix.Close(dev))
	}
	m, err := serve(im, dev, target, o)
	if err != nil {
		return nil, errors.Join(err, backend.Detach(target, id, true))
	}
	m.device = id
	return m, nil
}

// mount is a served FUSE mount.
type mount struct {
	target string
	device backend.Device
	log    *slog.Logger
	done   chan struct{}
}

// serve answers what comes over the connection dev, which it takes over.
func serve(im *erofsfmt.Image, dev int, target string, o backend.Options) (*mount, error) {
	log := o.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	life, cancel := context.WithCancel(context.Background())
	server, err := fuse.NewServer(newFileSystem(life, im, log), fmt.Sprintf("/dev/fd/%d", dev), &fuse.MountOptions{
		MaxBackground:            64,
		MaxWrite:                 maxRead,
		EnableSymlinkCaching:     true,
		ExplicitDataCacheControl: true,
		Logger:                   slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	})
	if err != nil {
		cancel()
		return nil, fmt.Errorf("fuse: %w", err)
	}
	m := &mount{target: target, log: log, done: make(chan struct{})}
	go func() {
		defer close(m.done)
		defer cancel()
		server.Serve()
	}()
	return m, nil
}

func (m *mount) Wait() error {
	<-m.done
	return nil
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
