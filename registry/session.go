package registry

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync/atomic"
	"time"
)

// A session is what a Client knows of one repository.
type session struct {
	client  *Client
	ref     Reference
	access  access
	auth    *authTransport
	reached atomic.Bool // the registry has answered at least once
	// gaveUp is when patience for the bytes of a blob ran out, in Unix nanoseconds; 0
	// if some have come since.
	gaveUp atomic.Int64
	// pausedUntil is when a mirror that failed takes its turn again, in Unix
	// nanoseconds.
	pausedUntil atomic.Int64
	// leftAt is when it was left and has not answered since, in the same; 0: it was not.
	leftAt atomic.Int64
}

// access is what the host's configuration says of a place.
type access struct {
	insecure  bool   // any certificate will do, and plain HTTP, too
	namespace string // sent as ns, to a proxy for many registries
	stranger  bool   // a mirror elsewhere: credentials that were given are not for it
}

// A sessionKey tells the sessions of a Client apart.
type sessionKey struct {
	name   string // Reference.name
	access access
}

func (c *Client) session(ref Reference, how access) *session {
	c.mu.Lock()
	defer c.mu.Unlock()
	key := sessionKey{ref.name(), how}
	if s := c.sessions[key]; s != nil {
		return s
	}
	// Tag and digest are of one request; what is kept here is of them all.
	ref.Tag, ref.Digest = "", ""
	s := &session{client: c, ref: ref, access: how}
	origin := func(ctx context.Context) (*url.URL, error) { return c.origin(ctx, ref.apiHost(), how.insecure) }
	keys := c.keyring
	if how.stranger {
		keys.given = credentials{}
	}
	s.auth = &authTransport{
		next: c.follow, ref: ref, keyring: keys,
		tokens: tokenService{next: c.follow, plainHTTP: c.plainHTTP, origin: origin},
		tasks:  &c.tasks,
		log:    c.log, happened: c.happened,
		grants: map[challenge]grant{},
	}
	c.sessions[key] = s
	return s
}

// resolving is the patience for finding an image. A host that nobody has
// reached yet and that is not there is a mistake more often than an outage.
func (s *session) resolving() *patience {
	return &patience{limit: s.client.resolveWait, host: s.ref.Host, eager: !s.reached.Load(), recovery: s.client.recovery, happened: s.client.happened}
}

// Patience that begins within sameRead of when it ran out is short: where a read ahead
// has failed, a kernel asks once more, and who reads has waited already.
const (
	sameRead = 2 * time.Second
	// It is a quarter of Options.ErrorWait, but within these: a host that is back may
	// not be asked for the first second.
	shortestPatience, shortPatience = 3 * time.Second, 10 * time.Second
)

type waitingKey struct{}

// WithWaiting says that whoever a blob is fetched for has waited since then, and nothing
// came: that counts as if it had been waited for the registry, but for 3 s.
func WithWaiting(ctx context.Context, since time.Time) context.Context {
	return context.WithValue(ctx, waitingKey{}, since)
}

// reading is the patience for the bytes of a blob.
func (s *session) reading(ctx context.Context) *patience {
	p := &patience{limit: s.client.errorWait, host: s.ref.Host, recovery: s.client.recovery, happened: s.client.happened}
	p.usual, p.gaveUp = p.limit, &s.gaveUp
	if at := s.gaveUp.Load(); at != 0 && time.Since(time.Unix(0, at)) < sameRead {
		p.limit = min(max(p.limit/4, shortestPatience), shortPatience, p.limit)
	}
	if since, ok := ctx.Value(waitingKey{}).(time.Time); ok {
		p.limit = min(max(p.usual-time.Since(since), shortestPatience), p.limit)
	}
	return p
}

// do sends one request for the repository, by one try. path is relative to it.
func (s *session) do(ctx context.Context, method, path string, header http.Header) (*http.Response, error) {
	if s.access.stranger {
		ctx = forMirror(ctx)
	}
	origin, err := s.client.origin(ctx, s.ref.apiHost(), s.access.insecure)
	if err != nil {
		return nil, err
	}
	u := origin.JoinPath("v2", s.ref.Repository, path)
	if s.access.namespace != "" {
		u.RawQuery = url.Values{"ns": {s.access.namespace}}.Encode()
	}
	req, err := http.NewRequestWithContext(withKind(ctx, kindAt(path)), method, u.String(), nil)
	if err != nil {
		return nil, err
	}
	maps.Copy(req.Header, header)
	resp, err := s.auth.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	s.reached.Store(true)
	return resp, nil
}

// An outgoing is a request of an upload: with a body, or to a place that the
// registry has named, or both.
type outgoing struct {
	method string
	url    *url.URL
	header http.Header
	length int64                         // of the body
	body   func() (io.ReadCloser, error) // called for each time that it is sent; nil without one
}

// expectFrom is the length from which a body waits for the registry's leave, so
// that a refusal, of an expired token say, costs a round trip and not the body.
const expectFrom = 1 << 20

