package nbdserve

import (
	"context"
	"errors"
	"syscall"
	"time"
)

var errReadTimeout = errors.New("read timed out")

// handOff has a worker answer a request. It waits only if the queue is full.
func (c *session) handOff(q request) error {
	if c.queue == nil {
		c.queue = make(chan job, queueLength)
	}
	if c.started < c.s.o.Workers {
		c.started++
		c.workers.Go(func() {
			for j := range c.queue {
				c.work(j)
			}
		})
	}
	j := job{request: q}
	if c.s.o.ReadTimeout > 0 {
		j.deadline = time.Now().Add(c.s.o.ReadTimeout)
	}
	select {
	case c.queue <- j:
		return nil
	default:
	}
	if err := c.flush(); err != nil {
		return err
	}
	select {
	case c.queue <- j:
		return nil
	case <-c.ctx.Done():
		return context.Cause(c.ctx)
	}
}

// work answers one request. That a reply cannot be sent ends the session: there is
// nobody left to tell.
func (c *session) work(j job) {
	ctx := c.ctx
	if !j.deadline.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadlineCause(ctx, j.deadline, errReadTimeout)
		defer cancel()
	}
	if j.command == commandCache {
		c.prefetch(ctx, j.request)
		return
	}
	if j.length <= smallRead {
		c.fetch(ctx, j.request, c.send)
		return
	}
	shares := sharesOf(int(j.length))
	if err := c.s.large.take(ctx, shares, c.s.relieve); err != nil {
		c.fail(j.request, err)
		return
	}
	defer c.s.large.give(shares)
	c.fetch(ctx, j.request, c.sendLarge)
}

// fetch reads and replies.
func (c *session) fetch(ctx context.Context, q request, send func([]byte) error) {
	head, n := c.dialect.dataHeadSize(), int(q.length)
	buf := c.s.buffers.get(n)
	defer c.s.buffers.put(buf)
	b := buf.b[:head+n]
	if err := c.s.read(ctx, b[head:], q.offset); err != nil {
		c.fail(q, withCause(ctx, err))
		return
	}
	c.dialect.putDataHead(b, q)
	if send(b) == nil {
		c.s.bytesRead.Add(int64(n))
	}
}

// prefetch reads a range piece by piece, so that the source has it when it is asked
// for.
func (c *session) prefetch(ctx context.Context, q request) {
	buf := c.s.buffers.get(smallRead)
	defer c.s.buffers.put(buf)
	for off, left := q.offset, q.length; left > 0; {
		n := min(left, smallRead)
		if err := c.s.read(ctx, buf.b[:n], off); err != nil {
			c.fail(q, withCause(ctx, err))
			return
		}
		off, left = off+n, left-n
	}
	var reply [maxPlainReply]byte
	_ = c.send(reply[:c.dialect.putDone(reply[:], q)]) // which ends the session if it fails
}

// fail replies that a read failed, and says why in the log, since the reply cannot.
func (c *session) fail(q request, why error) {
	if c.ctx.Err() != nil {
		return // nobody waits for it
	}
	c.s.failed.Add(1)
	if c.s.o.Failed != nil {
		c.s.o.Failed(syscall.EIO)
	}
	code, text := replyError(why)
	c.s.o.Log.Error("request failed", "offset", q.offset, "bytes", q.length, "errno", syscall.Errno(code).Error(), "err", why)
	var reply [maxPlainReply]byte
	_ = c.send(reply[:c.dialect.putError(reply[:], q, code, text.Error())]) // which ends the session if it fails
}

// withCause says of an error that followed from the end of ctx why that ended.
func withCause(ctx context.Context, err error) error {
	if errors.Is(err, ctx.Err()) {
		return context.Cause(ctx)
	}
	return err
}
