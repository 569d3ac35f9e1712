package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// An Archive is a tar file with images: an OCI image layout (docker save since 25,
// skopeo's oci-archive), or what docker save wrote before that (docker-archive). It
// is a Store. Nothing is unpacked; blobs are read where they lie in the file.
type Archive struct {
	holder
	file *os.File
}

// OpenArchive opens the archive in the file path. name is the image that is meant,
// as docker load would call it, or its org.opencontainers.image.ref.name; "" is the
// only one. A compressed archive is refused: it cannot be read in place.
func OpenArchive(path, name string) (*Archive, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err // says what and where
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = errors.New("not a regular file; an archive is read in place")
	}
	var h holder
	if err == nil {
		h, err = newHolder(f, fi.Size(), path, name)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("archive %s: %w", path, err), f.Close())
	}
	return &Archive{holder: h, file: f}, nil
}

// newHolder finds out what kind of archive it is. One that is both is a layout: it
// was made by those who write the other form for old readers.
func newHolder(file io.ReaderAt, size int64, path, name string) (holder, error) {
	ms, err := readMembers(file, size)
	if err != nil {
		return nil, err
	}
	what := "archive " + path
	if _, err := ms.find(indexFile); err == nil {
		s := &shelf{what: what, name: name, open: ms.open}
		return s, s.checkVersion()
	}
	if _, err := ms.find(saveFile); err != nil {
		return nil, fmt.Errorf("neither %s nor %s is in it: not an image archive, or one of before 2016", indexFile, saveFile)
	}
	return newSaved(ms, what, name)
}

// Close closes the file. Blobs cannot be read any more.
func (a *Archive) Close() error { return a.file.Close() }

// String is the path, with the name of the image where one was given.
func (a *Archive) String() string { return a.title("") }

// Manifest implements Store. A target that is no digest is a name.
func (a *Archive) Manifest(ctx context.Context, target string) (Document, error) {
	return manifestIn(ctx, a, target)
}

// Blob implements Store.
func (a *Archive) Blob(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	return blobIn(ctx, a, desc)
}

const (
	saveFile = "manifest.json"
	// maxSavedLayers is far more than an overlay can have.
	maxSavedLayers = 10_000

	mediaTypeDockerLayer     = "application/vnd.docker.image.rootfs.diff.tar"
	mediaTypeDockerLayerGzip = "application/vnd.docker.image.rootfs.diff.tar.gzip"
	mediaTypeDockerLayerZstd = "application/vnd.docker.image.rootfs.diff.tar.zstd"
)

// saved is what docker save wrote before 25:
//
//	manifest.json     [{"Config": NAME, "RepoTags": [...], "Layers": [NAME...]}]
//	HEX.json          a configuration
//	HEX/layer.tar     a layer, plain most often; or a link to one
//
// There is no manifest of a registry in it: one is made of what the files are, with
// digests computed from their bytes. Names are what the archive says, and of use in
// it alone.
type saved struct {
	members    *members
	what, name string
	images     []savedImage

	mu    sync.Mutex // guards what follows, and is held while files are hashed
	blobs map[digest.Digest]member
	sums  map[member]digest.Digest
	docs  map[digest.Digest]document
}

type savedImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

func newSaved(ms *members, what, name string) (*saved, error) {
	s := &saved{members: ms, what: what, name: name,
		blobs: map[digest.Digest]member{}, sums: map[member]digest.Digest{}, docs: map[digest.Digest]document{}}
	raw, err := s.read(saveFile, maxManifest)
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(raw, &s.images); err != nil {
		return nil, fmt.Errorf("%s: %w", saveFile, err)
	}
	return s, nil
}

func (s *saved) title(target string) string {
	return (&shelf{what: s.what, name: s.name}).title(target)
}

func (s *saved) read(name string, limit int64) ([]byte, error) {
	return (&shelf{open: s.members.open}).file(name, limit)
}

func (s *saved) document(ctx context.Context, target, _ string) (document, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if d := digest.Digest(target); checkDigest(d) == nil {
		doc, ok := s.docs[d]
		if !ok {
			return document{}, fmt.Errorf("manifest %s: %w", d, fs.ErrNotExist)
		}
		return doc, nil
	}
	if target == "" {
		target = s.name
	}
	im, err := s.find(target)
	if err != nil {
		return document{}, err
	}
	doc, err := s.manifest(ctx, im)
	if err != nil {
		return document{}, err
	}
	s.docs[doc.Digest] = doc
	return doc, nil
}

