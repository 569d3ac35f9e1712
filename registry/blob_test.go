package registry_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
)

func TestFetchIsOneRangedGET(t *testing.T) {
	data := noise(100_000)
	for _, tls := range []bool{false, true} {
		r := startRegistry(t, fakeregistry.Options{TLS: tls})
		b := blobOf(t, r, data, registry.Options{RootCAs: r.RootCAs()})
		if b.Size() != 100_000 || b.Digest() != sum(data) {
			t.Fatalf("size %d digest %s", b.Size(), b.Digest())
		}
		for _, tc := range []struct{ off, n int64 }{
			{0, 1}, {0, 100_000}, {99_999, 1}, {4096, 65_536}, {1, 99_999},
		} {
			r.ResetStats()
			got, start, err := fetch(t.Context(), b, tc.off, tc.n)
			if err != nil {
				t.Fatalf("%+v: %v", tc, err)
			}
			if start != tc.off || !bytes.Equal(got, data[tc.off:tc.off+tc.n]) {
				t.Errorf("%+v: start %d, %d bytes, wrong", tc, start, len(got))
			}
			want := fmt.Sprintf("bytes=%d-%d", tc.off, tc.off+tc.n-1)
			if gets := blobGETs(r); ranges(gets) != want || gets[0].Status != 206 {
				t.Errorf("%+v: asked %+v, want %s", tc, gets, want)
			}
			if s := r.Stats(); s.BlobBytes != tc.n || s.BlobGETs != 1 {
				t.Errorf("%+v: %+v", tc, s)
			}
			proto := "HTTP/1.1"
			if tls {
				proto = "HTTP/2.0"
			}
			if got := blobGETs(r)[0].Proto; got != proto {
				t.Errorf("protocol %s, want %s", got, proto)
			}
		}
	}
}

func TestFetchOutsideOfTheBlob(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{})
	b := blobOf(t, r, noise(100), registry.Options{})
	for _, tc := range []struct{ off, n int64 }{
		{0, 0}, {0, -1}, {-1, 2}, {0, 101}, {100, 1}, {99, 2}, {1 << 62, 1 << 62}, {1, 1<<63 - 1},
	} {
		if _, _, err := fetch(t.Context(), b, tc.off, tc.n); err == nil {
			t.Errorf("%+v: no error", tc)
		}
	}
	if n := r.Stats().Requests; n != 0 {
		t.Errorf("%d requests", n)
	}
}

func TestBlobRefusesDescriptors(t *testing.T) {
	c := newClient(t, registry.Options{})
	ref := parse(t, "127.0.0.1:1/x:v1")
	for _, desc := range []ocispec.Descriptor{
		{Digest: "", Size: 1},
		{Digest: "sha256:12", Size: 1},
		{Digest: "md5:d41d8cd98f00b204e9800998ecf8427e", Size: 1},
		{Digest: digest.SHA384.FromString("x"), Size: 1},
		{Digest: "sha256:../../../../etc/passwd", Size: 1},
		{Digest: digest.FromString("x"), Size: -1},
	} {
		if _, err := c.Blob(ref, desc); err == nil {
			t.Errorf("%+v: accepted", desc)
		}
	}
	if _, err := c.Blob(registry.Reference{Host: "h", Repository: "../x", Tag: "v"}, ocispec.Descriptor{Digest: digest.FromString("x")}); err == nil {
		t.Error("repository with .. accepted")
	}
}

