package blobcache

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// A reader who waits for what the background brings does not keep it from going on: only when the body that he waits for
// comes do others stop to read theirs.
func TestPrefetchGoesOnForItsReaders(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(100 * cs)
		here, there := make(chan struct{}), make(chan struct{})
		s.gates = map[int64]chan struct{}{2 * cs: here, 3 * cs: there}
		b := open(t, s, Options{Readahead: -1, MaxPrefetches: 3})
		p := prefetching(ctx, b, 0, 4*cs)
		mustWait(t, "prefetch", p)
		reader := read(ctx, b, s, 3*cs, cs)
		mustWait(t, "reader", reader)
		if st := b.store.cache.Stats(); st.Waiting != 1 {
			t.Errorf("stats %+v: want one reader", st)
		}
		mustEnd(t, "prefetch of something else while nothing comes", prefetching(ctx, b, 20*cs, 4*cs), nil)
		close(here)
		mustBeOnDisk(t, b, append(chunks(0, 3), chunks(20, 24)...))
		q := prefetching(ctx, b, 40*cs, 4*cs)
		mustWait(t, "prefetch of something else while it comes", q)
		mustAsk(t, s, spans([2]int64{0, 4}, [2]int64{20, 24}, [2]int64{40, 44})...)
		mustBeOnDisk(t, b, append(chunks(0, 3), chunks(20, 24)...))
		close(there)
		mustEnd(t, "reader", reader, nil)
		mustEnd(t, "prefetch", p, nil)
		mustEnd(t, "prefetch of something else", q, nil)
		s.checkOnce(t)
		if g := b.store.cache.background; g.waiting+g.served+g.favored != 0 {
			t.Errorf("%d readers wait, %d for the background, for %d flights", g.waiting, g.served, g.favored)
		}
	})
}

// Who waits for something of the background and for something else waits for something else.
func TestPrefetchStandsBackForWhoNeedsMore(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(100 * cs)
		here, demand := make(chan struct{}), make(chan struct{})
		s.gates = map[int64]chan struct{}{2 * cs: here, 4 * cs: demand}
		b := open(t, s, Options{Readahead: -1, MaxPrefetches: 3})
		p := prefetching(ctx, b, 0, 4*cs)
		mustWait(t, "prefetch", p)
		reader := read(ctx, b, s, 3*cs, 2*cs)
		mustWait(t, "reader", reader)
		q := prefetching(ctx, b, 20*cs, 4*cs)
		mustWait(t, "prefetch of something else", q)
		mustAsk(t, s, spans([2]int64{0, 4}, [2]int64{4, 5})...)
		close(here)
		mustEnd(t, "prefetch", p, nil)
		mustWait(t, "prefetch of something else", q)
		close(demand)
		mustEnd(t, "reader", reader, nil)
		mustEnd(t, "prefetch of something else", q, nil)
		s.checkOnce(t)
	})
}

// As long as anybody holds it, nothing of the blob is guessed, whoever reads.
func TestHoldReadahead(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(200 * cs)
		c := openCache(t, Options{ChunkSize: cs, Readahead: ahead})
		b, other := openBlob(t, c, s), openBlob(t, c, s)
		first, second := b.HoldReadahead(nil), other.HoldReadahead(nil)
		readChunks(t, b, s, chunks(0, 10)...)
		first()
		readChunks(t, b, s, chunks(20, 30)...)
		if st := b.Stats(); st.FetchesAhead != 0 || st.BytesFetched != 20*cs {
			t.Errorf("stats %+v: want 20 chunks", st)
		}
		second()
		readChunks(t, b, s, 100, 101, 102)
		if b.Stats().BytesAhead == 0 {
			t.Error("nothing is fetched ahead when nobody holds it any more")
		}
	})
}

