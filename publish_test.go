package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"math/rand/v2"
	"slices"
	"strconv"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/integrity"
)

// TestLayerBlob: a layer is the image, and what it is verified by says so of every byte of it.
func TestLayerBlob(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for _, size := range []int64{1, 4095, 4096, 4097, 700_000} {
		image := make([]byte, size)
		for i := range image {
			image[i] = byte(rng.Uint32())
		}
		for _, o := range []publishing{
			{mediaType: registry.MediaTypeErofs},
			{mediaType: registry.MediaTypeErofs, verity: true},
			{mediaType: registry.MediaTypeErofs, chunk: 64 << 10},
			{mediaType: registry.MediaTypeContainerdErofs, verity: true, chunk: 256 << 10},
		} {
			checkLayerBlob(t, &o, image)
		}
	}
}

func checkLayerBlob(t *testing.T, o *publishing, image []byte) {
	t.Helper()
	blob, err := o.layerBlob(t.Context(), bytes.NewReader(image), int64(len(image)), digest.FromBytes(image), &scratch{dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	all := make([]byte, blob.desc.Size)
	if n, err := blob.content.ReadAt(all, 0); n != len(all) || err != nil && err != io.EOF {
		t.Fatalf("%d of %d bytes: %v", n, len(all), err)
	}
	notes := blob.desc.Annotations
	if !bytes.HasPrefix(all, image) || digest.FromBytes(all) != blob.desc.Digest || blob.desc.MediaType != o.mediaType ||
		notes[registry.AnnotationUncompressedDigest] != blob.desc.Digest.String() {
		t.Errorf("%d bytes, %+v: the blob is not the image and what belongs to it: %+v", len(image), o, blob.desc)
	}
	again, err := o.layerBlob(t.Context(), bytes.NewReader(image), int64(len(image)), digest.FromBytes(image), &scratch{dir: t.TempDir()})
	if err != nil || again.desc.Digest != blob.desc.Digest {
		t.Errorf("made again it is %v, %v", again, err)
	}
	again.Close()
	end := len(image)
	if o.verity {
		end = checkTree(t, all, image, notes)
	}
	if o.chunk > 0 {
		checkIndex(t, all, end, notes)
	} else if len(all) != end {
		t.Errorf("%d bytes behind the image", len(all)-end)
	}
	if want := o.mediaType == registry.MediaTypeContainerdErofs; (notes[registry.AnnotationContainerdVerityRoot] != "") != want {
		t.Errorf("%s: annotations %v", o.mediaType, notes)
	}
}

// checkTree verifies the image by its tree, and says where that ends.
func checkTree(t *testing.T, all, image []byte, notes map[string]string) int {
	t.Helper()
	offset, err := strconv.ParseInt(notes[registry.AnnotationVerityOffset], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	root, err := digest.Parse(notes[registry.AnnotationVerityRoot])
	if err != nil {
		t.Fatal(err)
	}
	raw := make([]byte, 32)
	for i := range raw {
		n, _ := strconv.ParseUint(root.Encoded()[2*i:2*i+2], 16, 8)
		raw[i] = byte(n)
	}
	tree, err := integrity.OpenVerity(all[offset:], integrity.VerityRoot{HashOffset: offset, Size: int64(len(all)), Digest: raw})
	if err != nil {
		t.Fatal(err)
	}
	read := func(_ context.Context, p []byte, off int64) error { copy(p, all[off:]); return nil }
	if err := tree.NewVerifier(read, integrity.VerifierOptions{}).Verify(t.Context(), all[:offset], 0); err != nil {
		t.Errorf("%d bytes: %v", len(image), err)
	}
	if behind := all[len(image):offset]; len(behind) > 4095 || slices.ContainsFunc(behind, func(b byte) bool { return b != 0 }) {
		t.Errorf("%d bytes between image and tree", len(behind))
	}
	return int(tree.End())
}

// checkIndex verifies the first end bytes by the index.
func checkIndex(t *testing.T, all []byte, end int, notes map[string]string) {
	t.Helper()
	at, err := integrity.ParseRange(notes[registry.AnnotationChunkIndexRange])
	if err != nil {
		t.Fatal(err)
	}
	off, n, err := at.In(int64(len(all)), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	raw := all[off : off+n]
	if digest.FromBytes(raw).String() != notes[registry.AnnotationChunkIndexDigest] || int(off) != end || off+n != int64(len(all)) {
		t.Errorf("the index is at %d+%d of %d, behind %d: %v", off, n, len(all), end, notes)
	}
	index, err := integrity.ParseChunkIndex(raw, off, integrity.ChunkLimits{})
	if err != nil || index.Size() != int64(end) {
		t.Fatalf("%d bytes, want %d: %v", index.Size(), end, err)
	}
	for i := range index.Len() {
		c := index.Chunk(i)
		if err := index.Verify(i, all[c.Off:c.Off+c.Len]); err != nil {
			t.Error(err)
		}
	}
}

// TestErofsConfig: what a configuration says besides layers is kept, known here or not.
func TestErofsConfig(t *testing.T) {
	var from document
	const source = `{"architecture":"arm64","os":"linux","os.features":["x"],"config":{"Env":["A=b"],"Custom":1},"rootfs":{"type":"layers","diff_ids":["sha256:old"]},"vendor":{"z":[1,2]}}`
	if err := json.Unmarshal([]byte(source), &from); err != nil {
		t.Fatal(err)
	}
	d := digest.FromString("layer")
	raw, err := erofsConfig(from, []ocispec.Descriptor{{Digest: d}})
	if err != nil {
		t.Fatal(err)
	}
	want := `{"architecture":"arm64","config":{"Env":["A=b"],"Custom":1},"os":"linux","os.features":["x","erofs"],"rootfs":{"type":"layers","diff_ids":["` + d.String() + `"]},"vendor":{"z":[1,2]}}`
	if string(raw) != want {
		t.Errorf("%s\nwant %s", raw, want)
	}
}

// TestChangeHistory: there is an entry that is not empty for each layer, or no history.
func TestChangeHistory(t *testing.T) {
	const history = `[{"created_by":"a"},{"created_by":"b","empty_layer":true},{"created_by":"c"}]`
	for _, c := range []struct {
		squash bool
		layers int
		want   string
	}{
		{false, 2, history},
		{false, 3, ""},
		{true, 2, `[{"created_by":"a","empty_layer":true},{"created_by":"b","empty_layer":true},{"created_by":"c","empty_layer":true},` +
			`{"created_by":"erofs-oci convert --squash","comment":"all 2 layers in one"}]`},
	} {
		config := document{"history": json.RawMessage(history)}
		if err := changeHistory(config, c.layers, c.squash); err != nil || string(config["history"]) != c.want {
			t.Errorf("%+v: %s, %v", c, config["history"], err)
		}
	}
}
