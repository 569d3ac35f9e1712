package registry

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
)

// A memory keeps in maps.
type memory struct {
	documents map[digest.Digest][]byte
	tags      map[string]digest.Digest
}

func (m *memory) Get(_ context.Context, d digest.Digest) ([]byte, error) {
	raw, ok := m.documents[d]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return raw, nil
}

func (m *memory) Put(_ context.Context, d digest.Digest, raw []byte) { m.documents[d] = raw }

var errNever = errors.New("never mounted")

func (m *memory) Last(tag string) (digest.Digest, error) {
	d, ok := m.tags[tag]
	if !ok {
		return "", errNever
	}
	return d, nil
}

func (m *memory) Led(tag string, d digest.Digest) { m.tags[tag] = d }

var errOfflineTest = errors.New("offline")

// TestKept: a tag is asked for each time, a digest once; offline nothing is, and the same image is found.
func TestKept(t *testing.T) {
	r, err := fakeregistry.New(fakeregistry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	image := func(arch, text string) ocipush.Image {
		return ocipush.Image{Layers: []ocipush.Layer{ocipush.Bytes(MediaTypeErofs, []byte(text))},
			Platform: ocispec.Platform{OS: "linux", Architecture: arch}}
	}
	plain, err := ocipush.PushImage(t.Context(), r.URL(), "x:plain", image("arm64", "plain"), ocipush.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ocipush.PushIndex(t.Context(), r.URL(), "x:index", []ocipush.Image{image("amd64", "a"), image("arm64", "b")}, ocipush.Options{}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		ref           string
		platform      string
		first, second int // GETs of manifests
		config        int // of blobs, the first time
	}{
		{"x:plain", "", 1, 1, 0},
		{"x:plain", "linux/arm64", 1, 1, 1},
		{"x:index", "linux/amd64", 2, 1, 0},
		{"x:index", "linux/arm64", 2, 1, 0},
		{"x@" + plain.String(), "linux/arm64", 1, 0, 1},
	} {
		t.Run(c.ref+" "+c.platform, func(t *testing.T) {
			client, err := New(Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			ref, err := ParseReference(r.Addr() + "/" + c.ref)
			if err != nil {
				t.Fatal(err)
			}
			m := &memory{map[digest.Digest][]byte{}, map[string]digest.Digest{}}
			resolve := func(offline error) (*Image, error) {
				r.ResetStats()
				return ResolveIn(t.Context(), client.Repository(ref).Keep(Keep{Documents: m, Tags: m, Offline: offline}), "", Selector{Platform: c.platform})
			}
			if _, err := resolve(errOfflineTest); !errors.Is(err, errNever) && !errors.Is(err, errOfflineTest) {
				t.Errorf("before anything is kept: %v", err)
			}
			if n := r.Stats().Requests; n != 0 {
				t.Errorf("offline: %d requests", n)
			}
			first, err := resolve(nil)
			if err != nil {
				t.Fatal(err)
			}
			if st := r.Stats(); st.ManifestGETs != c.first || st.BlobGETs != c.config {
				t.Errorf("first: %+v", st)
			}
			second, err := resolve(nil)
			if err != nil {
				t.Fatal(err)
			}
			if st := r.Stats(); st.ManifestGETs != c.second || st.BlobGETs != 0 {
				t.Errorf("second: %+v", st)
			}
			off, err := resolve(errOfflineTest)
			if err != nil {
				t.Fatal(err)
			}
			if n := r.Stats().Requests; n != 0 {
				t.Errorf("offline: %d requests", n)
			}
			for _, im := range []*Image{second, off} {
				if im.Digest != first.Digest || im.IndexDigest != first.IndexDigest || im.Reference != first.Reference ||
					im.MediaType != first.MediaType || im.Platform != first.Platform || len(im.Layers) != len(first.Layers) {
					t.Errorf("%+v, want %+v", im, first)
				}
			}
			for d, raw := range maps.Clone(m.documents) {
				bad := append([]byte{}, raw...)
				bad[len(bad)/2] ^= 4
				m.documents[d] = bad
				if _, err := resolve(errOfflineTest); !errors.Is(err, errOfflineTest) || !strings.Contains(err.Error(), string(d)) {
					t.Errorf("%s changed, offline: %v", d, err)
				}
				delete(m.documents, d)
				if _, err := resolve(errOfflineTest); !errors.Is(err, errOfflineTest) {
					t.Errorf("%s gone, offline: %v", d, err)
				}
				m.documents[d] = bad
				if im, err := resolve(nil); err != nil || im.Digest != first.Digest {
					t.Errorf("%s changed: %v", d, err)
				}
				if string(m.documents[d]) != string(raw) {
					t.Errorf("%s is not kept anew", d)
				}
			}
		})
	}
}

// TestKeptMovedTag: online the new image is found, offline the one that was found last.
func TestKeptMovedTag(t *testing.T) {
	r, err := fakeregistry.New(fakeregistry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	client, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ref, err := ParseReference(r.Addr() + "/x:v1")
	if err != nil {
		t.Fatal(err)
	}
	m := &memory{map[digest.Digest][]byte{}, map[string]digest.Digest{}}
	found := func(offline error) digest.Digest {
		t.Helper()
		im, err := ResolveIn(t.Context(), client.Repository(ref).Keep(Keep{m, m, offline}), "", Selector{})
		if err != nil {
			t.Fatal(err)
		}
		return im.Digest
	}
	push := func(text string) digest.Digest {
		t.Helper()
		d, err := ocipush.Push(t.Context(), r.URL(), "x:v1", []ocipush.Layer{ocipush.Bytes(MediaTypeErofs, []byte(text))}, ocipush.Options{})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	old := push("old")
	if got := found(nil); got != old {
		t.Errorf("found %s, want %s", got, old)
	}
	moved := push("new")
	for _, c := range []struct {
		offline error
		want    digest.Digest
	}{{errOfflineTest, old}, {nil, moved}, {errOfflineTest, moved}} {
		if got := found(c.offline); got != c.want {
			t.Errorf("offline %v: found %s, want %s", c.offline, got, c.want)
		}
	}
}
