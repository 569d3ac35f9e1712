package erofsfmt

import "sync"

// bufferSizes are the classes of a bufferPool. Larger buffers are rare and left
// to the collector.
var bufferSizes = [...]int64{16 << 10, 64 << 10, 256 << 10, 1 << 20, 1<<20 + zstdSpare}

// A bufferPool lends buffers for encoded bytes and the like.
type bufferPool struct {
	classes [len(bufferSizes)]sync.Pool // of *[]byte: putting a slice back would allocate
}

// get returns a buffer of n bytes with any content.
func (p *bufferPool) get(n int64) *[]byte {
	for i, size := range bufferSizes {
		if n > size {
			continue
		}
		if b, ok := p.classes[i].Get().(*[]byte); ok {
			*b = (*b)[:n]
			return b
		}
		b := make([]byte, n, size)
		return &b
	}
	b := make([]byte, n)
	return &b
}

// put takes a buffer back.
func (p *bufferPool) put(b *[]byte) {
	for i, size := range bufferSizes {
		if int64(cap(*b)) == size {
			p.classes[i].Put(b)
			return // b is somebody else's now
		}
	}
}
