package blobcache

import (
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// ahead is what the tests here use: windows of 4 to 64 chunks.
const ahead = 64 * cs

// readChunks reads one chunk after the other, and lets all that this causes happen before the next.
func readChunks(t *testing.T, b *Blob, s *server, chunks ...int64) {
	t.Helper()
	for _, c := range chunks {
		if err := readNow(ctx, b, s, c*cs, min(cs, b.Size()-c*cs)); err != nil {
			t.Errorf("chunk %d: %v", c, err)
		}
		synctest.Wait()
	}
}

// spans are requests in chunks.
func spans(list ...[2]int64) []request {
	requests := []request{}
	for _, r := range list {
		requests = append(requests, request{r[0] * cs, (r[1] - r[0]) * cs})
	}
	return requests
}

func TestSequential(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(400*cs + 7)
		b := open(t, s, Options{Readahead: ahead, MaxSpan: 32 * cs})
		readChunks(t, b, s, chunks(0, 401)...)
		got := s.asked()
		first := spans([2]int64{0, 1}, [2]int64{1, 6}, [2]int64{6, 8}, [2]int64{8, 12}, [2]int64{12, 16}, [2]int64{16, 22})
		if !slices.Equal(got[:len(first)], first) {
			t.Errorf("begins with %v, want %v", got[:len(first)], first)
		}
		// Full windows are fetched by 16 chunks.
		if want := 6 + 400/16 + 3; len(got) > want {
			t.Errorf("%d requests, want %d at most", len(got), want)
		}
		s.checkOnce(t)
		st := b.Stats()
		if st.Fetches != int64(len(got)) || st.FetchesAhead != st.Fetches-2 || st.BytesFetched != b.Size() || st.BytesAhead != b.Size()-2*cs {
			t.Errorf("stats %+v: want all but the first two chunks ahead", st)
		}
		if st.Misses != 2 || st.Hits != 399 {
			t.Errorf("%d reads waited, %d did not; want 2 and 399", st.Misses, st.Hits)
		}
	})
}

// Small reads are no other stream than large ones, also where they are answered from what is resident.
func TestSequentialResidents(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(100 * cs)
		b := open(t, s, Options{Readahead: ahead, MaxSpan: 32 * cs})
		readChunks(t, b, s, 0, 1)
		p := make([]byte, cs/4)
		for off := int64(0); off < b.Size(); off += cs / 4 {
			if !b.ReadResident(p, off) {
				t.Fatalf("%d is not resident", off)
			}
			synctest.Wait()
		}
		s.checkOnce(t)
	})
}

func TestStreamsSideBySide(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(1000 * cs)
		b := open(t, s, Options{Readahead: ahead, MaxSpan: 32 * cs})
		for c := range int64(50) {
			readChunks(t, b, s, c, 300+c, 600+c)
		}
		s.checkOnce(t)
		if st := b.Stats(); st.Misses != 6 || st.BytesFetched > 3*(50+50+4)*cs {
			t.Errorf("%d reads waited, %d chunks were fetched; want 2 for each of 3 streams, and a window behind their 50 chunks", st.Misses, st.BytesFetched/cs)
		}
	})
}

// Bytes fetched over bytes needed. Few reads at random fetch what they need; many fill the regions that they meet.
func TestRandomReads(t *testing.T) {
	for _, test := range []struct {
		chunks, reads int
		most          float64
	}{{104, 10, 1.2}, {1200, 100, 1.1}, {1200, 300, 1.3}, {16384, 1000, 1.1}, {104, 100, 2}, {1200, 1000, 2}} {
		stage(t, func(t *testing.T) {
			s := newServer(test.chunks * cs)
			b := open(t, s, Options{Readahead: ahead, MaxSpan: 32 * cs})
			rng := rand.New(rand.NewPCG(5, 6))
			needed := map[int64]bool{}
			for range test.reads {
				c := rng.Int64N(int64(test.chunks))
				needed[c] = true
				if err := readNow(ctx, b, s, c*cs+rng.Int64N(cs-100), 100); err != nil {
					t.Error(err)
				}
				synctest.Wait()
			}
			s.checkOnce(t)
			if got := float64(b.Stats().BytesFetched) / float64(len(needed)*cs); got > test.most {
				t.Errorf("%d reads in %d chunks: %.2f of the bytes needed were fetched, want %.2f at most", test.reads, test.chunks, got, test.most)
			}
		})
	}
}

