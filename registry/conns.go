package registry

import (
	"context"
	"net"
	"sync"
)

// conns are the connections that a Client has open. net/http closes those that are
// idle; one of HTTP/2 is not for a moment after its last answer was given up, and
// would then stay for as long as an idle connection may.
type conns struct {
	mu     sync.Mutex // guards what follows
	open   map[*conn]struct{}
	closed bool
}

type conn struct {
	net.Conn
	all *conns
}

// over dials by dial.
func (c *conns) over(dial func(ctx context.Context, network, addr string) (net.Conn, error)) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		raw, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		one := &conn{raw, c}
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.closed {
			_ = raw.Close() // nothing was sent by it
			return nil, errClosed
		}
		if c.open == nil {
			c.open = map[*conn]struct{}{}
		}
		c.open[one] = struct{}{}
		return one, nil
	}
}

func (c *conn) Close() error {
	c.all.mu.Lock()
	delete(c.all.open, c)
	c.all.mu.Unlock()
	return c.Conn.Close()
}

// close closes what is open, and what is dialled from now on.
func (c *conns) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for one := range c.open {
		_ = one.Conn.Close() // whoever uses it hears of it
	}
	c.open = nil
}
