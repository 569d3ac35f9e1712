package erofsfmt

import (
	"context"
	"slices"
	"testing"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
)

// The extents of every file of the corpus cover it, none twice, and what is stored
// is where they say.
func TestExtentsCoverFiles(t *testing.T) {
	ctx := context.Background()
	for _, c := range corpus.Images(t) {
		im := openCorpus(t, c)
		visit(t, im, func(name string, ino *Inode) {
			end, want := int64(0), make([]byte, ino.Size)
			if !ino.hasData() {
				want = nil
			} else if err := im.ReadFile(ctx, ino, want, 0); err != nil {
				t.Fatal(err)
			}
			err := im.Extents(ctx, ino, func(e Extent) bool {
				if e.Off != end || e.Len <= 0 || e.Kind == "stored" && e.PhysLen != e.Len || (e.Kind == "encoded") != (e.Algorithm != "") {
					t.Errorf("%s: %q: %+v after byte %d", c.Name, name, e, end)
				}
				end = e.Off + e.Len
				if e.Kind != "stored" || e.In != "" {
					return true
				}
				source := [][]byte{c.Data, c.Blob}[e.Device]
				if !slices.Equal(source[e.PhysOff:e.PhysOff+e.PhysLen], want[e.Off:end]) {
					t.Errorf("%s: %q: %+v: other bytes", c.Name, name, e)
				}
				return true
			})
			if err != nil || end != int64(len(want)) {
				t.Errorf("%s: %q: extents up to %d, want %d: %v", c.Name, name, end, len(want), err)
			}
		})
	}
}

// What is joined, by hand: chunks 0 and 1 in a row, two holes, a chunk, and one
// that is before it.
func TestExtentsJoin(t *testing.T) {
	f := newFake(ondisk.LayoutChunk, 6*4096-5)
	f.super.FeatureIncompat = ondisk.IncompatChunkedFile
	f.body = le(uint32(3), uint32(4), ^uint32(0), ^uint32(0), uint32(6), uint32(5))
	im, ino := f.open(t, Options{})
	var got []Extent
	collect := func(e Extent) bool { got = append(got, e); return len(got) != 3 }
	if err := im.Extents(context.Background(), ino, collect); err != nil {
		t.Fatal(err)
	}
	want := []Extent{
		{Off: 0, Len: 8192, Kind: "stored", PhysOff: 3 * 4096, PhysLen: 8192},
		{Off: 8192, Len: 8192, Kind: "hole"},
		{Off: 16384, Len: 4096, Kind: "stored", PhysOff: 6 * 4096, PhysLen: 4096},
	}
	if !slices.Equal(got, want) {
		t.Errorf("until told to stop: %+v", got)
	}
	got = got[:0]
	if err := im.Extents(context.Background(), ino, func(e Extent) bool { got = append(got, e); return true }); err != nil {
		t.Fatal(err)
	}
	if want = append(want, Extent{Off: 20480, Len: 4091, Kind: "stored", PhysOff: 5 * 4096, PhysLen: 4091}); !slices.Equal(got, want) {
		t.Errorf("%+v", got)
	}
}

// How inodes are stored, in images of which mkfs was told to do it so.
func TestStored(t *testing.T) {
	for _, c := range []struct {
		image string
		path  []string
		want  Stored
	}{
		{"plain", []string{"mixed", "half"}, Stored{Size: 64, Layout: "plain"}},
		{"inline", []string{"sizes", "t511"}, Stored{Size: 64, Layout: "inline"}},
		{"plain", []string{"dev", "fifo"}, Stored{Size: 64}},
		{"chunk-indexes", []string{"mixed", "half"}, Stored{Size: 64, Layout: "chunk", Unit: 4096, Flags: []string{"indexes"}}},
		{"chunked64k", []string{"mixed", "half"}, Stored{Size: 64, Layout: "chunk", Unit: 65536}},
		{"lz4", []string{"mixed", "half"}, Stored{Size: 64, Layout: "compressed compact", Unit: 4096, Flags: []string{"compacted_2b"}}},
		{"lz4-legacy", []string{"mixed", "half"}, Stored{Size: 64, Layout: "compressed full", Unit: 4096}},
		{"lz4-frag", []string{"sizes", "t511"}, Stored{Size: 64, Layout: "compressed full", Flags: []string{"whole_file_fragment"}}},
		{"48bit-zstd", []string{"mixed", "half"}, Stored{Size: 32, Layout: "compressed full", Unit: 65536, Record: 4, Flags: []string{"extents"}}},
		{"metabox", []string{"xattr", "many"}, Stored{Size: 32, In: "metabox", Layout: "inline", Xattrs: 1008}},
		{"dot-omitted", []string{"mixed"}, Stored{Size: 32, Layout: "inline", DotHidden: true}},
	} {
		im := openCorpus(t, corpus.Get(t, c.image))
		ino := find(t, im, c.path...)
		got, err := im.Stored(context.Background(), ino)
		if err != nil {
			t.Fatal(err)
		}
		c.want.Off = int64(ino.Nid&^ondisk.MetaboxBit) * 32
		if got.In == "" {
			c.want.Off += int64(im.sb.MetaBlkaddr) << im.sb.BlockBits
		}
		if !slices.Equal(got.Flags, c.want.Flags) {
			t.Errorf("%s: %q: flags %q, want %q", c.image, c.path, got.Flags, c.want.Flags)
		}
		got.Flags, c.want.Flags = nil, nil
		if got.Off != c.want.Off || got.Layout != c.want.Layout || got.Unit != c.want.Unit || got.Record != c.want.Record ||
			got.Size != c.want.Size || got.In != c.want.In || got.Xattrs != c.want.Xattrs || got.DotHidden != c.want.DotHidden {
			t.Errorf("%s: %q: %+v, want %+v", c.image, c.path, got, c.want)
		}
	}
	prefixes, err := openCorpus(t, corpus.Get(t, "xattr-prefix")).XattrPrefixes(context.Background())
	if err != nil || !slices.Equal(prefixes, []string{"user.key.number."}) {
		t.Errorf("xattr prefixes %q, %v", prefixes, err)
	}
}
