package registry

import (
	"runtime"
	"syscall"
)

const (
	// maxUnsent bounds the bytes that a socket has taken and not sent. Of the
	// megabytes that the kernel takes otherwise, nobody can tell whether they leave:
	// an upload over a slow link would be silent for as long as they last.
	maxUnsent = 128 << 10
	// tcpNotsentLowat is TCP_NOTSENT_LOWAT of Linux's tcp(7), which package syscall
	// does not name.
	tcpNotsentLowat = 25
)

// boundUnsent is a net.Dialer's Control. A system that does not have the option
// sends all the same.
func boundUnsent(_, _ string, c syscall.RawConn) error {
	if runtime.GOOS != "linux" {
		return nil
	}
	return c.Control(func(fd uintptr) {
		_ = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpNotsentLowat, maxUnsent) // see above
	})
}
