package registry_test

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
)

const (
	user        = "robot$reader"
	canary      = "canary-Pa55w0rd!"
	canaryToken = "canary-identity-t0ken"
)

// pushAuthorized pushes an image to a registry with any kind of auth.
func pushAuthorized(t *testing.T, r *fakeregistry.Registry, o fakeregistry.Options) {
	t.Helper()
	push := pushOptions(t, r)
	if o.Auth == fakeregistry.Basic {
		push.Authorization = basicOf(o)
	}
	if _, err := ocipush.Push(t.Context(), r.URL(), "team/x:v1", []ocipush.Layer{erofsLayer}, push); err != nil {
		t.Fatal(err)
	}
	r.ResetStats()
}

func basicOf(o fakeregistry.Options) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(o.Username+":"+o.Password))
}

// loginFile writes a login file with the entries, which are key, user, password.
func loginFile(t *testing.T, entries ...[3]string) string {
	t.Helper()
	var auths []string
	for _, e := range entries {
		auths = append(auths, fmt.Sprintf("%q:{\"auth\":%q}", e[0], base64.StdEncoding.EncodeToString([]byte(e[1]+":"+e[2]))))
	}
	return writeFile(t, `{"auths":{`+strings.Join(auths, ",")+`}}`)
}

func writeFile(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "auth.json")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestAnonymousToken(t *testing.T) {
	o := fakeregistry.Options{Auth: fakeregistry.Bearer}
	r := startRegistry(t, o)
	pushAuthorized(t, r, o)
	c := newClient(t, registry.Options{})
	for range 3 {
		if _, err := c.Resolve(t.Context(), parse(t, r.Addr()+"/team/x:v1"), registry.Selector{}); err != nil {
			t.Fatal(err)
		}
	}
	// One request without a token, one for it, three with it; and the greeting.
	if s := r.Stats(); s.Tokens != 1 || s.ManifestGETs != 4 {
		t.Errorf("%+v", s)
	}
}

// authorizedBlob is a blob behind tokens.
func authorizedBlob(t *testing.T, o fakeregistry.Options, data []byte) (*fakeregistry.Registry, *registry.Blob) {
	t.Helper()
	o.Auth, o.Username, o.Password = fakeregistry.Bearer, user, canary
	r := startRegistry(t, o)
	return r, blobOf(t, r, data, registry.Options{Username: user, Password: canary})
}

// fetchAll reads the whole blob in so many parallel fetches.
func fetchAll(t *testing.T, b *registry.Blob, data []byte, readers int64) {
	t.Helper()
	var wg sync.WaitGroup
	n := int64(len(data)) / readers
	for i := range readers {
		wg.Go(func() {
			got, _, err := fetch(t.Context(), b, i*n, n)
			if err != nil || !bytes.Equal(got, data[i*n:(i+1)*n]) {
				t.Errorf("reader %d: %d bytes, %v", i, len(got), err)
			}
		})
	}
	wg.Wait()
}

func TestRevokedTokenIsFetchedOnceForAll(t *testing.T) {
	data := noise(50 << 10)
	r, b := authorizedBlob(t, fakeregistry.Options{}, data)
	fetchAll(t, b, data, 1)
	for range 3 {
		r.ResetStats()
		r.RevokeTokens()
		fetchAll(t, b, data, 50)
		if s := r.Stats(); s.Tokens != 1 {
			t.Errorf("%d tokens for 50 readers", s.Tokens)
		}
	}
}

func TestExpiredTokenIsFetchedAhead(t *testing.T) {
	data := noise(1000)
	r, b := authorizedBlob(t, fakeregistry.Options{TokenLife: time.Second}, data)
	fetchAll(t, b, data, 1)
	fetchAll(t, b, data, 1)
	if s := r.Stats(); s.Tokens != 1 {
		t.Errorf("%d tokens for two reads in a row", s.Tokens)
	}
	time.Sleep(time.Second) // the life of the token is what this is about
	r.ResetStats()
	fetchAll(t, b, data, 20)
	if s := r.Stats(); s.Tokens != 1 || s.BlobGETs != 20 {
		t.Errorf("%+v; want a token, and no read refused", s)
	}
}

