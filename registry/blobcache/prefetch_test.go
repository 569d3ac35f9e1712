package blobcache

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// prefetching is a Prefetch that runs beside the test.
func prefetching(ctx context.Context, b *Blob, off, n int64) *reading {
	r := &reading{done: make(chan error, 1)}
	go func() { r.done <- b.Prefetch(ctx, off, n) }()
	return r
}

// onDisk lists the chunks that are on disk, whether somebody looked at them or not.
func onDisk(t *testing.T, b *Blob) []int64 {
	t.Helper()
	list := []int64{}
	if err := b.store.disk.scan(func(c int64) { list = append(list, c) }); err != nil {
		t.Error(err)
	}
	return list
}

func mustBeOnDisk(t *testing.T, b *Blob, want []int64) {
	t.Helper()
	synctest.Wait()
	if got := onDisk(t, b); !slices.Equal(got, want) {
		t.Errorf("chunks %v are on disk, want %v", got, want)
	}
}

func TestPrefetchRanges(t *testing.T) {
	for _, test := range []struct {
		name    string
		present []int64 // chunks that were read before
		off, n  int64
		want    []request // in order
		have    []int64
	}{
		{"nothing", nil, 5, 0, nil, []int64{}},
		{"one byte", nil, 2*cs + 7, 1, spans([2]int64{2, 3}), chunks(2, 3)},
		{"over a border", nil, 3*cs - 1, 2, spans([2]int64{2, 4}), chunks(2, 4)},
		{"all, in pieces", nil, 0, 10*cs + 7, []request{{0, 4 * cs}, {4 * cs, 4 * cs}, {8 * cs, 2*cs + 7}}, chunks(0, 11)},
		{"what is there costs nothing", []int64{4, 5}, 4 * cs, 2 * cs, nil, chunks(4, 6)},
		{"around what is there", []int64{1, 4}, 0, 8 * cs, spans([2]int64{0, 1}, [2]int64{2, 4}, [2]int64{5, 8}), chunks(0, 8)},
		{"the end", nil, 10 * cs, 7, []request{{10 * cs, 7}}, chunks(10, 11)},
	} {
		t.Run(test.name, func(t *testing.T) {
			stage(t, func(t *testing.T) {
				s := newServer(10*cs + 7)
				b := open(t, s, Options{MaxSpan: 4*cs + 1, MaxPrefetches: 1})
				readChunks(t, b, s, test.present...)
				mustEnd(t, "prefetch", prefetching(ctx, b, test.off, test.n), nil)
				if got := s.asked()[len(test.present):]; !slices.Equal(got, test.want) {
					t.Errorf("requests %v, want %v", got, test.want)
				}
				mustBeOnDisk(t, b, test.have)
				s.checkOnce(t)
				st := b.Stats()
				bytes := int64(0)
				for _, r := range test.want {
					bytes += r.n
				}
				if st.FetchesPrefetch != int64(len(test.want)) || st.BytesPrefetch != bytes || st.BytesAhead != 0 || st.FetchesAhead != 0 || st.Misses != int64(len(test.present)) {
					t.Errorf("stats %+v: want %d fetches and %d bytes for Prefetch", st, len(test.want), bytes)
				}
				fetched := len(s.asked())
				if err := readNow(ctx, b, s, test.off, test.n); err != nil {
					t.Error(err)
				}
				if len(s.asked()) != fetched || b.Stats().Misses != st.Misses {
					t.Error("what was prefetched was fetched again, or waited for")
				}
			})
		})
	}
}

func TestPrefetchOutside(t *testing.T) {
	s := newServer(10)
	b := open(t, s, Options{})
	for _, r := range [][2]int64{{-1, 1}, {0, -1}, {0, 11}, {11, 0}, {5, 1<<63 - 1}, {1<<63 - 1, 1<<63 - 1}} {
		if err := b.Prefetch(ctx, r[0], r[1]); err == nil {
			t.Errorf("%d bytes at %d of 10 were prefetched", r[1], r[0])
		}
	}
	if b.Unit() != cs {
		t.Errorf("unit %d", b.Unit())
	}
	for _, o := range []Options{{MaxPrefetches: -1}, {PrefetchRate: -1}} {
		if _, err := New(t.TempDir(), o); err == nil {
			t.Errorf("options %+v were accepted", o)
		}
	}
}

