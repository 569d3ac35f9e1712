package blobcache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Locks between processes are open file description locks (fcntl(2), F_OFD_SETLK) on ranges of the files, far behind
// their ends. They belong to the open file, so two caches in one process exclude each other, too, and the kernel drops
// them with the process that held them. Nobody waits for one in the kernel, where a wait has no end that we could set.
const (
	lockOpen   = 1 << 60   // of a blob's file: shared by who has it open
	lockDoubt  = 1<<60 + 1 // shared by who believes nothing of it, see store.doubt
	lockRegion = 1 << 61   // + region: shared by who may read its chunks, exclusive for who punches holes
	lockChunk  = 1 << 62   // + chunk: exclusive for who fetches it

	lockDir     = 1 << 60 // of the directory's file: for the numbers in it, and for who opens or removes blobs
	lockProcess = 1 << 61 // + anything: held by each process for as long as it has the cache open
	lockWaiting = 1 << 62 // shared by the processes whose readers wait for the network
)

var errLocked = errors.New("is locked by another process")

// lock sets one lock, or removes it (unix.F_UNLCK), and never waits.
func lock(f *os.File, kind int16, off int64) error {
	l := unix.Flock_t{Type: kind, Start: off, Len: 1}
	err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES):
		return errLocked
	}
	return fmt.Errorf("lock %s: %w; choose a cache directory on a local file system", f.Name(), err)
}

// lockWithin tries for a while.
func lockWithin(ctx context.Context, f *os.File, kind int16, off int64, limit time.Duration) error {
	for begin := time.Now(); ; {
		err := lock(f, kind, off)
		if !errors.Is(err, errLocked) || time.Since(begin) > limit {
			return err
		}
		if err := pause(ctx, time.Millisecond); err != nil {
			return err
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// mostOthers bounds what looking for the locks of others costs, which is done under the directory's lock.
const mostOthers = 1024

// othersHold counts the bytes, or runs of them, in [off, off+n) that others hold locks of, and ends at mostOthers. The
// kernel tells of any one lock in a range, in the order in which the holders came and not by place: so on both sides of
// it there may be more.
func othersHold(f *os.File, off, n int64) (count int64, err error) {
	type span struct{ off, end int64 }
	for left := []span{{off, off + n}}; len(left) > 0 && count < mostOthers; {
		s := left[len(left)-1]
		left = left[:len(left)-1]
		l := unix.Flock_t{Type: unix.F_WRLCK, Start: s.off, Len: s.end - s.off}
		if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l); err != nil {
			return count, fmt.Errorf("look for locks of %s: %w", f.Name(), err)
		}
		if l.Type == unix.F_UNLCK {
			continue
		}
		count++
		if l.Start > s.off {
			left = append(left, span{s.off, l.Start})
		}
		if l.Len > 0 && l.Start < s.end-l.Len { // else it goes to the end
			left = append(left, span{l.Start + l.Len, s.end})
		}
	}
	return count, nil
}
