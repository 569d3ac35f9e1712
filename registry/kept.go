package registry

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Documents keep manifests, indexes and configurations of a repository.
type Documents interface {
	// Get gives the document with the digest, or fs.ErrNotExist. It is verified by who asked.
	Get(ctx context.Context, d digest.Digest) ([]byte, error)
	// Put keeps a document, which was verified, if it can be kept.
	Put(ctx context.Context, d digest.Digest, raw []byte)
}

// Tags keep what the tags of a repository led to when the registry was asked the last time.
type Tags interface {
	// Last gives the manifest or index of the tag. Its error is shown to the user.
	Last(tag string) (digest.Digest, error)
	// Led says what the tag leads to now.
	Led(tag string, d digest.Digest)
}

// Keep says what a Kept keeps, and where.
type Keep struct {
	Documents Documents
	Tags      Tags
	// Offline, if it is not nil, has the registry asked for nothing: what is not kept is this error.
	Offline error
}

// A Kept is a Repository that keeps what it reads of an image beside its layers, and does not ask twice for what has a
// digest. A tag is asked for each time, unless Keep.Offline says not to.
//
// A document that has its digest is the right one, whoever gave it, and one that is kept was given to this user for this
// repository before: to ask the registry once more would say whether it still lets him in, and not change a byte.
type Kept struct {
	*Repository
	keep Keep
}

// Keep makes a Kept of r.
func (r *Repository) Keep(k Keep) *Kept { return &Kept{r, k} }

// Manifest implements Store.
func (k *Kept) Manifest(ctx context.Context, target string) (Document, error) {
	doc, err := k.document(ctx, target, "")
	if err != nil {
		return Document{}, fmt.Errorf("%s: %w", k.title(target), err)
	}
	return doc.Document, nil
}

func (k *Kept) document(ctx context.Context, target, declared string) (document, error) {
	ref, err := k.at(target)
	if err != nil {
		return document{}, err
	}
	want := ref.Digest
	switch {
	case want != "":
	case k.keep.Offline == nil:
		doc, err := k.ask(ctx, target, declared)
		if err == nil {
			k.keep.Tags.Led(ref.Tag, doc.Digest)
		}
		return doc, err
	default:
		if want, err = k.keep.Tags.Last(ref.Tag); err == nil {
			err = checkDigest(want)
		}
		if err != nil {
			return document{}, err
		}
	}
	raw, err := k.kept(ctx, want)
	if err != nil {
		return document{}, fmt.Errorf("manifest %s: %w", want, err)
	}
	if raw == nil {
		return k.ask(ctx, target, declared)
	}
	doc, err := readDocument(raw, want, "", declared)
	switch {
	case err == nil:
		return doc, nil
	case k.keep.Offline == nil:
		return k.ask(ctx, target, declared) // the registry says by a header what it is
	}
	return document{}, fmt.Errorf("manifest %s: %w", want, err)
}

// ask asks the registry, and keeps what it answers.
func (k *Kept) ask(ctx context.Context, target, declared string) (document, error) {
	doc, err := k.Repository.document(ctx, target, declared)
	if err == nil {
		k.keep.Documents.Put(ctx, doc.Digest, doc.Raw)
	}
	return doc, err
}

// kept gives a document that is kept, and has its digest; nil if it is to be asked for.
func (k *Kept) kept(ctx context.Context, want digest.Digest) ([]byte, error) {
	raw, err := k.keep.Documents.Get(ctx, want)
	if err == nil {
		_, err = verifyManifest(raw, want, "")
	}
	switch {
	case err == nil:
		return raw, nil
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case k.keep.Offline == nil:
		return nil, nil
	case errors.Is(err, fs.ErrNotExist):
		return nil, k.keep.Offline
	}
	return nil, fmt.Errorf("%w: %w", err, k.keep.Offline)
}

func (k *Kept) small(ctx context.Context, desc ocispec.Descriptor, limit int64) ([]byte, error) {
	if err := checkBlob(desc); err != nil {
		return nil, err
	}
	raw, err := k.kept(ctx, desc.Digest)
	if err != nil || raw != nil {
		return raw, err
	}
	if raw, err = k.Repository.small(ctx, desc, limit); err == nil {
		k.keep.Documents.Put(ctx, desc.Digest, raw)
	}
	return raw, err
}

// Origin says where what a tag leads to comes from, and how sure it is that it does, as Blob.Origin does.
func (r *Repository) Origin() (string, error) {
	src, err := r.client.source(r.ref)
	if err != nil {
		return "", err
	}
	return src.origin(), nil
}
