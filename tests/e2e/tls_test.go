package e2e

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
	"github.com/erofs-oci/erofs-oci/tests/require"
)

// privateRegistry speaks TLS with a certificate that no system trusts.
func privateRegistry(t *testing.T) *fakeregistry.Registry {
	t.Helper()
	r, err := fakeregistry.New(fakeregistry.Options{TLS: true})
	must(t, err)
	t.Cleanup(func() { r.Close() })
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig.RootCAs = r.RootCAs()
	t.Cleanup(transport.CloseIdleConnections)
	layer := ocipush.Bytes(registry.MediaTypeErofs, corpus.Get(t, "plain").Data)
	_, err = ocipush.Push(t.Context(), r.URL(), "x:v1", []ocipush.Layer{layer}, ocipush.Options{Client: &http.Client{Transport: transport}})
	must(t, err)
	return r
}

// TestPrivateAuthority mounts from a registry with a certificate of its own.
func TestPrivateAuthority(t *testing.T) {
	require.Has(t, "root", "fuse")
	r := privateRegistry(t)
	ref := r.Addr() + "/x:v1"
	for _, tc := range []struct {
		name  string
		flags func(s *session) []string
		want  string // what is said; "" for a mount
	}{
		{"unknown", func(*session) []string { return nil }, "certificate signed by unknown authority"},
		{"not verified", func(*session) []string { return []string{"--tls-verify=false"} }, ""},
		{"--tls-ca", func(s *session) []string {
			must(t, os.WriteFile(filepath.Join(s.dir, "ca.pem"), r.CertificatePEM(), 0o600))
			return []string{"--tls-ca=ca.pem"} // the background server has another working directory
		}, ""},
		{"--tls-ca that is not there", func(*session) []string { return []string{"--tls-ca=nothing.pem"} }, "certificate authorities: open "},
		{"certs.d", func(s *session) []string {
			dir := filepath.Join(s.dir, "home", ".config", "containers", "certs.d", r.Addr())
			must(t, os.MkdirAll(dir, 0o700))
			must(t, os.WriteFile(filepath.Join(dir, "ca.crt"), r.CertificatePEM(), 0o600))
			return nil
		}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newSession(t)
			flags := tc.flags(s)
			if tc.want == "" {
				s.must("umount", s.mount(ref, flags...))
				return
			}
			got := s.run(binary, append(append([]string{"mount"}, flags...), ref, s.target())...)
			if got.code != 1 || !strings.Contains(got.stderr, tc.want) {
				t.Errorf("exit code %d, said %q", got.code, got.stderr)
			}
		})
	}
}

// TestMirrorOfTheHost mounts by a mirror that the user's registries.conf names;
// the registry itself is not there.
func TestMirrorOfTheHost(t *testing.T) {
	im, s := served(t)
	conf := filepath.Join(s.dir, "home", ".config", "containers")
	must(t, os.MkdirAll(conf, 0o700))
	text := fmt.Sprintf("[[registry]]\nlocation = \"registry.invalid\"\n[[registry.mirror]]\nlocation = %q\n", im.Addr())
	must(t, os.WriteFile(filepath.Join(conf, "registries.conf"), []byte(text), 0o600))
	dir := s.mount("registry.invalid/net/image:v1")
	got, err := os.ReadFile(filepath.Join(dir, deepFile))
	if err != nil || string(got) != string(content(deepFile, deepSize)) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	s.must("umount", dir)
}
