package nbdserve

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Numbers of linux/nbd-netlink.h and linux/nbd.h.
const (
	familyName = "nbd"
	groupName  = "nbd_mc_group"

	cmdConnect     = 1
	cmdDisconnect  = 2
	cmdReconfigure = 3
	cmdLinkDead    = 4

	attrIndex           = 1
	attrSizeBytes       = 2
	attrBlockSizeBytes  = 3
	attrTimeout         = 4
	attrServerFlags     = 5
	attrClientFlags     = 6
	attrSockets         = 7
	attrDeadConnTimeout = 8
	attrIdentifier      = 10

	attrSocketItem = 1
	attrSocketFD   = 1

	clientDisconnectOnClose = 1 << 1
)

// serverFlags is what the kernel is told of the server. Of a device that cannot
// be written nothing is ever flushed, so it is not said that it could be.
const serverFlags = 1<<0 | // HAS_FLAGS
	1<<1 | // READ_ONLY
	1<<8 // CAN_MULTI_CONN

// errNoNetlink says that the nbd driver cannot be spoken to here but by ioctl.
var errNoNetlink = errors.New("no netlink to the nbd driver")

// netlinkPatience bounds the wait for an answer. The kernel answers while it is
// asked; that it does not is a sign of a hang in its nbd driver.
const netlinkPatience = 30 * time.Second

// kernel is a conversation with the kernel's nbd driver.
type kernel struct {
	c      *genetlink.Conn
	family genetlink.Family
}

// dialKernel finds the driver, and loads it where it is not there yet.
func dialKernel(ctx context.Context) (*kernel, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	k, err := dialFamily()
	if !errors.Is(err, errNoNetlink) {
		return k, err
	}
	if _, statErr := os.Stat("/sys/module/nbd"); statErr == nil {
		return nil, err
	}
	if err := loadModule(ctx); err != nil {
		return nil, err
	}
	return dialFamily()
}

