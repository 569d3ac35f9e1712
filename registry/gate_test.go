package registry_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
)

// A crowd is many readers of one blob, and when the requests of theirs left.
type crowd struct {
	mu   sync.Mutex // guards what follows
	left []time.Duration
	done []time.Duration
	errs []error
}

// run has n readers read a small blob over network, whose time begins now.
func (w *crowd) run(t *testing.T, n int, opts registry.Options, network func(elapsed time.Duration, q *http.Request) (*http.Response, error)) {
	t.Helper()
	began := time.Now()
	opts.PlainHTTP = true
	opts.Transport = transportFunc(func(q *http.Request) (*http.Response, error) {
		e := time.Since(began)
		w.mu.Lock()
		w.left = append(w.left, e)
		w.mu.Unlock()
		return network(e, q)
	})
	c, err := registry.New(opts)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b, err := c.Blob(parse(t, "registry.example/x:v1"), ocispec.Descriptor{Digest: sum(nil), Size: 10})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			got, _, err := fetch(t.Context(), b, 0, 10)
			if err == nil && string(got) != "0123456789" {
				err = errors.New("wrong bytes")
			}
			w.mu.Lock()
			defer w.mu.Unlock()
			w.done, w.errs = append(w.done, time.Since(began)), append(w.errs, err)
		})
	}
	wg.Wait()
}

// busiest is the most that left within a second, of what left from a time to another.
func (w *crowd) busiest(from, to time.Duration) int {
	slices.Sort(w.left)
	most := 0
	for i, begin := range w.left {
		n := 0
		for _, e := range w.left[i:] {
			if begin >= from && e < min(begin+time.Second, to) {
				n++
			}
		}
		most = max(most, n)
	}
	return most
}

func good(q *http.Request) (*http.Response, error) {
	return reply(q, 206, http.Header{"Content-Range": {"bytes 0-9/10"}}, "0123456789"), nil
}

// A thousand readers of a registry that is down are four requests a second, and all of them go on when it is back.
func TestThousandReadersOfDeadRegistry(t *testing.T) {
	silent := func(q *http.Request) (*http.Response, error) {
		<-q.Context().Done()
		return nil, q.Context().Err()
	}
	const back = 30 * time.Second
	for _, tc := range []struct {
		name      string
		dead      func(q *http.Request) (*http.Response, error)
		last      time.Duration // when the last reader has its bytes
		few, many int           // requests until it was back
	}{
		{"refused", func(*http.Request) (*http.Response, error) { return nil, refused }, back + 1200*time.Millisecond, 2 * 27, 4 * 28},
		{"503", func(q *http.Request) (*http.Response, error) { return reply(q, 503, nil, ""), nil }, back + 1200*time.Millisecond, 2 * 27, 4 * 28},
		{"429", func(q *http.Request) (*http.Response, error) { return reply(q, 429, nil, ""), nil }, back + 1200*time.Millisecond, 2 * 27, 4 * 28},
		{"breaks off before the first byte", func(q *http.Request) (*http.Response, error) {
			r, err := good(q)
			r.Body = io.NopCloser(iotestError{syscall.ECONNRESET})
			return r, err
		}, back + 1200*time.Millisecond, 2 * 27, 4 * 28},
		// Fewer leave, and what left before it was back is given up after half a minute.
		{"silent", silent, back + 17*time.Second, 8, 8},
	} {
		t.Run(tc.name, func(t *testing.T) {
			alone(t)
			synctest.Test(t, func(t *testing.T) {
				var w crowd
				w.run(t, 1000, registry.Options{ErrorWait: 90 * time.Second, NoProgress: 30 * time.Second}, func(e time.Duration, q *http.Request) (*http.Response, error) {
					if e < back {
						return tc.dead(q)
					}
					return good(q)
				})
				if err := errors.Join(w.errs...); err != nil {
					t.Errorf("%.300v", err)
				}
				if n := w.busiest(0, back); n != 4 {
					t.Errorf("%d requests left within a second while it was down, want 4", n)
				}
				n := 0
				for _, e := range w.left {
					if e < back {
						n++
					}
				}
				if n < tc.few || n > tc.many {
					t.Errorf("%d requests left while it was down, want %d to %d", n, tc.few, tc.many)
				}
				if last := slices.Max(w.done); last < back || last > tc.last {
					t.Errorf("the last reader went on after %v, want %v to %v", last, back, tc.last)
				}
			})
		})
	}
}

// The wait stays the bound, also for those whose request never left.
func TestThousandReadersGiveUp(t *testing.T) {
	alone(t)
	synctest.Test(t, func(t *testing.T) {
		var w crowd
		w.run(t, 1000, registry.Options{}, func(time.Duration, *http.Request) (*http.Response, error) { return nil, refused })
		for _, err := range w.errs {
			var gone *registry.UnavailableError
			if !errors.As(err, &gone) || !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("%v", err)
			}
		}
		if first, last := slices.Min(w.done), slices.Max(w.done); first < 59*time.Second || last > 60*time.Second {
			t.Errorf("they gave up after %v to %v", first, last)
		}
		if n := w.busiest(0, time.Hour); n != 4 {
			t.Errorf("%d requests left within a second", n)
		}
	})
}

