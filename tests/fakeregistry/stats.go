package fakeregistry

import (
	"net"
	"net/http"
)

// Stats counts what a registry was asked for since New or ResetStats. A request
// is counted when it arrives, a byte just before it is sent: whoever has
// received something finds it counted.
type Stats struct {
	Requests     int
	ManifestGETs int
	BlobHEADs    int
	BlobGETs     int   // whatever the answer
	BlobBytes    int64 // of bodies of blob GETs answered with 200 or 206
	Tokens       int   // requests to the token service
	Uploads      int   // POSTs that start an upload or mount a blob
	UploadBytes  int64 // of bodies of uploads
	ManifestPUTs int
}

// A Request is a line of the log.
type Request struct {
	Method     string
	Path       string
	Query      string
	Range      string // the Range header, or Content-Range
	Status     int    // 0: not answered yet, or never
	Bytes      int64  // of the body, so far
	Received   int64  // of the request's body, so far
	Authorized bool   // whether there was an Authorization header
	Proto      string // HTTP/1.1 or HTTP/2.0
	Faulty     bool   // whether it met a Fault
}

// Stats returns the counts so far.
func (r *Registry) Stats() Stats {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stats
}

// Requests returns the log so far, in the order of arrival.
func (r *Registry) Requests() []Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := make([]Request, len(r.log))
	for i, l := range r.log {
		list[i] = *l
	}
	return list
}

// ResetStats begins anew with both, and with the most connections.
func (r *Registry) ResetStats() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stats, r.log, r.most = Stats{}, nil, len(r.conns)
}

// Connections are how many are open, and how many were at a time.
func (r *Registry) Connections() (open, most int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.conns), r.most
}

func (r *Registry) countConn(c net.Conn, state http.ConnState) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch state {
	case http.StateNew:
		if r.conns == nil {
			r.conns = map[net.Conn]struct{}{}
		}
		r.conns[c] = struct{}{}
		r.most = max(r.most, len(r.conns))
		r.link.narrow(c)
	case http.StateClosed, http.StateHijacked:
		delete(r.conns, c)
	}
}

// An entry counts one request; line is guarded by the registry's mutex.
type entry struct {
	registry *Registry
	line     *Request
	isBlob   bool // a GET of a blob
	isUpload bool
}

func (r *Registry) count(req *http.Request) *entry {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := &entry{registry: r, line: &Request{
		Method: req.Method, Path: req.URL.Path, Query: req.URL.RawQuery,
		Range:      req.Header.Get("Range") + req.Header.Get("Content-Range"),
		Authorized: req.Header.Get("Authorization") != "", Proto: req.Proto,
	}}
	r.log = append(r.log, e.line)
	r.stats.Requests++
	_, kind, _, _ := splitPath(req.URL.Path)
	switch {
	case req.URL.Path == tokenPath:
		r.stats.Tokens++
	case kind == "manifests" && req.Method == http.MethodGet:
		r.stats.ManifestGETs++
	case kind == "manifests" && req.Method == http.MethodPut:
		r.stats.ManifestPUTs++
	case kind == "uploads":
		e.isUpload = true
		if req.Method == http.MethodPost {
			r.stats.Uploads++
		}
	case kind == "blobs" && req.Method == http.MethodGet:
		r.stats.BlobGETs++
		e.isBlob = true
	case kind == "blobs" && req.Method == http.MethodHead:
		r.stats.BlobHEADs++
	}
	return e
}

func (e *entry) faulty() {
	e.registry.mu.Lock()
	defer e.registry.mu.Unlock()
	e.line.Faulty = true
}

func (e *entry) answered(status int) {
	e.registry.mu.Lock()
	defer e.registry.mu.Unlock()
	e.line.Status = status
}

func (e *entry) sent(n int64) {
	e.registry.mu.Lock()
	defer e.registry.mu.Unlock()
	e.line.Bytes += n
	if e.isBlob && (e.line.Status == http.StatusOK || e.line.Status == http.StatusPartialContent) {
		e.registry.stats.BlobBytes += n
	}
}

func (e *entry) received(n int64) {
	e.registry.mu.Lock()
	defer e.registry.mu.Unlock()
	e.line.Received += n
	if e.isUpload {
		e.registry.stats.UploadBytes += n
	}
}
