package registry

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestOrigin: it changes with whatever may send other bytes, and has nothing of a tag.
func TestOrigin(t *testing.T) {
	conf := filepath.Join(t.TempDir(), "registries.conf")
	mirror := "[[registry]]\nlocation = \"m.example\"\n[[registry.mirror]]\nlocation = \"near.example\"\ninsecure = true\n"
	if err := os.WriteFile(conf, []byte(mirror), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		ref, want string
		o         Options
	}{
		{"r.example/x:v1", "r.example/x (tls)", Options{}},
		{"r.example/x@sha256:" + strings.Repeat("0", 64), "r.example/x (tls)", Options{}},
		{"r.example/y:v1", "r.example/y (tls)", Options{}},
		{"r.example/x:v1", "r.example/x (http)", Options{PlainHTTP: true}},
		{"r.example/x:v1", "r.example/x (tls, unchecked)", Options{SkipTLSVerify: true}},
		{"m.example/x:v1", "near.example/x (insecure), m.example/x (tls)", Options{}},
	} {
		c.o.RegistriesConf = conf
		client, err := New(c.o)
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		ref, err := ParseReference(c.ref)
		if err != nil {
			t.Fatal(err)
		}
		b, err := client.Blob(ref, ocispec.Descriptor{Digest: digest.FromString("b"), Size: 1})
		if err != nil {
			t.Fatal(err)
		}
		if got := b.Origin(); got != c.want {
			t.Errorf("%s: %q, want %q", c.ref, got, c.want)
		}
	}
}
