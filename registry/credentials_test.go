package registry_test

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
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
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
)

func TestCredentials(t *testing.T) {
	for _, auth := range []fakeregistry.Auth{fakeregistry.Basic, fakeregistry.Bearer} {
		for _, tc := range []struct {
			name   string
			given  func(t *testing.T, host string) registry.Options
			denied string // what the error says; "" for success
		}{
			{"explicit", func(*testing.T, string) registry.Options {
				return registry.Options{Username: user, Password: canary}
			}, ""},
			{"explicit and wrong", func(*testing.T, string) registry.Options {
				return registry.Options{Username: user, Password: canary + "x"}
			}, "the credentials for HOST from the given user name and password were refused"},
			{"environment", func(t *testing.T, _ string) registry.Options {
				t.Setenv("EROFS_OCI_USERNAME", user)
				t.Setenv("EROFS_OCI_PASSWORD", canary)
				return registry.Options{}
			}, ""},
			{"explicit goes before the environment", func(t *testing.T, _ string) registry.Options {
				t.Setenv("EROFS_OCI_USERNAME", "other")
				t.Setenv("EROFS_OCI_PASSWORD", "wrong")
				return registry.Options{Username: user, Password: canary}
			}, ""},
			{"the environment goes before files", func(t *testing.T, host string) registry.Options {
				t.Setenv("EROFS_OCI_USERNAME", user)
				t.Setenv("EROFS_OCI_PASSWORD", canary)
				return registry.Options{AuthFile: loginFile(t, [3]string{host, "other", "wrong"})}
			}, ""},
			{"auth file", func(t *testing.T, host string) registry.Options {
				return registry.Options{AuthFile: loginFile(t, [3]string{host, user, canary})}
			}, ""},
			{"auth file by environment", func(t *testing.T, host string) registry.Options {
				t.Setenv("REGISTRY_AUTH_FILE", loginFile(t, [3]string{host, user, canary}))
				return registry.Options{}
			}, ""},
			{"docker's file", func(t *testing.T, host string) registry.Options {
				path := loginFile(t, [3]string{"https://" + host + "/v1/", user, canary})
				if err := os.Rename(path, filepath.Join(filepath.Dir(path), "config.json")); err != nil {
					t.Fatal(err)
				}
				t.Setenv("DOCKER_CONFIG", filepath.Dir(path))
				return registry.Options{}
			}, ""},
			{"path-scoped key", func(t *testing.T, host string) registry.Options {
				return registry.Options{AuthFile: loginFile(t, [3]string{host + "/team", user, canary}, [3]string{host, "other", "wrong"})}
			}, ""},
			{"another path's key", func(t *testing.T, host string) registry.Options {
				return registry.Options{AuthFile: loginFile(t, [3]string{host + "/teams", user, canary})}
			}, "no credentials for HOST"},
			{"credential helper", func(t *testing.T, host string) registry.Options {
				credentialHelper(t, host, user, canary)
				return registry.Options{AuthFile: writeFile(t, fmt.Sprintf(`{"credHelpers":{%q:"fake"}}`, host))}
			}, ""},
			{"credentials store", func(t *testing.T, host string) registry.Options {
				credentialHelper(t, host, user, canary)
				return registry.Options{AuthFile: writeFile(t, fmt.Sprintf(`{"auths":{%q:{}},"credsStore":"fake"}`, host))}
			}, ""},
			{"docker's credentials store", func(t *testing.T, host string) registry.Options {
				credentialHelper(t, host, user, canary)
				dir := t.TempDir()
				if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(`{"credsStore":"fake"}`), 0o600); err != nil {
					t.Fatal(err)
				}
				t.Setenv("DOCKER_CONFIG", dir)
				return registry.Options{}
			}, ""},
			{"credentials store that does not know the host", func(t *testing.T, host string) registry.Options {
				credentialHelper(t, "another.example", user, canary)
				return registry.Options{AuthFile: writeFile(t, `{"credsStore":"fake"}`)}
			}, "no credentials for HOST"},
			{"credentials store that is not there", func(t *testing.T, host string) registry.Options {
				return registry.Options{AuthFile: writeFile(t, `{"credsStore":"missing"}`)}
			}, "credentials for HOST: docker-credential-missing, the credsStore of "},
			{"credentials store that is a path", func(t *testing.T, host string) registry.Options {
				return registry.Options{AuthFile: writeFile(t, `{"credsStore":"../fake"}`)}
			}, "credentials for HOST: "},
			{"nobody", func(*testing.T, string) registry.Options { return registry.Options{} }, "no credentials for HOST"},
			{"broken file", func(t *testing.T, _ string) registry.Options {
				return registry.Options{AuthFile: writeFile(t, "{")}
			}, "credentials for HOST: "},
		} {
			t.Run(fmt.Sprintf("%d %s", auth, tc.name), func(t *testing.T) {
				o := fakeregistry.Options{Auth: auth, Username: user, Password: canary}
				r := startRegistry(t, o)
				pushAuthorized(t, r, o)
				alone(t)
				log := newWatchedLog()
				opts := tc.given(t, r.Addr())
				opts.Logger = log.logger()
				c, err := registry.New(opts)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				im, err := c.Resolve(t.Context(), parse(t, r.Addr()+"/team/x:v1"), registry.Selector{})
				if tc.denied == "" {
					if err != nil || len(im.Layers) != 1 {
						t.Errorf("%+v, %v", im, err)
					}
				} else if want := strings.ReplaceAll(tc.denied, "HOST", r.Addr()); err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("%v does not say %q", err, want)
				}
				if all := fmt.Sprint(err) + log.String(); strings.Contains(all, canary) {
					t.Errorf("the password is in %s", all)
				}
			})
		}
	}
}

