package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/integrity"
)

// publishFlags say what an image is made of in a registry.
func publishFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "chunk-index", Value: "256KiB", Usage: "append an index by which each chunk of `SIZE` can be verified; 0 for none"},
		&cli.BoolFlag{Name: "dm-verity", Value: true, Usage: "append a dm-verity tree by which each block can be verified, by the kernel, too (0.8 % of the image)"},
		&cli.StringFlag{Name: "media-type", Value: "erofs", Usage: "call layers as `WHO` does: erofs (erofs-image-spec), or containerd (its older name for the same)"},
		&cli.StringFlag{Name: "upload-chunk", Usage: "upload blobs in requests of `SIZE`", DefaultText: "in one"},
	}
}

// publishing is what the publishFlags say.
type publishing struct {
	chunk     int64 // 0: no chunk index
	verity    bool
	mediaType string
	put       registry.PutOptions
}

func readPublishing(c *cli.Context) (*publishing, error) {
	o := &publishing{verity: c.Bool("dm-verity")}
	switch c.String("media-type") {
	case "erofs":
		o.mediaType = registry.MediaTypeErofs
	case "containerd":
		o.mediaType = registry.MediaTypeContainerdErofs
	default:
		return nil, usagef("--media-type %q: want erofs or containerd", c.String("media-type"))
	}
	for flag, to := range map[string]*int64{"chunk-index": &o.chunk, "upload-chunk": &o.put.ChunkSize} {
		if c.String(flag) == "" {
			continue
		}
		n, err := parseSize(flag, c.String(flag))
		if err != nil {
			return nil, err
		}
		*to = n
	}
	if o.chunk > 0 {
		if _, err := integrity.NewChunkIndexWriter(o.chunk, integrity.SHA256); err != nil {
			return nil, usagef("--chunk-index %s: %w", c.String("chunk-index"), err)
		}
	}
	return o, nil
}

// A layerBlob is an EROFS image with what it is verified by:
//
//	image | zeros to a block | dm-verity superblock and tree | chunk index
//
// Who knows nothing of what is behind the image, as the kernel's EROFS, passes over it.
type layerBlob struct {
	desc    ocispec.Descriptor
	content io.ReaderAt
	tail    *scratchFile // what is behind the image
}

func (b *layerBlob) Close() error { return b.tail.Close() }

// layerBlob makes a blob of an image, which known is the digest of.
func (o *publishing) layerBlob(ctx context.Context, image io.ReaderAt, size int64, known digest.Digest, s *scratch) (_ *layerBlob, err error) {
	tail, err := s.create()
	if err != nil {
		return nil, err
	}
	b := &layerBlob{desc: ocispec.Descriptor{MediaType: o.mediaType, Annotations: map[string]string{}}, tail: tail}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.Close())
		}
	}()
	b.content = &joined{image, size, tail}
	end := size
	if o.verity {
		if end, err = b.addVerity(ctx, size, known); err != nil {
			return nil, fmt.Errorf("dm-verity: %w", err)
		}
	}
	sum := sha256.New()
	if err := o.addIndex(ctx, b, end, sum); err != nil {
		return nil, fmt.Errorf("chunk index: %w", err)
	}
	b.desc.Size = size + tail.size
	b.desc.Digest = digest.NewDigestFromBytes(digest.SHA256, sum.Sum(nil))
	// An image that is not compressed as a whole is its own uncompressed form.
	b.desc.Annotations[registry.AnnotationUncompressedDigest] = b.desc.Digest.String()
	return b, nil
}

// addVerity appends a tree over the image, and says where it ends. Salt and UUID come from the image, so that it is
// always the same tree.
func (b *layerBlob) addVerity(ctx context.Context, size int64, known digest.Digest) (end int64, err error) {
	const block = integrity.DefaultVerityBlock
	pad := -size & (block - 1)
	if _, err := b.tail.Write(make([]byte, pad)); err != nil {
		return 0, err
	}
	seed := sha256.Sum256([]byte(known))
	o := integrity.VerityOptions{Salt: seed[:]}
	copy(o.UUID[:], seed[:])
	o.UUID[6], o.UUID[8] = o.UUID[6]&0x0f|0x80, o.UUID[8]&0x3f|0x80 // version 8 of RFC 9562
	// The tree is written behind what it is over; the two do not meet.
	root, written, err := integrity.WriteVerity(ctx, b.tail, b.content, size+pad, o)
	if err != nil {
		return 0, err
	}
	offset, digest := strconv.FormatInt(size+pad, 10), digest.NewDigestFromBytes(digest.SHA256, root).String()
	b.desc.Annotations[registry.AnnotationVerityOffset] = offset
	b.desc.Annotations[registry.AnnotationVerityRoot] = digest
	b.desc.Annotations[registry.AnnotationVerityBlockSize] = strconv.Itoa(block)
	if b.desc.MediaType == registry.MediaTypeContainerdErofs {
		b.desc.Annotations[registry.AnnotationContainerdVerityOffset] = offset
		b.desc.Annotations[registry.AnnotationContainerdVerityRoot] = digest
		b.desc.Annotations[registry.AnnotationContainerdVerityBlockSize] = strconv.Itoa(block)
	}
	return size + pad + written, nil
}

