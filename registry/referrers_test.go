package registry_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
)

// signature is a manifest that refers to d.
func signature(d digest.Digest, artifactType string) []byte {
	return fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"artifactType":%q,"config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":%q,"size":2},"layers":[],"subject":{"mediaType":%q,"digest":%q,"size":1}}`,
		ociManifest, artifactType, sum([]byte("{}")), ociManifest, d)
}

func kinds(list []ocispec.Descriptor) string {
	var s []string
	for _, d := range list {
		s = append(s, d.ArtifactType+"@"+strings.TrimPrefix(d.Annotations[ocispec.AnnotationRefName], "sha256-"))
	}
	return strings.Join(s, " ")
}

func TestReferrers(t *testing.T) {
	image := []byte(`{"schemaVersion":2,"manifests":[]}`)
	d := sum(image)
	hex := d.Encoded()
	put := func(t *testing.T, repo *registry.Repository, target string, raw []byte) {
		t.Helper()
		mediaType := ociManifest
		if strings.Contains(string(raw), `"manifests"`) {
			mediaType = ociIndex
		}
		if _, err := repo.PutManifest(t.Context(), target, mediaType, raw); err != nil {
			t.Fatal(err)
		}
	}
	index := func(artifactTypes ...string) []byte {
		var list []string
		for _, a := range artifactTypes {
			list = append(list, fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":1,"artifactType":%q}`, ociManifest, sum([]byte(a)), a))
		}
		return fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"manifests":[%s]}`, ociIndex, strings.Join(list, ","))
	}
	page := func(next string, raw []byte) fakeregistry.Fault {
		h := http.Header{"Content-Type": {ociIndex}}
		if next != "" {
			h["Link"] = []string{fmt.Sprintf(`<%s>; rel="next"`, next)}
		}
		return answer(200, h, string(raw))
	}
	for _, tc := range []struct {
		name  string
		api   bool
		put   map[string][]byte
		fault func(*http.Request) *fakeregistry.Fault
		want  string
		gets  int // of manifests
		err   string
	}{
		{"none, no API", false, nil, nil, "", 4, ""},
		{"none", true, nil, nil, "", 3, ""},
		{"by the API", true, map[string][]byte{"": signature(d, "a/sig"), "other": signature(sum(nil), "a/other")}, nil, "a/sig@", 3, ""},
		{"by the tag", false, map[string][]byte{"sha256-" + hex: index("a/sig", "a/sbom")}, nil, "a/sig@ a/sbom@", 4, ""},
		{"a manifest by the tag", false, map[string][]byte{"sha256-" + hex: signature(d, "a/sig")}, nil, "a/sig@" + hex, 4, ""},
		{"cosign", true, map[string][]byte{"sha256-" + hex + ".sig": signature(sum(nil), "a/b"), "sha256-" + hex + ".att": index()}, nil, "a/b@" + hex + ".sig @" + hex + ".att", 3, ""},
		{"something else answers", false, nil, func(q *http.Request) *fakeregistry.Fault {
			f := answer(200, http.Header{"Content-Type": {"text/html"}}, "<html>")
			if strings.Contains(q.URL.Path, "/referrers/") {
				return &f
			}
			return nil
		}, "", 4, ""},
		{"page by page", true, nil, func(q *http.Request) *fakeregistry.Fault {
			f := page("?n=2", index("a/1"))
			switch {
			case !strings.Contains(q.URL.Path, "/referrers/"):
				return nil
			case q.URL.RawQuery == "n=2":
				f = page("", index("a/2", "a/3"))
			}
			return &f
		}, "a/1@ a/2@ a/3@", 3, ""},
		{"page on page", true, nil, func(q *http.Request) *fakeregistry.Fault {
			f := page("?n=2", index("a/1"))
			return &f
		}, "", 0, "more than 32 pages"},
		{"no digest", true, nil, func(q *http.Request) *fakeregistry.Fault {
			f := page("", []byte(`{"manifests":[{"digest":"sha256:zz"}]}`))
			if strings.Contains(q.URL.Path, "/referrers/") {
				return &f
			}
			return nil
		}, "", 3, "entry 0: digest"},
		{"forbidden", true, nil, func(*http.Request) *fakeregistry.Fault { return &fakeregistry.Fault{Status: 403} }, "", 0, "403 Forbidden"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := startRegistry(t, fakeregistry.Options{Referrers: tc.api})
			c := newClient(t, registry.Options{})
			ref := parse(t, r.Addr()+"/x:v1")
			put(t, c.Repository(ref), "", image)
			for target, raw := range tc.put {
				put(t, c.Repository(ref), target, raw)
			}
			r.ResetStats()
			r.SetFault(tc.fault)
			list, err := c.Referrers(t.Context(), ref, d)
			if got := kinds(list); got != tc.want || (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
				t.Errorf("%q, %v; want %q, %q", got, err, tc.want, tc.err)
			}
			if n := r.Stats().ManifestGETs; n != tc.gets {
				t.Errorf("%d GETs of manifests, want %d", n, tc.gets)
			}
		})
	}
	if _, err := newClient(t, registry.Options{}).Referrers(t.Context(), parse(t, "127.0.0.1:1/x:v1"), "sha256:1"); err == nil || !strings.Contains(err.Error(), "digest") {
		t.Errorf("%v", err)
	}
}
