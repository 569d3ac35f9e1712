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
func (f *fileSystem) fail(op string, node uint64, err error, where ...any) fuse.Status {
	st := status(err)
	switch {
	case st == fuse.ENOENT, st == fuse.Status(syscall.ENODATA):
	case errors.Is(err, context.Canceled) && f.ctx.Err() != nil:
		// The mount ends; nobody waits for the reason.
	default:
		f.failed.note(syscall.Errno(st))
		f.errs.say(op, syscall.Errno(st), err, append([]any{"nid", uint64(f.ids.nid(node))}, where...)...)
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

func (l *errorLog) say(op string, errno syscall.Errno, err error, where ...any) {
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
	args := append([]any{"op", op}, where...)
	if args = append(args, "errno", errno.Error(), "err", err); dropped > 0 {
		args = append(args, "left_out", dropped)
	}
	l.log.Error("request failed", args...)
}
