package erofsfmt

import (
	"math/bits"
	"sync"
)

// The classes of a bufferPool are powers of two and three steps between each two,
// so that at most a fifth of a buffer is not used:
//
//	16 20 24 28 32 40 48 56 64 … 2048 KiB
//
// Larger buffers are rare and left to the collector.
const (
	smallestBufferBits = 14
	largestBufferBits  = 21
	bufferClasses      = 4*(largestBufferBits-smallestBufferBits) + 1
)

// A bufferPool lends buffers for encoded and decoded bytes.
type bufferPool struct {
	classes [bufferClasses]sync.Pool // of *[]byte: putting a slice back would allocate
}

// bufferClass is the smallest class for n bytes, and how much its buffers hold.
func bufferClass(n int64) (class int, size int64) {
	if n <= 1<<smallestBufferBits {
		return 0, 1 << smallestBufferBits
	}
	// The power of two below n, and how many quarters of it are on top.
	power := bits.Len64(uint64(n-1)) - 1
	step := int64(1) << (power - 2)
	quarters := (n - 1<<power + step - 1) / step
	return 4*(power-smallestBufferBits) + int(quarters), 1<<power + quarters*step
}

// get returns a buffer of n bytes with any content.
func (p *bufferPool) get(n int64) *[]byte {
	class, size := bufferClass(n)
	if class >= bufferClasses {
		b := make([]byte, n)
		return &b
	}
	if b, ok := p.classes[class].Get().(*[]byte); ok {
		*b = (*b)[:n]
		return b
	}
	b := make([]byte, n, size)
	return &b
}

// put takes a buffer back.
func (p *bufferPool) put(b *[]byte) {
	class, size := bufferClass(int64(cap(*b)))
	if class < bufferClasses && size == int64(cap(*b)) {
		p.classes[class].Put(b)
	}
}