// What violates one of the checks gives an error after one GET, and no data.
func TestFetchChecks(t *testing.T) {
	data := noise(1000)
	part := string(data[100:200])
	head := func(contentRange string, more ...string) http.Header {
		h := http.Header{"Content-Range": {contentRange}}
		if contentRange == "" {
			h = http.Header{}
		}
		for i := 0; i < len(more); i += 2 {
			h[more[i]] = []string{more[i+1]}
		}
		return h
	}
	const right = "bytes 100-199/1000"
	for _, tc := range []struct {
		name  string
		fault fakeregistry.Fault
		says  string
	}{
		{"range of another place", answer(206, head("bytes 0-99/1000"), string(data[:100])), "was given 0-99/1000"},
		{"range too short", answer(206, head("bytes 100-198/1000"), part[:99]), "was given 100-198/1000"},
		{"range too long", answer(206, head("bytes 100-200/1000"), string(data[100:201])), "was given 100-200/1000"},
		{"another size", answer(206, head("bytes 100-199/1001"), part), "100-199/1001"},
		{"unknown size", answer(206, head("bytes 100-199/*"), part), "Content-Range"},
		{"no Content-Range", answer(206, head(""), part), "Content-Range"},
		{"several ranges", answer(206, head("", "Content-Type", "multipart/byteranges; boundary=x"), part), "Content-Range"},
		{"body shorter by Content-Length", answer(206, head(right, "Content-Length", "99"), part[:99]), "Content-Length is 99"},
		{"body longer by Content-Length", answer(206, head(right), part+"x"), "Content-Length is 101"},
		{"body longer in chunks", answer(206, head(right, "Transfer-Encoding", "chunked"), part+"x"), "goes on after the range"},
		{"gzip", answer(206, head(right, "Content-Encoding", "gzip"), part), `Content-Encoding "gzip"`},
		{"whole blob, other size", answer(200, head(""), string(data)+"x"), "Content-Length is 1001"},
		{"whole blob, gzip", answer(200, head("", "Content-Encoding", "gzip"), string(data)), `Content-Encoding "gzip"`},
		{"no content", answer(204, head(""), ""), "204"},
		{"past the end", answer(416, head("bytes */50"), ""), "416"},
		{"gone", answer(410, head(""), ""), "410"},
		{"redirect without location", answer(307, head(""), ""), "307"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := startRegistry(t, fakeregistry.Options{})
			b := blobOf(t, r, data, registry.Options{})
			r.SetFault(onBlob(0, tc.fault))
			got, _, err := fetch(t.Context(), b, 100, 100)
			if err == nil || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("error %v does not say %q", err, tc.says)
			}
			if len(got) >= 100 {
				t.Errorf("all %d bytes were delivered", len(got))
			}
			if n := r.Stats().BlobGETs; n != 1 {
				t.Errorf("%d GETs for what no new try mends", n)
			}
		})
	}
}

func TestFetchUnknownBlob(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{})
	b, err := newClient(t, registry.Options{}).Blob(parse(t, r.Addr()+"/x:v1"), ocispec.Descriptor{Digest: sum(nil), Size: 10})
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = fetch(t.Context(), b, 0, 10)
	var status *registry.StatusError
	if !errors.As(err, &status) || status.Code != 404 || status.Method != "GET" || status.Codes[0] != "BLOB_UNKNOWN" {
		t.Errorf("%v", err)
	}
	if !strings.Contains(err.Error(), "blob unknown to registry") || !strings.Contains(err.Error(), r.Addr()) {
		t.Errorf("%v", err)
	}
	if n := r.Stats().BlobGETs; n != 1 {
		t.Errorf("%d GETs", n)
	}
}

// withoutRanges makes r a server that knows none.
func withoutRanges(next func(*http.Request) *fakeregistry.Fault) func(*http.Request) *fakeregistry.Fault {
	return func(q *http.Request) *fakeregistry.Fault {
		q.Header.Del("Range")
		if next == nil {
			return nil
		}
		return next(q)
	}
}

func TestWholeBlobInsteadOfRange(t *testing.T) {
	data := noise(100_000)
	r := startRegistry(t, fakeregistry.Options{})
	b := blobOf(t, r, data, registry.Options{})
	r.SetFault(withoutRanges(nil))
	got, start, err := fetch(t.Context(), b, 5000, 100)
	if err != nil || start != 0 || !bytes.Equal(got, data) {
		t.Errorf("start %d, %d bytes, %v", start, len(got), err)
	}
	if s := r.Stats(); s.BlobGETs != 1 || s.BlobBytes != 100_000 {
		t.Errorf("%+v", s)
	}
}

