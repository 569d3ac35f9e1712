package registry_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/registry"
)

// tlsServer answers by TLS with a certificate that no system trusts, and asks for
// a client's.
func tlsServer(t *testing.T, ask tls.ClientAuthType, h http.HandlerFunc) *httptest.Server {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.TLS = &tls.Config{ClientAuth: ask}
	s.Config.ErrorLog = log.New(io.Discard, "", 0) // refused handshakes are what is tested
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

func host(s *httptest.Server) string { return s.Listener.Addr().String() }

// certsFor makes dir/HOST with the server's certificate as an authority.
func certsFor(t *testing.T, dir string, s *httptest.Server) string {
	t.Helper()
	sub := filepath.Join(dir, host(s))
	writePEM(t, filepath.Join(sub, "ca.crt"), "CERTIFICATE", s.Certificate().Raw)
	return sub
}

func writePEM(t *testing.T, path, kind string, der []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

// clientPair writes a certificate of its own signature and its key.
func clientPair(t *testing.T, dir string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	writePEM(t, filepath.Join(dir, "client.cert"), "CERTIFICATE", cert)
	writePEM(t, filepath.Join(dir, "client.key"), "EC PRIVATE KEY", der)
}

// TestCertDirs reads a blob through a registry that wants a client's certificate
// and redirects to a host that must not see it.
func TestCertDirs(t *testing.T) {
	data := noise(1000)
	shown := make(chan int, 1)
	storage := tlsServer(t, tls.RequestClientCert, func(w http.ResponseWriter, req *http.Request) {
		shown <- len(req.TLS.PeerCertificates)
		http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(data))
	})
	front := tlsServer(t, tls.RequireAnyClientCert, func(w http.ResponseWriter, req *http.Request) {
		http.Redirect(w, req, storage.URL+"/blob", http.StatusTemporaryRedirect)
	})
	dir := t.TempDir()
	clientPair(t, certsFor(t, dir, front))
	certsFor(t, dir, storage)
	c := newClient(t, registry.Options{CertDirs: []string{filepath.Join(dir, "nothing"), dir}, ErrorWait: registry.NoWait})
	b, err := c.Blob(parse(t, host(front)+"/x:v1"), ocispec.Descriptor{Digest: sum(data), Size: int64(len(data))})
	if err != nil {
		t.Fatal(err)
	}
	got, _, err := fetch(t.Context(), b, 100, 300)
	if err != nil || !bytes.Equal(got, data[100:400]) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	if n := <-shown; n != 0 {
		t.Errorf("the host that was redirected to saw %d certificates", n)
	}
}

func TestCertificatesMissing(t *testing.T) {
	var asked atomic.Int32
	s := tlsServer(t, tls.NoClientCert, func(http.ResponseWriter, *http.Request) { asked.Add(1) })
	good := t.TempDir()
	certsFor(t, good, s)
	half := t.TempDir()
	clientPair(t, filepath.Join(half, host(s)))
	if err := os.Remove(filepath.Join(half, host(s), "client.key")); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		o    registry.Options
		want string
	}{
		{"no authority", registry.Options{}, "certificate"},
		{"another host's authority", registry.Options{CertDirs: []string{filepath.Join(good, "sub")}}, "certificate"},
		{"half a pair", registry.Options{CertDirs: []string{half}}, "missing key client.key"},
	} {
		c := newClient(t, tc.o)
		begin := time.Now()
		_, err := c.Resolve(t.Context(), parse(t, host(s)+"/x:v1"), registry.Selector{})
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v does not say %q", tc.name, err, tc.want)
		}
		if waited := time.Since(begin); waited > registry.DefaultResolveWait/2 {
			t.Errorf("%s: tried again for %v what cannot get better", tc.name, waited)
		}
	}
	if n := asked.Load(); n != 0 {
		t.Errorf("%d requests got through", n)
	}
	for _, o := range []registry.Options{{CertDirs: []string{good}}, {SkipTLSVerify: true}, {RootCAs: loadCA(t, filepath.Join(good, host(s), "ca.crt"))}} {
		before := asked.Load()
		_, err := newClient(t, o).Resolve(t.Context(), parse(t, host(s)+"/x:v1"), registry.Selector{})
		if asked.Load() == before {
			t.Errorf("%+v: nothing arrived: %v", o, err)
		}
	}
}

func loadCA(t *testing.T, file string) *x509.CertPool {
	t.Helper()
	pool, err := registry.LoadCAs(file)
	if err != nil {
		t.Fatal(err)
	}
	return pool
}

func TestLoadCAs(t *testing.T) {
	if _, err := registry.LoadCAs(writeFile(t, "not PEM")); err == nil || !strings.Contains(err.Error(), "no certificate in PEM") {
		t.Error(err)
	}
	if _, err := registry.LoadCAs(filepath.Join(t.TempDir(), "nothing")); err == nil {
		t.Error("no error")
	}
}
