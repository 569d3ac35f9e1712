package nbdserve

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
)

var dialects = []dialect{simple, structured, extended}

// TestEveryRequest has each command, each way to get it wrong and what is replied,
// in each dialect, of a source whose bytes are here and of one that has to fetch them,
// and that the connection lives on.
func TestEveryRequest(t *testing.T) {
	content := sourcetest.Content(1<<20 + 100)
	const size = 1<<20 + 512
	padded := append(slices.Clone(content), make([]byte, 412)...)
	const (
		eperm, eio, einval = 1, 5, 22
		top                = 1<<64 - 1
	)
	for _, c := range []struct {
		name string
		q    request
		code [3]uint32
		data []byte
	}{
		{"read", request{length: 512}, [3]uint32{}, padded[:512]},
		{"read, odd", request{offset: 4097, length: 1}, [3]uint32{}, padded[4097:4098]},
		{"read across the end of the blob", request{offset: 1 << 20, length: 512}, [3]uint32{}, padded[1<<20:]},
		{"read past the end of the blob", request{offset: size - 1, length: 1}, [3]uint32{}, []byte{0}},
		{"read everything", request{length: size}, [3]uint32{}, padded},
		{"read in one piece", request{flags: 4, length: 512}, [3]uint32{einval, 0, 0}, padded[:512]},
		{"read of nothing", request{}, [3]uint32{einval, einval, einval}, nil},
		{"read past the end", request{offset: size - 511, length: 512}, [3]uint32{einval, einval, einval}, nil},
		{"read at the end", request{offset: size, length: 1}, [3]uint32{einval, einval, einval}, nil},
		{"read, overflow", request{offset: top - 510, length: 512}, [3]uint32{einval, einval, einval}, nil},
		{"read too much", request{length: 33 << 20}, [3]uint32{einval, einval, einval}, nil},
		{"read with FUA", request{flags: 1, length: 512}, [3]uint32{einval, einval, einval}, nil},
		{"read with unknown flags", request{flags: 0x8000, length: 512}, [3]uint32{einval, einval, einval}, nil},
		{"read, only one", request{flags: 8, length: 512}, [3]uint32{einval, einval, einval}, nil},
		{"flush", request{command: 3}, [3]uint32{}, nil},
		{"flush with flags", request{command: 3, flags: 1}, [3]uint32{einval, einval, einval}, nil},
		{"trim", request{command: 4, length: 512}, [3]uint32{eperm, eperm, eperm}, nil},
		{"trim outside", request{command: 4, offset: top, length: 512}, [3]uint32{eperm, eperm, eperm}, nil},
		{"cache", request{command: 5, length: 1 << 20}, [3]uint32{}, nil},
		{"cache, more than a read", request{command: 5, length: size}, [3]uint32{}, nil},
		{"cache outside", request{command: 5, offset: 512, length: size}, [3]uint32{einval, einval, einval}, nil},
		{"cache with flags", request{command: 5, flags: 2, length: 512}, [3]uint32{einval, einval, einval}, nil},
		{"write zeroes", request{command: 6, flags: 2, length: 512}, [3]uint32{eperm, eperm, eperm}, nil},
		{"block status without context", request{command: 7, length: 512}, [3]uint32{einval, einval, einval}, nil},
		{"resize", request{command: 8, length: 512}, [3]uint32{einval, einval, einval}, nil},
		{"unknown command", request{command: 0xffff, flags: 0xffdf}, [3]uint32{einval, einval, einval}, nil},
	} {
		for i := range 2 * len(dialects) {
			d, source := dialects[i/2], []backend.Source{memory(content), sourcetest.Memory(content)}[i%2]
			t.Run(fmt.Sprintf("%s/%d", c.name, i), func(t *testing.T) {
				s := start(t, Export{Source: source}, Options{})
				defer s.stop(t)
				soil(&s.buffers)
				k := s.enter(t, d)
				c.q.cookie = 0xfeedface<<32 + uint64(d)
				r := k.do(c.q)
				if r.code != c.code[d] || r.code == 0 && !bytes.Equal(r.data, c.data) || r.code != 0 && r.data != nil {
					t.Errorf("error %d, %d bytes %.20x", r.code, len(r.data), r.data)
				}
				if d != simple && (r.text == "") != (r.code == 0) {
					t.Errorf("error %d with the words %q", r.code, r.text)
				}
				if r := k.do(request{cookie: 1, length: 512}); !bytes.Equal(r.data, padded[:512]) {
					t.Errorf("the next read: %+v", r)
				}
				k.disconnect()
			})
		}
	}
}

