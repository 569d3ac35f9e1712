package blobcache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// What cannot be kept is not fetched on and on; those who read have it.
func TestPrefetchOnABadDisk(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(100 * cs)
		c := openCache(t, Options{ChunkSize: cs, Readahead: -1, MaxSpan: 8 * cs})
		full := true
		breakDisk(c, func(int64) bool { return full })
		log := new(logbook)
		c.options.Logger = log.logger()
		b := openBlob(t, c, s)
		mustEnd(t, "prefetch", prefetching(ctx, b, 0, 100*cs), errDisk)
		if got := b.Stats().BytesFetched; got > 4*cs {
			t.Errorf("%d bytes were fetched in vain", got)
		}
		mustBeOnDisk(t, b, []int64{})
		if log.lines("cannot keep") != 0 {
			t.Errorf("said %q: who prefetches is told", log.text.String())
		}
		mustEnd(t, "reader", read(ctx, b, s, 0, 3*cs), nil)
		full = false
		mustEnd(t, "prefetch when there is room", prefetching(ctx, b, 0, 100*cs), nil)
		mustBeOnDisk(t, b, chunks(0, 100))
	})
}

// The first chunk that cannot be had is the error, and Prefetch ends with it.
func TestPrefetchFails(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(100 * cs)
		s.answer = func(_ int, a *answer) {
			if a.start <= 10*cs && 10*cs < a.end {
				a.end, a.broken = 10*cs+5, errServer
			}
		}
		b := open(t, s, Options{MaxSpan: 8 * cs, MaxPrefetches: 1, Readahead: ahead})
		p := prefetching(ctx, b, 0, 100*cs)
		mustEnd(t, "prefetch", p, errServer)
		mustBeOnDisk(t, b, chunks(0, 10))
		mustAsk(t, s, spans([2]int64{0, 8}, [2]int64{8, 16})...)
		if st := b.Stats(); st.BytesPrefetch != 10*cs+5 || st.BytesFetched != st.BytesPrefetch {
			t.Errorf("stats %+v: want the bytes of what broke off, too", st)
		}
	})
}

// A chunk that is refused and may be better the next time is fetched again; one that stays wrong is an error.
func TestPrefetchRefused(t *testing.T) {
	for _, wrong := range []int{1, 1000} {
		stage(t, func(t *testing.T) {
			s := newServer(8 * cs)
			j := &judge{truth: slices.Clone(s.content), temporary: true}
			s.content[5*cs] ^= 1
			answers := 0
			s.answer = func(_ int, a *answer) {
				if a.start <= 5*cs && 5*cs < a.end {
					if answers++; answers > wrong {
						s.content[5*cs] = j.truth[5*cs]
					}
				}
			}
			b := openWith(t, openCache(t, Options{ChunkSize: cs, Readahead: -1}), s, OpenOptions{Verify: j.verify})
			p := prefetching(ctx, b, 0, 8*cs)
			synctest.Wait()
			err := <-p.done
			if want := wrong == 1000; want != (err != nil) || want && answers != maxRefetches+1 {
				t.Errorf("error %v after %d answers", err, answers)
			}
			have := chunks(0, 8)
			if wrong == 1000 {
				have = slices.Delete(have, 5, 6)
			}
			mustBeOnDisk(t, b, have)
			if got := b.store.cache.Stats().Refused; got != int64(min(wrong, maxRefetches+1)) {
				t.Errorf("%d chunks refused", got)
			}
		})
	}
}

