package registry_test

import (
	"bytes"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
)

// A mirrored image lies in a registry and in a mirror of it.
type mirrored struct {
	primary, mirror *fakeregistry.Registry
	data            []byte
	ref             registry.Reference
	log             *watchedLog
	client          *registry.Client
}

// newMirrored pushes the image to both. conf may say PRIMARY and MIRROR.
func newMirrored(t *testing.T, conf string, o registry.Options) *mirrored {
	t.Helper()
	m := &mirrored{
		primary: startRegistry(t, fakeregistry.Options{}),
		mirror:  startRegistry(t, fakeregistry.Options{}),
		data:    noise(300_000),
		log:     newWatchedLog(),
	}
	for _, r := range []*fakeregistry.Registry{m.primary, m.mirror} {
		if _, err := ocipush.Push(t.Context(), r.URL(), "team/x:v1", []ocipush.Layer{ocipush.Bytes(registry.MediaTypeErofs, m.data)}, pushOptions(t, r)); err != nil {
			t.Fatal(err)
		}
		r.ResetStats()
	}
	if conf == "" {
		conf = "[[registry]]\nlocation = \"PRIMARY\"\n[[registry.mirror]]\nlocation = \"MIRROR\"\n"
	}
	conf = strings.NewReplacer("PRIMARY", m.primary.Addr(), "MIRROR", m.mirror.Addr()).Replace(conf)
	m.ref = parse(t, m.primary.Addr()+"/team/x:v1")
	o.RegistriesConf, o.Logger = writeFile(t, conf), m.log.logger()
	m.client = newClient(t, o)
	return m
}

// blob is the image's only layer.
func (m *mirrored) blob(t *testing.T) *registry.Blob {
	t.Helper()
	b, err := m.client.Blob(m.ref, ocispec.Descriptor{Digest: sum(m.data), Size: int64(len(m.data))})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// read resolves the image and reads n bytes of its layer, by one Fetch.
func (m *mirrored) read(t *testing.T, n int64) error {
	t.Helper()
	im, err := m.client.Resolve(t.Context(), m.ref, registry.Selector{})
	if err != nil {
		return err
	}
	b, err := m.client.Blob(im.Reference, im.Layers[0].Descriptor)
	if err != nil {
		return err
	}
	got, _, err := fetch(t.Context(), b, 1000, n)
	if err == nil && !bytes.Equal(got, m.data[1000:1000+n]) {
		t.Error("the bytes are not the blob's")
	}
	return err
}

func asked(r *fakeregistry.Registry) int { return len(r.Requests()) }

func TestMirror(t *testing.T) {
	m := newMirrored(t, "", registry.Options{})
	if err := m.read(t, 5000); err != nil {
		t.Fatal(err)
	}
	if n := asked(m.primary); n != 0 || asked(m.mirror) == 0 {
		t.Errorf("the registry was asked %d times, the mirror %d", n, asked(m.mirror))
	}
	if m.log.String() != "" {
		t.Errorf("logged: %s", m.log)
	}
}

// TestMirrorLeft has each kind of trouble with a mirror end in the registry's
// bytes, and the mirror asked no more.
func TestMirrorLeft(t *testing.T) {
	answerAll := func(f fakeregistry.Fault) func(*http.Request) *fakeregistry.Fault {
		return func(*http.Request) *fakeregistry.Fault { return &f }
	}
	for _, tc := range []struct {
		name  string
		fault func(*http.Request) *fakeregistry.Fault
	}{
		{"404", answerAll(fakeregistry.Fault{Status: 404})},
		{"403", answerAll(fakeregistry.Fault{Status: 403})},
		{"503", answerAll(fakeregistry.Fault{Status: 503})},
		{"breaks before the header", answerAll(fakeregistry.Fault{After: -1, Break: true})},
		{"another manifest", answerAll(answer(200, http.Header{"Content-Type": {ocispec.MediaTypeImageManifest}, "Docker-Content-Digest": {sum(noise(1)).String()}}, `{"schemaVersion":2,"layers":[]}`))},
		{"breaks in the body", onBlob(1, fakeregistry.Fault{After: 1000, Break: true})},
		{"another range", onBlob(1, fakeregistry.Fault{Header: http.Header{"Content-Range": {"bytes 0-199999/300000"}}})},
		{"another size", onBlob(1, fakeregistry.Fault{Header: http.Header{"Content-Range": {"bytes 1000-200999/300001"}}})},
		{"stalls", onBlob(1, fakeregistry.Fault{After: 1000, Stall: make(chan struct{})})},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := newMirrored(t, "", registry.Options{NoProgress: 500 * time.Millisecond})
			m.mirror.SetFault(tc.fault)
			if err := m.read(t, 200_000); err != nil {
				t.Fatal(err)
			}
			before := asked(m.mirror)
			if err := m.read(t, 100); err != nil {
				t.Fatal(err)
			}
			if asked(m.mirror) != before {
				t.Error("the mirror was asked again at once")
			}
			if !strings.Contains(m.log.String(), "mirror left") {
				t.Errorf("logged: %s", m.log)
			}
		})
	}
}

