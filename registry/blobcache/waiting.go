package blobcache

import (
	"context"
	"time"
)

// A reader waits for several things one after the other: for another process to bring a chunk, then for its own fetch
// of it, and within that for what the chunk is verified by, which another process may be fetching, too. As long as nothing
// comes they share one wait. It is known by when it began, which goes along with the context of a fetch: to this package,
// if the fetch reads what lies beneath, and to who speaks with the network.

type waitingKey struct{}

// waitingSince is when the wait began that a read with ctx is a part of; zero if it is none.
func waitingSince(ctx context.Context) time.Time {
	since, _ := ctx.Value(waitingKey{}).(time.Time)
	return since
}

// context is that of what f has others do.
func (f *flight) context() context.Context { return f.waiting(f.blob.ctx) }

// waiting adds to ctx since when f has been waited for.
func (f *flight) waiting(ctx context.Context) context.Context {
	if f.since.IsZero() {
		return ctx
	}
	ctx = context.WithValue(ctx, waitingKey{}, f.since)
	if waiting := f.blob.store.cache.options.Waiting; waiting != nil {
		ctx = waiting(ctx, f.since)
	}
	return ctx
}
