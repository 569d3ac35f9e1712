package nbdserve

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
)

// script is a connection whose client said everything in advance.
type script struct {
	replay
	w io.Writer
}

func (s *script) Write(p []byte) (int, error)     { return s.w.Write(p) }
func (s *script) SetDeadline(time.Time) error     { return nil }
func (s *script) SetReadDeadline(time.Time) error { return nil }

// patchy is a source of which some is here, some is not, and some cannot be had.
type patchy struct{ memory }

const patchyBad = 512 << 10

func (p patchy) bad(off int64, n int) bool { return off < patchyBad+4096 && off+int64(n) > patchyBad }

func (p patchy) ReadAt(ctx context.Context, b []byte, off int64) error {
	if p.bad(off, len(b)) {
		return errors.New("cannot be had")
	}
	return p.memory.ReadAt(ctx, b, off)
}

func (p patchy) ReadResident(b []byte, off int64) bool {
	return off>>12&1 == 0 && !p.bad(off, len(b)) && p.memory.ReadResident(b, off)
}

func (p patchy) Present(off int64) (bool, int64) { return off>>12&1 == 0, (off>>12 + 1) << 12 }

// FuzzNBDRequest: whatever a client sends after the handshake, each whole request
// before the first that breaks the connection is answered once, in the form agreed
// on, with the export's bytes or with an error that it deserves.
func FuzzNBDRequest(f *testing.F) {
	content := sourcetest.Content(1<<20 + 100)
	for _, d := range dialects {
		k := &client{d: d}
		for command := range uint16(9) {
			f.Add(uint8(d), k.encode(request{0, command, 1, 4096, 512}))
		}
		f.Add(uint8(d), bytes.Join([][]byte{
			k.encode(request{0, 0, 1, 0, 4096}), k.encode(request{0, 0, 2, 4096, 4096}), k.encode(request{0, 0, 3, patchyBad, 512}),
			k.encode(request{0, 0, 4, 1 << 20, 512}), k.encode(request{8, 7, 5, 0, 1 << 20}), k.encode(request{0, 1, 6, 0, 4}),
			[]byte("1234"), k.encode(request{0, 0, 7, 0, 1 << 20}), k.encode(request{0, 2, 8, 0, 0}),
		}, nil))
		f.Add(uint8(d), k.encode(request{0xffff, 0xffff, 1<<64 - 1, 1<<64 - 1, 1<<64 - 1}))
		f.Add(uint8(d), k.encode(request{0, 0, 1, 0, 512})[:20])
	}
	f.Fuzz(func(t *testing.T, form uint8, data []byte) {
		d := dialect(form % 3)
		data = data[:min(len(data), 2048)]
		s, err := NewServer(Export{Source: patchy{memory(content)}}, Options{Workers: 2})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		want, peaceful := expectations(d, data)
		r, w := io.Pipe()
		checked := make(chan error, 1)
		go func() {
			err := checkReplies(r, d, want, append(content, make([]byte, 512)...))
			r.CloseWithError(fmt.Errorf("nobody reads: %w", err))
			checked <- err
		}()
		c := s.newSession(t.Context(), &script{replay{left: data}, w})
		c.dialect = d
		if d != simple {
			c.contexts = s.metaContexts()
		}
		// However it ends, it has to have said the right things.
		_ = c.transmit()
		w.Close()
		if err := <-checked; err != nil {
			t.Fatal(err)
		}
		for _, e := range want {
			if peaceful && !e.answered {
				t.Fatalf("%+v is not answered", e.request)
			}
		}
	})
}

// expected is a request that the server must have seen.
type expected struct {
	request
	answered bool
}

// expectations takes requests apart, independently of the server. A cookie that is
// used twice makes replies ambiguous: there is nothing to check then. At the end of a
// peaceful client is a disconnect request, and all before it must be answered.
func expectations(d dialect, data []byte) (all map[uint64]*expected, peaceful bool) {
	all = make(map[uint64]*expected)
	for size := d.requestSize(); len(data) >= size; {
		q := request{
			flags: binary.BigEndian.Uint16(data[4:]), command: binary.BigEndian.Uint16(data[6:]),
			cookie: binary.BigEndian.Uint64(data[8:]), offset: binary.BigEndian.Uint64(data[16:]),
		}
		magic := uint32(0x25609513)
		if d == extended {
			magic, q.length = 0x21e41c71, binary.BigEndian.Uint64(data[24:])
		} else {
			q.length = uint64(binary.BigEndian.Uint32(data[24:]))
		}
		if binary.BigEndian.Uint32(data) != magic {
			break
		}
		if q.command == 2 && q.flags&0x20 == 0 {
			return all, true
		}
		if all[q.cookie] != nil {
			return nil, false
		}
		all[q.cookie] = &expected{request: q}
		data = data[size:]
		if q.command == 1 || d == extended && q.flags&0x20 != 0 {
			if q.length > uint64(len(data)) {
				break
			}
			data = data[q.length:]
		}
	}
	return all, false
}

