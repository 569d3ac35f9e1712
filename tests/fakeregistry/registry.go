// Package fakeregistry is an OCI registry inside a process, for tests,
// benchmarks and the demo.
//
// It speaks the part of the distribution specification that pushing and pulling
// need, counts what it serves, can be slow, can ask for authentication, and can
// die and come back on the same port:
//
//	r, err := fakeregistry.New(fakeregistry.Options{})
//	defer r.Close()
//	ocipush.Push(ctx, r.URL(), "rootfs:v1", layers, ocipush.Options{})
//	r.Stop()  // connections break, new ones are refused
//	r.Start() // same address, same content, same counts
//	r.Stats() // GETs and bytes
//
// A request goes through
//
//	count → latency → fault → authentication → the specification's endpoints
//
// and its answer back through the bandwidth and the fault. A Fault is decided
// for each request by one function (see SetFault and Plan); whatever a misbehaving
// server does is made there and nowhere else.
//
// With Options.SignedURLs blobs lie elsewhere, as they do with the big registries:
// the registry redirects to a second origin by URLs that expire (see Storage).
//
// An upload keeps what came of a body before its connection broke, and tells it to
// who asks for its status. Options.Upload has uploads mounted across repositories
// (else a mount parameter starts an ordinary upload, as the specification allows),
// insist on a chunk length, or refuse to go on.
//
// It listens on 127.0.0.1 only. It deletes nothing but unfinished uploads, keeps
// its content in memory, or, with Options.Dir, in unnamed files, and makes no
// attempt at being a safe server for others.
package fakeregistry

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// An Auth is what a registry asks of its clients.
type Auth int

const (
	Anonymous Auth = iota
	Basic          // user name and password with each request
	Bearer         // a token, fetched from /token
)

// Options of a Registry. The zero value is an open registry over plain HTTP.
type Options struct {
	TLS  bool // HTTPS, and HTTP/2, with a certificate of its own: see RootCAs
	Auth Auth
	// Username and Password are what Basic, and the token service of Bearer,
	// accept. A Bearer registry without a Username gives tokens to everybody.
	Username, Password string
	// IdentityToken is what the token service takes in place of a password.
	IdentityToken string
	// TokenLife is how long a token is accepted, and what the token service says
	// of it; 0 is five minutes.
	TokenLife time.Duration
	// TokenClaim is what the token service says of it where that is not the truth.
	TokenClaim time.Duration
	// SignedURLs, if not 0, is how long the URLs are good to which a GET of a blob
	// is redirected.
	SignedURLs time.Duration
	// Dir is where blobs are kept, in files that have no name; empty: in memory.
	Dir string
	// Referrers has the referrers API answer; else it is not found.
	Referrers bool
	Upload    Upload
}

// Upload is how a registry takes blobs. The zero value starts an upload whatever a
// mount parameter says, and takes chunks of any length at relative Locations.
type Upload struct {
	Mount    bool  // a blob that the other repository has needs no upload
	MinChunk int64 // the least length of a PATCH that is not the last: OCI-Chunk-Min-Length
	Absolute bool  // Locations are absolute URLs
	// State has each Location of an upload carry a query that holds for the next
	// step only, and is refused after it.
	State bool
	// NoStatus has the registry not tell how far an upload has got.
	NoStatus bool
}

// A Registry serves from New to Close, but for the time between Stop and Start.
type Registry struct {
	opts    Options
	addr    string
	cert    *certificate // nil without TLS
	store   *store
	tokens  *tokens
	storage *Registry // nil: blobs are here
	signer  *signer   // nil: this is no storage
	mux     *http.ServeMux
	mu      sync.Mutex // guards what follows
	server  *server    // nil while stopped
	fault   func(*http.Request) *Fault
	latency time.Duration
	link    *link
	stats   Stats
	log     []*Request
	conns   map[net.Conn]struct{}
	most    int // conns at a time
}

// New starts a registry on a free port of 127.0.0.1.
func New(o Options) (*Registry, error) {
	if o.TokenLife == 0 {
		o.TokenLife = 5 * time.Minute
	}
	r := &Registry{opts: o, store: newStore(o.Dir), tokens: newTokens(o), link: newLink(0)}
	if o.TLS {
		cert, err := newCertificate()
		if err != nil {
			return nil, fmt.Errorf("fake registry: certificate: %w", err)
		}
		r.cert = cert
	}
	r.mux = r.routes()
	l, err := listenBelowEphemeral()
	if err != nil {
		return nil, fmt.Errorf("fake registry: %w", err)
	}
	r.addr = l.Addr().String()
	if o.SignedURLs != 0 {
		if r.storage, err = newStorage(r); err != nil {
			return nil, errors.Join(err, l.Close())
		}
	}
	r.server = r.serve(l)
	return r, nil
}

