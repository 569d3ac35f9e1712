package blobcache

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
)

// A preparing is a Fetcher that has to prepare, and looks who waits for it meanwhile.
type preparing struct {
	*server
	cache *Cache
	fail  error // guarded by mu

	mu       sync.Mutex // guards what follows
	asked    [][2]int64
	released int
	behind   bool // somebody had a turn at the disk
}

func (p *preparing) Prepare(_ context.Context, off, n int64) (func(), error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked = append(p.asked, [2]int64{off, n})
	if p.cache.loads.TryAcquire(maxLoads) {
		p.cache.loads.Release(maxLoads)
	} else {
		p.behind = true
	}
	if p.fail != nil {
		return nil, p.fail
	}
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.released++
	}, nil
}

// Chunks on disk are prepared for before there is a turn at the disk, and stay there if that fails.
func TestPrepareBeforeLoad(t *testing.T) {
	dir := t.TempDir() + "/cache"
	s := newServer(6*cs + 5)
	j := &judge{truth: s.content}
	first := openCacheAt(t, dir, Options{ChunkSize: cs, Readahead: -1})
	b := openWith(t, first, s, OpenOptions{Verify: j.verify})
	if err := readNow(ctx, b, s, 2*cs, 4*cs+5); err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	fetched := len(s.asked())

	c := openCacheAt(t, dir, Options{ChunkSize: cs, Readahead: -1})
	p := &preparing{server: s, cache: c, fail: errors.New("no network")}
	b, err := c.Open(testDigest, int64(len(s.content)), p, OpenOptions{Verify: j.verify})
	if err != nil {
		t.Fatal(err)
	}
	if err := readNow(ctx, b, s, 2*cs, 10); !errors.Is(err, p.fail) {
		t.Errorf("unprepared: %v", err)
	}
	p.mu.Lock()
	p.fail = nil
	p.mu.Unlock()
	if err := readNow(ctx, b, s, 2*cs, 4*cs+5); err != nil {
		t.Error(err)
	}
	if n := len(s.asked()) - fetched; n != 0 {
		t.Errorf("%d fetches of what is on disk", n)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	want := [][2]int64{{2 * cs, cs}, {2 * cs, 4*cs + 5}}
	if !slices.Equal(p.asked, want) || p.released != 1 || p.behind {
		t.Errorf("prepared %v, released %d times, behind somebody: %v; want %v", p.asked, p.released, p.behind, want)
	}
}
