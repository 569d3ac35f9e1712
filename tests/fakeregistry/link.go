package fakeregistry

import (
	"sync"
	"time"
)

// A link shares a number of bytes a second among all who send.
type link struct {
	bytesPerSecond int64 // 0: no limit

	mu   sync.Mutex
	free time.Time // when all that was taken so far is through
}

func newLink(bytesPerSecond int64) *link { return &link{bytesPerSecond: bytesPerSecond} }

// take books n bytes and returns how long it takes until they are through.
func (l *link) take(n int) time.Duration {
	if l.bytesPerSecond <= 0 {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if l.free.Before(now) {
		l.free = now
	}
	l.free = l.free.Add(time.Duration(float64(n) / float64(l.bytesPerSecond) * float64(time.Second)))
	return l.free.Sub(now)
}
