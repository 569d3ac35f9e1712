// Package sourcetest is the text of the seam as a test suite: what every source of bytes in this module promises to
// those who read from it. Whoever writes one runs Run on it.
//
//	ReadAt fills all of p from off, or returns a non-nil error; there is no short read.
//	Calls may run in parallel. p is not kept after the call.
//
// A source over something that can fail is also run through RunFaulty, which lets reads fail but not lie.
//
// The package also has the sources that such tests are built of: Memory, and the decorators Flaky and Slow.
package sourcetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"
)

// Source is the seam.
type Source interface {
	ReadAt(ctx context.Context, p []byte, off int64) error
	Size() int64
}

// patience is how long a read whose context has ended may take to return.
const patience = 10 * time.Second

// sizes of contents: nothing, less than, as much as and more than what sources are likely to cut their bytes into.
var sizes = []int{0, 1, 511, 4096, 4097, 256 << 10, 256<<10 + 1, 1<<20 - 1}

// Run checks that the sources that open makes of some content keep the contract. What open makes it also closes,
// by t.Cleanup.
func Run(t *testing.T, open func(t *testing.T, content []byte) Source) {
	for _, size := range sizes {
		t.Run(fmt.Sprintf("size %d", size), func(t *testing.T) {
			content := Content(size)
			s := open(t, slices.Clone(content))
			if got := s.Size(); got != int64(size) {
				t.Fatalf("Size() = %d, want %d", got, size)
			}
			t.Run("inside", func(t *testing.T) { testInside(t, s, content) })
			t.Run("outside", func(t *testing.T) { testOutside(t, s, content) })
			t.Run("whole", func(t *testing.T) { read(t, s, content, 0, size) })
		})
	}
	content := Content(1<<20 + 12345)
	t.Run("random", func(t *testing.T) {
		s := open(t, slices.Clone(content))
		rng := rand.New(rand.NewPCG(1, 2))
		for range 200 {
			off, n := somewhere(rng, len(content))
			read(t, s, content, off, n)
		}
	})
	t.Run("parallel", func(t *testing.T) { testParallel(t, open(t, slices.Clone(content)), content) })
	t.Run("same buffer, same place, parallel", func(t *testing.T) { testSamePlace(t, open(t, slices.Clone(content)), content) })
	t.Run("buffer is not kept", func(t *testing.T) { testNotKept(t, open(t, slices.Clone(content)), content) })
	t.Run("ended context", func(t *testing.T) { testEnded(t, open(t, slices.Clone(content)), content) })
}

