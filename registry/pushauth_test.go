package registry_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
)

// A token that expires between two chunks is renewed, and the chunk sent again.
func TestPutBlobTokenExpires(t *testing.T) {
	const password = "canary-password"
	r := startRegistry(t, fakeregistry.Options{Auth: fakeregistry.Bearer, Username: "me", Password: password, Upload: fakeregistry.Upload{Mount: true}})
	data := noise(3 << 20)
	log := newWatchedLog()
	c := newClient(t, registry.Options{Username: "me", Password: password, Logger: log.logger()})
	revoked := 0
	r.SetFault(func(q *http.Request) *fakeregistry.Fault {
		if q.Method == http.MethodPatch && q.Header.Get("Content-Range") == "2097152-3145727" && revoked == 0 {
			revoked++
			r.RevokeTokens()
		}
		return nil
	})
	repo := c.Repository(parse(t, r.Addr()+"/x:v1"))
	got, err := repo.PutBlob(t.Context(), describe(data), bytes.NewReader(data), registry.PutOptions{ChunkSize: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	// The body waits for leave: what is refused has sent nothing.
	want := "HEAD 401, T, HEAD 404, POST 401, T, POST 202, PATCH 202 +1048576, PATCH 202 +1048576, PATCH 401, T, PATCH 202 +1048576, PUT 201"
	if s := strings.ReplaceAll(steps(r), ", GET 200", ""); s != want || got.Sent != int64(len(data)) {
		t.Errorf("steps\n%s, want\n%s; %+v", s, want, got)
	}
	if !bytes.Equal(stored(t, r, c, describe(data)), data) {
		t.Error("the registry has other bytes")
	}
	r.ResetStats()
	from := parse(t, r.Addr()+"/y:v1")
	if got, err = c.Repository(from).PutBlob(t.Context(), describe(data), bytes.NewReader(data), registry.PutOptions{MountFrom: []string{"x"}}); err != nil || !got.Mounted {
		t.Errorf("mount: %+v, %v", got, err)
	}
	if want := "HEAD 401, T, HEAD 404, POST 401, T, POST 201"; steps(r) != want {
		t.Errorf("steps\n%s, want\n%s", steps(r), want)
	}
	// A small body is not worth waiting for leave; it is sent again.
	r.RevokeTokens()
	small := noise(1000)
	if _, err := repo.PutBlob(t.Context(), describe(small), bytes.NewReader(small), registry.PutOptions{}); err != nil {
		t.Error(err)
	}
	r.SetFault(each(http.MethodPut, fakeregistry.Fault{Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		w.WriteHeader(http.StatusForbidden)
		fmt.Fprintf(w, `{"errors":[{"code":"DENIED","message":"not for %s"}]}`, q.Header.Get("Authorization"))
	})}))
	_, err = repo.PutBlob(t.Context(), describe(small[1:]), bytes.NewReader(small[1:]), registry.PutOptions{})
	if err == nil || !strings.Contains(err.Error(), "not for Bearer REDACTED") {
		t.Errorf("%v", err)
	}
	if strings.Contains(fmt.Sprint(err, log), password) || strings.Contains(log.String(), "Bearer ") && !strings.Contains(log.String(), "REDACTED") {
		t.Errorf("a secret came out: %v\n%s", err, log)
	}
}

// A token service that gives nothing for the repository to mount from does not
// stand in the way of the upload.
func TestPutBlobMountScopeRefused(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{Auth: fakeregistry.Bearer, Username: "me", Password: "canary", Upload: fakeregistry.Upload{Mount: true}})
	data := noise(1000)
	r.PutBlob("y", sum(data), bytes.NewReader(data), int64(len(data)))
	c := newClient(t, registry.Options{Username: "me", Password: "canary"})
	r.SetFault(func(q *http.Request) *fakeregistry.Fault {
		if q.URL.Path == "/token" && strings.Contains(q.URL.RawQuery, "repository%3Ay") {
			return &fakeregistry.Fault{Status: http.StatusForbidden}
		}
		return nil
	})
	got, err := c.Repository(parse(t, r.Addr()+"/x:v1")).PutBlob(t.Context(), describe(data), bytes.NewReader(data), registry.PutOptions{MountFrom: []string{"y"}})
	if err != nil || got.Mounted || got.Sent != 1000 {
		t.Errorf("%+v, %v", got, err)
	}
}

