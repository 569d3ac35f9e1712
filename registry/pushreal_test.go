package registry_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/dockerregistry"
	"github.com/erofs-oci/erofs-oci/tests/require"
)

// A breaker is a network that breaks in the middle of a body, and counts them.
type breaker struct {
	next  http.RoundTripper
	after atomic.Int64 // bytes of the next body; 0: it does not break
	sent  atomic.Int64
	posts atomic.Int64
}

func newBreaker(t *testing.T) *breaker {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	t.Cleanup(transport.CloseIdleConnections)
	return &breaker{next: transport}
}

func (b *breaker) RoundTrip(q *http.Request) (*http.Response, error) {
	if q.Method == http.MethodPost {
		b.posts.Add(1)
	}
	if q.Body != nil && q.ContentLength > 0 && strings.Contains(q.URL.Path, "/uploads/") {
		q.GetBody = nil
		q.Body = &breakingBody{q.Body, b, b.after.Swap(0)}
	}
	return b.next.RoundTrip(q)
}

type breakingBody struct {
	io.ReadCloser
	b    *breaker
	left int64 // 0: all
}

func (b *breakingBody) Read(p []byte) (int, error) {
	if b.left < 0 {
		return 0, errors.New("broken by the test")
	}
	if b.left > 0 {
		p = p[:min(int64(len(p)), b.left)]
	}
	n, err := b.ReadCloser.Read(p)
	b.b.sent.Add(int64(n))
	if b.left > 0 {
		if b.left -= int64(n); b.left == 0 {
			b.left = -1
		}
	}
	return n, err
}

// The distribution project's registry: pushed to in every way.
func TestRealRegistryPush(t *testing.T) {
	addr := dockerregistry.Start(t)
	const size = 5<<20 + 17
	data := noise(size)
	for _, tc := range []struct {
		name  string
		repo  string
		put   registry.PutOptions
		after int64 // the first body breaks
		want  registry.PutResult
		posts int64
	}{
		{"monolithic", "a/mono", registry.PutOptions{}, 0, registry.PutResult{Sent: size}, 1},
		{"again", "a/mono", registry.PutOptions{ChunkSize: 1 << 20}, 0, registry.PutResult{Existed: true}, 0},
		{"chunked", "a/chunked", registry.PutOptions{ChunkSize: 1 << 20}, 0, registry.PutResult{Sent: size}, 1},
		{"mounted", "a/mounted", registry.PutOptions{MountFrom: []string{"a/none", "a/mono"}}, 0, registry.PutResult{Mounted: true}, 2},
		{"PUT breaks", "a/broken", registry.PutOptions{}, 2 << 20, registry.PutResult{}, 2},
		{"PATCH breaks", "a/broken-chunk", registry.PutOptions{ChunkSize: 4 << 20}, 2 << 20, registry.PutResult{}, 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			network := newBreaker(t)
			network.after.Store(tc.after)
			c := newClient(t, registry.Options{Transport: network})
			repo := c.Repository(parse(t, addr+"/"+tc.repo+":v1"))
			got, err := repo.PutBlob(t.Context(), describe(data), bytes.NewReader(data), tc.put)
			if err != nil {
				t.Fatal(err)
			}
			if tc.after > 0 {
				// This registry does not go on with an upload that broke: it begins anew.
				tc.want.Sent = tc.after + size
			}
			if got != tc.want || network.sent.Load() != tc.want.Sent || network.posts.Load() != tc.posts {
				t.Errorf("%+v, want %+v; %d bytes and %d POSTs", got, tc.want, network.sent.Load(), network.posts.Load())
			}
			if !bytes.Equal(readAll(t, repo, describe(data)), data) {
				t.Error("the registry has other bytes")
			}
		})
	}
	c := newClient(t, registry.Options{})
	repo := c.Repository(parse(t, addr+"/a/image:v1"))
	one, two := putImage(t, repo, "", noise(100)), putImage(t, repo, "", noise(200), "erofs")
	index := putIndex(t, repo, "v1", one, two)
	im, err := registry.ResolveIn(t.Context(), repo, "", registry.Selector{Platform: "linux/amd64"})
	if err != nil || im.IndexDigest != index.Digest || im.Digest != two.Digest {
		t.Errorf("%+v, %v", im, err)
	}
	if list, err := c.Referrers(t.Context(), im.Reference, im.Digest); err != nil || len(list) != 0 {
		t.Errorf("referrers: %v, %v", list, err)
	}
	_, err = repo.PutBlob(t.Context(), describe(data), bytes.NewReader(noise(size + 1)[1:]), registry.PutOptions{})
	var status *registry.StatusError
	if !errors.As(err, &status) || status.Code != http.StatusBadRequest || status.Codes[0] != "DIGEST_INVALID" {
		t.Errorf("other bytes: %v", err)
	}
}

