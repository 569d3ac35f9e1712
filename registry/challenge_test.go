package registry

import (
	"testing"
)

func TestPickChallenge(t *testing.T) {
	for _, tc := range []struct {
		name    string
		headers []string
		want    challenge
		ok      bool
	}{
		{"docker hub", []string{`Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/busybox:pull"`},
			challenge{"bearer", "https://auth.docker.io/token", "registry.docker.io", "repository:library/busybox:pull"}, true},
		{"comma inside scope", []string{`Bearer realm="https://h/t", service="s", scope="repository:a:pull,push"`},
			challenge{"bearer", "https://h/t", "s", "repository:a:pull,push"}, true},
		{"other order, spaces, error parameter", []string{`bearer  scope = "x" ,error="invalid_token", realm="https://h/t"`},
			challenge{"bearer", "https://h/t", "", "x"}, true},
		{"escaped quotes", []string{`Bearer realm="https://h/t",service="a\"b\\c"`},
			challenge{"bearer", "https://h/t", `a"b\c`, ""}, true},
		{"unquoted value", []string{`Bearer realm="https://h/t",service=s.example`},
			challenge{"bearer", "https://h/t", "s.example", ""}, true},
		{"basic", []string{`Basic realm="a, b=c"`}, challenge{scheme: "basic"}, true},
		{"basic without realm", []string{`Basic`}, challenge{scheme: "basic"}, true},
		{"both in one header, bearer preferred", []string{`Basic realm="x", Bearer realm="https://h/t",service="s"`},
			challenge{"bearer", "https://h/t", "s", ""}, true},
		{"both in two headers", []string{`Basic realm="x"`, `Bearer realm="https://h/t"`},
			challenge{"bearer", "https://h/t", "", ""}, true},
		{"negotiate before basic", []string{`Negotiate YWJj==, Basic realm="x"`}, challenge{scheme: "basic"}, true},
		{"negotiate alone", []string{`Negotiate`}, challenge{}, false},
		{"empty elements", []string{`,, Basic realm="x",,`}, challenge{scheme: "basic"}, true},
		{"the first of two scopes", []string{`Bearer realm="https://h/t",scope="a",scope="b"`},
			challenge{"bearer", "https://h/t", "", "a"}, true},
		{"bearer without realm", []string{`Bearer service="s"`}, challenge{}, false},
		{"unclosed quote", []string{`Bearer realm="https://h/t`}, challenge{"bearer", "https://h/t", "", ""}, true},
		{"parameters of nothing", []string{`realm="https://h/t"`}, challenge{}, false},
		{"garbage", []string{`"`, `=`, `Bearer "x"`, "\x00", `\`, ``}, challenge{}, false},
		{"none", nil, challenge{}, false},
	} {
		got, ok := pickChallenge(tc.headers)
		if got != tc.want || ok != tc.ok {
			t.Errorf("%s: got %+v, %v; want %+v, %v", tc.name, got, ok, tc.want, tc.ok)
		}
	}
}

func FuzzChallenge(f *testing.F) {
	f.Add(`Bearer realm="https://h/t",service="s",scope="a,b"`)
	f.Add(`Negotiate abc==, Basic realm="x\"y"`)
	f.Fuzz(func(t *testing.T, s string) {
		for _, c := range parseAuthHeader(s) {
			if c.scheme == "" || len(c.scheme) > len(s) {
				t.Errorf("%q: scheme %q", s, c.scheme)
			}
		}
	})
}
