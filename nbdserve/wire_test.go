package nbdserve

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"strings"
	"testing"

	"github.com/pojntfx/go-nbd/pkg/protocol"
)

// unhex takes the spaces out that tell fields apart.
func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestParseRequest(t *testing.T) {
	for _, c := range []struct {
		name    string
		d       dialect
		wire    string
		want    request
		payload uint64
		bad     bool
	}{
		{"read", simple, "25609513 0000 0000 0123456789abcdef 0000000000001000 00000200",
			request{0, 0, 0x0123456789abcdef, 4096, 512}, 0, false},
		{"write, largest fields", structured, "25609513 ffff 0001 ffffffffffffffff ffffffffffffffff ffffffff",
			request{0xffff, 1, 1<<64 - 1, 1<<64 - 1, 1<<32 - 1}, 1<<32 - 1, false},
		{"flag for a payload means nothing here", structured, "25609513 0020 0007 0000000000000001 0000000000000000 00000200",
			request{0x20, 7, 1, 0, 512}, 0, false},
		{"extended block status", extended, "21e41c71 0008 0007 0000000000000002 0000000100000000 0000000200000000",
			request{8, 7, 2, 1 << 32, 2 << 32}, 0, false},
		{"extended with payload", extended, "21e41c71 0020 0007 0000000000000002 0000000000000000 000000000000000c",
			request{0x20, 7, 2, 0, 12}, 12, false},
		{"extended write without its flag", extended, "21e41c71 0000 0001 0000000000000002 0000000000000000 0000000000000200",
			request{0, 1, 2, 0, 512}, 512, false},
		{"wrong magic", simple, "25609512 0000 0000 0000000000000000 0000000000000000 00000200", request{}, 0, true},
		{"compact where extended was agreed on", extended, "25609513 0000 0000 0000000000000000 0000000000000000 0000000000000200",
			request{}, 0, true},
		{"extended where it was not", structured, "21e41c71 0000 0000 0000000000000000 0000000000000000 00000200", request{}, 0, true},
	} {
		wire := unhex(t, c.wire)
		if len(wire) != c.d.requestSize() {
			t.Fatalf("%s: %d bytes", c.name, len(wire))
		}
		got, err := c.d.parse(wire)
		if got != c.want || (err != nil) != c.bad {
			t.Errorf("%s: %+v, %v", c.name, got, err)
		}
		if n := c.d.payload(got); n != c.payload {
			t.Errorf("%s: payload %d, want %d", c.name, n, c.payload)
		}
	}
}

func TestReplies(t *testing.T) {
	q := request{cookie: 0x0123456789abcdef, offset: 0x1000, length: 0x200}
	b := make([]byte, maxPlainReply)
	data := func(d dialect) []byte {
		d.putDataHead(b, q)
		return b[:d.dataHeadSize()]
	}
	status := func(d dialect) []byte {
		s := make([]byte, d.headSize()+statusSize(d, 2))
		d.putStatus(s, q, 1, 2, []extent{{0x100, 0}, {0x100, 1}})
		return s
	}
	for _, c := range []struct {
		name string
		got  []byte
		want string
	}{
		{"simple data", bytes.Clone(data(simple)), "67446698 00000000 0123456789abcdef"},
		{"simple done", bytes.Clone(b[:simple.putDone(b, q)]), "67446698 00000000 0123456789abcdef"},
		{"simple error", bytes.Clone(b[:simple.putError(b, q, 5, "not told")]), "67446698 00000005 0123456789abcdef"},
		{"structured data", bytes.Clone(data(structured)), "668e33ef 0001 0001 0123456789abcdef 00000208 0000000000001000"},
		{"structured done", bytes.Clone(b[:structured.putDone(b, q)]), "668e33ef 0001 0000 0123456789abcdef 00000000"},
		{"structured error", bytes.Clone(b[:structured.putError(b, q, 22, "no")]), "668e33ef 0001 8001 0123456789abcdef 00000008 00000016 0002 6e6f"},
		{"structured status", status(structured),
			"668e33ef 0001 0005 0123456789abcdef 00000014 00000002 00000100 00000000 00000100 00000001"},
		{"extended data", bytes.Clone(data(extended)),
			"6e8a278c 0001 0001 0123456789abcdef 0000000000001000 0000000000000208 0000000000001000"},
		{"extended done", bytes.Clone(b[:extended.putDone(b, q)]),
			"6e8a278c 0001 0000 0123456789abcdef 0000000000001000 0000000000000000"},
		{"extended error", bytes.Clone(b[:extended.putError(b, q, 1, "no")]),
			"6e8a278c 0001 8001 0123456789abcdef 0000000000001000 0000000000000008 00000001 0002 6e6f"},
		{"extended status", status(extended),
			"6e8a278c 0001 0006 0123456789abcdef 0000000000001000 0000000000000028 00000002 00000002" +
				"0000000000000100 0000000000000000 0000000000000100 0000000000000001"},
	} {
		if want := unhex(t, c.want); !bytes.Equal(c.got, want) {
			t.Errorf("%s:\n got %x\nwant %x", c.name, c.got, want)
		}
	}
}

// TestErrorText: whatever is to be said, it fits.
func TestErrorText(t *testing.T) {
	b := make([]byte, maxPlainReply)
	if n := extended.putError(b, request{}, 5, strings.Repeat("x", 5000)); n != maxPlainReply {
		t.Errorf("%d bytes", n)
	}
	for _, err := range []error{errReadOnly, errOutside, errTooLong, errNoLength, errCommand, errFlags, errNoContext, errPayload, errCannotServe} {
		if len(err.Error()) > maxErrorText {
			t.Errorf("%q is cut", err)
		}
	}
}

// TestWireStructures: the codec of the hot path does what encoding/binary does with
// the structures of package protocol.
func TestWireStructures(t *testing.T) {
	h := protocol.TransmissionRequestHeader{
		RequestMagic: protocol.TRANSMISSION_MAGIC_REQUEST, CommandFlags: 0x0102, Type: 0x0304,
		Handle: 0x05060708090a0b0c, Offset: 0x0d0e0f1011121314, Length: 0x15161718,
	}
	wire, err := binary.Append(nil, binary.BigEndian, h)
	if err != nil {
		t.Fatal(err)
	}
	got, err := simple.parse(wire)
	if want := (request{h.CommandFlags, h.Type, h.Handle, h.Offset, uint64(h.Length)}); err != nil || got != want || len(wire) != compactRequestSize {
		t.Errorf("%+v, %v", got, err)
	}
	r := protocol.TransmissionReplyHeader{ReplyMagic: protocol.TRANSMISSION_MAGIC_REPLY, Error: 5, Handle: 7}
	want, err := binary.Append(nil, binary.BigEndian, r)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, len(want))
	putSimple(b, r)
	if !bytes.Equal(b, want) {
		t.Errorf("%x, want %x", b, want)
	}
}

func TestBuffers(t *testing.T) {
	var p bufferPool
	for _, n := range []int{0, 1, 4096, 4097, 128 << 10, 128<<10 + 1, maxRequest - 1, maxRequest} {
		b := p.get(n)
		if len(b.b) != 0 || cap(b.b) < n+headRoom || cap(b.b) > max(2*n, minBuffer)+headRoom {
			t.Errorf("get(%d): length %d, capacity %d", n, len(b.b), cap(b.b))
		}
		b.b = append(b.b, 1)
		p.put(b)
	}
}
