package nbdserve

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/backend/kmount"
)

// Backend mounts with the kernel's EROFS, on an nbd device of the kernel that this
// process serves. The zero value works.
type Backend struct {
	// These are as in DeviceOptions.
	Connections              int
	Timeout, DeadConnTimeout time.Duration
	Ioctl                    bool
	// Server are the options of the server of each device. Its log is that of
	// the mount. A ReadTimeout of zero is somewhat less than Timeout, so that
	// whatever the source does, the kernel gets its answer in time.
	Server Options
}

// server are the options for a device whose kernel has this much patience.
func (b Backend) server(patience time.Duration, log *slog.Logger, failed func(syscall.Errno)) Options {
	o := b.Server
	o.Log, o.Failed = log, failed
	if o.ReadTimeout == 0 {
		o.ReadTimeout = patience - min(patience/6, TimeoutMargin/2)
	}
	return o
}

// A Mount is a mounted volume.
type Mount struct {
	target   string
	log      *slog.Logger
	parts    []*part // the image, and the extra devices in their order
	life     context.Context
	end      context.CancelFunc
	serving  sync.WaitGroup
	finished chan struct{}
}

// A part of a volume is one source and the device that it is seen through.
type part struct {
	server *Server
	device *Device
}

// Mount serves v as nbd devices and mounts the image on target. The devices are
// the kernel's affair from then on: they end with the mount, whoever unmounts it.
func (b Backend) Mount(ctx context.Context, v backend.Volume, target string, o backend.Options) (backend.Mount, error) {
	if err := v.OneLayer(); err != nil {
		return nil, err
	}
	m := newMount(target, o.Log)
	if b.Timeout == 0 {
		b.Timeout = DefaultTimeout
	}
	connect := func(_ int, server *Server) (*Device, []net.Conn, error) {
		return Connect(ctx, DeviceOptions{
			Size: server.Size(), Connections: b.Connections, Timeout: b.Timeout, DeadConnTimeout: b.DeadConnTimeout,
			Ioctl: b.Ioctl, Log: m.log,
		})
	}
	err := m.start(v, func(int) Options { return b.server(b.Timeout, m.log, o.Failed) }, connect)
	if err != nil {
		return nil, errors.Join(err, m.disconnect())
	}
	if err := m.mount(ctx, o); err != nil {
		return nil, errors.Join(err, m.disconnect())
	}
	if err := m.leaveToKernel(ctx); err != nil {
		return nil, errors.Join(err, backend.Detach(target, m.Device(), true), m.disconnect())
	}
	go m.finish()
	return m, nil
}

// Reattach serves the devices of a mount whose server is gone: v is what that one
// served, devices what Attachments said, in that order.
func (b Backend) Reattach(ctx context.Context, v backend.Volume, devices []Attachment, target string, o backend.Options) (*Mount, error) {
	if len(devices) != 1+len(v.Devices) {
		return nil, fmt.Errorf("reattach %s: %d devices are recorded, and the volume has %d", target, len(devices), 1+len(v.Devices))
	}
	m := newMount(target, o.Log)
	reattach := func(i int, server *Server) (*Device, []net.Conn, error) {
		if server.Size() != devices[i].Size {
			return nil, nil, fmt.Errorf("reattach %s: the source has %d bytes, and the device %d", devices[i].Path(), server.Size(), devices[i].Size)
		}
		return Reattach(ctx, devices[i])
	}
	err := m.start(v, func(i int) Options { return b.server(devices[i].Timeout, m.log, o.Failed) }, reattach)
	if err == nil {
		// It may have been killed before it came to this.
		err = m.leaveToKernel(ctx)
	}
	if err != nil {
		// The devices live on: somebody else may be luckier.
		return nil, errors.Join(err, m.abandon())
	}
	go m.finish()
	return m, nil
}

func newMount(target string, log *slog.Logger) *Mount {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	m := &Mount{target: target, log: log, finished: make(chan struct{})}
	m.life, m.end = context.WithCancel(context.Background())
	return m
}

// start makes a server of each source, gets it a device, and begins to serve.
func (m *Mount) start(v backend.Volume, options func(int) Options, get func(int, *Server) (*Device, []net.Conn, error)) error {
	for i, source := range append([]backend.Source{v.Primary}, v.Devices...) {
		server, err := NewServer(Export{Source: source}, options(i))
		if err != nil {
			return err
		}
		device, conns, err := get(i, server)
		if err != nil {
			return errors.Join(err, server.Close())
		}
		p := &part{server: server, device: device}
		m.parts = append(m.parts, p)
		for _, c := range conns {
			m.serving.Go(func() { m.serve(p, c) })
		}
	}
	return nil
}

// finish waits until there is nothing to serve any more.
func (m *Mount) finish() {
	m.serving.Wait()
	m.end()
	close(m.finished)
}

