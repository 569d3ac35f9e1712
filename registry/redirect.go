package registry

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
)

// maxRedirects bounds a chain; real ones have one or two links.
const maxRedirects = 5

// A redirectTransport follows redirects of GET and HEAD. Authorization goes
// along only while the origin (scheme, host and port) stays the same, and once
// it is lost it is not taken up again. What else is redirected comes back: for
// uploads session.send knows what to do, and a token request must not follow,
// since its body is a secret.
type redirectTransport struct {
	next      http.RoundTripper
	plainHTTP bool
}

func (t *redirectTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	for hops := 0; ; hops++ {
		resp, err := t.next.RoundTrip(req)
		if err != nil || !isRedirect(req, resp) {
			return resp, err
		}
		discard(resp)
		if hops == maxRedirects {
			return nil, fmt.Errorf("%s %s: more than %d redirects", req.Method, redact(req.URL), maxRedirects)
		}
		to, err := t.target(req.URL, resp.Header.Get("Location"))
		if err != nil {
			return nil, fmt.Errorf("%s %s: %w", req.Method, redact(req.URL), err)
		}
		from := req.URL
		req = req.Clone(req.Context())
		req.URL, req.Host = to, ""
		if !sameOrigin(from, to) {
			req.Header.Del("Authorization")
		}
	}
}

func isRedirect(req *http.Request, resp *http.Response) bool {
	switch resp.StatusCode {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther,
		http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return (req.Method == http.MethodGet || req.Method == http.MethodHead) && resp.Header.Get("Location") != ""
	}
	return false
}

// target resolves a Location. HTTPS does not lead to plain HTTP unless that was
// allowed: nothing would protect the bytes of a range on the way.
func (t *redirectTransport) target(from *url.URL, location string) (*url.URL, error) {
	to, err := from.Parse(location)
	if err != nil {
		// The parser's error quotes the location, query and all.
		return nil, fmt.Errorf("redirect to a location that is not a URL")
	}
	to.User, to.Fragment = nil, ""
	switch {
	case to.Host == "", to.Scheme != "https" && to.Scheme != "http":
		return nil, fmt.Errorf("redirect to %q, which is neither http nor https", redact(to))
	case from.Scheme == "https" && to.Scheme == "http" && !t.plainHTTP:
		return nil, fmt.Errorf("redirect from https to %s refused; plain HTTP must be allowed explicitly", redact(to))
	}
	return to, nil
}

func sameOrigin(a, b *url.URL) bool {
	return a.Scheme == b.Scheme && hostPort(a) == hostPort(b)
}

// hostPort is the host with its port, also where the port is the default.
func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	return u.Hostname() + ":" + port
}

// discard closes a body after reading a little of it, so that the connection
// can be used again when that was all.
func discard(resp *http.Response) {
	// A failure here only costs the connection.
	_, _ = io.CopyN(io.Discard, resp.Body, maxErrorBody)
	_ = resp.Body.Close()
}
