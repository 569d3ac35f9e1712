package registry

import (
	"context"
	"fmt"
	"io"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Document is a manifest or an index as its bytes are.
type Document struct {
	ocispec.Descriptor // MediaType, Digest, Size
	Raw                []byte
}

// A Store is where the manifests and blobs of images lie: a Repository, a Layout
// or an Archive. It may be used by many goroutines at once.
type Store interface {
	// Manifest gives the document that target names: a digest, or a tag; "" is the
	// store's own default, which is the tag or digest of the reference, or the only
	// image of a layout or archive. Bytes asked for by digest were verified.
	Manifest(ctx context.Context, target string) (Document, error)
	// Blob reads a whole blob from its first byte. Its length is that of desc, or
	// Read fails; the content is for the reader to verify.
	Blob(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error)
}

// A Sink is where images are written to: a Repository or a Layout. It may be used
// by many goroutines at once.
type Sink interface {
	// PutBlob stores the blob that desc describes, unless it is there. What content
	// has from its first byte on must be desc.Size bytes with desc.Digest.
	PutBlob(ctx context.Context, desc ocispec.Descriptor, content io.ReaderAt, o PutOptions) (PutResult, error)
	// PutManifest stores raw under target, a tag, or, if that is "", by its digest
	// alone. What it names should be there already.
	PutManifest(ctx context.Context, target, mediaType string, raw []byte) (ocispec.Descriptor, error)
}

// PutOptions of one blob. The zero value works.
type PutOptions struct {
	// ChunkSize has a blob uploaded in PATCHes of so many bytes, or more where the
	// registry insists on it; 0: in one PUT.
	ChunkSize int64
	// MountFrom are repositories of the same registry that may hold the blob.
	MountFrom []string
	// Progress is called as bytes leave with how much of the blob has left so far:
	// less than the last time where something has to be sent again. Calls come one
	// at a time, and none after PutBlob has returned.
	Progress func(sent int64)
}

// A PutResult says what it took to put a blob.
type PutResult struct {
	Existed bool // it was there
	Mounted bool // the registry had it in one of PutOptions.MountFrom
	// Sent is how many bytes have left, those that were sent again counted again.
	Sent int64
}

// A finder is a Store as resolving wants it: errors do not repeat what title says.
type finder interface {
	// document is Manifest, and reads it; declared is the media type that the
	// descriptor which led there gave.
	document(ctx context.Context, target, declared string) (document, error)
	// small reads a blob of at most limit bytes and verifies it.
	small(ctx context.Context, desc ocispec.Descriptor, limit int64) ([]byte, error)
	// title names what target means in an error.
	title(target string) string
}

func finderOf(s Store) finder {
	if f, ok := s.(finder); ok {
		return f
	}
	return foreign{s}
}

// foreign is a Store of somebody else's.
type foreign struct{ Store }

func (s foreign) document(ctx context.Context, target, declared string) (document, error) {
	doc, err := s.Manifest(ctx, target)
	if err != nil {
		return document{}, err
	}
	return readDocument(doc.Raw, doc.Digest, doc.MediaType, declared)
}

func (s foreign) small(ctx context.Context, desc ocispec.Descriptor, limit int64) ([]byte, error) {
	return readSmall(ctx, s.Blob, desc, limit)
}

func (s foreign) title(target string) string {
	if n, ok := s.Store.(fmt.Stringer); ok {
		return n.String()
	}
	return "image " + target
}

// readSmall reads a blob of at most limit bytes whole and verifies it.
func readSmall(ctx context.Context, open func(context.Context, ocispec.Descriptor) (io.ReadCloser, error), desc ocispec.Descriptor, limit int64) ([]byte, error) {
	if err := checkDigest(desc.Digest); err != nil {
		return nil, err
	}
	if desc.Size < 0 || desc.Size > limit {
		return nil, fmt.Errorf("blob %s: %d bytes are not within %d", desc.Digest, desc.Size, limit)
	}
	body, err := open(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	raw, err := io.ReadAll(io.LimitReader(body, limit+1))
	if err != nil {
		return nil, err
	}
	if got := desc.Digest.Algorithm().FromBytes(raw); got != desc.Digest {
		return nil, fmt.Errorf("asked for %s, the %d bytes read have %s", desc.Digest, len(raw), got)
	}
	return raw, nil
}

// checkBlob refuses a descriptor that cannot be one of a blob.
func checkBlob(desc ocispec.Descriptor) error {
	if err := checkDigest(desc.Digest); err != nil {
		return err
	}
	if desc.Size < 0 {
		return fmt.Errorf("blob %s: size %d", desc.Digest, desc.Size)
	}
	return nil
}
