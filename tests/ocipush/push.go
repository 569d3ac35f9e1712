// Package ocipush pushes small images made of ready layers to a registry: what
// tests, benchmarks and the demo need, and no more.
//
// It speaks the distribution specification by itself instead of leaning on an
// image library, so that a test can push what a library would refuse: any media
// type, a manifest without one, an index of odd platforms. Layers are streamed,
// never held in memory. It does not retry, does not ask whether a blob is there
// already, and answers no challenges: authorization is given in Options.
package ocipush

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Layer is a blob and how the manifest describes it.
type Layer struct {
	MediaType   string
	Data        io.ReaderAt
	Size        int64
	Annotations map[string]string
	// Digest is that of a blob which the registry has already: with it, nothing
	// is read of Data, and nothing uploaded.
	Digest digest.Digest
}

// Bytes makes a Layer of what is in memory.
func Bytes(mediaType string, data []byte) Layer {
	return Layer{MediaType: mediaType, Data: bytes.NewReader(data), Size: int64(len(data))}
}

// An Image is a manifest to be pushed. Platform goes into its configuration and,
// in an index, into its entry.
type Image struct {
	Layers   []Layer
	Platform ocispec.Platform
	// NoPlatform leaves the index entry without one.
	NoPlatform bool
}

// Options of a push. The zero value pushes OCI manifests without authorization.
type Options struct {
	Client        *http.Client // nil: the default one
	Authorization string       // header sent with every request
	ChunkSize     int64        // upload in PATCHes of so many bytes; 0: in one PUT
	Docker        bool         // Docker's media types in place of OCI's
	NoMediaType   bool         // leave the mediaType field out of manifest and index
}

// Push pushes the layers as one image for linux/amd64 and returns the digest of
// its manifest. base is the registry's URL; name is REPOSITORY:TAG, or
// REPOSITORY alone to push by digest.
func Push(ctx context.Context, base, name string, layers []Layer, o Options) (digest.Digest, error) {
	return PushImage(ctx, base, name, Image{
		Layers:   layers,
		Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"},
	}, o)
}

// PushImage is Push for an image with a platform.
func PushImage(ctx context.Context, base, name string, im Image, o Options) (digest.Digest, error) {
	p, tag, err := newPusher(base, name, o)
	if err != nil {
		return "", err
	}
	d, err := p.image(ctx, im, tag)
	return d.Digest, err
}

// PushIndex pushes the images by digest, and an index of them under name.
func PushIndex(ctx context.Context, base, name string, images []Image, o Options) (digest.Digest, error) {
	p, tag, err := newPusher(base, name, o)
	if err != nil {
		return "", err
	}
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: p.types.index}
	for _, im := range images {
		d, err := p.image(ctx, im, "")
		if err != nil {
			return "", err
		}
		if !im.NoPlatform {
			d.Platform = &im.Platform
		}
		index.Manifests = append(index.Manifests, d)
	}
	if o.NoMediaType {
		index.MediaType = ""
	}
	d, err := p.manifest(ctx, p.types.index, tag, index)
	return d.Digest, err
}

// PushBlob pushes one blob that no manifest names.
func PushBlob(ctx context.Context, base, repository string, l Layer, o Options) (digest.Digest, error) {
	p, _, err := newPusher(base, repository, o)
	if err != nil {
		return "", err
	}
	d, err := p.blob(ctx, l)
	return d.Digest, err
}

// PushManifest puts raw bytes under a tag or digest, whatever they are.
func PushManifest(ctx context.Context, base, name, mediaType string, raw []byte, o Options) (digest.Digest, error) {
	p, tag, err := newPusher(base, name, o)
	if err != nil {
		return "", err
	}
	d, err := p.put(ctx, mediaType, tag, raw)
	return d.Digest, err
}

type mediaTypes struct{ index, manifest, config string }

// A pusher pushes to one repository.
type pusher struct {
	opts  Options
	types mediaTypes
	repo  *url.URL // /v2/REPOSITORY
}

func newPusher(base, name string, o Options) (*pusher, string, error) {
	u, err := url.Parse(base)
	if err != nil {
		return nil, "", fmt.Errorf("push: %w", err)
	}
	repo, tag, _ := strings.Cut(name, ":")
	if o.Client == nil {
		o.Client = http.DefaultClient
	}
	p := &pusher{opts: o, repo: u.JoinPath("v2", repo), types: mediaTypes{
		ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig,
	}}
	if o.Docker {
		p.types = mediaTypes{
			"application/vnd.docker.distribution.manifest.list.v2+json",
			"application/vnd.docker.distribution.manifest.v2+json",
			"application/vnd.docker.container.image.v1+json",
		}
	}
	return p, tag, nil
}

