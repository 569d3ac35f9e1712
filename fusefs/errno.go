package fusefs

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"syscall"

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
	case errors.Is(err, errKilled):
		return fuse.EINTR
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
func (f *fileSystem) fail(ctx context.Context, op string, node uint64, err error, where ...any) fuse.Status {
	if errors.Is(err, context.Canceled) && context.Cause(ctx) == errKilled {
		err = errKilled // of which a source may say no more than that it was told to stop
	}
	st := status(err)
	switch {
	case st == fuse.ENOENT, st == fuse.Status(syscall.ENODATA):
	case st == fuse.EINTR:
		// Nobody is left who could want to know.
	case errors.Is(err, context.Canceled) && f.ctx.Err() != nil:
		// The mount ends; nobody waits for the reason.
	default:
		f.failed.note(syscall.Errno(st))
		logFailure(f.log, op, syscall.Errno(st), err, append([]any{"nid", uint64(f.ids.nid(node))}, where...)...)
	}
	return st
}

// orNone discards lines where nobody gave a log.
func orNone(log *slog.Logger) *slog.Logger {
	if log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return log
}

// logFailure writes the line about a request that failed. How many of them there are is for the log to decide.
func logFailure(log *slog.Logger, op string, errno syscall.Errno, err error, where ...any) {
	args := append([]any{"op", op}, where...)
	log.Error("request failed", append(args, "errno", errno.Error(), "err", err)...)
}
