package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// maxManifest is what containerd and the image library accept, too.
	maxManifest = 4 << 20
	// maxConfig bounds an image configuration; real ones are a few KiB.
	maxConfig = 4 << 20
	// maxIndexDepth bounds indexes within indexes.
	maxIndexDepth = 4
	// maxPlatformText bounds a platform that a server made up.
	maxPlatformText = 60
)

// Resolve finds the manifest that ref means for the platform of sel, through as
// many indexes as lie in between. Every document is verified against the digest
// that asked for it. Which layer to use is Image.ErofsLayer's matter.
func (c *Client) Resolve(ctx context.Context, ref Reference, sel Selector) (*Image, error) {
	return ResolveIn(ctx, c.Repository(ref), "", sel)
}

// ResolveIn is Client.Resolve in any store, from the document that target names.
func ResolveIn(ctx context.Context, s Store, target string, sel Selector) (*Image, error) {
	want, err := parsePlatform(sel.Platform)
	if err != nil {
		return nil, err
	}
	f := finderOf(s)
	im := &Image{name: f.title(target)}
	if r, ok := s.(interface {
		at(target string) (Reference, error)
	}); ok { // a Repository, or a Kept
		if im.Reference, err = r.at(target); err != nil {
			return nil, err
		}
	}
	err = im.resolve(ctx, f, target, want, sel.Prefer)
	if err == nil && sel.Platform != "" && im.Index == nil {
		err = im.checkPlatform(ctx, f, want)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", im.name, err)
	}
	return im, nil
}

// resolve walks from target down to one manifest.
func (im *Image) resolve(ctx context.Context, f finder, target string, want platform, prefer Prefer) error {
	doc, err := f.document(ctx, target, "")
	if err != nil {
		return err
	}
	for depth := 0; doc.index != nil; depth++ {
		if depth == maxIndexDepth {
			return fmt.Errorf("more than %d indexes within each other", maxIndexDepth)
		}
		if im.Index == nil {
			top := doc.Document
			im.Index, im.IndexDigest = &top, top.Digest
		}
		i := choose(doc.index.Manifests, want, prefer)
		if i < 0 {
			return fmt.Errorf("index %s holds nothing for %s, only %s", doc.Digest, want, listPlatforms(doc.index.Manifests))
		}
		next := doc.index.Manifests[i]
		if err := checkDigest(next.Digest); err != nil {
			return fmt.Errorf("index %s, entry %d: %w", doc.Digest, i, err)
		}
		im.Entry = &next
		if next.Platform != nil {
			im.Platform = clean(platformOf(next.Platform).String(), maxPlatformText)
		}
		if doc, err = f.document(ctx, next.Digest.String(), next.MediaType); err != nil {
			return err
		}
	}
	im.Manifest, im.Digest, im.MediaType = doc.Document, doc.Digest, doc.MediaType
	im.Config = doc.manifest.Config
	for i, d := range doc.manifest.Layers {
		if err := checkBlob(d); err != nil {
			return fmt.Errorf("manifest %s, layer %d: %w", doc.Digest, i, err)
		}
		im.Layers = append(im.Layers, Layer{Index: i, Descriptor: d})
	}
	return nil
}

// listPlatforms names what an index holds, for an error.
func listPlatforms(entries []ocispec.Descriptor) string {
	const most = 12
	var names []string
	for _, e := range entries {
		name := "an entry without a platform"
		if e.Platform != nil {
			name = clean(platformOf(e.Platform).String(), maxPlatformText)
		}
		if len(names) == most {
			names = append(names, fmt.Sprintf("and %d more", len(entries)-most))
			break
		}
		names = append(names, name)
	}
	if len(names) == 0 {
		return "an empty list"
	}
	return strings.Join(names, ", ")
}

// A document is a Document that was read; exactly one of index and manifest is
// set.
type document struct {
	Document
	index    *ocispec.Index
	manifest *ocispec.Manifest
}

// manifest fetches, verifies and reads one document. want is the digest that it
// must have, "" for a tag; declared is the media type that its descriptor gave.
func (s *source) manifest(ctx context.Context, target string, want digest.Digest, declared string) (doc document, err error) {
	err = s.resolve(ctx, func(ctx context.Context, p *place) error {
		doc, err = p.manifest(ctx, target, want, declared)
		return err
	})
	if err != nil {
		return document{}, fmt.Errorf("manifest %s: %w", target, err)
	}
	return doc, nil
}

