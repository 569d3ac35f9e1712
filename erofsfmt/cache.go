package erofsfmt

import (
	"context"
	"sync"
	"sync/atomic"
)

// A cacheKey is where bytes were made from: a metadata page or a pcluster.
type cacheKey struct {
	at    place
	plen  int64  // encoded bytes
	layer uint16 // as in Image
	alg   uint8
}

// A cache remembers byte slices up to a limit and forgets the least recently
// used.
type cache struct {
	limit int64

	mu      sync.Mutex // guards all below
	used    int64
	entries map[cacheKey]*cacheEntry
	oldest  cacheEntry // the ring's anchor: next is the oldest, prev the newest
	flights map[cacheKey]flight
}

type cacheEntry struct {
	key        cacheKey
	block      *block
	prev, next *cacheEntry
}

// cost is what an entry counts: its data, and about what the entry and its place
// in the map take, so that many small values do not slip past the limit.
func (e *cacheEntry) cost() int64 { return int64(cap(e.block.data)) + 160 }

// A block is a remembered slice. It is shared: nobody writes to it, and it stays
// valid after it was forgotten, until each who was handed it calls release. Who does
// not leaves it to the collector.
type block struct {
	data []byte
	from *bufferPool // takes data back, if not nil
	buf  *[]byte     // of from
	refs atomic.Int32
}

// newBlock makes a block of n bytes from a pool.
func newBlock(p *bufferPool, n int64) *block {
	buf := p.get(n)
	return &block{data: *buf, from: p, buf: buf}
}

// release says that a holder does not look at the data any more.
func (b *block) release() {
	if b.refs.Add(-1) == 0 && b.from != nil {
		b.from.put(b.buf)
	}
}

// A flight is a value in the making, so that parallel readers of one pcluster
// decode it once. It is closed when it has ended, whatever came of it.
type flight chan struct{}

func newCache(limit int64) *cache {
	c := &cache{limit: limit, entries: map[cacheKey]*cacheEntry{}, flights: map[cacheKey]flight{}}
	c.oldest.prev, c.oldest.next = &c.oldest, &c.oldest
	return c
}

// get returns what is remembered under key if it has at least n bytes.
func (c *cache) get(key cacheKey, n int64) (*block, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.getLocked(key, n)
}

func (c *cache) getLocked(key cacheKey, n int64) (*block, bool) {
	e := c.entries[key]
	if e == nil || int64(len(e.block.data)) < n {
		return nil, false
	}
	c.unlink(e)
	c.link(e)
	e.block.refs.Add(1)
	return e.block, true
}

// look is get, and says whether somebody is making the value.
func (c *cache) look(key cacheKey, n int64) (b *block, coming bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	b, _ = c.getLocked(key, n)
	return b, b == nil && c.flights[key] != nil
}

// wait returns when nobody is making the value of key.
func (c *cache) wait(ctx context.Context, key cacheKey) error {
	c.mu.Lock()
	f := c.flights[key]
	c.mu.Unlock()
	if f == nil {
		return nil
	}
	select {
	case <-f:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// fill returns at least n bytes for key, from memory or from build. A caller
// that finds another at work waits for it; if that one fails, the caller
// makes the value itself, since the failure may be the other's alone (its ctx
// ended).
func (c *cache) fill(ctx context.Context, key cacheKey, n int64, build func() (*block, error)) (*block, error) {
	c.mu.Lock()
	for {
		if b, ok := c.getLocked(key, n); ok {
			c.mu.Unlock()
			return b, nil
		}
		if c.flights[key] == nil {
			break
		}
		c.mu.Unlock()
		if err := c.wait(ctx, key); err != nil {
			return nil, err
		}
		c.mu.Lock()
	}
	f := make(flight)
	c.flights[key] = f
	c.mu.Unlock()
	var made *block
	defer func() { c.land(key, f, made) }()
	b, err := build()
	if err != nil {
		return nil, err
	}
	b.refs.Add(1) // the caller's
	made = b
	return b, nil
}

// land ends a flight and keeps what it brought, if anything.
func (c *cache) land(key cacheKey, f flight, made *block) {
	c.mu.Lock()
	delete(c.flights, key)
	if made != nil {
		c.keep(key, made)
	}
	c.mu.Unlock()
	close(f)
}

// keep stores a block under key. The caller holds mu.
func (c *cache) keep(key cacheKey, b *block) {
	if old := c.entries[key]; old != nil {
		c.drop(old)
	}
	e := &cacheEntry{key: key, block: b}
	if e.cost() > c.limit {
		return
	}
	for c.used+e.cost() > c.limit {
		c.drop(c.oldest.next)
	}
	b.refs.Add(1)
	c.entries[key] = e
	c.used += e.cost()
	c.link(e)
}

func (c *cache) drop(e *cacheEntry) {
	c.unlink(e)
	delete(c.entries, e.key)
	c.used -= e.cost()
	e.block.release()
}

// link makes e the newest.
func (c *cache) link(e *cacheEntry) {
	e.prev, e.next = c.oldest.prev, &c.oldest
	e.prev.next, e.next.prev = e, e
}

func (c *cache) unlink(e *cacheEntry) { e.prev.next, e.next.prev = e.next, e.prev }