// Who reads what is not in the plan of who holds it is guessed for, after a few reads of that kind; who reads what is, is
// not.
func TestHoldReadaheadForAPlan(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(1000 * cs)
		c := openCache(t, Options{ChunkSize: cs, Readahead: ahead})
		b := openBlob(t, c, s)
		release := b.HoldReadahead(func(yield func(off, n int64) bool) {
			_ = yield(500*cs+1, 100*cs) && yield(900*cs, 10*cs)
		})
		defer release()
		readChunks(t, b, s, chunks(500, 601)...)
		readChunks(t, b, s, chunks(900, 910)...)
		if st := b.Stats(); st.FetchesAhead != 0 || st.BytesFetched != 111*cs {
			t.Errorf("stats %+v: want what the plan has", st)
		}
		readChunks(t, b, s, chunks(0, maxStrays)...)
		if st := b.Stats(); st.FetchesAhead != 0 || st.BytesAhead != 0 {
			t.Errorf("stats %+v: want nothing guessed for a few reads", st)
		}
		readChunks(t, b, s, chunks(maxStrays, 256)...)
		if st := b.Stats(); st.FetchesDemand > 111+maxStrays+2 || st.BytesFetched < (111+256)*cs {
			t.Errorf("stats %+v: want few that a reader had to wait for behind those", st)
		}
	})
}

// A flight of the background that waits for what its chunks are verified by does not hold the background back: it is no
// reader.
func TestPrefetchBeneath(t *testing.T) {
	stage(t, func(t *testing.T) {
		s, tree := newServer(100*cs), newServer(10*cs)
		gate := make(chan struct{})
		tree.gates = map[int64]chan struct{}{0: gate}
		waits := 0
		c := openCache(t, Options{ChunkSize: cs, Readahead: -1, MaxSpan: 4 * cs, ObserveWait: func(time.Duration) { waits++ }})
		below, err := c.Open(anotherDigest, 10*cs, tree, OpenOptions{Beneath: true})
		if err != nil {
			t.Fatal(err)
		}
		b := openWith(t, c, s, OpenOptions{Verify: func(ctx context.Context, _ []byte, off int64) error {
			if off > 0 {
				return nil
			}
			return below.ReadAt(ctx, make([]byte, 1), 0)
		}})
		p := prefetching(ctx, b, 0, 4*cs)
		mustWait(t, "prefetch", p)
		if st := c.Stats(); st.Waiting != 0 {
			t.Errorf("stats %+v: no reader waits", st)
		}
		mustEnd(t, "prefetch of something else", prefetching(ctx, b, 20*cs, 4*cs), nil)
		close(gate)
		mustEnd(t, "prefetch", p, nil)
		if waits != 0 {
			t.Errorf("%d waits of readers were timed", waits)
		}
		if err := below.Close(); err != nil {
			t.Error(err)
		}
	})
}

// Nor does a read of what verifies others count where it waits for a flight of the background.
func TestPrefetchOfWhatIsBeneath(t *testing.T) {
	stage(t, func(t *testing.T) {
		tree := newServer(10 * cs)
		gate := make(chan struct{})
		tree.gates = map[int64]chan struct{}{0: gate}
		c := openCache(t, Options{ChunkSize: cs, Readahead: -1})
		below := openWith(t, c, tree, OpenOptions{Beneath: true})
		p := prefetching(ctx, below, 0, 2*cs)
		mustWait(t, "prefetch", p)
		inside := read(ctx, below, tree, cs, cs)
		mustWait(t, "a read for a flight", inside)
		if g := c.background; g.waiting != 0 || g.served != 0 {
			t.Errorf("%d readers wait, %d for the background; want none", g.waiting, g.served)
		}
		close(gate)
		mustEnd(t, "a read for a flight", inside, nil)
		mustEnd(t, "prefetch", p, nil)
		if g := c.background; g.waiting != 0 || g.served != 0 {
			t.Errorf("%d readers wait, %d for the background; want none", g.waiting, g.served)
		}
	})
}

