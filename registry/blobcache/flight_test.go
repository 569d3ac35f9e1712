package blobcache

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
)

// stage runs a test whose goroutines all wait for each other: synctest.Wait returns when none can go on by itself,
// which is how "still waits" is seen without a clock.
func stage(t *testing.T, play func(t *testing.T)) { synctest.Test(t, play) }

func mustWait(t *testing.T, what string, r *reading) {
	t.Helper()
	synctest.Wait()
	if err, ended := r.ended(); ended {
		t.Errorf("%s: ended (%v), want it to wait", what, err)
	}
}

func mustEnd(t *testing.T, what string, r *reading, want error) {
	t.Helper()
	synctest.Wait()
	err, ended := r.ended()
	if !ended {
		t.Fatalf("%s: still waits", what)
	}
	if !errors.Is(err, want) || (want == nil) != (err == nil) {
		t.Errorf("%s: error %v, want %v", what, err, want)
	}
}

func mustHave(t *testing.T, b *Blob, s *server, want []int64) {
	t.Helper()
	synctest.Wait()
	if got := residents(t, b, s); !slices.Equal(got, want) {
		t.Errorf("chunks %v are present, want %v", got, want)
	}
	if got := b.Stats().ChunksPresent; got != int64(len(want)) {
		t.Errorf("stats count %d chunks, want %d", got, len(want))
	}
}

func mustAsk(t *testing.T, s *server, want ...request) {
	t.Helper()
	synctest.Wait()
	if got := s.asked(); !slices.Equal(got, want) {
		t.Errorf("requests %v, want %v", got, want)
	}
}

func TestWaiterLeavesWithItsChunk(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(8 * cs)
		gate := make(chan struct{})
		s.gates = map[int64]chan struct{}{2*cs + 5: gate}
		b := open(t, s, Options{})
		all := read(ctx, b, s, 0, 4*cs)
		mustWait(t, "reader of the stalled span", all)
		mustEnd(t, "reader of a chunk that came", read(ctx, b, s, cs, cs), nil)
		third := read(ctx, b, s, 2*cs, 1)
		mustWait(t, "reader of the chunk that stalls", third)
		mustHave(t, b, s, chunks(0, 2))
		close(gate)
		mustEnd(t, "reader of the span", all, nil)
		mustEnd(t, "reader of the chunk that stalled", third, nil)
		mustAsk(t, s, request{0, 4 * cs})
	})
}

func TestCancelledReaderLeavesTheFlight(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(4 * cs)
		gate := make(chan struct{})
		s.gates = map[int64]chan struct{}{100: gate}
		b := open(t, s, Options{})
		mine, cancel := context.WithCancel(ctx)
		first := read(mine, b, s, 0, 2*cs)
		mustWait(t, "the reader that began the flight", first)
		second := read(ctx, b, s, cs, 2*cs)
		mustWait(t, "the reader that joined", second)
		cancel()
		mustEnd(t, "the cancelled reader", first, context.Canceled)
		mustWait(t, "the reader that stays", second)
		close(gate)
		mustEnd(t, "the reader that stays", second, nil)
		mustHave(t, b, s, chunks(0, 3))
		mustAsk(t, s, request{0, 2 * cs}, request{2 * cs, cs})

		mustEnd(t, "a reader that comes cancelled", read(mine, b, s, 3*cs, 1), context.Canceled)
		mustHave(t, b, s, chunks(0, 3))
	})
}

func TestFlightFailsMidway(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(6 * cs)
		gate := make(chan struct{})
		s.gates = map[int64]chan struct{}{2 * cs: gate}
		s.answer = func(call int, a *answer) {
			if call == 0 {
				a.end, a.broken = 2*cs+1, errServer
			}
		}
		log := new(logbook)
		b := open(t, s, Options{Logger: log.logger()})
		span := read(ctx, b, s, 0, 4*cs)
		mustWait(t, "reader of the span", span)
		tail := read(ctx, b, s, 3*cs, cs)
		mustWait(t, "reader of the last chunk", tail)
		close(gate)
		mustEnd(t, "reader of the span", span, errServer)
		mustEnd(t, "reader of the last chunk", tail, errServer)
		mustHave(t, b, s, chunks(0, 2))
		if log.lines("injected server fault") != 1 {
			t.Errorf("want one line about the fault, got %q", log.text.String())
		}
		mustEnd(t, "reader of a chunk that came", read(ctx, b, s, cs, cs), nil)
		mustEnd(t, "reader after the fault", read(ctx, b, s, 0, 4*cs), nil)
		mustAsk(t, s, request{0, 4 * cs}, request{2 * cs, 2 * cs})
	})
}

