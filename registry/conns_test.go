package registry_test

import (
	"net/http"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
)

// TestMaxConnsPerHost has many readers share few connections.
func TestMaxConnsPerHost(t *testing.T) {
	for _, n := range []int{1, 2, 0} {
		data := noise(60_000)
		r := startRegistry(t, fakeregistry.Options{})
		b := blobOf(t, r, data, registry.Options{PlainHTTP: true, MaxConnsPerHost: n})
		// Those of the push are still open.
		before, _ := r.Connections()
		r.SetLatency(5 * time.Millisecond)
		fetchAll(t, b, data, 60)
		want := n
		if n == 0 {
			want = registry.DefaultMaxConns
		}
		if _, most := r.Connections(); most-before != want {
			t.Errorf("MaxConnsPerHost %d: %d connections at a time", n, most-before)
		}
	}
}

// TestCloseLeavesNoConnection closes a client in the middle of a body.
func TestCloseLeavesNoConnection(t *testing.T) {
	for _, secure := range []bool{false, true} {
		data := noise(4 << 20)
		r := startRegistry(t, fakeregistry.Options{TLS: secure})
		push := pushOptions(t, r)
		// Not CloseIdleConnections: a connection may be idle only a moment after its last answer was read.
		push.Client.Transport.(*http.Transport).DisableKeepAlives = true
		desc := pushBlob(t, r, data, push)
		awaitConnections(t, r)
		c, err := registry.New(registry.Options{RootCAs: r.RootCAs()})
		if err != nil {
			t.Fatal(err)
		}
		b, err := c.Blob(parse(t, r.Addr()+"/x:v1"), desc)
		if err != nil {
			t.Fatal(err)
		}
		body, _, _, err := b.Fetch(t.Context(), 0, b.Size())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := body.Read(make([]byte, 10)); err != nil {
			t.Fatal(err)
		}
		if open, _ := r.Connections(); open != 1 {
			t.Errorf("TLS %v: %d connections while a body is read", secure, open)
		}
		// The body is closed after its client, as a reader may that was late.
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		awaitConnections(t, r)
		if err := body.Close(); err != nil {
			t.Error(err)
		}
		if _, _, _, err := b.Fetch(t.Context(), 0, 10); err == nil {
			t.Error("a closed client fetches")
		}
	}
}

// awaitConnections waits for the server to notice that nobody is left.
func awaitConnections(t *testing.T, r *fakeregistry.Registry) {
	t.Helper()
	for began := time.Now(); ; time.Sleep(time.Millisecond) {
		open, _ := r.Connections()
		if open == 0 {
			return
		}
		if time.Since(began) > 10*time.Second {
			t.Fatalf("%d connections are left", open)
		}
	}
}
