package registry

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"go.podman.io/image/v5/pkg/tlsclientconfig"
)

// DefaultCertDirs are where containers-certs.d(5) has the certificates for
// registries: a directory HOST[:PORT] each, with CA certificates (*.crt) and
// pairs of client certificate and key (*.cert, *.key). The user's come first.
func DefaultCertDirs() []string {
	dirs := []string{"/etc/containers/certs.d", "/etc/docker/certs.d"}
	if home := os.Getenv("HOME"); filepath.IsAbs(home) {
		dirs = slices.Insert(dirs, 0, filepath.Join(home, ".config", "containers", "certs.d"))
	}
	return dirs
}

// A hostTransport gives each host that has certificates of its own a transport
// of its own, since a client certificate is nobody else's business. All other
// hosts share base.
type hostTransport struct {
	base *http.Transport
	dirs []string

	mu       sync.Mutex
	hosts    map[string]*http.Transport // base where nothing is said of the host
	insecure map[string]bool            // hosts whose certificates do not matter
}

// trustAny has to come before the first request to host.
func (t *hostTransport) trustAny(host string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.insecure[host] {
		t.insecure[host] = true
		delete(t.hosts, host)
	}
}

func (t *hostTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	next, err := t.forHost(req.URL.Host)
	if err != nil {
		return nil, err
	}
	return next.RoundTrip(req)
}

func (t *hostTransport) forHost(host string) (*http.Transport, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if next := t.hosts[host]; next != nil {
		return next, nil
	}
	next := t.base
	dir, err := certDir(t.dirs, host)
	if err != nil {
		return nil, err
	}
	if dir != "" || t.insecure[host] {
		next = t.base.Clone()
		next.TLSClientConfig.InsecureSkipVerify = next.TLSClientConfig.InsecureSkipVerify || t.insecure[host]
	}
	if dir != "" {
		// Clone shares the pool of authorities, which is about to grow.
		if pool := next.TLSClientConfig.RootCAs; pool != nil {
			next.TLSClientConfig.RootCAs = pool.Clone()
		}
		if err := tlsclientconfig.SetupCertificates(dir, next.TLSClientConfig); err != nil {
			return nil, &certError{fmt.Errorf("certificates for %s: %w", host, err)}
		}
	}
	t.hosts[host] = next
	return next, nil
}

// certDir finds the first directory for host. A host is a name, never a path:
// where a redirect leads is a server's choice.
func certDir(dirs []string, host string) (string, error) {
	if host == "" || strings.ContainsAny(host, "/\x00") || strings.HasPrefix(host, ".") {
		return "", nil
	}
	for _, d := range dirs {
		dir := filepath.Join(d, host)
		_, err := os.Stat(dir)
		switch {
		case err == nil:
			return dir, nil
		case errors.Is(err, os.ErrNotExist), errors.Is(err, os.ErrPermission):
		default:
			return "", &certError{fmt.Errorf("certificates for %s: %w", host, err)}
		}
	}
	return "", nil
}

func (t *hostTransport) closeIdle() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.base.CloseIdleConnections()
	for _, next := range t.hosts {
		next.CloseIdleConnections()
	}
}

// A certError is a configuration that cannot be used; no new try mends it.
type certError struct{ error }

func (e *certError) Unwrap() error { return e.error }

// LoadCAs returns the system's certificate authorities and those in file, which
// holds certificates in PEM.
func LoadCAs(file string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("certificate authorities: %w", err)
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		return nil, fmt.Errorf("certificate authorities of the system: %w", err)
	}
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("certificate authorities: %s: no certificate in PEM", file)
	}
	return pool, nil
}

func tlsConfig(o Options) *tls.Config {
	return &tls.Config{RootCAs: o.RootCAs, InsecureSkipVerify: o.SkipTLSVerify, MinVersion: tls.VersionTLS12}
}
