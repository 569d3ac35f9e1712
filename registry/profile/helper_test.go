package profile

import (
	"strings"
	"testing"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// digestOf is a digest of 64 times the same digit.
func digestOf(digit string) string { return "sha256:" + strings.Repeat(digit, 64) }

var da, db = digestOf("a"), digestOf("b")

// encoded is a profile as a file has it.
func encoded(t testing.TB, p *Profile) string {
	t.Helper()
	raw, err := p.Encode()
	must(t, err)
	return string(raw)
}

// parsed reads a profile in which A and B stand for two digests.
func parsed(t testing.TB, text string) *Profile {
	t.Helper()
	p, err := Parse([]byte(named(text)))
	must(t, err)
	return p
}

func named(text string) string {
	return strings.NewReplacer(`"A"`, `"`+da+`"`, `"B"`, `"`+db+`"`).Replace(text)
}
