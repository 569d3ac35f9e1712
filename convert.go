package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
	"github.com/erofs-oci/erofs-oci/registry"
)

// A converter makes EROFS images of container images.
type converter struct {
	*publishing
	how  *buildOptions
	from treeOptions
	src  *openedStore
	sink *openedSink

	squash, alone bool // alone: the tar images are not kept
}

// A converted is what became of one image.
type converted struct {
	platform ocispec.Platform
	tar      ocispec.Descriptor // of the manifest that was converted
	erofs    ocispec.Descriptor
	layers   int
	tarSize  int64 // of the layers
	size     int64 // of the EROFS layers
	content  int64 // of the files in them
}

// image converts one image, and sends all but the manifest under its name.
func (v *converter) image(ctx context.Context, im *registry.Image, target string) (_ *converted, err error) {
	config, err := v.config(ctx, im)
	if err != nil {
		return nil, err
	}
	known := ocispec.RootFS{DiffIDs: []digest.Digest{}}
	if err := json.Unmarshal(config["rootfs"], &known); err != nil {
		return nil, fmt.Errorf("rootfs of the configuration: %w", err)
	}
	layers, err := imageLayers(im, known.DiffIDs)
	if err != nil {
		return nil, err
	}
	if len(layers) == 0 {
		return nil, errors.New("the image has no layers")
	}
	if i := slices.IndexFunc(layers, func(l imageLayer) bool { return l.erofs }); i >= 0 {
		return nil, fmt.Errorf("layer %d is %s: the image is one of EROFS already", i, layers[i].MediaType)
	}
	made := &converted{tar: im.Manifest.Descriptor, layers: len(layers)}
	if made.platform, err = imagePlatform(im, config); err != nil {
		return nil, err
	}
	blobs := make([]*wholeBlob, len(layers))
	for i, l := range layers {
		made.tarSize += l.Size
		blobs[i] = &wholeBlob{ctx: ctx, v: v, desc: l.Descriptor}
		defer func() { err = errors.Join(err, blobs[i].Close()) }()
	}
	if !v.alone {
		if err := v.copyBlobs(ctx, im, blobs); err != nil {
			return nil, err
		}
	}
	list, err := v.convertLayers(ctx, layers, blobs, made)
	if err != nil {
		return nil, err
	}
	if err := changeHistory(config, len(layers), v.squash); err != nil {
		return nil, err
	}
	raw, err := erofsConfig(config, list)
	if err != nil {
		return nil, err
	}
	if !v.alone {
		// Not before: a registry takes an image that no name leads to for garbage only without its manifest.
		if _, err := v.sink.PutManifest(ctx, "", im.Manifest.MediaType, im.Manifest.Raw); err != nil {
			return nil, fmt.Errorf("copy manifest: %w", err)
		}
	}
	made.erofs, err = v.putImage(ctx, v.sink, target, raw, list, im.Annotations(), v.from.steps)
	return made, err
}

// config reads the whole configuration of an image.
func (v *converter) config(ctx context.Context, im *registry.Image) (document, error) {
	raw, err := readSmall(ctx, v.src, im.Config)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	var config document
	if err := json.Unmarshal(raw, &config); err != nil {
		return nil, fmt.Errorf("configuration %s: %w", im.Config.Digest, err)
	}
	if config == nil {
		return nil, fmt.Errorf("configuration %s: not a JSON object", im.Config.Digest)
	}
	return config, nil
}

// imagePlatform is the platform that the index says, and where that is silent the configuration: old ones do not know
// their variant.
func imagePlatform(im *registry.Image, config document) (p ocispec.Platform, err error) {
	of, err := configPlatform(config)
	if err != nil {
		return p, err
	}
	if im.Entry != nil && im.Entry.Platform != nil {
		p = *im.Entry.Platform
	}
	p.OS, p.Architecture = cmp.Or(p.OS, of.OS), cmp.Or(p.Architecture, of.Architecture)
	if p.OS == "" || p.Architecture == "" {
		return p, errors.New("neither the index nor the configuration says which platform the image is for")
	}
	if p.OS == of.OS && p.Architecture == of.Architecture {
		p.Variant, p.OSVersion = cmp.Or(p.Variant, of.Variant), cmp.Or(p.OSVersion, of.OSVersion)
		if len(p.OSFeatures) == 0 {
			p.OSFeatures = of.OSFeatures
		}
	}
	return p, nil
}

