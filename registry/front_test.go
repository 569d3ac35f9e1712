package registry_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
	"github.com/erofs-oci/erofs-oci/tests/dockerregistry"
	"github.com/erofs-oci/erofs-oci/tests/nginx"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
)

// An authority signs certificates.
type authority struct {
	t    *testing.T
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t}
	a.key, a.cert = a.issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: "private"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	})
	return a
}

// issue makes a certificate, which is the authority's own where there is none yet.
func (a *authority) issue(template *x509.Certificate) (*ecdsa.PrivateKey, *x509.Certificate) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := template, key
	if a.cert != nil {
		parent, signer = a.cert, a.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return key, cert
}

// pem gives certificate and key as they stand in files.
func (a *authority) pem(key *ecdsa.PrivateKey, cert *x509.Certificate) (certPEM, keyPEM []byte) {
	a.t.Helper()
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
}

// A front is the distribution project's registry, with an image, behind nginx, which
// speaks TLS with a certificate of a private authority and wants one of the client.
type front struct {
	addr  string // of nginx
	certs string // a certs.d with all that a client needs
	data  []byte
}

// newFront configures the registry with auth; authorization is what may push.
func newFront(t *testing.T, auth, authorization string) *front {
	t.Helper()
	f := &front{certs: t.TempDir(), data: noise(5<<20 + 3)}
	backend := dockerregistry.StartWith(t, dockerregistry.Options{Config: auth})
	transport := http.DefaultTransport.(*http.Transport).Clone()
	t.Cleanup(transport.CloseIdleConnections)
	push := ocipush.Options{Client: &http.Client{Transport: transport}, Authorization: authorization}
	if _, err := ocipush.Push(t.Context(), "http://"+backend.Addr, "team/x:v1", []ocipush.Layer{ocipush.Bytes(registry.MediaTypeErofs, f.data)}, push); err != nil {
		t.Fatal(err)
	}
	ca := newAuthority(t)
	cert, key := ca.pem(ca.issue(&x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}))
	own, _ := ca.pem(ca.key, ca.cert)
	f.addr = nginx.Start(t, nginx.Options{Upstream: backend.Addr, Certificate: cert, Key: key, ClientCA: own})

	dir := filepath.Join(f.certs, f.addr)
	cert, key = ca.pem(ca.issue(&x509.Certificate{Subject: pkix.Name{CommonName: "node"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string][]byte{"ca.crt": own, "client.cert": cert, "client.key": key} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// read resolves the image and reads all of its layer through a cache.
func (f *front) read(t *testing.T, o registry.Options) error {
	t.Helper()
	o.ErrorWait, o.ResolveWait = registry.NoWait, registry.NoWait
	c := newClient(t, o)
	im, err := c.Resolve(t.Context(), parse(t, f.addr+"/team/x:v1"), registry.Selector{})
	if err != nil {
		return err
	}
	b, err := c.Blob(im.Reference, im.Layers[0].Descriptor)
	if err != nil {
		return err
	}
	cache, err := blobcache.New(t.TempDir(), blobcache.Options{})
	if err != nil {
		return err
	}
	defer cache.Close()
	blob, err := cache.Open(b.Digest().String(), b.Size(), b, blobcache.OpenOptions{})
	if err != nil {
		return err
	}
	got := make([]byte, b.Size())
	for off := 0; off < len(got); off += 100_000 {
		if err := blob.ReadAt(context.Background(), got[off:min(off+100_000, len(got))], int64(off)); err != nil {
			return err
		}
	}
	if !bytes.Equal(got, f.data) {
		t.Error("not the blob's bytes")
	}
	return nil
}

// refusals reads with each thing missing that the front wants.
func (f *front) refusals(t *testing.T) {
	t.Helper()
	onlyCA := t.TempDir()
	if err := os.CopyFS(onlyCA, os.DirFS(f.certs)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"client.cert", "client.key"} {
		if err := os.Remove(filepath.Join(onlyCA, f.addr, name)); err != nil {
			t.Fatal(err)
		}
	}
	login := registry.Options{Username: user, Password: canary}
	for _, tc := range []struct {
		name    string
		certs   string
		options registry.Options
		says    string
	}{
		{"the authority", "", login, "certificate signed by unknown authority"},
		{"the client's certificate", onlyCA, login, ": 400 "},
		{"credentials", f.certs, registry.Options{}, "no credentials for " + f.addr},
		{"the right password", f.certs, registry.Options{Username: user, Password: canary + "x"}, "were refused"},
	} {
		if tc.certs != "" {
			tc.options.CertDirs = []string{tc.certs}
		}
		err := f.read(t, tc.options)
		if err == nil || !strings.Contains(err.Error(), tc.says) || strings.Contains(err.Error(), canary) {
			t.Errorf("without %s: %v does not say %q", tc.name, err, tc.says)
		}
	}
}

// passwordHash is bcrypt of canary, as htpasswd -B has it.
const passwordHash = "$2b$05$rVTP4925Pz6WlosknOo3MOrCru/xGTZqoxhFpGEIDdQp7xoNPbZIu"

// TestRealRegistryWithPasswords logs in to the distribution project's registry by
// Basic, behind nginx.
func TestRealRegistryWithPasswords(t *testing.T) {
	passwords := filepath.Join(t.TempDir(), "htpasswd")
	if err := os.WriteFile(passwords, []byte(user+":"+passwordHash+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	basic := "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+canary))
	f := newFront(t, fmt.Sprintf("auth:\n  htpasswd:\n    realm: test\n    path: %s\n", passwords), basic)
	login := loginFile(t, [3]string{f.addr, user, canary})
	if err := f.read(t, registry.Options{AuthFile: login, CertDirs: []string{f.certs}}); err != nil {
		t.Error(err)
	}
	f.refusals(t)
}

// A tokenServer is a token service that the distribution project's registry trusts.
type tokenServer struct {
	t      *testing.T
	key    *ecdsa.PrivateKey
	chain  []string // x5c
	issued atomic.Int32
}

// token is a JSON Web Token (RFC 7519) for one repository, by ES256.
func (s *tokenServer) token(access ...map[string]any) string {
	now := time.Now()
	part := func(v any) string {
		b, err := json.Marshal(v)
		if err != nil {
			s.t.Error(err)
		}
		return base64.RawURLEncoding.EncodeToString(b)
	}
	text := part(map[string]any{"typ": "JWT", "alg": "ES256", "x5c": s.chain}) + "." + part(map[string]any{
		"iss": "issuer", "aud": "registry", "sub": user, "jti": fmt.Sprint(s.issued.Add(1)), "access": access,
		"iat": now.Unix(), "nbf": now.Add(-time.Minute).Unix(), "exp": now.Add(time.Minute).Unix(),
	})
	hash := sha256.Sum256([]byte(text))
	x, y, err := ecdsa.Sign(rand.Reader, s.key, hash[:])
	if err != nil {
		s.t.Error(err)
		return ""
	}
	var signature [64]byte
	x.FillBytes(signature[:32])
	y.FillBytes(signature[32:])
	return text + "." + base64.RawURLEncoding.EncodeToString(signature[:])
}

func (s *tokenServer) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	name, password, ok := req.BasicAuth()
	switch {
	case ok && (name != user || password != canary):
		w.WriteHeader(http.StatusUnauthorized)
		return
	case !ok: // to nobody, a token that opens nothing
		_ = json.NewEncoder(w).Encode(map[string]any{"token": s.token(), "expires_in": 60})
		return
	}
	kind, rest, _ := strings.Cut(req.FormValue("scope"), ":")
	repo, actions, _ := strings.Cut(rest, ":")
	_ = json.NewEncoder(w).Encode(map[string]any{ // the client's loss
		"token": s.token(map[string]any{"type": kind, "name": repo, "actions": strings.Split(actions, ",")}), "expires_in": 60,
	})
}

// TestRealRegistryWithTokens gets tokens for the distribution project's registry,
// behind nginx.
func TestRealRegistryWithTokens(t *testing.T) {
	ca := newAuthority(t)
	s := &tokenServer{t: t, key: ca.key, chain: []string{base64.StdEncoding.EncodeToString(ca.cert.Raw)}}
	service := httptest.NewTLSServer(s)
	t.Cleanup(service.Close)
	bundle := filepath.Join(t.TempDir(), "bundle.pem")
	own, _ := ca.pem(ca.key, ca.cert)
	if err := os.WriteFile(bundle, own, 0o600); err != nil {
		t.Fatal(err)
	}
	auth := fmt.Sprintf("auth:\n  token:\n    realm: %s/auth\n    service: registry\n    issuer: issuer\n    rootcertbundle: %s\n", service.URL, bundle)
	f := newFront(t, auth, "Bearer "+s.token(map[string]any{"type": "repository", "name": "team/x", "actions": []string{"pull", "push"}}))
	// The token service has a certificate of its own.
	writePEM(t, filepath.Join(f.certs, host(service), "ca.crt"), "CERTIFICATE", service.Certificate().Raw)
	before := s.issued.Load()
	if err := f.read(t, registry.Options{Username: user, Password: canary, CertDirs: []string{f.certs}}); err != nil {
		t.Error(err)
	}
	if n := s.issued.Load() - before; n != 1 {
		t.Errorf("%d tokens", n)
	}
	f.refusals(t)
}