func skopeo(t *testing.T, args ...string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	cmd := exec.CommandContext(ctx, "skopeo", append([]string{"--insecure-policy", "--tmpdir", t.TempDir()}, args...)...)
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("skopeo %s: %v\n%s", strings.Join(args, " "), err, said)
	}
}

// skopeo reads what we write, and we read what it writes, in each form: the layers
// have the same digests, and the same bytes.
func TestSkopeo(t *testing.T) {
	require.Has(t, "skopeo")
	dir := t.TempDir()
	ours := filepath.Join(dir, "ours")
	layer := tarOf(t, entry{name: "etc/", kind: '5'}, entry{name: "etc/x", data: noise(50_000)})
	want := putImage(t, createLayout(t, ours, ""), "v1", layer)
	check := func(t *testing.T, s registry.Store, digest bool) {
		t.Helper()
		im, err := registry.ResolveIn(t.Context(), s, "", registry.Selector{Platform: "linux/amd64"})
		if err != nil {
			t.Fatal(err)
		}
		if digest && im.Digest != want.Digest {
			t.Errorf("manifest %s, want %s", im.Digest, want.Digest)
		}
		if len(im.Layers) != 1 || im.Layers[0].Digest != sum(layer) || !bytes.Equal(readAll(t, s, im.Layers[0].Descriptor), layer) {
			t.Errorf("layers %+v", im.Layers)
		}
	}
	theirs := filepath.Join(dir, "theirs")
	skopeo(t, "copy", "--preserve-digests", "oci:"+ours+":v1", "oci:"+theirs+":v2")
	check(t, openLayout(t, theirs, "v2"), true)
	check(t, openLayout(t, theirs, ""), true)

	ociArchive := filepath.Join(dir, "oci.tar")
	skopeo(t, "copy", "--preserve-digests", "oci:"+ours+":v1", "oci-archive:"+ociArchive+":v3")
	check(t, openArchive(t, ociArchive, "v3"), true)

	dockerArchive := filepath.Join(dir, "docker.tar")
	skopeo(t, "copy", "oci:"+ours+":v1", "docker-archive:"+dockerArchive+":example/app:v4")
	for _, name := range []string{"", "example/app:v4", "docker.io/example/app:v4"} {
		check(t, openArchive(t, dockerArchive, name), false)
	}

	// And into a layout that skopeo has made, through a registry.
	addr := dockerregistry.Start(t)
	c := newClient(t, registry.Options{})
	repo := c.Repository(parse(t, addr+"/a/x:v1"))
	putIndex(t, repo, "v1", putImage(t, repo, "", layer), putImage(t, repo, "", noise(100), "erofs"))
	skopeo(t, "copy", "--preserve-digests", "--all", "--src-tls-verify=false", "docker://"+addr+"/a/x:v1", "oci:"+theirs+":all")
	l := openLayout(t, theirs, "all")
	if im, err := registry.ResolveIn(t.Context(), l, "", registry.Selector{Platform: "linux/amd64", Prefer: registry.PreferTar}); err != nil || im.Layers[0].Digest != sum(layer) {
		t.Errorf("%+v, %v", im, err)
	}
	moved := putImage(t, createLayout(t, theirs, ""), "v5", noise(10))
	skopeo(t, "copy", "--preserve-digests", "--dest-tls-verify=false", "oci:"+theirs+":v5", "docker://"+addr+"/a/x:v5")
	if doc, err := repo.Manifest(t.Context(), "v5"); err != nil || doc.Digest != moved.Digest {
		t.Errorf("%+v, %v", doc, err)
	}
	check(t, openLayout(t, theirs, "v2"), true)
	for name, desc := range map[string]ocispec.Descriptor{"v2": want, "v5": moved} {
		if doc, err := l.Manifest(t.Context(), name); err != nil || doc.Digest != desc.Digest {
			t.Errorf("%s: %+v, %v", name, doc, err)
		}
	}
}
