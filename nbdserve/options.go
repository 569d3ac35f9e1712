package nbdserve

import (
	"encoding/binary"
	"errors"
	"slices"
	"strings"

	"github.com/pojntfx/go-nbd/pkg/protocol"
)

var errShortOption = errors.New("the lengths inside the option do not agree with its length")

// fields takes the data of an option apart. After it ran out, everything is zero.
type fields struct {
	b   []byte
	err error
}

func (f *fields) take(n uint64) []byte {
	if n > uint64(len(f.b)) {
		f.b, f.err = nil, errShortOption
		return nil
	}
	head := f.b[:n]
	f.b = f.b[n:]
	return head
}

func (f *fields) uint16() uint16 {
	if b := f.take(2); b != nil {
		return be.Uint16(b)
	}
	return 0
}

func (f *fields) uint32() uint32 {
	if b := f.take(4); b != nil {
		return be.Uint32(b)
	}
	return 0
}

func (f *fields) string() string { return string(f.take(uint64(f.uint32()))) }

// end says whether the data was what it should have been.
func (f *fields) end() error {
	if f.err == nil && len(f.b) > 0 {
		return errShortOption
	}
	return f.err
}

// list tells the one export that there is.
func (c *session) list() error {
	e := c.s.export
	var b []byte
	b = be.AppendUint32(b, uint32(len(e.Name)))
	b = append(b, e.Name...)
	b = append(b, e.Description...)
	if err := c.reply(protocol.NEGOTIATION_ID_OPTION_LIST, protocol.NEGOTIATION_TYPE_REPLY_SERVER, b); err != nil {
		return err
	}
	return c.acknowledge(protocol.NEGOTIATION_ID_OPTION_LIST)
}

// info answers INFO and GO, which differ in what follows.
func (c *session) info(id uint32, data []byte) (outcome, error) {
	f := fields{b: data}
	name := f.string()
	wanted := make([]uint16, 0, 4)
	for range f.uint16() {
		if f.err != nil {
			break
		}
		wanted = append(wanted, f.uint16())
	}
	if err := f.end(); err != nil {
		return haggle, c.refuseOption(id, repErrInvalid, err.Error())
	}
	if !c.isExport(name) {
		return haggle, c.refuseOption(id, protocol.NEGOTIATION_TYPE_REPLY_ERR_UNKNOWN, "there is no export of this name")
	}
	if id == protocol.NEGOTIATION_ID_OPTION_GO && !c.s.settle(c) {
		return haggle, c.refuseOption(id, repErrPolicy, errCrowded.Error())
	}
	for _, reply := range c.infos(wanted) {
		b, err := binary.Append(nil, be, reply.head)
		if err != nil {
			return haggle, err
		}
		if err := c.reply(id, protocol.NEGOTIATION_TYPE_REPLY_INFO, append(b, reply.text...)); err != nil {
			return haggle, err
		}
	}
	return transmit, c.acknowledge(id)
}

// A reply to an information request is a structure of package protocol, and a text
// after it.
type infoReply struct {
	head any
	text string
}

// infos are the replies to information requests, each asked for once or more.
func (c *session) infos(wanted []uint16) []infoReply {
	all := []infoReply{{head: protocol.NegotiationReplyInfo{
		Type:              protocol.NEGOTIATION_TYPE_INFO_EXPORT,
		Size:              uint64(c.s.size),
		TransmissionFlags: c.exportFlags(),
	}}}
	if slices.Contains(wanted, protocol.NEGOTIATION_TYPE_INFO_NAME) {
		all = append(all, infoReply{protocol.NegotiationReplyNameHeader{Type: protocol.NEGOTIATION_TYPE_INFO_NAME}, c.s.export.Name})
	}
	if slices.Contains(wanted, protocol.NEGOTIATION_TYPE_INFO_DESCRIPTION) {
		all = append(all, infoReply{protocol.NegotiationReplyDescriptionHeader{Type: protocol.NEGOTIATION_TYPE_INFO_DESCRIPTION},
			c.s.export.Description})
	}
	if slices.Contains(wanted, protocol.NEGOTIATION_TYPE_INFO_BLOCKSIZE) {
		all = append(all, infoReply{head: protocol.NegotiationReplyBlockSize{
			Type:               protocol.NEGOTIATION_TYPE_INFO_BLOCKSIZE,
			MinimumBlockSize:   blockSize,
			PreferredBlockSize: preferredBlockSize,
			MaximumBlockSize:   maxRequest,
		}})
	}
	return all
}

// A metaContext is something that BLOCK_STATUS can tell.
type metaContext struct {
	id   uint32
	name string
}

const (
	contextAllocation = uint32(1)
	contextFetched    = uint32(2)
)

// metaContexts are those of the export. Ours has a name of the experimental kind,
// since the namespaces are given out.
func (s *Server) metaContexts() []metaContext {
	all := []metaContext{{contextAllocation, "base:allocation"}}
	if s.present != nil {
		all = append(all, metaContext{contextFetched, "x-erofs-oci:fetched"})
	}
	return all
}

// metaContext answers LIST_META_CONTEXT and SET_META_CONTEXT. The latter forgets
// what was set before, also where it fails.
func (c *session) metaContext(id uint32, data []byte) error {
	if id == optionSetMetaContext {
		c.contexts = nil
	}
	if c.dialect == simple {
		return c.refuseOption(id, repErrInvalid, "structured replies come first")
	}
	f := fields{b: data}
	name := f.string()
	var queries []string
	for range f.uint32() {
		if f.err != nil {
			break
		}
		queries = append(queries, f.string())
	}
	if err := f.end(); err != nil {
		return c.refuseOption(id, repErrInvalid, err.Error())
	}
	if !c.isExport(name) {
		return c.refuseOption(id, protocol.NEGOTIATION_TYPE_REPLY_ERR_UNKNOWN, "there is no export of this name")
	}
	var found []metaContext
	for _, m := range c.s.metaContexts() {
		if m.isMeant(queries, id == optionListMetaContext) {
			found = append(found, m)
		}
	}
	for _, m := range found {
		if err := c.reply(id, repMetaContext, append(be.AppendUint32(nil, m.id), m.name...)); err != nil {
			return err
		}
	}
	if id == optionSetMetaContext {
		c.contexts = found
	}
	return c.acknowledge(id)
}

// isMeant says whether queries ask for m. In a list, no query asks for all, and a
// namespace for all of its own.
func (m metaContext) isMeant(queries []string, list bool) bool {
	namespace, _, _ := strings.Cut(m.name, ":")
	return slices.Contains(queries, m.name) || list && (len(queries) == 0 || slices.Contains(queries, namespace+":"))
}
