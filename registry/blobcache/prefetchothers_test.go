package blobcache

import (
	"testing"
	"time"
)

// strangers are two blobs of different content in caches of one directory: to the locks, in two processes.
func strangers(t *testing.T, mine, theirs *server, o Options) (a, b *Blob) {
	t.Helper()
	dir := t.TempDir()
	o.ChunkSize, o.Readahead = cs, -1
	a = openBlob(t, openCacheAt(t, dir, o), mine)
	b, err := openCacheAt(t, dir, o).Open(anotherDigest, int64(len(theirs.content)), theirs, OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return a, b
}

// While somebody waits in another process, whatever it mounts, nothing of the background begins, and it begins when he
// has what he wanted.
func TestPrefetchBeginsBehindOthers(t *testing.T) {
	stage(t, func(t *testing.T) {
		s, far := newServer(100*cs), newServer(100*cs)
		demand := make(chan struct{})
		far.gates = map[int64]chan struct{}{50 * cs: demand}
		a, b := strangers(t, s, far, Options{})
		reader := read(ctx, b, far, 50*cs, cs)
		mustWait(t, "reader", reader)
		p := prefetching(ctx, a, 0, 10*cs)
		time.Sleep(longestPause - time.Millisecond)
		mustWait(t, "prefetch while somebody reads", p)
		mustAsk(t, s)
		close(demand)
		mustEnd(t, "reader", reader, nil)
		time.Sleep(glance)
		mustEnd(t, "prefetch", p, nil)
		s.checkOnce(t)
	})
}

// A process that is stopped, or whose registry is, does not hold up others for ever: each piece waits for a while.
func TestPrefetchWaitsForOthersForAWhile(t *testing.T) {
	stage(t, func(t *testing.T) {
		s, far := newServer(100*cs), newServer(100*cs)
		demand := make(chan struct{})
		far.gates = map[int64]chan struct{}{50 * cs: demand}
		a, b := strangers(t, s, far, Options{MaxSpan: 10 * cs, MaxPrefetches: 1})
		reader := read(ctx, b, far, 50*cs, cs)
		mustWait(t, "reader", reader)
		p := prefetching(ctx, a, 0, 20*cs)
		for piece := range int64(2) {
			time.Sleep(longestPause - glance)
			mustBeOnDisk(t, a, chunks(0, 10*piece))
			time.Sleep(2 * glance)              // it begins
			time.Sleep(longestPause + 2*glance) // and reads its body
			mustBeOnDisk(t, a, chunks(0, 10*(piece+1)))
		}
		mustEnd(t, "prefetch", p, nil)
		close(demand)
		mustEnd(t, "reader", reader, nil)
	})
}

// A flight that is under way stops while somebody waits in another process, and goes on then.
func TestPrefetchPausesForOthers(t *testing.T) {
	stage(t, func(t *testing.T) {
		s, far := newServer(100*cs), newServer(100*cs)
		here, demand := make(chan struct{}), make(chan struct{})
		s.gates = map[int64]chan struct{}{2 * cs: here}
		far.gates = map[int64]chan struct{}{50 * cs: demand}
		a, b := strangers(t, s, far, Options{})
		p := prefetching(ctx, a, 0, 10*cs)
		mustWait(t, "prefetch", p)
		reader := read(ctx, b, far, 50*cs, cs)
		mustWait(t, "reader", reader)
		time.Sleep(glance)
		close(here)
		time.Sleep(longestPause / 2)
		mustWait(t, "prefetch while somebody reads", p)
		mustBeOnDisk(t, a, chunks(0, 3))
		close(demand)
		mustEnd(t, "reader", reader, nil)
		time.Sleep(glance)
		mustEnd(t, "prefetch", p, nil)
		s.checkOnce(t)
	})
}

// Who waits for what the background of another process brings does not have that wait.
func TestPrefetchGoesOnForThoseWhoWaitForIt(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(100 * cs)
		here := make(chan struct{})
		s.gates = map[int64]chan struct{}{2 * cs: here}
		all := neighbours(t, s, 2)
		p := prefetching(ctx, all[0], 0, 20*cs)
		mustWait(t, "prefetch", p)
		reader := read(ctx, all[1], s, 3*cs, cs)
		mustWait(t, "a reader in another process", reader)
		time.Sleep(glance)
		began := time.Now()
		close(here)
		time.Sleep(mostPause) // until the lock is looked at again
		mustEnd(t, "a reader in another process", reader, nil)
		mustEnd(t, "prefetch", p, nil)
		if took := time.Since(began); took > mostPause {
			t.Errorf("it took %v", took)
		}
		s.checkOnce(t)
	})
}

// What somebody waits for in other processes holds up no reader.
func TestReadersDoNotWaitForOthers(t *testing.T) {
	stage(t, func(t *testing.T) {
		s, far := newServer(100*cs), newServer(100*cs)
		demand := make(chan struct{})
		far.gates = map[int64]chan struct{}{50 * cs: demand}
		a, b := strangers(t, s, far, Options{})
		reader := read(ctx, b, far, 50*cs, cs)
		mustWait(t, "reader", reader)
		mustEnd(t, "another", read(ctx, a, s, 0, 10*cs), nil)
		// Nor one who comes upon what is to be prefetched.
		p := prefetching(ctx, a, 20*cs, 10*cs)
		mustWait(t, "prefetch", p)
		mustEnd(t, "who comes upon it", read(ctx, a, s, 20*cs, 10*cs), nil)
		close(demand)
		mustEnd(t, "reader", reader, nil)
		time.Sleep(glance)
		mustEnd(t, "prefetch", p, nil)
		s.checkOnce(t)
		if b.store.cache.outside.waiting() || a.store.cache.outside.waiting() {
			t.Error("the lock of who waits is left")
		}
	})
}
