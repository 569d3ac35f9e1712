package main

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/registry"
)

// unsure says that what was opened may turn out to be wrong while it is mounted.
func (o *opened) unsure() bool {
	return slices.ContainsFunc(o.layers, func(l openedLayer) bool { return l.blob.unsure() })
}

// status is what list asks for.
func (o *opened) status() backend.MountStatus {
	st := backend.MountStatus{Layers: []backend.LayerStatus{}, Prefetch: o.prefetch.Status()}
	for _, l := range o.layers {
		st.Layers = append(st.Layers, l.blob.status())
	}
	return st
}

// A mountWatch is what goes on beside the serving of a mount: it answers who asks for its
// status, and ends the service when its bytes turn out to be wrong.
type mountWatch struct {
	claim    *backend.Claim
	mounted  backend.Mount
	metering *metering
	log      *slog.Logger
	status   *backend.StatusServer
	stop     chan struct{}
	done     sync.WaitGroup
}

// watchMount begins to answer who asks for the status. The mount goes on without that, too.
func watchMount(claim *backend.Claim, src *opened, mounted backend.Mount, metering *metering, log *slog.Logger) *mountWatch {
	w := &mountWatch{claim: claim, mounted: mounted, metering: metering, log: log, stop: make(chan struct{})}
	status := func(metrics bool) backend.MountStatus {
		st := src.status()
		if metrics {
			st.Metrics = metering.text()
		}
		return st
	}
	var err error
	if w.status, err = claim.ServeStatus(status); err != nil {
		log.Error("the mount has no status; erofs-oci list cannot say how it is verified", "err", err)
	}
	return w
}

// begin waits for bad news of src, now that the mount is recorded.
func (w *mountWatch) begin(src *opened) {
	if src.unsure() {
		w.done.Go(func() { w.await(src.wrong) })
	}
}

// Close ends the watch.
func (w *mountWatch) Close() error {
	close(w.stop)
	w.done.Wait()
	err := w.metering.Close()
	if w.status == nil {
		return err
	}
	return errors.Join(err, w.status.Close())
}

func (w *mountWatch) await(wrong <-chan error) {
	select {
	case err := <-wrong:
		w.revoke(err)
	case <-w.stop:
	}
}

// revoke tells everybody who can be told. What comes to us fails already.
func (w *mountWatch) revoke(why error) {
	if err := w.claim.Amend(func(r *backend.Record) { r.Wrong = why.Error() }); err != nil {
		w.log.Error("it cannot be recorded that the bytes of the mount are wrong", "err", err)
	}
	layers := []backend.Mount{w.mounted}
	if over, ok := w.mounted.(interface{ Inner() []backend.Mount }); ok {
		layers = over.Inner()
	}
	var err error
	for _, l := range layers {
		if m, ok := l.(interface{ Revoke(error) error }); ok {
			err = errors.Join(err, m.Revoke(why))
		} else {
			err = errors.Join(err, errors.ErrUnsupported)
		}
	}
	switch {
	case err == nil:
	case errors.Is(err, errors.ErrUnsupported):
		w.log.Error("the kernel goes on to show what it has read, until the mount is unmounted", "err", why)
	default:
		w.log.Error("the kernel may go on to show what it has read, until the mount is unmounted", "err", err)
	}
}

// foundWrong has every read fail, from the first one on: an earlier server of the mount found
// out why, and what it had to do it did.
func (o *opened) foundWrong(why string) {
	for _, l := range o.layers {
		l.blob.wrong.Store(&wrongError{errors.New(strings.TrimPrefix(why, wrongPrefix))})
	}
}

// recordedWrong is an error if the mount on dir is recorded to be wrong. What else there is
// to say of the record others say.
func recordedWrong(run *backend.RunDir, dir string) error {
	real, err := backend.RealDir(dir)
	if err != nil {
		return nil
	}
	e, ok, err := run.Find(real)
	if err != nil || !ok || e.Wrong == "" {
		return nil
	}
	return &wrongError{fmt.Errorf("%s: %s", dir, e.Wrong)}
}

// recordedIntegrity is what another server needs to verify the same layer.
func recordedIntegrity(im *registry.Image, l registry.Layer) backend.LayerIntegrity {
	rec := backend.LayerIntegrity{MediaType: l.MediaType}
	for name, value := range l.Annotations {
		if strings.HasPrefix(name, registry.PrefixErofs) || strings.HasPrefix(name, registry.PrefixContainerdErofs) {
			if rec.Annotations == nil {
				rec.Annotations = make(map[string]string)
			}
			rec.Annotations[name] = value
		}
	}
	if next := l.Index + 1; l.Index >= 0 && next < len(im.Layers) && im.Layers[next].MediaType == registry.MediaTypeChunkIndex {
		rec.Index = &backend.IndexBlob{Digest: im.Layers[next].Digest.String(), Size: im.Layers[next].Size}
	}
	return rec
}

// recordedLayers are the layers of a record, in an image that has what they are verified
// by.
func recordedLayers(rec backend.Record) (*registry.Image, []openedLayer) {
	blobs := rec.Layers
	if len(blobs) == 0 {
		blobs = []backend.LayerState{{Digest: rec.Digest, Size: rec.Size}}
	}
	im := &registry.Image{Digest: digest.Digest(rec.Manifest)}
	var layers []openedLayer
	for i, b := range blobs {
		l := registry.Layer{Index: len(im.Layers), Descriptor: ocispec.Descriptor{Digest: digest.Digest(b.Digest), Size: b.Size}}
		var by backend.LayerIntegrity
		if i < len(rec.Integrity) {
			by = rec.Integrity[i]
		}
		l.MediaType, l.Annotations = by.MediaType, by.Annotations
		im.Layers = append(im.Layers, l)
		layers = append(layers, openedLayer{Layer: l})
		if by.Index != nil {
			im.Layers = append(im.Layers, registry.Layer{Index: len(im.Layers), Descriptor: ocispec.Descriptor{
				MediaType: registry.MediaTypeChunkIndex, Digest: digest.Digest(by.Index.Digest), Size: by.Index.Size,
				Annotations: map[string]string{registry.AnnotationChunkIndexTarget: b.Digest},
			}})
		}
	}
	return im, layers
}
