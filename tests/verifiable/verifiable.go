// Package verifiable makes blobs of EROFS images that can be verified by parts, and says
// where in them a test has to flip a bit for something in particular to be wrong.
//
// A blob is what erofs-image-spec says:
//
//	image | zeros to a block | dm-verity superblock and tree | chunk index
//	frame | frame | … | skippable frame with the chunk index
package verifiable

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/integrity"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
)

// block is that of the trees.
const block = integrity.DefaultVerityBlock

// Options say what a blob has. The zero value is the image alone.
type Options struct {
	Chunk  int64 // of the chunk index; 0: there is none
	Verity bool  // there is a tree
	Zstd   bool  // the image, and its tree, is in frames of Chunk bytes
	// Apart has the index in a blob of its own.
	Apart bool
}

// A Blob is one that can be verified.
type Blob struct {
	Data        []byte
	Annotations map[string]string
	MediaType   string
	Plain       []byte // image and tree, decompressed
	HashOffset  int    // of the tree in Plain; 0 without one
	IndexOffset int    // of the index in Data; 0 without one, or where it is apart
	Index       []byte
	Frames      []int // where each frame begins in Data, and where the last one ends
}

// Make makes the blob of an image.
func Make(t testing.TB, image []byte, o Options) *Blob {
	t.Helper()
	b := &Blob{Annotations: map[string]string{}, MediaType: registry.MediaTypeErofs, Plain: bytes.Clone(image)}
	if o.Verity {
		b.addTree(t)
	}
	b.Data = bytes.Clone(b.Plain)
	if o.Zstd {
		b.MediaType = registry.MediaTypeErofsZstd
		b.compress(t, o.Chunk)
	} else if o.Chunk > 0 {
		w, err := integrity.NewChunkIndexWriter(o.Chunk, integrity.SHA256)
		check(t, err)
		_, err = w.Write(b.Plain)
		check(t, err)
		b.Index, err = w.Marshal()
		check(t, err)
	}
	if b.Index != nil && !o.Apart {
		b.embed(t, o.Zstd)
	}
	b.Annotations[registry.AnnotationUncompressedDigest] = digest.FromBytes(b.Plain).String()
	if !o.Zstd {
		b.Annotations[registry.AnnotationUncompressedDigest] = digest.FromBytes(b.Data).String()
	}
	return b
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (b *Blob) addTree(t testing.TB) {
	b.Plain = append(b.Plain, make([]byte, -len(b.Plain)&(block-1))...)
	b.HashOffset = len(b.Plain)
	var tree bytes.Buffer
	root, _, err := integrity.WriteVerity(t.Context(), &tree, bytes.NewReader(b.Plain), int64(len(b.Plain)), integrity.VerityOptions{Salt: []byte("salt")})
	check(t, err)
	b.Plain = append(b.Plain, tree.Bytes()...)
	b.Annotations[registry.AnnotationVerityOffset] = fmt.Sprint(b.HashOffset)
	b.Annotations[registry.AnnotationVerityRoot] = "sha256:" + hex.EncodeToString(root)
	b.Annotations[registry.AnnotationVerityBlockSize] = fmt.Sprint(block)
}

func (b *Blob) compress(t testing.TB, chunk int64) {
	z, err := zstd.NewWriter(nil)
	check(t, err)
	defer z.Close()
	index := integrity.NewChunkIndexBuilder(integrity.Zstd, integrity.SHA256)
	b.Data = nil
	step := int(chunk)
	if chunk == 0 {
		step = 256 << 10
	}
	for off := 0; off < len(b.Plain); off += step {
		frame := z.EncodeAll(b.Plain[off:min(off+step, len(b.Plain))], nil)
		sum := sha256.Sum256(frame)
		check(t, index.Add(int64(len(b.Data)), int64(off), sum[:]))
		b.Frames = append(b.Frames, len(b.Data))
		b.Data = append(b.Data, frame...)
	}
	b.Frames = append(b.Frames, len(b.Data))
	if chunk > 0 {
		b.Index, err = index.Marshal(int64(len(b.Plain)), int64(len(b.Data)))
		check(t, err)
	}
}

func (b *Blob) embed(t testing.TB, framed bool) {
	b.IndexOffset = len(b.Data)
	stored := b.Index
	if framed {
		var err error
		stored, err = integrity.WrapFrame(b.Index)
		check(t, err)
	}
	b.Data = append(b.Data, stored...)
	b.Annotations[registry.AnnotationChunkIndexRange] = integrity.Range{Off: int64(b.IndexOffset), End: -1}.String()
	b.Annotations[registry.AnnotationChunkIndexDigest] = digest.FromBytes(b.Index).String()
	b.Annotations[registry.AnnotationChunkIndexType] = registry.MediaTypeChunkIndex
}

// Layers are the layers of an image that has the blob, and its index if that is apart.
func (b *Blob) Layers() []ocipush.Layer {
	l := ocipush.Bytes(b.MediaType, b.Data)
	l.Annotations = b.Annotations
	layers := []ocipush.Layer{l}
	if b.Index != nil && b.IndexOffset == 0 {
		x := ocipush.Bytes(registry.MediaTypeChunkIndex, b.Index)
		x.Annotations = map[string]string{registry.AnnotationChunkIndexTarget: digest.FromBytes(b.Data).String()}
		layers = append(layers, x)
	}
	return layers
}
