package blobcache

import "sync/atomic"

// cacheCounters are those of all blobs.
type cacheCounters struct {
	inFlight, evictions, evictedBytes, refused, damaged atomic.Int64
}

// CacheStats says what the whole cache does, and did since it was opened by this process.
type CacheStats struct {
	// Bytes is how much the directory takes for all processes, and up to some MiB too many for each of them, since they
	// take room in advance. -1: nobody knows just now.
	Bytes int64
	Limit int64 // for Bytes; 0: none

	Evictions    int64 // regions that were evicted, by this process
	EvictedBytes int64 // chunks that were in them

	InFlight int64 // fetches under way, whatever for
	Waiting  int64 // reads that wait

	Refused int64 // chunks, fetched or from the disk, that a Verify hook did not let in
	Damaged int64 // times that chunks on disk were not what had been written

	// Blobs is what all blobs counted, those that were closed included, and Beneath the same of those that others are
	// verified by (see OpenOptions.Beneath). Neither says anything of chunks.
	Blobs, Beneath Stats
}

// Stats of the cache.
func (c *Cache) Stats() CacheStats {
	used, ok := c.space.read()
	if !ok {
		used = -1 // it is just being written, or must be counted anew
	}
	blobs, beneath := c.counted()
	return CacheStats{
		Bytes:        used,
		Limit:        c.space.limit,
		Evictions:    c.counters.evictions.Load(),
		EvictedBytes: c.counters.evictedBytes.Load(),
		InFlight:     c.counters.inFlight.Load(),
		Waiting:      c.background.readers(),
		Refused:      c.counters.refused.Load(),
		Damaged:      c.counters.damaged.Load(),
		Blobs:        blobs,
		Beneath:      beneath,
	}
}

// counted is what the stores counted, those included that are gone.
func (c *Cache) counted() (blobs, beneath Stats) {
	c.mu.Lock()
	defer c.mu.Unlock()
	sum := c.past
	for _, s := range c.stores {
		sum.add(s)
	}
	for s := range c.orphans {
		sum.add(s)
	}
	return sum.blobs, sum.beneath
}

// storeCounts add up what stores counted.
type storeCounts struct{ blobs, beneath Stats }

// add adds a store. The caller holds the cache's mu.
func (c *storeCounts) add(s *store) {
	sum, st := &c.blobs, s.stats()
	if s.beneath {
		sum = &c.beneath
	}
	sum.Fetches += st.Fetches
	sum.FetchesDemand += st.FetchesDemand
	sum.FetchesAhead += st.FetchesAhead
	sum.FetchesPrefetch += st.FetchesPrefetch
	sum.BytesFetched += st.BytesFetched
	sum.BytesDemand += st.BytesDemand
	sum.BytesAhead += st.BytesAhead
	sum.BytesPrefetch += st.BytesPrefetch
	sum.BytesServed += st.BytesServed
	sum.Hits += st.Hits
	sum.Misses += st.Misses
}