// Answers that are not what was asked for: what was published before it showed stays, the rest is an error.
func TestWrongAnswers(t *testing.T) {
	const size = 8*cs + 9
	for _, test := range []struct {
		name    string
		first   int64 // the read is of the chunks first to first+2
		whole   bool
		change  func(a *answer)
		text    string // of the error; none: the read succeeds
		present []int64
	}{
		{"fetch fails", 2, false, func(a *answer) { a.err = errServer }, "injected", nil},
		{"total too small", 2, false, func(a *answer) { a.total-- }, "the server has 32776 bytes", nil},
		{"total too large", 2, false, func(a *answer) { a.total = 1 << 62 }, "the server has 4611686018427387904 bytes", nil},
		{"starts late", 2, false, func(a *answer) { a.start += cs }, "body starts at 12288", nil},
		{"starts before the blob", 2, false, func(a *answer) { a.start = -1 }, "body starts at -1", nil},
		{"empty", 2, false, func(a *answer) { a.end = a.start }, "broke off at 8192: unexpected EOF", nil},
		{"short by one", 2, false, func(a *answer) { a.end-- }, "broke off at 20479: unexpected EOF", chunks(2, 4)},
		{"ends with a chunk", 2, false, func(a *answer) { a.end -= cs }, "broke off at 16384: unexpected EOF", chunks(2, 4)},
		{"reset", 2, false, func(a *answer) { a.end, a.broken = a.start+cs+9, errServer }, "broke off at 12297: injected", chunks(2, 3)},
		{"long by one", 2, false, func(a *answer) { a.end++ }, "", chunks(2, 5)},
		{"long by chunks", 2, false, func(a *answer) { a.end += 2 * cs }, "", chunks(2, 5)},
		{"starts early at a chunk", 2, false, func(a *answer) { a.start -= cs }, "", chunks(1, 5)},
		{"starts early inside a chunk", 2, false, func(a *answer) { a.start -= cs + 1 }, "", chunks(1, 5)},
		{"from 0, short", 0, false, func(a *answer) { a.end-- }, "broke off at 12287", chunks(0, 2)},
		{"from 0, long inside a chunk", 0, false, func(a *answer) { a.end++ }, "", chunks(0, 3)},
		{"whole", 2, true, func(a *answer) {}, "", chunks(0, 9)},
		{"whole from 0", 0, true, func(a *answer) {}, "", chunks(0, 9)},
		{"whole, long", 2, true, func(a *answer) { a.end += 100 }, "", chunks(0, 9)},
		{"whole, short before", 2, true, func(a *answer) { a.end = cs + 1 }, "broke off at 4097: unexpected EOF", chunks(0, 1)},
		{"whole, short behind", 2, true, func(a *answer) { a.end = 6*cs + 1 }, "", chunks(0, 6)},
		{"whole, reset in the last chunk", 6, true, func(a *answer) { a.end, a.broken = size-1, errServer }, "broke off at 32776: injected", chunks(0, 8)},
	} {
		t.Run(test.name, func(t *testing.T) {
			stage(t, func(t *testing.T) {
				s := newServer(size)
				s.whole = test.whole
				s.answer = func(call int, a *answer) {
					if call == 0 {
						test.change(a)
					}
				}
				b := open(t, s, Options{})
				n := min(3*cs, size-test.first*cs)
				err := readNow(ctx, b, s, test.first*cs, n)
				if (err == nil) != (test.text == "") || err != nil && !strings.Contains(err.Error(), test.text) {
					t.Errorf("error %v, want %q", err, test.text)
				}
				mustHave(t, b, s, append([]int64{}, test.present...))
				if err := readNow(ctx, b, s, 0, size); err != nil {
					t.Errorf("read after the wrong answer: %v", err)
				}
			})
		})
	}
}

// While the whole blob passes, readers of what is to come wait for it, and nothing is asked for twice.
func TestStreamServesLaterReaders(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(10*cs + 3)
		s.whole = true
		gate, late := make(chan struct{}), make(chan struct{})
		s.gates = map[int64]chan struct{}{3 * cs: gate, 8*cs + 1: late}
		b := open(t, s, Options{})
		first := read(ctx, b, s, 5*cs, cs)
		mustWait(t, "the reader that began the stream", first)
		mustEnd(t, "reader of a chunk that passed", read(ctx, b, s, cs, cs), nil)
		next := read(ctx, b, s, 3*cs, cs)
		last := read(ctx, b, s, 9*cs, cs+3)
		mustWait(t, "reader of the next chunk", next)
		mustWait(t, "reader of the one after", read(ctx, b, s, 4*cs, cs))
		mustWait(t, "reader of the last chunks", last)
		close(gate)
		mustEnd(t, "the reader that began the stream", first, nil)
		mustEnd(t, "reader of the next chunk", next, nil)
		mustWait(t, "reader of the last chunks", last)
		mustHave(t, b, s, chunks(0, 8))
		close(late)
		mustEnd(t, "reader of the last chunks", last, nil)
		mustHave(t, b, s, chunks(0, 11))
		mustAsk(t, s, request{5 * cs, cs})
		s.checkOnce(t)
	})
}