// What lies in a cache from an earlier mount is neither fetched nor read, but for its entries.
func TestPrefetchOfWhatIsKept(t *testing.T) {
	stage(t, func(t *testing.T) {
		dir := t.TempDir()
		s := newServer(8 * cs)
		first := openBlob(t, openCacheAt(t, dir, Options{ChunkSize: cs}), s)
		mustEnd(t, "prefetch", prefetching(ctx, first, 0, 8*cs), nil)
		if err := first.Close(); err != nil {
			t.Fatal(err)
		}
		c := openCacheAt(t, dir, Options{ChunkSize: cs})
		read := false
		c.wrap = func(f chunkFile, l layout) chunkFile { return lookFile{f, l.base, &read} }
		b := openBlob(t, c, s)
		mustEnd(t, "prefetch of what is there", prefetching(ctx, b, 0, 8*cs), nil)
		if read || len(s.asked()) != 1 {
			t.Errorf("read from the disk: %v; %d fetches, want the one of before", read, len(s.asked()))
		}
	})
}

// A lookFile notes whether the blob's bytes are read.
type lookFile struct {
	chunkFile
	base int64
	read *bool
}

func (f lookFile) ReadAt(p []byte, off int64) (int, error) {
	*f.read = *f.read || off >= f.base
	return f.chunkFile.ReadAt(p, off)
}

// Another process evicts what this one knows of, and fetches what it does not.
func TestPrefetchLooksAtTheDisk(t *testing.T) {
	stage(t, func(t *testing.T) {
		dir := t.TempDir()
		const region = regionSize / cs
		s := newServer(3 * regionSize)
		o := Options{ChunkSize: cs, Readahead: -1, MaxPrefetches: 1}
		a, other := openBlob(t, openCacheAt(t, dir, o), s), openBlob(t, openCacheAt(t, dir, o), s)
		readChunks(t, a, s, 0, region)
		a.store.mu.Lock()
		err := a.store.letGo(0)
		a.store.mu.Unlock()
		if err != nil {
			t.Fatal(err)
		}
		evictAll(t, other.store.cache, cs)
		readChunks(t, other, s, 1)
		before := len(s.asked())
		mustEnd(t, "prefetch", prefetching(ctx, a, 0, 3*cs), nil)
		if got := s.asked()[before:]; !slices.Equal(got, spans([2]int64{0, 1}, [2]int64{2, 3})) {
			t.Errorf("requests %v, want what nobody has any more, and not what another process has fetched", got)
		}
	})
}

// While somebody waits, nothing of the background begins, in any blob of the cache.
func TestPrefetchBeginsBehindDemand(t *testing.T) {
	stage(t, func(t *testing.T) {
		s, far := newServer(100*cs), newServer(100*cs)
		demand := make(chan struct{})
		far.gates = map[int64]chan struct{}{50 * cs: demand}
		c := openCache(t, Options{ChunkSize: cs, Readahead: -1, MaxSpan: 4 * cs})
		b := openBlob(t, c, s)
		other, err := c.Open(anotherDigest, 100*cs, far, OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		reader := read(ctx, other, far, 50*cs, cs)
		mustWait(t, "reader", reader)
		if st := c.Stats(); st.Waiting != 1 || st.InFlight != 1 {
			t.Errorf("stats %+v: want one reader and one fetch", st)
		}
		p := prefetching(ctx, b, 0, 40*cs)
		mustWait(t, "prefetch while somebody reads", p)
		mustAsk(t, s)
		time.Sleep(time.Minute)
		mustWait(t, "prefetch while somebody reads", p)
		mustAsk(t, s) // however long that takes
		close(demand)
		mustEnd(t, "reader", reader, nil)
		mustEnd(t, "prefetch", p, nil)
		if got := len(s.asked()); got != 10 {
			t.Errorf("%d requests, want one for each of 10 pieces", got)
		}
		if st := c.Stats(); st.Waiting != 0 || st.InFlight != 0 {
			t.Errorf("stats %+v: nobody waits any more", st)
		}
	})
}

var anotherDigest = "sha256:" + "fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210"

// No more are under way than may be, over all blobs, and they end in order.
func TestPrefetchSlots(t *testing.T) {
	stage(t, func(t *testing.T) {
		s, far := newServer(100*cs), newServer(100*cs)
		gate := make(chan struct{})
		s.gates = map[int64]chan struct{}{cs: gate, 5 * cs: gate}
		far.gates = map[int64]chan struct{}{cs: gate, 5 * cs: gate}
		c := openCache(t, Options{ChunkSize: cs, Readahead: -1, MaxSpan: 4 * cs, MaxPrefetches: 3})
		b := openBlob(t, c, s)
		other, err := c.Open(anotherDigest, 100*cs, far, OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		p := prefetching(ctx, b, 0, 8*cs)
		mustWait(t, "first prefetch", p)
		q := prefetching(ctx, other, 0, 8*cs)
		mustWait(t, "second prefetch", q)
		if len(s.asked()) != 2 || len(far.asked()) != 1 {
			t.Errorf("requests %v and %v, want two and one", s.asked(), far.asked())
		}
		// Whoever waits has slots of his own, and the paused ones go on when he has what he wanted.
		mustEnd(t, "reader", read(ctx, b, s, 20*cs, cs), nil)
		close(gate)
		mustEnd(t, "first prefetch", p, nil)
		mustEnd(t, "second prefetch", q, nil)
		s.checkOnce(t)
		far.checkOnce(t)
	})
}

// A flight that is under way stops while somebody waits for something else, and goes on then.
func TestPrefetchPauses(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(100 * cs)
		here, demand := make(chan struct{}), make(chan struct{})
		s.gates = map[int64]chan struct{}{2 * cs: here, 50 * cs: demand}
		b := open(t, s, Options{})
		p := prefetching(ctx, b, 0, 10*cs)
		mustWait(t, "prefetch", p)
		reader := read(ctx, b, s, 50*cs, cs)
		mustWait(t, "reader", reader)
		close(here)
		mustWait(t, "prefetch while somebody reads", p)
		// The read of the body that was under way goes on to its end, and none after it begins.
		mustBeOnDisk(t, b, chunks(0, 3))
		close(demand)
		mustEnd(t, "reader", reader, nil)
		mustEnd(t, "prefetch", p, nil)
		mustAsk(t, s, spans([2]int64{0, 10}, [2]int64{50, 51})...)
		s.checkOnce(t)
	})
}

