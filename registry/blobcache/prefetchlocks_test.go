package blobcache

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// neighbours are the same blob in caches of one directory: to the locks, in as many processes.
func neighbours(t *testing.T, s *server, n int) (all []*Blob) {
	t.Helper()
	dir := t.TempDir()
	for range n {
		all = append(all, openBlob(t, openCacheAt(t, dir, Options{ChunkSize: cs, Readahead: -1, MaxPrefetches: 1}), s))
	}
	return all
}

// What of a prefetch waits for its turn, since somebody reads here, does not have readers in other processes wait.
func TestPrefetchLocksNothingBeforeItBegins(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(100 * cs)
		theirs, mine, demand := make(chan struct{}), make(chan struct{}), make(chan struct{})
		s.gates = map[int64]chan struct{}{5 * cs: theirs, 2 * cs: mine, 50 * cs: demand}
		all := neighbours(t, s, 2)
		a, b := all[0], all[1]
		first := read(ctx, b, s, 5*cs, cs)
		mustWait(t, "the other process", first)
		p := prefetching(ctx, a, 0, 10*cs) // of which [6, 10) waits for the end of [0, 5)
		time.Sleep(longestPause + glance)  // that it lets the other process go first
		mustWait(t, "prefetch", p)
		reader := read(ctx, a, s, 50*cs, cs)
		mustWait(t, "a reader of this process", reader)
		mustAsk(t, s, spans([2]int64{5, 6}, [2]int64{0, 5}, [2]int64{50, 51})...)
		theirReader := read(ctx, b, s, 7*cs, cs)
		time.Sleep(mostPause) // for locks that are held for a moment
		mustEnd(t, "a reader in the other process of what nobody fetches", theirReader, nil)
		close(demand)
		mustEnd(t, "a reader of this process", reader, nil)
		close(theirs)
		close(mine)
		mustEnd(t, "the other process", first, nil)
		time.Sleep(mostPause)
		mustEnd(t, "prefetch", p, nil)
		mustBeOnDisk(t, a, append(chunks(0, 10), 50))
		s.checkOnce(t)
	})
}

// Two processes, each of which prefetches what the other one reads, do not wait for each other.
func TestPrefetchesDoNotLockEachOtherOut(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(100 * cs)
		gate := make(chan struct{})
		s.gates = map[int64]chan struct{}{5 * cs: gate, 25 * cs: gate, 2 * cs: gate, 22 * cs: gate}
		all := neighbours(t, s, 3)
		a, b, third := all[0], all[1], all[2]
		far := []*reading{read(ctx, third, s, 5*cs, cs), read(ctx, third, s, 25*cs, cs)}
		synctest.Wait()
		far = append(far, prefetching(ctx, a, 0, 10*cs), prefetching(ctx, b, 20*cs, 10*cs))
		synctest.Wait()
		one, two := read(ctx, a, s, 27*cs, cs), read(ctx, b, s, 7*cs, cs)
		time.Sleep(mostPause)
		mustEnd(t, "a reader of what the other one prefetches", one, nil)
		mustEnd(t, "the other one", two, nil)
		close(gate)
		time.Sleep(time.Second)
		for _, r := range far {
			mustEnd(t, "what was under way", r, nil)
		}
		mustBeOnDisk(t, a, slices.Concat(chunks(0, 10), chunks(20, 30)))
		s.checkOnce(t)
	})
}

// What waited long for its turn was not silent: nobody has its chunks fetched anew before its first byte comes.
func TestPrefetchThatWaitedIsNotQuiet(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(100 * cs)
		demand, here := make(chan struct{}), make(chan struct{})
		s.gates = map[int64]chan struct{}{50 * cs: demand, 0: here}
		b := open(t, s, Options{})
		pass := &prefetch{blob: b, end: 20, again: 20}
		if !pass.skip() || !b.store.cache.background.tryBegin() {
			t.Fatal("may not begin")
		}
		reader := read(ctx, b, s, 50*cs, cs)
		mustWait(t, "reader", reader)
		if begun, err := pass.begin(); !begun || err != nil {
			t.Fatal(begun, err)
		}
		time.Sleep(quiet + time.Second)
		close(demand)
		mustEnd(t, "reader", reader, nil)
		mustAsk(t, s, spans([2]int64{50, 51}, [2]int64{0, 20})...)
		later := read(ctx, b, s, 6*cs, cs)
		mustWait(t, "reader of a chunk of it", later)
		mustAsk(t, s, spans([2]int64{50, 51}, [2]int64{0, 20})...)
		close(here)
		mustEnd(t, "reader of a chunk of it", later, nil)
		if err := pass.settle(ctx, 0, true); err != nil {
			t.Error(err)
		}
		s.checkOnce(t)
	})
}

// At a rate of which a chunk takes longer than others have patience, nothing is locked for as long.
func TestPrefetchAtALowRateLocksNothing(t *testing.T) {
	for _, whole := range []bool{false, true} {
		stage(t, func(t *testing.T) {
			const each = 40 * time.Second // for a chunk
			s := newServer(10 * cs)
			s.whole = whole
			dir := t.TempDir()
			a := openBlob(t, openCacheAt(t, dir, Options{ChunkSize: cs, Readahead: -1, MaxPrefetches: 1, PrefetchRate: int64(cs * time.Second / each)}), s)
			other := s
			if whole {
				other = newServer(10 * cs)
			}
			b := openBlob(t, openCacheAt(t, dir, Options{ChunkSize: cs, Readahead: -1}), other)
			began := time.Now()
			p := prefetching(ctx, a, 0, 10*cs)
			time.Sleep(each / 2)
			synctest.Wait()
			if got := a.Stats().BytesFetched; got > 2*cs {
				t.Errorf("%d bytes came at once", got)
			}
			for c := range int64(5) {
				before := time.Now()
				readChunks(t, b, other, c)
				if took := time.Since(before); took > mostPause {
					t.Errorf("another process waited %v for chunk %d", took, c)
				}
			}
			if err := <-p.done; err != nil {
				t.Error(err)
			}
			// The first ones are not waited for, and those of the other process are not paid for.
			if took := time.Since(began); took < 2*each || took > 11*each {
				t.Errorf("it took %v", took)
			}
			mustBeOnDisk(t, a, chunks(0, 10))
			s.checkOnce(t)
		})
	}
}
