package fakeregistry

import (
	"io"
	"net"
	"net/http"
	"strconv"
	"time"
)

// A Fault is what goes wrong with one request. The zero value is nothing.
//
// Handler and Status take the registry's place; the rest works on any answer, or on
// the body of any request.
type Fault struct {
	Handler http.Handler // gives the whole answer
	Status  int          // refuses with this status and an error document
	// Rewrite changes a whole answer, which is in memory for that. What it leaves
	// of Content-Length is overwritten with the truth.
	Rewrite func(status int, header http.Header, body []byte) (int, []byte)
	Header  http.Header // laid over the answer's header; an empty list removes

	// After so many bytes of the body (below 0: before the header)
	After int64
	Break bool            // the connection ends
	Reset bool            // the connection is reset, where it is one of HTTP/1
	Stall <-chan struct{} // nothing is sent until the channel is closed

	// BreakUpload breaks the connection after so many bytes of the request's body
	// have come; 0 does not.
	BreakUpload int64
	// LoseAnswer does what was asked for, and breaks the connection then.
	LoseAnswer bool
}

// handle is the way of every request.
func (r *Registry) handle(s *server, w http.ResponseWriter, req *http.Request) {
	e := r.count(req)
	r.mu.Lock()
	latency, link, decide := r.latency, r.link, r.fault
	r.mu.Unlock()
	var f *Fault
	if decide != nil {
		f = decide(req)
	}
	if f == nil {
		f = &Fault{}
	} else {
		e.faulty()
	}
	out := &answer{w: w, entry: e, link: link, fault: f, left: f.After, gone: req.Context().Done(), stopped: s.done}
	// The server looks at the body of the request that it has made: to another, it
	// would not refuse a body that waits for its leave.
	req = req.WithContext(req.Context())
	req.Body = &arrival{ReadCloser: req.Body, entry: e, breakAt: f.BreakUpload}
	out.pause(latency)
	if f.After < 0 {
		out.trip()
	}
	if f.Rewrite == nil {
		r.answer(out, req, f)
	} else {
		draft := &draft{header: http.Header{}}
		r.answer(draft, req, f)
		draft.send(out, f.Rewrite)
	}
	out.end()
}

func (r *Registry) answer(w http.ResponseWriter, req *http.Request, f *Fault) {
	switch {
	case f.Handler != nil:
		f.Handler.ServeHTTP(w, req)
	case f.Status != 0:
		refuse(w, f.Status, "FAULT", "a fault was asked for")
	default:
		r.authenticate(w, req)
	}
}

// A draft is an answer that nobody has seen yet.
type draft struct {
	header http.Header
	status int
	body   []byte
}

func (d *draft) Header() http.Header { return d.header }

func (d *draft) WriteHeader(status int) {
	if d.status == 0 {
		d.status = status
	}
}

func (d *draft) Write(p []byte) (int, error) {
	d.WriteHeader(http.StatusOK)
	d.body = append(d.body, p...)
	return len(p), nil
}

func (d *draft) send(w http.ResponseWriter, rewrite func(int, http.Header, []byte) (int, []byte)) {
	d.WriteHeader(http.StatusOK)
	status, body := rewrite(d.status, d.header, d.body)
	for name, values := range d.header {
		w.Header()[name] = values
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	_, _ = w.Write(body) // the client's loss
}

// An arrival is the body of a request, counted, with the fault that it has.
type arrival struct {
	io.ReadCloser
	entry   *entry
	come    int64
	breakAt int64
}

func (a *arrival) Read(p []byte) (int, error) {
	if a.breakAt > 0 {
		if a.come == a.breakAt {
			panic(http.ErrAbortHandler) // net/http's way to break the connection off
		}
		p = p[:min(int64(len(p)), a.breakAt-a.come)]
	}
	n, err := a.ReadCloser.Read(p)
	a.come += int64(n)
	a.entry.received(int64(n))
	return n, err
}

// An answer is a ResponseWriter that counts, is slow, and has a fault.
type answer struct {
	w             http.ResponseWriter
	entry         *entry
	link          *link
	fault         *Fault
	left          int64           // bytes until the fault; below 0: it is over
	gone, stopped <-chan struct{} // the client; the server
	status        int
}

func (a *answer) Header() http.Header { return a.w.Header() }

func (a *answer) WriteHeader(status int) {
	if a.status != 0 {
		return
	}
	if a.fault.LoseAnswer {
		panic(http.ErrAbortHandler)
	}
	a.status = status
	for name, values := range a.fault.Header {
		a.w.Header()[http.CanonicalHeaderKey(name)] = values
	}
	a.entry.answered(status)
	a.w.WriteHeader(status)
}

// writeUnit is how much passes the link at once: small enough for the delays of
// a slow one to be even.
const writeUnit = 16 << 10

func (a *answer) Write(p []byte) (int, error) {
	if a.status == 0 {
		a.WriteHeader(http.StatusOK)
	}
	written := 0
	for len(p) > 0 {
		n := min(len(p), writeUnit)
		if a.left >= 0 && a.faulty() {
			if a.left == 0 {
				a.trip()
				continue
			}
			n = int(min(int64(n), a.left))
			a.left -= int64(n)
		}
		a.pause(a.link.take(time.Now(), n))
		a.entry.sent(int64(n))
		m, err := a.w.Write(p[:n])
		written += m
		if err != nil {
			return written, err
		}
		p = p[n:]
	}
	return written, nil
}

// Flush sends what was written so far.
func (a *answer) Flush() {
	// A writer that cannot flush sends when it likes.
	_ = http.NewResponseController(a.w).Flush()
}

func (a *answer) faulty() bool { return a.fault.Break || a.fault.Reset || a.fault.Stall != nil }

// end is reached when the body is complete. A fault that lies exactly at its end
// still happens: the client has every byte, but not the end.
func (a *answer) end() {
	if a.left == 0 && a.faulty() {
		if a.status == 0 {
			a.WriteHeader(http.StatusOK)
		}
		a.trip()
	}
}

// trip is the moment of the fault.
func (a *answer) trip() {
	if a.status != 0 {
		a.Flush()
	}
	a.left = -1
	if a.fault.Stall != nil {
		a.wait(a.fault.Stall)
	}
	if a.fault.Reset {
		a.reset()
	}
	if a.fault.Break || a.fault.Reset {
		panic(http.ErrAbortHandler)
	}
}

// reset closes the connection without a farewell: its client sees ECONNRESET.
func (a *answer) reset() {
	conn, _, err := http.NewResponseController(a.w).Hijack()
	if err != nil {
		return // HTTP/2 resets the stream
	}
	for {
		over, ok := conn.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		conn = over.NetConn()
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // without it the client sees the end, no reset
	}
	_ = conn.Close() // nothing is to be said any more
}

// pause lets d pass.
func (a *answer) pause(d time.Duration) {
	if d <= 0 {
		return
	}
	passed := make(chan struct{})
	t := time.AfterFunc(d, func() { close(passed) })
	defer t.Stop()
	a.wait(passed)
}

// wait ends the request on the spot when its client or the server is gone: a
// server that dies says nothing more.
func (a *answer) wait(event <-chan struct{}) {
	select {
	case <-event:
	case <-a.gone:
		panic(http.ErrAbortHandler)
	case <-a.stopped:
		panic(http.ErrAbortHandler)
	}
}
