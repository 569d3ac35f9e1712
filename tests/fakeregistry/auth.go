package fakeregistry

import (
	"cmp"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	tokenPath = "/token"
	service   = "fakeregistry"
	anyScope  = "*"
)

// tokens is the token service and what it has given out.
type tokens struct {
	opts Options

	mu        sync.Mutex // guards what follows
	username  string
	passwords []string // any of them
	issued    map[string]given
	all       []string // ever issued
}

type given struct {
	scope   string
	expires time.Time
}

func newTokens(o Options) *tokens {
	return &tokens{opts: o, username: o.Username, passwords: []string{o.Password}, issued: map[string]given{}}
}

// SetCredentials replaces Options.Username and Password. Any of the passwords will
// do, as in the middle of a rotation. Tokens that were given out live on.
func (r *Registry) SetCredentials(username string, passwords ...string) {
	r.tokens.mu.Lock()
	defer r.tokens.mu.Unlock()
	r.tokens.username, r.tokens.passwords = username, passwords
}

// Secrets are what a client of this registry must not show: passwords, the identity
// token, and all tokens that were given out.
func (r *Registry) Secrets() []string {
	r.tokens.mu.Lock()
	defer r.tokens.mu.Unlock()
	all := slices.Concat(r.tokens.passwords, []string{r.opts.IdentityToken}, r.tokens.all)
	for _, p := range r.tokens.passwords {
		all = append(all, base64.StdEncoding.EncodeToString([]byte(r.tokens.username+":"+p)))
	}
	return slices.DeleteFunc(all, func(s string) bool { return s == "" })
}

// admits says whether a request bears the right name and password; anybody does
// where there is no name.
func (t *tokens) admits(req *http.Request) bool {
	user, password, ok := req.BasicAuth()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.username == "" {
		return !ok
	}
	return ok && user == t.username && slices.Contains(t.passwords, password)
}

func (t *tokens) issue(scope string) string {
	token := rand.Text()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.issued[token] = given{scope, time.Now().Add(t.opts.TokenLife)}
	t.all = append(t.all, token)
	return token
}

func (t *tokens) revoke() {
	t.mu.Lock()
	defer t.mu.Unlock()
	clear(t.issued)
}

func (t *tokens) accepts(token, scope string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	g, ok := t.issued[token]
	return ok && time.Now().Before(g.expires) && covers(g.scope, scope)
}

// covers reports whether a token for granted is enough for each part of asked. Who
// may push may also pull.
func covers(granted, asked string) bool {
	if granted == anyScope {
		return true
	}
	has := strings.Fields(granted)
	for _, s := range strings.Fields(asked) {
		wider := s
		if strings.HasSuffix(s, ":pull") {
			wider = s + ",push"
		}
		if !slices.Contains(has, s) && !slices.Contains(has, wider) {
			return false
		}
	}
	return true
}

// ServeHTTP is the token service: a GET with Basic credentials, or a POST with
// an identity token.
func (t *tokens) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if err := req.ParseForm(); err != nil {
		refuse(w, http.StatusBadRequest, "BAD_REQUEST", "the form cannot be read")
		return
	}
	if req.Form.Get("service") != service {
		refuse(w, http.StatusBadRequest, "BAD_SERVICE", "this is another service")
		return
	}
	if !t.knows(req) {
		refuse(w, http.StatusUnauthorized, "UNAUTHORIZED", "incorrect username or password")
		return
	}
	answer := map[string]any{"expires_in": cmp.Or(t.opts.TokenClaim, t.opts.TokenLife).Seconds()}
	name := "token"
	if req.Method == http.MethodPost {
		name = "access_token"
	}
	answer[name] = t.issue(strings.Join(req.Form["scope"], " "))
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(answer) // the client's loss
}

func (t *tokens) knows(req *http.Request) bool {
	if req.Method == http.MethodPost {
		return t.opts.IdentityToken != "" && req.PostForm.Get("grant_type") == "refresh_token" &&
			req.PostForm.Get("refresh_token") == t.opts.IdentityToken
	}
	return t.admits(req)
}

// authenticate lets a request through to the endpoints, or challenges it.
func (r *Registry) authenticate(w http.ResponseWriter, req *http.Request) {
	if req.URL.Path == tokenPath && r.opts.Auth == Bearer {
		r.tokens.ServeHTTP(w, req)
		return
	}
	if r.signer != nil {
		r.serveSigned(w, req)
		return
	}
	scope := scopeOf(req)
	switch r.opts.Auth {
	case Basic:
		if !r.tokens.admits(req) {
			w.Header().Set("WWW-Authenticate", `Basic realm="fakeregistry", charset="UTF-8"`)
			refuse(w, http.StatusUnauthorized, "UNAUTHORIZED", "authentication required")
			return
		}
	case Bearer:
		token, ok := strings.CutPrefix(req.Header.Get("Authorization"), "Bearer ")
		if !ok || !r.tokens.accepts(token, scope) {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s%s",service=%q,scope=%q`, r.URL(), tokenPath, service, scope))
			refuse(w, http.StatusUnauthorized, "UNAUTHORIZED", "authentication required")
			return
		}
	}
	r.mux.ServeHTTP(w, req)
}

// scopeOf is the scope that a request needs: its repository, pull or both, and
// that to mount from.
func scopeOf(req *http.Request) string {
	repo, _, _, ok := splitPath(req.URL.Path)
	if !ok {
		return ""
	}
	if req.Method == http.MethodGet || req.Method == http.MethodHead {
		return "repository:" + repo + ":pull"
	}
	scope := "repository:" + repo + ":pull,push"
	if from := req.URL.Query().Get("from"); from != "" {
		scope += " repository:" + from + ":pull"
	}
	return scope
}
