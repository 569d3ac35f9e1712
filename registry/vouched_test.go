package registry_test

import (
	"maps"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/registry"
)

// TestVouched: what a manifest says of a layer beside its digest, and what is no sense.
func TestVouched(t *testing.T) {
	const size = 100_000
	layer, index := digest.FromString("layer"), digest.FromString("index")
	root := strings.Repeat("ab", 32)
	embedded := map[string]string{
		"org.erofs.chunk-index.range": "90000", "org.erofs.chunk-index.digest": index.String(), "org.erofs.chunk-index.mediaType": registry.MediaTypeChunkIndex,
	}
	verity := map[string]string{
		"org.erofs.dmverity.hash_offset": "40960", "org.erofs.dmverity.root_digest": root, "org.erofs.dmverity.block_size": "4096",
	}
	containerds := map[string]string{
		"dev.containerd.erofs.dmverity.offset": "8192", "dev.containerd.erofs.dmverity.root_digest": "sha256:" + root,
	}
	with := func(of map[string]string, pairs ...string) map[string]string {
		m := maps.Clone(of)
		for i := 0; i < len(pairs); i += 2 {
			m[pairs[i]] = pairs[i+1]
		}
		return m
	}
	embeddedAt := func(off, end int64, framed bool) *registry.VouchedIndex {
		return &registry.VouchedIndex{Off: off, Len: end - off, Framed: framed, Digest: index, DataEnd: off}
	}
	apart := func(target string, size int64) *registry.Layer {
		return &registry.Layer{Index: 1, Descriptor: ocispec.Descriptor{MediaType: registry.MediaTypeChunkIndex, Digest: index, Size: size,
			Annotations: map[string]string{"org.erofs.chunk-index.target": target}}}
	}
	for _, c := range []struct {
		name        string
		mediaType   string
		annotations map[string]string
		next        *registry.Layer
		index       *registry.VouchedIndex // without its holder
		block       int                    // of the tree; 0 without one
		off         int64                  // of the tree
		compressed  bool
		unknown     string
		err         string
	}{
		{name: "nothing", mediaType: registry.MediaTypeErofs},
		{name: "embedded", mediaType: registry.MediaTypeErofs, annotations: embedded, index: embeddedAt(90000, size, false)},
		{name: "embedded, with an end", mediaType: registry.MediaTypeErofs, annotations: with(embedded, "org.erofs.chunk-index.range", "90000:91000"),
			index: embeddedAt(90000, 91000, false)},
		{name: "embedded, without a type", mediaType: registry.MediaTypeErofs, annotations: with(embedded, "org.erofs.chunk-index.mediaType", ""),
			index: embeddedAt(90000, size, false)},
		{name: "in a frame", mediaType: registry.MediaTypeErofsZstd, annotations: embedded, index: embeddedAt(90000, size, true), compressed: true},
		{name: "in a frame, containerd's name", mediaType: "application/vnd.erofs.layer.v1+zstd", annotations: embedded, index: embeddedAt(90000, size, true), compressed: true},
		{name: "of an unknown type", mediaType: registry.MediaTypeErofs, annotations: with(embedded, "org.erofs.chunk-index.mediaType", "application/vnd.erofs.chunk-index.v9"),
			unknown: "chunk-index.v9"},
		{name: "outside", mediaType: registry.MediaTypeErofs, annotations: with(embedded, "org.erofs.chunk-index.range", "90000:100001"), err: "100001"},
		{name: "no range", mediaType: registry.MediaTypeErofs, annotations: with(embedded, "org.erofs.chunk-index.range", "-1"), err: "not a number"},
		{name: "no digest", mediaType: registry.MediaTypeErofs, annotations: with(embedded, "org.erofs.chunk-index.digest", "sha256:0"), err: "org.erofs.chunk-index.digest"},

		{name: "apart", mediaType: registry.MediaTypeErofs, next: apart(layer.String(), 500),
			index: &registry.VouchedIndex{Len: 500, Digest: index, DataEnd: size}},
		{name: "apart, for another", mediaType: registry.MediaTypeErofs, next: apart(index.String(), 500), err: "not for the layer before it"},
		{name: "apart, for nothing", mediaType: registry.MediaTypeErofs, next: apart("", 500), err: "not for the layer before it"},
		{name: "apart, huge", mediaType: registry.MediaTypeErofs, next: apart(layer.String(), 1<<40), err: "at most"},
		{name: "apart, of an unknown type", mediaType: registry.MediaTypeErofs,
			next: &registry.Layer{Index: 1, Descriptor: ocispec.Descriptor{MediaType: "application/vnd.erofs.chunk-index.v9", Digest: index, Size: 500}}},
		{name: "embedded and apart", mediaType: registry.MediaTypeErofs, annotations: embedded, next: apart(layer.String(), 500), index: embeddedAt(90000, size, false)},

		{name: "verity", mediaType: registry.MediaTypeErofs, annotations: verity, block: 4096, off: 40960},
		{name: "verity, containerd's name", mediaType: "application/vnd.erofs.layer.v1", annotations: containerds, block: 4096, off: 8192},
		{name: "verity without an offset", mediaType: registry.MediaTypeErofs, annotations: with(verity, "org.erofs.dmverity.hash_offset", ""), err: "hash_offset"},
		{name: "verity outside", mediaType: registry.MediaTypeErofs, annotations: with(verity, "org.erofs.dmverity.hash_offset", "100001"), err: "hash_offset"},
		{name: "verity without a root", mediaType: registry.MediaTypeErofs, annotations: with(verity, "org.erofs.dmverity.root_digest", "xyz"), err: "root_digest"},
		{name: "verity, short root", mediaType: registry.MediaTypeErofs, annotations: with(verity, "org.erofs.dmverity.root_digest", root[:10]), err: "root_digest"},
		{name: "verity, no block size", mediaType: registry.MediaTypeErofs, annotations: with(verity, "org.erofs.dmverity.block_size", "4k"), err: "block_size"},
		{name: "zstd, the tree behind its end", mediaType: registry.MediaTypeErofsZstd, annotations: with(verity, "org.erofs.dmverity.hash_offset", "409600"),
			block: 4096, off: 409600, compressed: true},
		{name: "uncompressed", mediaType: registry.MediaTypeErofsZstd, annotations: map[string]string{"org.erofs.uncompressed-digest": "x"}, err: "uncompressed-digest"},
	} {
		l := registry.Layer{Descriptor: ocispec.Descriptor{MediaType: c.mediaType, Digest: layer, Size: size, Annotations: c.annotations}}
		im := &registry.Image{Layers: []registry.Layer{l}}
		if c.next != nil {
			im.Layers = append(im.Layers, *c.next)
		}
		v, err := im.Vouched(l)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) || !strings.Contains(err.Error(), layer.String()) {
				t.Errorf("%s: %v, which does not say %q", c.name, err, c.err)
			}
			continue
		}
		if err != nil || v.Compressed != c.compressed || !strings.Contains(v.Unknown, c.unknown) || (v.Unknown == "") != (c.unknown == "") {
			t.Errorf("%s: %+v, %v", c.name, v, err)
		}
		if (v.Verity == nil) != (c.block == 0) || v.Verity != nil && (v.Verity.BlockSize != c.block || v.Verity.Off != c.off || len(v.Verity.Root) != 32) {
			t.Errorf("%s: tree %+v", c.name, v.Verity)
		}
		if (v.Index == nil) != (c.index == nil) {
			t.Errorf("%s: index %+v", c.name, v.Index)
			continue
		}
		if c.index == nil {
			continue
		}
		holder := layer
		if c.index.DataEnd == size {
			holder = index
		}
		if got := *v.Index; got.Holder.Digest != holder || got.Off != c.index.Off || got.Len != c.index.Len || got.Framed != c.index.Framed ||
			got.Digest != c.index.Digest || got.DataEnd != c.index.DataEnd {
			t.Errorf("%s: index %+v, want %+v", c.name, got, c.index)
		}
	}
	// A blob that was named by its digest has no neighbours.
	l := registry.Layer{Index: -1, Descriptor: ocispec.Descriptor{Digest: layer, Size: size}}
	if v, err := (&registry.Image{Layers: []registry.Layer{l, *apart(layer.String(), 500)}}).Vouched(l); err != nil || v.Index != nil {
		t.Errorf("a blob outside the manifest: %+v, %v", v, err)
	}
}
