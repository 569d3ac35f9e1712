package nbdserve

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/pojntfx/go-nbd/pkg/protocol"
)

const (
	// maxOption bounds the data of an option: a few strings of maxString bytes.
	maxOption = 32 << 10
	// maxOptions bounds how much a client may ask before it starts.
	maxOptions = 64
)

// outcome is what follows an option.
type outcome int

const (
	haggle   outcome = iota // another option
	transmit                // the transmission phase
	farewell                // nothing
)

// handshake agrees on an export and a dialect. It answers false where the client
// wanted to know something only.
func (c *session) handshake() (proceed bool, err error) {
	if err := c.raw.SetDeadline(time.Now().Add(c.s.o.HandshakeTimeout)); err != nil {
		return false, err
	}
	flags, err := c.greet()
	if err != nil {
		return false, err
	}
	c.heard = true
	for range maxOptions {
		next, err := c.option(flags)
		switch {
		case errors.Is(err, io.EOF):
			return false, nil
		case err != nil || next == farewell:
			return false, err
		case next == transmit:
			return true, c.raw.SetDeadline(time.Time{})
		}
	}
	return false, fmt.Errorf("more than %d options", maxOptions)
}

// greet exchanges the handshake flags and returns the client's.
func (c *session) greet() (uint32, error) {
	err := c.sendStruct(protocol.NegotiationNewstyleHeader{
		OldstyleMagic:  protocol.NEGOTIATION_MAGIC_OLDSTYLE,
		OptionMagic:    protocol.NEGOTIATION_MAGIC_OPTION,
		HandshakeFlags: protocol.NEGOTIATION_HANDSHAKE_FLAG_FIXED_NEWSTYLE | handshakeNoZeroes,
	})
	if err != nil {
		return 0, err
	}
	var flags uint32
	if err := c.receive(&flags); err != nil {
		return 0, err
	}
	if unknown := flags &^ (clientFixedNewstyle | clientNoZeroes); unknown != 0 {
		return 0, fmt.Errorf("unknown client flags %#x", unknown)
	}
	return flags, nil
}

// receive reads a number or structure. It fails with io.EOF only before the first
// byte.
func (c *session) receive(v any) error { return binary.Read(c.r, be, v) }

func (c *session) sendStruct(v any) error {
	b, err := binary.Append(nil, be, v)
	if err != nil {
		return err
	}
	return c.send(b)
}

// option reads and answers one option.
func (c *session) option(flags uint32) (outcome, error) {
	var h protocol.NegotiationOptionHeader
	if err := c.receive(&h); err != nil {
		return farewell, err
	}
	if h.OptionMagic != protocol.NEGOTIATION_MAGIC_OPTION {
		return farewell, fmt.Errorf("an option begins with %#x, not with %#x", h.OptionMagic, protocol.NEGOTIATION_MAGIC_OPTION)
	}
	if h.Length > maxOption {
		err := c.refuseOption(h.ID, repErrTooBig, fmt.Sprintf("an option has at most %d bytes", maxOption))
		return farewell, errors.Join(fmt.Errorf("option %d of %d bytes", h.ID, h.Length), err)
	}
	data := make([]byte, h.Length)
	if _, err := io.ReadFull(c.r, data); err != nil {
		return farewell, fmt.Errorf("in the data of option %d: %w", h.ID, noEOF(err))
	}
	_, secure := c.conn.(*tls.Conn)
	switch {
	case flags&clientFixedNewstyle == 0 && h.ID != optionExportName:
		return farewell, fmt.Errorf("option %d from a client that does not know the fixed handshake", h.ID)
	case h.ID == protocol.NEGOTIATION_ID_OPTION_ABORT:
		return farewell, c.acknowledge(h.ID)
	case h.ID == optionStartTLS:
		return haggle, c.startTLS(data)
	case c.s.o.TLS != nil && !secure && h.ID == optionExportName:
		return farewell, errors.New("an export was asked for without TLS")
	case c.s.o.TLS != nil && !secure:
		return haggle, c.refuseOption(h.ID, repErrTLSRequired, "this server wants TLS first")
	case h.ID == optionExportName:
		return transmit, c.exportName(string(data), flags)
	case h.ID == protocol.NEGOTIATION_ID_OPTION_INFO:
		_, err := c.info(h.ID, data)
		return haggle, err
	case h.ID == protocol.NEGOTIATION_ID_OPTION_GO:
		return c.info(h.ID, data)
	}
	return haggle, c.agree(h.ID, data)
}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// agree answers the options that neither end the handshake nor begin TLS.
func (c *session) agree(id uint32, data []byte) error {
	switch id {
	case optionListMetaContext, optionSetMetaContext:
		return c.metaContext(id, data)
	case protocol.NEGOTIATION_ID_OPTION_LIST, optionStructuredReply, optionExtendedHeaders:
		if len(data) > 0 {
			return c.refuseOption(id, repErrInvalid, "this option has no data")
		}
	default:
		return c.refuseOption(id, protocol.NEGOTIATION_TYPE_REPLY_ERR_UNSUPPORTED, "")
	}
	switch {
	case id == protocol.NEGOTIATION_ID_OPTION_LIST:
		return c.list()
	case id == optionExtendedHeaders:
		c.dialect = extended
	case c.dialect == extended:
		return c.refuseOption(id, repErrExtHeaderReqd, "extended headers were agreed on")
	default:
		c.dialect = structured
	}
	return c.acknowledge(id)
}

