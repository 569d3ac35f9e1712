package registry

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.podman.io/image/v5/docker/reference"
	"go.podman.io/image/v5/pkg/sysregistriesv2"
	"go.podman.io/image/v5/types"
)

// mirrorPause is how long a mirror that failed comes after all others.
const mirrorPause = time.Minute

// A place is where a repository can be had: a mirror of it, or the registry
// itself.
type place struct {
	*session
	index  int // among the places of its source
	mirror bool
}

// A source is a repository with all its places: the mirrors that
// containers-registries.conf(5) names, in their order, and last the registry.
type source struct {
	ref    Reference
	places []*place
}

// source looks up where ref can be had. Which mirrors count may depend on
// whether ref has a digest.
func (c *Client) source(ref Reference) (*source, error) {
	src := &source{ref: ref}
	endpoints, err := c.endpoints(ref)
	if err != nil {
		return nil, err
	}
	for i, e := range endpoints {
		at, err := parseReference(e.Reference.String())
		if err != nil {
			return nil, fmt.Errorf("registries.conf: place %d of %s: %w", i, ref.name(), err)
		}
		mirror := i < len(endpoints)-1
		how := access{insecure: e.Endpoint.Insecure, namespace: e.Endpoint.NamespaceProxy, stranger: mirror && at.Host != ref.Host}
		src.add(c.session(at, how), mirror)
	}
	if len(endpoints) == 0 {
		src.add(c.session(ref, access{}), false)
	}
	return src, nil
}

func (s *source) add(at *session, mirror bool) {
	s.places = append(s.places, &place{session: at, index: len(s.places), mirror: mirror})
}

// endpoints is what the host's configuration says of ref; nothing where it does
// not name it.
func (c *Client) endpoints(ref Reference) ([]sysregistriesv2.PullSource, error) {
	named, err := reference.ParseNormalizedNamed(ref.String())
	if err != nil {
		return nil, nil // an IPv6 host, which the configuration cannot name
	}
	sys := &types.SystemContext{SystemRegistriesConfPath: c.registriesConf}
	if c.registriesConf != "" {
		sys.SystemRegistriesConfDirPath = c.registriesConf + ".d"
	}
	found, err := sysregistriesv2.FindRegistry(sys, named.Name())
	switch {
	case err != nil:
		return nil, fmt.Errorf("registries.conf: %w", err)
	case found == nil:
		return nil, nil
	case found.Blocked:
		return nil, fmt.Errorf("%s is blocked in registries.conf", found.Prefix)
	}
	if named, err = withDigest(named, ref); err != nil {
		return nil, err
	}
	sources, err := found.PullSourcesFromReference(named)
	if err != nil {
		return nil, fmt.Errorf("registries.conf: %w", err)
	}
	return sources, nil
}

// withDigest drops a tag beside a digest, as the library wants it.
func withDigest(named reference.Named, ref Reference) (reference.Named, error) {
	if ref.Digest == "" {
		return named, nil
	}
	return reference.WithDigest(reference.TrimNamed(named), ref.Digest)
}

// registry is the place that speaks for the repository.
func (s *source) registry() *place { return s.places[len(s.places)-1] }

// order has the mirrors that failed lately at the end.
func (s *source) order() []*place {
	if len(s.places) == 1 {
		return s.places
	}
	now := time.Now().UnixNano()
	var good, paused []*place
	for _, p := range s.places {
		if p.mirror && p.pausedUntil.Load() > now {
			paused = append(paused, p)
		} else {
			good = append(good, p)
		}
	}
	return append(good, paused...)
}

// try runs f at one place after the other until it succeeds. The error is the
// registry's own: a mirror that does not have an image says nothing about it.
func (s *source) try(ctx context.Context, f func(*place) error) error {
	if len(s.places) == 1 {
		return f(s.places[0])
	}
	var own error
	var others []error
	for _, p := range s.order() {
		err := f(p)
		if err == nil || ctx.Err() != nil {
			return err
		}
		if !p.mirror {
			own = err
			continue
		}
		p.leave(err)
		others = append(others, fmt.Errorf("mirror %s: %w", p.ref.Host, err))
	}
	return fmt.Errorf("%w; %s", own, clean(errors.Join(others...).Error(), maxErrorText))
}

// resolve runs f, which asks for one small thing and reads it whole, until it
// succeeds or patience ends. Each try goes round all places, none of which may
// use up the time of the others.
func (s *source) resolve(ctx context.Context, f func(context.Context, *place) error) error {
	wait := s.registry().resolving()
	return retry(ctx, wait, func(ctx context.Context) error {
		share := wait.watch() / time.Duration(len(s.places))
		return s.try(ctx, func(p *place) error {
			ctx, cancel := context.WithTimeoutCause(ctx, share, &wireError{errOutOfTime})
			defer cancel()
			return f(ctx, p)
		})
	})
}

// leave has a mirror come last for a while.
func (p *place) leave(err error) {
	if !p.mirror {
		return
	}
	now := time.Now()
	if p.pausedUntil.Swap(now.Add(mirrorPause).UnixNano()) > now.UnixNano() {
		return // another reader has said so
	}
	p.client.happened(EventMirrorLeft)
	p.client.log.Warn("mirror left", "mirror", p.ref.name(), "for", mirrorPause, "err", err)
}