// A token that expires while a body is under way does not matter to the body,
// and is renewed for what follows.
func TestTokenRevokedMidBody(t *testing.T) {
	data := noise(10_000)
	r, b := authorizedBlob(t, fakeregistry.Options{}, data)
	body := midBody(t, r, b, data)
	r.RevokeTokens()
	r.Stop()
	r.SetFault(nil)
	if err := r.Start(); err != nil {
		t.Fatal(err)
	}
	rest := make([]byte, 9000)
	if n, err := readFull(body, rest); err != nil || !bytes.Equal(rest[:n], data[1000:]) {
		t.Errorf("%d bytes, %v", n, err)
	}
}

func readFull(r interface{ Read([]byte) (int, error) }, p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		var m int
		m, err = r.Read(p[n:])
		n += m
	}
	return n, err
}

// The token service fails for a while.
func TestTokenServiceIsRetried(t *testing.T) {
	data := noise(1000)
	r, b := authorizedBlob(t, fakeregistry.Options{}, data)
	var mu sync.Mutex
	refused := 0
	r.SetFault(func(q *http.Request) *fakeregistry.Fault {
		mu.Lock()
		defer mu.Unlock()
		if q.URL.Path != "/token" || refused == 2 {
			return nil
		}
		refused++
		return &fakeregistry.Fault{Status: 503}
	})
	fetchAll(t, b, data, 1)
	if n := r.Stats().Tokens; n != 3 {
		t.Errorf("%d requests for a token", n)
	}
}

