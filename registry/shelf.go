package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/image/v5/docker/reference"
)

const (
	indexFile = ocispec.ImageIndexFile // index.json
	// annotationContainerdName is what docker save and containerd call an image
	// whose org.opencontainers.image.ref.name is no more than its tag.
	annotationContainerdName = "io.containerd.image.name"
)

// A shelf is an image layout, as a directory or as the members of a tar file:
//
//	oci-layout             {"imageLayoutVersion": "1.0.0"}
//	index.json             an index of what is here; names are annotations
//	blobs/ALGORITHM/HEX    manifests, indexes, configurations, layers
type shelf struct {
	what string // oci:PATH, for errors
	name string // of the image that is meant; "": the only one
	// open opens a file by its name in the layout. Names are put together from
	// digests that were checked, never taken from what was read.
	open func(name string) (io.ReadCloser, int64, error)
}

func blobName(d digest.Digest) string {
	return ocispec.ImageBlobsDir + "/" + d.Algorithm().String() + "/" + d.Encoded()
}

func (s *shelf) title(target string) string {
	if target == "" {
		target = s.name
	}
	if target == "" {
		return s.what
	}
	return s.what + ":" + clean(target, 200)
}

// checkVersion reads the oci-layout file.
func (s *shelf) checkVersion() error {
	raw, err := s.file(ocispec.ImageLayoutFile, maxConfig)
	if err != nil {
		return err
	}
	var doc ocispec.ImageLayout
	if err := json.Unmarshal(raw, &doc); err != nil {
		return fmt.Errorf("%s: %w", ocispec.ImageLayoutFile, err)
	}
	if doc.Version != ocispec.ImageLayoutVersion {
		return fmt.Errorf("%s: image layout version %q; only %s is known", ocispec.ImageLayoutFile, clean(doc.Version, 40), ocispec.ImageLayoutVersion)
	}
	return nil
}

// file reads a file of at most limit bytes.
func (s *shelf) file(name string, limit int64) ([]byte, error) {
	f, size, err := s.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if size > limit {
		return nil, fmt.Errorf("%s: %d bytes, more than %d", name, size, limit)
	}
	raw, err := io.ReadAll(io.LimitReader(f, limit))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return raw, nil
}

func (s *shelf) document(_ context.Context, target, declared string) (document, error) {
	desc := ocispec.Descriptor{Digest: digest.Digest(target), MediaType: declared}
	if !strings.Contains(target, ":") || checkDigest(desc.Digest) != nil {
		if target == "" {
			target = s.name
		}
		var err error
		if desc, err = s.find(target); err != nil {
			return document{}, err
		}
	}
	raw, err := s.file(blobName(desc.Digest), maxManifest)
	if err != nil {
		return document{}, fmt.Errorf("manifest %s: %w", desc.Digest, err)
	}
	if _, err := verifyManifest(raw, desc.Digest, ""); err != nil {
		return document{}, fmt.Errorf("manifest: %w", err)
	}
	doc, err := readDocument(raw, desc.Digest, "", desc.MediaType)
	if err != nil {
		return document{}, fmt.Errorf("manifest %s: %w", desc.Digest, err)
	}
	return doc, nil
}

// find looks an image up in index.json.
func (s *shelf) find(name string) (ocispec.Descriptor, error) {
	raw, err := s.file(indexFile, maxManifest)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	entries, err := readEntries(raw)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("%s: %w", indexFile, err)
	}
	var same []ocispec.Descriptor // one for each digest: an image may have several names
	for _, e := range entries {
		if (name == "" || goesBy(e, name)) && !partOf(e.Digest, same) {
			same = append(same, e)
		}
	}
	switch {
	case len(same) == 1:
		return same[0], nil
	case len(entries) == 0:
		return ocispec.Descriptor{}, errors.New("it holds no image")
	case name == "":
		return ocispec.Descriptor{}, fmt.Errorf("it holds %d images; name one of %s", len(entries), listNames(entries))
	case len(same) > 1:
		return ocispec.Descriptor{}, fmt.Errorf("%d images are called %q; give a digest", len(same), clean(name, 200))
	}
	return ocispec.Descriptor{}, fmt.Errorf("no image %q, only %s: %w", clean(name, 200), listNames(entries), fs.ErrNotExist)
}

// readEntries reads an index.json, whose entries become parts of paths.
func readEntries(raw []byte) ([]ocispec.Descriptor, error) {
	var index ocispec.Index
	if err := json.Unmarshal(raw, &index); err != nil {
		return nil, err
	}
	for i, e := range index.Manifests {
		if err := checkDigest(e.Digest); err != nil {
			return nil, fmt.Errorf("entry %d: %w", i, err)
		}
	}
	return index.Manifests, nil
}

func goesBy(e ocispec.Descriptor, name string) bool {
	return e.Annotations[ocispec.AnnotationRefName] == name || sameName(e.Annotations[annotationContainerdName], name)
}

// sameName compares two names of images as Docker's tools understand them.
func sameName(a, b string) bool {
	full := func(s string) string {
		named, err := reference.ParseNormalizedNamed(s)
		if err != nil {
			return s // then it has to be the same text
		}
		return reference.TagNameOnly(named).String()
	}
	return a != "" && full(a) == full(b)
}

// listNames names what a layout holds, for an error.
func listNames(entries []ocispec.Descriptor) string {
	const most = 12
	var names []string
	for i, e := range entries {
		if i == most {
			names = append(names, fmt.Sprintf("and %d more", len(entries)-most))
			break
		}
		name := e.Annotations[ocispec.AnnotationRefName]
		if full := e.Annotations[annotationContainerdName]; full != "" {
			name = full
		}
		if name == "" {
			name = e.Digest.String()
		}
		names = append(names, clean(name, 100))
	}
	return strings.Join(names, ", ")
}

func (s *shelf) blob(_ context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	if err := checkBlob(desc); err != nil {
		return nil, err
	}
	f, size, err := s.open(blobName(desc.Digest))
	if err != nil {
		return nil, err
	}
	if size != desc.Size {
		_ = f.Close() // it was only looked at
		return nil, fmt.Errorf("%s: %d bytes, its descriptor says %d", blobName(desc.Digest), size, desc.Size)
	}
	return f, nil
}

func (s *shelf) small(ctx context.Context, desc ocispec.Descriptor, limit int64) ([]byte, error) {
	return readSmall(ctx, s.blob, desc, limit)
}

// A holder is a shelf, or what docker save wrote before it wrote one.
type holder interface {
	finder
	blob(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error)
}

// manifestIn and blobIn are the methods of Store, whose errors say where.
func manifestIn(ctx context.Context, h holder, target string) (Document, error) {
	doc, err := h.document(ctx, target, "")
	if err != nil {
		return Document{}, fmt.Errorf("%s: %w", h.title(target), err)
	}
	return doc.Document, nil
}

func blobIn(ctx context.Context, h holder, desc ocispec.Descriptor) (io.ReadCloser, error) {
	body, err := h.blob(ctx, desc)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", h.title(""), err)
	}
	return body, nil
}
