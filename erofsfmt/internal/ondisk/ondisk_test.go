package ondisk

import (
	"bytes"
	"encoding/binary"
	"reflect"
	"testing"
)

// Each hand-written decoder agrees with encoding/binary on the structure, and
// each structure has the size that the disk gives it.
func TestDecodersMatchStructures(t *testing.T) {
	raw := make([]byte, 256)
	for i := range raw {
		raw[i] = byte(i*7 + 3)
	}
	for _, c := range []struct {
		size int
		got  any
	}{
		{InodeCompactSize, DecodeInodeCompact(raw)},
		{InodeExtendedSize, DecodeInodeExtended(raw)},
		{DirentSize, DecodeDirent(raw)},
		{MapHeaderSize, DecodeMapHeader(raw)},
		{LclusterIndexSize, DecodeLclusterIndex(raw)},
		{ChunkIndexSize, DecodeChunkIndex(raw)},
		{XattrEntrySize, DecodeXattrEntry(raw)},
	} {
		want := reflect.New(reflect.TypeOf(c.got))
		if n, err := binary.Decode(raw, binary.LittleEndian, want.Interface()); err != nil || n != c.size {
			t.Errorf("%T: %d bytes, %v; want %d", c.got, n, err, c.size)
		}
		if !reflect.DeepEqual(want.Elem().Interface(), c.got) {
			t.Errorf("%T: %+v, want %+v", c.got, c.got, want.Elem().Interface())
		}
		back, err := binary.Append(nil, binary.LittleEndian, c.got)
		if err != nil || !bytes.Equal(back, raw[:c.size]) {
			t.Errorf("%T: encodes to %x, %v", c.got, back, err)
		}
	}
}

func TestSizes(t *testing.T) {
	for _, c := range []struct {
		v    any
		size int
	}{
		{Super{}, SuperBoxedSize},
		{Device{}, DeviceSize},
		{XattrHeader{}, XattrHeaderSize},
	} {
		if n := binary.Size(c.v); n != c.size {
			t.Errorf("%T has %d bytes, want %d", c.v, n, c.size)
		}
	}
}

// The offsets are those of the comments in fs/erofs/erofs_fs.h, by hand.
func TestSuperOffsets(t *testing.T) {
	raw := make([]byte, SuperBoxedSize)
	binary.LittleEndian.PutUint32(raw[0x50:], 0x11)
	raw[0x5b] = 0x22
	binary.LittleEndian.PutUint64(raw[0x60:], 0x33)
	binary.LittleEndian.PutUint32(raw[0x6c:], 0x44)
	binary.LittleEndian.PutUint64(raw[0x70:], 0x55)
	binary.LittleEndian.PutUint64(raw[0x80:], 0x66)
	var s Super
	if _, err := binary.Decode(raw, binary.LittleEndian, &s); err != nil {
		t.Fatal(err)
	}
	if s.FeatureIncompat != 0x11 || s.XattrPrefixCount != 0x22 || s.PackedNid != 0x33 || s.BuildTime != 0x44 ||
		s.RootNid8b != 0x55 || s.MetaboxNid != 0x66 {
		t.Errorf("%+v", s)
	}
}
