package nbdserve

import (
	"context"
	"math/bits"
	"sync"
	"time"
)

const (
	// smallRead is the largest read that the reading goroutine answers, and that needs no share of the memory for
	// large ones.
	smallRead = 512 << 10
	// minBuffer and bufferClasses: buffers of 4 KiB, 8 KiB … 32 MiB of data.
	minBuffer     = 4 << 10
	bufferClasses = 14
	// headRoom is what a buffer has beside its data.
	headRoom = 64
)

// A buffer holds replies.
type buffer struct {
	b     []byte // its capacity does not change
	class int
}

// bufferPool is where the buffers of all connections come from: an idle
// connection has none.
type bufferPool struct {
	classes [bufferClasses]sync.Pool
}

// get gives an empty buffer for n bytes of data and headRoom.
func (p *bufferPool) get(n int) *buffer {
	class := bits.Len(uint(max(n, minBuffer)-1)) - bits.Len(minBuffer-1)
	if b, ok := p.classes[class].Get().(*buffer); ok {
		return b
	}
	return &buffer{make([]byte, 0, minBuffer<<class+headRoom), class}
}

func (p *bufferPool) put(b *buffer) {
	b.b = b.b[:0]
	p.classes[b.class].Put(b)
}

const (
	// largeMemory is what replies of more than smallRead may hold at a time, in shares.
	largeMemory = 128 << 20
	largeShare  = 1 << 20
	// starving is how long a large read waits for memory before a connection that takes nothing is closed for it.
	starving = 10 * time.Second
)

// A budget has the shares of the memory for large replies.
type budget struct {
	turn   chan struct{} // held by the one who takes shares, so that two do not wait for each other's
	shares chan struct{}
}

func newBudget(shares int) *budget {
	return &budget{turn: make(chan struct{}, 1), shares: make(chan struct{}, shares)}
}

func sharesOf(n int) int { return (n + largeShare - 1) / largeShare }

// take takes n shares, or fails when ctx ends. It calls starved as long as there
// are none.
func (b *budget) take(ctx context.Context, n int, starved func()) error {
	select {
	case b.turn <- struct{}{}:
		defer func() { <-b.turn }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	timer := time.NewTicker(starving)
	defer timer.Stop()
	for taken := 0; taken < n; {
		select {
		case b.shares <- struct{}{}:
			taken++
		case <-timer.C:
			starved()
		case <-ctx.Done():
			b.give(taken)
			return context.Cause(ctx)
		}
	}
	return nil
}

func (b *budget) give(n int) {
	for range n {
		<-b.shares
	}
}

// A stall is how long large replies of a connection wait for their client.
type stall struct {
	mu      sync.Mutex // guards what follows
	replies int
	since   time.Time // that the client last took something, while there are replies
}

func (s *stall) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.replies++; s.replies == 1 {
		s.since = time.Now()
	}
}

func (s *stall) moved() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.since = time.Now()
}

func (s *stall) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.replies--
}

func (s *stall) duration() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.replies == 0 {
		return 0
	}
	return time.Since(s.since)
}
