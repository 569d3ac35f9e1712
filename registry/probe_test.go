package registry_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
)

// TestProbe has each kind of registry recognised, by no more requests than it says.
func TestProbe(t *testing.T) {
	data := noise(3 << 20)
	type want struct {
		auth, proto     string
		ranges          bool
		realm, storage  bool
		requests, moved int    // of the registry, and of its storage
		err             string // what Err says; "" for nil
	}
	refuse := func(status int) fakeregistry.Plan {
		return fakeregistry.Always(fakeregistry.Fault{Status: status}).OnBlobs()
	}
	// On a loopback address there is one greeting that finds out whether TLS is
	// spoken; with HTTP it is no request.
	const greetings = 1
	for _, tc := range []struct {
		name    string
		options fakeregistry.Options
		plan    fakeregistry.Plan
		want    want
	}{
		{"open", fakeregistry.Options{}, nil,
			want{auth: "none", proto: "HTTP/1.1", ranges: true, requests: greetings + 5 + 1}},
		{"HTTP/2", fakeregistry.Options{TLS: true}, nil,
			want{auth: "none", proto: "HTTP/2.0", ranges: true, requests: 1 + greetings + 5 + 1}},
		// One more that is refused, and one for the token.
		{"basic", fakeregistry.Options{Auth: fakeregistry.Basic, Username: user, Password: canary}, nil,
			want{auth: "basic", proto: "HTTP/1.1", ranges: true, requests: greetings + 1 + 5 + 1}},
		{"bearer", fakeregistry.Options{Auth: fakeregistry.Bearer, Username: user, Password: canary}, nil,
			want{auth: "bearer", proto: "HTTP/1.1", ranges: true, realm: true, requests: greetings + 2 + 5 + 1}},
		{"storage elsewhere", fakeregistry.Options{SignedURLs: time.Minute}, nil,
			want{auth: "none", proto: "HTTP/1.1", ranges: true, storage: true, requests: greetings + 1, moved: 5 + 1}},
		// The whole blob is begun twice, and is not asked for any more.
		{"no ranges", fakeregistry.Options{}, fakeregistry.NoRanges(),
			want{auth: "none", proto: "HTTP/1.1", requests: greetings + 1 + 1}},
		{"ranges refused", fakeregistry.Options{}, refuse(416),
			want{proto: "HTTP/1.1", requests: greetings + 1, err: ": 416 "}},
		{"another range", fakeregistry.Options{}, fakeregistry.OtherRange(-1, -1),
			want{proto: "HTTP/1.1", requests: greetings + 1, err: "was given 3145726-3145726/3145728"}},
		{"down for a while", fakeregistry.Options{}, refuse(503),
			want{proto: "HTTP/1.1", requests: greetings + 1, err: ": 503 "}},
		{"refused", fakeregistry.Options{Auth: fakeregistry.Basic, Username: user, Password: "x"}, nil,
			want{proto: "HTTP/1.1", requests: greetings + 2, err: ": 401 "}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := startRegistry(t, tc.options)
			push := pushOptions(t, r)
			if tc.options.Auth == fakeregistry.Basic {
				push.Authorization = basicOf(tc.options)
			}
			desc := pushBlob(t, r, data, push)
			log := newWatchedLog()
			o := registry.Options{RootCAs: r.RootCAs(), Logger: log.logger()}
			if tc.options.Auth != fakeregistry.Anonymous {
				o.Username, o.Password = user, canary
			}
			c := newClient(t, o)
			r.SetFault(tc.plan)
			probes, err := c.Probe(t.Context(), parse(t, r.Addr()+"/x:v1"), desc)
			if err != nil || len(probes) != 1 {
				t.Fatalf("%d places, %v", len(probes), err)
			}
			p := probes[0]
			if p.Host != r.Addr() || p.Mirror || p.Auth != tc.want.auth || p.Proto != tc.want.proto || p.Ranges != tc.want.ranges {
				t.Errorf("%+v", p)
			}
			if tc.want.realm != (p.Realm == r.Addr()) {
				t.Errorf("the realm is %q", p.Realm)
			}
			if s := r.Storage(); tc.want.storage != (p.Storage != "" && p.Signed) || s != nil && (p.Storage != s.Addr() || s.Stats().Requests != tc.want.moved) {
				t.Errorf("storage %q, signed %v", p.Storage, p.Signed)
			}
			if n := r.Stats().Requests; n != tc.want.requests {
				t.Errorf("%d requests, want %d", n, tc.want.requests)
			}
			if (p.Err != nil) != (tc.want.err != "") || p.Err != nil && !strings.Contains(p.Err.Error(), tc.want.err) {
				t.Errorf("%v does not say %q", p.Err, tc.want.err)
			}
			if p.Err == nil && (p.Bytes != int64(len(data)) || p.Throughput <= 0 || p.Latency <= 0) {
				t.Errorf("%+v", p)
			}
			if said := fmt.Sprintf("%+v%s", p, log); strings.Contains(said, canary) || strings.Contains(said, "signature=") {
				t.Errorf("a secret is in %s", said)
			}
		})
	}
}

// TestProbeMeasures holds latency and throughput to those of the link, which is slow
// enough for the machine not to matter.
func TestProbeMeasures(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{})
	data := noise(10 << 20)
	desc := pushBlob(t, r, data, pushOptions(t, r))
	c := newClient(t, registry.Options{})
	r.SetLatency(50 * time.Millisecond)
	r.SetBandwidth(20_000_000)
	probes, err := c.Probe(t.Context(), parse(t, r.Addr()+"/x:v1"), desc)
	if err != nil || probes[0].Err != nil {
		t.Fatal(err, probes)
	}
	p := probes[0]
	if p.Latency < 50*time.Millisecond || p.Latency > time.Second {
		t.Errorf("latency %v", p.Latency)
	}
	// Sleeps are only ever too long; what a link has in its queue lets a little more through.
	if p.Bytes != registry.ProbeBytes || p.Throughput > 22_000_000 {
		t.Errorf("%d bytes, %.0f a second", p.Bytes, p.Throughput)
	}
	if s := r.Stats(); s.BlobBytes != registry.ProbeAnswers+registry.ProbeBytes {
		t.Errorf("%d bytes", s.BlobBytes)
	}
}

// TestProbeMirrors looks at each place by itself, and leaves none for what it found.
func TestProbeMirrors(t *testing.T) {
	m := newMirrored(t, "", registry.Options{})
	im, err := m.client.Resolve(t.Context(), m.ref, registry.Selector{})
	if err != nil {
		t.Fatal(err)
	}
	m.mirror.SetFault(fakeregistry.Always(fakeregistry.Fault{Status: http.StatusNotFound}).OnBlobs())
	probes, err := m.client.Probe(t.Context(), m.ref, im.Layers[0].Descriptor)
	if err != nil || len(probes) != 2 {
		t.Fatal(probes, err)
	}
	mirror, primary := probes[0], probes[1]
	if mirror.Host != m.mirror.Addr() || !mirror.Mirror || mirror.Err == nil || !strings.Contains(mirror.Err.Error(), "404") {
		t.Errorf("%+v", mirror)
	}
	if primary.Host != m.primary.Addr() || primary.Mirror || primary.Err != nil || !primary.Ranges {
		t.Errorf("%+v", primary)
	}
	if strings.Contains(m.log.String(), "mirror left") {
		t.Errorf("logged: %s", m.log)
	}
}
