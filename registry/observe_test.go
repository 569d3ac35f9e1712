package registry_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
)

// A tally counts what an Observer is told.
type tally struct {
	mu     sync.Mutex // guards what follows
	counts map[string]int
	bytes  map[string]int64 // by kind
	causes map[string]int64 // bytes by cause
	events map[registry.Event]int
	waits  []time.Duration
}

func newTally() *tally {
	t := &tally{}
	t.reset()
	return t
}

func (t *tally) reset() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.counts, t.bytes, t.causes, t.events, t.waits = map[string]int{}, map[string]int64{}, map[string]int64{}, map[registry.Event]int{}, nil
}

func (t *tally) Answered(a registry.Answer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.counts[fmt.Sprint(a.Method, " ", a.Kind, " ", a.Status)]++
	t.waits = append(t.waits, a.Wait)
}

func (t *tally) Received(a registry.Answer, n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.bytes[string(a.Kind)] += int64(n)
	t.causes[a.Cause] += int64(n)
}

func (t *tally) Happened(e registry.Event) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.events[e]++
}

// seen is what registries were asked for, in the words of a tally.
func seen(all ...*fakeregistry.Registry) (counts map[string]int, bytes map[string]int64) {
	counts, bytes = map[string]int{}, map[string]int64{}
	for _, r := range all {
		if r == nil {
			continue
		}
		for _, q := range r.Requests() {
			kind := "other"
			for part, is := range map[string]string{"/token": "token", "/manifests/": "manifest", "/blobs/sha256:": "blob", "/blobs/uploads/": "upload"} {
				if strings.Contains(q.Path, part) {
					kind = is
				}
			}
			if kind == "manifest" && q.Method == http.MethodPut {
				kind = "upload"
			}
			counts[fmt.Sprint(q.Method, " ", kind, " ", q.Status)]++
			if q.Bytes > 0 && q.Method != http.MethodHead { // the body of an answer to HEAD does not leave
				bytes[kind] += q.Bytes
			}
		}
	}
	return counts, bytes
}

// agrees fails the test unless the registries have seen just what was told.
func (t *tally) agrees(test *testing.T, all ...*fakeregistry.Registry) {
	test.Helper()
	counts, bytes := seen(all...)
	t.mu.Lock()
	defer t.mu.Unlock()
	if !maps.Equal(t.counts, counts) {
		test.Errorf("told of   %v\nregistry: %v", t.counts, counts)
	}
	if !maps.Equal(t.bytes, bytes) {
		test.Errorf("told of   %v bytes\nregistry: %v", t.bytes, bytes)
	}
	requests := 0
	for _, n := range counts {
		requests += n
	}
	if len(t.waits) != requests || slices.Min(append(t.waits, 1)) <= 0 {
		test.Errorf("%d requests took %v", requests, t.waits)
	}
}

func (t *tally) met(test *testing.T, want map[registry.Event]int) {
	test.Helper()
	t.mu.Lock()
	defer t.mu.Unlock()
	if !maps.Equal(t.events, want) {
		test.Errorf("met with %v, want %v", t.events, want)
	}
}

