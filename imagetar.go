package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sync/errgroup"

	"github.com/opencontainers/go-digest"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/tarlayer"
)

// layersAtATime is how many layers are fetched at a time. Each is decompressed as it comes.
const layersAtATime = 4

// An imageTree is the tree that the layers of a container image make, one over the other.
type imageTree struct {
	store   *openedStore
	layers  []imageLayer
	alone   bool // there is one layer only
	options treeOptions
	files   []*scratchFile
	life    context.Context // of the reads of files, which come after the layers did
}

// An imageLayer is a layer and what is known of it.
type imageLayer struct {
	registry.Layer
	diffID digest.Digest // "" if the image does not say
	erofs  bool          // it is an EROFS image, not a tar archive
}

func openImageTree(ctx context.Context, s *openedStore, o treeOptions) (*imageTree, error) {
	im, err := registry.ResolveIn(ctx, s.Store, "", o.selector)
	if err != nil {
		return nil, err
	}
	known, err := diffIDs(ctx, s.Store, im)
	if err != nil {
		return nil, err
	}
	layers, err := imageLayers(im, known)
	if err != nil {
		return nil, err
	}
	if n := o.selector.Layer; n != nil {
		if *n >= len(layers) {
			return nil, fmt.Errorf("no layer %d: the image has %d, counted from 0", *n, len(layers))
		}
		layers = layers[*n : *n+1]
	}
	return &imageTree{store: s, layers: layers, alone: len(im.Layers) == 1, options: o}, nil
}

// diffIDs are those that the image's configuration has of its layers; nil for an artifact, which has no configuration.
func diffIDs(ctx context.Context, s registry.Store, im *registry.Image) ([]digest.Digest, error) {
	config, err := registry.ImageConfigIn(ctx, s, im)
	if errors.Is(err, errors.ErrUnsupported) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return append([]digest.Digest{}, config.RootFS.DiffIDs...), nil
}

// imageLayers looks at the layers of an image: whether they can be read here, and what they hold.
func imageLayers(im *registry.Image, diffIDs []digest.Digest) ([]imageLayer, error) {
	if diffIDs != nil && len(diffIDs) != len(im.Layers) {
		return nil, fmt.Errorf("the image's configuration knows %d layers, its manifest %d", len(diffIDs), len(im.Layers))
	}
	var list []imageLayer
	for i, l := range im.Layers {
		layer := imageLayer{Layer: l, erofs: l.Erofs()}
		if err := tarlayer.Check(l.MediaType); err != nil && !layer.erofs {
			return nil, fmt.Errorf("layer %d is %w", i, err)
		}
		if diffIDs != nil {
			layer.diffID = diffIDs[i]
		}
		list = append(list, layer)
	}
	return list, nil
}

// A fetching is a layer on its way.
type fetching struct {
	layer imageLayer
	ready chan struct{} // closed when what follows is known
	file  *scratchFile
	err   error
}

// fill fetches the layers side by side and puts them on top of each other as they come.
func (t *imageTree) fill(ctx context.Context, l *mkerofs.Layers) error {
	return t.each(ctx, func(ctx context.Context, f *fetching) error { return t.apply(ctx, l, f) })
}

// each fetches the layers side by side, and calls a function with one after the other, from the lowest, as they come.
// The first that fails ends it all.
func (t *imageTree) each(outer context.Context, do func(context.Context, *fetching) error) (err error) {
	t.life = outer
	group, ctx := errgroup.WithContext(outer)
	ctx, cancel := context.WithCancel(ctx)
	group.SetLimit(layersAtATime)
	all := make([]*fetching, len(t.layers))
	for i, layer := range t.layers {
		all[i] = &fetching{layer: layer, ready: make(chan struct{})}
	}
	started := make(chan struct{})
	go func() {
		defer close(started)
		for _, f := range all {
			group.Go(func() error {
				f.file, f.err = fetchLayer(ctx, t.store, f.layer, t.options)
				close(f.ready)
				return f.err
			})
		}
	}()
	defer func() {
		failed := ctx.Err() != nil // one of the layers did, or the user has enough
		cancel()
		<-started
		first := group.Wait()
		if err != nil && failed && outer.Err() == nil {
			err = first // what came after it says only that it was canceled
		}
		for _, f := range all {
			if f.file != nil {
				t.files = append(t.files, f.file)
			}
		}
	}()
	for _, f := range all {
		<-f.ready
		if f.err != nil {
			return f.err
		}
		if err := do(ctx, f); err != nil {
			return err
		}
	}
	return nil
}

// fetchLayer keeps a layer in a file, decompressed and verified.
func fetchLayer(ctx context.Context, s registry.Store, layer imageLayer, o treeOptions) (_ *scratchFile, err error) {
	step := o.steps.begin("fetch layer "+shortDigest(layer.Digest), layer.Size)
	defer func() { step.end(err) }()
	f, err := o.scratch.create()
	if err != nil {
		return nil, err
	}
	if err := copyLayer(ctx, s, layer, f, step); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func copyLayer(ctx context.Context, s registry.Store, layer imageLayer, to *scratchFile, step *step) (err error) {
	blob, err := s.Blob(ctx, layer.Descriptor)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, blob.Close()) }()
	r, err := tarlayer.Open(io.TeeReader(ctxReader{ctx, blob}, step), layer.Descriptor, layer.diffID)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	_, err = to.ReadFrom(ctxReader{ctx, r})
	return err
}

// shortDigest is as much of a digest as people compare.
func shortDigest(d digest.Digest) string {
	if d.Validate() != nil {
		return printable(d.String())
	}
	return d.Encoded()[:12]
}

// apply puts a fetched layer on top of the others.
func (t *imageTree) apply(ctx context.Context, l *mkerofs.Layers, f *fetching) error {
	if err := t.applyTo(ctx, l, f); err != nil {
		return fmt.Errorf("layer %d: %w", f.layer.Index, err)
	}
	return nil
}

func (t *imageTree) applyTo(ctx context.Context, l *mkerofs.Layers, f *fetching) error {
	if !f.layer.erofs {
		return l.ApplyAt(ctx, f.file, f.file.size)
	}
	im, err := erofsfmt.Open(ctx, scratchSource{f.file})
	if err != nil {
		return err
	}
	form := mkerofs.WhiteoutsNone // an image of its own
	if !t.alone {
		form = mkerofs.WhiteoutsOverlay
	}
	return l.ApplyEntries(ctx, imageEntries(ctx, t.life, im), form)
}

func (t *imageTree) Close() error {
	var errs []error
	for _, f := range t.files {
		errs = append(errs, f.Close())
	}
	return errors.Join(append(errs, t.store.Close())...)
}

// A scratchSource is what was kept, for the reader of images.
type scratchSource struct{ f *scratchFile }

func (s scratchSource) Size() int64 { return s.f.size }

func (s scratchSource) ReadAt(_ context.Context, p []byte, off int64) error {
	_, err := s.f.ReadAt(p, off)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}
