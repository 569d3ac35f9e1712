package registry

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// parcels are the bodies of an upload, of which one at a time is under way. They
// are read by net/http, which may go on reading one for a while after its request
// has failed; none is read, and nothing called, once stop has returned.
type parcels struct {
	content  io.ReaderAt
	progress func(int64)

	mu      sync.Mutex // guards what follows, and is held while content is read
	current *parcel
	limit   *time.Timer   // ends the round
	room    time.Duration // after the last byte
	last    time.Time
	total   int64
	err     error // of content
}

// allow has limit end what is under way room after the last byte has left.
func (ps *parcels) allow(limit *time.Timer, room time.Duration) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	ps.limit, ps.room = limit, room
	limit.Reset(room)
}

// next is the body with the bytes from off to end. The one before it ends.
func (ps *parcels) next(off, end int64) *parcel {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	ps.current = &parcel{all: ps, pos: off, end: end}
	return ps.current
}

// stop ends the body that is under way, and says when the last byte has left.
func (ps *parcels) stop() time.Time {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	ps.current = nil
	return ps.last
}

func (ps *parcels) sent() int64 {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	return ps.total
}

// broken is what was wrong with the content; nil where it was the network.
func (ps *parcels) broken() error {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	return ps.err
}

// A parcel is a part of a blob on its way. pos is guarded by parcels.mu.
type parcel struct {
	all      *parcels
	pos, end int64
}

var errStopped = errors.New("request is over")

func (p *parcel) Read(b []byte) (int, error) {
	ps := p.all
	ps.mu.Lock()
	defer ps.mu.Unlock()
	switch {
	case ps.current != p:
		return 0, errStopped
	case ps.err != nil:
		return 0, ps.err
	case p.pos == p.end:
		return 0, io.EOF
	case len(b) == 0:
		return 0, nil
	}
	n, err := ps.content.ReadAt(b[:min(int64(len(b)), p.end-p.pos)], p.pos)
	if n == 0 {
		if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		ps.err = fmt.Errorf("reading what is to be sent at %d of %d: %w", p.pos, p.end, err)
		return 0, ps.err
	}
	p.pos += int64(n)
	ps.total += int64(n)
	ps.last = time.Now()
	ps.limit.Reset(ps.room)
	if ps.progress != nil {
		ps.progress(p.pos)
	}
	return n, nil
}

// Close is net/http's, which is done with the body.
func (p *parcel) Close() error { return nil }
