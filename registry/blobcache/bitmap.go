package blobcache

import (
	"iter"
	"math/bits"
	"sync/atomic"
)

// A bitmap is read without a lock.
type bitmap []atomic.Uint64

func newBitmap(n int64) bitmap { return make(bitmap, (n+63)/64) }

func (m bitmap) word(i int64) uint64 { return m[i].Load() }

func (m bitmap) has(i int64) bool { return m[i/64].Load()>>(i%64)&1 != 0 }

func (m bitmap) set(i int64) { m[i/64].Or(1 << (i % 64)) }

func (m bitmap) clear(i int64) { m[i/64].And(^(1 << (i % 64))) }

// reset clears all bits.
func (m bitmap) reset() {
	for i := range m {
		if m[i].Load() != 0 {
			m[i].Store(0)
		}
	}
}

// any says whether a bit of [first, end) is set.
func (m bitmap) any(first, end int64) bool {
	for first < end {
		n := min(64-first%64, end-first)
		if m[first/64].Load()&(^uint64(0)>>(64-n)<<(first%64)) != 0 {
			return true
		}
		first += n
	}
	return false
}

// all says whether every bit of [first, end) is set.
func (m bitmap) all(first, end int64) bool {
	for first < end {
		n := min(64-first%64, end-first)
		want := ^uint64(0) >> (64 - n) << (first % 64)
		if m[first/64].Load()&want != want {
			return false
		}
		first += n
	}
	return true
}

// ones gives the bits of [first, end) that are set, in order. They may change meanwhile.
func (m bitmap) ones(first, end int64) iter.Seq[int64] {
	return func(yield func(int64) bool) {
		for i := first; i < end; i++ {
			if !m.has(i) {
				if i = runEnd(m, i, end); i == end {
					return
				}
			}
			if !yield(i) {
				return
			}
		}
	}
}

// runEnd says where the run ends, or [first, end) if it does before, of bits that are as the first one. It looks at each
// word once.
func runEnd[M interface{ word(i int64) uint64 }](m M, first, end int64) int64 {
	in := m.word(first/64)>>(first%64)&1 != 0
	for at := first; at < end; at += 64 - at%64 {
		w := m.word(at / 64)
		if in {
			w = ^w
		}
		if w = w >> (at % 64); w != 0 {
			return min(at+int64(bits.TrailingZeros64(w)), end)
		}
	}
	return end
}
