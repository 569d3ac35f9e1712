// Package nbdserve exports a blob as a read-only network block device: a server
// of the NBD protocol, and the kernel's nbd device as its client.
//
// A connection has two phases. The handshake is the fixed newstyle one:
//
//	server   greeting ─► client flags ─► option ─► reply … ─► GO or EXPORT_NAME
//	                                       ├ LIST, INFO              what there is
//	                                       ├ STARTTLS                before all else, if the server has certificates
//	                                       ├ STRUCTURED_REPLY, EXTENDED_HEADERS, SET_META_CONTEXT
//	                                       └ ABORT
//
// In the transmission phase one goroutine reads the requests of a connection, and
// answers by itself what needs no waiting:
//
//	socket ─► reading goroutine ─ refused, or here (ReadResident) ─► batch ──────┐
//	               └─ the rest ─► queue ─► workers ─ ReadAt, may take a minute ──┴─► socket
//
// so that a slow fetch holds up no read of what is here already. Replies go out
// in whatever order their data comes. A reply leaves only when its data is in
// hand, header and data in one write; what cannot be read is an error reply, and
// the connection lives on. The batch is written when the next request would have
// to be waited for, so a client that asks for much at a time costs few system
// calls.
//
// The structures of the protocol are those of go-nbd. Its server is not used: it
// writes the header of a reply, which says success, before it has the data.
//
// On the wire (all big endian; cookie is the client's name for a request):
//
//	request   | magic 4 | flags 2 | command 2 | cookie 8 | offset 8 | length 4 |
//	extended  | magic 4 | flags 2 | command 2 | cookie 8 | offset 8 | length 8 |
//
//	simple      | magic 4 | error 4 | cookie 8 | data
//	structured  | magic 4 | flags 2 | type 2 | cookie 8 | length 4 | payload
//	extended    | magic 4 | flags 2 | type 2 | cookie 8 | offset 8 | length 8 | payload
//
// The export has blocks of 512 bytes: its size is the blob's, rounded up to them,
// and there are zeros past the blob's end only. Requests that are not aligned to
// blocks are answered all the same. Nothing larger than 32 MiB is read at a time.
// BLOCK_STATUS knows base:allocation, where everything is data, and, if the source
// can tell, x-erofs-oci:fetched, where 1 means that a read needs no network.
//
// Clients are not trusted. What they make the server hold is bounded: for each of
// MaxConns connections Workers+1 replies of at most 512 KiB and a queue of
// requests, and for all together 128 MiB of larger replies. A client that takes no
// replies stops its own connection only; if larger replies that nobody takes use
// up those 128 MiB, the connection that holds some for longest is closed. 1024 more
// connections may be in their handshake, each for HandshakeTimeout at most; newer
// ones push out the oldest of these, never one that is served. Who gets through the
// handshake can keep a place for good: who may, is for TLS or the listener to say.
//
// The package does not parse what it exports, cache, retry or read ahead.
package nbdserve
