package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxReferrerPages bounds a list that links on and on.
const maxReferrerPages = 32

// Referrers lists what refers to d in the repository of ref, signatures most of all:
// by the referrers API, where the registry has it, else by the tag that stands in
// for it (sha256-HEX); and by the tags of cosign (sha256-HEX.sig, .att and .sbom).
// What was found by a tag has it as org.opencontainers.image.ref.name. Only the
// registry itself is asked. Nothing found is no error.
func (c *Client) Referrers(ctx context.Context, ref Reference, d digest.Digest) ([]ocispec.Descriptor, error) {
	list, err := c.referrers(ctx, ref, d)
	if err != nil {
		return nil, fmt.Errorf("referrers of %s in %s: %w", clean(d.String(), 160), ref.name(), err)
	}
	return list, nil
}

func (c *Client) referrers(ctx context.Context, ref Reference, d digest.Digest) ([]ocispec.Descriptor, error) {
	if err := checkDigest(d); err != nil {
		return nil, err
	}
	s, err := c.Repository(ref).own()
	if err != nil {
		return nil, err
	}
	list, known, err := s.referrersAPI(ctx, d)
	if err != nil {
		return nil, err
	}
	tag := d.Algorithm().String() + "-" + d.Encoded()[:min(len(d.Encoded()), 64)]
	if !known {
		doc, err := s.tagged(ctx, tag)
		switch {
		case err != nil:
			return nil, err
		case doc.index != nil:
			list = doc.index.Manifests
		case doc.manifest != nil:
			list = append(list, doc.describe(tag))
		}
	}
	for _, suffix := range []string{".sig", ".att", ".sbom"} {
		doc, err := s.tagged(ctx, tag+suffix)
		if err != nil {
			return nil, err
		}
		if doc.Digest != "" {
			list = append(list, doc.describe(tag+suffix))
		}
	}
	for i, l := range list {
		if err := checkDigest(l.Digest); err != nil {
			return nil, fmt.Errorf("entry %d: %w", i, err)
		}
	}
	return list, nil
}

// describe is a descriptor of what was found by a tag.
func (d document) describe(tag string) ocispec.Descriptor {
	desc := d.Descriptor
	desc.Annotations = map[string]string{ocispec.AnnotationRefName: tag}
	if d.manifest != nil {
		desc.ArtifactType = d.manifest.ArtifactType
	}
	return desc
}

// tagged is what a tag names; nothing where there is no such tag.
func (s *session) tagged(ctx context.Context, tag string) (doc document, err error) {
	err = retry(ctx, s.resolving(), func(ctx context.Context) error {
		doc, err = s.manifest(ctx, tag, "", "")
		return err
	})
	if status := new(StatusError); errors.As(err, &status) && status.Code == http.StatusNotFound {
		return document{}, nil
	}
	if err != nil {
		return document{}, fmt.Errorf("manifest %s: %w", tag, err)
	}
	return doc, nil
}

// referrersAPI asks page by page; known is false where the registry does not have
// the API.
func (s *session) referrersAPI(ctx context.Context, d digest.Digest) (list []ocispec.Descriptor, known bool, err error) {
	var at *url.URL
	for page := range maxReferrerPages {
		var index *ocispec.Index
		var next *url.URL
		err := retry(ctx, s.resolving(), func(ctx context.Context) (err error) {
			index, next, err = s.referrersPage(ctx, d, at)
			return err
		})
		switch {
		case err != nil:
			return nil, false, err
		case index == nil && page == 0:
			return nil, false, nil
		case index == nil:
			return nil, false, fmt.Errorf("page %d of the list is missing", page)
		}
		list = append(list, index.Manifests...)
		if next == nil {
			return list, true, nil
		}
		at = next
	}
	return nil, false, fmt.Errorf("more than %d pages", maxReferrerPages)
}

// referrersPage is the page at that address, the first where it is nil, and where
// the next one is. Who does not know the API answers with a 404, or with something
// that is no index.
func (s *session) referrersPage(ctx context.Context, d digest.Digest, at *url.URL) (index *ocispec.Index, next *url.URL, err error) {
	if at == nil {
		if at, err = s.url(ctx, "referrers/"+d.String(), nil); err != nil {
			return nil, nil, err
		}
	}
	resp, err := s.send(ctx, outgoing{method: http.MethodGet, url: at, header: http.Header{"Accept": {ocispec.MediaTypeImageIndex}}})
	if err != nil {
		return nil, nil, err
	}
	unknown := []int{http.StatusBadRequest, http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusNotAcceptable, http.StatusNotImplemented}
	switch {
	case slices.Contains(unknown, resp.StatusCode), resp.StatusCode == http.StatusOK && contentType(resp.Header) != ocispec.MediaTypeImageIndex:
		discard(resp)
		return nil, nil, nil
	case resp.StatusCode != http.StatusOK:
		return nil, nil, statusError(resp, s.auth.hide)
	}
	raw, err := readBounded(resp, maxManifest)
	if err != nil {
		return nil, nil, err
	}
	if link := nextLink(resp.Header.Values("Link")); link != "" {
		if next, err = s.lead(resp, link); err != nil {
			return nil, nil, err
		}
	}
	index = new(ocispec.Index)
	if err := json.Unmarshal(raw, index); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", redact(at), err)
	}
	return index, next, nil
}

// nextLink picks the address out of a Link header, <ADDRESS>; rel="next".
func nextLink(headers []string) string {
	for _, h := range headers {
		address, params, ok := strings.Cut(strings.TrimPrefix(strings.TrimSpace(h), "<"), ">")
		if ok && strings.Contains(strings.ReplaceAll(params, `"`, ""), "rel=next") {
			return address
		}
	}
	return ""
}