// image pushes layers, configuration and manifest.
func (p *pusher) image(ctx context.Context, im Image, tag string) (ocispec.Descriptor, error) {
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: p.types.manifest}
	config := ocispec.Image{Platform: im.Platform, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{}}}
	for i, l := range im.Layers {
		d, err := p.blob(ctx, l)
		if err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("push layer %d: %w", i, err)
		}
		m.Layers = append(m.Layers, d)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, d.Digest)
	}
	raw, err := json.Marshal(config)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("push config: %w", err)
	}
	if m.Config, err = p.blob(ctx, Bytes(p.types.config, raw)); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("push config: %w", err)
	}
	if p.opts.NoMediaType {
		m.MediaType = ""
	}
	return p.manifest(ctx, p.types.manifest, tag, m)
}

func (p *pusher) manifest(ctx context.Context, mediaType, tag string, v any) (ocispec.Descriptor, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("push manifest: %w", err)
	}
	return p.put(ctx, mediaType, tag, raw)
}

func (p *pusher) put(ctx context.Context, mediaType, tag string, raw []byte) (ocispec.Descriptor, error) {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	name := tag
	if name == "" {
		name = d.Digest.String()
	}
	_, err := p.send(ctx, request{
		method: http.MethodPut, url: p.repo.JoinPath("manifests", name),
		body: bytes.NewReader(raw), length: d.Size, contentType: mediaType,
		want: http.StatusCreated,
	})
	if err != nil {
		return d, fmt.Errorf("push manifest: %w", err)
	}
	return d, nil
}

// blob uploads a layer: POST for a place, then the bytes, then PUT.
func (p *pusher) blob(ctx context.Context, l Layer) (ocispec.Descriptor, error) {
	if l.Digest != "" {
		return ocispec.Descriptor{MediaType: l.MediaType, Digest: l.Digest, Size: l.Size, Annotations: l.Annotations}, nil
	}
	sum, err := digest.FromReader(io.NewSectionReader(l.Data, 0, l.Size))
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d := ocispec.Descriptor{MediaType: l.MediaType, Digest: sum, Size: l.Size, Annotations: l.Annotations}
	place, err := p.send(ctx, request{method: http.MethodPost, url: p.repo.JoinPath("blobs", "uploads/"), want: http.StatusAccepted})
	if err != nil {
		return d, err
	}
	sent := int64(0)
	for p.opts.ChunkSize > 0 && sent < l.Size {
		n := min(p.opts.ChunkSize, l.Size-sent)
		place, err = p.send(ctx, request{
			method: http.MethodPatch, url: place,
			body: io.NewSectionReader(l.Data, sent, n), length: n, contentType: octets,
			contentRange: fmt.Sprintf("%d-%d", sent, sent+n-1),
			want:         http.StatusAccepted,
		})
		if err != nil {
			return d, err
		}
		sent += n
	}
	query := place.Query()
	query.Set("digest", sum.String())
	place.RawQuery = query.Encode()
	_, err = p.send(ctx, request{
		method: http.MethodPut, url: place,
		body: io.NewSectionReader(l.Data, sent, l.Size-sent), length: l.Size - sent, contentType: octets,
		want: http.StatusCreated,
	})
	return d, err
}

const octets = "application/octet-stream"

// A request is one step of an upload.
type request struct {
	method                    string
	url                       *url.URL
	body                      io.Reader
	length                    int64
	contentType, contentRange string
	want                      int // status
}

// send returns the Location that the answer names, or the request's own URL.
func (p *pusher) send(ctx context.Context, r request) (*url.URL, error) {
	body := r.body
	if r.length == 0 {
		body = nil // a reader of nothing would be sent in chunks
	}
	req, err := http.NewRequestWithContext(ctx, r.method, r.url.String(), body)
	if err != nil {
		return nil, err
	}
	req.ContentLength = r.length
	for name, value := range map[string]string{
		"Authorization": p.opts.Authorization, "Content-Type": r.contentType, "Content-Range": r.contentRange,
	} {
		if value != "" {
			req.Header.Set(name, value)
		}
	}
	resp, err := p.opts.Client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	said, err := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != r.want {
		return nil, fmt.Errorf("%s %s: %s: %.200q", r.method, r.url.Path, resp.Status, said)
	}
	if resp.Header.Get("Location") == "" {
		return r.url, nil
	}
	return resp.Location()
}
