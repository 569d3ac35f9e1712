package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

const (
	// probes may leave for a host within probePeriod while it is not trusted. The
	// period is a little more than a second, since what leaves evenly does not
	// arrive evenly.
	probes      = 4
	probePeriod = 1100 * time.Millisecond
	// trust is how long a host that answered well is taken for one that will.
	trust = 2 * time.Second
	// maxRequests are under way at a time, whatever the hosts.
	maxRequests = 32
)

// A gate stands before one host:
//
//	trusted    it answered well less than trust ago, and nothing failed since
//	unknown    nothing is known: a few requests leave, the others wait for what becomes of them
//	troubled   the last that was heard of it is a failure: a few requests leave, the others fail
//
// So a thousand readers of a registry that is down are a few requests a second,
// and fewer as more of them stay without an answer. The first good answer lets all
// of them go on. Those who fail come back by their retry, which ends early with
// that answer; they may have another place to ask, too. A good answer is the first
// byte of a body, or anything that a new try would not change.
type gate struct {
	trouble error             // the last failure, if nothing good came after it
	since   time.Time         // when the first request left that failed since
	said    bool              // the log has a line about the trouble
	heard   time.Time         // when something good came
	open    int               // requests without an answer so far
	sent    [probes]time.Time // while it was not trusted
	oldest  int               // of sent
	turn    chan struct{}     // closed when one who waits may have less to wait for
	// slots are for those who have no answer: no more than there are connections.
	slots *semaphore.Weighted
}

func (g *gate) trusted(now time.Time) bool { return g.trouble == nil && now.Sub(g.heard) < trust }

// pass lets a request through, or says how long it is until the next may leave.
func (g *gate) pass(now time.Time) (wait time.Duration) {
	if g.trusted(now) {
		return 0
	}
	wait = g.sent[g.oldest].Add(probePeriod).Sub(now)
	if g.open >= probes {
		newest := g.sent[(g.oldest+probes-1)%probes]
		wait = max(wait, newest.Add(probePeriod<<min(g.open-probes, 5)).Sub(now))
	}
	if wait > 0 {
		return wait
	}
	g.sent[g.oldest] = now
	g.oldest = (g.oldest + 1) % probes
	return 0
}

// A heldError is a request that did not leave.
type heldError struct {
	host     string
	last     error // why
	recovery <-chan struct{}
}

func (e *heldError) Error() string {
	return fmt.Sprintf("%s is asked again in a moment; the last time: %v", e.host, e.last)
}

func (e *heldError) Unwrap() error { return e.last }

// A gateTransport has a gate for each host, and one limit for all.
type gateTransport struct {
	next    http.RoundTripper
	log     *slog.Logger
	perHost int64
	under   *semaphore.Weighted // maxRequests

	mu    sync.Mutex // guards what follows, and the gates
	gates map[string]*gate
	news  chan struct{} // closed when a troubled host answers well
}

func newGateTransport(next http.RoundTripper, perHost int) *gateTransport {
	return &gateTransport{next: next, log: slog.New(slog.DiscardHandler), perHost: int64(perHost), under: semaphore.NewWeighted(maxRequests), gates: map[string]*gate{}, news: make(chan struct{})}
}

// recovery is closed when a host that is troubled answers well again.
func (t *gateTransport) recovery() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.news
}

func (t *gateTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx, host := req.Context(), hostPort(req.URL)
	g := t.gate(host)
	if err := t.enter(ctx, host, g); err != nil {
		return nil, err
	}
	asked := asked{host, g, time.Now(), ofMirror(ctx)}
	resp, err := t.next.RoundTrip(req)
	if err != nil {
		t.under.Release(1)
		t.settle(ctx, asked, err)
		return nil, err
	}
	b := &gateBody{ReadCloser: resp.Body, leave: sync.OnceFunc(func() { t.under.Release(1) })}
	b.settle = func(err error) {
		b.settled.Do(func() { t.settle(ctx, asked, err) })
	}
	refusal := StatusError{Method: req.Method, URL: redact(req.URL), Code: resp.StatusCode}
	refusal.retryAfter = parseRetryAfter(resp.Header.Get("Retry-After"), time.Now())
	switch {
	case refusal.temporary():
		b.settle(&refusal)
	case resp.StatusCode >= 300:
		b.settle(nil)
	}
	resp.Body = b
	return resp, nil
}

