package mkerofs

import "sync"

// buffers are used again, so that a build does not leave one of each for every file. There are two sizes, since most
// files are small.
type buffers struct{ small, large sync.Pool }

const smallBuffer = 256 << 10

// get gives a buffer of n bytes. What they are is chance.
func (b *buffers) get(n int) []byte {
	pool, size := &b.large, max(n, maxSegment)
	if n <= smallBuffer {
		pool, size = &b.small, smallBuffer
	}
	if p, ok := pool.Get().(*[]byte); ok && cap(*p) >= n {
		return (*p)[:n]
	}
	return make([]byte, n, size)
}

func (b *buffers) put(p []byte) {
	switch {
	case cap(p) >= maxSegment:
		b.large.Put(&p)
	case cap(p) >= smallBuffer:
		b.small.Put(&p)
	}
}
