package fakeregistry_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
)

func TestPlans(t *testing.T) {
	c := start(t, fakeregistry.Options{})
	path := "/v2/x/blobs/" + c.push("x", "0123456789").String()
	for _, tc := range []struct {
		name   string
		plan   fakeregistry.Plan
		status int
		place  string // Content-Range
		body   string
		header string // name=value that must stand in the header
	}{
		{"nothing", func(*http.Request) *fakeregistry.Fault { return nil }, 206, "bytes 2-5/10", "2345", "Content-Length=4"},
		{"no ranges", fakeregistry.NoRanges(), 200, "", "0123456789", ""},
		{"a range too short", fakeregistry.OtherRange(0, -1), 206, "bytes 2-4/10", "234", ""},
		{"a range too long", fakeregistry.OtherRange(0, 1), 206, "bytes 2-6/10", "23456", ""},
		{"a range of another place", fakeregistry.OtherRange(1, 1), 206, "bytes 3-6/10", "3456", ""},
		{"a body too short", fakeregistry.Always(fakeregistry.ShortBody(1)), 206, "bytes 2-5/10", "234", "Content-Length=3"},
		{"a body too long", fakeregistry.Always(fakeregistry.LongBody(1)), 206, "bytes 2-5/10", "2345\x00", "Content-Length=5"},
		{"gzip", fakeregistry.Always(fakeregistry.Gzip()), 206, "bytes 2-5/10", "\x1f\x8b", "Content-Encoding=gzip"},
		{"a flipped bit", fakeregistry.Always(fakeregistry.FlipBit(3)), 206, "bytes 2-5/10", "2;45", ""}, // '3' ^ 1<<3
		{"a flipped bit elsewhere", fakeregistry.Always(fakeregistry.FlipBit(6)), 206, "bytes 2-5/10", "2345", ""},
		{"without a header", fakeregistry.Always(fakeregistry.Without("Docker-Content-Digest")), 206, "bytes 2-5/10", "2345", "Docker-Content-Digest="},
		{"refused", fakeregistry.Always(fakeregistry.Fault{Status: 416}), 416, "", `{"errors":[`, ""},
		{"of manifests", fakeregistry.Always(fakeregistry.Fault{Status: 503}).OnManifests(), 206, "bytes 2-5/10", "2345", ""},
		{"of blobs", fakeregistry.Always(fakeregistry.Fault{Status: 503}).OnBlobs(), 503, "", `{"errors":[`, ""},
		{"of the authorized", fakeregistry.Always(fakeregistry.Fault{Status: 503}).Authorized(), 206, "bytes 2-5/10", "2345", ""},
		{"of either", fakeregistry.Always(fakeregistry.Fault{Status: 503}).OnTokens().Or(fakeregistry.Always(fakeregistry.Fault{Status: 502})), 502, "", `{"errors":[`, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := client{t, c.r, c.Client}
			c.r.SetFault(tc.plan)
			resp, body := c.do("GET", path, "", "Range", "bytes=2-5", "Accept-Encoding", "identity")
			c.want(resp, tc.status, "Content-Range", tc.place)
			if !strings.HasPrefix(body, tc.body) || tc.status == 206 && tc.name != "gzip" && body != tc.body {
				t.Errorf("%q, want %q", body, tc.body)
			}
			if name, value, ok := strings.Cut(tc.header, "="); ok && resp.Header.Get(name) != value {
				t.Errorf("%s is %q, want %q", name, resp.Header.Get(name), value)
			}
		})
	}
}

func TestPlansCount(t *testing.T) {
	c := start(t, fakeregistry.Options{})
	path := "/v2/x/blobs/" + c.push("x", "0123456789").String()
	refuse := fakeregistry.Always(fakeregistry.Fault{Status: 503})
	for name, tc := range map[string]struct {
		plan fakeregistry.Plan
		want string
	}{
		"every third of the blobs": {refuse.Every(3).OnBlobs(), "200 200 503 200 200 503"},
		"the first two":            {refuse.First(2).OnBlobs(), "503 503 200 200 200 200"},
		"the second and fourth":    {refuse.First(2).Every(2).OnBlobs(), "200 503 200 503 200 200"},
	} {
		c.r.SetFault(tc.plan)
		var got []string
		for range 6 {
			if resp, _ := c.do("GET", "/v2/", ""); resp.StatusCode != 200 {
				t.Errorf("%s: what is no blob: %s", name, resp.Status)
			}
			resp, _ := c.do("GET", path, "")
			got = append(got, fmt.Sprint(resp.StatusCode))
		}
		if all := strings.Join(got, " "); all != tc.want {
			t.Errorf("%s: %s, want %s", name, all, tc.want)
		}
	}
}