// listenBelowEphemeral takes a port that the kernel does not hand out by itself,
// so that it is still free when a stopped registry comes back.
func listenBelowEphemeral() (net.Listener, error) {
	var err error
	for range 100 {
		var l net.Listener
		l, err = net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", 20000+rand.IntN(12000)))
		if err == nil {
			return l, nil
		}
	}
	return nil, err
}

// Addr is the registry's host:port, as it stands in an image reference.
func (r *Registry) Addr() string { return r.addr }

// URL is the address with its scheme.
func (r *Registry) URL() string {
	if r.opts.TLS {
		return "https://" + r.addr
	}
	return "http://" + r.addr
}

// CertificatePEM is RootCAs for a file; empty without TLS.
func (r *Registry) CertificatePEM() []byte {
	if r.cert == nil {
		return nil
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.cert.pair.Leaf.Raw})
}

// RootCAs is what a client of a TLS registry has to trust; nil without TLS.
func (r *Registry) RootCAs() *x509.CertPool {
	if r.cert == nil {
		return nil
	}
	return r.cert.pool
}

// Stop is a registry that dies: its port is closed and every connection is
// broken. It returns when nothing of it is left running.
func (r *Registry) Stop() {
	r.mu.Lock()
	s := r.server
	r.server = nil
	r.mu.Unlock()
	if s != nil {
		s.stop()
	}
}

// Start brings a stopped registry back on the same port. When it returns, the
// port accepts connections.
func (r *Registry) Start() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.server != nil {
		return errors.New("fake registry: is running already")
	}
	l, err := net.Listen("tcp4", r.addr)
	if err != nil {
		return fmt.Errorf("fake registry: %w", err)
	}
	r.server = r.serve(l)
	return nil
}

// Close stops the registry for good and drops its content.
func (r *Registry) Close() error {
	r.Stop()
	if r.storage != nil {
		r.storage.Stop()
	}
	return r.store.close()
}

// PutBlob gives the registry a blob that nobody has to upload. The digest is taken
// on trust, and data is read until Close.
func (r *Registry) PutBlob(repo string, d digest.Digest, data io.ReaderAt, size int64) {
	r.store.putBlob(repo, d, &blob{data: data, size: size})
}

// OpenUploads is the number of uploads that were begun and neither finished nor
// cancelled.
func (r *Registry) OpenUploads() int { return r.store.open() }

// SetLatency delays every answer by d before its first byte, as a network with
// that round trip would.
func (r *Registry) SetLatency(d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.latency = d
}

// SetBandwidth limits the bodies of all answers together to so many bytes a
// second; 0 is no limit.
func (r *Registry) SetBandwidth(bytesPerSecond int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.link = newLink(bytesPerSecond)
}

// SetRoom has each new connection of a limited bandwidth take about so many bytes that
// its other end has not read: what is on its way, or waits in a router. It follows
// SetBandwidth. The default is little, for those who look whether a client stops reading;
// a client that is busy for a moment then lets the link run idle, which one of some length
// would not.
func (r *Registry) SetRoom(bytes int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.link.room = bytes
}

// SetFault lets f decide for every request what goes wrong with it; nil from f,
// or as f, is nothing. f may change the request, too: without its Range header
// it is answered as by a server that knows no ranges.
func (r *Registry) SetFault(f func(*http.Request) *Fault) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fault = f
}

// RevokeTokens makes every token that was given out so far worthless.
func (r *Registry) RevokeTokens() { r.tokens.revoke() }

// IssueToken gives a token for any repository, for those who cannot ask.
func (r *Registry) IssueToken() string { return r.tokens.issue(anyScope) }

// A server is one run of a Registry, from Start to Stop.
type server struct {
	http  *http.Server
	loop  sync.WaitGroup // Serve
	tasks sync.WaitGroup // requests
	mu    sync.Mutex     // guards closing, and that no Add follows Wait
	done  chan struct{}  // closed by stop
}

func (r *Registry) serve(l net.Listener) *server {
	s := &server{done: make(chan struct{})}
	s.http = &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if s.enter() {
				defer s.tasks.Done()
				r.handle(s, w, req)
			}
		}),
		// What a broken client causes here is what the tests are about.
		ErrorLog:  log.New(io.Discard, "", 0),
		ConnState: r.countConn,
	}
	s.loop.Go(func() {
		// Serve ends with the error that it was closed, and no other is of use.
		if r.cert == nil {
			_ = s.http.Serve(l)
			return
		}
		s.http.TLSConfig = r.cert.config()
		_ = s.http.ServeTLS(l, "", "")
	})
	return s
}

func (s *server) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.done:
		return false
	default:
		s.tasks.Add(1)
		return true
	}
}

func (s *server) stop() {
	s.mu.Lock()
	close(s.done)
	s.mu.Unlock()
	_ = s.http.Close() // errors of connections that are broken on purpose
	s.tasks.Wait()
	s.loop.Wait()
}
