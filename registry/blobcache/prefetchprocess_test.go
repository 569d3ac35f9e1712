package blobcache

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// A process is killed in the midst of its prefetch: what it had locked and not brought is brought by the next one, also
// by one that was waiting for it.
func TestKilledPrefetch(t *testing.T) {
	const size = 900*cs + 100
	for round := range 5 {
		s := newServer(size)
		dir := t.TempDir()
		e := errand{Dir: dir, URL: serve(t, s), Size: size, Prefetch: true, Options: errandOptions{ChunkSize: cs, MaxSpan: 64 * cs, Readahead: -1}}
		stuck := make(chan struct{}, 1)
		gate := make(chan struct{})
		at := int64(100*round)*cs + 10
		s.gates = map[int64]chan struct{}{at: gate}
		s.answer = func(_ int, a *answer) {
			if a.start <= at && at < a.end {
				select {
				case stuck <- struct{}{}:
				default:
				}
			}
		}
		c := spawn(t, e)
		c.start(t)
		<-stuck // the flight that brings this chunk stands still, for ever
		b := openBlob(t, openCacheAt(t, dir, e.Options.options()), s)
		p := prefetching(ctx, b, 0, size)
		for b.Stats().ChunksPresent < 100 { // something beside what the other holds has come
			time.Sleep(time.Millisecond)
		}
		if err, ended := p.ended(); ended {
			t.Errorf("ended (%v) without what the other process fetches", err)
		}
		c.kill()
		close(gate)
		if err := <-p.done; err != nil {
			t.Error(err)
		}
		if got := onDisk(t, b); len(got) != 901 {
			t.Errorf("%d chunks are on disk, want all", len(got))
		}
		if err := errors.Join(readNow(ctx, b, s, 0, size), b.Close()); err != nil {
			t.Error(err)
		}
		checkSound(t, dir)
	}
}

// A file system that is full ends Prefetch, and no read.
func TestPrefetchOnFullTmpfs(t *testing.T) {
	const size = 24 << 20
	top := tmpfs(t, size)
	c := openCacheAt(t, filepath.Join(top, "cache"), Options{MaxBytes: -1, MinFree: -1})
	p := &pattern{size: 3 * size}
	b, err := c.Open(testDigest, p.size, p, OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range uint64(3) {
		wg.Go(func() {
			if err := readPattern(b, rand.New(rand.NewPCG(i, 5))); err != nil {
				t.Error(err)
			}
		})
	}
	if err := b.Prefetch(ctx, 0, p.size); !errors.Is(err, ErrNoRoom) {
		t.Errorf("error %v, want no room", err)
	}
	wg.Wait()
	before := p.fetched.Load()
	if err := b.Prefetch(ctx, 0, p.size); !errors.Is(err, ErrNoRoom) {
		t.Errorf("error %v, want no room", err)
	}
	if more := p.fetched.Load() - before; more > 4*prefetchPiece {
		t.Errorf("%d bytes were fetched in vain", more)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
}

// Everything at once: prefetches, readers forward and at random, faults, blobs opened and closed.
func TestPrefetchUnderLoad(t *testing.T) {
	for _, faults := range []bool{false, true} {
		const size = 600*cs + 5
		s := newServer(size)
		if faults {
			s.answer = func(call int, a *answer) {
				switch call % 7 {
				case 3:
					a.err = errServer
				case 5:
					a.end -= (a.end - a.start) / 2
				}
			}
		}
		c := openCache(t, Options{ChunkSize: cs, Readahead: ahead, MaxSpan: 16 * cs, MaxFetches: 3})
		var wg sync.WaitGroup
		for i := range int64(12) {
			wg.Go(func() {
				b, err := c.Open(testDigest, size, s, OpenOptions{})
				if err != nil {
					t.Error(err)
					return
				}
				done := make(chan error, 1)
				go func() { done <- b.Prefetch(ctx, i*50*cs, 50*cs) }()
				err = errors.Join(readSome(b, s, uint64(i)), <-done, b.Close())
				if err != nil && !faults {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if !faults {
			s.checkOnce(t)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}

// readSome reads at random. Only errors that are not the server's are wrong bytes, or worse.
func readSome(b *Blob, s *server, seed uint64) error {
	rng := rand.New(rand.NewPCG(7, seed))
	var errs []error
	for range 60 {
		off := rng.Int64N(b.Size() - 2*cs)
		if err := readNow(ctx, b, s, off, cs); err != nil {
			errs = append(errs, fmt.Errorf("at %d: %w", off, err))
		}
	}
	return errors.Join(errs...)
}