// reply sends one reply to an option.
func (c *session) reply(option, kind uint32, payload []byte) error {
	b, err := binary.Append(nil, be, protocol.NegotiationReplyHeader{
		ReplyMagic: protocol.NEGOTIATION_MAGIC_REPLY,
		ID:         option,
		Type:       kind,
		Length:     uint32(len(payload)),
	})
	if err != nil {
		return err
	}
	return c.send(append(b, payload...))
}

func (c *session) acknowledge(option uint32) error {
	return c.reply(option, protocol.NEGOTIATION_TYPE_REPLY_ACK, nil)
}

func (c *session) refuseOption(option, kind uint32, why string) error {
	return c.reply(option, kind, []byte(why))
}

// startTLS puts TLS under the rest of the connection. Nothing was agreed on before,
// when anybody may have said it: all else was refused.
func (c *session) startTLS(data []byte) error {
	_, secure := c.conn.(*tls.Conn)
	switch {
	case c.s.o.TLS == nil:
		return c.refuseOption(optionStartTLS, repErrPolicy, "this server has no certificate")
	case secure:
		return c.refuseOption(optionStartTLS, repErrInvalid, "TLS has been started")
	case len(data) > 0:
		return c.refuseOption(optionStartTLS, repErrInvalid, "this option has no data")
	case c.r.Buffered() > 0:
		return errors.New("something follows the request for TLS that is not under TLS")
	}
	if err := c.acknowledge(optionStartTLS); err != nil {
		return err
	}
	conn := tls.Server(c.raw, c.s.o.TLS)
	if err := conn.HandshakeContext(c.ctx); err != nil {
		return fmt.Errorf("TLS: %w", noEOF(err))
	}
	c.conn = conn
	c.r.Reset(conn)
	return nil
}

// isExport says whether a client means our export by name.
func (c *session) isExport(name string) bool { return name == "" || name == c.s.export.Name }

// exportFlags are the transmission flags.
func (c *session) exportFlags() uint16 {
	flags := protocol.NEGOTIATION_REPLY_FLAGS_HAS_FLAGS | protocol.NEGOTIATION_REPLY_FLAGS_CAN_MULTI_CONN |
		exportReadOnly | exportSendFlush | exportSendCache
	if c.dialect != simple {
		flags |= exportSendDF
	}
	return flags
}

// exportName is the old way into the transmission phase. It knows no errors.
func (c *session) exportName(name string, flags uint32) error {
	if !c.isExport(name) {
		return fmt.Errorf("unknown export %.80q", name)
	}
	if c.dialect == extended {
		return errors.New("extended headers go with option GO only")
	}
	var b []byte
	b = be.AppendUint64(b, uint64(c.s.size))
	b = be.AppendUint16(b, c.exportFlags())
	if flags&clientNoZeroes == 0 {
		b = append(b, make([]byte, 124)...)
	}
	if !c.s.settle(c) {
		return errCrowded
	}
	return c.send(b)
}