// A stream that nobody waits for goes on, and one that breaks off leaves what it brought.
func TestStreamBreaksOff(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(10 * cs)
		gate := make(chan struct{})
		s.gates = map[int64]chan struct{}{4 * cs: gate}
		s.answer = func(call int, a *answer) {
			if call == 0 {
				a.start, a.end, a.broken = 0, 6*cs, errServer
			}
		}
		b := open(t, s, Options{})
		mustEnd(t, "the reader that began the stream", read(ctx, b, s, 2*cs, cs), nil)
		later := read(ctx, b, s, 8*cs, cs)
		mustWait(t, "a reader of what is to come", later)
		close(gate)
		mustEnd(t, "a reader of what did not come", later, errServer)
		mustHave(t, b, s, chunks(0, 6))
		mustEnd(t, "a reader after the fault", read(ctx, b, s, 8*cs, cs), nil)
		mustAsk(t, s, request{2 * cs, cs}, request{8 * cs, cs})
	})
}

// Many cold readers at once of a server that cannot range: the stream takes over what the others asked for.
func TestStreamTakesOver(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(20 * cs)
		s.whole = true
		gate := make(chan struct{})
		s.hold = gate
		b := open(t, s, Options{MaxFetches: 2})
		var readers []*reading
		for c := int64(1); c < 20; c++ {
			readers = append(readers, read(ctx, b, s, c*cs, cs))
			synctest.Wait()
		}
		mustAsk(t, s, request{cs, cs}, request{2 * cs, cs}) // both wait for their answer, the other 17 for their turn
		close(gate)
		for _, r := range readers {
			mustEnd(t, "reader", r, nil)
		}
		mustHave(t, b, s, chunks(0, 20))
		if got := len(s.asked()); got != 2 {
			t.Errorf("%d requests, want no more than the two that were under way", got)
		}
		s.checkOnce(t)
	})
}

// The second flight's chunk lies behind the stream, so it must fetch by itself, but to its chunk's end only.
func TestReaderBehindTheStream(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(10 * cs)
		fail, gate := make(chan struct{}), make(chan struct{})
		s.gates = map[int64]chan struct{}{cs + 1: fail, 7 * cs: gate}
		s.answer = func(call int, a *answer) {
			switch call {
			case 0: // a range that breaks off in chunk 1
				a.end, a.broken = cs+2, errServer
			default:
				a.start, a.end = 0, 10*cs
			}
		}
		b := open(t, s, Options{})
		broken := read(ctx, b, s, cs, cs)
		mustWait(t, "reader of chunk 1", broken)
		delete(s.gates, cs+1) // for the bodies to come; all that run are waiting
		stream := read(ctx, b, s, 8*cs, cs)
		mustWait(t, "the reader that began the stream", stream)
		close(fail)
		mustEnd(t, "reader of chunk 1", broken, errServer)
		mustHave(t, b, s, []int64{0, 2, 3, 4, 5, 6})
		mustEnd(t, "second reader of chunk 1", read(ctx, b, s, cs, cs), nil)
		if st := b.Stats(); st.BytesFetched != 2+7*cs+2*cs {
			t.Errorf("%d bytes fetched, want 2 of the broken range, 7 chunks of the stream, 2 of the third body", st.BytesFetched)
		}
		close(gate)
		mustEnd(t, "the reader that began the stream", stream, nil)
		mustHave(t, b, s, chunks(0, 10))
		mustAsk(t, s, request{cs, cs}, request{8 * cs, cs}, request{cs, cs})
	})
}

// Where nothing is kept, a stream serves those who wait for it and then ends.
func TestStreamOnFullDisk(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(10 * cs)
		s.whole = true
		gate := make(chan struct{})
		s.gates = map[int64]chan struct{}{2 * cs: gate}
		c := openCache(t, Options{ChunkSize: cs})
		breakDisk(c, func(int64) bool { return true })
		b := openBlob(t, c, s)
		first, later := read(ctx, b, s, 3*cs, cs), read(ctx, b, s, 6*cs, 10)
		mustWait(t, "first reader", first)
		close(gate)
		mustEnd(t, "first reader", first, nil)
		mustEnd(t, "later reader", later, nil)
		mustHave(t, b, s, chunks(0, 0))
		if got, want := b.Stats().BytesFetched, int64(7*cs); got > want+cs {
			t.Errorf("%d bytes fetched for the chunks up to %d", got, want)
		}
	})
}

