package nbdserve

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// Requests of linux/nbd.h, _IO(0xab, n). What _IO adds differs between machines;
// BLKRRPART, which is an _IO as well, has it.
const (
	ioctlBase     = unix.BLKRRPART&^0xffff | 0xab00
	setSock       = ioctlBase + 0
	setBlockSize  = ioctlBase + 1
	doIt          = ioctlBase + 3
	clearSock     = ioctlBase + 4
	setSizeBlocks = ioctlBase + 7
	disconnect    = ioctlBase + 8
	setTimeout    = ioctlBase + 9
	setFlags      = ioctlBase + 10
)

// ioctlDevice is a device that was made by ioctl. A thread of this process is in
// the kernel for as long as the device lives, and holds it open, so that the end
// of a mount does not end it: see disconnectAfterUse.
type ioctlDevice struct {
	f    *os.File
	done chan struct{} // closed when the device has ended
}

// connectIoctl is Connect without netlink. Any free device may be snatched away by
// others until its first socket is set.
func connectIoctl(ctx context.Context, o DeviceOptions) (*Device, []net.Conn, error) {
	all, err := readStates(sysBlock)
	if err != nil {
		return nil, nil, err
	}
	err = errors.New("none is there")
	for _, index := range free(all) {
		var dev *ioctlDevice
		var ours []net.Conn
		if dev, ours, err = startIoctl(index, o); err != nil {
			continue
		}
		number, err := awaitDevice(ctx, index, o.Size)
		if err != nil {
			closeConns(ours)
			return nil, nil, errors.Join(err, dev.disconnect())
		}
		return &Device{a: o.attachment(index), number: number, ioctl: dev}, ours, nil
	}
	return nil, nil, fmt.Errorf("connect an nbd device: %d devices, and none is free (erofs-oci list shows what a crash left): %w", len(all), err)
}

// free are the numbers of the devices that nobody has connected, served or not.
func free(all []State) []int {
	var numbers []int
	for _, s := range all {
		if !s.Connected {
			numbers = append(numbers, s.Index)
		}
	}
	return numbers
}

// startIoctl makes a device of the one with this number.
func startIoctl(index int, o DeviceOptions) (*ioctlDevice, []net.Conn, error) {
	f, err := os.Open(devicePath(index))
	if err != nil {
		return nil, nil, err
	}
	ours, theirs, err := socketPairs(o.Connections)
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	defer closeFiles(theirs)
	d := &ioctlDevice{f: f, done: make(chan struct{})}
	configured := make(chan error)
	go d.run(o, theirs, configured)
	if err := <-configured; err != nil {
		closeConns(ours)
		return nil, nil, errors.Join(err, f.Close())
	}
	return d, ours, nil
}

// run configures the device and stays in the kernel until it ends. All of it is
// one thread's: drivers/block/nbd.c nbd_add_socket refuses a second one. No signal
// may come to it, for NBD_DO_IT takes any as the order to end, and the Go runtime
// signals its threads all the time.
func (d *ioctlDevice) run(o DeviceOptions, sockets []*os.File, configured chan<- error) {
	runtime.LockOSThread() // for ever: the thread ends with its strange signal mask
	var all unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^all.Val[i]
	}
	err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, nil)
	if err == nil {
		err = d.configure(o, sockets)
	}
	configured <- err
	if err != nil {
		return
	}
	defer close(d.done)
	if err := d.call(doIt, 0); err != nil {
		o.Log.Warn("the nbd device ended; what is mounted on it cannot be read any more", "device", d.f.Name(), "err", err)
	}
	// What fails here is gone already.
	_ = d.call(clearSock, 0)
	if err := d.f.Close(); err != nil {
		o.Log.Warn("the nbd device cannot be closed", "device", d.f.Name(), "err", err)
	}
}

func (d *ioctlDevice) configure(o DeviceOptions, sockets []*os.File) error {
	for i, s := range sockets {
		if err := d.call(setSock, int(s.Fd())); err != nil {
			if i > 0 {
				_ = d.call(clearSock, 0) // best effort: this device is given up
			}
			return err
		}
	}
	for _, set := range []struct {
		request uint
		value   int
	}{
		{setBlockSize, o.BlockSize},
		{setSizeBlocks, int(o.Size / int64(o.BlockSize))},
		{setTimeout, int(inSeconds(o.Timeout) / time.Second)},
		{setFlags, serverFlags},
	} {
		if err := d.call(set.request, set.value); err != nil {
			_ = d.call(clearSock, 0)
			return err
		}
	}
	return nil
}

func (d *ioctlDevice) call(request uint, value int) error {
	if err := unix.IoctlSetInt(int(d.f.Fd()), request, value); err != nil {
		return fmt.Errorf("%s: ioctl %#x: %w", d.f.Name(), request, err)
	}
	return nil
}

// disconnect ends the device, and waits for it.
func (d *ioctlDevice) disconnect() error {
	select {
	case <-d.done:
		return nil
	default:
	}
	err := errors.Join(d.call(disconnect, 0), d.call(clearSock, 0))
	if errors.Is(err, os.ErrClosed) || errors.Is(err, unix.EBADF) {
		err = nil // it ended meanwhile
	}
	<-d.done
	return err
}

// disconnectIoctl ends a device of another process.
func disconnectIoctl(index int) error {
	f, err := os.Open(devicePath(index))
	if err != nil {
		return err
	}
	defer f.Close()
	d := &ioctlDevice{f: f}
	return errors.Join(d.call(disconnect, 0), d.call(clearSock, 0))
}

// releasePause is when it is looked again whether a mounted device is free. The
// kernel tells of changes in this mount namespace; not of those in others, and not
// when it lets go of the device, which is some time after the mount is gone.
const releasePause = 500 * time.Millisecond

// disconnectAfterUse ends the device when nobody has it mounted any more: what
// DISCONNECT_ON_CLOSE would do.
func (d *ioctlDevice) disconnectAfterUse() error {
	// Not os.Open, which has the runtime poll the file too: each change is told once to
	// each open file, so it is gone when the runtime was first.
	mounts, err := unix.Open("/proc/self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: "/proc/self/mountinfo", Err: err}
	}
	defer unix.Close(mounts)
	// A pipe that hangs up when the device has ended, for poll(2).
	ended, ending, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ended.Close()
	go func() {
		<-d.done
		ending.Close()
	}()
	for {
		free, err := d.unclaimed()
		if err != nil {
			return err
		}
		if free {
			return d.disconnect()
		}
		p := []unix.PollFd{{Fd: int32(mounts), Events: unix.POLLPRI}, {Fd: int32(ended.Fd())}}
		if _, err := unix.Poll(p, int(releasePause.Milliseconds())); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for the end of the mount: %w", err)
		}
		if p[1].Revents != 0 {
			return nil
		}
	}
}

// unclaimed tells whether no file system has the device to itself.
func (d *ioctlDevice) unclaimed() (bool, error) {
	f, err := os.OpenFile(d.f.Name(), os.O_RDONLY|unix.O_EXCL, 0)
	if errors.Is(err, unix.EBUSY) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, f.Close()
}