// It does not stop for ever, so that a server does not break off, and other processes wait in vain.
func TestPrefetchPausesForAWhile(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(100 * cs)
		here, demand := make(chan struct{}), make(chan struct{})
		s.gates = map[int64]chan struct{}{2 * cs: here, 50 * cs: demand}
		b := open(t, s, Options{MaxSpan: 10 * cs, MaxPrefetches: 1})
		p := prefetching(ctx, b, 0, 30*cs)
		mustWait(t, "prefetch", p)
		reader := read(ctx, b, s, 50*cs, cs)
		mustWait(t, "reader", reader)
		close(here)
		mustBeOnDisk(t, b, chunks(0, 3))
		time.Sleep(longestPause - time.Millisecond)
		mustBeOnDisk(t, b, chunks(0, 3))
		time.Sleep(2 * time.Millisecond)
		mustBeOnDisk(t, b, chunks(0, 10))
		time.Sleep(time.Minute)
		mustBeOnDisk(t, b, chunks(0, 10)) // and the next one does not begin
		close(demand)
		mustEnd(t, "reader", reader, nil)
		mustEnd(t, "prefetch", p, nil)
		s.checkOnce(t)
	})
}

// A reader of what a paused flight brings has that go on until he has it, while other readers still wait; nothing is
// asked for again.
func TestPrefetchPromoted(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(100 * cs)
		here, demand := make(chan struct{}), make(chan struct{})
		s.gates = map[int64]chan struct{}{2 * cs: here, 50 * cs: demand}
		b := open(t, s, Options{Readahead: ahead})
		p := prefetching(ctx, b, 0, 20*cs)
		mustWait(t, "prefetch", p)
		reader := read(ctx, b, s, 50*cs, cs)
		mustWait(t, "reader", reader)
		close(here)
		mustBeOnDisk(t, b, chunks(0, 3))
		mustEnd(t, "reader of a chunk on its way", read(ctx, b, s, 6*cs+1, cs), nil)
		mustBeOnDisk(t, b, chunks(0, 8))
		mustWait(t, "reader of something else", reader)
		mustWait(t, "prefetch", p)
		// Neither a pause nor the silence in it has a reader ask anew.
		mustAsk(t, s, spans([2]int64{0, 20}, [2]int64{50, 51})...)
		close(demand)
		mustEnd(t, "reader", reader, nil)
		mustEnd(t, "prefetch", p, nil)
		s.checkOnce(t)
	})
}

