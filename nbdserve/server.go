package nbdserve

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/erofs-oci/erofs-oci/backend"
)

// Export is what a server serves. A client that names no export gets it, too.
//
// The Source may have two methods more than it must:
//
//	// ReadResident fills p and answers true if that needs no waiting; otherwise it answers false at once.
//	ReadResident(p []byte, off int64) bool
//	// Present says whether the byte at off is here, and where the run of bytes of which that is true ends.
//	Present(off int64) (present bool, end int64)
type Export struct {
	Name        string
	Description string // for people
	Source      backend.Source
}

type residentReader interface {
	ReadResident(p []byte, off int64) bool
}

type presence interface {
	Present(off int64) (present bool, end int64)
}

// Options of a server. The zero value works.
type Options struct {
	Workers          int           // reads that one connection may have waiting for data; 16 if zero
	MaxConns         int           // clients of Serve that are past the handshake; 64 if zero
	HandshakeTimeout time.Duration // 10 s if zero
	// ReadTimeout bounds a read from its arrival to its reply; it then fails. The source's own patience if zero.
	ReadTimeout time.Duration
	// TLS, where set, makes clients of Serve start TLS before all else. It may demand certificates of them.
	TLS *tls.Config
	// Log receives the reason of each error that a client sees as a number. Nil discards.
	Log *slog.Logger
	// Failed is told of each read that failed, those included that are not logged because there are too many. It is
	// called by several at a time. Nil: nobody wants to know.
	Failed func(syscall.Errno)
}

func (o Options) withDefaults() (Options, error) {
	if o.Workers < 0 || o.MaxConns < 0 || o.HandshakeTimeout < 0 || o.ReadTimeout < 0 {
		return o, errors.New("options must not be negative")
	}
	if o.Workers == 0 {
		o.Workers = 16
	}
	if o.MaxConns == 0 {
		o.MaxConns = 64
	}
	if o.HandshakeTimeout == 0 {
		o.HandshakeTimeout = 10 * time.Second
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o, nil
}

// Stats counts since the server was made.
type Stats struct {
	Connections int64 // that came
	Open        int64 // now
	Requests    int64
	Failed      int64 // requests that were answered with an error
	Resident    int64 // reads that were answered in the reading goroutine
	BytesRead   int64 // data of reads that were answered
}

// A Server exports one source, on listeners and on connections of its caller's.
// Its methods may be called in parallel.
type Server struct {
	export   Export
	o        Options
	size     int64 // what clients see: the source's, rounded up to blocks
	resident residentReader
	present  presence
	buffers  bufferPool
	large    *budget

	ctx       context.Context // ends with Close
	cancel    context.CancelCauseFunc
	running   sync.WaitGroup // Serve, Transmit and their goroutines; added to under mu
	connCount atomic.Int64
	requests  atomic.Int64
	failed    atomic.Int64
	residents atomic.Int64
	bytesRead atomic.Int64

	mu       sync.Mutex // guards what follows, and each session's place
	closed   bool
	sessions map[*session]struct{}
	held     [places]int // sessions in each place
	serial   uint64      // of the last session that was admitted
}

// NewServer makes a server that serves nobody yet.
func NewServer(e Export, o Options) (*Server, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("nbd server: %w", err)
	}
	if e.Source == nil {
		return nil, errors.New("nbd server: no source to export")
	}
	for _, text := range []string{e.Name, e.Description} {
		if len(text) > maxString || !utf8.ValidString(text) || strings.Contains(text, "\x00") {
			return nil, fmt.Errorf("nbd server: export name and description: %.40q… must be at most %d bytes of UTF-8 without NUL", text, maxString)
		}
	}
	size := e.Source.Size()
	if size < 0 || size > math.MaxInt64-blockSize {
		return nil, fmt.Errorf("nbd server: a source of %d bytes cannot be exported", size)
	}
	s := &Server{
		export: e,
		o:      o,
		size:   (size + blockSize - 1) / blockSize * blockSize,
		large:  newBudget(largeMemory / largeShare),

		sessions: make(map[*session]struct{}),
	}
	s.resident, _ = e.Source.(residentReader)
	s.present, _ = e.Source.(presence)
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	return s, nil
}

// Size is the size of the export: the source's, rounded up to blocks of 512 bytes.
func (s *Server) Size() int64 { return s.size }

// Stats may be called at any time, also after Close.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	open := len(s.sessions)
	s.mu.Unlock()
	return Stats{
		Connections: s.connCount.Load(),
		Open:        int64(open),
		Requests:    s.requests.Load(),
		Failed:      s.failed.Load(),
		Resident:    s.residents.Load(),
		BytesRead:   s.bytesRead.Load(),
	}
}

// Close ends all listeners and connections and waits for them.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel(errClosed)
	s.running.Wait()
	return nil
}

var errClosed = fmt.Errorf("nbd server: %w", os.ErrClosed)

// begin enters the books of Close, unless it is too late.
func (s *Server) begin() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errClosed
	}
	s.running.Add(1)
	return nil
}

// within gives a context that ends with ctx and with the server.
func (s *Server) within(ctx context.Context) (context.Context, context.CancelCauseFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.ctx, func() { cancel(errClosed) })
	return ctx, func(cause error) {
		stop()
		cancel(cause)
	}
}