func TestWholeBlobOfUnsaidLength(t *testing.T) {
	data := noise(1000)
	for _, tc := range []struct {
		name string
		body []byte
		ok   bool
	}{{"exact", data, true}, {"longer", append(bytes.Clone(data), 0), false}} {
		r := startRegistry(t, fakeregistry.Options{})
		b := blobOf(t, r, data, registry.Options{})
		r.SetFault(onBlob(0, answer(200, http.Header{"Transfer-Encoding": {"chunked"}}, string(tc.body))))
		got, start, err := fetch(t.Context(), b, 100, 100)
		if (err == nil) != tc.ok || start != 0 || tc.ok && !bytes.Equal(got, data) {
			t.Errorf("%s: start %d, %d bytes, %v", tc.name, start, len(got), err)
		}
	}
}

func TestBrokenBodyResumes(t *testing.T) {
	data := noise(100_000)
	for _, tc := range []struct {
		name   string
		fault  func(*http.Request) *fakeregistry.Fault
		off, n int64
		ranges string
		bytes  int64
	}{
		{"once", onBlob(1, fakeregistry.Fault{After: 30_000, Break: true}), 0, 100_000,
			"bytes=0-99999 bytes=30000-99999", 100_000},
		{"before the header", onBlob(1, fakeregistry.Fault{After: -1, Break: true}), 10, 20_000,
			"bytes=10-20009 bytes=10-20009", 20_000},
		{"before the last byte", onBlob(1, fakeregistry.Fault{After: 19_999, Break: true}), 10, 20_000,
			"bytes=10-20009 bytes=20009-20009", 20_000},
		{"every answer", onBlob(0, fakeregistry.Fault{After: 30_000, Break: true}), 5, 99_000,
			"bytes=5-99004 bytes=30005-99004 bytes=60005-99004 bytes=90005-99004", 99_000},
		{"answered in whole at the second try", func() func(*http.Request) *fakeregistry.Fault {
			first := onBlob(1, fakeregistry.Fault{After: 1000, Break: true})
			return func(q *http.Request) *fakeregistry.Fault {
				f := first(q)
				if f == nil {
					q.Header.Del("Range")
				}
				return f
			}
		}(), 500, 5000, "bytes=500-5499 bytes=1500-5499", -1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := startRegistry(t, fakeregistry.Options{})
			b := blobOf(t, r, data, registry.Options{})
			r.SetFault(tc.fault)
			got, start, err := fetch(t.Context(), b, tc.off, tc.n)
			if err != nil || start != tc.off || !bytes.Equal(got, data[tc.off:tc.off+tc.n]) {
				t.Fatalf("start %d, %d bytes, %v", start, len(got), err)
			}
			if got := ranges(blobGETs(r)); got != tc.ranges {
				t.Errorf("asked %s\nwant  %s", got, tc.ranges)
			}
			if s := r.Stats(); tc.bytes >= 0 && s.BlobBytes != tc.bytes {
				t.Errorf("%d bytes were sent, want %d", s.BlobBytes, tc.bytes)
			}
		})
	}
}

func TestBrokenWholeBlobResumes(t *testing.T) {
	data := noise(100_000)
	r := startRegistry(t, fakeregistry.Options{})
	b := blobOf(t, r, data, registry.Options{})
	r.SetFault(withoutRanges(onBlob(1, fakeregistry.Fault{After: 70_000, Break: true})))
	got, start, err := fetch(t.Context(), b, 5000, 100)
	if err != nil || start != 0 || !bytes.Equal(got, data) {
		t.Errorf("start %d, %d bytes, %v", start, len(got), err)
	}
	if got, want := ranges(blobGETs(r)), "bytes=5000-5099 bytes=70000-99999"; got != want {
		t.Errorf("asked %q, want %q", got, want)
	}
}

