package registry

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"sync"
	"time"
)

// A wireTransport is the last stage before net/http. It gives up on a peer that
// is silent for too long, ends all requests when the Client is closed, and turns
// what goes wrong into a *wireError without secrets.
type wireTransport struct {
	next       http.RoundTripper
	queues     bool // next may hold a request back until a connection is free
	noProgress time.Duration
	base       context.Context // ends when the Client is closed
	userAgent  string
	observer   Observer // may be nil
}

func (t *wireTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	stopClose := context.AfterFunc(t.base, func() { cancel(errClosed) })
	host := req.URL.Host
	silence := time.AfterFunc(t.noProgress, func() {
		cancel(&wireError{fmt.Errorf("no byte from %s for %v", host, t.noProgress)})
	})
	release := func() {
		silence.Stop()
		stopClose()
		cancel(nil)
	}
	traced := ctx
	began := time.Now()
	if t.queues {
		// Waiting for one of the connections that others hold is no silence.
		silence.Stop()
		traced = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
			GotConn: func(httptrace.GotConnInfo) { silence.Reset(t.noProgress) },
		})
	}
	req = req.Clone(traced)
	req.Header.Set("User-Agent", t.userAgent)
	leaving := &departure{silence: silence, noProgress: t.noProgress}
	watchBody(req, leaving.sign)
	resp, err := t.next.RoundTrip(req)
	leaving.end()
	silence.Stop()
	if err != nil {
		err = wireFailure(ctx, err)
		release()
		if t.observer != nil {
			t.answered(req, 0, time.Since(began))
		}
		return nil, err
	}
	resp.Request = req
	body := &wireBody{body: resp.Body, ctx: ctx, silence: silence, noProgress: t.noProgress, release: release}
	if t.observer != nil {
		body.observer, body.answer = t.observer, t.answered(req, resp.StatusCode, time.Since(began))
	}
	resp.Body = body
	return resp, nil
}

// A departure is the body of a request on its way out: while it is read, the peer
// takes it, which is as good as hearing from it.
type departure struct {
	silence    *time.Timer
	noProgress time.Duration

	mu   sync.Mutex // guards over, and that nobody resets the timer after end
	over bool
}

// sign has the silence begin anew.
func (d *departure) sign() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.over {
		d.silence.Reset(d.noProgress)
	}
}

// end is due when there is an answer. net/http may read on after one that came
// early; the timer is then the answer's.
func (d *departure) end() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.over = true
}

// watchBody has sign called for each read of req's body, also where net/http takes a
// second one for another try.
func watchBody(req *http.Request, sign func()) {
	if req.Body == nil || req.Body == http.NoBody {
		return
	}
	req.Body = &watchedBody{req.Body, sign}
	if again := req.GetBody; again != nil {
		req.GetBody = func() (io.ReadCloser, error) {
			body, err := again()
			if err != nil {
				return nil, err
			}
			return &watchedBody{body, sign}, nil
		}
	}
}

type watchedBody struct {
	io.ReadCloser
	sign func()
}

func (b *watchedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.sign()
	return n, err
}

// wireFailure prefers the reason for which we ended the request ourselves to
// what net/http makes of it.
func wireFailure(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return &wireError{err}
}

// A wireBody is a body whose Read fails after noProgress without a byte. Time
// between the Reads does not count.
type wireBody struct {
	body       io.ReadCloser
	ctx        context.Context
	silence    *time.Timer
	noProgress time.Duration
	release    func()
	observer   Observer // may be nil
	answer     Answer   // whose body it is, for the observer
}

func (b *wireBody) Read(p []byte) (int, error) {
	b.silence.Reset(b.noProgress)
	n, err := b.body.Read(p)
	b.silence.Stop()
	if n > 0 && b.observer != nil {
		b.observer.Received(b.answer, n)
	}
	if err != nil && err != io.EOF {
		err = wireFailure(b.ctx, err)
	}
	return n, err
}

func (b *wireBody) Close() error {
	err := b.body.Close()
	b.release()
	return err
}