func (s *saved) find(name string) (savedImage, error) {
	var names []string
	for _, im := range s.images {
		if name != "" && slices.ContainsFunc(im.RepoTags, func(tag string) bool { return sameName(tag, name) }) {
			return im, nil
		}
		if names = append(names, im.RepoTags...); len(im.RepoTags) == 0 {
			names = append(names, "one without a name")
		}
	}
	var entries []ocispec.Descriptor
	for _, n := range names {
		entries = append(entries, ocispec.Descriptor{Annotations: map[string]string{ocispec.AnnotationRefName: n}})
	}
	switch {
	case len(s.images) == 0:
		return savedImage{}, errors.New("it holds no image")
	case name != "":
		return savedImage{}, fmt.Errorf("no image %q, only %s: %w", clean(name, 200), listNames(entries), fs.ErrNotExist)
	case len(s.images) > 1:
		return savedImage{}, fmt.Errorf("it holds %d images; name one of %s", len(s.images), listNames(entries))
	}
	return s.images[0], nil
}

// manifest makes the manifest that a registry would have of the image.
func (s *saved) manifest(ctx context.Context, im savedImage) (document, error) {
	config, err := s.read(im.Config, maxConfig)
	if err != nil {
		return document{}, fmt.Errorf("config: %w", err)
	}
	var says struct {
		RootFS ocispec.RootFS `json:"rootfs"`
	}
	if err := json.Unmarshal(config, &says); err != nil {
		return document{}, fmt.Errorf("config %s: %w", clean(im.Config, 100), err)
	}
	if n := len(im.Layers); n != len(says.RootFS.DiffIDs) || n > maxSavedLayers {
		return document{}, fmt.Errorf("%s lists %d layers, the configuration %d", saveFile, n, len(says.RootFS.DiffIDs))
	}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: mediaTypeDockerManifest, Layers: []ocispec.Descriptor{}}
	if m.Config, err = s.describe(ctx, im.Config); err != nil {
		return document{}, fmt.Errorf("config: %w", err)
	}
	if hex := strings.TrimSuffix(im.Config, ".json"); len(hex) == 64 && digest.SHA256.Validate(hex) == nil && hex != m.Config.Digest.Encoded() {
		return document{}, fmt.Errorf("config %s has %s", im.Config, m.Config.Digest)
	}
	m.Config.MediaType = mediaTypeDockerConfig
	for i, name := range im.Layers {
		d, err := s.describe(ctx, name)
		if err == nil && d.Digest != says.RootFS.DiffIDs[i] {
			d.MediaType, err = s.layerType(name, d.Digest, says.RootFS.DiffIDs[i])
		}
		if err != nil {
			return document{}, fmt.Errorf("layer %d: %w", i, err)
		}
		m.Layers = append(m.Layers, d)
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return document{}, err
	}
	if len(raw) > maxManifest {
		return document{}, fmt.Errorf("its manifest would have %d bytes, more than %d", len(raw), maxManifest)
	}
	return readDocument(raw, digest.FromBytes(raw), "", "")
}

// describe computes what a member is, and remembers it as a blob.
func (s *saved) describe(ctx context.Context, name string) (ocispec.Descriptor, error) {
	m, err := s.members.find(name)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d, ok := s.sums[m]
	if !ok {
		r := &cancelReader{ctx: ctx, r: s.members.section(m)}
		if d, err = digest.FromReader(r); err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("%s: %w", clean(name, 200), err)
		}
		s.sums[m], s.blobs[d] = d, m
	}
	return ocispec.Descriptor{MediaType: mediaTypeDockerLayer, Digest: d, Size: m.size}, nil
}

// layerType is the media type of a layer that is not the tar which the configuration
// says: it must be that one, compressed.
func (s *saved) layerType(name string, is, want digest.Digest) (string, error) {
	m, err := s.members.find(name)
	if err != nil {
		return "", err
	}
	how, err := sniff(s.members.section(m))
	switch {
	case err != nil:
		return "", err
	case how == "gzip":
		return mediaTypeDockerLayerGzip, nil
	case how == "zstd":
		return mediaTypeDockerLayerZstd, nil
	case how != "":
		return "", fmt.Errorf("%s is compressed with %s, for which there is no media type", clean(name, 200), how)
	}
	return "", fmt.Errorf("%s has %s, the configuration says %s", clean(name, 200), is, clean(want.String(), 100))
}

// A cancelReader ends with its context.
type cancelReader struct {
	ctx context.Context
	r   io.Reader
}

func (r *cancelReader) Read(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.r.Read(p)
}

func (s *saved) blob(_ context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	if err := checkBlob(desc); err != nil {
		return nil, err
	}
	s.mu.Lock()
	m, ok := s.blobs[desc.Digest]
	s.mu.Unlock()
	switch {
	case !ok:
		return nil, fmt.Errorf("blob %s: %w", desc.Digest, fs.ErrNotExist)
	case m.size != desc.Size:
		return nil, fmt.Errorf("blob %s: %d bytes, its descriptor says %d", desc.Digest, m.size, desc.Size)
	}
	return io.NopCloser(s.members.section(m)), nil
}

func (s *saved) small(ctx context.Context, desc ocispec.Descriptor, limit int64) ([]byte, error) {
	return readSmall(ctx, s.blob, desc, limit)
}
