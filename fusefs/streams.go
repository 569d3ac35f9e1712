package fusefs

import (
	"context"
	"sync"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
)

// A streams table finds out who reads a file from front to back, and has what comes
// next decoded meanwhile. There is no file handle to keep that with, since OPEN is
// never asked for.
//
//	file  ──────────────────|█ request █|··· window ···|──────
//	                             stream.next         stream.ahead
//
// It is for mounts on which the kernel reads ahead 128 KiB at most, which is less
// than many pclusters decode to. Where the kernel reads farther ahead than that,
// its requests keep the processors busy, and this would decode some of it twice.
type streams struct {
	im  *erofsfmt.Image
	ctx context.Context // of what runs in the background

	mu    sync.Mutex // guards what follows
	table [streamCount]stream
	last  int // the entry that was taken last
	busy  int // prefetches that run
	ended bool
	wg    sync.WaitGroup // of prefetches
}

type stream struct {
	nid         erofsfmt.Nid
	next, ahead int64 // next 0: no stream
}

const (
	streamCount = 16
	// streamWindow is how much is decoded ahead, and how far a request may be from
	// where it is expected: the kernel has several under way, in any order.
	streamWindow = 1 << 20
	// prefetchers is how many streams are served in the background at once.
	prefetchers = 4
)

// saw notes a read of n bytes at off, and reads ahead if it belongs to a stream.
func (s *streams) saw(ino *erofsfmt.Inode, off, n int64) {
	from, to := s.advance(ino, off, off+n)
	if from == to {
		return
	}
	ahead := *ino // which the caller keeps for itself
	go func() {
		defer s.done()
		// Who reads it in earnest is told what is wrong with it.
		_ = s.im.Prefetch(s.ctx, &ahead, from, to-from)
	}()
}

// advance moves the stream that a read belongs to and returns what is to be
// decoded now. If that is something, done is to be called when it is.
func (s *streams) advance(ino *erofsfmt.Inode, off, end int64) (from, to int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.find(ino.Nid, off)
	if st == nil {
		// The first read of a file is no stream yet.
		s.last = (s.last + 1) % streamCount
		s.table[s.last] = stream{nid: ino.Nid, next: end, ahead: end}
		return 0, 0
	}
	st.next = max(st.next, end)
	from, to = max(st.ahead, st.next), min(st.next+streamWindow, ino.Size)
	switch {
	case from >= to, s.ended, s.busy == prefetchers:
		return 0, 0
	case to-from < streamWindow/2 && to < ino.Size:
		return 0, 0 // not worth it yet
	}
	st.ahead = to
	s.busy++
	s.wg.Add(1)
	return from, to
}

func (s *streams) find(nid erofsfmt.Nid, off int64) *stream {
	for i := range s.table {
		st := &s.table[i]
		if st.nid == nid && st.next > 0 && off-st.next < streamWindow && st.next-off < streamWindow {
			return st
		}
	}
	return nil
}

func (s *streams) done() {
	s.mu.Lock()
	s.busy--
	s.mu.Unlock()
	s.wg.Done()
}

// wait returns when nothing runs in the background any more, and nothing will.
// ctx is to be ended before.
func (s *streams) wait() {
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	s.wg.Wait()
}
