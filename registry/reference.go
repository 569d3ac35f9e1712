package registry

import (
	_ "crypto/sha256" // the digest package computes with what is linked in
	_ "crypto/sha512"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strings"

	"github.com/opencontainers/go-digest"
	"go.podman.io/image/v5/docker/reference"
)

// dockerHost is what the short names of Docker stand for; its API is served
// under another name.
const (
	dockerHost    = "docker.io"
	dockerAPIHost = "registry-1.docker.io"
)

// A Reference names an image: Host/Repository[:Tag][@Digest]. At least one of
// Tag and Digest is set. Where both are, the digest says which image is meant
// and the tag is only shown.
type Reference struct {
	Host       string // with the port where there is one; docker.io for short names
	Repository string
	Tag        string
	Digest     digest.Digest
}

// ParseReference reads what people type: the short names of Docker, a host with
// or without a port, a tag, a digest, or both. A leading docker:// is accepted.
func ParseReference(s string) (Reference, error) {
	rest := strings.TrimPrefix(s, "docker://")
	if err := refuseLookalikes(rest); err != nil {
		return Reference{}, fmt.Errorf("reference %q: %w", shownReference(s), err)
	}
	ref, err := parseReference(rest)
	if err != nil {
		return Reference{}, fmt.Errorf("reference %q: %w", shownReference(s), err)
	}
	return ref, nil
}

// String is the canonical form; ParseReference reads it back.
func (r Reference) String() string {
	s := r.Host + "/" + r.Repository
	if r.Tag != "" {
		s += ":" + r.Tag
	}
	if r.Digest != "" {
		s += "@" + r.Digest.String()
	}
	return s
}

// name is the key under which login files know the repository.
func (r Reference) name() string { return r.Host + "/" + r.Repository }

// apiHost is where the registry's API is served.
func (r Reference) apiHost() string {
	if r.Host == dockerHost {
		return dockerAPIHost
	}
	return r.Host
}

// target is the last element of the manifest's URL: the digest wins.
func (r Reference) target() string {
	if r.Digest != "" {
		return r.Digest.String()
	}
	return r.Tag
}

// validate holds for a Reference that was put together by hand, too: its fields
// become part of a URL.
func (r Reference) validate() error {
	again, err := ParseReference(r.String())
	if err != nil {
		return err
	}
	if again != r {
		return fmt.Errorf("reference %q: not in its canonical form %q", shownReference(r.String()), again)
	}
	return nil
}

func parseReference(s string) (Reference, error) {
	host6, s, err := cutIPv6Host(s)
	if err != nil {
		return Reference{}, err
	}
	named, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		return Reference{}, err
	}
	named = reference.TagNameOnly(named)
	ref := Reference{Host: reference.Domain(named), Repository: reference.Path(named)}
	if host6 != "" {
		ref.Host = host6
	}
	if t, ok := named.(reference.Tagged); ok {
		ref.Tag = t.Tag()
	}
	if d, ok := named.(reference.Digested); ok {
		ref.Digest = d.Digest()
		if err := checkDigest(ref.Digest); err != nil {
			return Reference{}, err
		}
	}
	return ref, nil
}

// ipv6Stand stands in for a literal IPv6 host, which the reference grammar of
// the image library does not know.
const ipv6Stand = "ipv6.invalid"

// cutIPv6Host returns the host [addr] or [addr]:port that s begins with, and s
// with ipv6Stand in its place; without one, "" and s.
func cutIPv6Host(s string) (host, rest string, err error) {
	if !strings.HasPrefix(s, "[") {
		return "", s, nil
	}
	host, path, ok := strings.Cut(s, "/")
	if !ok {
		return "", "", errors.New("no repository after the host")
	}
	addr, port, ok := strings.Cut(strings.TrimPrefix(host, "["), "]")
	ip, err := netip.ParseAddr(addr)
	if !ok || err != nil || !ip.Is6() || ip.Zone() != "" {
		return "", "", fmt.Errorf("%q is not an IPv6 address in brackets", host)
	}
	return host, ipv6Stand + port + "/" + path, nil
}

// refuseLookalikes names the usual mistakes, for which the grammar would only
// say "invalid reference format".
func refuseLookalikes(s string) error {
	switch {
	case s == "":
		return errors.New("is empty; want [HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]")
	case strings.Contains(s, "://"):
		return errors.New("is a URL; leave the scheme out: [HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]")
	case hasUserinfo(s):
		return errors.New("credentials do not belong in a reference; log in, or give a user name and a password on their own")
	}
	return nil
}

var digestLike = regexp.MustCompile(`^[A-Za-z0-9+._-]+:[0-9a-fA-F]*$`)

// hasUserinfo reports whether s looks like user:password@host/repository.
func hasUserinfo(s string) bool {
	before, after, ok := strings.Cut(s, "@")
	return ok && !strings.Contains(before, "/") && !digestLike.MatchString(after)
}

// shownReference is s as it may be quoted in an error: without a password that
// was put into it, and not endless.
func shownReference(s string) string {
	if scheme, rest, ok := strings.Cut(s, "://"); ok {
		return scheme + "://" + shownReference(rest)
	}
	s, _, _ = strings.Cut(s, "?")
	if hasUserinfo(s) {
		_, after, _ := strings.Cut(s, "@")
		s = "REDACTED@" + after
	}
	return clean(s, 300)
}

// checkDigest accepts the two algorithms that the image specification
// registers and whose strength nobody doubts.
func checkDigest(d digest.Digest) error {
	// Validate goes first: the other methods panic on what is no digest.
	if err := d.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w", clean(string(d), 160), err)
	}
	if a := d.Algorithm(); a != digest.SHA256 && a != digest.SHA512 {
		return fmt.Errorf("digest %q: algorithm is not sha256 or sha512", clean(string(d), 160))
	}
	return nil
}
