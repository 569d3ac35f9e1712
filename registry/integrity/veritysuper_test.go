package integrity

import (
	"bytes"
	"errors"
	"reflect"
	"testing"
)

// handSuper is a superblock, put together from its documentation.
func handSuper(t testing.TB) []byte {
	b := unhex(t, `
		7665726974790000 01000000 01000000
		11111111222233334444555555555555
		7368613235360000000000000000000000000000000000000000000000000000
		00100000 00100000 8100000000000000
		0200 000000000000 00ff`)
	return append(b, make([]byte, VeritySuperSize-len(b))...)
}

func TestVeritySuper(t *testing.T) {
	want := &VeritySuper{
		UUID:          [16]byte{0x11, 0x11, 0x11, 0x11, 0x22, 0x22, 0x33, 0x33, 0x44, 0x44, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55},
		DataBlockSize: 4096, HashBlockSize: 4096, DataBlocks: 129, Salt: []byte{0, 0xff},
	}
	raw := handSuper(t)
	for _, b := range [][]byte{raw, append(bytes.Clone(raw), "what comes next"...)} {
		got, err := ParseVeritySuper(b)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("superblock %+v, %v; want %+v", got, err, want)
		}
	}
	if b, err := want.Marshal(); err != nil || !bytes.Equal(b, raw) {
		t.Errorf("superblock\n%x, %v; want\n%x", b, err, raw)
	}
}

func TestVeritySuperRoundTrip(t *testing.T) {
	for _, s := range []*VeritySuper{
		{Algorithm: SHA512, DataBlockSize: 512, HashBlockSize: 65536, DataBlocks: 1<<64 - 1, Salt: random(256, 1)},
		{DataBlockSize: 65536, HashBlockSize: 512, DataBlocks: 0, Salt: []byte{}},
	} {
		b, err := s.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := ParseVeritySuper(b); err != nil || !reflect.DeepEqual(got, s) {
			t.Errorf("superblock %+v, %v; want %+v", got, err, s)
		}
	}
}

func TestVeritySuperRefused(t *testing.T) {
	raw := handSuper(t)
	for _, c := range []struct {
		name string
		raw  []byte
		kind error
		off  int64
	}{
		{"nothing", nil, ErrCorrupt, 0},
		{"a byte is missing", raw[:511], ErrCorrupt, 511},
		{"magic", replaced(raw, 7, 1), ErrCorrupt, 0},
		{"version 0", replaced(raw, 8, 0), ErrUnsupported, 8},
		{"version 2", replaced(raw, 8, 2), ErrUnsupported, 8},
		{"hash type 0", replaced(raw, 12, 0), ErrUnsupported, 12},
		{"hash type 2", replaced(raw, 12, 2), ErrUnsupported, 12},
		{"sha1", replaced(raw, 32, []byte("sha1\x00\x00")...), ErrUnsupported, 32},
		{"no algorithm", replaced(raw, 32, make([]byte, 6)...), ErrUnsupported, 32},
		{"SHA256", replaced(raw, 32, 'S', 'H', 'A'), ErrUnsupported, 32},
		{"sha256 and more", replaced(raw, 39, 'x'), ErrUnsupported, 32},
		{"sha256 to the end of the field and more", replaced(raw, 63, 'x'), ErrUnsupported, 32},
		{"data block of 0", replaced(raw, 64, 0, 0), ErrUnsupported, 64},
		{"data block of 256", replaced(raw, 64, 0, 1), ErrUnsupported, 64},
		{"data block of 4097", replaced(raw, 64, 1), ErrUnsupported, 64},
		{"data block of 6144", replaced(raw, 65, 0x18), ErrUnsupported, 64},
		{"data block of 128 KiB", replaced(raw, 64, 0, 0, 2), ErrUnsupported, 64},
		{"data block of 2 GiB", replaced(raw, 64, 0, 0, 0, 0x80), ErrUnsupported, 64},
		{"hash block of 0", replaced(raw, 68, 0, 0), ErrUnsupported, 68},
		{"hash block of 2 GiB", replaced(raw, 68, 0, 0, 0, 0x80), ErrUnsupported, 68},
		{"salt of 257 bytes", replaced(raw, 80, 1, 1), ErrCorrupt, 80},
		{"salt of 65535 bytes", replaced(raw, 80, 0xff, 0xff), ErrCorrupt, 80},
		{"salt cut off", replaced(raw, 80, 1), ErrCorrupt, 82},
		{"first padding", replaced(raw, 82, 1), ErrCorrupt, 82},
		{"behind the salt", replaced(raw, 90, 1), ErrCorrupt, 82},
		{"last byte", replaced(raw, 511, 1), ErrCorrupt, 82},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := ParseVeritySuper(c.raw)
			wantFormatError(t, err, c.kind, c.off)
		})
	}
	for name, s := range map[string]*VeritySuper{
		"salt":       {DataBlockSize: 4096, HashBlockSize: 4096, Salt: make([]byte, 257)},
		"no block":   {HashBlockSize: 4096},
		"hash block": {DataBlockSize: 4096, HashBlockSize: 4097},
		"algorithm":  {Algorithm: 2, DataBlockSize: 4096, HashBlockSize: 4096},
	} {
		if b, err := s.Marshal(); err == nil {
			t.Errorf("%s: written as %x", name, b)
		}
	}
}