// soil leaves the pool with small buffers that were used.
func soil(p *bufferPool) {
	for n := minBuffer; n <= 64<<10; n *= 2 {
		b := p.get(n)
		for i := range b.b[:cap(b.b)] {
			b.b[:cap(b.b)][i] = 0xee
		}
		p.put(b)
	}
}

// TestWrite: a write is refused, and its payload is not taken for requests.
func TestWrite(t *testing.T) {
	s := start(t, Export{Source: memory(sourcetest.Content(4096))}, Options{})
	defer s.stop(t)
	for _, d := range dialects {
		k := s.enter(t, d)
		trap := k.encode(request{command: 2})
		payload := bytes.Repeat(trap, 20_000/len(trap))
		for _, flags := range []uint16{0, 1, 0x20} {
			if flags == 0x20 && d != extended {
				continue
			}
			q := request{command: 1, flags: flags, cookie: 5, length: uint64(len(payload))}
			k.put(k.encode(q), payload)
			if r := k.reply(); r.code != 1 || r.cookie != 5 {
				t.Errorf("%+v", r)
			}
		}
		k.disconnect()

		k = s.enter(t, d)
		k.put(k.encode(request{command: 1, length: maxRequest + 1}))
		k.gone()
	}
	// A payload where none belongs is read over.
	k := s.enter(t, extended)
	k.put(k.encode(request{command: 0, flags: 0x20, cookie: 6, length: 12}), "twelve bytes")
	if r := k.reply(); r.code != 22 || r.cookie != 6 {
		t.Errorf("%+v", r)
	}
	k.disconnect()
}

func TestBlockStatus(t *testing.T) {
	const size = 1 << 20
	content := sourcetest.Content(size - 100)
	half := uint64(size-100) / 2
	for _, c := range []struct {
		name               string
		q                  request
		allocated, fetched []extent
	}{
		{"everything", request{length: size}, []extent{{size, 0}}, []extent{{half, 1}, {size - half, 0}}},
		{"only one", request{flags: 8, length: size}, []extent{{size, 0}}, []extent{{half, 1}}},
		{"here", request{offset: 512, length: 512}, []extent{{512, 0}}, []extent{{512, 1}}},
		{"the padding", request{offset: size - 1, length: 1}, []extent{{1, 0}}, []extent{{1, 0}}},
	} {
		for _, d := range dialects[1:] {
			s := start(t, Export{Source: newGated(content)}, Options{})
			k := s.enter(t, d, "base:allocation", "x-erofs-oci:fetched")
			c.q.command, c.q.cookie = 7, 9
			r := k.do(c.q)
			if want := map[uint32][]extent{1: c.allocated, 2: c.fetched}; r.code != 0 || !reflect.DeepEqual(r.status, want) {
				t.Errorf("%s: %+v", c.name, r)
			}
			for _, bad := range []request{{command: 7}, {command: 7, offset: size, length: 1}, {command: 7, length: 1, flags: 4}} {
				if r := k.do(bad); r.code != 22 {
					t.Errorf("%+v: %+v", bad, r)
				}
			}
			k.disconnect()
			s.stop(t)
		}
	}
}

// TestContextsForgotten: contexts that are set replace those set before, also where
// setting them fails.
func TestContextsForgotten(t *testing.T) {
	s := start(t, Export{Source: memory(sourcetest.Content(4096))}, Options{})
	defer s.stop(t)
	k := s.connect(t)
	k.put(uint32(3))
	k.wantAck(k.option(8))
	k.wantAck(k.option(10, uint32(0), uint32(1), uint32(15), "base:allocation"))
	if got := k.option(10, uint32(5), "other", uint32(0)); got[0].kind>>31 == 0 {
		t.Errorf("contexts of another export: %+v", got)
	}
	k.wantAck(k.option(7, uint32(0), uint16(0)))
	k.d = structured
	if r := k.do(request{command: 7, length: 512}); r.code != 22 {
		t.Errorf("%+v", r)
	}
	k.disconnect()
}

// checkered is a source of which every other KiB is here.
type checkered struct{ memory }

func (checkered) Present(off int64) (bool, int64) { return off>>10&1 == 0, (off>>10 + 1) << 10 }

