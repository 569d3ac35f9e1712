package nbdserve

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A pipeListener hands out connections that are made in memory.
type pipeListener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "pipe"} }

// served is a server with a listener of its own. Both end with stop.
type served struct {
	*Server
	l    *pipeListener
	done chan error
}

func start(t *testing.T, e Export, o Options) *served {
	t.Helper()
	s, err := NewServer(e, o)
	if err != nil {
		t.Fatal(err)
	}
	v := &served{s, &pipeListener{conns: make(chan net.Conn), done: make(chan struct{})}, make(chan error, 1)}
	go func() { v.done <- s.Serve(context.Background(), v.l) }()
	return v
}

func (s *served) stop(t *testing.T) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := <-s.done; err != nil {
		t.Errorf("Serve: %v", err)
	}
	if st := s.Stats(); st.Open != 0 {
		t.Errorf("%d connections are open after Close", st.Open)
	}
}

// A client speaks NBD by hand.
type client struct {
	t *testing.T
	net.Conn
	d     dialect
	reads map[uint64]int // length of the reads that are under way
}

// connect opens a connection and reads the greeting.
func (s *served) connect(t *testing.T) *client {
	t.Helper()
	ours, theirs := net.Pipe()
	s.l.conns <- theirs
	c := &client{t: t, Conn: ours, reads: make(map[uint64]int)}
	t.Cleanup(func() { ours.Close() })
	want := "NBDMAGICIHAVEOPT\x00\x03"
	if got := string(c.bytes(len(want))); got != want {
		t.Fatalf("greeting %q", got)
	}
	return c
}

func (c *client) bytes(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c, b); err != nil {
		c.t.Fatalf("receive %d bytes: %v", n, err)
	}
	return b
}

func (c *client) put(parts ...any) {
	c.t.Helper()
	var b []byte
	for _, p := range parts {
		switch p := p.(type) {
		case string:
			b = append(b, p...)
		case []byte:
			b = append(b, p...)
		default:
			b, _ = binary.Append(b, binary.BigEndian, p)
		}
	}
	if _, err := c.Write(b); err != nil {
		c.t.Fatalf("send: %v", err)
	}
}

// gone fails the test unless the server has closed the connection.
func (c *client) gone() {
	c.t.Helper()
	b := make([]byte, 1)
	if n, err := c.Read(b); n != 0 || !errors.Is(err, io.EOF) {
		c.t.Errorf("the connection is not closed: %d bytes %x, %v", n, b, err)
	}
}

// optionReply is one reply to an option.
type optionReply struct {
	kind uint32
	data string
}

func (c *client) sendOption(id uint32, data ...any) {
	c.t.Helper()
	n := 0
	for _, d := range data {
		if s, ok := d.(string); ok {
			n += len(s)
		} else {
			n += binary.Size(d)
		}
	}
	c.put(append([]any{"IHAVEOPT", id, uint32(n)}, data...)...)
}

// option sends an option and receives the replies up to the one that ends them.
func (c *client) option(id uint32, data ...any) []optionReply {
	c.t.Helper()
	c.sendOption(id, data...)
	var all []optionReply
	for {
		h := c.bytes(20)
		if got := binary.BigEndian.Uint64(h); got != 0x3e889045565a9 {
			c.t.Fatalf("reply magic %#x", got)
		}
		if got := binary.BigEndian.Uint32(h[8:]); got != id {
			c.t.Fatalf("reply to option %d, not to %d", got, id)
		}
		r := optionReply{binary.BigEndian.Uint32(h[12:]), string(c.bytes(int(binary.BigEndian.Uint32(h[16:]))))}
		all = append(all, r)
		if r.kind == 1 || r.kind>>31 != 0 {
			return all
		}
	}
}

// enter does the shortest handshake into transmission. Contexts are asked for by
// name.
func (s *served) enter(t *testing.T, d dialect, contexts ...string) *client {
	t.Helper()
	c := s.connect(t)
	c.put(uint32(3))
	switch d {
	case structured:
		c.wantAck(c.option(8))
	case extended:
		c.wantAck(c.option(11))
	}
	if len(contexts) > 0 {
		query := []any{uint32(0), uint32(len(contexts))}
		for _, name := range contexts {
			query = append(query, uint32(len(name)), name)
		}
		c.wantAck(c.option(10, query...))
	}
	c.wantAck(c.option(7, uint32(0), uint16(0)))
	c.d = d
	return c
}

func (c *client) wantAck(replies []optionReply) {
	c.t.Helper()
	if last := replies[len(replies)-1]; last.kind != 1 {
		c.t.Fatalf("refused with %#x, %q", last.kind, last.data)
	}
}

// encode is a request as the client's dialect has it.
func (c *client) encode(q request) []byte {
	fields := []any{uint32(0x25609513), q.flags, q.command, q.cookie, q.offset, uint32(q.length)}
	if c.d == extended {
		fields = []any{uint32(0x21e41c71), q.flags, q.command, q.cookie, q.offset, q.length}
	}
	var b []byte
	for _, f := range fields {
		b, _ = binary.Append(b, binary.BigEndian, f)
	}
	return b
}

// send sends requests in one write.
func (c *client) send(all ...request) {
	c.t.Helper()
	var b []byte
	for _, q := range all {
		if q.command == 0 {
			c.reads[q.cookie] = int(q.length)
		}
		b = append(b, c.encode(q)...)
	}
	c.put(b)
}

// reply is a whole reply, of one chunk or more.
type reply struct {
	cookie uint64
	code   uint32
	text   string
	data   []byte
	status map[uint32][]extent
}

func (c *client) reply() reply {
	c.t.Helper()
	r, err := readReply(c, c.d, c.reads)
	if err != nil {
		c.t.Fatal(err)
	}
	return r
}

// do sends one request and receives its reply.
func (c *client) do(q request) reply {
	c.t.Helper()
	c.send(q)
	r := c.reply()
	if r.cookie != q.cookie {
		c.t.Fatalf("reply to %d, not to %d", r.cookie, q.cookie)
	}
	return r
}

func (c *client) disconnect() {
	c.t.Helper()
	c.send(request{command: 2})
	c.gone()
}

// memory is a source of which everything is here.
type memory []byte

func (m memory) Size() int64 { return int64(len(m)) }

func (m memory) ReadAt(ctx context.Context, p []byte, off int64) error {
	return sourcetest.Memory(m).ReadAt(ctx, p, off)
}

func (m memory) ReadResident(p []byte, off int64) bool { return copy(p, m[off:]) == len(p) }

// gated is a source of which the first half is here, and reads of the second half
// wait until they are let through.
type gated struct {
	memory
	arrived chan int64 // gets the offset of each read that waits
	pass    chan error // lets one through, or makes it fail
}

func newGated(content []byte) *gated {
	return &gated{memory(content), make(chan int64, 10_000), make(chan error, 10_000)}
}

func (g *gated) half() int64 { return g.Size() / 2 }

func (g *gated) ReadAt(ctx context.Context, p []byte, off int64) error {
	if off+int64(len(p)) <= g.half() {
		return g.memory.ReadAt(ctx, p, off)
	}
	g.arrived <- off
	select {
	case err := <-g.pass:
		if err != nil {
			return err
		}
		return g.memory.ReadAt(ctx, p, off)
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (g *gated) ReadResident(p []byte, off int64) bool {
	return off+int64(len(p)) <= g.half() && g.memory.ReadResident(p, off)
}

// Present says of the first half that it is here.
func (g *gated) Present(off int64) (bool, int64) {
	if off < g.half() {
		return true, g.half()
	}
	return false, g.Size()
}