// configPlatform is the platform that a configuration says.
func configPlatform(config document) (p ocispec.Platform, err error) {
	for key, to := range map[string]any{"os": &p.OS, "architecture": &p.Architecture, "variant": &p.Variant, "os.version": &p.OSVersion, "os.features": &p.OSFeatures} {
		if config[key] == nil {
			continue
		}
		if err := json.Unmarshal(config[key], to); err != nil {
			return p, fmt.Errorf("%s of the configuration: %w", key, err)
		}
	}
	return p, nil
}

// changeHistory makes the history fit the layers: who reads it expects an entry that is not empty for each of them.
func changeHistory(config document, layers int, squash bool) error {
	var history []ocispec.History
	if config["history"] == nil {
		return nil
	}
	if err := json.Unmarshal(config["history"], &history); err != nil {
		return fmt.Errorf("history of the configuration: %w", err)
	}
	full := 0
	for i := range history {
		if !history[i].EmptyLayer {
			full++
		}
		history[i].EmptyLayer = history[i].EmptyLayer || squash
	}
	switch {
	case squash:
		history = append(history, ocispec.History{CreatedBy: "erofs-oci convert --squash", Comment: fmt.Sprintf("all %d layers in one", layers)})
	case full != layers: // it did not fit before
		delete(config, "history")
		return nil
	}
	return config.set("history", history)
}

// copyBlobs sends what the image consists of as it is, but for its manifest.
func (v *converter) copyBlobs(ctx context.Context, im *registry.Image, blobs []*wholeBlob) error {
	config := &wholeBlob{ctx: ctx, v: v, desc: im.Config}
	err := v.send(ctx, v.sink, "copy configuration", im.Config, config, v.from.steps)
	if err := errors.Join(err, config.Close()); err != nil {
		return err
	}
	for _, b := range blobs {
		if err := v.send(ctx, v.sink, "copy layer", b.desc, b, v.from.steps); err != nil {
			return err
		}
	}
	return nil
}

// convertLayers makes EROFS layers and sends them.
func (v *converter) convertLayers(ctx context.Context, layers []imageLayer, blobs []*wholeBlob, made *converted) (_ []ocispec.Descriptor, err error) {
	o := v.from
	t := &imageTree{store: &openedStore{Store: fetchedStore{v.src, blobs}, close: func() error { return nil }}, layers: layers, options: o}
	defer func() { err = errors.Join(err, t.Close()) }()
	if v.squash {
		desc, err := v.layer(ctx, "", t.fill, mkerofs.LayerOptions{}, made)
		return []ocispec.Descriptor{desc}, err
	}
	// What the layers before one have in common, for what it leaves out.
	lower, err := mkerofs.New(nil, mkerofs.Options{TempDir: v.how.tmp})
	if err != nil {
		return nil, err
	}
	below, err := mkerofs.NewLayers(lower, mkerofs.LayerOptions{})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, below.Close()) }()
	var list []ocispec.Descriptor
	err = t.each(ctx, func(ctx context.Context, f *fetching) error {
		role := registry.RoleLower
		if len(list) == len(layers)-1 {
			role = "" // the top of several, or the only one
		}
		var options mkerofs.LayerOptions
		if len(list) > 0 { // below the first one there is nothing to hide
			options = mkerofs.LayerOptions{Overlay: true, Lower: lower}
		}
		desc, err := v.layer(ctx, role, func(ctx context.Context, l *mkerofs.Layers) error { return t.apply(ctx, l, f) }, options, made)
		if err != nil {
			return err
		}
		list = append(list, desc)
		return t.apply(ctx, below, f)
	})
	return list, err
}

