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

// A Selector says which part of an image is meant. The zero value is all EROFS
// layers of the image for this machine's platform.
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

	Entry  *ocispec.Descriptor // of the index that names the manifest; nil without an index
	Config ocispec.Descriptor
	Layers []Layer

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

// ErofsLayers chooses the layers that sel means, the lowest first: the one that it
// names, by number or by digest, or all EROFS layers there are, to be laid over each
// other. A layer that is named may have any media type that can be a raw image; its
// bytes have to tell. Otherwise the error says what the image holds.
func (im *Image) ErofsLayers(sel Selector) ([]Layer, error) {
	l, err := im.choose(sel)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", im.where(), err)
	}
	return l, nil
}

// ErofsLayer is ErofsLayers for who can use one layer only: several are an error.
func (im *Image) ErofsLayer(sel Selector) (Layer, error) {
	chosen, err := im.ErofsLayers(sel)
	if err != nil {
		return Layer{}, err
	}
	return im.OneLayer(chosen)
}

// OneLayer is the layer among those that ErofsLayers chose, if it is one.
func (im *Image) OneLayer(chosen []Layer) (Layer, error) {
	if len(chosen) > 1 {
		return Layer{}, fmt.Errorf("%s: %d EROFS layers; name one by number or by digest: the image holds %s", im.Reference, len(chosen), im.inventory())
	}
	return chosen[0], nil
}

// ErofsLayers is Image.ErofsLayers, but asks the registry for a Selector.Blob that
// is not in the manifest.
func (c *Client) ErofsLayers(ctx context.Context, im *Image, sel Selector) ([]Layer, error) {
	chosen, err := im.ErofsLayers(sel)
	if !errors.Is(err, errNotListed) {
		return chosen, err
	}
	desc, err := c.Stat(ctx, im.Reference, sel.Blob)
	return []Layer{{Index: -1, Descriptor: desc}}, err
}

func (im *Image) choose(sel Selector) ([]Layer, error) {
	var l Layer
	var err error
	switch {
	case sel.Layer != nil && sel.Blob != "":
		return nil, errors.New("a layer by number and a blob by digest were asked for; give one")
	case sel.Layer != nil:
		l, err = im.byNumber(*sel.Layer)
	case sel.Blob != "":
		l, err = im.byDigest(sel.Blob)
	default:
		return im.allErofs()
	}
	return []Layer{l}, err
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

// allErofs are the layers that make the file system. What lies among several of them
// and is no EROFS layer would be missing in it.
func (im *Image) allErofs() ([]Layer, error) {
	var found []Layer
	others := ""
	for _, l := range im.Layers {
		if err := refuseRole(l); err != nil {
			return nil, err
		}
		switch kind := layerKindOf(l.MediaType); {
		case kind == kindErofs || kind == kindErofsZstd:
			found = append(found, l)
		case kind == kindCompressed || isTarType(l.MediaType):
			others = fmt.Sprintf("layer %d is %s", l.Index, shownType(l.MediaType))
		}
	}
	if len(found) == 0 {
		return nil, im.noErofs()
	}
	if len(found) > 1 && others != "" {
		return nil, fmt.Errorf("%d EROFS layers, but %s, and would be missing; name one by number or by digest: the image holds %s", len(found), others, im.inventory())
	}
	for _, l := range found {
		if err := im.refuse(l, false); err != nil {
			return nil, err
		}
	}
	return found, nil
}

// refuseRole says whether a layer is there for another, which this version cannot
// put together.
func refuseRole(l Layer) error {
	role := l.Annotations[annotationRole]
	what := ""
	switch role {
	case "", roleLower:
		return nil
	case roleDevice:
		what = "an extra device of the layer after it"
	case roleData:
		what = "data that other layers refer to"
	default:
		what = "a part that is not known here"
	}
	return fmt.Errorf("layer %d is %s (%s=%s), and this version mounts no images with such layers", l.Index, what, annotationRole, clean(role, 40))
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

// where names the image in an error.
func (im *Image) where() string {
	if im.name != "" {
		return im.name
	}
	return im.Reference.String()
}

// ImageConfigIn fetches the image's configuration from the store where im was found,
// and verifies it. Where the manifest's config is not an image configuration, as with
// artifacts, the error is errors.ErrUnsupported.
func ImageConfigIn(ctx context.Context, s Store, im *Image) (*ocispec.Image, error) {
	config, err := im.readConfig(ctx, finderOf(s))
	if err != nil {
		return nil, fmt.Errorf("%s: config: %w", im.where(), err)
	}
	return config, nil
}

func (im *Image) readConfig(ctx context.Context, f finder) (*ocispec.Image, error) {
	if !isImageConfigType(im.Config.MediaType) {
		return nil, fmt.Errorf("is %s: %w", shownType(im.Config.MediaType), errors.ErrUnsupported)
	}
	raw, err := f.small(ctx, im.Config, maxConfig)
	if err != nil {
		return nil, err
	}
	config := new(ocispec.Image)
	if err := json.Unmarshal(raw, config); err != nil {
		return nil, fmt.Errorf("%s: %w", im.Config.Digest, err)
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
func (im *Image) checkPlatform(ctx context.Context, f finder, want platform) error {
	config, err := im.readConfig(ctx, f)
	if errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("config: %w", err)
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