// A cache smaller than the blob: Prefetch does not drive out what it has brought, nor what is read meanwhile, but what
// lay there long before; and demand goes on.
func TestPrefetchHasNoRoom(t *testing.T) {
	stage(t, func(t *testing.T) {
		const limit = 4 * regionSize
		p := &pattern{size: 8 * regionSize}
		c := openCache(t, Options{MaxBytes: limit, MinFree: -1, Readahead: -1})
		old, err := c.Open(anotherDigest, regionSize, &pattern{size: regionSize}, OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := old.Prefetch(ctx, 0, regionSize); err != nil {
			t.Fatal(err)
		}
		time.Sleep(campaignGap + time.Second)
		b, err := c.Open(testDigest, p.size, p, OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for range 2 { // the second time is no better
			if err := b.Prefetch(ctx, 0, p.size); !errors.Is(err, ErrNoRoom) {
				t.Errorf("error %v, want no room", err)
			}
		}
		if n := len(onDisk(t, old)); n != 0 {
			t.Errorf("%d chunks that lay there for long were kept", n)
		}
		if n := int64(len(onDisk(t, b))) * b.Unit(); n < limit/2 || n > limit {
			t.Errorf("%d bytes are there, want most of %d", n, int64(limit))
		}
		st := c.Stats()
		if got := p.fetched.Load(); got > limit+4*prefetchPiece || st.Evictions != 1 || st.EvictedBytes != regionSize {
			t.Errorf("%d bytes fetched; stats %+v: want one region evicted, and little more than the limit fetched", got, st)
		}
		if st.Bytes > limit || st.Limit != limit {
			t.Errorf("stats %+v", st)
		}
		// Demand may evict.
		if err := b.ReadAt(ctx, make([]byte, regionSize), 7*regionSize); err != nil {
			t.Error(err)
		}
		if present, _ := b.Present(7 * regionSize); !present {
			t.Error("what was read was not kept")
		}
	})
}

func TestCloseEndsPrefetch(t *testing.T) {
	for name, closeIt := range map[string]func(c *Cache, b *Blob) error{
		"blob":  func(c *Cache, b *Blob) error { return b.Close() },
		"cache": func(c *Cache, b *Blob) error { return c.Close() },
		"purge": func(c *Cache, b *Blob) error { return b.Purge() },
	} {
		for _, what := range []string{"receiving", "paused", "limited", "before it began"} {
			t.Run(name+", "+what, func(t *testing.T) {
				stage(t, func(t *testing.T) {
					s, far := newServer(100*cs), newServer(100*cs)
					never := make(chan struct{})
					far.gates = map[int64]chan struct{}{50 * cs: never}
					o := Options{ChunkSize: cs, Readahead: -1}
					reads := what == "paused" || what == "before it began"
					switch what {
					case "receiving":
						s.gates = map[int64]chan struct{}{cs: never}
					case "paused":
						s.gates = map[int64]chan struct{}{cs: make(chan struct{})}
					case "limited":
						o.PrefetchRate = 1
					}
					c := openCache(t, o)
					b := openBlob(t, c, s)
					other, err := c.Open(anotherDigest, 100*cs, far, OpenOptions{})
					if err != nil {
						t.Fatal(err)
					}
					var p, r *reading
					if what == "before it began" {
						r = read(ctx, other, far, 50*cs, cs)
						mustWait(t, "reader", r)
					}
					p = prefetching(ctx, b, 0, 100*cs)
					mustWait(t, "prefetch", p)
					if what == "paused" {
						r = read(ctx, other, far, 50*cs, cs)
						mustWait(t, "reader", r)
						close(s.gates[cs])
						mustWait(t, "prefetch", p)
					}
					if err := closeIt(c, b); err != nil {
						t.Error(err)
					}
					mustEnd(t, "prefetch", p, os.ErrClosed)
					mustEnd(t, "prefetch of what is closed", prefetching(ctx, b, 0, 10), os.ErrClosed)
					if reads && name != "cache" {
						mustWait(t, "reader of another blob", r)
					}
					if got := s.open.Load(); got != 0 && name != "purge" {
						t.Errorf("%d bodies are open after Close", got)
					}
				})
			})
		}
	}
}

// A Prefetch whose context ends begins nothing any more; what is under way comes.
func TestPrefetchCancelled(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(100 * cs)
		gate := make(chan struct{})
		s.gates = map[int64]chan struct{}{cs: gate}
		b := open(t, s, Options{MaxSpan: 4 * cs, MaxPrefetches: 1})
		mine, cancel := context.WithCancel(ctx)
		p := prefetching(mine, b, 0, 100*cs)
		mustWait(t, "prefetch", p)
		cancel()
		mustEnd(t, "prefetch", p, context.Canceled)
		close(gate)
		mustBeOnDisk(t, b, chunks(0, 4))
		mustAsk(t, s, spans([2]int64{0, 4})...)
		mustEnd(t, "the next prefetch has the slot", prefetching(ctx, b, 0, 8*cs), nil)
		mustAsk(t, s, spans([2]int64{0, 4}, [2]int64{4, 8})...)
	})
}

// Another blob of the same store is closed while Prefetch waits for what it fetches: then that is fetched here.
func TestPrefetchOutlivesAnotherBlob(t *testing.T) {
	stage(t, func(t *testing.T) {
		stalled, s := newServer(10*cs), newServer(10*cs)
		stalled.gates = map[int64]chan struct{}{2 * cs: make(chan struct{})} // never opened
		c := openCache(t, Options{ChunkSize: cs, Readahead: -1})
		a, b := openBlob(t, c, stalled), openBlob(t, c, s)
		first := prefetching(ctx, a, 0, 10*cs)
		mustWait(t, "first prefetch", first)
		second := prefetching(ctx, b, 0, 10*cs)
		mustWait(t, "second prefetch", second)
		if err := a.Close(); err != nil {
			t.Error(err)
		}
		mustEnd(t, "first prefetch", first, os.ErrClosed)
		mustEnd(t, "second prefetch", second, nil)
		mustAsk(t, s, spans([2]int64{2, 10})...)
	})
}