// A reader of what is to be fetched by a flight that has not begun, since somebody waits, has it fetched by himself.
func TestDemandDoesNotWaitForAFlightThatHasNotBegun(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(100 * cs)
		demand := make(chan struct{})
		s.gates = map[int64]chan struct{}{50 * cs: demand}
		b := open(t, s, Options{})
		g := b.store.cache.background
		// A flight that was let begin, and then somebody came before it had its locks.
		pass := &prefetch{blob: b, end: 20, again: 20}
		if !pass.skip() || !g.tryBegin() {
			t.Fatal("may not begin")
		}
		reader := read(ctx, b, s, 50*cs, cs)
		mustWait(t, "reader", reader)
		if begun, err := pass.begin(); !begun || err != nil {
			t.Fatal(begun, err)
		}
		synctest.Wait()
		mustAsk(t, s, spans([2]int64{50, 51})...)
		mustEnd(t, "reader of a chunk of it", read(ctx, b, s, 6*cs, cs), nil)
		mustAsk(t, s, spans([2]int64{50, 51}, [2]int64{6, 7})...)
		close(demand)
		mustEnd(t, "reader", reader, nil)
		synctest.Wait()
		if err := pass.settle(ctx, 0, true); err != nil {
			t.Error(err)
		}
		mustBeOnDisk(t, b, append(chunks(0, 20), 50))
		got := s.asked()[2:]
		slices.SortFunc(got, func(a, b request) int { return int(a.off - b.off) })
		if !slices.Equal(got, spans([2]int64{0, 6}, [2]int64{7, 20})) {
			t.Errorf("requests %v: want what is left, in two", got)
		}
		s.checkOnce(t)
	})
}

// The rate holds over some seconds, for all blobs together, and a reader has what he wants at once.
func TestPrefetchRate(t *testing.T) {
	stage(t, func(t *testing.T) {
		const rate = 10 * cs
		s, far := newServer(1000*cs), newServer(1000*cs)
		c := openCache(t, Options{ChunkSize: cs, Readahead: -1, PrefetchRate: rate})
		b := openBlob(t, c, s)
		other, err := c.Open(anotherDigest, 1000*cs, far, OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var both []*reading
		began := time.Now()
		for _, blob := range []*Blob{b, other} {
			both = append(both, prefetching(ctx, blob, 0, 200*cs))
		}
		for seconds := range int64(30) {
			synctest.Wait()
			got := b.Stats().BytesPrefetch + other.Stats().BytesPrefetch
			received := b.Stats().BytesFetched + other.Stats().BytesFetched
			// What is in hand of a chunk that is not whole counts later: one chunk for each flight.
			if want := seconds * rate; received < want || received > want+2*rate/smoothness || got > received || got < received-2*2*cs {
				t.Errorf("after %d s: %d bytes came, %d for Prefetch, want %d", seconds, received, got, want)
			}
			time.Sleep(time.Second)
		}
		mustEnd(t, "reader of what is far away", read(ctx, b, s, 900*cs, cs), nil)
		before := time.Now()
		asked := len(s.asked()) + len(far.asked())
		mine, source, chunk := b, s, lastInFlight(b)
		if chunk < 0 {
			mine, source, chunk = other, far, lastInFlight(other)
		}
		mustEnd(t, "reader of what is on its way", read(ctx, mine, source, chunk*cs, cs), nil)
		if now := len(s.asked()) + len(far.asked()); time.Since(before) > 0 || now > asked+1 { // one for the next piece
			t.Errorf("it took %v and %d requests", time.Since(before), now-asked)
		}
		for _, p := range both {
			if err := <-p.done; err != nil {
				t.Error(err)
			}
		}
		// 400 chunks, but for those of the flight that was promoted.
		if took := time.Since(began); took < 38*time.Second || took > 41*time.Second {
			t.Errorf("400 chunks at 10 a second took %v", took)
		}
		s.checkOnce(t)
		far.checkOnce(t)
	})
}

// lastInFlight gives the last chunk that is in flight, or -1.
func lastInFlight(b *Blob) int64 {
	b.store.mu.Lock()
	defer b.store.mu.Unlock()
	last := int64(-1)
	for c := range b.store.inflight {
		last = max(last, c)
	}
	return last
}

// What was not used of the rate is no debt: after a pause one burst comes at once, and no more.
func TestPrefetchBurst(t *testing.T) {
	stage(t, func(t *testing.T) {
		const rate = 10 * cs
		s := newServer(1000 * cs)
		stall := make(chan struct{})
		s.gates = map[int64]chan struct{}{20 * cs: stall}
		b := open(t, s, Options{PrefetchRate: rate, MaxPrefetches: 1})
		p := prefetching(ctx, b, 0, 100*cs)
		time.Sleep(time.Minute) // the server stands still after 20
		synctest.Wait()
		if got := b.Stats().BytesFetched; got != 20*cs {
			t.Fatalf("%d bytes came", got)
		}
		close(stall)
		synctest.Wait()
		if got := b.Stats().BytesFetched; got < 29*cs || got > 32*cs {
			t.Errorf("%d chunks came at once, want a second's", (got-20*cs)/cs)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if got := b.Stats().BytesFetched; got < 49*cs || got > 52*cs {
			t.Errorf("%d chunks came, want those of three seconds more", (got-20*cs)/cs)
		}
		if err := <-p.done; err != nil {
			t.Error(err)
		}
	})
}

// What Prefetch brought is fresh: it is no read, and the first read of it counts as one.
func TestPrefetchIsNoRead(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(400 * cs)
		b := open(t, s, Options{Readahead: ahead, MaxSpan: 32 * cs})
		mustEnd(t, "prefetch", prefetching(ctx, b, 8*cs, 5*cs), nil)
		readChunks(t, b, s, 14)
		mustAsk(t, s, spans([2]int64{8, 13}, [2]int64{14, 15})...) // a region of which one chunk was read
		mustEnd(t, "prefetch", prefetching(ctx, b, 100*cs, 20*cs), nil)
		before := len(s.asked())
		readChunks(t, b, s, chunks(100, 120)...)
		got := s.asked()[before:]
		if !slices.ContainsFunc(got, func(r request) bool { return r.off == 120*cs }) {
			t.Errorf("requests %v: want a window behind what was prefetched and is read", got)
		}
		s.checkOnce(t)
	})
}

