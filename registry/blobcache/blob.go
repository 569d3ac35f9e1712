package blobcache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// errAbandoned is what a pending chunk fails with when the blob that brought it is closed, or when it was fetched ahead
// in vain: a reader that waits for it fetches it itself.
var errAbandoned = errors.New("its fetch was given up")

// A Blob reads one blob through the cache. Its methods may be called in parallel.
type Blob struct {
	store       *store
	fetcher     Fetcher
	vouched     bool // see OpenOptions, as are the next three
	noReadahead bool
	beneath     bool
	keep        bool
	verify      func(ctx context.Context, p []byte, off int64) error // may be nil
	onComplete  func() bool                                          // nil while it is called and after; guarded by store.mu, as are the next two
	completed   bool                                                 // it was called
	rest        time.Time                                            // until when it is not called again

	ctx     context.Context // its flights' context
	cancel  context.CancelFunc
	flights sync.WaitGroup
	closed  atomic.Bool // set under store.mu, so that no flight begins after Close looked
	closing sync.Once
	err     error // of the first Close; guarded by closing
}

// slots are those that its flights take.
func (b *Blob) slots() slots {
	c := b.store.cache
	if b.beneath {
		return c.beneath
	}
	return slots{c.fetches, c.loads}
}

// Size is the blob's size in bytes.
func (b *Blob) Size() int64 { return b.store.size }

// Stats of all blobs of this digest together.
func (b *Blob) Stats() Stats { return b.store.stats() }

// ReadAt fills all of p from off, or returns a non-nil error. It fetches what is absent and waits for it, until ctx
// ends; what ctx cut short is fetched to its end for the next reader.
func (b *Blob) ReadAt(ctx context.Context, p []byte, off int64) error {
	s := b.store
	if b.closed.Load() {
		return b.closedError()
	}
	if err := s.check(off, len(p)); err != nil {
		return err
	}
	if b.readResident(p, off) {
		return nil
	}
	if err := b.readWaiting(ctx, p, off); err != nil {
		return fmt.Errorf("read %d bytes at %d: %w", len(p), off, err) // err says of what
	}
	s.counters.bytesServed.Add(int64(len(p)))
	return nil
}

// readWaiting is for what is not present: the background is for others meanwhile.
func (b *Blob) readWaiting(ctx context.Context, p []byte, off int64) error {
	s := b.store
	s.counters.misses.Add(1)
	if b.beneath {
		return b.readMissing(ctx, p, off) // who waits for what is verified by it was counted, or is of the background
	}
	s.cache.background.enter()
	defer s.cache.background.leave()
	if observe := s.cache.options.ObserveWait; observe != nil {
		began := time.Now()
		defer func() { observe(time.Since(began)) }()
	}
	return b.readMissing(ctx, p, off)
}

// ReadResident fills p and answers true if all of it is present; otherwise it answers false at once, having fetched
// nothing. It never waits for the network.
func (b *Blob) ReadResident(p []byte, off int64) bool {
	if b.closed.Load() || b.store.check(off, len(p)) != nil {
		return false
	}
	return b.readResident(p, off)
}

// readResident fills p if all of it is present, and sees to it that what was fetched ahead goes on.
func (b *Blob) readResident(p []byte, off int64) bool {
	s := b.store
	resident := s.readResident(p, off)
	if resident && len(p) > 0 {
		if first, end := s.span(off, len(p)); s.fresh.any(first, end) {
			b.touch(first, end)
		}
	}
	return resident
}

// Present says whether the chunk of off is on disk, and where the run of chunks of which that is true ends. off lies in
// the blob.
func (b *Blob) Present(off int64) (present bool, end int64) {
	s := b.store
	return s.run(s.known, off)
}

