package erofsfmt

import (
	"context"
	"sync"
)

// A cacheKey is where bytes were made from: a metadata page or a pcluster.
type cacheKey struct {
	at   place
	plen int64 // encoded bytes
	alg  uint8
}

// A cache remembers byte slices up to a limit and forgets the least recently
// used. What it returns is shared: nobody writes to it, and it stays valid
// after it was forgotten.
type cache struct {
	limit int64

	mu      sync.Mutex // guards all below
	used    int64
	entries map[cacheKey]*cacheEntry
	oldest  cacheEntry // the ring's anchor: next is the oldest, prev the newest
	flights map[cacheKey]*flight
}

type cacheEntry struct {
	key        cacheKey
	data       []byte
	prev, next *cacheEntry
}

// cost is what an entry counts: its data, and about what the entry and its place
// in the map take, so that many small values do not slip past the limit.
func (e *cacheEntry) cost() int64 { return int64(cap(e.data)) + 160 }

// A flight is a value in the making, so that parallel readers of one pcluster
// decode it once.
type flight struct {
	done chan struct{} // closed when data and ok are set
	data []byte
	ok   bool
}

func newCache(limit int64) *cache {
	c := &cache{limit: limit, entries: map[cacheKey]*cacheEntry{}, flights: map[cacheKey]*flight{}}
	c.oldest.prev, c.oldest.next = &c.oldest, &c.oldest
	return c
}

// get returns what is remembered under key if it has at least n bytes.
func (c *cache) get(key cacheKey, n int64) ([]byte, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.getLocked(key, n)
}

func (c *cache) getLocked(key cacheKey, n int64) ([]byte, bool) {
	e := c.entries[key]
	if e == nil || int64(len(e.data)) < n {
		return nil, false
	}
	c.unlink(e)
	c.link(e)
	return e.data, true
}

// fill returns at least n bytes for key, from memory or from build. A caller
// that finds another at work waits for it; if that one fails, the caller
// makes the value itself, since the failure may be the other's alone (its ctx
// ended).
func (c *cache) fill(ctx context.Context, key cacheKey, n int64, build func() ([]byte, error)) ([]byte, error) {
	for {
		c.mu.Lock()
		if data, ok := c.getLocked(key, n); ok {
			c.mu.Unlock()
			return data, nil
		}
		other := c.flights[key]
		if other == nil {
			break
		}
		c.mu.Unlock()
		select {
		case <-other.done:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		if other.ok && int64(len(other.data)) >= n {
			return other.data, nil
		}
	}
	f := &flight{done: make(chan struct{})}
	c.flights[key] = f
	c.mu.Unlock()
	defer c.land(key, f)
	data, err := build()
	if err != nil {
		return nil, err
	}
	f.data, f.ok = data, true
	return data, nil
}

// land ends a flight and keeps what it brought.
func (c *cache) land(key cacheKey, f *flight) {
	c.mu.Lock()
	delete(c.flights, key)
	if f.ok {
		c.keep(key, f.data)
	}
	c.mu.Unlock()
	close(f.done)
}

// keep stores data under key. The caller holds mu.
func (c *cache) keep(key cacheKey, data []byte) {
	if old := c.entries[key]; old != nil {
		c.drop(old)
	}
	e := &cacheEntry{key: key, data: data}
	if e.cost() > c.limit {
		return
	}
	for c.used+e.cost() > c.limit {
		c.drop(c.oldest.next)
	}
	c.entries[key] = e
	c.used += e.cost()
	c.link(e)
}

func (c *cache) drop(e *cacheEntry) {
	c.unlink(e)
	delete(c.entries, e.key)
	c.used -= e.cost()
}

// link makes e the newest.
func (c *cache) link(e *cacheEntry) {
	e.prev, e.next = c.oldest.prev, &c.oldest
	e.prev.next, e.next.prev = e, e
}

func (c *cache) unlink(e *cacheEntry) { e.prev.next, e.next.prev = e.next, e.prev }
