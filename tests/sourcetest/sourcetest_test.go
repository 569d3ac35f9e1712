package sourcetest

import (
	"context"
	"errors"
	"testing"
	"time"
)

func TestMemory(t *testing.T) {
	Run(t, func(t *testing.T, content []byte) Source { return Memory(content) })
}

func TestSlow(t *testing.T) {
	Run(t, func(t *testing.T, content []byte) Source { return Slow(Memory(content), 100*time.Microsecond) })
}

func TestFlaky(t *testing.T) {
	RunFaulty(t, 50, func(t *testing.T, content []byte) Source { return Flaky(Memory(content), 3) })

	s := Flaky(Memory(Content(10)), 3)
	for i := 1; i <= 9; i++ {
		err := s.ReadAt(context.Background(), make([]byte, 10), 0)
		if failed := errors.Is(err, ErrFlaky); failed != (i%3 == 0) || (err != nil) != failed {
			t.Errorf("read %d: %v", i, err)
		}
	}
}

// A check that cannot fail proves nothing: each lie must be noticed.
func TestSuiteSeesLies(t *testing.T) {
	content := Content(100_000)
	for name, s := range map[string]Source{
		"short":   lie{Memory(content), func(p []byte) { clear(p[len(p)-1:]) }},
		"zeros":   lie{Memory(content), func(p []byte) { clear(p) }},
		"shifted": lie{Memory(content), func(p []byte) { copy(p, p[1:]) }},
	} {
		if err := readFaulty(s, 1, content, 1000, 5000); err == nil {
			t.Errorf("%s: not noticed", name)
		}
	}
}

type lie struct {
	Source
	tell func(p []byte)
}

func (l lie) ReadAt(ctx context.Context, p []byte, off int64) error {
	err := l.Source.ReadAt(ctx, p, off)
	l.tell(p)
	return err
}
