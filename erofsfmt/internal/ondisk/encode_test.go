package ondisk

import (
	"bytes"
	"encoding/binary"
	"testing"
)

// Each hand-written encoder agrees with encoding/binary on the structure.
func TestEncodersMatchStructures(t *testing.T) {
	raw := make([]byte, 256)
	for i := range raw {
		raw[i] = byte(i*7 + 3)
	}
	fill := func(v any) {
		if _, err := binary.Decode(raw, binary.LittleEndian, v); err != nil {
			t.Fatal(err)
		}
	}
	var (
		super    Super
		compact  InodeCompact
		extended InodeExtended
		dirent   Dirent
		header   XattrHeader
		entry    XattrEntry
		mapHead  MapHeader
		lcluster LclusterIndex
		chunk    ChunkIndex
	)
	for _, v := range []any{&super, &compact, &extended, &dirent, &header, &entry, &mapHead, &lcluster, &chunk} {
		fill(v)
	}
	short := super
	short.ExtSlots = 0
	wantShort, err := binary.Append(nil, binary.LittleEndian, short)
	if err != nil {
		t.Fatal(err)
	}
	prefix := []byte("before")
	for _, c := range []struct {
		name      string
		got, want []byte
	}{
		{"super, extended", super.Append(prefix), raw[:SuperBoxedSize]},
		{"super", short.Append(prefix), wantShort[:SuperSize]},
		{"compact inode", compact.Append(prefix), raw[:InodeCompactSize]},
		{"extended inode", extended.Append(prefix), raw[:InodeExtendedSize]},
		{"dirent", dirent.Append(prefix), raw[:DirentSize]},
		{"xattr header", header.Append(prefix), raw[:XattrHeaderSize]},
		{"xattr entry", entry.Append(prefix), raw[:XattrEntrySize]},
		{"map header", mapHead.Append(prefix), raw[:MapHeaderSize]},
		{"lcluster index", lcluster.Append(prefix), raw[:LclusterIndexSize]},
		{"chunk index", chunk.Append(prefix), raw[:ChunkIndexSize]},
	} {
		if !bytes.Equal(c.got, append(bytes.Clone(prefix), c.want...)) {
			t.Errorf("%s: %x, want %x", c.name, c.got, c.want)
		}
	}
}
