package nbdserve

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
)

// TestUnreadReplies: a client that does not read its replies stops itself only.
func TestUnreadReplies(t *testing.T) {
	g := newGated(sourcetest.Content(1 << 20))
	s := start(t, Export{Source: g}, Options{Workers: 2})
	defer s.stop(t)
	stuck := s.enter(t, simple)
	// Its two workers and its reading goroutine all have something to say.
	stuck.send(request{offset: 1 << 19, length: 512}, request{offset: 1 << 19, length: 512}, request{length: 512})
	for range 2 {
		<-g.arrived
		g.pass <- nil
	}
	k := s.enter(t, simple)
	for i, off := range []uint64{0, 1 << 19} {
		g.pass <- nil
		if r := k.do(request{cookie: uint64(i), offset: off, length: 512}); !bytes.Equal(r.data, g.memory[off:off+512]) {
			t.Errorf("%+v", r)
		}
	}
	k.disconnect()
}

// TestStarved: where a client takes none of its large replies, others' small reads
// go on at once, and their large ones after a while.
func TestStarved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		content := sourcetest.Content(4 << 20)
		s := start(t, Export{Source: memory(content)}, Options{})
		defer s.stop(t)
		s.large = newBudget(4)
		stuck := s.enter(t, simple)
		stuck.send(request{length: 4 << 20}, request{cookie: 1, length: 2 << 20})
		synctest.Wait()
		time.Sleep(5 * time.Second)
		k := s.enter(t, structured)
		begin := time.Now()
		k.send(request{cookie: 1, length: 3 << 20}, request{cookie: 2, length: 512})
		if r := k.reply(); r.cookie != 2 || !bytes.Equal(r.data, content[:512]) || time.Since(begin) != 0 {
			t.Errorf("small read: %+v after %v", r, time.Since(begin))
		}
		if r := k.reply(); r.cookie != 1 || !bytes.Equal(r.data, content[:3<<20]) {
			t.Errorf("large read: error %d, %d bytes", r.code, len(r.data))
		}
		if d := time.Since(begin); d > 2*starving {
			t.Errorf("the large read took %v", d)
		}
		if _, err := io.Copy(io.Discard, stuck); err != nil {
			t.Error(err)
		}
		k.disconnect()
	})
}

// TestSlowClient: a client that takes its large replies slowly keeps its connection,
// whoever waits.
func TestSlowClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		content := sourcetest.Content(4 << 20)
		s := start(t, Export{Source: memory(content)}, Options{})
		defer s.stop(t)
		s.large = newBudget(4)
		slow, k := s.enter(t, simple), s.enter(t, simple)
		slow.send(request{length: 4 << 20})
		synctest.Wait()
		k.send(request{length: 1 << 20})
		got := slow.bytes(16)
		for range 4 {
			time.Sleep(9 * time.Second)
			got = append(got, slow.bytes(1<<20)...)
		}
		if !bytes.Equal(got[16:], content) {
			t.Error("wrong data")
		}
		if r := k.reply(); !bytes.Equal(r.data, content[:1<<20]) {
			t.Errorf("error %d, %d bytes", r.code, len(r.data))
		}
		slow.disconnect()
		k.disconnect()
	})
}

// TestCancelledWait: who waits for memory and goes, goes without it.
func TestCancelledWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, Export{Source: make(memory, 8<<20)}, Options{ReadTimeout: time.Second})
		defer s.stop(t)
		s.large = newBudget(4)
		stuck := s.enter(t, simple)
		stuck.send(request{length: 3 << 20})
		synctest.Wait()
		a, b := s.enter(t, simple), s.enter(t, simple)
		a.send(request{length: 4 << 20})
		synctest.Wait()
		b.send(request{length: 1 << 20})
		synctest.Wait()
		a.Close() // with one share, and waiting for three
		b.reply() // an error after a second, or data
		b.disconnect()
		stuck.bytes(16 + 3<<20)
		stuck.disconnect()
		if n := len(s.large.shares); n != 0 {
			t.Errorf("%d shares are lost", n)
		}
	})
}

