package fakeregistry_test

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"

	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A client is an HTTP client that fails the test by itself.
type client struct {
	t *testing.T
	r *fakeregistry.Registry
	*http.Client
}

func start(t *testing.T, o fakeregistry.Options) client {
	t.Helper()
	r, err := fakeregistry.New(o)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: r.RootCAs()}, ForceAttemptHTTP2: true}
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return client{t, r, &http.Client{Transport: transport}}
}

// do sends a request; the body is read and closed.
func (c client) do(method, path, body string, header ...string) (*http.Response, string) {
	c.t.Helper()
	url := path
	if strings.HasPrefix(path, "/") {
		url = c.r.URL() + path
	}
	q, err := http.NewRequestWithContext(c.t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		c.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		q.Header.Set(header[i], header[i+1])
	}
	resp, err := c.Do(q)
	if err != nil {
		c.t.Fatal(err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	return resp, string(got)
}

func (c client) want(resp *http.Response, status int, header ...string) {
	c.t.Helper()
	if resp.StatusCode != status {
		c.t.Errorf("%s %s: %s, want %d", resp.Request.Method, resp.Request.URL, resp.Status, status)
	}
	for i := 0; i < len(header); i += 2 {
		if got := resp.Header.Get(header[i]); got != header[i+1] {
			c.t.Errorf("%s %s: %s is %q, want %q", resp.Request.Method, resp.Request.URL, header[i], got, header[i+1])
		}
	}
}

// push uploads in one POST.
func (c client) push(repo, content string) digest.Digest {
	c.t.Helper()
	d := digest.FromString(content)
	resp, _ := c.do("POST", "/v2/"+repo+"/blobs/uploads/?digest="+d.String(), content)
	c.want(resp, 201, "Location", "/v2/"+repo+"/blobs/"+d.String(), "Docker-Content-Digest", d.String())
	return d
}

func TestUploads(t *testing.T) {
	for _, dir := range []string{"", t.TempDir()} {
		c := start(t, fakeregistry.Options{Dir: dir})
		const content = "0123456789"
		d := digest.FromString(content).String()

		c.push("a/mono", content)

		resp, _ := c.do("POST", "/v2/a/put/blobs/uploads/?mount="+d+"&from=a/mono", "")
		c.want(resp, 202)
		resp, _ = c.do("PUT", c.r.URL()+resp.Header.Get("Location")+"?digest="+d, content)
		c.want(resp, 201)

		resp, _ = c.do("POST", "/v2/a/chunked/blobs/uploads/", "")
		c.want(resp, 202)
		place := c.r.URL() + resp.Header.Get("Location")
		resp, _ = c.do("PATCH", place, content[:4], "Content-Range", "0-3")
		c.want(resp, 202, "Range", "0-3")
		resp, _ = c.do("PATCH", place, content[5:], "Content-Range", "5-9")
		c.want(resp, 416, "Range", "0-3")
		resp, _ = c.do("GET", place, "")
		c.want(resp, 204, "Range", "0-3")
		resp, _ = c.do("PATCH", place, content[4:8], "Content-Range", "4-7")
		c.want(resp, 202, "Range", "0-7")
		resp, _ = c.do("PUT", place+"?digest="+d, content[8:])
		c.want(resp, 201)

		for _, repo := range []string{"a/mono", "a/put", "a/chunked"} {
			resp, got := c.do("GET", "/v2/"+repo+"/blobs/"+d, "")
			c.want(resp, 200, "Content-Length", "10", "Docker-Content-Digest", d)
			if got != content {
				t.Errorf("%s: %q", repo, got)
			}
		}
		resp, _ = c.do("GET", "/v2/a/other/blobs/"+d, "")
		c.want(resp, 404)

		resp, body := c.do("POST", "/v2/a/x/blobs/uploads/?digest="+d, "something else")
		c.want(resp, 400)
		if !strings.Contains(body, "DIGEST_INVALID") {
			t.Errorf("%s", body)
		}
		resp, _ = c.do("PUT", "/v2/a/x/blobs/uploads/nowhere?digest="+d, content)
		c.want(resp, 404)
		if dir != "" {
			if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
				t.Errorf("named files: %v, %v", left, err)
			}
		}
	}
}

func TestRanges(t *testing.T) {
	c := start(t, fakeregistry.Options{})
	path := "/v2/x/blobs/" + c.push("x", "0123456789").String()
	c.r.ResetStats()
	for _, tc := range []struct {
		ask    string
		status int
		says   string
		body   string
	}{
		{"bytes=0-0", 206, "bytes 0-0/10", "0"},
		{"bytes=2-5", 206, "bytes 2-5/10", "2345"},
		{"bytes=8-100", 206, "bytes 8-9/10", "89"},
		{"bytes=10-11", 416, "bytes */10", ""},
	} {
		resp, body := c.do("GET", path, "", "Range", tc.ask)
		c.want(resp, tc.status, "Content-Range", tc.says)
		if tc.status == 206 && body != tc.body {
			t.Errorf("%s: %q", tc.ask, body)
		}
	}
	resp, _ := c.do("HEAD", path, "")
	c.want(resp, 200, "Content-Length", "10")
	if s := c.r.Stats(); s != (fakeregistry.Stats{Requests: 5, BlobGETs: 4, BlobHEADs: 1, BlobBytes: 7}) {
		t.Errorf("%+v", s)
	}
	want := fakeregistry.Request{Method: "GET", Path: path, Range: "bytes=2-5", Status: 206, Bytes: 4, Proto: "HTTP/1.1"}
	if got := c.r.Requests()[1]; got != want {
		t.Errorf("%+v", got)
	}
}

func TestManifests(t *testing.T) {
	c := start(t, fakeregistry.Options{})
	const one, two = `{"a":1}`, `{"a":2}`
	d := digest.FromString(one).String()
	resp, _ := c.do("PUT", "/v2/a/b/manifests/v1", one, "Content-Type", "text/x-one")
	c.want(resp, 201, "Docker-Content-Digest", d)
	for _, name := range []string{"v1", d} {
		resp, body := c.do("GET", "/v2/a/b/manifests/"+name, "")
		c.want(resp, 200, "Content-Type", "text/x-one", "Docker-Content-Digest", d)
		if body != one {
			t.Errorf("%s: %q", name, body)
		}
		resp, body = c.do("HEAD", "/v2/a/b/manifests/"+name, "")
		c.want(resp, 200, "Content-Length", "7")
		if body != "" {
			t.Errorf("HEAD %s: %q", name, body)
		}
	}
	resp, _ = c.do("PUT", "/v2/a/b/manifests/v1", two)
	c.want(resp, 201)
	if _, body := c.do("GET", "/v2/a/b/manifests/v1", ""); body != two {
		t.Errorf("tag did not move: %q", body)
	}
	if _, body := c.do("GET", "/v2/a/b/manifests/"+d, ""); body != one {
		t.Errorf("digest is gone: %q", body)
	}
	resp, _ = c.do("PUT", "/v2/a/b/manifests/"+d, two)
	c.want(resp, 400)
	for _, path := range []string{"/v2/a/b/manifests/v9", "/v2/a/c/manifests/v1", "/v2/a", "/v2/x/tags/list"} {
		resp, _ = c.do("GET", path, "")
		c.want(resp, 404)
	}
	resp, _ = c.do("GET", "/v2/", "")
	c.want(resp, 200)
}

func TestBasic(t *testing.T) {
	c := start(t, fakeregistry.Options{Auth: fakeregistry.Basic, Username: "u", Password: "p"})
	for header, status := range map[string]int{"": 401, "Basic dTpw": 200, "Basic dTpx": 401, "Bearer x": 401} {
		resp, _ := c.do("GET", "/v2/", "", "Authorization", header)
		c.want(resp, status)
		if challenge := resp.Header.Get("WWW-Authenticate"); status == 401 && !strings.HasPrefix(challenge, "Basic realm=") {
			t.Errorf("%s", challenge)
		}
	}
}

func TestBearer(t *testing.T) {
	c := start(t, fakeregistry.Options{Auth: fakeregistry.Bearer, Username: "u", Password: "p", IdentityToken: "i", TokenLife: 90 * time.Second})
	resp, _ := c.do("GET", "/v2/a/b/manifests/x", "")
	want := fmt.Sprintf(`Bearer realm="%s/token",service="fakeregistry",scope="repository:a/b:pull"`, c.r.URL())
	c.want(resp, 401, "WWW-Authenticate", want)

	token := func(method, query, body string, header ...string) string {
		t.Helper()
		resp, got := c.do(method, "/token"+query, body, header...)
		var doc struct {
			Token  string  `json:"token"`
			Access string  `json:"access_token"`
			Life   float64 `json:"expires_in"`
		}
		if resp.StatusCode != 200 {
			return ""
		}
		if err := json.Unmarshal([]byte(got), &doc); err != nil || doc.Life != 90 {
			t.Errorf("%s: %v", got, err)
		}
		return doc.Token + doc.Access
	}
	const query = "?service=fakeregistry&scope=repository:a/b:pull"
	const form = "grant_type=refresh_token&service=fakeregistry&scope=repository:a/b:pull&refresh_token="
	formType := []string{"Content-Type", "application/x-www-form-urlencoded"}
	good := []string{
		token("GET", query, "", "Authorization", "Basic dTpw"),
		token("POST", "", form+"i", formType...),
		c.r.IssueToken(),
	}
	for _, g := range good {
		resp, _ = c.do("GET", "/v2/a/b/manifests/x", "", "Authorization", "Bearer "+g)
		c.want(resp, 404)
	}
	for i, g := range good {
		resp, _ = c.do("GET", "/v2/a/other/manifests/x", "", "Authorization", "Bearer "+g)
		c.want(resp, map[bool]int{true: 404, false: 401}[i == 2]) // the issued one is for all
	}
	for _, bad := range []string{
		token("GET", query, ""), token("GET", query, "", "Authorization", "Basic dTpx"),
		token("POST", "", form+"j", formType...), token("GET", "?service=other", "", "Authorization", "Basic dTpw"),
	} {
		if bad != "" {
			t.Errorf("a token was given to a stranger")
		}
	}
	c.r.RevokeTokens()
	resp, _ = c.do("GET", "/v2/a/b/manifests/x", "", "Authorization", "Bearer "+good[0])
	c.want(resp, 401)
}

func TestTLS(t *testing.T) {
	c := start(t, fakeregistry.Options{TLS: true})
	resp, _ := c.do("GET", "/v2/", "")
	c.want(resp, 200)
	if resp.Proto != "HTTP/2.0" || !strings.HasPrefix(c.r.URL(), "https://") {
		t.Errorf("%s %s", resp.Proto, c.r.URL())
	}
}

func TestStopAndStart(t *testing.T) {
	c := start(t, fakeregistry.Options{})
	content := strings.Repeat("x", 100_000)
	d := c.push("x", content)
	hold := make(chan struct{})
	c.r.SetFault(func(*http.Request) *fakeregistry.Fault { return &fakeregistry.Fault{After: 10, Stall: hold} })
	resp, err := c.Get(c.r.URL() + "/v2/x/blobs/" + d.String())
	if err != nil {
		t.Fatal(err)
	}
	c.r.Stop()
	if n, err := io.Copy(io.Discard, resp.Body); n != 10 || err == nil {
		t.Errorf("%d bytes, %v", n, err)
	}
	if err := resp.Body.Close(); err != nil {
		t.Error(err)
	}
	if conn, err := net.Dial("tcp", c.r.Addr()); err == nil {
		_ = conn.Close()
		t.Error("a stopped registry accepts connections")
	}
	c.r.SetFault(nil)
	if err := c.r.Start(); err != nil {
		t.Fatal(err)
	}
	if err := c.r.Start(); err == nil {
		t.Error("started twice")
	}
	if _, got := c.do("GET", "/v2/x/blobs/"+d.String(), ""); got != content {
		t.Errorf("%d bytes", len(got))
	}
	if s := c.r.Stats(); s.BlobGETs != 2 || s.BlobBytes != 100_010 {
		t.Errorf("%+v", s)
	}
	c.r.Stop()
	c.r.Stop()
}

func TestFaults(t *testing.T) {
	c := start(t, fakeregistry.Options{})
	content := strings.Repeat("0123456789", 10_000)
	path := "/v2/x/blobs/" + c.push("x", content).String()
	get := func() (int, string, error) {
		resp, err := c.Get(c.r.URL() + path)
		if err != nil {
			return 0, "", err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		return resp.StatusCode, string(b), err
	}
	for _, tc := range []struct {
		name   string
		fault  fakeregistry.Fault
		status int
		bytes  int
		broken bool
	}{
		{"none", fakeregistry.Fault{}, 200, 100_000, false},
		{"status", fakeregistry.Fault{Status: 503}, 503, 0, false},
		{"broken before the header", fakeregistry.Fault{After: -1, Break: true}, 0, 0, true},
		{"broken in the body", fakeregistry.Fault{After: 70_001, Break: true}, 200, 70_001, true},
		{"broken after the body", fakeregistry.Fault{After: 100_000, Break: true}, 200, 100_000, false},
	} {
		c.r.SetFault(func(*http.Request) *fakeregistry.Fault { return &tc.fault })
		status, body, err := get()
		if status != tc.status || tc.status == 200 && len(body) != tc.bytes || (err != nil) != tc.broken {
			t.Errorf("%s: %d, %d bytes, %v", tc.name, status, len(body), err)
		}
	}

	release := make(chan struct{})
	c.r.SetFault(func(*http.Request) *fakeregistry.Fault {
		return &fakeregistry.Fault{After: 5, Stall: release, Header: http.Header{"docker-content-digest": {"odd"}}}
	})
	resp, err := c.Get(c.r.URL() + path)
	if err != nil {
		t.Fatal(err)
	}
	c.want(resp, 200, "Docker-Content-Digest", "odd")
	first := make([]byte, 5)
	if _, err := io.ReadFull(resp.Body, first); err != nil || string(first) != "01234" {
		t.Errorf("%q, %v", first, err)
	}
	close(release)
	if rest, err := io.ReadAll(resp.Body); err != nil || string(rest) != content[5:] {
		t.Errorf("%d bytes, %v", len(rest), err)
	}
	_ = resp.Body.Close()

	c.r.SetFault(func(q *http.Request) *fakeregistry.Fault {
		q.Header.Del("Range")
		return nil
	})
	resp, body := c.do("GET", path, "", "Range", "bytes=1-2")
	c.want(resp, 200)
	if len(body) != 100_000 {
		t.Errorf("%d bytes", len(body))
	}
}

func TestLatencyAndBandwidth(t *testing.T) {
	c := start(t, fakeregistry.Options{})
	path := "/v2/x/blobs/" + c.push("x", string(bytes.Repeat([]byte("x"), 64<<10))).String()
	c.r.SetLatency(100 * time.Millisecond)
	c.r.SetBandwidth(512 << 10) // 64 KiB are an eighth of a second
	began := time.Now()
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() { c.do("GET", path, "") })
	}
	wg.Wait()
	if took := time.Since(began); took < 350*time.Millisecond {
		t.Errorf("two at once took %v; 100ms of latency and 250ms on the link are the least", took)
	}
}