// send sends one request of an upload, by one try. It follows 307 and 308 and no
// other redirect, since those alone mean the same request; the registry's
// credentials stay with its origin.
func (s *session) send(ctx context.Context, o outgoing) (*http.Response, error) {
	origin, err := s.client.origin(ctx, s.ref.apiHost(), s.access.insecure)
	if err != nil {
		return nil, err
	}
	at, stranger := o.url, false
	for hops := 0; ; hops++ {
		stranger = stranger || !sameOrigin(at, origin)
		resp, err := s.sendTo(ctx, at, o, stranger)
		if err != nil {
			return nil, err
		}
		s.reached.Store(true)
		if c := resp.StatusCode; c != http.StatusTemporaryRedirect && c != http.StatusPermanentRedirect || resp.Header.Get("Location") == "" {
			return resp, nil
		}
		discard(resp)
		if hops == maxRedirects {
			return nil, fmt.Errorf("%s %s: more than %d redirects", o.method, redact(o.url), maxRedirects)
		}
		if at, err = s.location(resp); err != nil {
			return nil, err
		}
	}
}

func (s *session) sendTo(ctx context.Context, u *url.URL, o outgoing, stranger bool) (*http.Response, error) {
	req, err := http.NewRequestWithContext(withKind(ctx, KindUpload), o.method, u.String(), nil)
	if err != nil {
		return nil, err
	}
	maps.Copy(req.Header, o.header)
	if o.body != nil && o.length > 0 {
		req.GetBody, req.ContentLength = o.body, o.length
		if o.length >= expectFrom {
			req.Header.Set("Expect", "100-continue")
		}
	}
	if !stranger {
		return s.auth.RoundTrip(req)
	}
	if err := freshBody(req); err != nil {
		return nil, err
	}
	return s.client.follow.RoundTrip(req)
}

// location is where an answer sends its client, by the rules for redirects.
func (s *session) location(resp *http.Response) (*url.URL, error) {
	return s.lead(resp, resp.Header.Get("Location"))
}

func (s *session) lead(resp *http.Response, to string) (*url.URL, error) {
	rules := redirectTransport{plainHTTP: s.client.plainHTTP}
	u, err := rules.target(resp.Request.URL, to)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", resp.Request.Method, redact(resp.Request.URL), err)
	}
	return u, nil
}

// storage sends one GET to where a redirect of the registry has led. It bears no
// authority but the URL's own.
func (s *session) storage(ctx context.Context, u *url.URL, header http.Header) (*http.Response, error) {
	req, err := http.NewRequestWithContext(withKind(ctx, KindBlob), http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	maps.Copy(req.Header, header)
	return s.client.follow.RoundTrip(req)
}

// get is do for an answer that must be a 200; everything else is an error.
func (s *session) get(ctx context.Context, path string, header http.Header) (*http.Response, error) {
	resp, err := s.do(ctx, http.MethodGet, path, header)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, statusError(resp, s.auth.hide)
	}
	return resp, nil
}

// readBounded reads a whole body of at most limit bytes and closes it.
func readBounded(resp *http.Response, limit int64) ([]byte, error) {
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s: more than %d bytes", redact(resp.Request.URL), limit)
	}
	return b, nil
}

// origin returns where the API of host is: its scheme and host. For a loopback
// host, and one that may be insecure, it has to ask.
func (c *Client) origin(ctx context.Context, host string, insecure bool) (*url.URL, error) {
	c.mu.Lock()
	known := c.origins[host]
	c.mu.Unlock()
	if known != nil {
		return known, nil
	}
	if insecure {
		c.trustAny(host)
	}
	scheme := "https"
	switch {
	case c.plainHTTP:
		scheme = "http"
	case insecure, IsLoopback(host):
		var err error
		if scheme, err = c.probe(ctx, host, insecure); err != nil {
			return nil, err
		}
	}
	u := &url.URL{Scheme: scheme, Host: host}
	c.mu.Lock()
	c.origins[host] = u
	c.mu.Unlock()
	return u, nil
}

// probe greets host by TLS. Whatever answers in HTTPS is HTTPS, and what
// answers the greeting with something that is not TLS is plain HTTP; neither
// would become the other, so it is asked only once. An insecure host may also
// speak plain HTTP where nothing listens for HTTPS.
func (c *Client) probe(ctx context.Context, host string, insecure bool) (scheme string, err error) {
	err = c.greet(ctx, "https", host)
	switch {
	case err == nil:
		return "https", nil
	case notTLS(err), insecure && c.greet(ctx, "http", host) == nil:
		return "http", nil
	}
	return "", err
}

// greet reports whether anything answers at host.
func (c *Client) greet(ctx context.Context, scheme, host string) error {
	u := &url.URL{Scheme: scheme, Host: host, Path: "/v2/"}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return err
	}
	resp, err := c.wire.RoundTrip(req)
	if err == nil {
		discard(resp)
	}
	return err
}

// IsLoopback reports whether host, with or without a port, can only be this
// machine.
func IsLoopback(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	if strings.EqualFold(host, "localhost") {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Unmap().IsLoopback()
}
