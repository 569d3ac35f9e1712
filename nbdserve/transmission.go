package nbdserve

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/pojntfx/go-nbd/pkg/protocol"
	"golang.org/x/sys/unix"
)

const (
	// readAhead is the memory for requests that have come and are not looked at yet.
	readAhead = 4 << 10
	// batchSize is how many bytes of replies the reading goroutine collects at most before it writes them, while
	// there are more requests to look at.
	batchSize = 128 << 10
	// socketBuffer is asked for on Unix sockets, and the kernel gives what net.core.wmem_max allows: twice the
	// usual, so that a reply of 256 KiB fits in and is written without a wait in between. TCP finds its own size.
	socketBuffer = 1 << 20
	// queueLength is how many requests of a connection may wait for its workers. Then its requests are not read
	// any more, not even for what is here. The kernel has 128 under way.
	queueLength = 1024
)

// A session is one connection.
type session struct {
	s    *Server
	conn net.Conn // raw, or TLS over it
	raw  net.Conn
	r    *bufio.Reader

	ctx    context.Context // ends with the session; its cause is why
	cancel context.CancelCauseFunc
	closed chan struct{} // closed when raw is, which follows from the end of ctx

	place  place  // guarded by Server.mu
	serial uint64 // likewise; newer sessions have higher ones

	dialect  dialect
	contexts []metaContext

	// The reading goroutine's own.
	heard   bool    // the client has begun its handshake
	batch   *buffer // replies to be written; nil if there are none
	queue   chan job
	started int // workers
	workers sync.WaitGroup

	writing sync.Mutex // guards the sending side of conn, so that replies leave whole
	stalled stall
}

// A place says what a session counts for: nothing, if it was told to end or is one
// of Transmit; maxHandshakes; or MaxConns.
type place int

const (
	nowhere place = iota
	negotiating
	transmitting
	places
)

// A job is a request for a worker. It must be answered by the deadline, if that is
// not zero.
type job struct {
	request
	deadline time.Time
}

func (s *Server) newSession(ctx context.Context, conn net.Conn) *session {
	c := &session{s: s, conn: conn, raw: conn, r: bufio.NewReaderSize(conn, readAhead), closed: make(chan struct{})}
	if u, ok := conn.(*net.UnixConn); ok {
		// A smaller one is slower, and no more than that.
		_ = u.SetWriteBuffer(socketBuffer)
	}
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	context.AfterFunc(c.ctx, func() {
		c.raw.Close()
		close(c.closed)
	})
	return c
}

// end makes every goroutine of the session leave.
func (c *session) end(cause error) { c.cancel(cause) }

// serve does both phases, and closes the connection.
func (c *session) serve() error {
	proceed, err := c.handshake()
	if err != nil || !proceed {
		err = c.reason(err)
		c.end(nil)
		<-c.closed
		if !c.heard && closedByPeer(err) {
			return nil // who looks whether somebody listens says nothing, and may not take the greeting
		}
		return err
	}
	return c.transmit()
}

// closedByPeer tells whether a connection failed because the other end closed it.
func closedByPeer(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE)
}

// reason is why the session failed: the first that went wrong, not what followed
// from it.
func (c *session) reason(err error) error {
	if cause := context.Cause(c.ctx); cause != nil {
		return cause
	}
	return err
}

