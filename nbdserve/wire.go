package nbdserve

import (
	"encoding/binary"
	"fmt"

	"github.com/pojntfx/go-nbd/pkg/protocol"
)

// The wire structures and the numbers that package protocol has are used from
// there; these are the ones that it lacks.
const (
	handshakeNoZeroes = uint16(1 << 1)

	clientFixedNewstyle = uint32(1 << 0)
	clientNoZeroes      = uint32(1 << 1)

	optionExportName      = uint32(1)
	optionStartTLS        = uint32(5)
	optionStructuredReply = uint32(8)
	optionListMetaContext = uint32(9)
	optionSetMetaContext  = uint32(10)
	optionExtendedHeaders = uint32(11)

	repMetaContext       = uint32(4)
	repErrPolicy         = uint32(2 | 1<<31)
	repErrInvalid        = uint32(3 | 1<<31)
	repErrTLSRequired    = uint32(5 | 1<<31)
	repErrTooBig         = uint32(9 | 1<<31)
	repErrExtHeaderReqd  = uint32(10 | 1<<31)
	exportReadOnly       = uint16(1 << 1)
	exportSendFlush      = uint16(1 << 2)
	exportSendDF         = uint16(1 << 7)
	exportSendCache      = uint16(1 << 10)
	magicExtendedRequest = uint32(0x21e41c71)
	magicStructuredReply = uint32(0x668e33ef)
	magicExtendedReply   = uint32(0x6e8a278c)

	commandFlush       = uint16(3)
	commandTrim        = uint16(4)
	commandCache       = uint16(5)
	commandWriteZeroes = uint16(6)
	commandBlockStatus = uint16(7)

	flagDF         = uint16(1 << 2)
	flagReqOne     = uint16(1 << 3)
	flagPayloadLen = uint16(1 << 5)

	replyDone           = uint16(1 << 0)
	chunkNone           = uint16(0)
	chunkOffsetData     = uint16(1)
	chunkBlockStatus    = uint16(5)
	chunkBlockStatusExt = uint16(6)
	chunkError          = uint16(1 | 1<<15)

	errorEIO = uint32(5)
)

const (
	// maxString bounds every string of the protocol.
	maxString = 4096
	// blockSize is the unit of the export's size. Smaller reads are served, too.
	blockSize = 512
	// preferredBlockSize is what clients that choose a block size should choose: the kernel's page.
	preferredBlockSize = 4096
	// maxRequest is the largest read, and the largest payload that is read over: what clients that ask for no
	// limits may take for granted.
	maxRequest = 32 << 20
)

var be = binary.BigEndian

// A dialect is the form of requests and replies that client and server agreed on.
type dialect int

const (
	simple dialect = iota
	structured
	extended
)

// A request of either form.
type request struct {
	flags, command         uint16
	cookie, offset, length uint64
}

const (
	compactRequestSize  = 28
	extendedRequestSize = 32
)

func (d dialect) requestSize() int {
	if d == extended {
		return extendedRequestSize
	}
	return compactRequestSize
}

// parse decodes a request of requestSize bytes.
func (d dialect) parse(b []byte) (request, error) {
	if d == extended {
		if magic := be.Uint32(b); magic != magicExtendedRequest {
			return request{}, fmt.Errorf("a request begins with %#x, not with %#x", magic, magicExtendedRequest)
		}
		return request{be.Uint16(b[4:]), be.Uint16(b[6:]), be.Uint64(b[8:]), be.Uint64(b[16:]), be.Uint64(b[24:])}, nil
	}
	h := protocol.TransmissionRequestHeader{
		RequestMagic: be.Uint32(b),
		CommandFlags: be.Uint16(b[4:]),
		Type:         be.Uint16(b[6:]),
		Handle:       be.Uint64(b[8:]),
		Offset:       be.Uint64(b[16:]),
		Length:       be.Uint32(b[24:]),
	}
	if h.RequestMagic != protocol.TRANSMISSION_MAGIC_REQUEST {
		return request{}, fmt.Errorf("a request begins with %#x, not with %#x", h.RequestMagic, protocol.TRANSMISSION_MAGIC_REQUEST)
	}
	return request{h.CommandFlags, h.Type, h.Handle, h.Offset, uint64(h.Length)}, nil
}

// payload is how many bytes follow the request. A WRITE has them also where it
// should have said so by the flag and did not, as other servers hold it.
func (d dialect) payload(q request) uint64 {
	if q.command == protocol.TRANSMISSION_TYPE_REQUEST_WRITE || d == extended && q.flags&flagPayloadLen != 0 {
		return q.length
	}
	return 0
}

// A chunk of a reply that is not simple has 20 bytes before its payload, 32 where
// headers are extended, and its data an offset before it.
func (d dialect) headSize() int { return [...]int{16, 20, 32}[d] }

func (d dialect) dataHeadSize() int { return [...]int{16, 20 + 8, 32 + 8}[d] }

// putHead writes the head of a reply or chunk of n bytes of payload to b.
func (d dialect) putHead(b []byte, q request, flags, kind uint16, n int) {
	if d == extended {
		be.PutUint32(b, magicExtendedReply)
		be.PutUint64(b[16:], q.offset)
		be.PutUint64(b[24:], uint64(n))
	} else {
		be.PutUint32(b, magicStructuredReply)
		be.PutUint32(b[16:], uint32(n))
	}
	be.PutUint16(b[4:], flags)
	be.PutUint16(b[6:], kind)
	be.PutUint64(b[8:], q.cookie)
}

func putSimple(b []byte, h protocol.TransmissionReplyHeader) {
	be.PutUint32(b, h.ReplyMagic)
	be.PutUint32(b[4:], h.Error)
	be.PutUint64(b[8:], h.Handle)
}

// putDataHead writes what comes before the data of a read to the dataHeadSize
// bytes of b.
func (d dialect) putDataHead(b []byte, q request) {
	if d == simple {
		putSimple(b, protocol.TransmissionReplyHeader{ReplyMagic: protocol.TRANSMISSION_MAGIC_REPLY, Handle: q.cookie})
		return
	}
	d.putHead(b, q, replyDone, chunkOffsetData, 8+int(q.length))
	be.PutUint64(b[d.headSize():], q.offset)
}

// maxPlainReply is the most that putDone and putError write.
const maxPlainReply = 32 + 6 + maxErrorText

// maxErrorText is the most that an error reply says in words.
const maxErrorText = 128

// putDone writes a reply of success without data to b and returns its length.
func (d dialect) putDone(b []byte, q request) int {
	if d == simple {
		d.putDataHead(b, q)
	} else {
		d.putHead(b, q, replyDone, chunkNone, 0)
	}
	return d.headSize()
}

// putError writes an error reply to b and returns its length. Simple replies have
// no room for words.
func (d dialect) putError(b []byte, q request, code uint32, text string) int {
	if d == simple {
		putSimple(b, protocol.TransmissionReplyHeader{ReplyMagic: protocol.TRANSMISSION_MAGIC_REPLY, Error: code, Handle: q.cookie})
		return d.headSize()
	}
	text = text[:min(len(text), maxErrorText)]
	head := d.headSize()
	d.putHead(b, q, replyDone, chunkError, 6+len(text))
	be.PutUint32(b[head:], code)
	be.PutUint16(b[head+4:], uint16(len(text)))
	return head + 6 + copy(b[head+6:], text)
}
