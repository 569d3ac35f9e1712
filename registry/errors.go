package registry

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode"
)

// A StatusError is an answer that says no.
type StatusError struct {
	Method  string
	URL     string // without user, query and fragment
	Code    int    // HTTP status
	Codes   []string
	Message string // what the server said, cleaned and cut
	Advice  string // what to do about it, where that is known

	retryAfter time.Duration
}

func (e *StatusError) Error() string {
	s := fmt.Sprintf("%s %s: %d %s", e.Method, e.URL, e.Code, http.StatusText(e.Code))
	if len(e.Codes) > 0 {
		s += " " + strings.Join(e.Codes, ",")
	}
	if e.Message != "" {
		s += ": " + e.Message
	}
	if e.Advice != "" {
		s += " (" + e.Advice + ")"
	}
	return s
}

// temporary reports whether the same request may be answered otherwise later.
func (e *StatusError) temporary() bool {
	switch e.Code {
	case http.StatusRequestTimeout, http.StatusTooEarly, http.StatusTooManyRequests:
		return true
	case http.StatusNotImplemented, http.StatusHTTPVersionNotSupported:
		return false
	}
	return e.Code >= 500
}

// An UnavailableError says that a registry gave no byte for as long as the
// caller was willing to wait.
type UnavailableError struct {
	Host   string
	Waited time.Duration
	Tries  int
	Err    error // of the last try
}

func (e *UnavailableError) Error() string {
	tries := "1 try"
	if e.Tries != 1 {
		tries = fmt.Sprintf("%d tries", e.Tries)
	}
	return fmt.Sprintf("registry %s unavailable for %v, %s: %v", e.Host, e.Waited.Round(100*time.Millisecond), tries, e.Err)
}

func (e *UnavailableError) Unwrap() error { return e.Err }

// Timeout makes it a timeout in the sense of net.Error.
func (e *UnavailableError) Timeout() bool { return true }

// errClosed is what requests get once their Client is closed.
var errClosed = errors.New("registry client is closed")

// A wireError is a failure of the connection, not an answer. Every error that
// is worth a new try is one, or a temporary StatusError.
type wireError struct{ err error }

func (e *wireError) Error() string { return clean(e.err.Error(), maxErrorText) }
func (e *wireError) Unwrap() error { return e.err }

// worthRetrying reports whether a new try may go better.
func worthRetrying(err error) bool {
	var status *StatusError
	if errors.As(err, &status) {
		return status.temporary()
	}
	var wire *wireError
	return errors.As(err, &wire) && !neverBetter(err)
}

// neverBetter picks out the failed connections that fail again: the peer is not
// who it should be, or speaks another protocol.
func neverBetter(err error) bool {
	var cert *tls.CertificateVerificationError
	var authority x509.UnknownAuthorityError
	var name x509.HostnameError
	var config *certError
	return errors.As(err, &config) || errors.As(err, &cert) || errors.As(err, &authority) || errors.As(err, &name) || notTLS(err)
}

// notTLS reports that the peer answered the TLS greeting with something else.
func notTLS(err error) bool {
	var record tls.RecordHeaderError
	return errors.Is(err, http.ErrSchemeMismatch) || errors.As(err, &record)
}

// nobodyThere picks out the failures which, at the very first contact, more
// likely mean a mistyped name than a registry that is about to come back.
func nobodyThere(err error) bool {
	var dns *net.DNSError
	return errors.As(err, &dns) && dns.IsNotFound || errors.Is(err, syscall.ECONNREFUSED)
}

// redact is u as it may appear in errors and logs: signed URLs carry their
// secret in the query, careless ones in the user part.
func redact(u *url.URL) string {
	return clean((&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String(), 400)
}

// clean makes text from a server fit for a terminal and a log: one line, no
// control characters, no query strings, at most limit bytes.
func clean(s string, limit int) string {
	cut := len(s) > 4*limit
	if cut {
		s = s[:4*limit]
	}
	s = strings.Map(func(r rune) rune {
		switch {
		case unicode.IsSpace(r):
			return ' '
		case !unicode.IsPrint(r):
			return -1
		}
		return r
	}, s)
	words := strings.Fields(s)
	for i, w := range words {
		if u, query, ok := strings.Cut(w, "?"); ok && (strings.Contains(u, "://") || strings.Contains(query, "=")) {
			words[i] = u + "?REDACTED"
		}
	}
	s = strings.Join(words, " ")
	if len(s) > limit {
		s, cut = strings.ToValidUTF8(s[:limit], ""), true
	}
	if cut {
		s += "..."
	}
	return s
}

// Bounds on what a refusal may say.
const (
	maxErrorBody = 16 << 10
	maxErrorText = 300
)

// statusError turns an answer into an error and closes its body. hide removes
// secrets that a server might echo.
func statusError(resp *http.Response, hide func(string) string) *StatusError {
	defer resp.Body.Close()
	e := &StatusError{
		Method:     resp.Request.Method,
		URL:        redact(resp.Request.URL),
		Code:       resp.StatusCode,
		retryAfter: parseRetryAfter(resp.Header.Get("Retry-After"), time.Now()),
	}
	// A body that cannot be read whole explains nothing; the status stands.
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	if err != nil {
		return e
	}
	e.Codes, e.Message = explain(body)
	e.Message = clean(hide(e.Message), maxErrorText)
	for i, c := range e.Codes {
		e.Codes[i] = clean(hide(c), 60)
	}
	return e
}

// explain reads the error documents of the distribution specification and of
// OAuth token services. Anything else, HTML most of all, is not shown.
func explain(body []byte) (codes []string, message string) {
	var doc struct {
		Errors []struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"errors"`
		Error       string `json:"error"`
		Description string `json:"error_description"`
		Details     string `json:"details"`
	}
	// Fields of an unexpected type leave the others readable.
	if err := json.Unmarshal(body, &doc); err != nil && !errors.As(err, new(*json.UnmarshalTypeError)) {
		return nil, ""
	}
	var texts []string
	for _, e := range doc.Errors[:min(len(doc.Errors), 4)] {
		if e.Code != "" && !slices.Contains(codes, e.Code) {
			codes = append(codes, e.Code)
		}
		texts = append(texts, e.Message)
	}
	texts = append(texts, doc.Error, doc.Description, doc.Details)
	texts = slices.DeleteFunc(texts, func(s string) bool { return s == "" })
	return codes, strings.Join(slices.Compact(texts), "; ")
}

// parseRetryAfter reads seconds or a date; 0 where there is neither, and for
// what lies in the past. A day stands for everything longer.
func parseRetryAfter(s string, now time.Time) time.Duration {
	const longest = 24 * time.Hour
	var d time.Duration
	if seconds, err := strconv.ParseUint(s, 10, 32); err == nil {
		d = time.Duration(seconds) * time.Second
	} else if at, err := http.ParseTime(s); err == nil {
		d = at.Sub(now)
	}
	return min(max(d, 0), longest)
}
