package registry_test

import (
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/registry"
)

// A transportFunc is a whole network.
type transportFunc func(*http.Request) (*http.Response, error)

func (f transportFunc) RoundTrip(q *http.Request) (*http.Response, error) { return f(q) }

func reply(q *http.Request, status int, header http.Header, body string) *http.Response {
	if header == nil {
		header = http.Header{}
	}
	return &http.Response{
		StatusCode: status, Header: header, Request: q,
		Body: io.NopCloser(strings.NewReader(body)), ContentLength: int64(len(body)),
	}
}

var refused = &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}

// In the bubble's time: how long a reader waits, and how often it tries.
func TestPatience(t *testing.T) {
	const size = 10
	good := func(q *http.Request) (*http.Response, error) {
		return reply(q, 206, http.Header{"Content-Range": {"bytes 0-9/10"}}, "0123456789"), nil
	}
	slow := func(q *http.Request) (*http.Response, error) {
		<-q.Context().Done()
		return nil, q.Context().Err()
	}
	for _, tc := range []struct {
		name     string
		network  func(elapsed time.Duration, q *http.Request) (*http.Response, error)
		opts     registry.Options
		min, max time.Duration
		tries    [2]int
		ok       bool
	}{
		{"dead for ever", func(time.Duration, *http.Request) (*http.Response, error) { return nil, refused },
			registry.Options{}, 59 * time.Second, 60 * time.Second, [2]int{30, 200}, false},
		{"back after half a minute", func(e time.Duration, q *http.Request) (*http.Response, error) {
			if e < 30*time.Second {
				return nil, refused
			}
			return good(q)
		}, registry.Options{}, 30 * time.Second, 32 * time.Second, [2]int{15, 120}, true},
		{"back for the last try", func(e time.Duration, q *http.Request) (*http.Response, error) {
			if e < 59*time.Second {
				return nil, refused
			}
			return good(q)
		}, registry.Options{}, 59 * time.Second, 60 * time.Second, [2]int{30, 200}, true},
		{"silent for ever", func(_ time.Duration, q *http.Request) (*http.Response, error) { return slow(q) },
			registry.Options{}, 59 * time.Second, 60 * time.Second, [2]int{2, 3}, false},
		{"silent once", func(e time.Duration, q *http.Request) (*http.Response, error) {
			if e == 0 {
				return slow(q)
			}
			return good(q)
		}, registry.Options{}, 30 * time.Second, 30*time.Second + 200*time.Millisecond, [2]int{2, 2}, true},
		{"come again tomorrow", func(_ time.Duration, q *http.Request) (*http.Response, error) {
			return reply(q, 429, http.Header{"Retry-After": {"86400"}}, ""), nil
		}, registry.Options{}, 59 * time.Second, 60 * time.Second, [2]int{2, 2}, false},
		{"come again tomorrow, but does answer", func(e time.Duration, q *http.Request) (*http.Response, error) {
			if e == 0 {
				return reply(q, 429, http.Header{"Retry-After": {"86400"}}, ""), nil
			}
			select { // the last try has the time for this
			case <-time.After(900 * time.Millisecond):
				return good(q)
			case <-q.Context().Done():
				return nil, q.Context().Err()
			}
		}, registry.Options{}, 59900 * time.Millisecond, 59900 * time.Millisecond, [2]int{2, 2}, true},
		{"come again in a while", func(e time.Duration, q *http.Request) (*http.Response, error) {
			if e < 20*time.Second {
				return reply(q, 503, http.Header{"Retry-After": {"20"}}, ""), nil
			}
			return good(q)
		}, registry.Options{}, 20 * time.Second, 20 * time.Second, [2]int{2, 2}, true},
		{"no wait", func(time.Duration, *http.Request) (*http.Response, error) { return nil, refused },
			registry.Options{ErrorWait: registry.NoWait}, 0, 0, [2]int{1, 1}, false},
		{"no wait, silent", func(_ time.Duration, q *http.Request) (*http.Response, error) { return slow(q) },
			registry.Options{ErrorWait: registry.NoWait}, 30 * time.Second, 30 * time.Second, [2]int{1, 1}, false},
		{"short wait", func(_ time.Duration, q *http.Request) (*http.Response, error) { return slow(q) },
			registry.Options{ErrorWait: 4 * time.Second}, 3600 * time.Millisecond, 4 * time.Second, [2]int{2, 3}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			alone(t)
			synctest.Test(t, func(t *testing.T) {
				began, tries := time.Now(), 0
				tc.opts.PlainHTTP = true
				tc.opts.Transport = transportFunc(func(q *http.Request) (*http.Response, error) {
					tries++
					return tc.network(time.Since(began), q)
				})
				c, err := registry.New(tc.opts)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				b, err := c.Blob(parse(t, "registry.example/x:v1"), ocispec.Descriptor{Digest: sum(nil), Size: size})
				if err != nil {
					t.Fatal(err)
				}
				got, _, err := fetch(t.Context(), b, 0, size)
				took := time.Since(began)
				var gone *registry.UnavailableError
				if tc.ok && (err != nil || string(got) != "0123456789") || !tc.ok && !errors.As(err, &gone) {
					t.Errorf("%q, %v", got, err)
				}
				if took < tc.min || took > tc.max {
					t.Errorf("took %v, want %v to %v", took, tc.min, tc.max)
				}
				if tries < tc.tries[0] || tries > tc.tries[1] {
					t.Errorf("%d tries, want %v", tries, tc.tries)
				}
			})
		})
	}
}

