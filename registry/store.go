package registry

import (
	"context"
	"errors"
	"io"

	"github.com/opencontainers/go-digest"
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

// TODO: the bodies of what follows.

var errUnwritten = errors.New("registry: not written yet")

// ResolveIn is Client.Resolve in any store: it goes from target, through as many
// indexes as lie in between, to the manifest for the platform of sel.
func ResolveIn(ctx context.Context, s Store, target string, sel Selector) (*Image, error) {
	return nil, errUnwritten
}

// ImageConfigIn is Client.ImageConfig in any store.
func ImageConfigIn(ctx context.Context, s Store, im *Image) (*ocispec.Image, error) {
	return nil, errUnwritten
}

// A Repository is a repository of a registry: a Store and a Sink.
type Repository struct {
	client *Client
	ref    Reference
}

// Repository returns the repository of ref. Nothing is sent.
func (c *Client) Repository(ref Reference) *Repository { return &Repository{c, ref} }

// A Layout is a directory of the OCI image layout: a Store and a Sink.
type Layout struct{}

// OpenLayout opens the layout in the directory path. name is the
// org.opencontainers.image.ref.name of the image meant; "" is the only one.
func OpenLayout(path, name string) (*Layout, error) { return nil, errUnwritten }

// CreateLayout is OpenLayout, but makes what is missing.
func CreateLayout(path, name string) (*Layout, error) { return nil, errUnwritten }

// An Archive is an image in a tar file: what docker save writes, old and new, or
// a layout. It is a Store.
type Archive struct{}

// OpenArchive opens the archive in the file path. name is the image meant; "" is
// the only one.
func OpenArchive(path, name string) (*Archive, error) { return nil, errUnwritten }

// Referrers lists what the registry knows to refer to d, in the repository of ref.
func (c *Client) Referrers(ctx context.Context, ref Reference, d digest.Digest) ([]ocispec.Descriptor, error) {
	return nil, errUnwritten
}
