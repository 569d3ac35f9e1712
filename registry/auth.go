package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
)

// A grant is the Authorization header that answers a challenge.
type grant struct {
	header  string
	expires time.Time // zero: it does not
	source  string    // of the credentials; "" where there were none
}

func (g grant) usable(now time.Time) bool {
	return g.header != "" && (g.expires.IsZero() || now.Before(g.expires))
}

// An authTransport authorizes the requests to one repository. It learns from
// the first 401 what the registry wants and sends it along from then on; when
// that is refused later, one request fetches anew for all that wait.
type authTransport struct {
	next    http.RoundTripper
	ref     Reference
	keyring keyring
	tokens  tokenService
	tasks   *tasks
	// happened is told of each token that was fetched.
	happened func(Event)
	flights  singleflight.Group

	mu      sync.Mutex
	current challenge           // the last one; zero: nothing was asked for yet
	grants  map[challenge]grant // by scope, among other things
	secrets []string            // to be removed from what servers say
}

// A grant may be refused that was good when it was granted: it has expired on its
// way, which can be long where a gate holds requests back, or others have used it up.
// So maxFresh that were fetched for a request may be refused, and maxSends in all.
const (
	maxFresh = 2
	maxSends = 4
)

func (t *authTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	header, err := t.known(req.Context())
	if err != nil {
		return nil, err
	}
	g, fresh := grant{header: header}, 0
	for sends := 1; ; sends++ {
		resp, err := t.send(req, g.header)
		if err != nil || !t.challenged(req, resp) {
			return resp, err
		}
		asked, ok := t.asked(resp)
		refusal := statusError(resp, t.hide)
		switch {
		case !ok:
			return nil, refusal
		case fresh == maxFresh, sends == maxSends:
			return nil, t.advise(refusal, g)
		}
		refused, isNew := g.header, false
		if g, isNew, err = t.authorize(req.Context(), asked, refused); err != nil {
			t.forget(asked, err)
			return nil, err
		}
		if g.header == "" || g.header == refused {
			return nil, t.advise(refusal, g)
		}
		if isNew {
			fresh++
		}
	}
}

// send sends a copy of req, with a body of its own: the one before may be half
// read.
func (t *authTransport) send(req *http.Request, header string) (*http.Response, error) {
	req = req.Clone(req.Context())
	if err := freshBody(req); err != nil {
		return nil, err
	}
	if header != "" {
		req.Header.Set("Authorization", header)
	}
	return t.next.RoundTrip(req)
}

// freshBody begins the body anew.
func freshBody(req *http.Request) (err error) {
	if req.GetBody != nil {
		req.Body, err = req.GetBody()
	}
	return err
}

// challenged reports a 401 of the registry itself, or a 403 that means one. What
// comes from where a redirect led to is nobody's business: answering it would
// send credentials to whatever token service that host names.
func (t *authTransport) challenged(req *http.Request, resp *http.Response) bool {
	if !sameOrigin(req.URL, resp.Request.URL) {
		return false
	}
	return resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden && saysExpired(resp)
}

// saysExpired looks into a refusal without taking anything out of it. Amazon's
// registry says 403 where others say 401.
func saysExpired(resp *http.Response) bool {
	body := resp.Body
	// What cannot be read says nothing; the next reader meets the same error.
	head, _ := io.ReadAll(io.LimitReader(body, maxErrorBody))
	resp.Body = struct {
		io.Reader
		io.Closer
	}{io.MultiReader(bytes.NewReader(head), body), body}
	_, message := explain(head)
	return strings.Contains(strings.ToLower(message), "expired")
}

