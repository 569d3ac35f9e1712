package registry_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
)

const (
	tarGzip        = "application/vnd.oci.image.layer.v1.tar+gzip"
	ociManifest    = "application/vnd.oci.image.manifest.v1+json"
	ociIndex       = "application/vnd.oci.image.index.v1+json"
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
)

var erofsLayer = ocipush.Bytes(registry.MediaTypeErofs, []byte("an image, as far as a registry can tell"))

func TestResolveManifest(t *testing.T) {
	for _, tc := range []struct {
		name        string
		opts        func(*ocipush.Options)
		contentType []string // nil: as pushed
		mediaType   string
	}{
		{"oci", func(*ocipush.Options) {}, nil, ociManifest},
		{"docker", func(o *ocipush.Options) { o.Docker = true }, nil, dockerManifest},
		{"no mediaType, by Content-Type", func(o *ocipush.Options) { o.NoMediaType, o.Docker = true, true }, nil, dockerManifest},
		{"no mediaType, parameters", func(o *ocipush.Options) { o.NoMediaType = true }, []string{ociManifest + "; charset=utf-8"}, ociManifest},
		{"no mediaType, by shape", func(o *ocipush.Options) { o.NoMediaType = true }, []string{"text/plain"}, ociManifest},
		{"no mediaType, no Content-Type", func(o *ocipush.Options) { o.NoMediaType = true }, []string{}, ociManifest},
		{"Content-Type of another world", func(*ocipush.Options) {}, []string{"application/octet-stream"}, ociManifest},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := startRegistry(t, fakeregistry.Options{})
			o := pushOptions(t, r)
			tc.opts(&o)
			d, err := ocipush.Push(t.Context(), r.URL(), "a/b:v1", []ocipush.Layer{erofsLayer}, o)
			if err != nil {
				t.Fatal(err)
			}
			if tc.contentType != nil {
				r.SetFault(func(*http.Request) *fakeregistry.Fault {
					return &fakeregistry.Fault{Header: http.Header{"Content-Type": tc.contentType}}
				})
			}
			ref := parse(t, r.Addr()+"/a/b:v1")
			im, err := newClient(t, registry.Options{}).Resolve(t.Context(), ref, registry.Selector{})
			if err != nil {
				t.Fatal(err)
			}
			if im.Digest != d || im.IndexDigest != "" || im.MediaType != tc.mediaType || im.Reference != ref || im.Platform != "" {
				t.Errorf("%+v", im)
			}
			l, err := im.ErofsLayer(registry.Selector{})
			if err != nil || l.Index != 0 || l.Size != erofsLayer.Size || l.MediaType != registry.MediaTypeErofs {
				t.Errorf("%+v, %v", l, err)
			}
		})
	}
}

func TestResolveByDigest(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{})
	d, err := ocipush.Push(t.Context(), r.URL(), "x:v1", []ocipush.Layer{erofsLayer}, pushOptions(t, r))
	if err != nil {
		t.Fatal(err)
	}
	other, err := ocipush.Push(t.Context(), r.URL(), "x:v2", nil, pushOptions(t, r))
	if err != nil {
		t.Fatal(err)
	}
	c := newClient(t, registry.Options{})
	for _, name := range []string{"/x@" + d.String(), "/x:v2@" + d.String(), "/x:unknown@" + d.String()} {
		im, err := c.Resolve(t.Context(), parse(t, r.Addr()+name), registry.Selector{})
		if err != nil || im.Digest != d {
			t.Errorf("%s: %+v, %v", name, im, err)
		}
	}
	// Something else under this digest is noticed.
	r.SetFault(func(q *http.Request) *fakeregistry.Fault {
		q.URL.Path = "/v2/x/manifests/" + other.String()
		return nil
	})
	_, err = c.Resolve(t.Context(), parse(t, r.Addr()+"/x@"+d.String()), registry.Selector{})
	if err == nil || !strings.Contains(err.Error(), d.String()) || !strings.Contains(err.Error(), other.String()) {
		t.Errorf("%v", err)
	}
}

