package fakeregistry

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// A signer makes the URLs of a storage, and knows them again.
type signer struct {
	mu   sync.Mutex // guards what follows
	key  []byte
	life time.Duration
}

// Storage is the second origin of a registry with Options.SignedURLs, or nil. It is
// a Registry of its own as far as counts, faults, latency, bandwidth, Stop and Start
// go, and knows nothing but GETs of blobs by signed URLs. As the big object stores
// do, it refuses a request with an Authorization header (400), and one whose
// signature is wrong or has expired (403).
func (r *Registry) Storage() *Registry { return r.storage }

// newStorage starts the storage of front, which has its blobs and its certificate.
func newStorage(front *Registry) (*Registry, error) {
	o := Options{TLS: front.opts.TLS}
	s := &Registry{opts: o, cert: front.cert, store: front.store, tokens: newTokens(o), link: newLink(0),
		signer: &signer{life: front.opts.SignedURLs}}
	s.signer.renew()
	s.mux = s.routes()
	l, err := listenBelowEphemeral()
	if err != nil {
		return nil, fmt.Errorf("fake registry: storage: %w", err)
	}
	s.addr = l.Addr().String()
	s.server = s.serve(l)
	return s, nil
}

// RevokeURLs makes every signed URL that was given out so far worthless.
func (r *Registry) RevokeURLs() { r.storage.signer.renew() }

func (s *signer) renew() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.key = []byte(rand.Text())
}

// sign makes a URL for path that is good from now on.
func (r *Registry) sign(path string, now time.Time) string {
	r.signer.mu.Lock()
	expires := strconv.FormatInt(now.Add(r.signer.life).UnixMilli(), 10)
	r.signer.mu.Unlock()
	query := url.Values{"expires": {expires}, "signature": {r.signer.signature(path, expires)}}
	return r.URL() + path + "?" + query.Encode()
}

func (s *signer) signature(path, expires string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	mac := hmac.New(sha256.New, s.key)
	fmt.Fprintf(mac, "%s\n%s", path, expires)
	return hex.EncodeToString(mac.Sum(nil))
}

// serveSigned is what a storage does with a request.
func (r *Registry) serveSigned(w http.ResponseWriter, req *http.Request) {
	repo, kind, name, _ := splitPath(req.URL.Path)
	query := req.URL.Query()
	until, err := strconv.ParseInt(query.Get("expires"), 10, 64)
	switch {
	case req.Method != http.MethodGet || kind != "blobs":
		refuse(w, http.StatusMethodNotAllowed, "MethodNotAllowed", "only GET of a blob")
	case req.Header.Get("Authorization") != "":
		refuse(w, http.StatusBadRequest, "InvalidArgument", "only one auth mechanism allowed")
	case err != nil || !hmac.Equal([]byte(query.Get("signature")), []byte(r.signer.signature(req.URL.Path, query.Get("expires")))):
		refuse(w, http.StatusForbidden, "SignatureDoesNotMatch", "the signature does not match")
	case time.Now().UnixMilli() >= until:
		refuse(w, http.StatusForbidden, "AccessDenied", "request has expired")
	default:
		r.blob(w, req, repo, digest.Digest(name))
	}
}