// A stopped registry does not wait for delays that are under way.
func TestStopDuringLatency(t *testing.T) {
	c := start(t, fakeregistry.Options{})
	c.r.SetLatency(time.Hour)
	arrived := make(chan struct{})
	c.r.SetFault(func(*http.Request) *fakeregistry.Fault { close(arrived); return nil })
	failed := make(chan error, 1)
	go func() {
		resp, err := c.Get(c.r.URL() + "/v2/")
		if err == nil {
			err = errors.Join(errors.New("answered"), resp.Body.Close())
		}
		failed <- err
	}()
	<-arrived
	c.r.Stop()
	if err := <-failed; err == nil || strings.Contains(err.Error(), "answered") {
		t.Errorf("%v", err)
	}
}

func TestUploadOptions(t *testing.T) {
	const content = "0123456789"
	d := digest.FromString(content).String()
	begin := func(c client) string {
		t.Helper()
		resp, _ := c.do("POST", "/v2/a/blobs/uploads/", "")
		c.want(resp, 202)
		return resp.Header.Get("Location")
	}

	c := start(t, fakeregistry.Options{Upload: fakeregistry.Upload{Mount: true}})
	c.push("b", content)
	resp, _ := c.do("POST", "/v2/a/blobs/uploads/?mount="+d+"&from=c", "")
	c.want(resp, 202)
	if n := c.r.OpenUploads(); n != 1 {
		t.Errorf("%d uploads, want 1", n)
	}
	place := resp.Header.Get("Location")
	resp, _ = c.do("DELETE", place, "")
	c.want(resp, 204)
	resp, _ = c.do("GET", place, "")
	c.want(resp, 404)
	resp, _ = c.do("POST", "/v2/a/blobs/uploads/?mount="+d+"&from=b", "")
	c.want(resp, 201, "Docker-Content-Digest", d, "Location", "/v2/a/blobs/"+d)
	resp, body := c.do("GET", "/v2/a/blobs/"+d, "")
	c.want(resp, 200)
	if n := c.r.OpenUploads(); n != 0 || body != content {
		t.Errorf("%d uploads, %q", n, body)
	}
	if s := c.r.Stats(); s.Uploads != 3 || s.UploadBytes != int64(len(content)) {
		t.Errorf("%+v", s)
	}

	c = start(t, fakeregistry.Options{Upload: fakeregistry.Upload{MinChunk: 4, State: true, Absolute: true}})
	resp, _ = c.do("POST", "/v2/a/blobs/uploads/", "")
	c.want(resp, 202, "OCI-Chunk-Min-Length", "4")
	first := resp.Header.Get("Location")
	if !strings.HasPrefix(first, c.r.URL()+"/v2/a/blobs/uploads/") {
		t.Errorf("Location is %q", first)
	}
	resp, _ = c.do("PATCH", first, content[:4], "Content-Range", "0-3")
	c.want(resp, 202)
	second := resp.Header.Get("Location")
	resp, _ = c.do("PATCH", first, content[4:8], "Content-Range", "4-7")
	c.want(resp, 400)
	resp, _ = c.do("PATCH", second, content[4:6], "Content-Range", "4-5")
	c.want(resp, 202, "Range", "0-5")
	resp, _ = c.do("PATCH", resp.Header.Get("Location"), content[6:], "Content-Range", "6-9")
	c.want(resp, 416) // the one before was too short not to be the last

	c = start(t, fakeregistry.Options{Upload: fakeregistry.Upload{NoStatus: true}})
	resp, _ = c.do("GET", begin(c), "")
	c.want(resp, 405)
}

