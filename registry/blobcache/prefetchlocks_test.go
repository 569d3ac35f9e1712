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
		mustWait(t, "prefetch", p)
		reader := read(ctx, a, s, 50*cs, cs)
		mustWait(t, "a reader of this process", reader)
		mustAsk(t, s, spans([2]int64{5, 6}, [2]int64{0, 5}, [2]int64{50, 51})...)
		mustEnd(t, "a reader in the other process of what nobody fetches", read(ctx, b, s, 7*cs, cs), nil)
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
