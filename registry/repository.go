package registry

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Repository is a repository of a registry: a Store and a Sink. What is read
// comes from the registry or a mirror of it, what is written goes to the registry
// alone.
type Repository struct {
	client *Client
	ref    Reference
}

// Repository returns the repository of ref, whose tag or digest is its default
// target. Nothing is sent.
func (c *Client) Repository(ref Reference) *Repository { return &Repository{c, ref} }

// String is the reference.
func (r *Repository) String() string { return r.ref.String() }

// at is the reference of what target means here.
func (r *Repository) at(target string) (Reference, error) {
	ref := r.ref
	switch {
	case target == "":
	case strings.Contains(target, ":"):
		ref.Tag, ref.Digest = "", digest.Digest(target)
	default:
		ref.Tag, ref.Digest = target, ""
	}
	return ref, ref.validate()
}

func (r *Repository) title(target string) string {
	ref, err := r.at(target)
	if err != nil {
		return r.ref.name()
	}
	return ref.String()
}

// Manifest implements Store.
func (r *Repository) Manifest(ctx context.Context, target string) (Document, error) {
	doc, err := r.document(ctx, target, "")
	if err != nil {
		return Document{}, fmt.Errorf("%s: %w", r.title(target), err)
	}
	return doc.Document, nil
}

func (r *Repository) document(ctx context.Context, target, declared string) (document, error) {
	ref, err := r.at(target)
	if err != nil {
		return document{}, err
	}
	src, err := r.client.source(ref)
	if err != nil {
		return document{}, err
	}
	return src.manifest(ctx, ref.target(), ref.Digest, declared)
}

// Blob implements Store. The body heals itself as that of Blob.Fetch does.
func (r *Repository) Blob(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	b, err := r.client.Blob(r.ref, desc)
	if err != nil {
		return nil, err
	}
	if desc.Size == 0 {
		return http.NoBody, nil // there is no range of no bytes
	}
	body, _, _, err := b.Fetch(ctx, 0, desc.Size)
	return body, err
}

func (r *Repository) small(ctx context.Context, desc ocispec.Descriptor, limit int64) (raw []byte, err error) {
	b, err := r.client.Blob(r.ref, desc)
	if err != nil {
		return nil, err
	}
	err = b.source.resolve(ctx, func(ctx context.Context, p *place) error {
		raw, err = b.small(ctx, p, limit)
		return err
	})
	return raw, err
}
