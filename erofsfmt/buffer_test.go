package erofsfmt

import "testing"

func TestBufferClass(t *testing.T) {
	for _, c := range []struct {
		n, size int64
		class   int
	}{
		{0, 16 << 10, 0},
		{16 << 10, 16 << 10, 0},
		{16<<10 + 1, 20 << 10, 1},
		{20 << 10, 20 << 10, 1},
		{28<<10 + 1, 32 << 10, 4},
		{32 << 10, 32 << 10, 4},
		{32<<10 + 1, 40 << 10, 5},
		{1 << 20, 1 << 20, 24},
		{1<<20 + zstdSpare, 1280 << 10, 25},
		{2 << 20, 2 << 20, bufferClasses - 1},
		{2<<20 + 1, 2560 << 10, bufferClasses},
	} {
		if class, size := bufferClass(c.n); class != c.class || size != c.size {
			t.Errorf("%d bytes: class %d of %d bytes, want %d of %d", c.n, class, size, c.class, c.size)
		}
	}
	p := &bufferPool{}
	for _, n := range []int64{1, 16 << 10, 100_000, 3 << 20} {
		b := p.get(n)
		if int64(len(*b)) != n {
			t.Errorf("%d bytes for %d", len(*b), n)
		}
		p.put(b)
	}
}
