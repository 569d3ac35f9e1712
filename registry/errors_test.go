package registry

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"testing"
)

func TestClean(t *testing.T) {
	for _, tc := range []struct {
		in    string
		limit int
		want  string
	}{
		{"plain", 10, "plain"},
		{"two\nlines\r\n", 20, "two lines"},
		{"\x1b[31mred\x07\u202e", 20, "[31mred"},
		{"12345678901", 10, "1234567890..."},
		{"ééééé", 3, "é..."},
		{"see https://h/p?sig=abc&x=1 there", 60, "see https://h/p?REDACTED there"},
		{"relative /p?sig=abc&x=1 there", 60, "relative /p?REDACTED there"},
		{"really? yes", 60, "really? yes"},
	} {
		if got := clean(tc.in, tc.limit); got != tc.want {
			t.Errorf("%q: %q, want %q", tc.in, got, tc.want)
		}
	}
	if got := clean(strings.Repeat("x", 1<<20), 10); len(got) != 13 {
		t.Errorf("long text is %d bytes", len(got))
	}
}

func TestRedact(t *testing.T) {
	u, err := url.Parse("https://me:pw@cdn.example:8443/a%20b/c?X-Amz-Signature=abc#frag")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := redact(u), "https://cdn.example:8443/a%20b/c"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestExplain(t *testing.T) {
	for _, tc := range []struct{ in, codes, message string }{
		{`{"errors":[{"code":"NAME_UNKNOWN","message":"no such repository","detail":{"x":1}}]}`, "NAME_UNKNOWN", "no such repository"},
		{`{"errors":[{"code":"A","message":"x"},{"code":"A","message":"x"},{"code":"B","message":"y"}]}`, "A,B", "x; y"},
		{`{"error":"invalid_grant","error_description":"expired"}`, "", "invalid_grant; expired"},
		{`{"details":"incorrect username or password"}`, "", "incorrect username or password"},
		{`{"errors":"odd","details":"still read"}`, "", "still read"},
		{`<html>secret</html>`, "", ""},
		{``, "", ""},
		{`{"errors":[]}`, "", ""},
	} {
		codes, message := explain([]byte(tc.in))
		if strings.Join(codes, ",") != tc.codes || message != tc.message {
			t.Errorf("%s: %v %q", tc.in, codes, message)
		}
	}
}

func TestWorthRetrying(t *testing.T) {
	status := func(code int) error { return fmt.Errorf("wrapped: %w", &StatusError{Code: code}) }
	for _, tc := range []struct {
		err  error
		want bool
	}{
		{status(408), true}, {status(425), true}, {status(429), true},
		{status(500), true}, {status(502), true}, {status(503), true}, {status(504), true},
		{status(400), false}, {status(401), false}, {status(403), false}, {status(404), false},
		{status(410), false}, {status(416), false}, {status(501), false}, {status(307), false},
		{&wireError{syscall.ECONNRESET}, true},
		{&wireError{&net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}}, true},
		{&wireError{&tls.CertificateVerificationError{Err: errors.New("x")}}, false},
		{&wireError{http.ErrSchemeMismatch}, false},
		{errClosed, false},
		{errors.New("a check failed"), false},
	} {
		if got := worthRetrying(tc.err); got != tc.want {
			t.Errorf("%v: %v", tc.err, got)
		}
	}
}
