package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Selector says which part of an image is meant. The zero value is the only
// EROFS layer of the image for this machine's platform.
type Selector struct {
	Platform string        // os/arch[/variant]; "" is the host's
	Layer    *int          // by number, from 0
	Blob     digest.Digest // by digest; it need not be in the manifest
	Prefer   Prefer        // between entries of an index for the same architecture
}

// Prefer says which of two index entries for the same architecture is taken.
type Prefer int

const (
	PreferErofs Prefer = iota // the one whose os.features say that it holds EROFS
	PreferTar                 // the other
)

// An Image is one resolved manifest.
type Image struct {
	Reference   Reference
	Digest      digest.Digest // of the manifest
	IndexDigest digest.Digest // of the index that the reference led to; "" without one
	MediaType   string        // of the manifest
	Platform    string        // as the index says; "" where it does not
	Config      ocispec.Descriptor
	Layers      []Layer

	Manifest Document  // the bytes of which Digest is
	Index    *Document // the bytes of which IndexDigest is; nil without an index

	name string // where it was found, for errors
}

// A Layer is a layer as the manifest has it. Nothing in it has been checked.
type Layer struct {
	Index int // in the manifest; -1 for a blob that is not in it
	ocispec.Descriptor
}

// errNotListed: the blob that was asked for is not among the layers.
var errNotListed = errors.New("no layer has this digest")

// ErofsLayer chooses the layer that sel means: by number, by digest, or the only
// EROFS layer there is. A layer that is named may have any media type that can
// be a raw image; its bytes have to tell. Otherwise the error says what the
// image holds.
func (im *Image) ErofsLayer(sel Selector) (Layer, error) {
	l, err := im.choose(sel)
	if err != nil {
		return Layer{}, fmt.Errorf("%s: %w", im.Reference, err)
	}
	return l, nil
}

// ErofsLayer is Image.ErofsLayer, but asks the registry for a Selector.Blob that
// is not in the manifest.
func (c *Client) ErofsLayer(ctx context.Context, im *Image, sel Selector) (Layer, error) {
	l, err := im.ErofsLayer(sel)
	if !errors.Is(err, errNotListed) {
		return l, err
	}
	desc, err := c.Stat(ctx, im.Reference, sel.Blob)
	return Layer{Index: -1, Descriptor: desc}, err
}

func (im *Image) choose(sel Selector) (Layer, error) {
	switch {
	case sel.Layer != nil && sel.Blob != "":
		return Layer{}, errors.New("a layer by number and a blob by digest were asked for; give one")
	case sel.Layer != nil:
		return im.byNumber(*sel.Layer)
	case sel.Blob != "":
		return im.byDigest(sel.Blob)
	}
	return im.onlyErofs()
}

func (im *Image) byNumber(n int) (Layer, error) {
	if n < 0 || n >= len(im.Layers) {
		return Layer{}, fmt.Errorf("no layer %d; the image holds %s", n, im.inventory())
	}
	return im.Layers[n], im.refuse(im.Layers[n], true)
}

func (im *Image) byDigest(d digest.Digest) (Layer, error) {
	if err := checkDigest(d); err != nil {
		return Layer{}, err
	}
	i := slices.IndexFunc(im.Layers, func(l Layer) bool { return l.Digest == d })
	if i < 0 {
		return Layer{}, fmt.Errorf("blob %s: %w; the image holds %s", d, errNotListed, im.inventory())
	}
	return im.Layers[i], im.refuse(im.Layers[i], true)
}

func (im *Image) onlyErofs() (Layer, error) {
	var found []Layer
	for _, l := range im.Layers {
		kind := layerKindOf(l.MediaType)
		if (kind == kindErofs || kind == kindErofsZstd) && l.Annotations[annotationRole] != roleDevice {
			found = append(found, l)
		}
	}
	switch len(found) {
	case 1:
		return found[0], im.refuse(found[0], false)
	case 0:
		return Layer{}, im.noErofs()
	}
	return Layer{}, fmt.Errorf("%d EROFS layers; name one by number or by digest: the image holds %s", len(found), im.inventory())
}

// refuse says why a layer cannot be mounted, as far as its descriptor tells.
func (im *Image) refuse(l Layer, named bool) error {
	kind := layerKindOf(l.MediaType)
	what := fmt.Sprintf("layer %d is %s", l.Index, shownType(l.MediaType))
	switch {
	case kind == kindErofsOther:
		return fmt.Errorf("%s, which is not a mountable image; this version mounts %s and %s", what, MediaTypeErofs, MediaTypeErofsZstd)
	case kind == kindCompressed:
		return im.noErofsBut(what)
	case (kind == kindErofs || kind == kindErofsZstd) && !named && l.Size == 0:
		return fmt.Errorf("%s, but empty", what)
	}
	return nil
}

// noErofs names the first layer, which is what people mean by "the image".
func (im *Image) noErofs() error {
	if len(im.Layers) == 0 {
		return errors.New("the image has no layers")
	}
	return im.noErofsBut(fmt.Sprintf("layer 0 is %s", shownType(im.Layers[0].MediaType)))
}

