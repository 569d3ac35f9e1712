package nbdserve

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"

	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
)

// TestParallel: many requests at a time of all sizes, some of which must be waited
// for: every reply is whole, the right one, and there once.
func TestParallel(t *testing.T) {
	content := sourcetest.Content(4 << 20)
	for _, d := range dialects {
		s := start(t, Export{Source: halfHere{memory(content)}}, Options{Workers: 8})
		var running sync.WaitGroup
		for i := range uint64(4) {
			k := s.enter(t, d)
			running.Go(func() { parallelReads(k, content, rand.New(rand.NewPCG(i, uint64(d)))) })
		}
		running.Wait()
		s.stop(t)
	}
}

// halfHere is a source that has to be asked twice for every other KiB.
type halfHere struct{ memory }

func (h halfHere) ReadResident(p []byte, off int64) bool {
	return off>>10&1 == 0 && h.memory.ReadResident(p, off)
}

// parallelReads keeps 16 requests under way.
func parallelReads(k *client, content []byte, rng *rand.Rand) {
	const total, depth = 400, 16
	offsets := make(map[uint64]uint64)
	sent, slots := uint64(0), make(chan request, depth)
	written := make(chan error, 1)
	go func() {
		for q := range slots {
			if _, err := k.Write(k.encode(q)); err != nil {
				written <- err
				return
			}
		}
		written <- nil
	}()
	next := func() {
		n := 1 + rng.IntN(1<<rng.IntN(21))
		q := request{cookie: sent, offset: uint64(rng.IntN(len(content) - n)), length: uint64(n)}
		k.reads[q.cookie], offsets[q.cookie] = n, q.offset
		sent++
		slots <- q
	}
	for range depth {
		next()
	}
	for range total {
		r, err := readReply(k, k.d, k.reads)
		off, ok := offsets[r.cookie]
		if err != nil || !ok || r.code != 0 || !bytes.Equal(r.data, content[off:off+uint64(len(r.data))]) || len(r.data) == 0 {
			k.t.Errorf("reply to %d: error %d, %d bytes, %v", r.cookie, r.code, len(r.data), err)
			k.Close()
			break
		}
		delete(offsets, r.cookie)
		if sent < total {
			next()
		} else if len(offsets) == 0 {
			break
		}
	}
	close(slots)
	if err := <-written; err != nil && !k.t.Failed() {
		k.t.Error(err)
	}
	k.Close()
}

// replay is a connection on which the same requests come again and again, and
// nobody looks at the replies.
type replay struct {
	net.Conn
	requests []byte
	left     []byte
	sent     int
}

func (r *replay) Read(p []byte) (int, error) {
	if len(r.left) == 0 {
		return 0, io.EOF
	}
	n := copy(p, r.left)
	r.left = r.left[n:]
	return n, nil
}

func (r *replay) Write(p []byte) (int, error) {
	r.sent += len(p)
	return len(p), nil
}

func (r *replay) Close() error { return nil }

func newReplay(t testing.TB, count int) (*session, *replay) {
	s, err := NewServer(Export{Source: make(memory, 1<<20)}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	r := &replay{}
	k := &client{}
	for i := range uint64(count) {
		r.requests = append(r.requests, k.encode(request{cookie: i, offset: i % 200 * 4096, length: 4096})...)
	}
	c := s.newSession(t.Context(), r)
	t.Cleanup(func() { c.end(nil); <-c.closed })
	return c, r
}

// TestAllocations: a read of what is here allocates nothing. The pool may lose a
// buffer to the garbage collector, or to the race detector, which is not a read.
func TestAllocations(t *testing.T) {
	const count = 1000
	c, r := newReplay(t, count)
	runs := 0
	perRun := testing.AllocsPerRun(20, func() {
		runs++
		r.left = r.requests
		if err := c.serveRequests(); err != io.EOF {
			t.Fatal(err)
		}
	})
	if want := runs * count * (16 + 4096); r.sent != want {
		t.Errorf("%d bytes of replies, want %d", r.sent, want)
	}
	if perRun > count/20 {
		t.Errorf("%.1f allocations for %d reads", perRun, count)
	}
}

// BenchmarkResident is the server's part of a 4 KiB read, without the system calls.
func BenchmarkResident(b *testing.B) {
	const count = 1000
	c, r := newReplay(b, count)
	b.ReportAllocs()
	for b.Loop() {
		r.left = r.requests
		if err := c.serveRequests(); err != io.EOF {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*count), "ns/read")
}
