package nbdserve

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
)

// TestDisconnect: what is under way at a disconnect request is answered.
func TestDisconnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGated(sourcetest.Content(1 << 20))
		s := start(t, Export{Source: g}, Options{})
		defer s.stop(t)
		k := s.enter(t, simple)
		k.send(request{cookie: 1, offset: 1 << 19, length: 512}, request{cookie: 2, length: 512}, request{command: 2})
		if r := k.reply(); r.cookie != 2 {
			t.Errorf("%+v", r)
		}
		synctest.Wait()
		g.pass <- nil
		if r := k.reply(); r.cookie != 1 || !bytes.Equal(r.data, g.memory[1<<19:1<<19+512]) {
			t.Errorf("%+v", r)
		}
		k.gone()
	})
}

// TestGone: nobody works for a client that is gone, or has half said something.
func TestGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, last := range []string{"", "\x25\x60\x95"} {
			g := newGated(sourcetest.Content(1 << 20))
			s := start(t, Export{Source: g}, Options{})
			k := s.enter(t, simple)
			k.send(request{cookie: 1, offset: 1 << 19, length: 512})
			<-g.arrived
			k.put(last)
			k.Close()
			synctest.Wait()
			if st := s.Stats(); st.Open != 0 {
				t.Errorf("%+v", st)
			}
			s.stop(t)
		}
	})
}

// TestReadTimeout: a read has its time from when it came, in the queue or not.
func TestReadTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var said lines
		g := newGated(sourcetest.Content(1 << 20))
		s := start(t, Export{Source: g}, Options{Workers: 1, ReadTimeout: 5 * time.Second, Log: slog.New(slog.NewTextHandler(&said, nil))})
		defer s.stop(t)
		k := s.enter(t, simple)
		begin := time.Now()
		k.send(request{cookie: 1, offset: 1 << 19, length: 512}, request{cookie: 2, offset: 1 << 19, length: 512})
		for range 2 {
			if r := k.reply(); r.code != 5 {
				t.Errorf("%+v", r)
			}
		}
		if d := time.Since(begin); d != 5*time.Second {
			t.Errorf("answered after %v", d)
		}
		if !strings.Contains(said.String(), "read timed out") {
			t.Errorf("log: %s", said.String())
		}
		k.disconnect()
	})
}

// TestCloseWhileReading: Close and the end of the context end everything at once.
func TestCloseWhileReading(t *testing.T) {
	for _, byContext := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			g := newGated(sourcetest.Content(1 << 20))
			s, err := NewServer(Export{Source: g}, Options{})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancelCause(t.Context())
			reason := errors.New("enough")
			ours, theirs := net.Pipe()
			done := make(chan error, 1)
			go func() { done <- s.Transmit(ctx, theirs) }()
			k := &client{t: t, Conn: ours, reads: make(map[uint64]int)}
			k.send(request{cookie: 1, offset: 1 << 19, length: 512})
			<-g.arrived
			want := os.ErrClosed
			if byContext {
				cancel(reason)
				want = reason
			} else if err := s.Close(); err != nil {
				t.Error(err)
			}
			if err := <-done; !errors.Is(err, want) {
				t.Errorf("Transmit: %v", err)
			}
			k.gone()
			cancel(nil)
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			if err := s.Transmit(t.Context(), theirs); !errors.Is(err, os.ErrClosed) {
				t.Errorf("Transmit after Close: %v", err)
			}
			if err := s.Serve(t.Context(), &pipeListener{done: make(chan struct{})}); !errors.Is(err, os.ErrClosed) {
				t.Errorf("Serve after Close: %v", err)
			}
		})
	}
}

// TestTransmit: without a handshake, as the kernel speaks.
func TestTransmit(t *testing.T) {
	content := sourcetest.Content(4096)
	s, err := NewServer(Export{Source: memory(content)}, Options{MaxConns: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var running sync.WaitGroup
	defer running.Wait()
	for range 3 { // MaxConns is for others
		ours, theirs := net.Pipe()
		running.Go(func() {
			if err := s.Transmit(t.Context(), theirs); err != nil {
				t.Errorf("Transmit: %v", err)
			}
		})
		k := &client{t: t, Conn: ours, reads: make(map[uint64]int)}
		if r := k.do(request{cookie: 1, offset: 512, length: 512}); !bytes.Equal(r.data, content[512:1024]) {
			t.Errorf("%+v", r)
		}
		defer k.disconnect()
	}
}

// TestServeFails: a listener that fails for good ends Serve with the reason, one
// that recovers does not.
func TestServeFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := NewServer(Export{Source: memory("x")}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		l := &failing{left: 20}
		if err := s.Serve(t.Context(), l); !errors.Is(err, net.ErrClosed) || l.left != 0 {
			t.Errorf("%v, %d failures left", err, l.left)
		}
	})
}

type failing struct {
	pipeListener
	left int
}

func (l *failing) Accept() (net.Conn, error) {
	if l.left--; l.left > 0 {
		return nil, errors.New("too many open files")
	}
	return nil, net.ErrClosed
}

func (l *failing) Close() error { return nil }

// TestProbe: who only looks whether somebody listens is not worth a line of the log; who
// breaks the protocol is.
func TestProbe(t *testing.T) {
	for name, c := range map[string]struct {
		client func(*net.TCPConn) error
		said   bool
	}{
		"nothing": {func(c *net.TCPConn) error { return nil }, false},
		"reset":   {func(c *net.TCPConn) error { return c.SetLinger(0) }, false},
		"hears": {func(c *net.TCPConn) error {
			_, err := io.ReadFull(c, make([]byte, 18))
			return err
		}, false},
		"garbage": {func(c *net.TCPConn) error {
			_, err := c.Write([]byte("GET / HTTP/1.1\r\n"))
			return errors.Join(err, c.CloseWrite())
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			log := make(logLines, 10)
			s, err := NewServer(Export{Source: memory("content")}, Options{Log: slog.New(slog.NewTextHandler(log, nil))})
			if err != nil {
				t.Fatal(err)
			}
			served := make(chan error, 1)
			go func() { served <- s.Serve(context.Background(), l) }()
			conn, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			if err := c.client(conn.(*net.TCPConn)); err != nil {
				t.Error(err)
			}
			if !c.said {
				conn.Close()
			} else if line := <-log; !strings.Contains(line, "client dropped") {
				t.Errorf("the log is %q", line)
			}
			for st := s.Stats(); st.Connections == 0 || st.Open != 0; st = s.Stats() {
				time.Sleep(time.Millisecond) // there is no event for what a server has not noticed
			}
			conn.Close()
			if err := errors.Join(s.Close(), <-served); err != nil {
				t.Error(err)
			}
			if len(log) != 0 {
				t.Errorf("the log says %q, too", <-log)
			}
		})
	}
}

// logLines are those of a log.
type logLines chan string

func (l logLines) Write(p []byte) (int, error) {
	l <- string(p)
	return len(p), nil
}
