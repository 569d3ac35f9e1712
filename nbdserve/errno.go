package nbdserve

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

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

// errorLog writes one line for a failed request or a client that was dropped, and
// no more than one a second: a dead registry under a thousand reads is one fact.
type errorLog struct {
	log   *slog.Logger
	level slog.Level

	mu      sync.Mutex // guards what follows
	last    time.Time
	dropped int
}

const errorLogPause = time.Second

func (l *errorLog) say(message string, args ...any) {
	l.mu.Lock()
	now := time.Now()
	if !l.last.IsZero() && now.Sub(l.last) < errorLogPause {
		l.dropped++
		l.mu.Unlock()
		return
	}
	dropped := l.dropped
	l.last, l.dropped = now, 0
	l.mu.Unlock()
	if dropped > 0 {
		args = append(args, "left_out", dropped)
	}
	l.log.Log(context.Background(), l.level, message, args...)
}