// Who may push to a repository may not ask what is in it before it exists, with some
// registries.
func TestPutBlobUnreadable(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{Auth: fakeregistry.Bearer})
	data := noise(1000)
	r.SetFault(func(q *http.Request) *fakeregistry.Fault {
		if q.Method != http.MethodHead {
			return nil
		}
		f := answer(401, http.Header{"Www-Authenticate": {fmt.Sprintf(`Bearer realm="%s/token",service="fakeregistry",scope="repository:x:pull"`, r.URL())}}, "")
		return &f
	})
	c := newClient(t, registry.Options{})
	got, err := c.Repository(parse(t, r.Addr()+"/x:v1")).PutBlob(t.Context(), describe(data), bytes.NewReader(data), registry.PutOptions{})
	// A fresh token that is refused is renewed once: it may have been too old when it came.
	if want := "HEAD 401, T, HEAD 401, T, HEAD 401, POST 401, T, POST 202, PUT 201 +1000"; err != nil || got.Sent != 1000 || steps(r) != want {
		t.Errorf("%+v, %v; steps\n%s, want\n%s", got, err, steps(r), want)
	}
	// With nothing to be had, the POST says so.
	r.SetFault(func(q *http.Request) *fakeregistry.Fault {
		if q.URL.Path == "/token" || q.URL.Path == "/v2/" {
			return nil
		}
		f := answer(401, http.Header{"Www-Authenticate": {fmt.Sprintf(`Bearer realm="%s/token",service="fakeregistry",scope="repository:x:pull"`, r.URL())}}, "")
		return &f
	})
	_, err = c.Repository(parse(t, r.Addr()+"/x:v1")).PutBlob(t.Context(), describe(data), bytes.NewReader(data), registry.PutOptions{})
	if err == nil || !strings.Contains(err.Error(), "POST ") || !strings.Contains(err.Error(), "401 Unauthorized (no credentials") {
		t.Errorf("%v", err)
	}
}

// Over HTTP/2, with tokens, in both forms.
func TestPutBlobHTTP2(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{TLS: true, Auth: fakeregistry.Bearer})
	data := noise(3 << 20)
	for name, put := range map[string]registry.PutOptions{"x": {}, "y": {ChunkSize: 1 << 20}} {
		c := newClient(t, registry.Options{RootCAs: r.RootCAs()})
		repo := c.Repository(parse(t, r.Addr()+"/"+name+":v1"))
		got, err := repo.PutBlob(t.Context(), describe(data), bytes.NewReader(data), put)
		if err != nil || got.Sent != int64(len(data)) || !bytes.Equal(readAll(t, repo, describe(data)), data) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	for _, q := range r.Requests() {
		if q.Proto != "HTTP/2.0" {
			t.Errorf("%+v", q)
		}
	}
	if n := r.Stats().UploadBytes; n != 2*int64(len(data)) {
		t.Errorf("%d bytes came", n)
	}
}

// A Location on another host, and a redirect to one, get the bytes but not the
// credentials.
func TestPutBlobElsewhere(t *testing.T) {
	const password = "canary"
	for _, how := range []string{"location", "redirect"} {
		t.Run(how, func(t *testing.T) {
			r := startRegistry(t, fakeregistry.Options{Auth: fakeregistry.Basic, Username: "me", Password: password})
			data := noise(2 << 20)
			storage := startRegistry(t, fakeregistry.Options{})
			storage.SetFault(func(*http.Request) *fakeregistry.Fault {
				return &fakeregistry.Fault{Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
					got, err := io.ReadAll(q.Body)
					if err != nil || !bytes.Equal(got, data) || q.URL.Query().Get("signature") != "abc" {
						w.WriteHeader(http.StatusBadRequest)
						return
					}
					w.WriteHeader(http.StatusCreated)
				})}
			})
			at := http.Header{"Location": {storage.URL() + "/up?signature=abc"}}
			if how == "location" {
				r.SetFault(each(http.MethodPost, fakeregistry.Fault{Header: at}))
			} else {
				at.Set("Location", at.Get("Location")+"&digest="+sum(data).String())
				r.SetFault(each(http.MethodPut, answer(http.StatusTemporaryRedirect, at, "")))
			}
			c := newClient(t, registry.Options{Username: "me", Password: password})
			if _, err := c.Repository(parse(t, r.Addr()+"/x:v1")).PutBlob(t.Context(), describe(data), bytes.NewReader(data), registry.PutOptions{}); err != nil {
				t.Fatal(err)
			}
			seen := storage.Requests()
			if len(seen) != 1 || seen[0].Authorized || seen[0].Received != int64(len(data)) || !strings.Contains(seen[0].Query, "digest=sha256%3A") && how == "location" {
				t.Errorf("storage has seen %+v", seen)
			}
		})
	}
}

// A 302 is no place to send a body to.
func TestPutBlobRedirect302(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{})
	data := noise(1000)
	r.SetFault(each(http.MethodPut, answer(http.StatusFound, http.Header{"Location": {"/elsewhere"}}, "")))
	_, err := newClient(t, registry.Options{}).Repository(parse(t, r.Addr()+"/x:v1")).PutBlob(t.Context(), describe(data), bytes.NewReader(data), registry.PutOptions{})
	var status *registry.StatusError
	if !errors.As(err, &status) || status.Code != http.StatusFound {
		t.Errorf("%v", err)
	}
}
