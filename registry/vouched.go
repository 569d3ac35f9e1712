package registry

import (
	"encoding/hex"
	"fmt"
	"strconv"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/registry/integrity"
)

// Vouched is what a manifest says, beside the digest of a layer, that parts of it can be
// verified by.
type Vouched struct {
	Compressed bool // the blob is zstd frames
	Index      *VouchedIndex
	Verity     *VouchedVerity
	// Uncompressed is the digest of what a compressed blob decompresses to; "" where it is
	// not said.
	Uncompressed digest.Digest
	// Unknown is why an index that there is is of no use: it is as if there were none.
	Unknown string
}

// A VouchedIndex is a chunk index.
type VouchedIndex struct {
	Holder   ocispec.Descriptor // the blob that it is in: the layer's own, or one behind it
	Off, Len int64              // where it is in there; with a frame if it is in one
	Framed   bool
	Digest   digest.Digest // of the index itself
	DataEnd  int64         // where the chunks end in the layer's blob
}

// A VouchedVerity is a dm-verity tree.
type VouchedVerity struct {
	Off       int64 // where the superblock is, in the image; all before it is the data
	BlockSize int
	Root      []byte
}

// Vouched reads what the image says of its layer l. What it says wrongly is an error.
func (im *Image) Vouched(l Layer) (v Vouched, err error) {
	v.Compressed = layerKindOf(l.MediaType) == kindErofsZstd
	if text := l.Annotations[AnnotationUncompressedDigest]; v.Compressed && text != "" {
		if v.Uncompressed, err = digest.Parse(text); err != nil {
			return v, fmt.Errorf("layer %s: %s %q: %w", l.Digest, AnnotationUncompressedDigest, clean(text, 120), err)
		}
	}
	if err = v.readVerity(l); err == nil {
		err = v.readIndex(im, l)
	}
	if err != nil {
		err = fmt.Errorf("layer %s: %w", l.Digest, err)
	}
	return v, err
}

// readIndex looks for an index in the blob, and for one in the layer behind it.
func (v *Vouched) readIndex(im *Image, l Layer) error {
	if text, ok := l.Annotations[AnnotationChunkIndexRange]; ok {
		return v.readEmbedded(l, text)
	}
	next := l.Index + 1
	if l.Index < 0 || im == nil || next >= len(im.Layers) || im.Layers[next].MediaType != MediaTypeChunkIndex {
		return nil
	}
	holder := im.Layers[next]
	if target := holder.Annotations[AnnotationChunkIndexTarget]; target != l.Digest.String() {
		return fmt.Errorf("layer %d is a chunk index for %s, and not for the layer before it", next, clean(target, 120))
	}
	if holder.Size <= 0 || holder.Size > integrity.MaxChunkIndex {
		return fmt.Errorf("layer %d is a chunk index of %d bytes; at most %d are taken", next, holder.Size, int64(integrity.MaxChunkIndex))
	}
	v.Index = &VouchedIndex{Holder: holder.Descriptor, Len: holder.Size, Digest: holder.Digest, DataEnd: l.Size}
	return nil
}

func (v *Vouched) readEmbedded(l Layer, text string) error {
	if t := l.Annotations[AnnotationChunkIndexType]; t != "" && t != MediaTypeChunkIndex {
		v.Unknown = "its chunk index is " + clean(t, 120)
		return nil
	}
	r, err := integrity.ParseRange(text)
	if err != nil {
		return fmt.Errorf("%s: %w", AnnotationChunkIndexRange, err)
	}
	off, n, err := r.In(l.Size, integrity.MaxChunkIndex)
	if err != nil {
		return fmt.Errorf("%s: %w", AnnotationChunkIndexRange, err)
	}
	d, err := digest.Parse(l.Annotations[AnnotationChunkIndexDigest])
	if err != nil {
		return fmt.Errorf("%s %q: %w", AnnotationChunkIndexDigest, clean(l.Annotations[AnnotationChunkIndexDigest], 120), err)
	}
	v.Index = &VouchedIndex{Holder: l.Descriptor, Off: off, Len: n, Framed: v.Compressed, Digest: d, DataEnd: off}
	return nil
}

func (v *Vouched) readVerity(l Layer) error {
	offset, root, block := AnnotationVerityOffset, AnnotationVerityRoot, AnnotationVerityBlockSize
	if l.Annotations[root] == "" {
		offset, root, block = AnnotationContainerdVerityOffset, AnnotationContainerdVerityRoot, AnnotationContainerdVerityBlockSize
	}
	text, ok := l.Annotations[root]
	if !ok {
		return nil
	}
	off, err := strconv.ParseInt(l.Annotations[offset], 10, 64)
	if err != nil || off <= 0 || !v.Compressed && off > l.Size {
		return fmt.Errorf("%s %q: not in a blob of %d bytes", offset, clean(l.Annotations[offset], 40), l.Size)
	}
	size := integrity.DefaultVerityBlock
	if t := l.Annotations[block]; t != "" {
		if size, err = strconv.Atoi(t); err != nil {
			return fmt.Errorf("%s %q: not a number", block, clean(t, 40))
		}
	}
	digits := text
	if d, err := digest.Parse(text); err == nil {
		digits = d.Encoded()
	}
	b, err := hex.DecodeString(digits)
	if err != nil || len(b) != integrity.SHA256.Size() && len(b) != integrity.SHA512.Size() {
		return fmt.Errorf("%s %q: not the digest of a dm-verity root", root, clean(text, 160))
	}
	v.Verity = &VouchedVerity{Off: off, BlockSize: size, Root: b}
	return nil
}