func TestHalfOfARegionBringsTheRest(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(100 * cs)
		b := open(t, s, Options{Readahead: ahead})
		readChunks(t, b, s, 15, 8, 12)
		mustHave(t, b, s, []int64{8, 12, 15})
		readChunks(t, b, s, 10)
		got := s.asked()[3:]
		slices.SortFunc(got, func(a, b request) int { return int(a.off - b.off) })
		if want := spans([2]int64{9, 10}, [2]int64{10, 12}, [2]int64{13, 15}); !slices.Equal(got, want) {
			t.Errorf("requests %v, want %v", got, want)
		}
		s.checkOnce(t)
	})
}

// A demand in the midst of what is being fetched ahead waits for it.
func TestDemandJoinsReadahead(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(100 * cs)
		gate := make(chan struct{})
		s.gates = map[int64]chan struct{}{3 * cs: gate}
		b := open(t, s, Options{Readahead: ahead})
		readChunks(t, b, s, 0, 1)
		mustAsk(t, s, spans([2]int64{0, 1}, [2]int64{1, 6})...)
		joined := read(ctx, b, s, 3*cs, 1)
		mustWait(t, "reader of a chunk that is on its way", joined)
		if got := s.asked(); got[len(got)-1].off <= 3*cs {
			t.Errorf("requests %v: the chunk was asked for again", got)
		}
		close(gate)
		mustEnd(t, "reader of a chunk that was on its way", joined, nil)
		s.checkOnce(t)
	})
}

// While readahead stands still everywhere, demand elsewhere goes on, and what is ahead has its own limit.
func TestDemandIsNotQueuedBehindReadahead(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(1000 * cs)
		gate := make(chan struct{})
		s.gates = map[int64]chan struct{}{}
		for _, c := range []int64{2, 102, 202, 302} {
			s.gates[c*cs+1] = gate
		}
		b := open(t, s, Options{Readahead: ahead, MaxFetches: 1, MaxAhead: 2})
		for _, c := range []int64{0, 100, 200, 300, 500} {
			readChunks(t, b, s, c, c+1)
		}
		mustAsk(t, s, spans([2]int64{0, 1}, [2]int64{1, 6}, [2]int64{100, 101}, [2]int64{101, 106},
			[2]int64{200, 201}, [2]int64{201, 202}, [2]int64{300, 301}, [2]int64{301, 302}, [2]int64{500, 501}, [2]int64{501, 502})...)
		close(gate)
		synctest.Wait() // until there is room again
		readChunks(t, b, s, 502)
		if got := s.asked()[10:]; !slices.Equal(got, spans([2]int64{502, 507})) {
			t.Errorf("requests %v, want the stream's window with its next chunk", got)
		}
		s.checkOnce(t)
	})
}

// What goes wrong ahead of readers is none of their errors, and stops the guessing until something goes well.
func TestReadaheadFails(t *testing.T) {
	for name, change := range map[string]func(a *answer){
		"no answer":           func(a *answer) { a.err = errServer },
		"short":               func(a *answer) { a.end = a.start + cs + 1 },
		"nothing":             func(a *answer) { a.end = a.start },
		"of another size":     func(a *answer) { a.total++ },
		"starts at the wrong": func(a *answer) { a.start++ },
	} {
		t.Run(name, func(t *testing.T) {
			stage(t, func(t *testing.T) {
				s := newServer(100 * cs)
				hold := make(chan struct{})
				s.answer = func(call int, a *answer) {
					if a.start == 6*cs && call == 2 {
						<-hold
						change(a)
					}
				}
				b := open(t, s, Options{Readahead: ahead})
				readChunks(t, b, s, 0, 1, 2, 3)
				mustAsk(t, s, spans([2]int64{0, 1}, [2]int64{1, 6}, [2]int64{6, 8})...)
				joined := read(ctx, b, s, 7*cs, cs)
				mustWait(t, "the reader that came upon it", joined)
				close(hold)
				mustEnd(t, "the reader that came upon it", joined, nil)
				if got := s.asked(); got[len(got)-1] != spans([2]int64{7, 8})[0] {
					t.Errorf("requests %v: want the chunk alone at the end", got)
				}
				before := len(s.asked())
				readChunks(t, b, s, 8, 9, 10, 11, 12, 13)
				if b.Stats().FetchesAhead < 2 || len(s.asked()) > before+5 {
					t.Errorf("stats %+v, requests %v: nothing was fetched ahead after the fault", b.Stats(), s.asked())
				}
			})
		})
	}
}

