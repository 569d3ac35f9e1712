package nbdserve

import (
	"errors"

	"github.com/pojntfx/go-nbd/pkg/protocol"
)

// What a client may do wrong in a request. The texts go to clients as they are.
var (
	errReadOnly    = errors.New("the export is read-only")
	errOutside     = errors.New("the range is not inside the export")
	errTooLong     = errors.New("a read is of 1 byte to 32 MiB")
	errNoLength    = errors.New("the range is empty")
	errCommand     = errors.New("no such command")
	errFlags       = errors.New("a flag is unknown or was not negotiated")
	errNoContext   = errors.New("no metadata context was negotiated")
	errPayload     = errors.New("this command takes no payload")
	errCannotServe = errors.New("the data cannot be had; the server's log says why")
)

// replyError is the one place where an error becomes a number of the protocol. It
// also gives the words for the client, who is not told what a source says.
func replyError(err error) (code uint32, text error) {
	switch err {
	case errReadOnly:
		return protocol.TRANSMISSION_ERROR_EPERM, err
	case errOutside, errTooLong, errNoLength, errCommand, errFlags, errNoContext, errPayload:
		return protocol.TRANSMISSION_ERROR_EINVAL, err
	}
	return errorEIO, errCannotServe
}
