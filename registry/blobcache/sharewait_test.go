package blobcache

import (
	"context"
	"testing"
	"time"
)

// A stream, and any other flight, has the locks of what it still has to bring, and of nothing that it brought: what was
// evicted meanwhile is fetched at once by another process.
func TestLocksAreLetGoWhenAChunkIsHere(t *testing.T) {
	const perRegion, size = regionSize / cs, 3 * regionSize
	for _, whole := range []bool{true, false} {
		stage(t, func(t *testing.T) {
			dir := t.TempDir()
			o := Options{ChunkSize: cs, MaxSpan: size, Readahead: -1, MaxBytes: -1, MinFree: -1}
			gate := make(chan struct{})
			s := newServer(size)
			s.whole = whole
			s.gates = map[int64]chan struct{}{2 * regionSize: gate}
			a := openBlob(t, openCacheAt(t, dir, o), s)
			begin, asks := int64(2*regionSize-cs), int64(2*cs)
			if !whole {
				begin, asks = 0, size
			}
			impatient, leave := context.WithCancel(ctx)
			all := read(impatient, a, s, begin, asks)
			mustWait(t, "who reads behind the gate", all)
			mustHave(t, a, s, chunks(0, 2*perRegion))
			a.store.mu.Lock()
			held := len(a.store.locks)
			a.store.mu.Unlock()
			if want := map[bool]int{true: 1, false: perRegion}[whole]; held != want {
				t.Errorf("whole=%v: %d locks, want %d for what is to come", whole, held, want)
			}
			leave() // what is waited for stays
			mustEnd(t, "who leaves", all, context.Canceled)
			if freed, err := a.store.evict(0); err != nil || freed == 0 {
				t.Fatalf("whole=%v: %d bytes are evicted, %v", whole, freed, err)
			}
			theirs := newServer(size)
			b := openBlob(t, openCacheAt(t, dir, o), theirs)
			began := time.Now()
			if err := readNow(ctx, b, theirs, 0, cs); err != nil {
				t.Error(err)
			}
			if took := time.Since(began); took != 0 || b.Stats().Unkept != 0 {
				t.Errorf("whole=%v: an evicted chunk that nobody fetches came after %v; %+v", whole, took, b.Stats())
			}
			close(gate)
			mustHave(t, a, s, chunks(perRegion, 3*perRegion))
			a.store.mu.Lock()
			defer a.store.mu.Unlock()
			if len(a.store.locks) != 0 {
				t.Errorf("whole=%v: %d locks are left", whole, len(a.store.locks))
			}
		})
	}
}
