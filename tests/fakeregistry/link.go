package fakeregistry

import (
	"net"
	"sync"
	"time"
)

// catchUp is how long a link may have been idle and still count as busy. Who
// sends wakes up a little after its bytes are through; a real link has more of
// them in its queue by then and loses nothing.
const catchUp = 5 * time.Millisecond

// A link shares a number of bytes a second among all who send.
type link struct {
	bytesPerSecond int64 // 0: no limit
	room           int   // for a connection: see narrow

	mu   sync.Mutex
	free time.Time // when all that was taken so far is through
}

func newLink(bytesPerSecond int64) *link {
	return &link{bytesPerSecond: bytesPerSecond, room: linkRoom}
}

// take books n bytes at the time now and returns how long it takes until they
// are through.
func (l *link) take(now time.Time, n int) time.Duration {
	if l.bytesPerSecond <= 0 {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.Sub(l.free) > catchUp {
		l.free = now
	}
	l.free = l.free.Add(time.Duration(float64(n) / float64(l.bytesPerSecond) * float64(time.Second)))
	return max(l.free.Sub(now), 0)
}

// linkRoom is what a connection takes that its other end does not read, unless SetRoom says so.
const linkRoom = 8 << 10

// narrow has a new connection take as little as one of a slow link would. A kernel's own buffers are for megabytes: all
// that is sent would be through at once, and whoever stops reading would stop nothing.
func (l *link) narrow(c net.Conn) {
	if l.bytesPerSecond <= 0 {
		return
	}
	if over, ok := c.(interface{ NetConn() net.Conn }); ok {
		c = over.NetConn()
	}
	if tcp, ok := c.(*net.TCPConn); ok {
		_ = tcp.SetWriteBuffer(l.room) // else it is as it was
	}
}