// A chunk that a stream is just dropping will not come with it.
func TestReaderOfDroppedChunk(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(10 * cs)
		s.whole = true
		early, middle := make(chan struct{}), make(chan struct{})
		s.gates = map[int64]chan struct{}{cs: early, 4*cs + 1: middle}
		c := openCache(t, Options{ChunkSize: cs})
		breakDisk(c, func(int64) bool { return true })
		b := openBlob(t, c, s)
		first, later := read(ctx, b, s, 2*cs, cs), read(ctx, b, s, 6*cs, cs)
		mustWait(t, "first reader", first)
		mustWait(t, "later reader", later)
		close(early)
		mustEnd(t, "first reader", first, nil)
		mustWait(t, "later reader", later) // the stream stands in chunk 4
		delete(s.gates, 4*cs+1)            // for the bodies to come; all that run are waiting
		mustEnd(t, "reader of the chunk that is dropped", read(ctx, b, s, 4*cs, cs), nil)
		close(middle)
		mustEnd(t, "later reader", later, nil)
	})
}

func TestCloseInFlight(t *testing.T) {
	for name, closeIt := range map[string]func(c *Cache, b *Blob) error{
		"blob":  func(c *Cache, b *Blob) error { return b.Close() },
		"cache": func(c *Cache, b *Blob) error { return c.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			stage(t, func(t *testing.T) {
				s := newServer(4 * cs)
				s.gates = map[int64]chan struct{}{cs + 1: make(chan struct{})} // never opened
				c := openCache(t, Options{ChunkSize: cs, MaxFetches: 1})
				b := openBlob(t, c, s)
				receiving := read(ctx, b, s, cs, cs)
				mustWait(t, "reader", receiving)
				queued := read(ctx, b, s, 3*cs, cs)
				mustWait(t, "reader whose flight waits for its turn", queued)
				if err := closeIt(c, b); err != nil {
					t.Error(err)
				}
				if got := s.open.Load(); got != 0 {
					t.Errorf("%d bodies are open after Close", got)
				}
				mustEnd(t, "reader", receiving, os.ErrClosed)
				mustEnd(t, "reader whose flight waited", queued, os.ErrClosed)
				mustEnd(t, "reader after the close", read(ctx, b, s, 0, 1), os.ErrClosed)
			})
		})
	}
}

// A reader through one blob waits for a flight of another; when that is closed, the reader fetches for itself.
func TestCloseLeavesOthersToFetch(t *testing.T) {
	stage(t, func(t *testing.T) {
		stalled, s := newServer(4*cs), newServer(4*cs)
		stalled.gates = map[int64]chan struct{}{2 * cs: make(chan struct{})} // never opened
		c := openCache(t, Options{ChunkSize: cs})
		a, b := openBlob(t, c, stalled), openBlob(t, c, s)
		mine := read(ctx, a, stalled, 0, 4*cs)
		mustWait(t, "reader of the first blob", mine)
		joined := read(ctx, b, s, cs, 3*cs)
		mustWait(t, "reader of the second", joined)
		if err := a.Close(); err != nil {
			t.Error(err)
		}
		mustEnd(t, "reader of the first blob", mine, os.ErrClosed)
		mustEnd(t, "reader of the second", joined, nil)
		mustAsk(t, stalled, request{0, 4 * cs})
		mustAsk(t, s, request{2 * cs, 2 * cs})
	})
}

// Everything at once: reads, cancelled reads, faults, servers that range and do not, a disk that is full now and
// then, blobs opened and closed.
func TestRandomOperations(t *testing.T) {
	const size = 40*cs + 77
	s := newServer(size)
	var mu sync.Mutex // guards rng
	rng := rand.New(rand.NewPCG(11, 12))
	roll := func(n int) int {
		mu.Lock()
		defer mu.Unlock()
		return rng.IntN(n)
	}
	s.answer = func(_ int, a *answer) {
		switch roll(8) {
		case 0:
			a.err = errServer
		case 1:
			a.end -= int64(roll(int(a.end - a.start)))
		case 2:
			a.start, a.end = 0, size
		case 3:
			a.start, a.end, a.broken = 0, int64(roll(size)), errServer
		}
	}
	c := openCache(t, Options{ChunkSize: cs, MaxSpan: 3 * cs, MaxFetches: 3})
	breakDisk(c, func(int64) bool { return roll(4) == 0 })
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 30 {
				b, err := c.Open(testDigest, size, s, OpenOptions{})
				if err != nil {
					t.Error(err)
					return
				}
				randomReads(t, b, s, roll)
				if err := b.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func randomReads(t *testing.T, b *Blob, s *server, roll func(int) int) {
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 5 {
				mine, cancel := context.WithCancel(ctx)
				if roll(6) == 0 {
					go cancel()
				}
				off := int64(roll(len(s.content)))
				n := min(int64(roll(8*cs)), b.Size()-off)
				err := readNow(mine, b, s, off, n)
				cancel()
				if err != nil && !errors.Is(err, errServer) && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}