// TestReset has a connection reset in the middle of a body, with and without TLS.
func TestReset(t *testing.T) {
	for _, secure := range []bool{false, true} {
		c := start(t, fakeregistry.Options{TLS: secure})
		transport := c.Transport.(*http.Transport)
		transport.Protocols = new(http.Protocols)
		transport.Protocols.SetHTTP1(true)
		path := "/v2/x/blobs/" + c.push("x", strings.Repeat("0123456789", 10_000)).String()
		c.r.SetFault(fakeregistry.Always(fakeregistry.Fault{After: 1000, Reset: true}))
		resp, err := c.Get(c.r.URL() + path)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if !errors.Is(err, syscall.ECONNRESET) || len(got) > 1000 {
			t.Errorf("TLS %v: %d bytes, %v", secure, len(got), err)
		}
	}
}

// noRedirects has a client show where it would be sent.
func (c client) noRedirects() client {
	c.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return c
}

func TestStorage(t *testing.T) {
	const life = 300 * time.Millisecond
	c := start(t, fakeregistry.Options{SignedURLs: life}).noRedirects()
	path := "/v2/x/blobs/" + c.push("x", "0123456789").String()
	signed := func() string {
		t.Helper()
		resp, _ := c.do("GET", path, "")
		c.want(resp, 307)
		return resp.Header.Get("Location")
	}
	url1 := signed()
	resp, body := c.do("GET", url1, "", "Range", "bytes=2-5")
	c.want(resp, 206, "Content-Range", "bytes 2-5/10")
	if body != "2345" || c.r.Storage().Addr() == c.r.Addr() || !strings.HasPrefix(url1, c.r.Storage().URL()) {
		t.Errorf("%q from %s", body, url1)
	}
	resp, _ = c.do("GET", url1, "", "Authorization", "Bearer x")
	c.want(resp, 400)
	resp, _ = c.do("HEAD", url1, "")
	c.want(resp, 405)
	resp, _ = c.do("GET", forged(t, url1), "")
	c.want(resp, 403)
	resp, _ = c.do("GET", c.r.Storage().URL()+path, "")
	c.want(resp, 403)
	time.Sleep(life) // the life of the URL is what this is about
	resp, _ = c.do("GET", url1, "")
	c.want(resp, 403)
	url2 := signed()
	resp, _ = c.do("GET", url2, "")
	c.want(resp, 200)
	c.r.RevokeURLs()
	resp, _ = c.do("GET", url2, "")
	c.want(resp, 403)
	resp, _ = c.do("HEAD", path, "")
	c.want(resp, 200, "Content-Length", "10")
	if s := c.r.Storage().Stats(); s.BlobBytes != 14 {
		t.Errorf("%d bytes from the storage, want 4 and 10", s.BlobBytes)
	}
	if s := c.r.Stats(); s.BlobGETs != 2 || s.BlobBytes != 0 {
		t.Errorf("%+v", s)
	}
}

// forged is a signed URL that says it is good for longer.
func forged(t *testing.T, signed string) string {
	t.Helper()
	u, err := url.Parse(signed)
	if err != nil {
		t.Fatal(err)
	}
	query := u.Query()
	query.Set("expires", query.Get("expires")+"0")
	u.RawQuery = query.Encode()
	return u.String()
}

func TestSetCredentials(t *testing.T) {
	c := start(t, fakeregistry.Options{Auth: fakeregistry.Basic, Username: "u", Password: "p"})
	for _, password := range []string{"p", "q"} {
		c.r.SetCredentials("u", password)
		for header, status := range map[string]int{"Basic dTpw": 200, "Basic dTpx": 401} { // u:p, u:q
			if password == "q" {
				status = 601 - status
			}
			resp, _ := c.do("GET", "/v2/", "", "Authorization", header)
			c.want(resp, status)
		}
	}
	c.r.SetCredentials("u", "p", "q")
	for _, header := range []string{"Basic dTpw", "Basic dTpx"} {
		resp, _ := c.do("GET", "/v2/", "", "Authorization", header)
		c.want(resp, 200)
	}
}