func TestDockerContentDigest(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{})
	d, err := ocipush.Push(t.Context(), r.URL(), "x:v1", []ocipush.Layer{erofsLayer}, pushOptions(t, r))
	if err != nil {
		t.Fatal(err)
	}
	c := newClient(t, registry.Options{})
	for _, tc := range []struct {
		name   string
		header []string
		says   string
	}{
		{"missing", []string{}, ""},
		{"right", []string{d.String()}, ""},
		{"wrong", []string{digest.FromString("x").String()}, "Docker-Content-Digest says"},
		{"malformed", []string{"sha256:1"}, "invalid checksum digest"},
		{"nonsense", []string{"nonsense"}, "invalid checksum digest"},
	} {
		r.SetFault(func(*http.Request) *fakeregistry.Fault {
			return &fakeregistry.Fault{Header: http.Header{"Docker-Content-Digest": tc.header}}
		})
		im, err := c.Resolve(t.Context(), parse(t, r.Addr()+"/x:v1"), registry.Selector{})
		switch {
		case tc.says == "" && (err != nil || im.Digest != d):
			t.Errorf("%s: %+v, %v", tc.name, im, err)
		case tc.says != "" && (err == nil || !strings.Contains(err.Error(), tc.says)):
			t.Errorf("%s: %v", tc.name, err)
		}
	}
}

func image(platform string, layer ocipush.Layer, features ...string) ocipush.Image {
	f := strings.Split(platform+"/", "/")
	return ocipush.Image{
		Layers:   []ocipush.Layer{layer},
		Platform: ocispec.Platform{OS: f[0], Architecture: f[1], Variant: f[2], OSFeatures: features},
	}
}

func TestResolveIndex(t *testing.T) {
	tar := ocipush.Bytes(tarGzip, []byte("tar"))
	images := []ocipush.Image{
		image("linux/arm64/v8", tar),
		image("linux/amd64", tar),
		image("linux/amd64", ocipush.Bytes(registry.MediaTypeErofs, []byte("amd64")), "erofs"),
		image("linux/arm/v6", ocipush.Bytes(registry.MediaTypeErofs, []byte("arm v6")), "erofs"),
	}
	for _, docker := range []bool{false, true} {
		r := startRegistry(t, fakeregistry.Options{})
		o := pushOptions(t, r)
		o.Docker, o.NoMediaType = docker, !docker
		d, err := ocipush.PushIndex(t.Context(), r.URL(), "x:v1", images, o)
		if err != nil {
			t.Fatal(err)
		}
		r.ResetStats()
		c := newClient(t, registry.Options{})
		for _, tc := range []struct{ want, platform, layer string }{
			{"linux/amd64", "linux/amd64", "amd64"},
			{"linux/arm/v7", "linux/arm/v6", "arm v6"},
			{"linux/arm64", "linux/arm64", "tar"},
		} {
			im, err := c.Resolve(t.Context(), parse(t, r.Addr()+"/x:v1"), registry.Selector{Platform: tc.want})
			if err != nil {
				t.Fatal(err)
			}
			if im.IndexDigest != d || im.Platform != tc.platform || im.Layers[0].Digest != digest.FromString(tc.layer) {
				t.Errorf("%s: %+v", tc.want, im)
			}
		}
		if got := r.Stats(); got.ManifestGETs != 6 || got.BlobGETs != 0 {
			t.Errorf("%+v", got)
		}
		_, err = c.Resolve(t.Context(), parse(t, r.Addr()+"/x:v1"), registry.Selector{Platform: "linux/s390x"})
		if err == nil || !strings.Contains(err.Error(), "nothing for linux/s390x, only linux/arm64, linux/amd64, linux/amd64, linux/arm/v6") {
			t.Errorf("%v", err)
		}
	}
}

func TestResolveHostPlatform(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{})
	_, err := ocipush.PushIndex(t.Context(), r.URL(), "x:v1", []ocipush.Image{
		image("plan9/mips", erofsLayer), image(runtime.GOOS+"/"+runtime.GOARCH, erofsLayer),
	}, pushOptions(t, r))
	if err != nil {
		t.Fatal(err)
	}
	im, err := newClient(t, registry.Options{}).Resolve(t.Context(), parse(t, r.Addr()+"/x:v1"), registry.Selector{})
	if err != nil || !strings.HasPrefix(im.Platform, runtime.GOOS+"/"+runtime.GOARCH) {
		t.Errorf("%+v, %v", im, err)
	}
}

