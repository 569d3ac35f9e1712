package registry_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// alone keeps the login files and the environment of this machine out of a test.
func alone(t *testing.T) {
	t.Helper()
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("XDG_CONFIG_HOME", filepath.Join(home, "config"))
	t.Setenv("XDG_RUNTIME_DIR", home)
	t.Setenv("DOCKER_CONFIG", filepath.Join(home, "docker"))
	for _, name := range []string{"REGISTRY_AUTH_FILE", "EROFS_OCI_USERNAME", "EROFS_OCI_PASSWORD"} {
		t.Setenv(name, "")
	}
}

func startRegistry(t *testing.T, o fakeregistry.Options) *fakeregistry.Registry {
	t.Helper()
	r, err := fakeregistry.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func newClient(t *testing.T, o registry.Options) *registry.Client {
	t.Helper()
	alone(t)
	return openClient(t, o)
}

// openClient is newClient for a test that runs beside others, and whose client has
// no use for login files.
func openClient(t *testing.T, o registry.Options) *registry.Client {
	t.Helper()
	c, err := registry.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// pushOptions are those that r wants, with connections that end with the test.
func pushOptions(t *testing.T, r *fakeregistry.Registry) ocipush.Options {
	t.Helper()
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig.RootCAs = r.RootCAs()
	t.Cleanup(transport.CloseIdleConnections)
	return ocipush.Options{
		Client:        &http.Client{Transport: transport},
		Authorization: "Bearer " + r.IssueToken(),
	}
}

// noise is n bytes that are the same each time and never the same twice.
func noise(n int) []byte {
	b := make([]byte, n)
	if _, err := rand.NewChaCha8([32]byte{1}).Read(b); err != nil {
		panic(err)
	}
	return b
}

func parse(t *testing.T, s string) registry.Reference {
	t.Helper()
	ref, err := registry.ParseReference(s)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

// oneLayer is the one layer that sel means, which may be in no manifest.
func oneLayer(t *testing.T, c *registry.Client, im *registry.Image, sel registry.Selector) (registry.Layer, error) {
	t.Helper()
	chosen, err := c.ErofsLayers(t.Context(), im, sel)
	if err != nil {
		return registry.Layer{}, err
	}
	return im.OneLayer(chosen)
}

// pushBlob puts data into repository x of r and forgets what that took.
func pushBlob(t *testing.T, r *fakeregistry.Registry, data []byte, o ocipush.Options) ocispec.Descriptor {
	t.Helper()
	d, err := ocipush.PushBlob(t.Context(), r.URL(), "x", ocipush.Bytes("", data), o)
	if err != nil {
		t.Fatal(err)
	}
	r.ResetStats()
	return ocispec.Descriptor{MediaType: registry.MediaTypeErofs, Digest: d, Size: int64(len(data))}
}

// blobOf pushes data to r and opens it with a client of these options.
func blobOf(t *testing.T, r *fakeregistry.Registry, data []byte, o registry.Options) *registry.Blob {
	t.Helper()
	desc := pushBlob(t, r, data, pushOptions(t, r))
	b, err := newClient(t, o).Blob(parse(t, r.Addr()+"/x:v1"), desc)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// fetch reads a range to its end.
func fetch(ctx context.Context, b *registry.Blob, off, n int64) ([]byte, int64, error) {
	body, start, total, err := b.Fetch(ctx, off, n)
	if err != nil {
		return nil, 0, err
	}
	defer body.Close()
	if total != b.Size() {
		return nil, 0, fmt.Errorf("total is %d, the blob has %d bytes", total, b.Size())
	}
	got, err := io.ReadAll(body)
	return got, start, err
}

// blobGETs are the GETs of blobs that r has seen, but for their path.
func blobGETs(r *fakeregistry.Registry) []fakeregistry.Request {
	var list []fakeregistry.Request
	for _, q := range r.Requests() {
		if q.Method == http.MethodGet && strings.Contains(q.Path, "/blobs/") {
			list = append(list, q)
		}
	}
	return list
}

func ranges(list []fakeregistry.Request) string {
	var s []string
	for _, q := range list {
		s = append(s, q.Range)
	}
	return strings.Join(s, " ")
}

// onBlob is a fault for the nth GET of a blob, counted from 1; 0 is for each.
func onBlob(nth int, f fakeregistry.Fault) func(*http.Request) *fakeregistry.Fault {
	var mu sync.Mutex
	seen := 0
	return func(r *http.Request) *fakeregistry.Fault {
		if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/blobs/") {
			return nil
		}
		mu.Lock()
		defer mu.Unlock()
		seen++
		if nth != 0 && seen != nth {
			return nil
		}
		return &f
	}
}

// answer is a fault that answers with just this.
func answer(status int, header http.Header, body string) fakeregistry.Fault {
	return fakeregistry.Fault{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		for name, values := range header {
			w.Header()[name] = values
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	})}
}

// A watchedLog is a log that tells when something is written to it.
type watchedLog struct {
	mu    sync.Mutex
	text  bytes.Buffer
	lines chan struct{}
}

func newWatchedLog() *watchedLog { return &watchedLog{lines: make(chan struct{}, 1)} }

func (l *watchedLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case l.lines <- struct{}{}:
	default:
	}
	return l.text.Write(p)
}

func (l *watchedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *watchedLog) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// soon fails the test if ch stays silent for longer than anything here may take.
func soon(t *testing.T, ch <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-ch:
	case <-time.After(20 * time.Second):
		t.Fatalf("no %s within 20 seconds", what)
	}
}

func sum(b []byte) digest.Digest { return digest.FromBytes(b) }