func (t *gateTransport) gate(host string) *gate {
	t.mu.Lock()
	defer t.mu.Unlock()
	g := t.gates[host]
	if g == nil {
		g = &gate{turn: make(chan struct{}), slots: semaphore.NewWeighted(t.perHost)}
		t.gates[host] = g
	}
	return g
}

// enter returns when the request may leave; settle is due for it then. Who waits
// at a gate does not take the place of one who asks another host.
func (t *gateTransport) enter(ctx context.Context, host string, g *gate) (err error) {
	if g.slots.Acquire(ctx, 1) != nil {
		return context.Cause(ctx)
	}
	defer func() {
		if err != nil {
			g.slots.Release(1)
		}
	}()
	for {
		if t.under.Acquire(ctx, 1) != nil {
			return context.Cause(ctx)
		}
		wait, turn, err := t.pass(host, g)
		if err == nil && wait == 0 {
			return nil
		}
		t.under.Release(1)
		if err == nil {
			err = await(ctx, wait, turn)
		}
		if err != nil {
			return err
		}
	}
}

func (t *gateTransport) pass(host string, g *gate) (wait time.Duration, turn <-chan struct{}, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	wait = g.pass(time.Now())
	switch {
	case wait == 0:
		g.open++
	case g.trouble != nil:
		return 0, nil, &heldError{host, g.trouble, t.news}
	}
	return wait, g.turn, nil
}

// An asked request has left, for the host of a gate.
type asked struct {
	host   string
	gate   *gate
	at     time.Time
	mirror bool // nobody waits for this host
}

// errUnread settles a request whose answer nobody looked at.
var errUnread = errors.New("not read")

// settle takes note of what came of a request: nil is a good answer. An error that
// is not the host's, but of one who did not wait for it, say, is nothing.
func (t *gateTransport) settle(ctx context.Context, req asked, err error) {
	g := req.gate
	defer g.slots.Release(1)
	var said line
	defer func() { said.write(t.log) }() // when the lock is free: a log may be slow
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	g.open--
	trusted, trouble := g.trusted(now), g.trouble
	switch {
	case err == nil || neverBetter(err):
		said = g.wentWell(req, now, err)
		g.heard, g.trouble = now, nil
	case ctx.Err() == nil && worthRetrying(err):
		said = g.failed(req, now, err)
		g.trouble = err
	}
	if !trusted {
		close(g.turn)
		g.turn = make(chan struct{})
	}
	if trouble != nil && g.trouble == nil {
		close(t.news)
		t.news = make(chan struct{})
	}
}

// A gateBody tells the gate what comes of an answer.
type gateBody struct {
	io.ReadCloser
	leave   func()
	settled sync.Once
	settle  func(error)
}

func (b *gateBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if n > 0 || err == io.EOF {
		b.settle(nil)
	} else if err != nil {
		b.settle(err)
	}
	if err != nil {
		b.leave()
	}
	return n, err
}

func (b *gateBody) Close() error {
	defer b.leave()
	defer b.settle(errUnread)
	return b.ReadCloser.Close()
}

// refused takes note that an answer was looked at and is not what it should be: no new
// try would change that, and so it is good news of its host.
func refused(resp *http.Response) {
	if b, ok := resp.Body.(*gateBody); ok {
		b.settle(nil)
	}
}

// held returns what err is of a request that did not leave, or nil.
func held(err error) *heldError {
	var h *heldError
	errors.As(err, &h)
	return h
}

// await lets d pass, or less if something happens.
func await(ctx context.Context, d time.Duration, early <-chan struct{}) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-early:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