type labelKey struct{}

// A labeled Fetcher notes for which cause it was asked.
type labeled struct {
	*server
	mu     sync.Mutex // guards causes
	causes []Cause
}

func (l *labeled) Fetch(ctx context.Context, off, n int64) (io.ReadCloser, int64, int64, error) {
	cause, _ := ctx.Value(labelKey{}).(Cause)
	l.mu.Lock()
	l.causes = append(l.causes, cause)
	l.mu.Unlock()
	time.Sleep(time.Second)
	return l.server.Fetch(ctx, off, n)
}

func (l *labeled) count(cause Cause) (n int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.causes {
		if c == cause {
			n++
		}
	}
	return n
}

// Each Fetch says what for, each wait how long, and the bytes add up.
func TestCauses(t *testing.T) {
	stage(t, func(t *testing.T) {
		l := &labeled{server: newServer(400 * cs)}
		var waits []time.Duration
		c := openCache(t, Options{ChunkSize: cs, Readahead: ahead, MaxSpan: 64 * cs, MaxPrefetches: 1,
			Label: func(ctx context.Context, cause Cause) context.Context {
				return context.WithValue(ctx, labelKey{}, cause)
			},
			ObserveWait: func(d time.Duration) { waits = append(waits, d) },
		})
		b, err := c.Open(testDigest, 400*cs, l, OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, chunk := range []int64{0, 1, 2, 3, 4} { // the last ones were fetched ahead of the second
			if err := readNow(ctx, b, l.server, chunk*cs, cs); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Minute)
		}
		if err := b.Prefetch(ctx, 200*cs, 8*cs); err != nil {
			t.Fatal(err)
		}
		if err := readNow(ctx, b, l.server, 204*cs, cs); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		st := b.Stats()
		if l.count(Demand) != 2 || l.count(Prefetch) != 1 || l.count(Readahead) != st.FetchesAhead || st.FetchesAhead == 0 || int64(len(l.causes)) != st.Fetches {
			t.Errorf("causes %v, stats %+v: want two of demand, one prefetch, some ahead", l.causes, st)
		}
		if !slices.Equal(waits, []time.Duration{time.Second, time.Second}) {
			t.Errorf("waits %v, want two of a second", waits)
		}
		if demand := st.BytesFetched - st.BytesAhead - st.BytesPrefetch; demand != 2*cs || st.BytesPrefetch != 8*cs {
			t.Errorf("stats %+v: %d bytes of demand, want 2 chunks, and 8 of Prefetch", st, demand)
		}
	})
}

// What is not what was written is counted, by who comes upon it.
func TestDamagedIsCounted(t *testing.T) {
	dir := t.TempDir()
	s := newServer(4 * cs)
	o := Options{ChunkSize: cs, Readahead: -1}
	b := openBlob(t, openCacheAt(t, dir, o), s)
	if err := b.Prefetch(ctx, 0, 4*cs); err != nil {
		t.Fatal(err)
	}
	d := b.store.disk
	if _, err := d.handle.WriteAt([]byte{^s.content[2*cs]}, d.base+2*cs); err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	c := openCacheAt(t, dir, o)
	if err := readNow(ctx, openBlob(t, c, s), s, 0, 4*cs); err != nil {
		t.Error(err)
	}
	if st := c.Stats(); st.Damaged != 1 || st.Refused != 0 {
		t.Errorf("stats %+v, want one damaged chunk", st)
	}
	if got, want := s.asked(), []request{{0, 4 * cs}, {2 * cs, cs}}; !slices.Equal(got, want) {
		t.Errorf("requests %v, want %v", got, want)
	}
}

// What is the matter with one chunk is told from what is the matter with all.
func TestOfOneChunk(t *testing.T) {
	for _, c := range []struct {
		err  error
		want bool
	}{
		{nil, false}, {errServer, false}, {errAbandoned, false}, {noRoom(unix.ENOSPC), false},
		{fmt.Errorf("prefetch: %w", errLocked), true}, {&refusedError{0, missing{request{0, 1}, errServer}}, true},
	} {
		if got := OfOneChunk(c.err); got != c.want {
			t.Errorf("%v: %v", c.err, got)
		}
	}
}
