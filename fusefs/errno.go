package fusefs

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
)

// status is the one place where an error becomes an errno.
func status(err error) fuse.Status {
	switch {
	case err == nil:
		return fuse.OK
	case errors.Is(err, erofsfmt.ErrCorrupt):
		return fuse.Status(syscall.EUCLEAN)
	case errors.Is(err, erofsfmt.ErrUnsupported):
		return fuse.Status(syscall.EOPNOTSUPP)
	case errors.Is(err, erofsfmt.ErrNoXattr):
		return fuse.Status(syscall.ENODATA)
	case isNotExist(err):
		return fuse.ENOENT
	case errors.Is(err, fs.ErrInvalid):
		return fuse.EINVAL // a position that no directory entry has
	}
	return fuse.EIO
}

func isNotExist(err error) bool { return errors.Is(err, fs.ErrNotExist) }

func isFormatError(err error) bool {
	return errors.Is(err, erofsfmt.ErrCorrupt) || errors.Is(err, erofsfmt.ErrUnsupported)
}

// fail turns err into a status and logs what an errno cannot say.
func (f *fileSystem) fail(op string, node uint64, err error) fuse.Status {
	st := status(err)
	switch {
	case st == fuse.ENOENT, st == fuse.Status(syscall.ENODATA):
	case errors.Is(err, context.Canceled) && f.ctx.Err() != nil:
		// The mount ends; nobody waits for the reason.
	default:
		f.errs.say(op, slog.Uint64("nid", uint64(f.ids.nid(node))), syscall.Errno(st), err)
	}
	return st
}

// errorLog writes one line for a failed request, and no more than one a second:
// a dead registry under a thousand readers is one fact, not a thousand.
type errorLog struct {
	log *slog.Logger

	mu      sync.Mutex // guards what follows
	last    time.Time
	dropped int
}

const errorLogPause = time.Second

func newErrorLog(log *slog.Logger) *errorLog {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &errorLog{log: log}
}

func (l *errorLog) say(op string, where slog.Attr, errno syscall.Errno, err error) {
	l.mu.Lock()
	now := time.Now()
	if now.Sub(l.last) < errorLogPause {
		l.dropped++
		l.mu.Unlock()
		return
	}
	dropped := l.dropped
	l.last, l.dropped = now, 0
	l.mu.Unlock()
	l.log.Error("request failed", "op", op, where, "errno", errno.Error(), "err", err, "more_before", dropped)
}