// A resumed answer is checked like the first.
func TestResumedAnswerIsChecked(t *testing.T) {
	data := noise(1000)
	r := startRegistry(t, fakeregistry.Options{})
	b := blobOf(t, r, data, registry.Options{})
	first := onBlob(1, fakeregistry.Fault{After: 300, Break: true})
	second := onBlob(2, answer(206, http.Header{"Content-Range": {"bytes 0-699/1000"}}, string(data[:700])))
	r.SetFault(func(q *http.Request) *fakeregistry.Fault {
		f, s := first(q), second(q)
		if f != nil {
			return f
		}
		return s
	})
	got, _, err := fetch(t.Context(), b, 0, 1000)
	if err == nil || !strings.Contains(err.Error(), "was given 0-699/1000") {
		t.Errorf("%v", err)
	}
	if !bytes.Equal(got, data[:300]) {
		t.Errorf("%d bytes, want the 300 right ones", len(got))
	}
}

func TestTemporaryRefusals(t *testing.T) {
	data := noise(1000)
	for _, code := range []int{408, 425, 429, 500, 502, 503, 504} {
		r := startRegistry(t, fakeregistry.Options{})
		b := blobOf(t, r, data, registry.Options{})
		r.SetFault(onBlob(1, fakeregistry.Fault{Status: code}))
		got, _, err := fetch(t.Context(), b, 0, 1000)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d: %v", code, err)
		}
		if n := r.Stats().BlobGETs; n != 2 {
			t.Errorf("%d: %d GETs", code, n)
		}
	}
}

func TestRetryAfterIsHonoured(t *testing.T) {
	data := noise(1000)
	r := startRegistry(t, fakeregistry.Options{})
	b := blobOf(t, r, data, registry.Options{})
	r.SetFault(onBlob(1, fakeregistry.Fault{Status: 429, Header: http.Header{"Retry-After": {"1"}}}))
	began := time.Now()
	if _, _, err := fetch(t.Context(), b, 0, 1000); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(began); d < time.Second || d > 4*time.Second {
		t.Errorf("took %v", d)
	}
	if n := r.Stats().BlobGETs; n != 2 {
		t.Errorf("%d GETs", n)
	}
}

// midBody starts a fetch whose body stops after 1000 bytes, and reads those.
func midBody(t *testing.T, r *fakeregistry.Registry, b *registry.Blob, data []byte) io.ReadCloser {
	t.Helper()
	never := make(chan struct{})
	r.SetFault(onBlob(1, fakeregistry.Fault{After: 1000, Stall: never}))
	body, _, _, err := b.Fetch(t.Context(), 0, int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = body.Close() })
	first := make([]byte, 1000)
	if _, err := io.ReadFull(body, first); err != nil || !bytes.Equal(first, data[:1000]) {
		t.Fatalf("first bytes: %v", err)
	}
	return body
}

func TestRegistryDiesMidBody(t *testing.T) {
	data := noise(10_000)
	r := startRegistry(t, fakeregistry.Options{})
	b := blobOf(t, r, data, registry.Options{ErrorWait: time.Second})
	body := midBody(t, r, b, data)
	r.Stop()
	began := time.Now()
	n, err := io.Copy(io.Discard, body)
	took := time.Since(began)
	var gone *registry.UnavailableError
	if n != 0 || !errors.As(err, &gone) {
		t.Fatalf("%d bytes, %v", n, err)
	}
	if took > 2*time.Second || took < 700*time.Millisecond {
		t.Errorf("the error came after %v; the wait is 1s", took)
	}
	if gone.Host != r.Addr() || gone.Tries < 2 || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("%v", err)
	}
	if _, again := body.Read(make([]byte, 1)); again == nil || again.Error() != err.Error() {
		t.Errorf("the error does not stay: %v", again)
	}
}

