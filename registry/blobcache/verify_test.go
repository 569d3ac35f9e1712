package blobcache

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

// A judge is a Verify hook that compares with the truth, and counts.
type judge struct {
	truth     []byte
	temporary bool // what it says of its errors

	mu    sync.Mutex // guards asked
	asked []int64    // chunks, in the order of the calls
}

type verdict struct{ temporary bool }

func (verdict) Error() string     { return "these are not the bytes" }
func (v verdict) Temporary() bool { return v.temporary }

func (j *judge) verify(_ context.Context, p []byte, off int64) error {
	j.mu.Lock()
	j.asked = append(j.asked, off/cs)
	j.mu.Unlock()
	if string(p) != string(j.truth[off:off+int64(len(p))]) {
		return verdict{j.temporary}
	}
	return nil
}

func (j *judge) sorted() []int64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.Sorted(slices.Values(j.asked))
}

func TestVerifyOnceEach(t *testing.T) {
	s := newServer(20*cs + 3)
	j := &judge{truth: s.content}
	b := openWith(t, openCache(t, Options{Readahead: -1}), s, OpenOptions{ChunkSize: cs, Verify: j.verify})
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			for c := range int64(20) {
				if err := readNow(ctx, b, s, c*cs+1, cs); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if got := j.sorted(); !slices.Equal(got, chunks(0, 21)) {
		t.Errorf("verified %v, want each of 21 chunks once", got)
	}
	s.checkOnce(t)
}

// One wrong chunk among good ones: its readers alone get the error, and no wrong byte is ever present.
func TestVerifyRefuses(t *testing.T) {
	for _, test := range []struct {
		name      string
		temporary bool
		wrong     int // answers that are wrong, from the first on
		fetches   int // of the chunk, by one reader
		fails     bool
	}{
		{"for good", false, 1000, 1, true},
		{"for a time, and it was right then", true, 1, 2, false},
		{"for a time, and it stays wrong", true, 1000, 1 + maxRefetches, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newServer(5 * cs)
			j := &judge{truth: slices.Clone(s.content), temporary: test.temporary}
			s.content[2*cs+7] ^= 1
			var answers atomic.Int64
			s.answer = func(_ int, a *answer) {
				if a.start <= 2*cs && a.end > 2*cs && int(answers.Add(1)) > test.wrong {
					s.content[2*cs+7] = j.truth[2*cs+7]
				}
			}
			b := openWith(t, openCache(t, Options{Readahead: -1}), s, OpenOptions{ChunkSize: cs, Verify: j.verify})
			err := readNow(ctx, b, s, 0, 5*cs)
			var v verdict
			if test.fails != (err != nil) || test.fails && (!errors.As(err, &v) || !strings.Contains(err.Error(), "chunk at 8192")) {
				t.Errorf("error %v", err)
			}
			if got := int(answers.Load()); got != test.fetches {
				t.Errorf("the chunk was fetched %d times, want %d", got, test.fetches)
			}
			if got := b.ReadResident(make([]byte, cs), 2*cs); got == test.fails {
				t.Errorf("the chunk is resident: %v", got)
			}
			if err := readNow(ctx, b, s, 3*cs, 2*cs); err != nil {
				t.Errorf("chunks beside it: %v", err)
			}
		})
	}
}

func TestOnComplete(t *testing.T) {
	stage(t, func(t *testing.T) {
		var calls, late atomic.Int64
		s := newServer(5 * cs)
		c := openCache(t, Options{Readahead: -1})
		var b *Blob
		b = openWith(t, c, s, OpenOptions{ChunkSize: cs, OnComplete: func() bool {
			if err := readNow(ctx, b, s, 0, 5*cs); err != nil { // no lock is held, and all is here
				t.Error(err)
			}
			calls.Add(1)
			return true
		}})
		readChunks(t, b, s, 0, 1, 2, 4)
		if calls.Load() != 0 {
			t.Error("called before all was here")
		}
		readChunks(t, b, s, 3, 3, 0)
		openWith(t, c, s, OpenOptions{ChunkSize: cs, OnComplete: func() bool { late.Add(1); return true }})
		synctest.Wait()
		if calls.Load() != 1 || late.Load() != 1 {
			t.Errorf("called %d times, and %d times for who came when all was here", calls.Load(), late.Load())
		}
		if got := len(s.asked()); got != 5 {
			t.Errorf("%d requests, want 5", got)
		}
	})
}

// A unit that is no power of two, and does not divide the blob.
func TestUnitOfABlob(t *testing.T) {
	const unit = 3 * cs
	s := newServer(10*cs + 5)
	b := openWith(t, openCache(t, Options{Readahead: -1}), s, OpenOptions{ChunkSize: unit})
	for _, off := range []int64{0, 4 * cs, 10 * cs} {
		if err := readNow(ctx, b, s, off, 5); err != nil {
			t.Error(err)
		}
	}
	if got, want := s.asked(), []request{{0, unit}, {unit, unit}, {3 * unit, cs + 5}}; !slices.Equal(got, want) {
		t.Errorf("requests %v, want %v", got, want)
	}
	if _, err := openCache(t, Options{}).Open(testDigest, 5, s, OpenOptions{ChunkSize: 5000}); err == nil {
		t.Error("a unit of 5000 was accepted")
	}
}