// Indexes within each other, each holding the next as its only entry.
func TestResolveNestedIndex(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{})
	o := pushOptions(t, r)
	d, err := ocipush.Push(t.Context(), r.URL(), "x:0", []ocipush.Layer{erofsLayer}, o)
	if err != nil {
		t.Fatal(err)
	}
	mediaType := ociManifest
	for depth := 1; depth <= 6; depth++ {
		raw := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"manifests":[{"mediaType":%q,"digest":%q,"size":1}]}`, ociIndex, mediaType, d)
		d, err = ocipush.PushManifest(t.Context(), r.URL(), fmt.Sprintf("x:%d", depth), ociIndex, raw, o)
		if err != nil {
			t.Fatal(err)
		}
		mediaType = ociIndex
	}
	c := newClient(t, registry.Options{})
	for depth := 0; depth <= 6; depth++ {
		im, err := c.Resolve(t.Context(), parse(t, fmt.Sprintf("%s/x:%d", r.Addr(), depth)), registry.Selector{})
		if depth <= 4 && (err != nil || len(im.Layers) != 1) {
			t.Errorf("%d indexes: %v", depth, err)
		}
		if depth > 4 && (err == nil || !strings.Contains(err.Error(), "indexes within each other")) {
			t.Errorf("%d indexes: %v", depth, err)
		}
	}
}

func TestResolveRefusesDocuments(t *testing.T) {
	config := `"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:` + strings.Repeat("a", 64) + `","size":2}`
	for _, tc := range []struct{ name, contentType, raw, says string }{
		{"both", ociIndex, `{"schemaVersion":2,"mediaType":"` + ociIndex + `","manifests":[],"layers":[],` + config + `}`, "index and a manifest at once"},
		{"index by name, manifest by form", ociIndex, `{"schemaVersion":2,"layers":[],` + config + `}`, "does not have the form"},
		{"manifest by name, index by form", ociManifest, `{"schemaVersion":2,"mediaType":"` + ociManifest + `","manifests":[]}`, "does not have the form"},
		{"schema 1", "application/vnd.docker.distribution.manifest.v1+prettyjws", `{"schemaVersion":1,"fsLayers":[]}`, "schema 1"},
		{"another type", "application/json", `{"schemaVersion":2,"mediaType":"application/x\u001b[31m"}`, `"application/x[31m" is neither`},
		{"nothing", "application/json", `{}`, "neither"},
		{"not JSON", ociManifest, `<html>`, "not JSON"},
		{"another JSON", ociManifest, `[]`, "not JSON of the right form"},
		{"layers of another form", ociManifest, `{"schemaVersion":2,"layers":{"a":1},` + config + `}`, "layers"},
		{"entry without digest", ociIndex, `{"schemaVersion":2,"manifests":[{"mediaType":"` + ociManifest + `","size":1}]}`, "entry 0: digest"},
		{"entry with a path for a digest", ociIndex, `{"schemaVersion":2,"manifests":[{"digest":"sha256:/../../x","size":1}]}`, "entry 0: digest"},
		{"empty index", ociIndex, `{"schemaVersion":2,"manifests":[]}`, "only an empty list"},
		{"endless", ociManifest, strings.Repeat(" ", 4<<20+1), "more than 4194304 bytes"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := startRegistry(t, fakeregistry.Options{})
			r.SetFault(func(q *http.Request) *fakeregistry.Fault {
				if !strings.Contains(q.URL.Path, "/manifests/") {
					return nil
				}
				f := answer(200, http.Header{"Content-Type": {tc.contentType}}, tc.raw)
				return &f
			})
			_, err := newClient(t, registry.Options{}).Resolve(t.Context(), parse(t, r.Addr()+"/x:v1"), registry.Selector{})
			if err == nil || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("%v does not say %q", err, tc.says)
			}
			if n := r.Stats().ManifestGETs; n != 1 {
				t.Errorf("%d GETs", n)
			}
		})
	}
}

func TestResolveManifestOfGreatestSize(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{})
	raw := []byte(`{"schemaVersion":2,"mediaType":"` + ociManifest + `","layers":[],"annotations":{"a":"` + strings.Repeat("x", 4<<20-1000) + `"}}`)
	if _, err := ocipush.PushManifest(t.Context(), r.URL(), "x:v1", ociManifest, raw, pushOptions(t, r)); err != nil {
		t.Fatal(err)
	}
	if _, err := newClient(t, registry.Options{}).Resolve(t.Context(), parse(t, r.Addr()+"/x:v1"), registry.Selector{}); err != nil {
		t.Error(err)
	}
}

func TestResolveUnknown(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{})
	_, err := newClient(t, registry.Options{}).Resolve(t.Context(), parse(t, r.Addr()+"/x:v9"), registry.Selector{})
	var status *registry.StatusError
	if !errors.As(err, &status) || status.Code != 404 || !strings.Contains(err.Error(), r.Addr()+"/x:v9: manifest v9") || !strings.Contains(err.Error(), "MANIFEST_UNKNOWN") {
		t.Errorf("%v", err)
	}
}

// A manifest whose body breaks off is fetched again.
func TestResolveRetries(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{})
	if _, err := ocipush.Push(t.Context(), r.URL(), "x:v1", []ocipush.Layer{erofsLayer}, pushOptions(t, r)); err != nil {
		t.Fatal(err)
	}
	r.ResetStats()
	faults := []*fakeregistry.Fault{{After: 20, Break: true}, {Status: 503}}
	r.SetFault(func(q *http.Request) *fakeregistry.Fault {
		if !strings.Contains(q.URL.Path, "/manifests/") || len(faults) == 0 {
			return nil
		}
		f := faults[0]
		faults = faults[1:]
		return f
	})
	if _, err := newClient(t, registry.Options{}).Resolve(t.Context(), parse(t, r.Addr()+"/x:v1"), registry.Selector{}); err != nil {
		t.Error(err)
	}
	if n := r.Stats().ManifestGETs; n != 3 {
		t.Errorf("%d GETs", n)
	}
}

// Who mistyped a host should not wait for it.
func TestFirstContactFailsFast(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	c := newClient(t, registry.Options{})
	began := time.Now()
	_, err = c.Resolve(t.Context(), parse(t, free+"/x:v1"), registry.Selector{})
	if err == nil || !strings.Contains(err.Error(), "connection refused") || !strings.Contains(err.Error(), free) {
		t.Errorf("%v", err)
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("took %v", took)
	}
}

// A registry that was there before gets the patience of ResolveWait.
func TestResolveWaits(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{})
	if _, err := ocipush.Push(t.Context(), r.URL(), "x:v1", []ocipush.Layer{erofsLayer}, pushOptions(t, r)); err != nil {
		t.Fatal(err)
	}
	c := newClient(t, registry.Options{ResolveWait: time.Second})
	ref := parse(t, r.Addr()+"/x:v1")
	if _, err := c.Resolve(t.Context(), ref, registry.Selector{}); err != nil {
		t.Fatal(err)
	}
	r.Stop()
	began := time.Now()
	_, err := c.Resolve(t.Context(), ref, registry.Selector{})
	var gone *registry.UnavailableError
	if !errors.As(err, &gone) || gone.Tries < 2 {
		t.Errorf("%v", err)
	}
	if took := time.Since(began); took < 700*time.Millisecond || took > 2*time.Second {
		t.Errorf("took %v", took)
	}
}

func TestTLSOnLoopback(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{TLS: true})
	if _, err := ocipush.Push(t.Context(), r.URL(), "x:v1", []ocipush.Layer{erofsLayer}, pushOptions(t, r)); err != nil {
		t.Fatal(err)
	}
	ref := parse(t, r.Addr()+"/x:v1")
	if _, err := newClient(t, registry.Options{RootCAs: r.RootCAs()}).Resolve(t.Context(), ref, registry.Selector{}); err != nil {
		t.Error(err)
	}
	began := time.Now()
	_, err := newClient(t, registry.Options{}).Resolve(t.Context(), ref, registry.Selector{})
	if err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("unknown authority: %v", err)
	}
	_, err = newClient(t, registry.Options{PlainHTTP: true}).Resolve(t.Context(), ref, registry.Selector{})
	if err == nil || !strings.Contains(err.Error(), "400") {
		t.Errorf("plain HTTP: %v", err)
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("two errors that nothing mends took %v", took)
	}
}

// An explicit platform is held against an image that has no index.
func TestResolveSingleManifestPlatform(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{})
	if _, err := ocipush.Push(t.Context(), r.URL(), "x:v1", []ocipush.Layer{erofsLayer}, pushOptions(t, r)); err != nil {
		t.Fatal(err)
	}
	c := newClient(t, registry.Options{})
	ref := parse(t, r.Addr()+"/x:v1")
	im, err := c.Resolve(t.Context(), ref, registry.Selector{Platform: "linux/amd64/v2"})
	if err != nil || im.Platform != "linux/amd64" {
		t.Errorf("%+v, %v", im, err)
	}
	_, err = c.Resolve(t.Context(), ref, registry.Selector{Platform: "linux/arm64"})
	if err == nil || !strings.Contains(err.Error(), "is for linux/amd64, not for linux/arm64") {
		t.Errorf("%v", err)
	}
	r.ResetStats()
	if im, err = c.Resolve(t.Context(), ref, registry.Selector{}); err != nil {
		t.Fatal(err)
	}
	if n := r.Stats().BlobGETs; n != 0 {
		t.Errorf("%d blob GETs although no platform was asked for", n)
	}
	config, err := registry.ImageConfigIn(t.Context(), c.Repository(im.Reference), im)
	if err != nil || config.Architecture != "amd64" {
		t.Errorf("%+v, %v", config, err)
	}
	r.SetFault(onBlob(0, answer(200, nil, "{}")))
	if _, err := registry.ImageConfigIn(t.Context(), c.Repository(im.Reference), im); err == nil || !strings.Contains(err.Error(), im.Config.Digest.String()) {
		t.Errorf("another config: %v", err)
	}
	im.Config.MediaType = "application/vnd.oci.empty.v1+json"
	if _, err := registry.ImageConfigIn(t.Context(), c.Repository(im.Reference), im); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("no image config: %v", err)
	}
}

func layers(types ...string) []registry.Layer {
	var list []registry.Layer
	for i, t := range types {
		list = append(list, registry.Layer{Index: i, Descriptor: ocispec.Descriptor{
			MediaType: t, Digest: digest.FromString(fmt.Sprint(i)), Size: int64(100 + i),
		}})
	}
	return list
}

func TestErofsLayer(t *testing.T) {
	number := func(n int) registry.Selector { return registry.Selector{Layer: &n} }
	blob := func(s string) registry.Selector { return registry.Selector{Blob: digest.FromString(s)} }
	var only registry.Selector
	const (
		raw  = "application/vnd.erofs"
		zstd = "application/vnd.erofs+zstd"
	)
	for _, tc := range []struct {
		name   string
		types  []string
		sel    registry.Selector
		index  int
		errors []string // parts of it
	}{
		{"the draft's type", []string{raw}, only, 0, nil},
		{"containerd's type", []string{tarGzip, "application/vnd.erofs.layer.v1"}, only, 1, nil},
		{"by suffix", []string{tarGzip, "application/vnd.stacker.image.layer.erofs"}, only, 1, nil},
		{"index beside it", []string{raw, "application/vnd.erofs.chunk-index.v1"}, only, 0, nil},
		{"zstd", []string{zstd}, only, 0, nil},
		{"containerd's zstd", []string{"application/vnd.erofs.layer.v1+zstd"}, only, 0, nil},
		{"tar", []string{tarGzip}, only, 0, []string{"layer 0 is application/vnd.oci.image.layer.v1.tar+gzip, not an EROFS image; "}},
		{"tars", []string{tarGzip, tarGzip}, only, 0, []string{"layer 0 is", "holds layer 0", "layer 1 application/vnd.oci.image.layer.v1.tar+gzip (101 bytes)"}},
		{"none", nil, only, 0, []string{"has no layers"}},
		{"two", []string{raw, raw}, only, 0, []string{"2 EROFS layers", "name one", "layer 1 application/vnd.erofs"}},
		{"raw and zstd", []string{raw, zstd}, only, 0, []string{"2 EROFS layers", "layer 1 application/vnd.erofs+zstd"}},
		{"many", strings.Fields(strings.Repeat(tarGzip+" ", 20)), only, 0, []string{"layer 7 ", "and 12 more"}},
		{"no type", []string{""}, only, 0, []string{"layer 0 is of no media type"}},
		{"hostile type", []string{"x\x1b[31m" + strings.Repeat("y", 1000)}, only, 0, []string{"layer 0 is x[31m", "yyy..."}},

		{"by number", []string{raw, raw}, number(1), 1, nil},
		{"by number, unknown type", []string{tarGzip, "application/octet-stream"}, number(1), 1, nil},
		{"by number, plain tar", []string{"application/vnd.oci.image.layer.v1.tar"}, number(0), 0, nil},
		{"by number, gzip", []string{raw, tarGzip}, number(1), 0, []string{"layer 1 is application/vnd.oci.image.layer.v1.tar+gzip, not an EROFS image", "layer 0 application/vnd.erofs"}},
		{"by number, docker gzip", []string{"application/vnd.docker.image.rootfs.diff.tar.gzip"}, number(0), 0, []string{"not an EROFS image"}},
		{"by number, zstd", []string{zstd}, number(0), 0, nil},
		{"by number, index", []string{raw, "application/vnd.erofs.chunk-index.v1"}, number(1), 0, []string{"not a mountable image"}},
		{"by number, unknown kin", []string{"application/vnd.erofs+lz4"}, number(0), 0, []string{"not a mountable image"}},
		{"no such number", []string{raw}, number(1), 0, []string{"no layer 1", "layer 0 application/vnd.erofs (100 bytes)"}},
		{"negative", []string{raw}, number(-1), 0, []string{"no layer -1"}},
		{"number in an empty image", nil, number(0), 0, []string{"no layer 0", "holds no layers"}},

		{"by digest", []string{raw, raw}, blob("1"), 1, nil},
		{"by digest, zstd", []string{zstd}, blob("0"), 0, nil},
		{"no such digest", []string{raw}, blob("7"), 0, []string{"no layer has this digest"}},
		{"not a digest", []string{raw}, registry.Selector{Blob: "sha256:7"}, 0, []string{"invalid"}},
		{"both", []string{raw}, registry.Selector{Layer: new(int), Blob: digest.FromString("0")}, 0, []string{"give one"}},
	} {
		im := &registry.Image{Reference: parse(t, "quay.io/a:v1"), Layers: layers(tc.types...)}
		l, err := im.ErofsLayer(tc.sel)
		if len(tc.errors) == 0 {
			if err != nil || l.Index != tc.index || l.Digest != im.Layers[tc.index].Digest {
				t.Errorf("%s: %+v, %v", tc.name, l, err)
			}
			continue
		}
		for _, part := range append(tc.errors, "quay.io/a:v1: ") {
			if err == nil || !strings.Contains(err.Error(), part) {
				t.Errorf("%s: %v\ndoes not say %q", tc.name, err, part)
			}
		}
		if err != nil && (len(err.Error()) > 1500 || strings.ContainsAny(err.Error(), "\x1b\n")) {
			t.Errorf("%s: not fit for a terminal: %q", tc.name, err)
		}
	}
}

// TestErofsLayers: without a name it is all of them, the lowest first, unless a part
// of the file system would be missing.
func TestErofsLayers(t *testing.T) {
	const (
		raw   = "application/vnd.erofs"
		index = "application/vnd.erofs.chunk-index.v1"
	)
	for _, tc := range []struct {
		name   string
		types  []string
		roles  map[int]string
		sel    registry.Selector
		want   []int
		errors []string
	}{
		{name: "one", types: []string{raw}, want: []int{0}},
		{name: "all", types: []string{raw, "application/vnd.erofs.layer.v1", raw}, want: []int{0, 1, 2}},
		{name: "with indexes between", types: []string{raw, index, raw, index}, want: []int{0, 2}},
		{name: "with something unknown", types: []string{raw, raw, "application/vnd.example.sbom"}, want: []int{0, 1}},
		{name: "lower ones, said so", types: []string{raw, raw}, roles: map[int]string{0: "overlay-lower"}, want: []int{0, 1}},
		{name: "by number", types: []string{raw, raw}, sel: registry.Selector{Layer: new(int)}, want: []int{0}},
		{name: "by number, a device", types: []string{raw, raw}, roles: map[int]string{0: "device"}, sel: registry.Selector{Layer: new(int)}, want: []int{0}},
		{name: "by digest", types: []string{raw, raw}, sel: registry.Selector{Blob: digest.FromString("1")}, want: []int{1}},
		{name: "tar among them", types: []string{raw, tarGzip, raw}, errors: []string{"2 EROFS layers, but layer 1 is", "would be missing"}},
		{name: "plain tar among them", types: []string{raw, raw, "application/vnd.oci.image.layer.v1.tar"}, errors: []string{"layer 2 is"}},
		{name: "a device", types: []string{raw, raw}, roles: map[int]string{0: "device"}, errors: []string{"layer 0 is an extra device", "org.erofs.role=device"}},
		{name: "a device that is no image", types: []string{"application/octet-stream", raw}, roles: map[int]string{0: "device"}, errors: []string{"layer 0 is an extra device"}},
		{name: "data", types: []string{raw, raw}, roles: map[int]string{0: "overlay-data"}, errors: []string{"layer 0 is data that other layers refer to", "overlay-data"}},
		{name: "an unknown role", types: []string{raw, raw}, roles: map[int]string{1: "x\x1b[31m"}, errors: []string{"layer 1 is a part that is not known"}},
	} {
		im := &registry.Image{Reference: parse(t, "quay.io/a:v1"), Layers: layers(tc.types...)}
		for i, role := range tc.roles {
			im.Layers[i].Annotations = map[string]string{"org.erofs.role": role}
		}
		chosen, err := im.ErofsLayers(tc.sel)
		var got []int
		for _, l := range chosen {
			got = append(got, l.Index)
		}
		if !slices.Equal(got, tc.want) || (err != nil) != (tc.errors != nil) {
			t.Errorf("%s: %v, %v; want %v", tc.name, got, err, tc.want)
		}
		for _, part := range tc.errors {
			if err != nil && (!strings.Contains(err.Error(), part) || strings.Contains(err.Error(), "\x1b")) {
				t.Errorf("%s: %q does not say %q", tc.name, err, part)
			}
		}
	}
}

func TestBlobOutsideTheManifest(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{})
	o := pushOptions(t, r)
	if _, err := ocipush.Push(t.Context(), r.URL(), "x:v1", []ocipush.Layer{erofsLayer}, o); err != nil {
		t.Fatal(err)
	}
	loose := noise(1234)
	d, err := ocipush.PushBlob(t.Context(), r.URL(), "x", ocipush.Bytes("", loose), o)
	if err != nil {
		t.Fatal(err)
	}
	c := newClient(t, registry.Options{})
	im, err := c.Resolve(t.Context(), parse(t, r.Addr()+"/x:v1"), registry.Selector{})
	if err != nil {
		t.Fatal(err)
	}
	noHEAD := func(status int) func(*http.Request) *fakeregistry.Fault {
		return func(q *http.Request) *fakeregistry.Fault {
			if q.Method != http.MethodHead {
				return nil
			}
			return &fakeregistry.Fault{Status: status}
		}
	}
	for name, fault := range map[string]func(*http.Request) *fakeregistry.Fault{
		"HEAD":              nil,
		"HEAD refused":      noHEAD(405),
		"HEAD forbidden":    noHEAD(403),
		"neither nor range": withoutRanges(noHEAD(405)),
	} {
		r.SetFault(fault)
		l, err := oneLayer(t, c, im, registry.Selector{Blob: d})
		if err != nil || l.Index != -1 || l.Size != 1234 || l.Digest != d {
			t.Errorf("%s: %+v, %v", name, l, err)
		}
	}
	r.SetFault(nil)
	_, err = oneLayer(t, c, im, registry.Selector{Blob: digest.FromString("nothing")})
	var status *registry.StatusError
	if !errors.As(err, &status) || status.Code != 404 {
		t.Errorf("%v", err)
	}
	if l, err := oneLayer(t, c, im, registry.Selector{}); err != nil || l.Index != 0 {
		t.Errorf("%+v, %v", l, err)
	}
}

func TestImageIsPlainData(t *testing.T) {
	im := registry.Image{Reference: parse(t, "quay.io/a:v1"), Layers: layers("x")}
	raw, err := json.Marshal(im)
	if err != nil {
		t.Fatal(err)
	}
	var again registry.Image
	if err := json.Unmarshal(raw, &again); err != nil || again.Reference != im.Reference || again.Layers[0].Digest != im.Layers[0].Digest {
		t.Errorf("%s: %v", raw, err)
	}
}
