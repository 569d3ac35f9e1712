package ocipush_test

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/tests/dockerregistry"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
)

// registries are the ones to push to: ours and the real one.
func registries(t *testing.T) map[string]func(*testing.T) string {
	return map[string]func(*testing.T) string{
		"fake": func(t *testing.T) string {
			r, err := fakeregistry.New(fakeregistry.Options{})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := r.Close(); err != nil {
					t.Error(err)
				}
			})
			return r.URL()
		},
		"docker-registry": func(t *testing.T) string { return "http://" + dockerregistry.Start(t) },
	}
}

func get(t *testing.T, url, accept string) (http.Header, []byte) {
	t.Helper()
	q, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	q.Header.Set("Accept", accept)
	resp, err := http.DefaultClient.Do(q)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("%s: %s, %v: %s", url, resp.Status, err, b)
	}
	return resp.Header, b
}

func TestPush(t *testing.T) {
	const accept = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json"
	big := bytes.Repeat([]byte("0123456789abcdef"), 10_000)
	for name, start := range registries(t) {
		for _, chunk := range []int64{0, 100_000, 160_000, 1 << 20} {
			t.Run(name, func(t *testing.T) {
				base := start(t)
				layer := ocipush.Bytes("application/vnd.erofs", big)
				layer.Annotations = map[string]string{"k": "v"}
				d, err := ocipush.PushIndex(t.Context(), base, "a/b:v1", []ocipush.Image{
					{Layers: []ocipush.Layer{layer, ocipush.Bytes("application/x-empty", nil)}, Platform: ocispec.Platform{OS: "linux", Architecture: "arm", Variant: "v7", OSFeatures: []string{"erofs"}}},
				}, ocipush.Options{ChunkSize: chunk})
				if err != nil {
					t.Fatal(err)
				}
				header, raw := get(t, base+"/v2/a/b/manifests/v1", accept)
				if digest.FromBytes(raw) != d || header.Get("Docker-Content-Digest") != d.String() {
					t.Errorf("index: %s, %v", d, header)
				}
				var index ocispec.Index
				if err := json.Unmarshal(raw, &index); err != nil {
					t.Fatal(err)
				}
				entry := index.Manifests[0]
				if p := entry.Platform; p.Variant != "v7" || p.OSFeatures[0] != "erofs" {
					t.Errorf("%+v", p)
				}
				_, raw = get(t, base+"/v2/a/b/manifests/"+entry.Digest.String(), accept)
				var m ocispec.Manifest
				if err := json.Unmarshal(raw, &m); err != nil || int64(len(raw)) != entry.Size {
					t.Fatalf("%v: %d bytes", err, len(raw))
				}
				l := m.Layers[0]
				if l.MediaType != "application/vnd.erofs" || l.Size != int64(len(big)) || l.Annotations["k"] != "v" || len(m.Layers) != 2 {
					t.Errorf("%+v", m.Layers)
				}
				if _, got := get(t, base+"/v2/a/b/blobs/"+l.Digest.String(), "*/*"); !bytes.Equal(got, big) {
					t.Errorf("blob has %d bytes", len(got))
				}
				var config ocispec.Image
				_, raw = get(t, base+"/v2/a/b/blobs/"+m.Config.Digest.String(), "*/*")
				if err := json.Unmarshal(raw, &config); err != nil || config.Architecture != "arm" || len(config.RootFS.DiffIDs) != 2 {
					t.Errorf("%s: %v", raw, err)
				}
			})
		}
	}
	http.DefaultClient.CloseIdleConnections()
}

func TestPushIsRefused(t *testing.T) {
	r, err := fakeregistry.New(fakeregistry.Options{Auth: fakeregistry.Bearer})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer http.DefaultClient.CloseIdleConnections()
	layers := []ocipush.Layer{ocipush.Bytes("x", []byte("x"))}
	if _, err := ocipush.Push(t.Context(), r.URL(), "x:v1", layers, ocipush.Options{}); err == nil || !strings.Contains(err.Error(), "401") {
		t.Errorf("%v", err)
	}
	o := ocipush.Options{Authorization: "Bearer " + r.IssueToken()}
	if _, err := ocipush.Push(t.Context(), r.URL(), "x:v1", layers, o); err != nil {
		t.Error(err)
	}
}

// A layer whose digest is given is described, and neither read nor uploaded.
func TestLayerThatIsThere(t *testing.T) {
	r, err := fakeregistry.New(fakeregistry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	const content = "0123456789"
	d := digest.FromString(content)
	r.PutBlob("x/there", d, strings.NewReader(content), int64(len(content)))
	layer := ocipush.Layer{MediaType: "a/b", Size: int64(len(content)), Digest: d}
	if _, err := ocipush.Push(t.Context(), r.URL(), "x/there:v1", []ocipush.Layer{layer}, ocipush.Options{}); err != nil {
		t.Fatal(err)
	}
	_, raw := get(t, r.URL()+"/v2/x/there/manifests/v1", ocispec.MediaTypeImageManifest)
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	if len(m.Layers) != 1 || m.Layers[0].Digest != d || m.Layers[0].Size != 10 || m.Layers[0].MediaType != "a/b" {
		t.Errorf("described as %+v", m.Layers)
	}
	if _, got := get(t, r.URL()+"/v2/x/there/blobs/"+d.String(), ""); string(got) != content {
		t.Errorf("the blob: %q", got)
	}
}