// transmit serves requests until there are no more, and closes the connection.
func (c *session) transmit() error {
	err := c.serveRequests()
	if err == nil {
		err = c.flush()
	}
	if err != nil {
		err = c.reason(err)
		c.end(err)
	}
	if c.queue != nil {
		close(c.queue)
	}
	c.workers.Wait()
	c.dropBatch()
	if err == nil {
		err = context.Cause(c.ctx)
	}
	if err == nil && c.conn != c.raw {
		// The client has gone in peace, or is gone: whether it heard the end of TLS is its own affair.
		_ = c.conn.Close()
	}
	c.end(nil)
	<-c.closed
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// serveRequests returns nil after a disconnect request: what is under way is to be
// answered. It returns io.EOF where the client closed the connection between
// requests and nobody waits for answers.
func (c *session) serveRequests() error {
	for {
		q, err := c.next()
		if err != nil {
			return err
		}
		if q.command == protocol.TRANSMISSION_TYPE_REQUEST_DISC {
			return nil
		}
		if err := c.answer(q); err != nil {
			return err
		}
	}
}

// next reads a request, and over its payload. Before it waits it writes the replies
// that there are.
func (c *session) next() (request, error) {
	size := c.dialect.requestSize()
	if c.r.Buffered() < size {
		if err := c.flush(); err != nil {
			return request{}, err
		}
	}
	b, err := c.r.Peek(size)
	if err != nil {
		if len(b) > 0 && err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return request{}, err
	}
	q, err := c.dialect.parse(b)
	if err != nil {
		return request{}, err
	}
	if _, err := c.r.Discard(size); err != nil {
		return request{}, err
	}
	return q, c.skipPayload(q)
}

func (c *session) skipPayload(q request) error {
	n := c.dialect.payload(q)
	if n == 0 {
		return nil
	}
	if n > maxRequest {
		return fmt.Errorf("a payload of %d bytes: the most that is read over is %d", n, maxRequest)
	}
	if uint64(c.r.Buffered()) < n {
		if err := c.flush(); err != nil {
			return err
		}
	}
	if _, err := c.r.Discard(int(n)); err != nil {
		return fmt.Errorf("in the payload of a request: %w", err)
	}
	return nil
}

// check says what is wrong with a request.
func (c *session) check(q request) error {
	var flags uint16
	switch q.command {
	case protocol.TRANSMISSION_TYPE_REQUEST_WRITE, commandTrim, commandWriteZeroes:
		return errReadOnly
	case protocol.TRANSMISSION_TYPE_REQUEST_READ:
		if c.dialect != simple {
			flags = flagDF
		}
	case commandBlockStatus:
		flags = flagReqOne
	case commandFlush, commandCache:
	default:
		return errCommand
	}
	switch {
	case c.dialect == extended && q.flags&flagPayloadLen != 0:
		return errPayload
	case q.flags&^flags != 0:
		return errFlags
	case q.command == commandFlush:
		return nil
	case q.command == commandBlockStatus && len(c.contexts) == 0:
		return errNoContext
	case q.length == 0:
		return errNoLength
	case !c.s.contains(q.offset, q.length):
		return errOutside
	case q.command == protocol.TRANSMISSION_TYPE_REQUEST_READ && q.length > maxRequest:
		return errTooLong
	}
	return nil
}

// answer answers a request or hands it to the workers. It fails if the connection
// does.
func (c *session) answer(q request) error {
	c.s.requests.Add(1)
	if err := c.check(q); err != nil {
		return c.refuse(q, err)
	}
	switch q.command {
	case commandFlush:
		// Nothing is ever written.
		return c.done(q)
	case commandBlockStatus:
		return c.blockStatus(q)
	case protocol.TRANSMISSION_TYPE_REQUEST_READ:
		if answered, err := c.answerResident(q); answered || err != nil {
			return err
		}
	}
	return c.handOff(q)
}

// answerResident answers a read of what is here.
func (c *session) answerResident(q request) (bool, error) {
	if c.s.resident == nil || q.length > smallRead {
		return false, nil
	}
	head, n := c.dialect.dataHeadSize(), int(q.length)
	b, err := c.room(head + n)
	if err != nil {
		return false, err
	}
	data := b[head:]
	inside := c.s.inside(q.offset, n)
	if inside > 0 && !c.s.resident.ReadResident(data[:inside], int64(q.offset)) {
		return false, nil
	}
	clear(data[inside:])
	c.dialect.putDataHead(b, q)
	c.commit(len(b))
	c.s.residents.Add(1)
	c.s.bytesRead.Add(int64(n))
	return true, nil
}

// room gives n bytes of the batch to be filled. It writes the batch first if those
// do not fit in.
func (c *session) room(n int) ([]byte, error) {
	if c.batch != nil && cap(c.batch.b)-len(c.batch.b) < n {
		if err := c.flush(); err != nil {
			return nil, err
		}
	}
	if c.batch == nil {
		c.batch = c.s.buffers.get(max(n-headRoom, batchSize))
	}
	used := len(c.batch.b)
	return c.batch.b[used : used+n], nil
}

// commit makes the first n bytes of room part of the batch.
func (c *session) commit(n int) { c.batch.b = c.batch.b[:len(c.batch.b)+n] }

// flush writes the batch.
func (c *session) flush() error {
	if c.batch == nil {
		return nil
	}
	defer c.dropBatch()
	if len(c.batch.b) == 0 {
		return nil
	}
	return c.send(c.batch.b)
}

func (c *session) dropBatch() {
	if c.batch != nil {
		c.s.buffers.put(c.batch)
		c.batch = nil
	}
}

func (c *session) done(q request) error {
	b, err := c.room(maxPlainReply)
	if err == nil {
		c.commit(c.dialect.putDone(b, q))
	}
	return err
}

func (c *session) refuse(q request, why error) error {
	c.s.failed.Add(1)
	b, err := c.room(maxPlainReply)
	if err == nil {
		code, text := replyError(why)
		c.commit(c.dialect.putError(b, q, code, text.Error()))
	}
	return err
}

// send writes whole replies. After a failure nothing more is written: the client
// could not tell where the next reply begins.
func (c *session) send(b []byte) error {
	c.writing.Lock()
	defer c.writing.Unlock()
	return c.write(b)
}

func (c *session) write(b []byte) error {
	_, err := c.conn.Write(b)
	if err != nil {
		err = fmt.Errorf("send a reply: %w", err)
		c.end(err)
		c.raw.Close()
	}
	return err
}

// sendLarge is send for replies that hold a share of the memory for large ones. It
// notes when the client takes something of them.
func (c *session) sendLarge(b []byte) error {
	c.stalled.begin()
	defer c.stalled.end()
	c.writing.Lock()
	defer c.writing.Unlock()
	for len(b) > 0 {
		n := min(len(b), largeShare)
		if err := c.write(b[:n]); err != nil {
			return err
		}
		b = b[n:]
		c.stalled.moved()
	}
	return nil
}