func TestRegistryComesBackMidBody(t *testing.T) {
	data := noise(10_000)
	r := startRegistry(t, fakeregistry.Options{})
	log := newWatchedLog()
	b := blobOf(t, r, data, registry.Options{ErrorWait: 30 * time.Second, Logger: log.logger()})
	body := midBody(t, r, b, data)
	type result struct {
		rest []byte
		err  error
	}
	done := make(chan result, 1)
	r.Stop()
	go func() {
		rest, err := io.ReadAll(body)
		done <- result{rest, err}
	}()
	soon(t, log.lines, "sign of trouble in the log")
	r.SetFault(nil)
	if err := r.Start(); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	got := <-done
	if got.err != nil || !bytes.Equal(got.rest, data[1000:]) {
		t.Errorf("%d bytes, %v", len(got.rest), got.err)
	}
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("the reader went on %v after the registry came back", took)
	}
	if got, want := ranges(blobGETs(r)), "bytes=0-9999 bytes=1000-9999"; got != want {
		t.Errorf("asked %s, want %s", got, want)
	}
}

func TestStalls(t *testing.T) {
	data := noise(10_000)
	for _, tc := range []struct {
		name   string
		after  int64
		ranges string
	}{
		{"before the header", -1, "bytes=0-9999 bytes=0-9999"},
		{"in the body", 4000, "bytes=0-9999 bytes=4000-9999"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := startRegistry(t, fakeregistry.Options{})
			b := blobOf(t, r, data, registry.Options{NoProgress: 200 * time.Millisecond, ErrorWait: 30 * time.Second})
			never := make(chan struct{})
			r.SetFault(onBlob(1, fakeregistry.Fault{After: tc.after, Stall: never}))
			began := time.Now()
			got, _, err := fetch(t.Context(), b, 0, 10_000)
			if err != nil || !bytes.Equal(got, data) {
				t.Fatalf("%d bytes, %v", len(got), err)
			}
			if took := time.Since(began); took < 200*time.Millisecond || took > 5*time.Second {
				t.Errorf("took %v", took)
			}
			if got := ranges(blobGETs(r)); got != tc.ranges {
				t.Errorf("asked %s, want %s", got, tc.ranges)
			}
		})
	}
}

func TestEndlessStall(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{})
	b := blobOf(t, r, noise(10_000), registry.Options{NoProgress: 150 * time.Millisecond, ErrorWait: time.Second})
	r.SetFault(onBlob(0, fakeregistry.Fault{After: 0, Stall: make(chan struct{})}))
	began := time.Now()
	got, _, err := fetch(t.Context(), b, 0, 10_000)
	var gone *registry.UnavailableError
	if len(got) != 0 || !errors.As(err, &gone) || !strings.Contains(err.Error(), "no byte from") {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("took %v; the wait is 1s", took)
	}
}

// A slow body is no stall as long as something comes.
func TestSlowBodyIsNoStall(t *testing.T) {
	data := noise(320 << 10)
	r := startRegistry(t, fakeregistry.Options{})
	b := blobOf(t, r, data, registry.Options{NoProgress: 900 * time.Millisecond, ErrorWait: time.Second})
	r.SetBandwidth(160 << 10) // 16 KiB each 100 ms
	got, _, err := fetch(t.Context(), b, 0, int64(len(data)))
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if n := r.Stats().BlobGETs; n != 1 {
		t.Errorf("%d GETs", n)
	}
}

func TestNoWait(t *testing.T) {
	data := noise(10_000)
	r := startRegistry(t, fakeregistry.Options{})
	b := blobOf(t, r, data, registry.Options{ErrorWait: registry.NoWait})
	r.SetFault(onBlob(1, fakeregistry.Fault{After: 1000, Break: true}))
	got, _, err := fetch(t.Context(), b, 0, 10_000)
	if err == nil || !bytes.Equal(got, data[:1000]) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if n := r.Stats().BlobGETs; n != 1 {
		t.Errorf("%d GETs", n)
	}
}