// addIndex hashes the first end bytes of the blob, for its digest as well as for an index, which it appends.
func (o *publishing) addIndex(ctx context.Context, b *layerBlob, end int64, sum io.Writer) error {
	to := sum
	var index *integrity.ChunkIndexWriter
	if o.chunk > 0 {
		var err error
		if index, err = integrity.NewChunkIndexWriter(o.chunk, integrity.SHA256); err != nil {
			return err
		}
		to = io.MultiWriter(sum, index)
	}
	src := ctxReader{ctx, io.NewSectionReader(b.content, 0, end)}
	if _, err := io.CopyBuffer(struct{ io.Writer }{to}, src, make([]byte, streamChunk)); err != nil {
		return err
	}
	if index == nil {
		return nil
	}
	raw, err := index.Marshal()
	if err != nil {
		return err
	}
	b.desc.Annotations[registry.AnnotationChunkIndexRange] = integrity.Range{Off: end, End: -1}.String()
	b.desc.Annotations[registry.AnnotationChunkIndexDigest] = digest.FromBytes(raw).String()
	b.desc.Annotations[registry.AnnotationChunkIndexType] = registry.MediaTypeChunkIndex
	_, err = io.MultiWriter(sum, b.tail).Write(raw)
	return err
}

type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// Joined is a file of size bytes and what follows it.
type joined struct {
	front io.ReaderAt
	size  int64
	tail  io.ReaderAt
}

func (j *joined) ReadAt(p []byte, off int64) (n int, err error) {
	if off < j.size {
		front := p[:min(int64(len(p)), j.size-off)]
		n, err = j.front.ReadAt(front, off)
		if n < len(front) {
			if err == io.EOF { // the file has become shorter
				err = io.ErrUnexpectedEOF
			}
			return n, err
		}
		if n == len(p) {
			return n, nil
		}
	}
	m, err := j.tail.ReadAt(p[n:], off+int64(n)-j.size)
	return n + m, err
}

// send puts a blob, by a step of its own.
func (o *publishing) send(ctx context.Context, sink registry.Sink, what string, desc ocispec.Descriptor, content io.ReaderAt, s *steps) (err error) {
	step := s.begin(what+" "+shortDigest(desc.Digest), desc.Size)
	put := o.put
	put.Progress = func(sent int64) { step.set(sent, "") }
	result, err := sink.PutBlob(ctx, desc, content, put)
	switch {
	case result.Existed:
		step.set(0, ", it was there already")
	case result.Mounted:
		step.set(0, ", mounted from another repository")
	}
	step.end(err)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err) // which names the blob
	}
	return nil
}

// A document is JSON of which some is changed and the rest, known here or not, kept.
type document map[string]json.RawMessage

func (d document) set(key string, v any) error {
	raw, err := json.Marshal(v)
	if err == nil {
		d[key] = raw
	}
	return err
}

// erofsConfig makes the configuration of an image with these layers out of another image's.
func erofsConfig(from document, layers []ocispec.Descriptor) ([]byte, error) {
	diffIDs := make([]digest.Digest, len(layers))
	for i, l := range layers {
		diffIDs[i] = l.Digest
	}
	var features []string
	if raw := from["os.features"]; raw != nil {
		if err := json.Unmarshal(raw, &features); err != nil {
			return nil, fmt.Errorf("os.features of the configuration: %w", err)
		}
	}
	if !slices.Contains(features, registry.FeatureErofs) {
		features = append(features, registry.FeatureErofs)
	}
	if err := errors.Join(from.set("os.features", features), from.set("rootfs", ocispec.RootFS{Type: "layers", DiffIDs: diffIDs})); err != nil {
		return nil, err
	}
	return json.Marshal(from)
}

// putImage sends a configuration and a manifest; the layers are there.
func (o *publishing) putImage(ctx context.Context, sink registry.Sink, target string, config []byte, layers []ocispec.Descriptor, annotations map[string]string, s *steps) (ocispec.Descriptor, error) {
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(config), Size: int64(len(config))}
	if err := o.send(ctx, sink, "push configuration", desc, bytes.NewReader(config), s); err != nil {
		return desc, err
	}
	raw, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: desc, Layers: layers, Annotations: annotations,
	})
	if err != nil {
		return desc, err
	}
	put, err := sink.PutManifest(ctx, target, ocispec.MediaTypeImageManifest, raw)
	if err != nil {
		return put, fmt.Errorf("push manifest: %w", err)
	}
	return put, nil
}
