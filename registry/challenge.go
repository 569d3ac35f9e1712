package registry

import "strings"

// A challenge is what a registry asks for with a 401. It is comparable: what is
// granted is kept by it.
type challenge struct {
	scheme                string // "basic" or "bearer"
	realm, service, scope string
}

// pickChallenge chooses among the WWW-Authenticate headers: Bearer before
// Basic, everything else is passed over.
func pickChallenge(headers []string) (challenge, bool) {
	var found challenge
	for _, h := range headers {
		for _, a := range parseAuthHeader(h) {
			c := challenge{a.scheme, a.params["realm"], a.params["service"], a.params["scope"]}
			switch {
			case c.scheme == "bearer" && c.realm != "":
				return c, true
			case c.scheme == "basic" && found.scheme == "":
				// Only Bearer's realm is an address; Basic's is prose that may change.
				found = challenge{scheme: "basic"}
			}
		}
	}
	return found, found.scheme != ""
}

// An authParams is one challenge as it stands in a header; names are lower case.
type authParams struct {
	scheme string
	params map[string]string
}

// parseAuthHeader reads one WWW-Authenticate header by RFC 9110, 11.6.1: several
// challenges may stand in it, divided by the same commas that divide the
// parameters of each. What cannot be read ends the parse; what stood before it
// is returned.
func parseAuthHeader(s string) []authParams {
	var list []authParams
	for {
		s = strings.TrimLeft(s, " \t,")
		word, rest := cutToken(s)
		if word == "" {
			return list
		}
		name := strings.ToLower(word)
		value, rest, isParam := cutParamValue(rest)
		switch {
		case !isParam:
			list = append(list, authParams{scheme: name, params: map[string]string{}})
			rest = skipToken68(rest)
		case len(list) == 0:
			return nil
		default:
			params := list[len(list)-1].params
			if _, twice := params[name]; !twice {
				params[name] = value
			}
		}
		s = rest
	}
}

// cutParamValue reads = and a token or quoted string, if that is what s begins
// with; otherwise ok is false and rest is s.
func cutParamValue(s string) (value, rest string, ok bool) {
	t := strings.TrimLeft(s, " \t")
	if !strings.HasPrefix(t, "=") {
		return "", s, false
	}
	t = strings.TrimLeft(t[1:], " \t")
	if strings.HasPrefix(t, `"`) {
		return cutQuoted(t[1:])
	}
	value, rest = cutToken(t)
	return value, rest, true
}

// cutQuoted reads up to the closing quote; a string that is never closed is
// read to its end.
func cutQuoted(s string) (value, rest string, ok bool) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '"':
			return b.String(), s[i+1:], true
		case s[i] == '\\' && i+1 < len(s):
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String(), "", true
}

// skipToken68 passes over the bare credentials that some schemes have in place
// of parameters (Negotiate abc==).
func skipToken68(s string) string {
	t := strings.TrimLeft(s, " \t")
	end := strings.IndexAny(t, ", \t")
	if end < 0 {
		end = len(t)
	}
	bare := strings.TrimRight(t[:end], "=")
	if bare == "" || strings.ContainsAny(bare, `="`) || len(bare) == end && nextIsParam(t[end:]) {
		return s
	}
	return t[end:]
}

// nextIsParam reports whether s goes on with "=", that is, whether the word
// before it was a parameter's name.
func nextIsParam(s string) bool {
	return strings.HasPrefix(strings.TrimLeft(s, " \t"), "=")
}

// cutToken cuts an RFC 9110 token off the front of s.
func cutToken(s string) (token, rest string) {
	for i := 0; i < len(s); i++ {
		c := s[i]
		alnum := c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
		if !alnum && !strings.ContainsRune("!#$%&'*+-.^_`|~", rune(c)) {
			return s[:i], s[i:]
		}
	}
	return s, ""
}