func dialFamily() (*kernel, error) {
	c, err := genetlink.Dial(nil)
	for _, forbidden := range []error{unix.EAFNOSUPPORT, unix.EPROTONOSUPPORT, unix.EPERM, unix.EACCES} {
		if errors.Is(err, forbidden) {
			return nil, fmt.Errorf("%w: %w", errNoNetlink, err)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	family, err := c.GetFamily(familyName)
	if err != nil {
		c.Close()
		if errors.Is(err, fs.ErrNotExist) {
			return nil, errNoNetlink
		}
		return nil, fmt.Errorf("netlink: find the nbd driver: %w", err)
	}
	if err := c.SetDeadline(time.Now().Add(netlinkPatience)); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return &kernel{c, family}, nil
}

// loadModule has modprobe(8) load the driver, as mount(8) does for file systems.
func loadModule(ctx context.Context) error {
	const advice = "load the module (modprobe nbd), or use --backend=fuse"
	path, err := exec.LookPath("modprobe")
	if err != nil {
		path = "/sbin/modprobe"
	}
	said, err := exec.CommandContext(ctx, path, familyName).CombinedOutput()
	if err != nil {
		return fmt.Errorf("this kernel has no nbd; %s: %w %.200s", advice, err, said)
	}
	return nil
}

func (k *kernel) Close() error { return k.c.Close() }

// call sends a command. The kernel answers a failure by itself; a success without
// data only if it is asked to acknowledge.
func (k *kernel) call(command uint8, flags netlink.HeaderFlags, encode func(*netlink.AttributeEncoder)) ([]genetlink.Message, error) {
	e := netlink.NewAttributeEncoder()
	encode(e)
	data, err := e.Encode()
	if err != nil {
		return nil, err
	}
	m := genetlink.Message{Header: genetlink.Header{Command: command, Version: k.family.Version}, Data: data}
	answer, err := k.c.Execute(m, k.family.ID, netlink.Request|flags)
	if errors.Is(err, unix.EPERM) {
		return nil, fmt.Errorf("%w: nbd devices take root (CAP_SYS_ADMIN in the first user namespace)", err)
	}
	return answer, err
}

// connect makes a device of a free one, or of a new one, and returns its number.
func (k *kernel) connect(o DeviceOptions, sockets []*os.File) (int, error) {
	answer, err := k.call(cmdConnect, 0, func(e *netlink.AttributeEncoder) {
		e.Uint64(attrSizeBytes, uint64(o.Size))
		e.Uint64(attrBlockSizeBytes, uint64(o.BlockSize))
		e.Uint64(attrTimeout, uint64(inSeconds(o.Timeout)/time.Second))
		e.Uint64(attrDeadConnTimeout, uint64(inSeconds(o.DeadConnTimeout)/time.Second))
		e.Uint64(attrServerFlags, serverFlags)
		e.String(attrIdentifier, o.Identifier)
		encodeSockets(e, sockets)
	})
	if err != nil {
		return 0, err
	}
	for _, m := range answer {
		if index, ok := indexOf(m); ok {
			return index, nil
		}
	}
	return 0, errors.New("the kernel's answer names no device")
}

// indexOf finds the number of the device that a message is about.
func indexOf(m genetlink.Message) (int, bool) {
	d, err := netlink.NewAttributeDecoder(m.Data)
	if err != nil {
		return 0, false
	}
	index, found := 0, false
	for d.Next() {
		if d.Type() == attrIndex {
			index, found = int(d.Uint32()), true
		}
	}
	return index, found && d.Err() == nil
}

func encodeSockets(e *netlink.AttributeEncoder, sockets []*os.File) {
	e.Nested(attrSockets, func(list *netlink.AttributeEncoder) error {
		for _, s := range sockets {
			list.Nested(attrSocketItem, func(item *netlink.AttributeEncoder) error {
				item.Uint32(attrSocketFD, uint32(s.Fd()))
				return nil
			})
		}
		return nil
	})
}

// A reconfiguration is what changes in a connected device.
type reconfiguration struct {
	sockets           []*os.File // for dead connections
	disconnectOnClose bool
}

func (k *kernel) reconfigure(a Attachment, r reconfiguration) error {
	_, err := k.call(cmdReconfigure, netlink.Acknowledge, func(e *netlink.AttributeEncoder) {
		e.Uint32(attrIndex, uint32(a.Index))
		e.String(attrIdentifier, a.Identifier)
		if r.disconnectOnClose {
			e.Uint64(attrClientFlags, clientDisconnectOnClose)
		}
		if len(r.sockets) > 0 {
			encodeSockets(e, r.sockets)
		}
	})
	return err
}

func (k *kernel) disconnect(index int) error {
	_, err := k.call(cmdDisconnect, netlink.Acknowledge, func(e *netlink.AttributeEncoder) {
		e.Uint32(attrIndex, uint32(index))
	})
	return err
}

// deaths tells when a connection of one device has died.
type deaths struct {
	k     *kernel
	index int
}

// watch begins to listen, on a socket of its own.
func (k *kernel) watch(index int) (*deaths, error) {
	w, err := dialFamily()
	if err != nil {
		return nil, err
	}
	for _, g := range w.family.Groups {
		if g.Name == groupName {
			if err := w.c.JoinGroup(g.ID); err != nil {
				return nil, errors.Join(fmt.Errorf("netlink: listen to the nbd driver: %w", err), w.Close())
			}
			return &deaths{w, index}, nil
		}
	}
	return nil, errors.Join(errors.New("netlink: the nbd driver announces nothing"), w.Close())
}

// wait returns when a connection of the device has died, or after patience; its
// error is that of ctx, or of the listening.
func (d *deaths) wait(ctx context.Context, patience time.Duration) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := d.k.c.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { d.k.c.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		messages, _, err := d.k.c.Receive()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, unix.ENOBUFS):
			return nil
		case err != nil:
			return fmt.Errorf("netlink: listen to the nbd driver: %w", err)
		}
		for _, m := range messages {
			if index, ok := indexOf(m); ok && index == d.index && m.Header.Command == cmdLinkDead {
				return nil
			}
		}
	}
}

func (d *deaths) Close() error { return d.k.Close() }
