package registry_test

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/registry"
)

// untimed is a logger at level info, and what it has said without times.
func untimed() (*slog.Logger, func() string) {
	w := newWatchedLog()
	h := slog.NewTextHandler(w, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}})
	return slog.New(h), func() string { return strings.TrimSuffix(w.String(), "\n") }
}

func replied(q *http.Request, code int, header http.Header, body string) *http.Response {
	header.Set("Content-Length", strconv.Itoa(len(body)))
	return &http.Response{StatusCode: code, Request: q, Header: header, ContentLength: int64(len(body)), Body: io.NopCloser(strings.NewReader(body))}
}

func tenBytes(q *http.Request) *http.Response {
	return replied(q, http.StatusPartialContent, http.Header{"Content-Range": {"bytes 0-9/10"}}, "0123456789")
}

// TestTroubleIsSaidOnce: a thousand readers of a host in trouble are two lines, or one where it was short.
func TestTroubleIsSaidOnce(t *testing.T) {
	down := errors.New("connection refused")
	for _, c := range []struct {
		name string
		of   func(elapsed time.Duration, q *http.Request) (*http.Response, error)
		want []string // the beginnings of lines
	}{
		{"down for a while", func(e time.Duration, q *http.Request) (*http.Response, error) {
			if e < 10*time.Second {
				return nil, down
			}
			return tenBytes(q), nil
		}, []string{
			`level=WARN msg="a host is in trouble; it is asked again, and readers wait" host=registry.example:80 for=1`,
			`level=WARN msg="the host answers again" host=registry.example:80 for=1`,
		}},
		{"down for a moment", func(e time.Duration, q *http.Request) (*http.Response, error) {
			if e == 0 {
				return nil, down
			}
			return tenBytes(q), nil
		}, []string{`level=INFO msg="a host was in trouble for a moment" host=registry.example:80 err="connection refused"`}},
		{"it says how long", func(e time.Duration, q *http.Request) (*http.Response, error) {
			if e < 3*time.Second {
				return replied(q, http.StatusTooManyRequests, http.Header{"Retry-After": {"3"}}, ""), nil
			}
			return tenBytes(q), nil
		}, []string{
			`level=WARN msg="a host is in trouble; it is asked again, and readers wait" host=registry.example:80 for=0s retry_after=3s err="GET `,
			`level=WARN msg="the host answers again" host=registry.example:80 for=`,
		}},
		{"silent", func(e time.Duration, q *http.Request) (*http.Response, error) {
			if e < time.Second {
				<-q.Context().Done()
				return nil, q.Context().Err()
			}
			return tenBytes(q), nil
		}, []string{
			`level=WARN msg="a host is in trouble; it is asked again, and readers wait" host=registry.example:80 for=30s err="no byte from`,
			`level=WARN msg="the host answers again" host=registry.example:80 for=3`,
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				log, said := untimed()
				var w crowd
				w.run(t, 1000, registry.Options{Logger: log}, c.of)
				for _, err := range w.errs {
					if err != nil {
						t.Fatal(err)
					}
				}
				lines := strings.Split(said(), "\n")
				for i := range max(len(lines), len(c.want)) {
					if i >= len(lines) || i >= len(c.want) || !strings.HasPrefix(lines[i], c.want[i]) {
						t.Fatalf("the log says\n%s\nwant\n%s", said(), strings.Join(c.want, "\n"))
					}
				}
			})
		})
	}
}

// TestMirrorIsLeftOnce: a mirror that stays away is one line, not one a minute; and one more when it answers. That its
// host is in trouble is none: nobody waits for it.
func TestMirrorIsLeftOnce(t *testing.T) {
	conf := writeFile(t, "[[registry]]\nlocation = \"registry.example\"\n[[registry.mirror]]\nlocation = \"mirror.example\"\n")
	synctest.Test(t, func(t *testing.T) {
		log, said := untimed()
		began := time.Now()
		asked := 0
		c, err := registry.New(registry.Options{PlainHTTP: true, Logger: log, RegistriesConf: conf, Transport: transportFunc(func(q *http.Request) (*http.Response, error) {
			if q.URL.Host != "mirror.example" {
				return tenBytes(q), nil
			}
			if asked++; time.Since(began) < 10*time.Minute {
				return nil, syscall.ECONNREFUSED
			}
			return tenBytes(q), nil
		})})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		b, err := c.Blob(parse(t, "registry.example/x:v1"), ocispec.Descriptor{Digest: sum(nil), Size: 10})
		if err != nil {
			t.Fatal(err)
		}
		for time.Since(began) < 12*time.Minute {
			if got, _, err := fetch(t.Context(), b, 0, 10); err != nil || !bytes.Equal(got, []byte("0123456789")) {
				t.Fatalf("%q, %v", got, err)
			}
			time.Sleep(30 * time.Second)
		}
		want := `level=WARN msg="mirror left; others are asked first, and it once a minute" mirror=mirror.example/x err="connection refused"` + "\n" +
			`level=INFO msg="the mirror answers again" mirror=mirror.example/x for=10m0s`
		if asked < 10 || said() != want {
			t.Errorf("asked the mirror %d times, and the log says\n%s\nwant\n%s", asked, said(), want)
		}
	})
}