// A reader that goes through what is being prefetched neither has a chunk fetched twice nor waits for its end.
func TestPrefetchAndReadahead(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(300 * cs)
		b := open(t, s, Options{Readahead: ahead, MaxSpan: 16 * cs, PrefetchRate: 32 * cs})
		p := prefetching(ctx, b, 0, 300*cs)
		synctest.Wait()
		for c := range int64(150) {
			readChunks(t, b, s, c)
			time.Sleep(10 * time.Millisecond)
		}
		if err := <-p.done; err != nil {
			t.Error(err)
		}
		s.checkOnce(t)
		st := b.Stats()
		if st.BytesFetched != 300*cs || st.BytesPrefetch == 0 || st.BytesAhead == 0 {
			t.Errorf("stats %+v: want every byte once, some by each", st)
		}
	})
}

func TestNoReadahead(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(100 * cs)
		c := openCache(t, Options{ChunkSize: cs, Readahead: ahead})
		b := openWith(t, c, s, OpenOptions{NoReadahead: true})
		readChunks(t, b, s, chunks(0, 10)...)
		if st := b.Stats(); st.FetchesAhead != 0 || st.BytesFetched != 10*cs || st.Fetches != 10 {
			t.Errorf("stats %+v: want 10 chunks", st)
		}
		other := openBlob(t, c, s)
		readChunks(t, other, s, 10, 11, 12)
		if b.Stats().BytesAhead == 0 {
			t.Error("nothing is fetched ahead for another reader")
		}
	})
}

// A server that answers the whole blob is asked once. Two flights that begin before either knows ask twice (an answer
// from byte 0 shows at its end only what it is), and then one is read as far as what it was asked for.
func TestPrefetchOfAStream(t *testing.T) {
	for _, test := range []struct {
		demandFirst bool
		flights     int
	}{{false, 1}, {true, 1}, {false, 2}, {true, 2}} {
		demandFirst := test.demandFirst
		stage(t, func(t *testing.T) {
			s := newServer(50*cs + 3)
			s.whole = true
			early, gate := make(chan struct{}), make(chan struct{})
			s.gates = map[int64]chan struct{}{cs: early, 10*cs + 1: gate}
			b := open(t, s, Options{MaxSpan: 4 * cs, MaxPrefetches: test.flights})
			var first *reading
			if demandFirst {
				first = read(ctx, b, s, 0, 2*cs)
				mustWait(t, "the reader that began the stream", first)
			}
			p := prefetching(ctx, b, 0, 50*cs+3)
			mustWait(t, "prefetch", p)
			close(early)
			if demandFirst {
				mustEnd(t, "the reader that began the stream", first, nil)
			}
			mustWait(t, "prefetch", p)
			later := read(ctx, b, s, 30*cs, cs)
			mustWait(t, "a reader of what is to come", later)
			close(gate)
			mustEnd(t, "a reader of what was to come", later, nil)
			mustEnd(t, "prefetch", p, nil)
			mustBeOnDisk(t, b, chunks(0, 51))
			if !demandFirst && test.flights == 1 {
				s.checkOnce(t)
				mustAsk(t, s, s.asked()[:1]...)
			}
			if got := b.Stats(); got.BytesFetched > b.Size()+8*cs || got.Fetches > 2 {
				t.Errorf("stats %+v: want all once, and two pieces more at most", got)
			}
		})
	}
}
