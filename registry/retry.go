package registry

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"
)

// Delays between tries: full jitter below a bound that doubles up to the cap.
// The cap is small, so that a registry which comes back is noticed soon.
const (
	backoffBase = 100 * time.Millisecond
	backoffCap  = 2 * time.Second
)

// A patience is how long one caller still waits for the network. Only time that
// passes between begin and end counts, and every byte of progress gives it all
// back. It belongs to one goroutine.
type patience struct {
	limit time.Duration // 0: a single try
	host  string        // for the error
	eager bool          // first contact: do not wait for a host that is not there
	// recovery is closed when a host that was in trouble answers again.
	recovery func() <-chan struct{}
	happened func(Event) // is told of each retry
	// Of the bytes of a blob, gaveUp is when it ran out, and usual the limit after
	// progress. Else nil and 0.
	gaveUp *atomic.Int64
	usual  time.Duration

	spent time.Duration // before since
	since time.Time
	tries int   // failed since the last progress
	held  int   // did not leave since the last progress
	last  error // the most telling of their errors
}

func (p *patience) begin() { p.since = time.Now() }
func (p *patience) end()   { p.spent += time.Since(p.since) }

func (p *patience) progress() {
	p.spent, p.tries, p.held, p.last = 0, 0, 0, nil
	p.since = time.Now()
	if p.gaveUp != nil {
		p.gaveUp.Store(0)
		p.limit = p.usual
	}
}

// heard says that something moved at that time: what passed since begin and before
// it was no waiting. Unlike progress it gives back nothing that was spent before.
func (p *patience) heard(at time.Time) {
	if at.After(p.since) {
		p.since = at
	}
}

func (p *patience) waited() time.Duration { return p.spent + time.Since(p.since) }
func (p *patience) left() time.Duration   { return p.limit - p.waited() }

// watch is the bound for a single try: what is left, or next to nothing where
// that is already over. Without a limit the no-progress timeout is bound enough.
func (p *patience) watch() time.Duration {
	if p.limit == 0 {
		return 24 * time.Hour
	}
	return max(p.left(), 0)
}

// again is called with the error of a try. It returns nil when it is time for
// the next one, else the error for the caller.
//
// Some of the time is kept back for a last try, which so begins and ends before
// the limit.
func (p *patience) again(ctx context.Context, err error) error {
	if held(err) != nil {
		p.held++
	} else {
		p.tries++
	}
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case !worthRetrying(err):
		return err
	case p.eager && nobodyThere(err):
		return fmt.Errorf("no registry at %s: %w", p.host, err)
	}
	if p.last == nil || !errors.Is(err, errOutOfTime) && held(err) == nil {
		p.last = err
	}
	reserve := min(time.Second, p.limit/10)
	room := p.left() - reserve
	if room <= 0 {
		if p.gaveUp != nil {
			p.gaveUp.Store(time.Now().UnixNano())
		}
		return &UnavailableError{Host: p.host, Waited: p.waited(), Tries: p.tries, Err: p.last}
	}
	d, early := p.delay(err)
	if err := await(ctx, min(d, room), early); err != nil {
		return err
	}
	if held(err) == nil {
		p.happened(EventRetry)
	}
	return nil
}

// delay is the backoff, which ends when a host recovers, or what the server asked
// for where that is longer.
func (p *patience) delay(err error) (d time.Duration, early <-chan struct{}) {
	top := min(backoffCap, backoffBase<<min(p.tries+p.held-1, 10))
	d = rand.N(top)
	if h := held(err); h != nil {
		return d, h.recovery
	}
	var status *StatusError
	if errors.As(err, &status) && status.retryAfter > d {
		return status.retryAfter, nil
	}
	return d, p.recovery()
}

// errOutOfTime ends a try that is still under way when patience runs out.
var errOutOfTime = errors.New("no answer")

// retry runs try until it succeeds or patience ends.
func retry(ctx context.Context, p *patience, try func(context.Context) error) error {
	p.begin()
	defer p.end()
	for {
		err := within(ctx, p, try)
		if err == nil {
			p.progress()
			return nil
		}
		if err := p.again(ctx, err); err != nil {
			return err
		}
	}
}

func within(ctx context.Context, p *patience, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, p.watch(), &wireError{errOutOfTime})
	defer cancel()
	return try(ctx)
}