// RunFaulty checks sources whose reads may fail: one that does not fail is right, and one that fails succeeds if it
// is tried again, at most tries times in all.
func RunFaulty(t *testing.T, tries int, open func(t *testing.T, content []byte) Source) {
	content := Content(1<<20 + 12345)
	s := open(t, slices.Clone(content))
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(3, uint64(i)))
			for range 100 {
				off, n := somewhere(rng, len(content))
				if err := readFaulty(s, tries, content, off, n); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func readFaulty(s Source, tries int, content []byte, off, n int) error {
	p := make([]byte, n)
	var err error
	for range tries {
		if err = s.ReadAt(context.Background(), p, int64(off)); err != nil {
			continue
		}
		if !bytes.Equal(p, content[off:off+n]) {
			return fmt.Errorf("read of %d at %d: nil error, wrong bytes", n, off)
		}
		return nil
	}
	return fmt.Errorf("read of %d at %d failed %d times, at last with: %w", n, off, tries, err)
}

// Content is size bytes of which no two runs of eight at different places are equal, so that bytes from a wrong
// place are noticed; none of them is zero, so that a hole is.
func Content(size int) []byte {
	rng := rand.New(rand.NewPCG(uint64(size), 0))
	content := make([]byte, size)
	for i := range content {
		content[i] = byte(1 + rng.IntN(255))
	}
	return content
}

func somewhere(rng *rand.Rand, size int) (off, n int) {
	off = rng.IntN(size)
	return off, rng.IntN(min(size-off, 1<<(1+rng.IntN(20)))) + 1
}

// read reads into the middle of a larger buffer, to see that nothing is written beside p.
func read(t *testing.T, s Source, content []byte, off, n int) {
	t.Helper()
	const margin = 8
	guard := bytes.Repeat([]byte{0xA5}, margin)
	buf := slices.Concat(guard, make([]byte, n), guard)
	p := buf[margin : margin+n : margin+n]
	if err := s.ReadAt(context.Background(), p, int64(off)); err != nil {
		t.Fatalf("ReadAt(%d bytes, %d) of %d: %v", n, off, len(content), err)
	}
	if !bytes.Equal(p, content[off:off+n]) {
		t.Fatalf("ReadAt(%d bytes, %d) of %d: nil error, wrong bytes", n, off, len(content))
	}
	if !bytes.Equal(buf[:margin], guard) || !bytes.Equal(buf[margin+n:], guard) {
		t.Fatalf("ReadAt(%d bytes, %d) of %d: wrote outside p", n, off, len(content))
	}
}

func testInside(t *testing.T, s Source, content []byte) {
	size := len(content)
	for _, off := range []int{0, 1, size / 2, size - 4096, size - 1, size} {
		for _, n := range []int{0, 1, 2, 4096, 4097, size / 2, size} {
			if off >= 0 && off+n <= size {
				read(t, s, content, off, n)
			}
		}
	}
	if err := s.ReadAt(context.Background(), nil, int64(size)); err != nil {
		t.Errorf("empty read at the end: %v", err)
	}
}

func testOutside(t *testing.T, s Source, content []byte) {
	size := int64(len(content))
	for _, r := range []struct {
		off int64
		n   int
	}{
		{size, 1}, {size - 1, 2}, {0, len(content) + 1}, {size + 1, 0}, {size + 1, 1}, {size / 2, len(content) + 4096},
		{-1, 0}, {-1, 1}, {-1, 2}, {-size, 1}, {math.MinInt64, 1}, {math.MinInt64, 0},
		{math.MaxInt64, 1}, {math.MaxInt64, 0}, {math.MaxInt64 - 1, 4096}, {1 << 32, 1}, {1 << 62, 1},
	} {
		if r.off >= 0 && r.off <= size && int64(r.n) <= size-r.off {
			continue // -size of an empty content is the beginning
		}
		if err := s.ReadAt(context.Background(), make([]byte, r.n), r.off); err == nil {
			t.Errorf("ReadAt(%d bytes, %d) of %d bytes: no error", r.n, r.off, size)
		}
	}
}

func testParallel(t *testing.T, s Source, content []byte) {
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(5, uint64(i)))
			for range 50 {
				off, n := somewhere(rng, len(content))
				if err := readFaulty(s, 1, content, off, n); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func testSamePlace(t *testing.T, s Source, content []byte) {
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			if err := readFaulty(s, 1, content, 300_000, 400_000); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// testNotKept writes over each buffer as soon as its read is over, while other reads run: a source that still wrote
// to it would be seen here, and one that still read from it would by the others.
func testNotKept(t *testing.T, s Source, content []byte) {
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(7, uint64(i)))
			p := make([]byte, 64<<10)
			for range 50 {
				off := rng.IntN(len(content) - len(p))
				if err := s.ReadAt(context.Background(), p, int64(off)); err != nil {
					t.Error(err)
					return
				}
				if !bytes.Equal(p, content[off:off+len(p)]) {
					t.Errorf("read of %d at %d: nil error, wrong bytes", len(p), off)
					return
				}
				clear(p)
			}
			if slices.ContainsFunc(p, func(b byte) bool { return b != 0 }) {
				t.Error("a buffer was written to after its read had ended")
			}
		})
	}
	wg.Wait()
}

// testEnded reads with a context that has ended, and with one that ends while the read is under way: the read comes
// back soon, and if it did not fail it is right. A later read is not disturbed.
func testEnded(t *testing.T, s Source, content []byte) {
	for _, delay := range []time.Duration{0, 50 * time.Microsecond} {
		ctx, cancel := context.WithCancel(context.Background())
		if delay == 0 {
			cancel()
		} else {
			time.AfterFunc(delay, cancel)
		}
		p := make([]byte, len(content)/2)
		off := len(content) / 4
		done := make(chan error, 1)
		go func() { done <- s.ReadAt(ctx, p, int64(off)) }()
		select {
		case err := <-done:
			if err == nil && !bytes.Equal(p, content[off:off+len(p)]) {
				t.Error("ended context: nil error, wrong bytes")
			}
			if err != nil && !errors.Is(err, context.Canceled) {
				t.Errorf("ended context: error %v does not wrap context.Canceled", err)
			}
		case <-time.After(patience):
			t.Fatalf("a read whose context ended did not return within %v", patience)
		}
		cancel()
	}
	read(t, s, content, 0, len(content))
}