// TestManyExtents: a reply does not become longer than a client may expect, and the
// next request goes on where it ended.
func TestManyExtents(t *testing.T) {
	const size = (maxExtents + 10) << 10
	s := start(t, Export{Source: checkered{make(memory, size)}}, Options{})
	defer s.stop(t)
	k := s.enter(t, structured, "x-erofs-oci:fetched")
	r := k.do(request{command: 7, length: size})
	if got := r.status[2]; len(got) != maxExtents || got[0] != (extent{1024, 1}) || got[1] != (extent{1024, 0}) {
		t.Errorf("%d extents, %v…", len(got), got[:2])
	}
	r = k.do(request{command: 7, offset: maxExtents << 10, length: size - maxExtents<<10})
	if got := r.status[2]; len(got) != 10 {
		t.Errorf("%d extents", len(got))
	}
	k.disconnect()
}

// TestFailedRead: a read that fails is an error for the one who asked, with the
// reason in the log, and nothing else happens.
func TestFailedRead(t *testing.T) {
	for _, d := range dialects {
		var said lines
		g := newGated(sourcetest.Content(4096))
		var told atomic.Int64
		s := start(t, Export{Source: g}, Options{
			Log:    slog.New(slog.NewTextHandler(&said, nil)),
			Failed: func(errno syscall.Errno) { told.Add(int64(errno)) },
		})
		k := s.enter(t, d)
		reason := errors.New("the registry is on fire")
		for i := range uint64(3) {
			g.pass <- reason
			if r := k.do(request{cookie: i, offset: 2048, length: 512}); r.code != 5 || r.data != nil || strings.Contains(r.text, "fire") {
				t.Errorf("%+v", r)
			}
			if r := k.do(request{cookie: i, offset: 512, length: 512}); !bytes.Equal(r.data, g.memory[512:1024]) {
				t.Errorf("resident read after a failed one: %+v", r)
			}
		}
		g.pass <- reason
		if r := k.do(request{command: 5, cookie: 7, length: 4096}); r.code != 5 {
			t.Errorf("cache: %+v", r)
		}
		g.pass <- nil
		if r := k.do(request{cookie: 8, offset: 2048, length: 512}); !bytes.Equal(r.data, g.memory[2048:2560]) {
			t.Errorf("read after failed ones: %+v", r)
		}
		k.disconnect()
		s.stop(t)
		const of = ` level=ERROR msg="request failed" offset=%d bytes=%d errno="input/output error" err="the registry is on fire"` + "\n"
		read, cached := fmt.Sprintf(of, 2048, 512), fmt.Sprintf(of, 0, 4096)
		if log := said.String(); strings.Count(log, read) != 3 || strings.Count(log, cached) != 1 || strings.Count(log, "\n") != 4 {
			t.Errorf("log: %s", log)
		}
		if n := told.Load(); n != 4*int64(syscall.EIO) {
			t.Errorf("told of failures, whose numbers add up to %d", n)
		}
		if st := s.Stats(); st.Requests != 8 || st.Failed != 4 || st.Resident != 3 || st.BytesRead != 4*512 || st.Connections != 1 {
			t.Errorf("%+v", st)
		}
	}
}

// lines is a log.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// TestStuckReads: reads of what is here are answered while reads that wait occupy
// every worker and fill the queue, and those come to their end in any order.
func TestStuckReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGated(sourcetest.Content(1 << 20))
		s := start(t, Export{Source: g}, Options{Workers: 4})
		defer s.stop(t)
		k := s.enter(t, simple)
		const stuck = 4 + queueLength
		for i := range uint64(stuck) {
			k.send(request{cookie: 1000 + i, offset: 1<<20 - 512 - 512*(i%512), length: 512})
		}
		synctest.Wait()
		if n := len(g.arrived); n != 4 {
			t.Errorf("%d reads of the source at a time", n)
		}
		for i := range uint64(10) {
			if r := k.do(request{cookie: i, offset: i * 512, length: 512}); !bytes.Equal(r.data, g.memory[i*512:i*512+512]) {
				t.Errorf("%+v", r)
			}
		}
		// One more than the queue holds: the client waits, and the other clients do not.
		k.send(request{cookie: 2, offset: 1<<20 - 512, length: 512}, request{cookie: 3, length: 512})
		synctest.Wait()
		other := s.enter(t, structured)
		if r := other.do(request{cookie: 1, length: 512}); !bytes.Equal(r.data, g.memory[:512]) {
			t.Errorf("%+v", r)
		}
		other.disconnect()
		seen := make(map[uint64]bool)
		for range stuck + 2 {
			g.pass <- nil
			r := k.reply()
			if seen[r.cookie] || r.code != 0 || len(r.data) != 512 {
				t.Fatalf("%d: error %d", r.cookie, r.code)
			}
			seen[r.cookie] = true
		}
		k.disconnect()
	})
}