func TestNothingAheadInTrouble(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(100 * cs)
		down := false
		s.answer = func(_ int, a *answer) {
			if down {
				a.err = errServer
			}
		}
		b := open(t, s, Options{Readahead: ahead})
		readChunks(t, b, s, 0, 1, 2)
		down = true
		before := len(s.asked())
		for range 3 {
			mustEnd(t, "reader", read(ctx, b, s, 50*cs, cs), errServer)
			mustEnd(t, "reader", read(ctx, b, s, 51*cs, cs), errServer)
		}
		mustAsk(t, s, append(s.asked()[:before:before], spans([2]int64{50, 51}, [2]int64{51, 52}, [2]int64{50, 51}, [2]int64{51, 52}, [2]int64{50, 51}, [2]int64{51, 52})...)...)
	})
}

// A reader that has waited as long as it would for a fetch of its own gets the error; one that comes when nothing has
// come for a while does not wait with the others, and what comes late after all harms nobody.
func TestQuietReadahead(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(100 * cs)
		fail := make(chan struct{})
		s.answer = func(call int, a *answer) {
			if call == 2 {
				<-fail
				a.err = errServer
			}
		}
		b := open(t, s, Options{Readahead: ahead})
		readChunks(t, b, s, 0, 1, 2, 3)
		mustAsk(t, s, spans([2]int64{0, 1}, [2]int64{1, 6}, [2]int64{6, 8})...)
		early := read(ctx, b, s, 6*cs, cs)
		mustWait(t, "the reader that comes early", early)
		time.Sleep(quiet + 1)
		mustEnd(t, "the reader that comes late", read(ctx, b, s, 7*cs, cs), nil)
		if got := s.asked(); !slices.Contains(got, spans([2]int64{7, 8})[0]) {
			t.Errorf("requests %v", got)
		}
		mustWait(t, "the reader that came early", early)
		close(fail)
		mustEnd(t, "the reader that came early", early, errServer)
		readChunks(t, b, s, 6, 7)
	})
	stage(t, func(t *testing.T) {
		s := newServer(100 * cs)
		late, later := make(chan struct{}), make(chan struct{})
		s.gates = map[int64]chan struct{}{6*cs + 2: late}
		b := open(t, s, Options{Readahead: ahead})
		readChunks(t, b, s, 0, 1, 2, 3)
		time.Sleep(quiet + 1)
		s.gates = map[int64]chan struct{}{6*cs + 1: later} // for the bodies to come
		second := read(ctx, b, s, 6*cs, 2*cs)
		mustWait(t, "the second reader", second)
		close(late)
		mustEnd(t, "a reader of what came late after all", read(ctx, b, s, 6*cs, 1), nil)
		close(later)
		mustEnd(t, "the second reader", second, nil)
		synctest.Wait()
		residents(t, b, s) // which checks them
		readChunks(t, b, s, chunks(0, 100)...)
	})
}