// TestManyConnections: who opens connections and says nothing pushes out its own
// kind, and nobody who is served. When all places are served, new clients are told.
func TestManyConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		content := sourcetest.Content(4096)
		s := start(t, Export{Source: memory(content)}, Options{MaxConns: 4})
		defer s.stop(t)
		working := func(clients ...*client) {
			t.Helper()
			for i, k := range clients {
				if r := k.do(request{cookie: 1, length: 512}); !bytes.Equal(r.data, content[:512]) {
					t.Errorf("client %d: %+v", i, r)
				}
			}
		}
		a, b := s.enter(t, simple), s.enter(t, extended)
		var idle []*client
		for range 2 * maxHandshakes {
			idle = append(idle, s.connect(t))
		}
		synctest.Wait()
		if n := s.Stats().Open; n != 2+maxHandshakes {
			t.Errorf("%d connections are open", n)
		}
		for _, k := range idle[:maxHandshakes] {
			k.gone()
		}
		working(a, b)
		c := s.enter(t, structured)
		d := s.enter(t, structured)
		working(a, b, c, d)

		late := s.connect(t)
		late.put(uint32(3))
		late.wantAck(late.option(6, uint32(0), uint16(0)))
		if got := late.option(7, uint32(0), uint16(0)); len(got) != 1 || got[0].kind != 2|1<<31 {
			t.Errorf("one too many: %+v", got)
		}
		old := s.connect(t)
		old.put(uint32(3))
		old.sendOption(1)
		old.gone()
		a.disconnect()
		synctest.Wait()
		late.wantAck(late.option(7, uint32(0), uint16(0)))
		working(b, c, d, late)
		for _, k := range []*client{b, c, d, late} {
			k.disconnect()
		}
		if got := s.Stats().Connections; got != 6+2*maxHandshakes {
			t.Errorf("%d connections came", got)
		}
	})
}

// TestFlood: under connections by the hundred that send garbage, half of something
// or nothing over TCP, a client reads on, and new ones come in.
func TestFlood(t *testing.T) {
	content := sourcetest.Content(1 << 20)
	// Some of the flood gets through the handshake. It cannot hold all places.
	s := start(t, Export{Source: halfHere{memory(content)}}, Options{MaxConns: 256})
	defer s.stop(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(t.Context(), l) }()
	defer func() {
		s.Close()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	steady := s.enter(t, structured)
	var hostile sync.WaitGroup
	defer hostile.Wait()
	for i := range uint64(4) {
		hostile.Go(func() { flood(t, l.Addr().String(), rand.New(rand.NewPCG(i, 1))) })
	}
	for i := range uint64(500) {
		off := i * 2048 % (1<<20 - 4096)
		if r := steady.do(request{cookie: i, offset: off, length: 4096}); !bytes.Equal(r.data, content[off:off+4096]) {
			t.Fatalf("%+v", r)
		}
		if i%50 == 0 {
			fresh := s.enter(t, simple)
			if r := fresh.do(request{length: 512}); !bytes.Equal(r.data, content[:512]) {
				t.Fatalf("%+v", r)
			}
			fresh.disconnect()
		}
	}
	steady.disconnect()
}

// flood opens 500 connections, says something on each and keeps the last 50 open.
func flood(t *testing.T, addr string, rng *rand.Rand) {
	greeted := "\x00\x00\x00\x03"
	words := []string{
		"", "\x00", "GET / HTTP/1.1\r\n\r\n", "\xff\xff\xff\xff", greeted, greeted + "IHAVE",
		greeted + "IHAVEOPT\x00\x00\x00\x06\xff\xff\xff\xff",
		greeted + "IHAVEOPT\x00\x00\x00\x06\x00\x00\x7f\xff123",
		greeted + "IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x00" + "\x25\x60\x95\x13\x00",
		greeted + "IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x00" + "\x25\x60\x95\x13\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\xff\xff",
	}
	var open []net.Conn
	for range 500 {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Error(err)
			break
		}
		// The server may have closed it already.
		_, _ = fmt.Fprint(conn, words[rng.IntN(len(words))])
		if open = append(open, conn); len(open) > 50 {
			open[0].Close()
			open = open[1:]
		}
	}
	for _, conn := range open {
		conn.Close()
	}
}
