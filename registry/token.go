package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
)

const (
	tokenClientID = "erofs-oci"
	tokenTimeout  = 30 * time.Second
	maxTokenBody  = 1 << 20

	// A token service that does not say how long its token lives means this.
	tokenDefaultLife = 60 * time.Second
	tokenLongestLife = 24 * time.Hour
	// A token is taken for expired a little early: by this much, or by a fifth
	// of its life where that is less.
	tokenMargin = 10 * time.Second
)

// A tokenService fetches bearer tokens from the realm that a challenge names.
type tokenService struct {
	next      http.RoundTripper
	plainHTTP bool
	origin    func(context.Context) (*url.URL, error) // of the registry that asks
}

func (s *tokenService) fetch(ctx context.Context, asked challenge, who credentials, hide func(string) string) (grant, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, tokenTimeout, &wireError{errors.New("no token")})
	defer cancel()
	req, err := s.request(ctx, asked, who)
	if err != nil {
		return grant{}, err
	}
	asking := time.Now()
	resp, err := s.next.RoundTrip(req.WithContext(withKind(ctx, KindToken)))
	if err != nil {
		return grant{}, err
	}
	if resp.StatusCode != http.StatusOK {
		return grant{}, statusError(resp, hide)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxTokenBody))
	if err != nil {
		return grant{}, err
	}
	token, life, err := parseToken(body)
	if err != nil {
		return grant{}, fmt.Errorf("%s: %w", redact(req.URL), err)
	}
	expires := asking.Add(life - min(tokenMargin, life/5))
	return grant{header: "Bearer " + token, expires: expires, source: who.source}, nil
}

// request builds the GET of the distribution token specification, with Basic
// credentials if there are any, or the POST that takes an identity token.
func (s *tokenService) request(ctx context.Context, asked challenge, who credentials) (*http.Request, error) {
	realm, err := s.realm(ctx, asked.realm)
	if err != nil {
		return nil, err
	}
	if who.identityToken != "" {
		form := url.Values{
			"grant_type": {"refresh_token"}, "refresh_token": {who.identityToken},
			"service": {asked.service}, "client_id": {tokenClientID},
		}
		if asked.scope != "" {
			form.Set("scope", asked.scope)
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, realm.String(), strings.NewReader(form.Encode()))
		if err != nil {
			return nil, errors.New("token realm is not a URL")
		}
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		return req, nil
	}
	query := realm.Query()
	query.Set("client_id", tokenClientID)
	if asked.service != "" {
		query.Set("service", asked.service)
	}
	for _, scope := range strings.Fields(asked.scope) {
		query.Add("scope", scope)
	}
	if who.username != "" {
		query.Set("account", who.username)
	}
	realm.RawQuery = query.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, realm.String(), nil)
	if err != nil {
		return nil, errors.New("token realm is not a URL")
	}
	if who.username != "" {
		req.Header.Set("Authorization", "Basic "+who.basic())
	}
	return req, nil
}

// realm checks where a challenge wants the credentials to go: to an HTTPS
// address, or, if the registry itself is spoken to in plain HTTP, to a loopback
// address or wherever plain HTTP was allowed.
func (s *tokenService) realm(ctx context.Context, address string) (*url.URL, error) {
	u, err := url.Parse(address)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
		return nil, errors.New("registry names a token realm that is not an http or https address")
	}
	u.User, u.Fragment = nil, ""
	if u.Scheme == "https" {
		return u, nil
	}
	origin, err := s.origin(ctx)
	if err != nil {
		return nil, err
	}
	if origin.Scheme != "http" || !s.plainHTTP && !IsLoopback(u.Host) {
		return nil, fmt.Errorf("token realm %s refused: credentials are not sent over plain HTTP", redact(u))
	}
	return u, nil
}

func parseToken(body []byte) (token string, life time.Duration, err error) {
	var doc struct {
		Token       string  `json:"token"`
		AccessToken string  `json:"access_token"`
		ExpiresIn   float64 `json:"expires_in"`
	}
	if err := json.Unmarshal(body, &doc); err != nil {
		// The decoder's error may quote what it stumbled over.
		return "", 0, errors.New("token answer is not the JSON that it should be")
	}
	token = doc.Token
	if token == "" {
		token = doc.AccessToken
	}
	unfit := func(r rune) bool { return r <= ' ' || r > '~' }
	if token == "" || strings.ContainsFunc(token, unfit) {
		return "", 0, errors.New("token answer holds no usable token")
	}
	life = tokenDefaultLife
	if doc.ExpiresIn > 0 {
		life = time.Duration(min(doc.ExpiresIn, tokenLongestLife.Seconds()) * float64(time.Second))
	}
	return token, life, nil
}
