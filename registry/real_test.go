package registry_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/dockerregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
)

// The distribution project's registry: pushed to in both ways, resolved through
// an index, read by ranges.
func TestRealRegistry(t *testing.T) {
	addr := dockerregistry.Start(t)
	data := noise(3<<20 + 17)
	layer := ocipush.Bytes(registry.MediaTypeErofs, data)
	transport := http.DefaultTransport.(*http.Transport).Clone()
	t.Cleanup(transport.CloseIdleConnections)
	base := "http://" + addr
	for name, o := range map[string]ocipush.Options{
		"monolithic": {}, "chunked": {ChunkSize: 1 << 20},
	} {
		o.Client = &http.Client{Transport: transport}
		index, err := ocipush.PushIndex(t.Context(), base, "a/"+name+":v1", []ocipush.Image{
			image("linux/arm64", ocipush.Bytes(tarGzip, []byte("tar"))),
			image("linux/amd64", ocipush.Bytes(tarGzip, []byte("tar"))),
			image("linux/amd64", layer, "erofs"),
		}, o)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		c := newClient(t, registry.Options{})
		im, err := c.Resolve(t.Context(), parse(t, addr+"/a/"+name+":v1"), registry.Selector{Platform: "linux/amd64"})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		l, err := im.ErofsLayer(registry.Selector{})
		if err != nil || im.IndexDigest != index || l.Digest != digest.FromBytes(data) || l.Size != int64(len(data)) {
			t.Fatalf("%s: %+v %+v %v", name, im, l, err)
		}
		if l, err = oneLayer(t, c, im, registry.Selector{Blob: im.Config.Digest}); err != nil || l.Size != im.Config.Size {
			t.Errorf("%s: stat: %+v %v", name, l, err)
		}
		b, err := c.Blob(im.Reference, im.Layers[0].Descriptor)
		if err != nil {
			t.Fatal(err)
		}
		for _, at := range []struct{ off, n int64 }{{0, 1}, {0, b.Size()}, {1 << 20, 256 << 10}, {b.Size() - 1, 1}} {
			got, start, err := fetch(t.Context(), b, at.off, at.n)
			if err != nil || start != at.off || !bytes.Equal(got, data[at.off:at.off+at.n]) {
				t.Errorf("%s: %+v: start %d, %d bytes, %v", name, at, start, len(got), err)
			}
		}
		_, err = c.Resolve(t.Context(), parse(t, addr+"/a/"+name+":v2"), registry.Selector{})
		var status *registry.StatusError
		if !errors.As(err, &status) || status.Code != 404 || status.Codes[0] != "MANIFEST_UNKNOWN" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestPullThroughCacheKilled reads through the distribution project's pull-through
// cache, which is killed in the middle of a body.
func TestPullThroughCacheKilled(t *testing.T) {
	upstream := dockerregistry.Start(t)
	cache := dockerregistry.StartWith(t, dockerregistry.Options{Upstream: "http://" + upstream})
	data := noise(64 << 20)
	transport := http.DefaultTransport.(*http.Transport).Clone()
	t.Cleanup(transport.CloseIdleConnections)
	o := ocipush.Options{Client: &http.Client{Transport: transport}}
	if _, err := ocipush.Push(t.Context(), "http://"+upstream, "a/x:v1", []ocipush.Layer{ocipush.Bytes(registry.MediaTypeErofs, data)}, o); err != nil {
		t.Fatal(err)
	}
	log := newWatchedLog()
	conf := fmt.Sprintf("[[registry]]\nlocation = %q\n[[registry.mirror]]\nlocation = %q\n", upstream, cache.Addr)
	c := newClient(t, registry.Options{RegistriesConf: writeFile(t, conf), Logger: log.logger()})
	im, err := c.Resolve(t.Context(), parse(t, upstream+"/a/x:v1"), registry.Selector{})
	if err != nil {
		t.Fatal(err)
	}
	b, err := c.Blob(im.Reference, im.Layers[0].Descriptor)
	if err != nil {
		t.Fatal(err)
	}
	// What the cache does not have yet it sends whole, whatever the range.
	body, start, _, err := b.Fetch(t.Context(), 1<<20, b.Size()-1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	got := make([]byte, b.Size()-start)
	if _, err := io.ReadFull(body, got[:1<<20]); err != nil {
		t.Fatal(err)
	}
	if said := log.String(); strings.Count(said, "\n") != 1 || !strings.Contains(said, `level=INFO msg="the server ignores ranges`) {
		t.Errorf("logged: %s", said)
	}
	cache.Kill()
	if _, err := io.ReadFull(body, got[1<<20:]); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, data[start:]) {
		t.Error("the bytes are not the blob's")
	}
	if !strings.Contains(log.String(), "mirror left") {
		t.Errorf("logged: %s", log)
	}
}