func TestOpenVerityRefused(t *testing.T) {
	f := newTree(t, random(129*4096, 1), VerityOptions{Salt: []byte{1}})
	small := newTree(t, random(129*512, 1), VerityOptions{BlockSize: 512})
	good := f.trust()
	for _, c := range []struct {
		name   string
		super  []byte
		change func(*VerityRoot)
	}{
		{"not a superblock", f.blob, func(*VerityRoot) {}},
		{"other block size", f.blob[f.size:], func(r *VerityRoot) { r.BlockSize = 512 }},
		{"no block size", f.blob[f.size:], func(r *VerityRoot) { r.BlockSize = 5000 }},
		{"other block size in the blob", small.blob[small.size:], func(r *VerityRoot) { r.HashOffset = small.size }},
		{"hash blocks of another size", replaced(f.blob[f.size:], 69, 0x20), func(*VerityRoot) {}},
		{"no root digest", f.blob[f.size:], func(r *VerityRoot) { r.Digest = nil }},
		{"half a root digest", f.blob[f.size:], func(r *VerityRoot) { r.Digest = r.Digest[:16] }},
		{"a root digest of SHA-512", f.blob[f.size:], func(r *VerityRoot) { r.Digest = make([]byte, 64) }},
		{"one block less", f.blob[f.size:], func(r *VerityRoot) { r.HashOffset -= 4096 }},
		{"one block more", f.blob[f.size:], func(r *VerityRoot) { r.HashOffset += 4096 }},
		{"within a block", f.blob[f.size:], func(r *VerityRoot) { r.HashOffset++ }},
		{"no data", f.blob[f.size:], func(r *VerityRoot) { r.HashOffset = 0 }},
		{"negative data", f.blob[f.size:], func(r *VerityRoot) { r.HashOffset = -4096 }},
		{"as much data as there is not", f.blob[f.size:], func(r *VerityRoot) { r.HashOffset = 1<<63 - 4096 }},
		{"a byte of the tree is missing", f.blob[f.size:], func(r *VerityRoot) { r.Size-- }},
		{"nothing to read", f.blob[f.size:], func(r *VerityRoot) { r.Size = 0 }},
	} {
		r := good
		c.change(&r)
		if _, err := OpenVerity(c.super, r); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: error %v", c.name, err)
		}
	}
	if _, err := OpenVerity(f.blob[f.size:], good); err != nil {
		t.Error(err)
	}
}

// Without a hash block nothing but the superblock has to be there.
func TestOpenVerityOfOneBlock(t *testing.T) {
	f := newTree(t, random(4096, 1), VerityOptions{})
	trust := f.trust()
	trust.Size = 4096 + VeritySuperSize
	if _, err := OpenVerity(f.blob[f.size:trust.Size], trust); err != nil {
		t.Error(err)
	}
	trust.Size--
	_, err := OpenVerity(f.blob[f.size:], trust)
	wantFormatError(t, err, ErrCorrupt, 72)
}