func (s *session) manifest(ctx context.Context, target string, want digest.Digest, declared string) (document, error) {
	resp, err := s.get(ctx, "manifests/"+target, http.Header{"Accept": {manifestAccept}})
	if err != nil {
		return document{}, err
	}
	raw, err := readBounded(resp, maxManifest)
	if err != nil {
		return document{}, err
	}
	d, err := verifyManifest(raw, want, resp.Header.Get("Docker-Content-Digest"))
	if err != nil {
		return document{}, err
	}
	return readDocument(raw, d, contentType(resp.Header), declared)
}

// readDocument reads raw, which was verified to have the digest d.
func readDocument(raw []byte, d digest.Digest, contentType, declared string) (document, error) {
	doc, err := parseManifest(raw, contentType, declared)
	doc.Digest, doc.Size, doc.Raw = d, int64(len(raw)), raw
	return doc, err
}

// verifyManifest computes the digest of raw and holds it against the one that
// was asked for, or else, for a tag, against the one that the server claims.
func verifyManifest(raw []byte, want digest.Digest, claimed string) (digest.Digest, error) {
	who := "asked for"
	if want == "" && claimed != "" {
		want, who = digest.Digest(claimed), "Docker-Content-Digest says"
		if err := checkDigest(want); err != nil {
			return "", fmt.Errorf("Docker-Content-Digest: %w", err)
		}
	}
	if want == "" {
		return digest.FromBytes(raw), nil
	}
	if got := want.Algorithm().FromBytes(raw); got != want {
		return "", fmt.Errorf("%s %s, but the %d bytes received have %s", who, want, len(raw), got)
	}
	return want, nil
}

func contentType(h http.Header) string {
	t, _, err := mime.ParseMediaType(h.Get("Content-Type"))
	if err != nil {
		return "" // then the document itself has to tell
	}
	return t
}

// parseManifest reads a document. What it is, its own mediaType says; where that
// is missing, the descriptor that led to it, the Content-Type, and at last its
// shape. The shape must agree in any case: a document that is both an index and
// a manifest would mean different images to different readers.
func parseManifest(raw []byte, contentType, declared string) (document, error) {
	var shape struct {
		SchemaVersion int             `json:"schemaVersion"`
		MediaType     string          `json:"mediaType"`
		Manifests     json.RawMessage `json:"manifests"`
		Config        json.RawMessage `json:"config"`
		Layers        json.RawMessage `json:"layers"`
		FSLayers      json.RawMessage `json:"fsLayers"`
	}
	if err := json.Unmarshal(raw, &shape); err != nil {
		return document{}, fmt.Errorf("not JSON of the right form: %w", err)
	}
	mediaType := shape.MediaType
	for _, t := range []string{declared, contentType} {
		if mediaType == "" && (isIndexType(t) || isManifestType(t)) {
			mediaType = t
		}
	}
	likeIndex, likeManifest := shape.Manifests != nil, shape.Config != nil || shape.Layers != nil
	switch {
	case shape.SchemaVersion == 1, shape.FSLayers != nil, strings.HasPrefix(contentType, prefixDockerSchema1):
		return document{}, errors.New("is of Docker's old schema 1; push the image again with a present-day tool")
	case likeIndex && likeManifest:
		return document{}, errors.New("is an index and a manifest at once; refused")
	case mediaType == "" && likeIndex:
		mediaType = ocispec.MediaTypeImageIndex
	case mediaType == "" && likeManifest:
		mediaType = ocispec.MediaTypeImageManifest
	}
	doc := document{Document: Document{Descriptor: ocispec.Descriptor{MediaType: mediaType}}}
	var err error
	switch {
	case isIndexType(mediaType) && !likeManifest:
		doc.index = new(ocispec.Index)
		err = json.Unmarshal(raw, doc.index)
	case isManifestType(mediaType) && !likeIndex:
		doc.manifest = new(ocispec.Manifest)
		err = json.Unmarshal(raw, doc.manifest)
	case isIndexType(mediaType), isManifestType(mediaType):
		err = fmt.Errorf("calls itself %s but does not have the form of one", mediaType)
	default:
		err = fmt.Errorf("media type %q is neither an image index nor an image manifest", clean(mediaType, 100))
	}
	if err != nil {
		return document{}, err
	}
	return doc, nil
}

// Annotations are those of the manifest.
func (im *Image) Annotations() map[string]string { return annotationsOf(im.Manifest.Raw) }

// IndexAnnotations are those of the index that led to the image, if one did.
func (im *Image) IndexAnnotations() map[string]string {
	if im.Index == nil {
		return nil
	}
	return annotationsOf(im.Index.Raw)
}

// annotationsOf reads the annotations of a document that was read before.
func annotationsOf(raw []byte) map[string]string {
	var doc struct {
		Annotations map[string]string `json:"annotations"`
	}
	if json.Unmarshal(raw, &doc) != nil {
		return nil // of a form that no reader has objected to, and that nobody knows
	}
	return doc.Annotations
}
