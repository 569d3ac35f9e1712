package registry_test

import (
	"bytes"
	"fmt"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/registry"
)

// A signer is a registry that redirects to storage by URLs that it signs.
type signer struct {
	asked, served atomic.Int32
	signature     atomic.Int32 // the one that storage accepts
	refusal       atomic.Int32 // the status of all others
	authorized    atomic.Int32 // requests to storage with an Authorization header
	blob          *registry.Blob
}

func newSigner(t *testing.T, data []byte) *signer {
	t.Helper()
	s := &signer{}
	s.refusal.Store(http.StatusForbidden)
	storage := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.Header.Get("Authorization") != "" {
			s.authorized.Add(1)
		}
		if req.URL.Query().Get("sig") != fmt.Sprint(s.signature.Load()) {
			w.WriteHeader(int(s.refusal.Load()))
			return
		}
		s.served.Add(1)
		http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(data))
	}))
	t.Cleanup(storage.Close)
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if user, _, ok := req.BasicAuth(); !ok || user != "u" {
			w.Header().Set("WWW-Authenticate", "Basic")
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		s.asked.Add(1)
		http.Redirect(w, req, fmt.Sprintf("%s/b?sig=%d", storage.URL, s.signature.Load()), http.StatusTemporaryRedirect)
	}))
	t.Cleanup(front.Close)
	c := newClient(t, registry.Options{Username: "u", Password: canary, ErrorWait: 10 * time.Second})
	var err error
	s.blob, err = c.Blob(parse(t, host(front)+"/x:v1"), ocispec.Descriptor{Digest: sum(data), Size: int64(len(data))})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestSignedURL reads on by the URL that a redirect gave, and asks for a new one
// when it is refused: once, whatever the refusal is.
func TestSignedURL(t *testing.T) {
	data := noise(10_000)
	s := newSigner(t, data)
	want := func(what string, asked, served int32) {
		t.Helper()
		off := int64(served) * 100
		got, _, err := fetch(t.Context(), s.blob, off, 100)
		if err != nil || !bytes.Equal(got, data[off:off+100]) {
			t.Fatalf("%s: %d bytes, %v", what, len(got), err)
		}
		if a, b := s.asked.Load(), s.served.Load(); a != asked || b != served {
			t.Errorf("%s: the registry was asked %d times and storage served %d, want %d and %d", what, a, b, asked, served)
		}
	}
	want("first", 1, 1)
	want("again", 1, 2)
	served := int32(3)
	for _, status := range []int32{400, 401, 403, 404, 410, 429, 500, 503} {
		s.signature.Add(1)
		s.refusal.Store(status)
		want(fmt.Sprint("refused with ", status), served-1, served)
		served++
	}
	want("the last one goes on", served-2, served)
	if n := s.authorized.Load(); n != 0 {
		t.Errorf("%d requests to storage bore credentials", n)
	}
}
