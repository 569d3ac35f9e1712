package verified_test

import (
	"bytes"
	"errors"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/erofs-oci/erofs-oci/registry/verified"
)

// TestSame: a chunk is what it was when it came first, whoever asks and however often.
func TestSame(t *testing.T) {
	var told atomic.Int64
	s := verified.NewSame(func(error) { told.Add(1) })
	good, bad := random(1000), random(1000)
	bad[999] ^= 1
	for _, c := range []struct {
		p    []byte
		off  int64
		same bool
	}{
		{good, 0, true}, {bad, 1000, true}, // as good as any, the first time
		{good, 0, true}, {bad, 0, false}, {good, 1000, false}, {bad, 1000, true}, {good, 0, true},
		{good[:999], 0, false}, {good[:10], 2000, true}, {good[:11], 2000, false}, {bytes.Clone(good), 0, true},
	} {
		before := told.Load()
		err := s.Verify(t.Context(), c.p, c.off)
		var changed *verified.ChangedError
		if c.same != (err == nil) || !c.same && (!errors.As(err, &changed) || changed.Off != c.off || changed.Len != int64(len(c.p))) {
			t.Errorf("%d bytes at %d: %v", len(c.p), c.off, err)
		}
		if (told.Load() != before) == c.same {
			t.Errorf("%d bytes at %d: told %d times", len(c.p), c.off, told.Load()-before)
		}
	}
	// Of two who bring different bytes at the same time one is first.
	s = verified.NewSame(func(error) {})
	var failed atomic.Int64
	var both sync.WaitGroup
	for _, p := range [][]byte{good, bad} {
		both.Go(func() {
			if s.Verify(t.Context(), p, 0) != nil {
				failed.Add(1)
			}
		})
	}
	both.Wait()
	if failed.Load() != 1 {
		t.Errorf("%d of two different chunks were refused", failed.Load())
	}
}