// TestObserver: an image is resolved and two ranges of its layer are read, and the observer
// counts what the registry counts, whatever goes wrong meanwhile.
func TestObserver(t *testing.T) {
	for _, tc := range []struct {
		name    string
		o       fakeregistry.Options
		fault   fakeregistry.Plan
		between func(*fakeregistry.Registry) // the two reads
		events  map[registry.Event]int
		some    map[string]int // of the counts, which the registry confirms
	}{
		{name: "clean", some: map[string]int{"GET manifest 200": 1, "GET blob 206": 2}},
		{
			name: "503", fault: fakeregistry.Always(fakeregistry.Fault{Status: 503}).First(2).OnBlobs(),
			events: map[registry.Event]int{registry.EventRetry: 2},
			some:   map[string]int{"GET blob 206": 2, "GET blob 503": 2},
		},
		{
			name: "manifest 503", fault: fakeregistry.Always(fakeregistry.Fault{Status: 503}).First(1).OnManifests(),
			events: map[registry.Event]int{registry.EventRetry: 1},
			some:   map[string]int{"GET manifest 200": 1, "GET manifest 503": 1},
		},
		{
			name: "429", fault: fakeregistry.Always(fakeregistry.Fault{Status: 429, Header: http.Header{"Retry-After": {"0"}}}).First(1).OnBlobs(),
			events: map[registry.Event]int{registry.EventRetry: 1, registry.EventThrottled: 1},
			some:   map[string]int{"GET blob 429": 1},
		},
		{
			name: "broken body", fault: fakeregistry.Always(fakeregistry.Fault{After: 1000, Break: true}).First(1).OnBlobs(),
			events: map[registry.Event]int{registry.EventRetry: 1, registry.EventResume: 1},
			some:   map[string]int{"GET blob 206": 3},
		},
		{
			name: "broken before its body", fault: fakeregistry.Always(fakeregistry.Fault{Break: true}).First(1).OnBlobs(),
			events: map[registry.Event]int{registry.EventRetry: 1},
			some:   map[string]int{"GET blob 206": 3},
		},
		{
			name: "token", o: fakeregistry.Options{Auth: fakeregistry.Bearer},
			events: map[registry.Event]int{registry.EventToken: 1},
			some:   map[string]int{"GET manifest 401": 1, "GET token 200": 1, "GET blob 206": 2},
		},
		{
			name: "token revoked", o: fakeregistry.Options{Auth: fakeregistry.Bearer}, between: (*fakeregistry.Registry).RevokeTokens,
			events: map[registry.Event]int{registry.EventToken: 1, registry.EventTokenRefresh: 1},
			some:   map[string]int{"GET blob 401": 1, "GET token 200": 2, "GET blob 206": 2},
		},
		{
			name: "redirects", o: fakeregistry.Options{SignedURLs: time.Hour},
			some: map[string]int{"GET blob 307": 1, "GET blob 206": 2},
		},
		{
			name: "redirect that expired", o: fakeregistry.Options{SignedURLs: time.Hour}, between: (*fakeregistry.Registry).RevokeURLs,
			some: map[string]int{"GET blob 307": 2, "GET blob 403": 1, "GET blob 206": 2},
		},
		{
			name: "no ranges", fault: fakeregistry.NoRanges(),
			some: map[string]int{"GET blob 200": 2},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := startRegistry(t, tc.o)
			data := noise(200_000)
			if _, err := ocipush.Push(t.Context(), r.URL(), "x:v1", []ocipush.Layer{ocipush.Bytes(registry.MediaTypeErofs, data)}, pushOptions(t, r)); err != nil {
				t.Fatal(err)
			}
			r.ResetStats()
			ref := parse(t, r.Addr()+"/x:v1")
			told := newTally()
			c := newClient(t, registry.Options{PlainHTTP: true, Observer: told})
			r.SetFault(tc.fault)
			im, err := c.Resolve(t.Context(), ref, registry.Selector{})
			if err != nil {
				t.Fatal(err)
			}
			b, err := c.Blob(ref, im.Layers[0].Descriptor)
			if err != nil {
				t.Fatal(err)
			}
			for i, cause := range []string{"demand", "prefetch"} {
				off := int64(i * 100_000)
				got, start, err := fetch(registry.WithCause(t.Context(), cause), b, off, 100_000)
				if err != nil || !bytes.Equal(got, data[start:][:len(got)]) {
					t.Fatalf("%s: %d bytes from %d: %v", cause, len(got), start, err)
				}
				if i == 0 && tc.between != nil {
					tc.between(r)
				}
			}
			told.agrees(t, r, r.Storage())
			told.met(t, tc.events)
			for what, n := range tc.some {
				if told.counts[what] != n {
					t.Errorf("%s: %d times, want %d, in %v", what, told.counts[what], n, told.counts)
				}
			}
			if told.causes["demand"] < 100_000 || told.causes["prefetch"] < 100_000 || told.causes[registry.CauseMetadata] < int64(len(im.Reference.String())) {
				t.Errorf("bytes by cause: %v", told.causes)
			}
		})
	}
}

// TestObserverMirror: what a mirror was asked for counts as well, and so do bytes that were
// wrong.
func TestObserverMirror(t *testing.T) {
	told := newTally()
	m := newMirrored(t, "", registry.Options{PlainHTTP: true, Observer: told})
	b := m.blob(t)
	m.mirror.SetFault(fakeregistry.Always(fakeregistry.Fault{Status: 404}).OnBlobs())
	if _, _, err := fetch(t.Context(), b, 0, 5000); err != nil {
		t.Fatal(err)
	}
	body, _, _, err := b.FetchElsewhere(t.Context(), 0, 5000, errors.New("wrong"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, body); err != nil {
		t.Fatal(err)
	}
	if err := body.Close(); err != nil {
		t.Fatal(err)
	}
	told.agrees(t, m.primary, m.mirror)
	told.met(t, map[registry.Event]int{registry.EventMirrorLeft: 1, registry.EventWrongBytes: 1})
	if told.counts["GET blob 404"] != 1 || told.counts["GET blob 206"] != 2 {
		t.Errorf("%v", told.counts)
	}
}

// TestObserverPush: a push counts as such.
func TestObserverPush(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{Auth: fakeregistry.Bearer})
	told := newTally()
	c := newClient(t, registry.Options{PlainHTTP: true, Observer: told})
	data := noise(1000)
	if _, err := c.Repository(parse(t, r.Addr()+"/x:v1")).PutBlob(t.Context(), describe(data), bytes.NewReader(data), registry.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	told.agrees(t, r)
	if told.counts["PUT upload 201"] != 1 || told.counts["GET token 200"] == 0 {
		t.Errorf("%v", told.counts)
	}
}

// TestObserverDead: a registry that is not there gives no answer, and that is told.
func TestObserverDead(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{})
	told := newTally()
	data := noise(10)
	b := blobOf(t, r, data, registry.Options{PlainHTTP: true, Observer: told, ErrorWait: registry.NoWait})
	r.Stop()
	if _, _, err := fetch(t.Context(), b, 0, 10); err == nil {
		t.Fatal("a registry that is gone answers")
	}
	if want := map[string]int{"GET blob 0": 1}; !maps.Equal(told.counts, want) {
		t.Errorf("told of %v, want %v", told.counts, want)
	}
	told.met(t, nil)
}

// TestObserverGreeting: to find out whether a host speaks TLS is a request, too.
func TestObserverGreeting(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{TLS: true})
	told := newTally()
	b := blobOf(t, r, noise(10), registry.Options{RootCAs: r.RootCAs(), Observer: told})
	if _, _, err := fetch(t.Context(), b, 0, 10); err != nil {
		t.Fatal(err)
	}
	told.agrees(t, r)
	if told.counts["GET other 200"] != 1 || told.counts["GET blob 206"] != 1 {
		t.Errorf("%v", told.counts)
	}
}