func TestUploadFaults(t *testing.T) {
	const content = "0123456789"
	c := start(t, fakeregistry.Options{})
	resp, _ := c.do("POST", "/v2/a/blobs/uploads/", "")
	place := c.r.URL() + resp.Header.Get("Location")
	for _, f := range []struct {
		fault fakeregistry.Fault
		has   string
	}{
		{fakeregistry.Fault{BreakUpload: 3}, "0-2"},
		{fakeregistry.Fault{LoseAnswer: true}, "0-12"},
	} {
		c.r.SetFault(func(q *http.Request) *fakeregistry.Fault {
			if q.Method == http.MethodPatch {
				return &f.fault
			}
			return nil
		})
		q, err := http.NewRequestWithContext(t.Context(), http.MethodPatch, place, strings.NewReader(content))
		if err != nil {
			t.Fatal(err)
		}
		if resp, err := c.Do(q); err == nil {
			resp.Body.Close()
			t.Errorf("%+v: %s", f.fault, resp.Status)
		}
		resp, _ = c.do("GET", place, "")
		c.want(resp, 204, "Range", f.has)
	}
}

func TestReferrers(t *testing.T) {
	for _, known := range []bool{false, true} {
		c := start(t, fakeregistry.Options{Referrers: known})
		d := digest.FromString("image").String()
		resp, _ := c.do("PUT", "/v2/a/manifests/sig", `{"artifactType":"a/b","subject":{"digest":"`+d+`"}}`, "Content-Type", "x/y")
		c.want(resp, 201)
		resp, _ = c.do("PUT", "/v2/a/manifests/other", `{"artifactType":"a/c"}`, "Content-Type", "x/y")
		c.want(resp, 201)
		resp, body := c.do("GET", "/v2/a/referrers/"+d, "")
		if !known {
			c.want(resp, 404)
			continue
		}
		c.want(resp, 200, "Content-Type", "application/vnd.oci.image.index.v1+json")
		var index struct {
			Manifests []struct{ ArtifactType string }
		}
		if err := json.Unmarshal([]byte(body), &index); err != nil || len(index.Manifests) != 1 || index.Manifests[0].ArtifactType != "a/b" {
			t.Errorf("%s, %v", body, err)
		}
	}
}