// Close ends the flights that this blob began and waits for them. Reads that wait end with os.ErrClosed.
func (b *Blob) Close() error {
	b.closing.Do(func() {
		b.store.mu.Lock()
		b.closed.Store(true)
		delete(b.store.blobs, b)
		b.store.mu.Unlock()
		b.cancel()
		b.flights.Wait()
		if b.beneath {
			b.Touch()
		}
		b.err = b.store.cache.forget(b)
	})
	return b.err
}

func (b *Blob) closedError() error {
	return fmt.Errorf("blob %s: %w", b.store.digest, os.ErrClosed)
}

// maxRefetches is how often a read has a chunk fetched again that was not verified, and might be. Who verifies knows how
// often that makes sense, and says Temporary no longer; this is for one who never stops, and more than a blob has places.
const maxRefetches = 100

// readMissing reads a range of which something was absent. It begins anew at a chunk whose fetch was given up.
func (b *Blob) readMissing(ctx context.Context, p []byte, off int64) error {
	for refetches := 0; len(p) > 0; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := b.readWanted(ctx, p, off)
		if n > 0 {
			refetches = 0
		}
		var refused *refusedError
		switch {
		case err == nil || errors.Is(err, errAbandoned):
		case errors.As(err, &refused) && refused.temporary() && refetches < maxRefetches:
			refetches++
		default:
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// A refusedError is why a chunk was not published.
type refusedError struct {
	off int64
	err error
}

func (e *refusedError) Error() string { return fmt.Sprintf("chunk at %d: %v", e.off, e.err) }

func (e *refusedError) Unwrap() error { return e.err }

func (e *refusedError) temporary() bool {
	j := judgement(e.err)
	return j != nil && j.Temporary()
}

type ruling interface{ Temporary() bool }

// judgement finds what the hook said of the bytes; nil where it did not come to judge them. Errors of networks have a
// method Temporary, too, but never without Timeout: see net.Error.
func judgement(err error) ruling {
	var j ruling
	if !errors.As(err, &j) {
		return nil
	}
	if _, network := j.(interface{ Timeout() bool }); network {
		return nil
	}
	return j
}

// readWanted has all chunks of p brought, copies them in order as they come, and says how far it came.
func (b *Blob) readWanted(ctx context.Context, p []byte, off int64) (n int, err error) {
	s := b.store
	first, end := s.span(off, len(p))
	doubts := s.doubts.Load()
	wanted, behind, err := b.want(first, end, waitingSince(ctx))
	if err != nil {
		return 0, err
	}
	if behind && !b.beneath { // else it was not counted
		defer s.cache.background.serve()()
	}
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.unpin(first, end)
		for _, pend := range wanted { // what is left, if the reader leaves
			if pend != nil {
				pend.wanted--
			}
		}
	}()
	s.cache.tick()
	s.use(first, end)
	for i, pend := range wanted {
		chunk := first + int64(i)
		at := off + int64(n)
		part := p[n:min(int64(len(p)), (chunk+1)*s.chunkSize-off)]
		var data []byte
		if pend != nil {
			if data, err = b.await(ctx, pend); err != nil {
				return n, err
			}
		}
		if data != nil {
			copy(part, data[at-chunk*s.chunkSize:])
		} else if err := s.pread(part, at); err != nil {
			if pend != nil {
				return n, err // it was written just now: it would not be better the next time
			}
			s.spoil(chunk, chunk+1, err)
			return n, errAbandoned
		}
		if data == nil && s.doubts.Load() != doubts {
			return n, errAbandoned // it may be what the disk has in place of a page that it did not keep
		}
		n += len(part)
		wanted[i] = nil // with its data, if the disk could not keep it
	}
	return n, nil
}

// await waits for one chunk. It gives the chunk's bytes where the file does not have them.
func (b *Blob) await(ctx context.Context, pend *pending) ([]byte, error) {
	select {
	case <-pend.done:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-b.ctx.Done():
	}
	if b.ctx.Err() != nil {
		return nil, b.closedError()
	}
	return pend.data, pend.err
}