// How fast bytes come is not known at first: then a piece is small, unless what readers fetched has shown it.
func TestPrefetchBeginsSmall(t *testing.T) {
	for _, test := range []struct {
		read int64 // chunks that a reader has fetched before
		want [][2]int64
	}{
		{0, [][2]int64{{0, 128}, {128, 153}, {153, 160}}},
		{31, [][2]int64{{900, 931}, {0, 128}, {128, 153}, {153, 160}}}, // too short to tell
		{32, [][2]int64{{900, 932}, {0, 25}, {25, 50}, {50, 75}, {75, 100}, {100, 125}, {125, 150}, {150, 160}}},
	} {
		stage(t, func(t *testing.T) {
			s := newServer(1000 * cs)
			c := openCache(t, Options{ChunkSize: cs, Readahead: -1, MaxPrefetches: 1})
			b, err := c.Open(testDigest, int64(len(s.content)), slowServer{s}, OpenOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if err := readNow(ctx, b, s, 900*cs, test.read*cs); err != nil {
				t.Fatal(err)
			}
			if err := b.Prefetch(ctx, 0, 160*cs); err != nil {
				t.Fatal(err)
			}
			mustAsk(t, s, spans(test.want...)...)
		})
	}
}

// A reader who leaves takes the haste with him that a flight has for his sake, unless another one is left.
func TestPrefetchIsPromotedForWhoStays(t *testing.T) {
	for stays, want := range map[bool]int64{false: 3, true: 11} {
		stage(t, func(t *testing.T) {
			s := newServer(100 * cs)
			here, demand := make(chan struct{}), make(chan struct{})
			s.gates = map[int64]chan struct{}{2 * cs: here, 50 * cs: demand}
			b := open(t, s, Options{MaxPrefetches: 1})
			p := prefetching(ctx, b, 0, 20*cs)
			mustWait(t, "prefetch", p)
			far := read(ctx, b, s, 50*cs, cs)
			mustWait(t, "a reader of something else", far)
			mine, leave := context.WithCancel(ctx)
			leaver := read(mine, b, s, 9*cs, 2*cs)
			mustWait(t, "the reader who leaves", leaver)
			stayer := &reading{done: make(chan error, 1)}
			if stays {
				stayer = read(ctx, b, s, 9*cs, 2*cs)
				mustWait(t, "the reader who stays", stayer)
			}
			leave()
			mustEnd(t, "the reader who leaves", leaver, context.Canceled)
			close(here)
			if stays {
				mustEnd(t, "the reader who stays", stayer, nil)
			}
			mustBeOnDisk(t, b, chunks(0, want))
			close(demand)
			mustEnd(t, "a reader of something else", far, nil)
			mustEnd(t, "prefetch", p, nil)
			s.checkOnce(t)
		})
	}
}

// A stream lets readers go first again and again: it is as long as the blob.
func TestPrefetchOfAStreamRestsAgain(t *testing.T) {
	stage(t, func(t *testing.T) {
		const size = 5 * prefetchPiece
		s, far := newServer(size), newServer(100*cs)
		s.whole = true
		here, demand := make(chan struct{}), make(chan struct{})
		s.gates = map[int64]chan struct{}{cs: here}
		far.gates = map[int64]chan struct{}{50 * cs: demand}
		c := openCache(t, Options{ChunkSize: cs, Readahead: -1, MaxPrefetches: 1})
		b := openBlob(t, c, s)
		other, err := c.Open(anotherDigest, 100*cs, far, OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		p := prefetching(ctx, b, 0, size)
		mustWait(t, "prefetch", p)
		reader := read(ctx, other, far, 50*cs, cs)
		mustWait(t, "reader", reader)
		close(here)
		for rests := range int64(3) {
			synctest.Wait()
			want := int64(2 * cs) // the read that was under way goes on to its end
			if rests > 0 {
				// That it is a stream shows behind what was asked for, when one more chunk is read.
				want = firstPiece + cs + rests*prefetchPiece
			}
			if got := b.Stats().BytesFetched; got != want {
				t.Errorf("after %d rests: %d bytes came, want %d", rests, got, want)
			}
			time.Sleep(longestPause)
		}
		close(demand)
		mustEnd(t, "reader", reader, nil)
		mustEnd(t, "prefetch", p, nil)
		s.checkOnce(t)
	})
}