// layer makes one EROFS layer and sends it.
func (v *converter) layer(ctx context.Context, role string, fill func(context.Context, *mkerofs.Layers) error, options mkerofs.LayerOptions, made *converted) (desc ocispec.Descriptor, err error) {
	image, err := v.from.scratch.create()
	if err != nil {
		return desc, err
	}
	defer func() { err = errors.Join(err, image.Close()) }()
	built, err := v.how.build(ctx, fill, v.from, image.File, options)
	if err != nil {
		return desc, err
	}
	made.content += built.stats.Content
	blob, err := v.layerBlob(ctx, image, built.size, built.digest, v.from.scratch)
	if err != nil {
		return desc, err
	}
	defer func() { err = errors.Join(err, blob.Close()) }()
	if role != "" {
		blob.desc.Annotations[registry.AnnotationRole] = role
	}
	made.size += blob.desc.Size
	return blob.desc, v.send(ctx, v.sink, "push layer", blob.desc, blob.content, v.from.steps)
}

// A wholeBlob is a blob of the source that is fetched when its bytes are asked for, and then kept.
type wholeBlob struct {
	ctx  context.Context
	v    *converter
	desc ocispec.Descriptor

	mu   sync.Mutex // guards file
	file *scratchFile
}

func (b *wholeBlob) ReadAt(p []byte, off int64) (int, error) {
	f, err := b.fetched(true)
	if err != nil {
		return 0, err
	}
	return f.section().ReadAt(p, off)
}

// fetched is the blob, whole and verified; nil if it is not here and is not to be fetched.
func (b *wholeBlob) fetched(fetch bool) (*scratchFile, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.file != nil || !fetch {
		return b.file, nil
	}
	f, err := b.v.from.scratch.create()
	if err != nil {
		return nil, err
	}
	if err := copyBlob(b.ctx, b.v.src, b.desc, f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	b.file = f
	return f, nil
}

func (b *wholeBlob) Close() error {
	if b.file == nil {
		return nil
	}
	return b.file.Close()
}

// copyBlob copies a blob as it is, and verifies it.
func copyBlob(ctx context.Context, s registry.Store, desc ocispec.Descriptor, to io.Writer) (err error) {
	blob, err := s.Blob(ctx, desc)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, blob.Close()) }()
	verifier := desc.Digest.Verifier()
	n, err := io.Copy(io.MultiWriter(to, verifier), ctxReader{ctx, blob})
	switch {
	case err != nil:
		return err
	case n != desc.Size || !verifier.Verified():
		return fmt.Errorf("blob %s: the %d bytes that came are not those of the digest", desc.Digest, n)
	}
	return nil
}

// readSmall reads a small blob whole.
func readSmall(ctx context.Context, s registry.Store, desc ocispec.Descriptor) ([]byte, error) {
	if desc.Size > maxConfig {
		return nil, fmt.Errorf("%s has %d bytes, more than %d", desc.Digest, desc.Size, maxConfig)
	}
	if err := desc.Digest.Validate(); err != nil {
		return nil, err
	}
	var text strings.Builder
	err := copyBlob(ctx, s, desc, &text)
	return []byte(text.String()), err
}

// A fetchedStore reads layers from where they are already.
type fetchedStore struct {
	registry.Store
	blobs []*wholeBlob
}

func (s fetchedStore) Blob(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	for _, b := range s.blobs {
		if b.desc.Digest != desc.Digest {
			continue
		}
		switch f, err := b.fetched(false); {
		case err != nil:
			return nil, err
		case f != nil:
			return io.NopCloser(f.section()), nil
		}
	}
	return s.Store.Blob(ctx, desc)
}

// putIndex sends an index with each image, as tar first, for those who do not know EROFS.
func (v *converter) putIndex(ctx context.Context, target string, images []*converted, annotations map[string]string) (ocispec.Descriptor, error) {
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Annotations: annotations}
	for _, m := range images {
		if !v.alone {
			tar, platform := m.tar, m.platform
			tar.Platform = &platform
			index.Manifests = append(index.Manifests, tar)
		}
		erofs, platform := m.erofs, m.platform
		platform.OSFeatures = append(slices.Clone(platform.OSFeatures), registry.FeatureErofs)
		erofs.Platform = &platform
		index.Manifests = append(index.Manifests, erofs)
	}
	raw, err := json.Marshal(index)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc, err := v.sink.PutManifest(ctx, target, ocispec.MediaTypeImageIndex, raw)
	if err != nil {
		err = fmt.Errorf("push index: %w", err)
	}
	return desc, err
}