// A registry that dies while it is trusted has what is under way to answer for, and no more.
func TestRegistryDiesInUse(t *testing.T) {
	alone(t)
	synctest.Test(t, func(t *testing.T) {
		var w crowd
		w.run(t, 1000, registry.Options{}, func(e time.Duration, q *http.Request) (*http.Response, error) {
			time.Sleep(10 * time.Millisecond)
			if e >= 20*time.Millisecond && e < 20*time.Second {
				return nil, refused
			}
			return good(q)
		})
		if err := errors.Join(w.errs...); err != nil {
			t.Errorf("%.300v", err)
		}
		if n := w.busiest(40*time.Millisecond, 20*time.Second); n > 4 {
			t.Errorf("%d requests left within a second while it was down", n)
		}
		if n := w.busiest(0, 40*time.Millisecond); n > 4+2*8 {
			t.Errorf("%d requests left before that was known", n)
		}
		if last := slices.Max(w.done); last > 22500*time.Millisecond { // a probe, then 1000 readers, 8 at a time, 10 ms each
			t.Errorf("the last reader went on after %v", last)
		}
	})
}

// A failure now and then is no storm: the others go on, and so does who met it.
func TestFaultsNowAndThen(t *testing.T) {
	alone(t)
	synctest.Test(t, func(t *testing.T) {
		var w crowd
		var calls atomic.Int64
		w.run(t, 1000, registry.Options{}, func(_ time.Duration, q *http.Request) (*http.Response, error) {
			time.Sleep(10 * time.Millisecond)
			if calls.Add(1)%10 == 0 {
				return reply(q, 500, nil, ""), nil
			}
			return good(q)
		})
		if err := errors.Join(w.errs...); err != nil {
			t.Errorf("%.300v", err)
		}
		// 1000 readers, 8 at a time, 10 ms each; the last of them may have to back
		// off once, and to wait for its turn to probe.
		if last := slices.Max(w.done); last > 1250*time.Millisecond+2*time.Second+2*1100*time.Millisecond {
			t.Errorf("the last reader was done after %v", last)
		}
	})
}

// While nothing is known of a host a few ask, and the others wait for what they hear: none of them fails.
func TestFirstContactWithoutPatience(t *testing.T) {
	alone(t)
	synctest.Test(t, func(t *testing.T) {
		var w crowd
		w.run(t, 100, registry.Options{ErrorWait: registry.NoWait}, func(_ time.Duration, q *http.Request) (*http.Response, error) {
			time.Sleep(20 * time.Millisecond)
			return good(q)
		})
		if err := errors.Join(w.errs...); err != nil {
			t.Errorf("%.300v", err)
		}
		if last := slices.Max(w.done); last != 20*time.Millisecond*(1+12) { // 4, then 96 by 8
			t.Errorf("the last reader was done after %v", last)
		}
		if n := w.busiest(0, 20*time.Millisecond); n != 4 {
			t.Errorf("%d requests left before the first answer", n)
		}
	})
}

// One dead host does not stand in the way of another.
func TestOtherHostsGoOn(t *testing.T) {
	alone(t)
	synctest.Test(t, func(t *testing.T) {
		c, err := registry.New(registry.Options{PlainHTTP: true, Transport: transportFunc(func(q *http.Request) (*http.Response, error) {
			if q.URL.Host == "dead.example" {
				<-q.Context().Done()
				return nil, q.Context().Err()
			}
			return good(q)
		})})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for _, host := range []string{"dead.example", "good.example"} {
			b, err := c.Blob(parse(t, host+"/x:v1"), ocispec.Descriptor{Digest: sum(nil), Size: 10})
			if err != nil {
				t.Fatal(err)
			}
			if host == "good.example" {
				began := time.Now()
				if _, _, err := fetch(ctx, b, 0, 10); err != nil || time.Since(began) != 0 {
					t.Errorf("%v after %v", err, time.Since(began))
				}
				break
			}
			for range 1000 {
				wg.Go(func() {
					if _, _, err := fetch(ctx, b, 0, 10); !errors.Is(err, context.Canceled) {
						t.Errorf("%v", err)
					}
				})
			}
			time.Sleep(25 * time.Second)
		}
		cancel()
		wg.Wait()
	})
}

// iotestError is a body that breaks off at once.
type iotestError struct{ err error }

func (b iotestError) Read([]byte) (int, error) { return 0, b.err }

// Over sockets: a registry that answers 503, and dies altogether, and comes back.
func TestThousandReadersOverTheWire(t *testing.T) {
	data := noise(10_000)
	r := startRegistry(t, fakeregistry.Options{})
	b := blobOf(t, r, data, registry.Options{PlainHTTP: true})
	var asked atomic.Int64
	r.SetFault(func(q *http.Request) *fakeregistry.Fault {
		asked.Add(1)
		return &fakeregistry.Fault{Status: http.StatusServiceUnavailable}
	})
	began := time.Now()
	failed := make(chan error, 1000)
	for range 1000 {
		go func() {
			got, _, err := fetch(t.Context(), b, 0, 10_000)
			if err == nil && string(got) != string(data) {
				err = errors.New("wrong bytes")
			}
			failed <- err
		}()
	}
	time.Sleep(2500 * time.Millisecond)
	n, took := asked.Load(), time.Since(began)
	if most := 4 * (int64(took.Seconds()/1.1) + 1); n < 4 || n > most {
		t.Errorf("it was asked %d times in %v, want 4 to %d", n, took, most)
	}
	r.SetFault(nil)
	back := time.Now()
	for range 1000 {
		if err := <-failed; err != nil {
			t.Error(err)
		}
	}
	t.Logf("all readers went on after %v", time.Since(back))
}