// What comes late is not written to a region that was evicted meanwhile, and may be another process's by then.
func TestLateChunkOfAnEvictedRegion(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(100 * cs)
		late := make(chan struct{})
		s.gates = map[int64]chan struct{}{6*cs + 2: late}
		c := openCache(t, Options{ChunkSize: cs, Readahead: ahead})
		b := openBlob(t, c, s)
		readChunks(t, b, s, 0, 1, 2, 3)
		time.Sleep(quiet + 1)
		s.gates = nil // for the bodies to come
		mustEnd(t, "the second reader", read(ctx, b, s, 6*cs, 2*cs), nil)
		synctest.Wait()
		if err := b.Purge(); err != nil {
			t.Error(err)
		}
		close(late)
		mustHave(t, b, s, []int64{})
		if err := b.store.disk.scan(func(chunk int64) { t.Errorf("chunk %d is on disk", chunk) }); err != nil {
			t.Error(err)
		}
	})
}

func TestCloseCancelsReadahead(t *testing.T) {
	stage(t, func(t *testing.T) {
		s, other := newServer(100*cs), newServer(100*cs)
		s.gates = map[int64]chan struct{}{3 * cs: make(chan struct{})} // never opened
		c := openCache(t, Options{ChunkSize: cs, Readahead: ahead})
		a, b := openBlob(t, c, s), openBlob(t, c, other)
		readChunks(t, a, s, 0, 1, 2)
		joined := read(ctx, b, other, 4*cs, cs)
		mustWait(t, "a reader through another blob", joined)
		if err := a.Close(); err != nil {
			t.Error(err)
		}
		if got := s.open.Load(); got != 0 {
			t.Errorf("%d bodies are open after Close", got)
		}
		mustEnd(t, "a reader through another blob", joined, nil)
		mustEnd(t, "a reader through the closed one", read(ctx, a, s, 0, 1), os.ErrClosed)
		readChunks(t, b, other, chunks(5, 20)...)
		other.checkOnce(t)
		if len(s.asked()) != 2 {
			t.Errorf("requests %v through the blob that was closed", s.asked())
		}
	})
}

// A server that sends the whole blob has been asked for everything already.
func TestNothingAheadOfAStream(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(100 * cs)
		s.whole = true
		gate := make(chan struct{})
		s.gates = map[int64]chan struct{}{50 * cs: gate}
		b := open(t, s, Options{Readahead: ahead})
		readChunks(t, b, s, chunks(0, 50)...)
		close(gate)
		readChunks(t, b, s, chunks(50, 100)...)
		mustAsk(t, s, request{0, cs})
		s.checkOnce(t)
	})
}

// What cannot be kept is not worth fetching before somebody waits for it.
func TestNothingAheadOnFullDisk(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(100 * cs)
		full := false
		c := openCache(t, Options{ChunkSize: cs, Readahead: ahead})
		breakDisk(c, func(int64) bool { return full })
		b := openBlob(t, c, s)
		readChunks(t, b, s, 0)
		full = true
		readChunks(t, b, s, 1, 2, 3, 4, 5)
		mustHave(t, b, s, []int64{0})
		if fetched := b.Stats().BytesFetched; fetched > 8*cs {
			t.Errorf("%d chunks were fetched for 6", fetched/cs)
		}
		full = false
		readChunks(t, b, s, 6, 7, 8, 9)
		if b.Stats().ChunksPresent < 6 {
			t.Errorf("stats %+v: nothing was fetched ahead after the disk had room", b.Stats())
		}
	})
}

// Many readers, forward and at random, of a server that fails now and then: every byte is right, and none of a chunk
// that came is fetched again.
func TestReadaheadUnderLoad(t *testing.T) {
	for _, faults := range []bool{false, true} {
		s := newServer(600*cs + 5)
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
		b := open(t, s, Options{Readahead: ahead, MaxSpan: 16 * cs, MaxFetches: 3, MaxAhead: 2})
		var wg sync.WaitGroup
		for i := range int64(12) {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(7, uint64(i)))
				for c := i * 50; c < i*50+50; c++ {
					off := c * cs
					if i%3 == 0 {
						off = rng.Int64N(b.Size() - cs)
					}
					if err := readNow(ctx, b, s, off, cs); err != nil && !(faults && (errors.Is(err, errServer) || errors.Is(err, io.ErrUnexpectedEOF))) {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		if !faults {
			s.checkOnce(t)
		}
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}
}