// Serve serves the clients that come to l until ctx ends, Close is called or l
// fails; only the last is an error. It closes l and its connections and waits for
// them.
func (s *Server) Serve(ctx context.Context, l net.Listener) (err error) {
	if err := s.begin(); err != nil {
		return errors.Join(err, l.Close())
	}
	defer s.running.Done()
	ctx, cancel := s.within(ctx)
	defer cancel(nil)
	var clients sync.WaitGroup
	defer clients.Wait()
	defer cancel(nil)
	closed := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() { closed <- l.Close() })
	defer func() {
		if stop() {
			closed <- l.Close()
		}
		if closeErr := <-closed; !errors.Is(closeErr, net.ErrClosed) {
			err = errors.Join(err, closeErr)
		}
	}()
	for pause := time.Duration(0); ; {
		conn, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				conn.Close()
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("nbd server: %w", err)
		case err != nil:
			// No descriptors, no memory: this passes, and the connections that there are go on.
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			s.o.Log.Warn("a client cannot be let in; that is tried again", "err", err)
			s.await(ctx, pause)
		default:
			pause = 0
			s.welcome(ctx, conn, &clients)
		}
	}
}

func (s *Server) await(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// welcome begins a session.
func (s *Server) welcome(ctx context.Context, conn net.Conn, clients *sync.WaitGroup) {
	s.connCount.Add(1)
	c := s.newSession(ctx, conn)
	s.admit(c)
	clients.Go(func() {
		err := c.serve()
		s.dismiss(c)
		if err != nil && ctx.Err() == nil {
			s.o.Log.Warn("client dropped", "client", conn.RemoteAddr().String(), "err", err)
		}
	})
}

var (
	errCrowded = errors.New("the server has as many connections as it may have")
	errEvicted = errors.New("newer clients needed the place of one that did not finish its handshake")
	errStalled = errors.New("the client takes no replies and others need the memory")
)

// maxHandshakes bounds the connections that are in their handshake, beside the
// MaxConns that are through it.
const maxHandshakes = 1024

// admit lets c begin its handshake. The oldest of those that are not through theirs
// gives way where there are too many: who opens connections by the thousand and says
// nothing pushes out its own.
func (s *Server) admit(c *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held[negotiating] >= maxHandshakes {
		var oldest *session
		for other := range s.sessions {
			if other.place == negotiating && (oldest == nil || other.serial < oldest.serial) {
				oldest = other
			}
		}
		s.expel(oldest, errEvicted)
	}
	s.serial++
	c.serial = s.serial
	s.move(c, negotiating)
	s.sessions[c] = struct{}{}
}

// settle gives c one of the places that do not give way, if there is one. It is
// called before its client hears that it has arrived.
func (s *Server) settle(c *session) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.place != negotiating || s.held[transmitting] >= s.o.MaxConns {
		return false
	}
	s.move(c, transmitting)
	return true
}

// move is called with mu held.
func (s *Server) move(c *session, to place) {
	s.held[c.place]--
	s.held[to]++
	c.place = to
}

// expel ends a session and frees its place, without waiting for it. It is called
// with mu held.
func (s *Server) expel(c *session, why error) {
	s.move(c, nowhere)
	c.end(why)
}

func (s *Server) dismiss(c *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.move(c, nowhere)
	delete(s.sessions, c)
}

// Transmit serves one client that needs no handshake, in simple replies: the
// kernel, which has the other end of conn. It returns when the client disconnects
// (nil), the connection fails, or ctx ends or Close is called (their reason). It
// closes conn. The connection does not count for MaxConns.
func (s *Server) Transmit(ctx context.Context, conn net.Conn) error {
	if err := s.begin(); err != nil {
		return errors.Join(err, conn.Close())
	}
	defer s.running.Done()
	s.connCount.Add(1)
	ctx, cancel := s.within(ctx)
	defer cancel(nil)
	c := s.newSession(ctx, conn)
	s.mu.Lock()
	s.sessions[c] = struct{}{}
	s.mu.Unlock()
	defer s.dismiss(c)
	return c.transmit()
}

// read fills p from off of the export: from the source, and with zeros past its
// end, which is less than a block away.
func (s *Server) read(ctx context.Context, p []byte, off uint64) error {
	inside := s.inside(off, len(p))
	clear(p[inside:])
	if inside == 0 {
		return nil
	}
	return s.export.Source.ReadAt(ctx, p[:inside], int64(off))
}

// inside is how many of the n bytes at off, a range of the export, the source has.
func (s *Server) inside(off uint64, n int) int {
	return int(max(0, min(int64(n), s.export.Source.Size()-int64(off))))
}

// contains says whether a range lies in the export.
func (s *Server) contains(off, n uint64) bool {
	return off <= uint64(s.size) && n <= uint64(s.size)-off
}

// relieve closes the connection whose client has not taken anything of its large
// replies for longest, if that is long enough.
func (s *Server) relieve() {
	s.mu.Lock()
	defer s.mu.Unlock()
	var worst *session
	var longest time.Duration
	for c := range s.sessions {
		if d := c.stalled.duration(); d >= starving && d > longest {
			worst, longest = c, d
		}
	}
	if worst != nil {
		s.expel(worst, errStalled)
	}
}
