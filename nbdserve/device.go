package nbdserve

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// What the kernel is told when nothing else is said.
const (
	// DefaultTimeout is DeviceOptions.Timeout for a source that fails reads after
	// a minute.
	DefaultTimeout = time.Minute + TimeoutMargin
	// TimeoutMargin is by how much the kernel's patience exceeds the source's: a
	// connection that the kernel gives up holds up every reader, and not only the
	// one whose read is late.
	TimeoutMargin = 30 * time.Second
	// ReattachTime is by how much DeadConnTimeout exceeds Timeout.
	ReattachTime = 5 * time.Minute
)

// maxConnections bounds the sockets of a device. The kernel has no bound.
const maxConnections = 64

// DeviceOptions say what the kernel's device is to be like. Only Size must be set.
type DeviceOptions struct {
	Size      int64 // in bytes; a multiple of BlockSize
	BlockSize int   // 512 if zero
	// Connections is the number of sockets, 1 if zero. Requests are concurrent
	// on each of them.
	Connections int
	// Timeout is how long the kernel waits for an answer before it gives the
	// connection up and asks again on another. It must exceed what the server
	// takes for its error reply. It is also the longest that a read which was
	// under way waits after the server was killed and the device reattached.
	Timeout time.Duration
	// DeadConnTimeout is how long reads wait for a new connection before they
	// fail: the time that a reattachment may take.
	DeadConnTimeout time.Duration
	// Identifier is what the kernel asks of those who reattach; a random one if
	// empty.
	Identifier string
	// Ioctl makes the device by ioctl even where there is netlink.
	Ioctl bool
	Log   *slog.Logger // nil discards
}

func (o DeviceOptions) withDefaults() (DeviceOptions, error) {
	if o.BlockSize == 0 {
		o.BlockSize = blockSize
	}
	if o.Connections == 0 {
		o.Connections = 1
	}
	if o.Timeout == 0 {
		o.Timeout = DefaultTimeout
	}
	if o.DeadConnTimeout == 0 {
		o.DeadConnTimeout = o.Timeout + ReattachTime
	}
	if o.Identifier == "" {
		o.Identifier = identifierPrefix + rand.Text()
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	switch b := o.BlockSize; {
	case b < 512 || b > os.Getpagesize() || b&(b-1) != 0:
		return o, fmt.Errorf("nbd device: a block of %d bytes; the kernel takes powers of two from 512 to %d", b, os.Getpagesize())
	case o.Size <= 0 || o.Size%int64(b) != 0:
		return o, fmt.Errorf("nbd device: %d bytes are not one or more blocks of %d", o.Size, b)
	case o.Connections < 0 || o.Connections > maxConnections:
		return o, fmt.Errorf("nbd device: %d connections; want 1 to %d", o.Connections, maxConnections)
	case o.Timeout < 0 || o.DeadConnTimeout < 0:
		return o, errors.New("nbd device: a timeout must not be negative")
	}
	return o, nil
}

// identifierPrefix begins the identifiers of this program's devices.
const identifierPrefix = "erofs-oci-"

// An Attachment is what another process must know of a device to take it over. It
// holds no secret.
type Attachment struct {
	Index       int    `json:"index"`
	Identifier  string `json:"identifier"`
	Size        int64  `json:"size"`
	Connections int    `json:"connections"`
	// In nanoseconds, as the kernel was told.
	Timeout         time.Duration `json:"timeout"`
	DeadConnTimeout time.Duration `json:"dead_conn_timeout"`
}

// Path is the path of the device.
func (a Attachment) Path() string { return devicePath(a.Index) }

func devicePath(index int) string { return fmt.Sprintf("/dev/nbd%d", index) }

// A Device is an nbd device of the kernel that this process is connected to.
//
// It lives until Disconnect, or after SetDisconnectOnClose until the last user of
// the device closes it; the end of the process does not end it. What readers see
// when the server is killed, and another one reattaches:
//
//	read that was under way   goes on Timeout after it began (the kernel rounds
//	                          up, by a second at most), or with the reattachment
//	                          if that comes later
//	read that comes later     goes on with the reattachment
//	either, without one       fails with EIO DeadConnTimeout after it found the
//	                          connection dead
//
// so that Timeout, or the time that the reattachment takes, is the longest freeze
// that any reader sees. This holds for Linux 6.1 and 6.12, on which it is tested.
type Device struct {
	a      Attachment
	number string       // "major:minor"
	ioctl  *ioctlDevice // nil where the device was made by netlink
}

// Path is the path of the device.
func (d *Device) Path() string { return d.a.Path() }

// Attachment is what Reattach needs; false where the kernel cannot do it: it was
// reached by ioctl, and the device ends with the process.
func (d *Device) Attachment() (Attachment, bool) { return d.a, d.ioctl == nil }

// Connect makes a device out of a free one of the kernel, and returns the other
// ends of its connections, already in the transmission phase. It returns when the
// device has its size and its node in /dev. Nothing of it is left if it fails.
//
// It takes root. The kernel module is loaded where it is missing. Where no netlink
// socket is to be had (systemd's RestrictAddressFamilies, a container's seccomp
// filter) the device is made by ioctl: it ends with the process, cannot be
// reattached, and reads fail at once when the connection is lost.
func Connect(ctx context.Context, o DeviceOptions) (*Device, []net.Conn, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, nil, err
	}
	nl, err := dialKernel(ctx)
	if errors.Is(err, errNoNetlink) {
		o.Log.Warn("no netlink: the nbd device is made by ioctl; it ends with this process and cannot be reattached", "err", err)
		return connectIoctl(ctx, o)
	}
	if err != nil {
		return nil, nil, err
	}
	defer nl.Close()
	if o.Ioctl {
		return connectIoctl(ctx, o)
	}
	ours, theirs, err := socketPairs(o.Connections)
	if err != nil {
		return nil, nil, err
	}
	index, err := nl.connect(o, theirs)
	closeFiles(theirs)
	if err != nil {
		closeConns(ours)
		return nil, nil, fmt.Errorf("connect an nbd device: %w", errors.Join(err, dropByIdentifier(nl, o.Identifier)))
	}
	number, err := awaitDevice(ctx, index, o.Size)
	if err != nil {
		closeConns(ours)
		return nil, nil, errors.Join(err, nl.disconnect(index))
	}
	return &Device{a: o.attachment(index), number: number}, ours, nil
}