func TestTokenAnswers(t *testing.T) {
	for _, tc := range []struct{ name, body, says string }{
		{"not JSON", "canary-Pa55w0rd! <html>", "not the JSON"},
		{"no token", `{"expires_in":60}`, "no usable token"},
		{"control characters", `{"token":"a\r\nX-Injected: 1"}`, "no usable token"},
	} {
		_, b := func() (*fakeregistry.Registry, *registry.Blob) {
			r, b := authorizedBlob(t, fakeregistry.Options{}, noise(10))
			r.SetFault(func(q *http.Request) *fakeregistry.Fault {
				if q.URL.Path != "/token" {
					return nil
				}
				f := answer(200, nil, tc.body)
				return &f
			})
			return r, b
		}()
		_, _, err := fetch(t.Context(), b, 0, 10)
		if err == nil || !strings.Contains(err.Error(), tc.says) || strings.Contains(err.Error(), canary) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
}

// Where a registry sends blobs elsewhere, the credentials do not go along, and
// what that place asks for is not answered.
func TestRedirectToAnotherOrigin(t *testing.T) {
	data := noise(10_000)
	for _, auth := range []fakeregistry.Auth{fakeregistry.Basic, fakeregistry.Bearer} {
		cdn := startRegistry(t, fakeregistry.Options{})
		desc := pushBlob(t, cdn, data, pushOptions(t, cdn))
		r := startRegistry(t, fakeregistry.Options{Auth: auth, Username: user, Password: canary})
		// The registry decides only after it has seen the right credentials.
		r.SetFault(func(q *http.Request) *fakeregistry.Fault {
			if !strings.Contains(q.URL.Path, "/blobs/") || q.Header.Get("Authorization") == "" {
				return nil
			}
			return &fakeregistry.Fault{Status: 307, Header: http.Header{"Location": {cdn.URL() + q.URL.Path + "?X-Signature=" + canary}}}
		})
		c := newClient(t, registry.Options{Username: user, Password: canary})
		b, err := c.Blob(parse(t, r.Addr()+"/x:v1"), desc)
		if err != nil {
			t.Fatal(err)
		}
		got, start, err := fetch(t.Context(), b, 5000, 100)
		if err != nil || start != 5000 || !bytes.Equal(got, data[5000:5100]) {
			t.Fatalf("start %d, %d bytes, %v", start, len(got), err)
		}
		seen := cdn.Requests()
		if len(seen) != 1 || seen[0].Authorized || seen[0].Range != "bytes=5000-5099" {
			t.Errorf("the other origin saw %+v", seen)
		}
		// A challenge of the other origin's is not taken up.
		thief := startRegistry(t, fakeregistry.Options{})
		cdn.SetFault(func(*http.Request) *fakeregistry.Fault {
			return &fakeregistry.Fault{Status: 401, Header: http.Header{"WWW-Authenticate": {`Bearer realm="` + thief.URL() + `/token"`, `Basic realm="x"`}}}
		})
		_, _, err = fetch(t.Context(), b, 0, 10)
		var status *registry.StatusError
		if !errors.As(err, &status) || status.Code != 401 || strings.Contains(err.Error(), canary) || !strings.Contains(err.Error(), cdn.Addr()) {
			t.Errorf("%v", err)
		}
		if n := thief.Stats().Requests; n != 0 {
			t.Errorf("the thief got %d requests", n)
		}
		for _, q := range cdn.Requests() {
			if q.Authorized {
				t.Errorf("credentials went to the other origin: %+v", q)
			}
		}
	}
}

func TestRedirects(t *testing.T) {
	data := noise(100)
	for _, tc := range []struct {
		name, location string
		says           string
	}{
		{"loop", "", "more than 5 redirects"},
		{"another scheme", "ftp://127.0.0.1/x?sig=" + canary, "neither http nor https"},
		{"not a URL", "http://[::1" + canary, "not a URL"},
		{"no host", "http:///x?" + canary, "neither http nor https"},
	} {
		r := startRegistry(t, fakeregistry.Options{})
		b := blobOf(t, r, data, registry.Options{})
		r.SetFault(func(q *http.Request) *fakeregistry.Fault {
			location := tc.location
			if location == "" {
				location = q.URL.Path + "?again=" + canary
			}
			return &fakeregistry.Fault{Status: 302, Header: http.Header{"Location": {location}}}
		})
		_, _, err := fetch(t.Context(), b, 0, 10)
		if err == nil || !strings.Contains(err.Error(), tc.says) || strings.Contains(err.Error(), canary) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
}

func TestRedirectToPlainHTTPIsRefused(t *testing.T) {
	data := noise(100)
	cdn := startRegistry(t, fakeregistry.Options{})
	desc := pushBlob(t, cdn, data, pushOptions(t, cdn))
	r := startRegistry(t, fakeregistry.Options{TLS: true})
	r.SetFault(func(q *http.Request) *fakeregistry.Fault {
		if q.URL.Path == "/v2/" {
			return nil
		}
		return &fakeregistry.Fault{Status: 307, Header: http.Header{"Location": {cdn.URL() + q.URL.Path + "?sig=" + canary}}}
	})
	b, err := newClient(t, registry.Options{RootCAs: r.RootCAs()}).Blob(parse(t, r.Addr()+"/x:v1"), desc)
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = fetch(t.Context(), b, 0, 10)
	if err == nil || !strings.Contains(err.Error(), "redirect from https to http://"+cdn.Addr()) || strings.Contains(err.Error(), canary) {
		t.Errorf("%v", err)
	}
	if n := cdn.Stats().Requests; n != 0 {
		t.Errorf("%d requests in plain HTTP", n)
	}
}

// A realm over plain HTTP gets no credentials from an HTTPS registry.
func TestPlainRealmIsRefused(t *testing.T) {
	thief := startRegistry(t, fakeregistry.Options{Auth: fakeregistry.Bearer, Username: user, Password: canary})
	r := startRegistry(t, fakeregistry.Options{TLS: true})
	r.SetFault(func(q *http.Request) *fakeregistry.Fault {
		if q.URL.Path == "/v2/" {
			return nil
		}
		return &fakeregistry.Fault{Status: 401, Header: http.Header{"WWW-Authenticate": {`Bearer realm="` + thief.URL() + `/token?k=` + canary + `",service="fakeregistry"`}}}
	})
	c := newClient(t, registry.Options{RootCAs: r.RootCAs(), Username: user, Password: canary})
	_, err := c.Resolve(t.Context(), parse(t, r.Addr()+"/x:v1"), registry.Selector{})
	if err == nil || !strings.Contains(err.Error(), "not sent over plain HTTP") || strings.Contains(err.Error(), canary) {
		t.Errorf("%v", err)
	}
	if n := thief.Stats().Requests; n != 0 {
		t.Errorf("%d requests", n)
	}
}

// Whatever a server says and whichever way a request fails, no secret comes out.
func TestSecretsStayInside(t *testing.T) {
	basic := base64.StdEncoding.EncodeToString([]byte(user + ":" + canary))
	var tokens sync.Map
	echo := func(status int) func(*http.Request) *fakeregistry.Fault {
		return func(q *http.Request) *fakeregistry.Fault {
			tokens.Store(strings.TrimPrefix(q.Header.Get("Authorization"), "Bearer "), true)
			body := fmt.Sprintf(`{"errors":[{"code":"X","message":"%s %s %s at https://h/x?sig=%s"}],"error":"%s"}`,
				q.Header.Get("Authorization"), canary, basic, canary, canary)
			f := answer(status, http.Header{"Location": {"http://127.0.0.1:1/x?sig=" + canary}}, body)
			return &f
		}
	}
	onlyToken := func(f func(*http.Request) *fakeregistry.Fault) func(*http.Request) *fakeregistry.Fault {
		return func(q *http.Request) *fakeregistry.Fault {
			if q.URL.Path != "/token" {
				return nil
			}
			return f(q)
		}
	}
	authorized := func(f func(*http.Request) *fakeregistry.Fault) func(*http.Request) *fakeregistry.Fault {
		return func(q *http.Request) *fakeregistry.Fault {
			if !strings.HasPrefix(q.Header.Get("Authorization"), "Bearer ") {
				return nil
			}
			return f(q)
		}
	}
	breakAll := func(*http.Request) *fakeregistry.Fault { return &fakeregistry.Fault{After: 5, Break: true} }
	for name, fault := range map[string]func(*http.Request) *fakeregistry.Fault{
		"token service echoes":    onlyToken(echo(401)),
		"token service echoes 5":  onlyToken(echo(500)),
		"token service redirects": onlyToken(echo(302)),
		"registry echoes 401":     authorized(echo(401)),
		"registry echoes 403":     authorized(echo(403)),
		"registry echoes 404":     authorized(echo(404)),
		"registry echoes 429":     authorized(echo(429)),
		"registry redirects":      authorized(echo(307)),
		"breaks off":              authorized(breakAll),
		"token breaks off":        onlyToken(breakAll),
	} {
		t.Run(name, func(t *testing.T) {
			r := startRegistry(t, fakeregistry.Options{Auth: fakeregistry.Bearer, Username: user, Password: canary})
			r.SetFault(fault)
			log := newWatchedLog()
			c := newClient(t, registry.Options{
				Username: user, Password: canary, Logger: log.logger(),
				ErrorWait: 300 * time.Millisecond, ResolveWait: 300 * time.Millisecond,
			})
			ref := parse(t, r.Addr()+"/x:v1")
			b, err := c.Blob(ref, ocispec.Descriptor{Digest: sum(nil), Size: 100})
			if err != nil {
				t.Fatal(err)
			}
			_, _, fetchErr := fetch(t.Context(), b, 0, 100)
			_, resolveErr := c.Resolve(t.Context(), ref, registry.Selector{})
			_, statErr := c.Stat(t.Context(), ref, sum(nil))
			if fetchErr == nil || resolveErr == nil || statErr == nil {
				t.Fatal("nothing failed")
			}
			said := fmt.Sprintf("%v\n%v\n%v\n%+v\n%s", fetchErr, resolveErr, statErr, errors.Unwrap(fetchErr), log)
			secrets := []string{canary, basic}
			tokens.Range(func(k, _ any) bool {
				if s := k.(string); len(s) > 8 {
					secrets = append(secrets, s)
				}
				return true
			})
			for _, s := range secrets {
				if strings.Contains(said, s) {
					t.Errorf("%q is in:\n%s", s, said)
				}
			}
		})
	}
}
