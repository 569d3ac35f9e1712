package registry_test

import (
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/erofs-oci/erofs-oci/registry"
)

// In the bubble's time: an upload is given as long as it takes while bytes leave,
// and no longer than a read once they do not.
func TestPutBlobPatience(t *testing.T) {
	const size = 100
	data := noise(size)
	take := func(q *http.Request, n int, pause time.Duration) error {
		for range n {
			time.Sleep(pause) // in the bubble's time
			if _, err := io.ReadFull(q.Body, make([]byte, 1)); err != nil {
				return err
			}
		}
		return nil
	}
	for _, tc := range []struct {
		name     string
		put      func(try int, q *http.Request) (*http.Response, error) // PUT
		min, max time.Duration
		tries    int
		want     string // "" is success
	}{
		{"a byte in 25 s", func(_ int, q *http.Request) (*http.Response, error) {
			if err := take(q, size, 25*time.Second); err != nil {
				return nil, err
			}
			return reply(q, 201, nil, ""), nil
		}, 2500 * time.Second, 2501 * time.Second, 1, ""},
		{"a byte in 25 s, and 25 s until the answer", func(_ int, q *http.Request) (*http.Response, error) {
			if err := take(q, size, 25*time.Second); err != nil {
				return nil, err
			}
			time.Sleep(25 * time.Second)
			return reply(q, 201, nil, ""), nil
		}, 2525 * time.Second, 2526 * time.Second, 1, ""},
		{"stalls in the middle", func(_ int, q *http.Request) (*http.Response, error) {
			if err := take(q, size/2, time.Second); err != nil {
				return nil, err
			}
			<-q.Context().Done()
			return nil, q.Context().Err()
		}, 50*time.Second + 59*time.Second, 50*time.Second + 61*time.Second + 50*time.Second, 2, "unavailable for"},
		{"stalls once", func(try int, q *http.Request) (*http.Response, error) {
			if try == 1 {
				<-q.Context().Done()
				return nil, q.Context().Err()
			}
			return reply(q, 201, nil, ""), nil
		}, 30 * time.Second, 31 * time.Second, 2, ""},
		{"is down for a moment", func(try int, q *http.Request) (*http.Response, error) {
			if try == 1 {
				return nil, refused
			}
			return reply(q, 201, nil, ""), nil
		}, 0, 3 * time.Second, 2, ""},
		{"breaks at the end each time", func(_ int, q *http.Request) (*http.Response, error) {
			if err := take(q, size, time.Second); err != nil {
				return nil, err
			}
			return nil, io.ErrUnexpectedEOF
		}, 500 * time.Second, 510 * time.Second, 5, "given up after 5 beginnings"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			alone(t)
			synctest.Test(t, func(t *testing.T) {
				began, tries := time.Now(), 0
				c, err := registry.New(registry.Options{PlainHTTP: true, Transport: transportFunc(func(q *http.Request) (*http.Response, error) {
					switch q.Method {
					case http.MethodPut:
						tries++
						return tc.put(tries, q)
					case http.MethodPost:
						return reply(q, 202, http.Header{"Location": {"/up"}}, ""), nil
					}
					return reply(q, 404, nil, ""), nil
				})})
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				_, err = c.Repository(parse(t, "registry.example/x:v1")).PutBlob(t.Context(), describe(data), bytes.NewReader(data), registry.PutOptions{})
				took := time.Since(began)
				if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
					t.Errorf("%v, want %q", err, tc.want)
				}
				if took < tc.min || took > tc.max || tries != tc.tries {
					t.Errorf("took %v and %d tries, want %v to %v and %d", took, tries, tc.min, tc.max, tc.tries)
				}
			})
		})
	}
}