// Who asks once more as soon as patience has run out waits for a quarter of it, 3 s at least and 10 s at most; who comes later, or
// after something came, for as long as usual.
func TestPatienceForTheSameRead(t *testing.T) {
	for wait, short := range map[time.Duration]time.Duration{60 * time.Second: 10 * time.Second, 8 * time.Second: 3 * time.Second, 2 * time.Second: 2 * time.Second} {
		alone(t)
		synctest.Test(t, func(t *testing.T) {
			dead := true
			c, err := registry.New(registry.Options{PlainHTTP: true, ErrorWait: wait, Transport: transportFunc(func(q *http.Request) (*http.Response, error) {
				if dead {
					return nil, refused
				}
				return reply(q, 206, http.Header{"Content-Range": {"bytes 0-9/10"}}, "0123456789"), nil
			})})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			b, err := c.Blob(parse(t, "registry.example/x:v1"), ocispec.Descriptor{Digest: sum(nil), Size: 10})
			if err != nil {
				t.Fatal(err)
			}
			fails := func(most time.Duration) {
				t.Helper()
				began := time.Now()
				var gone *registry.UnavailableError
				if _, _, err := fetch(t.Context(), b, 0, 10); !errors.As(err, &gone) {
					t.Error(err)
				}
				if took := time.Since(began); took > most || took < most*9/10-time.Second {
					t.Errorf("took %v, want %v", took, most)
				}
			}
			fails(wait)
			fails(short)
			time.Sleep(time.Second)
			fails(short)
			time.Sleep(3 * time.Second)
			fails(wait)
			dead = false
			if _, _, err := fetch(t.Context(), b, 0, 10); err != nil {
				t.Error(err)
			}
			dead = true
			fails(wait)
		})
	}
}

// What was waited for before the registry was asked is a part of the wait, but for 3 s; until something comes.
func TestPatienceOfWhoHasWaited(t *testing.T) {
	for _, tc := range []struct{ wait, waited, want time.Duration }{
		{time.Minute, 0, time.Minute}, {time.Minute, 20 * time.Second, 40 * time.Second},
		{time.Minute, 58 * time.Second, 3 * time.Second}, {time.Minute, time.Hour, 3 * time.Second},
		{2 * time.Second, time.Second, 2 * time.Second}, {registry.NoWait, time.Second, 0},
	} {
		alone(t)
		synctest.Test(t, func(t *testing.T) {
			comes := ""
			c, err := registry.New(registry.Options{PlainHTTP: true, ErrorWait: tc.wait, Transport: transportFunc(func(q *http.Request) (*http.Response, error) {
				if comes == "" {
					return nil, refused
				}
				r := reply(q, 206, http.Header{"Content-Range": {"bytes 0-9/10"}}, comes)
				r.ContentLength, comes = 10, "" // it breaks off
				return r, nil
			})})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			b, err := c.Blob(parse(t, "registry.example/x:v1"), ocispec.Descriptor{Digest: sum(nil), Size: 10})
			if err != nil {
				t.Fatal(err)
			}
			fails := func(want time.Duration) {
				t.Helper()
				began := time.Now()
				if _, _, err := fetch(registry.WithWaiting(t.Context(), began.Add(-tc.waited)), b, 0, 10); err == nil {
					t.Error("it came")
				}
				if took := time.Since(began); took > want || took < want*9/10-time.Second {
					t.Errorf("wait %v, %v before: took %v, want %v", tc.wait, tc.waited, took, want)
				}
			}
			fails(tc.want)
			time.Sleep(3 * time.Second) // so that it is not the same read
			comes = "01234"
			fails(max(tc.wait, 0))
		})
	}
}

