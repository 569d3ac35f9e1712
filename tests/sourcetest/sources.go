package sourcetest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"
)

// ErrFlaky is what Flaky's failed reads return.
var ErrFlaky = errors.New("injected fault")

// Memory is content as a source.
func Memory(content []byte) Source { return memory(content) }

type memory []byte

func (m memory) Size() int64 { return int64(len(m)) }

func (m memory) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if off < 0 || off > int64(len(m)) || len(p) > len(m)-int(off) {
		return fmt.Errorf("read %d bytes at %d of %d: %w", len(p), off, len(m), io.ErrUnexpectedEOF)
	}
	copy(p, m[off:])
	return nil
}

// Flaky is s, but every k-th read fails with ErrFlaky, with p half filled: nobody may use it.
func Flaky(s Source, k int64) Source { return &flaky{Source: s, k: k} }

type flaky struct {
	Source
	k     int64
	reads atomic.Int64
}

func (f *flaky) ReadAt(ctx context.Context, p []byte, off int64) error {
	if f.reads.Add(1)%f.k != 0 {
		return f.Source.ReadAt(ctx, p, off)
	}
	if err := f.Source.ReadAt(ctx, p[:len(p)/2], off); err != nil {
		return err
	}
	return fmt.Errorf("read %d bytes at %d: %w", len(p), off, ErrFlaky)
}

// Slow is s, but every read takes at least d, or until its context ends.
func Slow(s Source, d time.Duration) Source { return slow{s, d} }

type slow struct {
	Source
	d time.Duration
}

func (s slow) ReadAt(ctx context.Context, p []byte, off int64) error {
	timer := time.NewTimer(s.d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return s.Source.ReadAt(ctx, p, off)
	case <-ctx.Done():
		return ctx.Err()
	}
}