// credentialHelper puts docker-credential-fake on the PATH, which knows one host.
func credentialHelper(t *testing.T, host, user, secret string) {
	t.Helper()
	dir := t.TempDir()
	script := fmt.Sprintf("#!/bin/sh\nread host\n[ \"$1 $host\" = \"get %s\" ] || { echo 'credentials not found in native keychain'; exit 1; }\necho '{\"Username\":%q,\"Secret\":%q}'\n", host, user, secret)
	if err := os.WriteFile(filepath.Join(dir, "docker-credential-fake"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

func TestCredentialsThatContradict(t *testing.T) {
	alone(t)
	for name, o := range map[string]registry.Options{
		"no password":  {Username: user},
		"no user":      {Password: canary},
		"missing file": {AuthFile: filepath.Join(t.TempDir(), "nothing")},
		"no progress":  {NoProgress: time.Minute, ErrorWait: time.Minute},
		"negative":     {NoProgress: -1},
	} {
		if _, err := registry.New(o); err == nil || strings.Contains(err.Error(), canary) {
			t.Errorf("%s: %v", name, err)
		}
	}
	t.Setenv("REGISTRY_AUTH_FILE", "/nonexistent/auth.json")
	if _, err := registry.New(registry.Options{}); err == nil || !strings.Contains(err.Error(), "REGISTRY_AUTH_FILE") || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
	t.Setenv("REGISTRY_AUTH_FILE", "")
	t.Setenv("EROFS_OCI_USERNAME", user)
	if _, err := registry.New(registry.Options{}); err == nil || !strings.Contains(err.Error(), "EROFS_OCI_PASSWORD") {
		t.Errorf("%v", err)
	}
}

func TestIdentityToken(t *testing.T) {
	o := fakeregistry.Options{Auth: fakeregistry.Bearer, Username: user, Password: canary, IdentityToken: canaryToken}
	r := startRegistry(t, o)
	pushAuthorized(t, r, o)
	ref := parse(t, r.Addr()+"/team/x:v1")
	file := func(token string) string {
		return writeFile(t, fmt.Sprintf(`{"auths":{%q:{"auth":%q,"identitytoken":%q}}}`,
			r.Addr(), base64.StdEncoding.EncodeToString([]byte(user+":")), token))
	}
	if _, err := newClient(t, registry.Options{AuthFile: file(canaryToken)}).Resolve(t.Context(), ref, registry.Selector{}); err != nil {
		t.Error(err)
	}
	credentialHelper(t, r.Addr(), "<token>", canaryToken)
	store := registry.Options{AuthFile: writeFile(t, `{"credsStore":"fake"}`)}
	if _, err := newClient(t, store).Resolve(t.Context(), ref, registry.Selector{}); err != nil {
		t.Error(err)
	}
	_, err := newClient(t, registry.Options{AuthFile: file(canaryToken + "x")}).Resolve(t.Context(), ref, registry.Selector{})
	if err == nil || !strings.Contains(err.Error(), "were refused") || strings.Contains(err.Error(), canaryToken) {
		t.Errorf("%v", err)
	}
}

// TestForbiddenExpired has credentials expire with a 403 while a blob is read, and
// rotates them on disk, as Amazon's registry and its credential helper do.
func TestForbiddenExpired(t *testing.T) {
	data := noise(1000)
	var valid atomic.Value
	valid.Store("first-" + canary)
	message := atomic.Value{}
	message.Store("Your authorization token has expired. Reauthenticate and try again.")
	var refused atomic.Int32
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		_, password, ok := req.BasicAuth()
		switch {
		case !ok:
			w.Header().Set("WWW-Authenticate", "Basic")
			w.WriteHeader(http.StatusUnauthorized)
		case password != valid.Load():
			refused.Add(1)
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprintf(w, `{"errors":[{"code":"DENIED","message":%q}]}`, message.Load())
		default:
			http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(data))
		}
	}))
	t.Cleanup(s.Close)
	login := func(password string) string { return loginFile(t, [3]string{host(s), user, password}) }
	file := login("first-" + canary)
	c := newClient(t, registry.Options{AuthFile: file, ErrorWait: registry.NoWait})
	b, err := c.Blob(parse(t, host(s)+"/x:v1"), ocispec.Descriptor{Digest: sum(data), Size: int64(len(data))})
	if err != nil {
		t.Fatal(err)
	}
	read := func() error {
		got, _, err := fetch(t.Context(), b, 0, 10)
		if err == nil && !bytes.Equal(got, data[:10]) {
			t.Error("wrong bytes")
		}
		return err
	}
	if err := read(); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(login("second-"+canary), file); err != nil {
		t.Fatal(err)
	}
	valid.Store("second-" + canary)
	if err := read(); err != nil || refused.Load() != 1 {
		t.Fatalf("%d refusals, %v", refused.Load(), err)
	}
	// Any other 403 is final, and is not asked for twice.
	valid.Store("third")
	message.Store("not for you")
	if err := read(); err == nil || !strings.Contains(err.Error(), "not for you") || refused.Load() != 2 {
		t.Errorf("%d refusals, %v", refused.Load(), err)
	}
}