// While an image is looked for, a host that is not there is an error at once, and
// everything else soon.
func TestPatienceOfResolve(t *testing.T) {
	for _, tc := range []struct {
		name     string
		err      error
		opts     registry.Options
		min, max time.Duration
	}{
		{"refused", refused, registry.Options{}, 0, 0},
		{"unknown host", &net.OpError{Op: "dial", Err: &net.DNSError{Err: "no such host", Name: "registry.example", IsNotFound: true}}, registry.Options{}, 0, 0},
		{"name service fails", &net.OpError{Op: "dial", Err: &net.DNSError{Err: "server misbehaving", Name: "registry.example", IsTemporary: true}}, registry.Options{}, 9 * time.Second, 10 * time.Second},
		{"reset", &net.OpError{Op: "read", Err: syscall.ECONNRESET}, registry.Options{}, 9 * time.Second, 10 * time.Second},
		{"reset, other wait", &net.OpError{Op: "read", Err: syscall.ECONNRESET}, registry.Options{ResolveWait: 2 * time.Second}, 1800 * time.Millisecond, 2 * time.Second},
		{"reset, no wait", &net.OpError{Op: "read", Err: syscall.ECONNRESET}, registry.Options{ResolveWait: registry.NoWait}, 0, 0},
	} {
		alone(t)
		synctest.Test(t, func(t *testing.T) {
			tc.opts.Transport = transportFunc(func(*http.Request) (*http.Response, error) { return nil, tc.err })
			c, err := registry.New(tc.opts)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			began := time.Now()
			_, err = c.Resolve(t.Context(), parse(t, "registry.example/x:v1"), registry.Selector{})
			if err == nil || !strings.Contains(err.Error(), tc.err.Error()) ||
				tc.max == 0 && tc.opts.ResolveWait == 0 && !strings.Contains(err.Error(), "no registry at registry.example: ") ||
				!strings.HasPrefix(err.Error(), "registry.example/x:v1: ") {
				t.Errorf("%s: %v", tc.name, err)
			}
			if took := time.Since(began); took < tc.min || took > tc.max {
				t.Errorf("%s: took %v, want %v to %v", tc.name, took, tc.min, tc.max)
			}
		})
	}
}

// A body that trickles never runs out of patience; one that stops does.
func TestPatienceIsForProgress(t *testing.T) {
	alone(t)
	synctest.Test(t, func(t *testing.T) {
		body, drip := io.Pipe()
		go func() {
			for range 9 {
				time.Sleep(25 * time.Second)
				_, _ = drip.Write([]byte("x"))
			}
		}()
		first := true
		c, err := registry.New(registry.Options{PlainHTTP: true, Transport: transportFunc(func(q *http.Request) (*http.Response, error) {
			if !first {
				return nil, refused
			}
			first = false
			return &http.Response{StatusCode: 206, Header: http.Header{"Content-Range": {"bytes 0-9/10"}}, Body: cancelled{body, q}, ContentLength: 10}, nil
		})})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		b, err := c.Blob(parse(t, "registry.example/x:v1"), ocispec.Descriptor{Digest: sum(nil), Size: 10})
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		got, _, err := fetch(t.Context(), b, 0, 10)
		if string(got) != "xxxxxxxxx" || err == nil {
			t.Errorf("%q, %v", got, err)
		}
		// Nine bytes at 25 s each, then the wait of 60 s.
		if took := time.Since(began); took < 284*time.Second || took > 285*time.Second {
			t.Errorf("took %v", took)
		}
		if err := body.Close(); err != nil {
			t.Error(err)
		}
	})
}

// A cancelled body ends with its request, as net/http's do.
type cancelled struct {
	*io.PipeReader
	request *http.Request
}

func (b cancelled) Read(p []byte) (int, error) {
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-b.request.Context().Done():
			_ = b.CloseWithError(b.request.Context().Err())
		case <-stop:
		}
	}()
	return b.PipeReader.Read(p)
}

func TestUserAgent(t *testing.T) {
	alone(t)
	for given, want := range map[string]string{"": "erofs-oci/", "my-tool/1": "my-tool/1"} {
		var seen string
		c, err := registry.New(registry.Options{UserAgent: given, Transport: transportFunc(func(q *http.Request) (*http.Response, error) {
			seen = q.Header.Get("User-Agent")
			if q.URL.Scheme != "https" || q.URL.Host != "registry-1.docker.io" || q.URL.Path != "/v2/library/busybox/manifests/latest" {
				t.Errorf("%s", q.URL)
			}
			return reply(q, 404, nil, ""), nil
		})})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Resolve(t.Context(), parse(t, "busybox"), registry.Selector{}); err == nil {
			t.Error("no error")
		}
		if !strings.HasPrefix(seen, want) {
			t.Errorf("%q", seen)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}