// TestMirrorKilled stops the mirror between two reads, and later the registry, too.
func TestMirrorKilled(t *testing.T) {
	m := newMirrored(t, "", registry.Options{ErrorWait: registry.NoWait, ResolveWait: registry.NoWait})
	if err := m.read(t, 100); err != nil {
		t.Fatal(err)
	}
	m.mirror.Stop()
	if err := m.read(t, 100); err != nil {
		t.Fatal(err)
	}
	m.primary.Stop()
	err := m.read(t, 100)
	if err == nil || !strings.Contains(err.Error(), m.primary.Addr()) || !strings.Contains(err.Error(), "mirror "+m.mirror.Addr()) {
		t.Errorf("%v does not name both", err)
	}
	// A mirror that is paused is better than nothing.
	if err := m.mirror.Start(); err != nil {
		t.Fatal(err)
	}
	if err := m.read(t, 100); err != nil {
		t.Error(err)
	}
}

func TestRegistriesConf(t *testing.T) {
	for _, tc := range []struct {
		name, conf      string
		primary, mirror bool   // is asked
		want            string // what the error says; "" for success
	}{
		{"blocked", "[[registry]]\nlocation = \"PRIMARY\"\nblocked = true\n", false, false, "is blocked in registries.conf"},
		{"rewritten", "[[registry]]\nprefix = \"PRIMARY/team\"\nlocation = \"MIRROR/team\"\n", false, true, ""},
		{"another prefix", "[[registry]]\nprefix = \"PRIMARY/other\"\nlocation = \"MIRROR/team\"\n", true, false, ""},
		{"mirror by digest only", "[[registry]]\nlocation = \"PRIMARY\"\nmirror-by-digest-only = true\n[[registry.mirror]]\nlocation = \"MIRROR\"\n", true, true, ""},
		{"not TOML", "[[", false, false, "registries.conf: "},
		{"nothing", "", true, false, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := newMirrored(t, tc.conf+"\n", registry.Options{})
			err := m.read(t, 100)
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("%v, want %q", err, tc.want)
			}
			if p, q := asked(m.primary) > 0, asked(m.mirror) > 0; p != tc.primary || q != tc.mirror {
				t.Errorf("the registry was asked: %v, the mirror: %v", p, q)
			}
		})
	}
}

// TestMirrorIsAStranger: what a user gives for a registry is not for its mirrors,
// and a proxy for many registries is told which one is meant.
func TestMirrorIsAStranger(t *testing.T) {
	data := noise(1000)
	var authorized, named atomic.Int32
	serve := func(w http.ResponseWriter, req *http.Request) {
		http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(data))
	}
	mirror := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.Header.Get("Authorization") != "" {
			authorized.Add(1)
		}
		if req.URL.Query().Get("ns") == "upstream.example" {
			named.Add(1)
		}
		w.Header().Set("WWW-Authenticate", "Basic")
		w.WriteHeader(http.StatusUnauthorized)
	}))
	t.Cleanup(mirror.Close)
	primary := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if _, password, _ := req.BasicAuth(); password != canary {
			w.Header().Set("WWW-Authenticate", "Basic")
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		serve(w, req)
	}))
	t.Cleanup(primary.Close)
	conf := fmt.Sprintf("[[registry]]\nlocation = %q\n[[registry.mirror]]\nlocation = %q\nnamespace-proxy = \"upstream.example\"\n", host(primary), host(mirror))
	c := newClient(t, registry.Options{Username: user, Password: canary, RegistriesConf: writeFile(t, conf)})
	b, err := c.Blob(parse(t, host(primary)+"/x:v1"), ocispec.Descriptor{Digest: sum(data), Size: int64(len(data))})
	if err != nil {
		t.Fatal(err)
	}
	got, _, err := fetch(t.Context(), b, 0, 1000)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatal(err)
	}
	if authorized.Load() != 0 || named.Load() == 0 {
		t.Errorf("the mirror saw credentials %d times and its namespace %d times", authorized.Load(), named.Load())
	}
}

// TestInsecureRegistry takes any certificate of a host that is configured so, and
// of no other.
func TestInsecureRegistry(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{TLS: true})
	other := startRegistry(t, fakeregistry.Options{TLS: true})
	data := noise(1000)
	conf := writeFile(t, fmt.Sprintf("[[registry]]\nlocation = %q\ninsecure = true\n", r.Addr()))
	c := newClient(t, registry.Options{RegistriesConf: conf, ErrorWait: registry.NoWait})
	for _, s := range []*fakeregistry.Registry{r, other} {
		desc := pushBlob(t, s, data, pushOptions(t, s))
		b, err := c.Blob(parse(t, s.Addr()+"/x:v1"), desc)
		if err != nil {
			t.Fatal(err)
		}
		_, _, err = fetch(t.Context(), b, 0, 1000)
		if (err == nil) != (s == r) {
			t.Errorf("insecure %v: %v", s == r, err)
		}
	}
}
