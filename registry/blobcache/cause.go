package blobcache

import (
	"context"
	"sync/atomic"
)

// A Cause is what bytes are fetched for.
type Cause string

const (
	Demand    Cause = "demand"    // somebody waits for them
	Readahead Cause = "readahead" // somebody will probably read them next
	Prefetch  Cause = "prefetch"  // Blob.Prefetch wants them
)

// cause is what the bytes of a chunk are fetched for that nobody is known to want.
func (f *flight) cause(chunk int64) Cause {
	switch {
	case f.background:
		return Prefetch
	case f.ahead && chunk >= f.demanded:
		return Readahead
	}
	return Demand
}

// label counts a fetch that is about to begin, and gives its context.
func (f *flight) label() context.Context {
	s := f.blob.store
	cause := f.cause(f.first)
	s.counters.fetches.Add(1)
	switch cause {
	case Readahead:
		s.counters.fetchesAhead.Add(1)
	case Prefetch:
		s.counters.fetchesPrefetch.Add(1)
	default:
		s.counters.fetchesDemand.Add(1)
	}
	if label := s.cache.options.Label; label != nil && !f.blob.beneath {
		return f.waiting(label(f.blob.ctx, cause))
	}
	return f.context()
}

// bytesOf gives where bytes are counted that are fetched for this cause.
func (c *counters) bytesOf(cause Cause) *atomic.Int64 {
	switch cause {
	case Readahead:
		return &c.bytesAhead
	case Prefetch:
		return &c.bytesPrefetch
	}
	return &c.bytesDemand
}