func (im *Image) noErofsBut(what string) error {
	s := what + ", not an EROFS image"
	if len(im.Layers) > 1 {
		s += "; the image holds " + im.inventory()
	}
	return errors.New(s + "; give an image with a layer of type " + MediaTypeErofs)
}

// inventory lists the layers for an error.
func (im *Image) inventory() string {
	const most = 8
	if len(im.Layers) == 0 {
		return "no layers"
	}
	var list []string
	for _, l := range im.Layers[:min(len(im.Layers), most)] {
		list = append(list, fmt.Sprintf("layer %d %s (%d bytes)", l.Index, shownType(l.MediaType), l.Size))
	}
	if more := len(im.Layers) - most; more > 0 {
		list = append(list, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(list, ", ")
}

func shownType(t string) string {
	if t = clean(t, 120); t != "" {
		return t
	}
	return "of no media type"
}

// Stat asks the registry for the size of a blob in the repository of ref.
func (c *Client) Stat(ctx context.Context, ref Reference, d digest.Digest) (ocispec.Descriptor, error) {
	b, err := c.Blob(ref, ocispec.Descriptor{Digest: d})
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{Digest: d, MediaType: "application/octet-stream"}
	err = b.source.resolve(ctx, func(ctx context.Context, p *place) error {
		desc.Size, err = b.askSize(ctx, p)
		return err
	})
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("blob %s in %s: %w", d, ref.name(), err)
	}
	return desc, nil
}

// askSize takes the Content-Length of a HEAD. Where HEAD does not work, as with
// URLs that are signed for GET, the first byte comes with the size of the rest.
func (b *Blob) askSize(ctx context.Context, p *place) (int64, error) {
	resp, err := p.do(ctx, http.MethodHead, b.path(), http.Header{"Accept-Encoding": {"identity"}})
	if err != nil {
		return 0, err
	}
	_ = resp.Body.Close() // a HEAD has none
	switch {
	case resp.StatusCode == http.StatusOK && resp.ContentLength >= 0 && checkIdentity(resp) == nil:
		return resp.ContentLength, nil
	case resp.StatusCode == http.StatusNotFound:
		return 0, statusError(resp, p.auth.hide)
	}
	resp, err = p.do(ctx, http.MethodGet, b.path(), rangeHeader(0, 1))
	if err != nil {
		return 0, err
	}
	if resp.StatusCode != http.StatusPartialContent && resp.StatusCode != http.StatusOK {
		return 0, statusError(resp, p.auth.hide)
	}
	_ = resp.Body.Close() // only the header matters
	if err := checkIdentity(resp); err != nil {
		return 0, err
	}
	if resp.StatusCode == http.StatusOK && resp.ContentLength >= 0 {
		return resp.ContentLength, nil
	}
	r, err := parseContentRange(resp.Header.Get("Content-Range"))
	if err != nil {
		return 0, fmt.Errorf("the registry does not say how long it is: %w", err)
	}
	return r.total, nil
}

// ImageConfig fetches the image's configuration and verifies it. Where the
// manifest's config is not an image configuration, as with artifacts, the error
// is errors.ErrUnsupported.
func (c *Client) ImageConfig(ctx context.Context, im *Image) (*ocispec.Image, error) {
	if !isImageConfigType(im.Config.MediaType) {
		return nil, fmt.Errorf("%s: config is %s: %w", im.Reference, shownType(im.Config.MediaType), errors.ErrUnsupported)
	}
	b, err := c.Blob(im.Reference, im.Config)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	var raw []byte
	err = b.source.resolve(ctx, func(ctx context.Context, p *place) error {
		raw, err = b.small(ctx, p, maxConfig)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%s: config: %w", im.Reference, err)
	}
	config := new(ocispec.Image)
	if err := json.Unmarshal(raw, config); err != nil {
		return nil, fmt.Errorf("%s: config %s: %w", im.Reference, im.Config.Digest, err)
	}
	return config, nil
}

// small fetches the whole blob from p and verifies it.
func (b *Blob) small(ctx context.Context, p *place, limit int64) ([]byte, error) {
	resp, err := p.get(ctx, b.path(), http.Header{"Accept-Encoding": {"identity"}})
	if err != nil {
		return nil, err
	}
	raw, err := readBounded(resp, limit)
	if err != nil {
		return nil, err
	}
	if got := b.desc.Digest.Algorithm().FromBytes(raw); got != b.desc.Digest {
		return nil, fmt.Errorf("asked for %s, received bytes have %s", b.desc.Digest, got)
	}
	return raw, nil
}

// checkPlatform holds an image that no index vouches for against a platform that
// the user insists on. An image that does not say what it is for passes.
func (c *Client) checkPlatform(ctx context.Context, im *Image, want platform) error {
	config, err := c.ImageConfig(ctx, im)
	if errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	if err != nil {
		return err
	}
	if config.OS == "" && config.Architecture == "" {
		return nil
	}
	is := platformOf(&config.Platform)
	if !slices.Contains(want.accepts(), is) {
		return fmt.Errorf("the image is for %s, not for %s", clean(is.String(), maxPlatformText), want)
	}
	im.Platform = clean(is.String(), maxPlatformText)
	return nil
}
