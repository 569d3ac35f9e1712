package fakeregistry

import (
	"testing"
	"time"
)

// On a link of 1000 bytes a second, by hand: at, n → the wait. Times are in
// milliseconds.
func TestLink(t *testing.T) {
	l := newLink(1000)
	begin := time.Now()
	for i, step := range []struct{ at, n, wait int64 }{
		{0, 10, 10},
		{0, 10, 20},  // behind the first, whoever sends it
		{15, 10, 15}, // the link is busy until 20
		{32, 10, 8},  // woke up 2 ms late: they are caught up with
		{45, 10, 5},  // exactly as late as can be
		{56, 10, 10}, // idle since 50: begins anew
		{1000, 1, 1},
		{1005, 1, 0}, // the rest of the delay is over already
	} {
		now := begin.Add(time.Duration(step.at) * time.Millisecond)
		if got, want := l.take(now, int(step.n)), time.Duration(step.wait)*time.Millisecond; got != want {
			t.Errorf("step %d: %d bytes at %d ms wait %v, want %v", i, step.n, step.at, got, want)
		}
	}
	if got := newLink(0).take(begin, 1<<30); got != 0 {
		t.Errorf("without a limit: %v", got)
	}
}
