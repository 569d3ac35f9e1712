package main

import (
	"errors"
	"fmt"
	"net/http"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/registry"
)

// offlineFlag has commands read what is kept, and nothing else.
func offlineFlag() cli.Flag {
	return &cli.BoolFlag{Name: "offline", Usage: "ask the registry for nothing: take the image that REF led to the last time, as far as it is kept"}
}

var (
	errOffline      = errors.New("it is not kept on this machine, and --offline forbids to fetch it; do without --offline")
	errNeverMounted = errors.New("--offline: this reference was not mounted before on this machine by this user, from the same mirrors and with the same demands on TLS; mount it once without --offline")
)

// A noNetwork answers no request. Nobody is meant to send one; should somebody, it goes nowhere.
type noNetwork struct{}

func (noNetwork) RoundTrip(*http.Request) (*http.Response, error) { return nil, errOffline }

// goOffline has the client send nothing, and know nobody's credentials.
func (s *sourceOptions) goOffline() {
	s.offline = true
	s.client.Username, s.client.Password, s.client.AuthFile = "", "", ""
	s.client.Transport, s.client.ResolveWait = noNetwork{}, registry.NoWait
}

// offlineOption reads --offline, which contradicts what needs a network.
func (s *sourceOptions) offlineOption(c *cli.Context) error {
	if !c.Bool("offline") {
		return nil
	}
	if c.Bool("probe") {
		return usagef("--probe asks the registry, and --offline forbids that")
	}
	s.goOffline()
	return nil
}

// unlistedBlob is the blob that the user named, if it is in no layer of the image: of its size nobody knows but the
// cache.
func (o *opened) unlistedBlob(s *sourceOptions) (l registry.Layer, unlisted bool, err error) {
	d := s.selector.Blob
	if d == "" || slices.ContainsFunc(o.image.Layers, func(l registry.Layer) bool { return l.Digest == d }) {
		return registry.Layer{}, false, nil
	}
	l = registry.Layer{Index: -1, Descriptor: ocispec.Descriptor{Digest: d, MediaType: "application/octet-stream"}}
	l.Size, err = o.keptSize(s.ref.registry, d)
	return l, true, err
}

// keptSize is the size of a blob of which nothing but the digest is known.
func (o *opened) keptSize(ref registry.Reference, d digest.Digest) (int64, error) {
	b, err := o.client.Blob(ref, ocispec.Descriptor{Digest: d})
	if err != nil {
		return 0, err
	}
	sizes, err := o.cache.Sizes(d.String(), plain(b))
	switch {
	case err != nil:
	case len(sizes) == 1:
		return sizes[0], nil
	case len(sizes) == 0:
		err = errOffline
	default: // manifests lied about one of them, and it was read all the same
		err = fmt.Errorf("--offline: it is kept with %d different sizes, and only the registry knows which is right; do without --offline", len(sizes))
	}
	return 0, fmt.Errorf("blob %s: %w", d, err)
}

// chooseOffline is chooseLayers for who may ask nobody.
func (o *opened) chooseOffline(s *sourceOptions) ([]registry.Layer, error) {
	if l, unlisted, err := o.unlistedBlob(s); unlisted {
		return []registry.Layer{l}, err
	}
	return o.image.ErofsLayers(s.selector)
}

// sayMissing says of which layers not all is here.
func (o *opened) sayMissing(say func(format string, args ...any)) {
	for i := range o.layers {
		l := &o.layers[i]
		here, all := l.blob.here()
		switch {
		case here < all:
			say("%s: %d%% of it is here; reads of the rest fail", l.name(), int64(float64(here)/float64(all)*100))
		case l.blob.unverifiable():
			say("%s: all of it is here, but not all of what it is verified by; some reads fail", l.name())
		}
	}
}

// here is how much of the file system is here. A tree behind it is no part of that: nobody reads it there.
func (s *layerSource) here() (n, all int64) {
	all = s.size
	if s.treeAt > 0 {
		all = min(all, s.treeAt)
	}
	for off := int64(0); off < all; {
		present, end := s.Present(off)
		if end = min(end, all); present {
			n += end - off
		}
		off = end
	}
	return n, all
}

// unverifiable says that what parts are verified by is not all here.
func (s *layerSource) unverifiable() bool {
	return s.by == byTree && slices.ContainsFunc(s.beside, func(t *throughCache) bool { return t.missing() > 0 })
}

// lacks says that something of a range of the part is missing, and that nobody may fetch it.
func (t *throughCache) lacks(off, n int64) bool {
	if !t.offline || t.kept == nil {
		return false
	}
	for end := off + n; off < end; {
		present, next := t.kept.Present(off)
		if !present {
			return true
		}
		off = next
	}
	return false
}

// wholeIsHere refuses a layer that is read as a whole, and is not here as a whole.
func (t *throughCache) wholeIsHere() error {
	if !t.offline {
		return nil
	}
	missing := t.Size()
	if t.kept != nil {
		missing = t.missing()
	}
	if missing > 0 {
		return fmt.Errorf("it is read as a whole, and %d of its %d bytes are missing: %w", missing, t.Size(), errOffline)
	}
	return nil
}
