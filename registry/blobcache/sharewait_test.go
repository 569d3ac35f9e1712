package blobcache

import (
	"cmp"
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"sync/atomic"
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

// slowly opens a gate at the end of each chunk, one each time that so much has passed, and gives when the last one opens.
func slowly(s *server, n int64, each time.Duration) {
	s.gates = make(map[int64]chan struct{})
	for c := range n {
		gate := make(chan struct{})
		s.gates[(c+1)*cs-1] = gate
		time.AfterFunc(time.Duration(c+1)*each, func() { close(gate) })
	}
}

// A process that brings one chunk after the other is waited for, however long that takes; by who waits for all of them,
// and by who waits for the last one. One that brings no more is waited for as long as patience says.
func TestPatienceIsWithWhoStandsStill(t *testing.T) {
	const each, patience, n, comes = 15 * time.Second, 20 * time.Second, 10, 6
	for _, stuck := range []bool{false, true} {
		stage(t, func(t *testing.T) {
			began := time.Now()
			dir := t.TempDir()
			o := Options{ChunkSize: cs, Readahead: -1, Patience: patience}
			s := newServer(n * cs)
			slowly(s, n, each)
			last := time.Duration(n * each)
			gate := make(chan struct{})
			if stuck {
				s.gates[comes*cs] = gate
				last = comes*each + patience
			}
			first := read(ctx, openBlob(t, openCacheAt(t, dir, o), s), s, 0, n*cs)
			mustWait(t, "who fetches", first)
			var others []*server
			var readers []*reading
			for _, r := range []request{{0, n * cs}, {(n - 1) * cs, cs}} {
				other := newServer(n * cs)
				others = append(others, other)
				readers = append(readers, read(ctx, openBlob(t, openCacheAt(t, dir, o), other), other, r.off, r.n))
			}
			for _, r := range readers {
				if err := <-r.done; err != nil {
					t.Error(err)
				}
			}
			if took := time.Since(began); took < last || took > last+3*mostPause {
				t.Errorf("stuck=%v: the last reader has his bytes after %v, want %v", stuck, took, last)
			}
			var asked [][]request
			for _, other := range others {
				asked = append(asked, other.asked())
			}
			want := [][]request{nil, nil}
			if stuck {
				want = [][]request{{{comes * cs, (n - comes) * cs}}, {{(n - 1) * cs, cs}}}
			}
			if !slices.EqualFunc(asked, want, slices.Equal) {
				t.Errorf("stuck=%v: asked for %v, want %v", stuck, asked, want)
			}
			close(gate)
			if err := <-first.done; err != nil {
				t.Error(err)
			}
			s.checkOnce(t)
		})
	}
}

// What this process itself brings beside what it waits for is no sign of life of the other one.
func TestPatienceIsNotFedByOneself(t *testing.T) {
	stage(t, func(t *testing.T) {
		dir := t.TempDir()
		o := Options{ChunkSize: cs, Readahead: -1, Patience: 20 * time.Second}
		dead := newServer(20 * cs)
		dead.hold = make(chan struct{})
		first := read(ctx, openBlob(t, openCacheAt(t, dir, o), dead), dead, 0, cs)
		mustWait(t, "who fetches", first)
		s := newServer(20 * cs)
		b := openBlob(t, openCacheAt(t, dir, o), s)
		began := time.Now()
		waits := read(ctx, b, s, 0, cs)
		for c := range int64(10) {
			time.Sleep(2 * time.Second)
			if c < 9 {
				mustWait(t, "who waits for the other process", waits)
			}
			if err := readNow(ctx, b, s, (c+1)*cs, cs); err != nil {
				t.Error(err)
			}
		}
		if err := <-waits.done; err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took > o.Patience+3*mostPause {
			t.Errorf("waited %v", took)
		}
		close(dead.hold)
		mustEnd(t, "who fetches", first, nil)
	})
}

// A troubled network is what a Fetcher waits for that gives up: after its wait, of which what was waited before is a part,
// but for shortest. It counts.
type troubled struct {
	size           int64
	wait, shortest time.Duration
	tree           *Blob // is read first, if there is one
	asked          atomic.Int64
}

type sinceKey struct{}

func withSince(ctx context.Context, since time.Time) context.Context {
	return context.WithValue(ctx, sinceKey{}, since)
}

func (n *troubled) Fetch(ctx context.Context, _, _ int64) (io.ReadCloser, int64, int64, error) {
	n.asked.Add(1)
	if n.tree != nil {
		if err := n.tree.ReadAt(ctx, make([]byte, 1), 0); err != nil {
			return nil, 0, 0, err
		}
	}
	wait := n.wait
	if since, ok := ctx.Value(sinceKey{}).(time.Time); ok {
		wait = max(wait-time.Since(since), n.shortest)
	}
	return nil, 0, 0, cmp.Or(pause(ctx, wait), errServer)
}

// Who waits for another process, and then for the network, waits as if it had been for the network alone; also where what
// a chunk is verified by is waited for in the same way.
func TestWaitsAreOne(t *testing.T) {
	const shortest = 3 * time.Second
	treeDigest := "sha256:" + strings.Repeat("1", 64)
	for _, c := range []struct {
		name         string
		theirs, mine time.Duration // how long the network is waited for
		patience     time.Duration
		late         time.Duration // the second reader
		tree         bool
		want         time.Duration // its wait
		asked        int64         // by the second process, of the network
	}{
		{"behind one with the same wait", time.Minute, time.Minute, 20 * time.Second, time.Second, false, time.Minute, 1},
		{"behind one with a longer wait", time.Minute, 5 * time.Second, 5 * time.Second, time.Second, false, 5*time.Second + shortest, 1},
		{"behind one that gives up soon", 10 * time.Second, time.Minute, 20 * time.Second, time.Second, false, time.Minute, 1},
		{"a tree", time.Minute, time.Minute, 20 * time.Second, time.Second, true, time.Minute, 1},
		{"a tree, behind one with a longer wait", time.Hour, 5 * time.Second, 5 * time.Second, time.Second, true, 5*time.Second + shortest, 1},
		{"a tree, behind one that gives up soon", 10 * time.Second, time.Minute, 20 * time.Second, time.Second, true, time.Minute, 1},
	} {
		stage(t, func(t *testing.T) {
			dir := t.TempDir()
			process := func(wait time.Duration) (b *Blob, network *troubled) {
				o := Options{ChunkSize: cs, Readahead: -1, Patience: c.patience, Waiting: withSince}
				cache := openCacheAt(t, dir, o)
				network = &troubled{size: 4 * cs, wait: wait, shortest: shortest}
				data := network
				if c.tree {
					tree, err := cache.Open(treeDigest, cs, network, OpenOptions{Beneath: true, NoReadahead: true})
					if err != nil {
						t.Fatal(err)
					}
					data = &troubled{tree: tree}
				}
				b, err := cache.Open(testDigest, 4*cs, data, OpenOptions{})
				if err != nil {
					t.Fatal(err)
				}
				return b, network
			}
			a, _ := process(c.theirs)
			b, network := process(c.mine)
			first := make(chan error, 1)
			go func() { first <- a.ReadAt(ctx, make([]byte, 1), 0) }()
			time.Sleep(c.late)
			began := time.Now()
			if err := b.ReadAt(ctx, make([]byte, 1), 0); !errors.Is(err, errServer) {
				t.Errorf("%s: %v", c.name, err)
			}
			if took := time.Since(began); took < c.want || took > c.want+3*mostPause {
				t.Errorf("%s: waited %v, want %v", c.name, took, c.want)
			}
			if got := network.asked.Load(); got != c.asked {
				t.Errorf("%s: the network was asked %d times, want %d", c.name, got, c.asked)
			}
			if err := <-first; !errors.Is(err, errServer) {
				t.Errorf("%s: the first: %v", c.name, err)
			}
		})
	}
}

// What has come meanwhile begins the wait anew.
func TestWaitsAreOneFromWhatCameLast(t *testing.T) {
	stage(t, func(t *testing.T) {
		const wait, each = time.Minute, 15 * time.Second
		dir := t.TempDir()
		o := Options{ChunkSize: cs, Readahead: -1, Patience: 20 * time.Second, Waiting: withSince}
		s := newServer(4 * cs)
		slowly(s, 2, each)
		gate := make(chan struct{})
		s.gates[2*cs] = gate
		first := read(ctx, openBlob(t, openCacheAt(t, dir, o), s), s, 0, 4*cs)
		mustWait(t, "who fetches", first)
		network := &troubled{wait: wait, shortest: 3 * time.Second}
		b, err := openCacheAt(t, dir, o).Open(testDigest, 4*cs, network, OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if err := b.ReadAt(ctx, make([]byte, 4*cs), 0); !errors.Is(err, errServer) {
			t.Error(err)
		}
		if took := time.Since(began); took < 2*each+wait || took > 2*each+wait+4*mostPause {
			t.Errorf("waited %v, want %v", took, 2*each+wait)
		}
		close(gate)
		mustEnd(t, "who fetches", first, nil)
	})
}