func (o DeviceOptions) attachment(index int) Attachment {
	return Attachment{
		Index: index, Identifier: o.Identifier, Size: o.Size, Connections: o.Connections,
		Timeout: inSeconds(o.Timeout), DeadConnTimeout: inSeconds(o.DeadConnTimeout),
	}
}

// inSeconds rounds up to what the kernel counts in.
func inSeconds(d time.Duration) time.Duration {
	return (d + time.Second - 1).Truncate(time.Second)
}

// dropByIdentifier disconnects a device whose connection succeeded but whose
// number never came.
func dropByIdentifier(nl *kernel, identifier string) error {
	all, err := Devices()
	for _, s := range all {
		if s.Identifier == identifier {
			err = errors.Join(err, nl.disconnect(s.Index))
		}
	}
	return err
}

// Reattach takes over a device whose server is gone, and returns the other ends of
// its new connections. It waits until the kernel has noticed that the old
// connections are dead; that they are not, because their server lives, is the
// likely reason if ctx ends first.
func Reattach(ctx context.Context, a Attachment) (*Device, []net.Conn, error) {
	if a.Connections < 1 || a.Connections > maxConnections {
		return nil, nil, fmt.Errorf("reattach %s: %d connections; want 1 to %d", a.Path(), a.Connections, maxConnections)
	}
	d := &Device{a: a}
	conns, err := d.reconnect(ctx, a.Connections)
	if err == nil {
		d.number, err = deviceNumber(a.Index)
	}
	if err != nil {
		closeConns(conns)
		return nil, nil, fmt.Errorf("reattach %s: %w", a.Path(), err)
	}
	return d, conns, nil
}

// reconnectRetry is when the kernel is asked again though it did not say that a
// connection died: it says so just before it takes note of it.
const reconnectRetry = time.Second

// reconnect puts n new connections in the place of dead ones.
func (d *Device) reconnect(ctx context.Context, n int) (taken []net.Conn, err error) {
	defer func() {
		if err != nil {
			closeConns(taken)
		}
	}()
	if err := d.a.check(); err != nil {
		return nil, err
	}
	nl, err := dialKernel(ctx)
	if err != nil {
		return nil, err
	}
	defer nl.Close()
	deaths, err := nl.watch(d.a.Index)
	if err != nil {
		return nil, err
	}
	defer deaths.Close()
	for {
		ours, theirs, err := socketPairs(n - len(taken))
		if err != nil {
			return taken, err
		}
		err = nl.reconfigure(d.a, reconfiguration{sockets: theirs})
		closeFiles(theirs)
		if err != nil {
			closeConns(ours)
			return taken, fmt.Errorf("the kernel refuses: %w", err)
		}
		for _, c := range ours {
			// The kernel takes as many as it has dead ones, without a word.
			if hungUp(c) {
				c.Close()
			} else {
				taken = append(taken, c)
			}
		}
		if len(taken) == n {
			return taken, nil
		}
		if err := deaths.wait(ctx, reconnectRetry); err != nil {
			return taken, fmt.Errorf("%d of %d old connections are still in use; does the old server run? %w", n-len(taken), n, err)
		}
	}
}