// asked is what a refusal asks for. Where it does not say so, it is what was
// asked before.
func (t *authTransport) asked(resp *http.Response) (challenge, bool) {
	if resp.StatusCode == http.StatusUnauthorized {
		return pickChallenge(resp.Header.Values("WWW-Authenticate"))
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.current, t.current != (challenge{})
}

// known is the header for what was asked last, fetched anew if it has expired.
func (t *authTransport) known(ctx context.Context) (string, error) {
	t.mu.Lock()
	asked := t.current
	g := t.grants[asked]
	t.mu.Unlock()
	if asked == (challenge{}) || g.usable(time.Now()) {
		return g.header, nil
	}
	g, _, err := t.authorize(ctx, asked, g.header)
	t.forget(asked, err)
	return g.header, err
}

// forget has the next request ask again what the registry wants, if a token for
// what it wanted last is refused: that may have been for another repository, too,
// which a blob was to be mounted from.
func (t *authTransport) forget(asked challenge, err error) {
	var refusal *StatusError
	if !errors.As(err, &refusal) || refusal.temporary() {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.current == asked {
		t.current = challenge{}
	}
}

// authorize returns a grant for asked that is not the refused one, unless there
// is no other; fresh says that it was not there before. It fetches at most once for
// all who ask at the same time; the fetch belongs to the Client, the wait to the
// caller.
func (t *authTransport) authorize(ctx context.Context, asked challenge, refused string) (g grant, fresh bool, err error) {
	if g, ok := t.granted(asked, refused); ok {
		return g, false, nil
	}
	flight := t.flights.DoChan(strings.Join([]string{asked.scheme, asked.realm, asked.service, asked.scope}, "\n"), func() (any, error) {
		if g, ok := t.granted(asked, refused); ok {
			return g, nil
		}
		return t.fetch(asked)
	})
	select {
	case r := <-flight:
		g, _ := r.Val.(grant)
		return g, true, r.Err
	case <-ctx.Done():
		return grant{}, false, context.Cause(ctx)
	}
}

// granted looks for a usable grant that somebody else has fetched.
func (t *authTransport) granted(asked challenge, refused string) (grant, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.current = asked
	g := t.grants[asked]
	return g, g.usable(time.Now()) && g.header != refused
}

func (t *authTransport) fetch(asked challenge) (grant, error) {
	if !t.tasks.enter() {
		return grant{}, errClosed
	}
	defer t.tasks.leave()
	who, err := t.keyring.lookup(t.ref)
	if err != nil {
		return grant{}, err
	}
	t.remember(who.secrets()...)
	g := grant{source: who.source}
	switch {
	case asked.scheme == "bearer":
		g, err = t.tokens.fetch(t.tasks.ctx, asked, who, t.hide)
		if err != nil {
			return grant{}, fmt.Errorf("token for %s: %w", t.ref.name(), t.advise(err, grant{source: who.source}))
		}
		t.remember(strings.TrimPrefix(g.header, "Bearer "))
	case who.username != "":
		g.header = "Basic " + who.basic()
	}
	t.mu.Lock()
	before := t.grants[asked]
	t.grants[asked] = g
	t.mu.Unlock()
	switch {
	case asked.scheme != "bearer":
	case before.header == "":
		t.happened(EventToken)
	default:
		t.happened(EventTokenRefresh)
	}
	return g, nil
}

// advise says what to do about a refusal for want of authority.
func (t *authTransport) advise(err error, g grant) error {
	status, ok := err.(*StatusError)
	if !ok || status.Code != http.StatusUnauthorized && status.Code != http.StatusForbidden {
		return err
	}
	if g.source == "" {
		status.Advice = fmt.Sprintf("no credentials for %s: the image may be private or not exist; log in with docker or podman, or give a user name and password", t.ref.Host)
	} else {
		status.Advice = fmt.Sprintf("the credentials for %s from %s were refused", t.ref.Host, g.source)
	}
	return status
}

// maxSecrets bounds what hide looks for; the newest are kept.
const maxSecrets = 16

// remember keeps secrets for hide. Very short ones would tear words apart.
func (t *authTransport) remember(secrets ...string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range secrets {
		if len(s) >= 4 {
			t.secrets = append(t.secrets, s)
		}
	}
	t.secrets = t.secrets[max(0, len(t.secrets)-maxSecrets):]
}

// hide takes out of a server's message what we sent to it in confidence.
func (t *authTransport) hide(s string) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, secret := range t.secrets {
		s = strings.ReplaceAll(s, secret, "REDACTED")
	}
	return s
}