func TestCallerLeaves(t *testing.T) {
	data := noise(10_000)
	r := startRegistry(t, fakeregistry.Options{})
	log := newWatchedLog()
	b := blobOf(t, r, data, registry.Options{ErrorWait: time.Hour, Logger: log.logger()})
	never := make(chan struct{})
	for _, stage := range []string{"header", "body", "retry"} {
		ctx, cancel := context.WithCancel(t.Context())
		switch stage {
		case "header":
			r.SetFault(func(*http.Request) *fakeregistry.Fault {
				cancel()
				return &fakeregistry.Fault{After: -1, Stall: never}
			})
		case "body":
			r.SetFault(func(*http.Request) *fakeregistry.Fault {
				time.AfterFunc(50*time.Millisecond, cancel)
				return &fakeregistry.Fault{After: 100, Stall: never}
			})
		case "retry":
			r.SetFault(func(*http.Request) *fakeregistry.Fault {
				time.AfterFunc(50*time.Millisecond, cancel)
				return &fakeregistry.Fault{Status: 429, Header: http.Header{"Retry-After": {"3600"}}}
			})
		}
		_, _, err := fetch(ctx, b, 0, 10_000)
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", stage, err)
		}
		cancel()
	}
}

func TestCloseEndsEverything(t *testing.T) {
	data := noise(10_000)
	r := startRegistry(t, fakeregistry.Options{})
	desc := pushBlob(t, r, data, pushOptions(t, r))
	c := newClient(t, registry.Options{})
	b, err := c.Blob(parse(t, r.Addr()+"/x:v1"), desc)
	if err != nil {
		t.Fatal(err)
	}
	body := midBody(t, r, b, data)
	done := make(chan error, 1)
	go func() {
		_, err := io.ReadAll(body)
		done <- err
	}()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err == nil || !strings.Contains(err.Error(), "client is closed") {
		t.Errorf("body: %v", err)
	}
	if _, _, err := fetch(t.Context(), b, 0, 10); err == nil || !strings.Contains(err.Error(), "client is closed") {
		t.Errorf("fetch: %v", err)
	}
}

// Waiting for a connection that others hold is not taken for a silent server.
func TestWaitingForAConnectionIsNoStall(t *testing.T) {
	data := noise(4 << 20)
	r := startRegistry(t, fakeregistry.Options{})
	b := blobOf(t, r, data, registry.Options{NoProgress: 100 * time.Millisecond, ErrorWait: 20 * time.Second, MaxConnsPerHost: 1})
	holder, _, _, err := b.Fetch(t.Context(), 0, int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, _, err := fetch(t.Context(), b, 0, 100)
		done <- err
	}()
	select {
	case err := <-done:
		t.Fatalf("there was a second connection, or an error: %v", err)
	case <-time.After(400 * time.Millisecond):
	}
	if err := holder.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if n := r.Stats().BlobGETs; n != 2 {
		t.Errorf("%d GETs", n)
	}
}

func TestParallelFetches(t *testing.T) {
	data := noise(1 << 20)
	r := startRegistry(t, fakeregistry.Options{})
	b := blobOf(t, r, data, registry.Options{})
	var wg sync.WaitGroup
	for i := range int64(32) {
		wg.Go(func() {
			off := i * 32 << 10
			got, _, err := fetch(t.Context(), b, off, 32<<10)
			if err != nil || !bytes.Equal(got, data[off:off+32<<10]) {
				t.Errorf("at %d: %v", off, err)
			}
		})
	}
	wg.Wait()
	if s := r.Stats(); s.BlobGETs != 32 || s.BlobBytes != 1<<20 {
		t.Errorf("%+v", s)
	}
}