// check makes sure that the device is still the one that was recorded. The kernel
// compares the identifier, too, but says EINVAL and no more.
func (a Attachment) check() error {
	s, err := DeviceState(a.Index)
	switch {
	case err != nil:
		return err
	case !s.Connected:
		return fmt.Errorf("%s is not connected any more", a.Path())
	case s.Identifier == "":
		return fmt.Errorf("the kernel does not say whose device %s is; reattaching needs Linux 5.14", a.Path())
	case s.Identifier != a.Identifier:
		return fmt.Errorf("%s belongs to somebody else now (%.80q)", a.Path(), s.Identifier)
	case s.Size != a.Size:
		return fmt.Errorf("%s has %d bytes, and %d were recorded", a.Path(), s.Size, a.Size)
	}
	return nil
}

// SetDisconnectOnClose makes the kernel disconnect the device when its last user
// closes it, whether or not this process lives then. It is for a device that is
// mounted: one that nobody has open would end with the next one who looks at it.
func (d *Device) SetDisconnectOnClose(ctx context.Context) error {
	if d.ioctl != nil {
		return fmt.Errorf("%s: disconnect on close: %w", d.Path(), errNoNetlink)
	}
	nl, err := dialKernel(ctx)
	if err != nil {
		return err
	}
	defer nl.Close()
	if err := nl.reconfigure(d.a, reconfiguration{disconnectOnClose: true}); err != nil {
		return fmt.Errorf("%s: disconnect on close: %w", d.Path(), err)
	}
	return nil
}

// Disconnect ends the device; reads of it fail from now on. One that has ended is
// no error, and its number may be another's by now.
func (d *Device) Disconnect(ctx context.Context) error {
	if d.ioctl != nil {
		return d.ioctl.disconnect()
	}
	s, err := DeviceState(d.a.Index)
	if err != nil {
		return err
	}
	// Kernels before 5.14 know no identifiers.
	if !s.Connected || s.Identifier != "" && s.Identifier != d.a.Identifier {
		return nil
	}
	return Disconnect(ctx, d.a.Index)
}

// Disconnect ends the device with this number, whoever made it. Reads of it fail
// from now on; what is mounted on it stays mounted.
func Disconnect(ctx context.Context, index int) error {
	nl, err := dialKernel(ctx)
	if errors.Is(err, errNoNetlink) {
		return disconnectIoctl(index)
	}
	if err != nil {
		return err
	}
	defer nl.Close()
	if err := nl.disconnect(index); err != nil {
		return fmt.Errorf("disconnect %s: %w", devicePath(index), err)
	}
	return nil
}

// socketPairs returns n connected pairs: our ends, and files for the kernel's.
func socketPairs(n int) (ours []net.Conn, theirs []*os.File, err error) {
	defer func() {
		if err != nil {
			closeConns(ours)
			closeFiles(theirs)
		}
	}()
	for range n {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return ours, theirs, fmt.Errorf("socketpair: %w", err)
		}
		theirs = append(theirs, os.NewFile(uintptr(fds[1]), "nbd"))
		f := os.NewFile(uintptr(fds[0]), "nbd")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			return ours, theirs, fmt.Errorf("socketpair: %w", err)
		}
		ours = append(ours, c)
	}
	return ours, theirs, nil
}

// hungUp tells whether nobody has the other end of a socket pair.
func hungUp(c net.Conn) bool {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return false
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return true
	}
	gone := true
	err = raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd)}}
		for {
			_, err := unix.Poll(p, 0)
			if !errors.Is(err, unix.EINTR) {
				break
			}
		}
		gone = p[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
	})
	return err != nil || gone
}

// They are sockets and nothing is on its way: closing cannot fail in a way that
// somebody could act on.
func closeConns(conns []net.Conn) {
	for _, c := range conns {
		c.Close()
	}
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// checkNode says what is wrong with the node of the device, "major:minor", in /dev.
func checkNode(path, number string) error {
	var major, minor uint32
	if _, err := fmt.Sscanf(number, "%d:%d", &major, &minor); err != nil {
		return fmt.Errorf("device number of %s: %w", path, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return fmt.Errorf("%s: %w; mknod %s b %d %d, or mount a devtmpfs on /dev", path, err, path, major, minor)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK || st.Rdev != unix.Mkdev(major, minor) {
		return fmt.Errorf("%s is not the block device %s; mknod it anew", path, number)
	}
	return nil
}