// mount has the kernel mount what is served. mount(2) reads the image and cannot
// be interrupted; without its devices it fails.
func (m *Mount) mount(ctx context.Context, o backend.Options) error {
	stop := context.AfterFunc(ctx, func() {
		if err := m.disconnectDevices(); err != nil {
			m.log.Error("the nbd device cannot be disconnected, and the mount not given up", "err", err)
		}
	})
	var extra []string
	for _, p := range m.parts[1:] {
		extra = append(extra, p.device.Path())
	}
	err := kmount.Mount(m.parts[0].device.Path(), m.target, kmount.Options{Flags: o.Flags.Flags, Devices: extra})
	switch inTime := stop(); {
	case inTime:
		return err
	case err != nil:
		return fmt.Errorf("%w: %w", context.Cause(ctx), err)
	}
	return errors.Join(context.Cause(ctx), backend.Detach(m.target, m.Device(), true))
}

// leaveToKernel makes the devices end with the mount.
func (m *Mount) leaveToKernel(ctx context.Context) error {
	for _, p := range m.parts {
		if p.device.ioctl == nil {
			if err := p.device.SetDisconnectOnClose(ctx); err != nil {
				return err
			}
			continue
		}
		m.serving.Go(func() {
			if err := p.device.ioctl.disconnectAfterUse(); err != nil {
				m.log.Error("the nbd device cannot be disconnected after use; erofs-oci disconnect may do it", "device", p.device.Path(), "err", err)
			}
		})
	}
	return nil
}

// serve answers one connection, and makes it anew when the kernel gives it up: it
// does so when an answer takes longer than its timeout, as after this process was
// stopped for a while.
func (m *Mount) serve(p *part, conn net.Conn) {
	for {
		c := &farewellConn{Conn: conn}
		err := p.server.Transmit(m.life, c)
		if m.life.Err() != nil || err == nil && !c.left.Load() {
			return // the kernel disconnected the device
		}
		m.log.Warn("the kernel gave up a connection of the nbd device; it is made anew where that can be done", "device", p.device.Path(), "err", err)
		if p.device.ioctl != nil {
			return
		}
		again, err := p.device.reconnect(m.life, 1)
		if err != nil {
			m.log.Warn("the connection is not made anew; reads of the nbd device wait or fail", "device", p.device.Path(), "err", err)
			return
		}
		conn = again[0]
	}
}

// farewellConn notices that the other end left without the request to disconnect,
// after which nothing is read.
type farewellConn struct {
	net.Conn
	left atomic.Bool
}

func (c *farewellConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if errors.Is(err, io.EOF) {
		c.left.Store(true)
	}
	return n, err
}

// Attachments are what Reattach needs if this process ends before the mount does,
// the image's first; nil where the devices end with the process.
func (m *Mount) Attachments() []Attachment {
	var all []Attachment
	for _, p := range m.parts {
		a, ok := p.device.Attachment()
		if !ok {
			return nil
		}
		all = append(all, a)
	}
	return all
}

// Device is the number of the image's block device, which its mounts have as
// st_dev.
func (m *Mount) Device() backend.Device { return backend.Device(m.parts[0].device.number) }

// Wait returns when the kernel has disconnected the devices.
func (m *Mount) Wait() error {
	<-m.finished
	errs := []error{backend.Gone(m.target, m.Device())}
	for _, p := range m.parts {
		errs = append(errs, p.server.Close())
	}
	return errors.Join(errs...)
}

// Unmount takes the mount away; one in use is detached, and ends with its last
// user.
func (m *Mount) Unmount() error {
	err := backend.Detach(m.target, m.Device(), false)
	if errors.Is(err, unix.EBUSY) {
		m.log.Warn("in use: detached; the server ends with the last user", "dir", m.target)
		err = backend.Detach(m.target, m.Device(), true)
	}
	return err
}

// disconnectPatience bounds the end of a mount that failed.
const disconnectPatience = 30 * time.Second

// disconnect ends a mount that was not to be.
func (m *Mount) disconnect() error {
	return errors.Join(m.disconnectDevices(), m.abandon())
}

func (m *Mount) disconnectDevices() error {
	// The reason for giving up may be that the caller's ctx has ended.
	ctx, cancel := context.WithTimeout(context.Background(), disconnectPatience)
	defer cancel()
	var errs []error
	for _, p := range m.parts {
		errs = append(errs, p.device.Disconnect(ctx))
	}
	return errors.Join(errs...)
}

// Abandon ends the serving of a mount that lives on: its readers wait for another
// server to take it over.
func (m *Mount) Abandon() error {
	err := m.abandon()
	<-m.finished
	return err
}

// abandon ends the serving and leaves the devices to the kernel.
func (m *Mount) abandon() error {
	m.end()
	m.serving.Wait()
	var errs []error
	for _, p := range m.parts {
		errs = append(errs, p.server.Close())
	}
	return errors.Join(errs...)
}