func checkReplies(r io.Reader, d dialect, want map[uint64]*expected, content []byte) error {
	if want == nil {
		_, err := io.Copy(io.Discard, r)
		return err
	}
	reads := make(map[uint64]int)
	for cookie, e := range want {
		if e.command == 0 {
			reads[cookie] = int(e.length)
		}
	}
	for {
		got, err := readReply(r, d, reads)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		e := want[got.cookie]
		if e == nil || e.answered {
			return fmt.Errorf("reply to %d, which nobody waits for", got.cookie)
		}
		e.answered = true
		if err := e.check(d, got, content); err != nil {
			return fmt.Errorf("%+v answered with error %d %q, %d bytes: %w", e.request, got.code, got.text, len(got.data), err)
		}
	}
}

func (e *expected) check(d dialect, got reply, content []byte) error {
	size := uint64(len(content)) / 512 * 512
	inside := e.length > 0 && e.offset < size && e.length <= size-e.offset
	switch {
	case e.command == 1 || e.command == 4 || e.command == 6:
		if got.code != 1 {
			return errors.New("not EPERM")
		}
	case e.command == 3 && e.flags == 0:
		if got.code != 0 {
			return errors.New("not success")
		}
	case got.code == 0 && (!inside || e.command > 7):
		return errors.New("not EINVAL")
	case got.code == 0 && e.command == 0:
		if !bytes.Equal(got.data, content[e.offset:e.offset+e.length]) {
			return errors.New("wrong data")
		}
		if (patchy{}).bad(int64(e.offset), int(e.length)) {
			return errors.New("data that cannot be had")
		}
	case got.code == 0 && e.command == 7:
		for id, extents := range got.status {
			sum := uint64(0)
			for _, x := range extents {
				sum += x.length
			}
			if sum == 0 || sum > e.length {
				return fmt.Errorf("context %d: extents of %d bytes", id, sum)
			}
		}
	case got.code == 5 && !(e.command == 0 || e.command == 5):
		return errors.New("EIO without a read")
	}
	return nil
}

// FuzzHandshake: whatever a client says at first, the server ends, what it says is
// bounded by what it was asked, and it is in the form of the handshake.
func FuzzHandshake(f *testing.F) {
	greeted := "\x00\x00\x00\x03"
	option := func(id byte, data string) string {
		return "IHAVEOPT\x00\x00\x00" + string(id) + string(binary.BigEndian.AppendUint32(nil, uint32(len(data)))) + data
	}
	none := "\x00\x00\x00\x00\x00\x00"
	for _, said := range []string{
		"", greeted, "\xff\xff\xff\xff", greeted + option(1, ""), greeted + option(1, "disk"), greeted + option(2, ""),
		greeted + option(3, "") + option(5, "") + option(6, none) + option(8, "") + option(9, none+"\x00\x00") + option(11, "") +
			option(10, "\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x0fbase:allocation") + option(7, none) + "\x21\xe4\x1c\x71",
		greeted + option(7, "\x00\x00\x00\x04disk\x00\x02\x00\x03\x00\x01"),
		greeted + "IHAVEOPT\x00\x00\x00\x07\xff\xff\xff\xff",
		strings.Repeat(option(3, ""), 3),
	} {
		f.Add([]byte(said))
	}
	f.Fuzz(func(t *testing.T, said []byte) {
		said = said[:min(len(said), 64<<10)]
		s, err := NewServer(Export{Name: "disk", Source: checkered{make(memory, 4096)}}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		var out bytes.Buffer
		c := s.newSession(t.Context(), &script{replay{left: said}, &out})
		// However it ends, it has to have said the right things.
		_ = c.serve()
		if limit := 1024 + maxOptions*1024 + len(said)/compactRequestSize*(4096+64); out.Len() > limit {
			t.Fatalf("%d bytes of answer to %d", out.Len(), len(said))
		}
		checkHandshake(t, out.Bytes())
	})
}

func checkHandshake(t *testing.T, b []byte) {
	greeting := []byte("NBDMAGICIHAVEOPT\x00\x03")
	if !bytes.HasPrefix(b, greeting) {
		t.Fatalf("greeting %q", b)
	}
	for b = b[len(greeting):]; len(b) > 0; {
		if len(b) < 20 || binary.BigEndian.Uint64(b) != 0x3e889045565a9 {
			// The answer to EXPORT_NAME: the size, and flags.
			if len(b) < 10 || binary.BigEndian.Uint64(b) != 4096 {
				t.Fatalf("in the handshake: %x", b[:min(len(b), 40)])
			}
			return
		}
		id, kind, n := binary.BigEndian.Uint32(b[8:]), binary.BigEndian.Uint32(b[12:]), binary.BigEndian.Uint32(b[16:])
		if uint64(n) > uint64(len(b)-20) {
			t.Fatalf("reply to option %d of %d bytes is cut", id, n)
		}
		if b = b[20+n:]; id == 7 && kind == 1 {
			return
		}
	}
}
