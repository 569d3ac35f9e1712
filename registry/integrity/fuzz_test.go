package integrity

import (
	"bytes"
	"context"
	"errors"
	"testing"
)

// FuzzChunkIndex: an index is refused with one of our errors, or its chunks are the image
// and lie in the blob one after the other, and writing them again makes the same bytes.
func FuzzChunkIndex(f *testing.F) {
	for _, s := range []string{abcd, frames, bare} {
		f.Add(unhex(f, s), int64(9))
	}
	f.Add(unhex(f, abcd), int64(1<<62))
	f.Fuzz(func(t *testing.T, raw []byte, dataEnd int64) {
		x, err := ParseChunkIndex(raw, dataEnd, ChunkLimits{})
		if err != nil {
			if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrUnsupported) {
				t.Errorf("error %v", err)
			}
			return
		}
		checkChunks(t, x, dataEnd)
		if alg, ok := x.Checksums(); ok {
			b := NewChunkIndexBuilder(x.Compression(), alg)
			for i := range x.Len() {
				c := x.Chunk(i)
				if err := b.Add(c.BlobOff, c.Off, x.Checksum(i)); err != nil {
					t.Fatal(err)
				}
			}
			if again, err := b.Marshal(x.Size(), dataEnd); err != nil || !bytes.Equal(again, raw) {
				t.Errorf("written again it is\n%x, %v; it was\n%x", again, err, raw)
			}
		}
	})
}

func checkChunks(t *testing.T, x *ChunkIndex, dataEnd int64) {
	var end, blobEnd int64
	for i := range x.Len() {
		c := x.Chunk(i)
		if c.Off != end || c.Len <= 0 || c.Len > DefaultMaxChunk {
			t.Fatalf("chunk %d is %+v, where the last one ended at %d", i, c, end)
		}
		if c.BlobOff < blobEnd || c.BlobLen <= 0 || c.BlobLen > DefaultMaxChunk || c.BlobLen > dataEnd-c.BlobOff {
			t.Fatalf("chunk %d is %+v, where the last one ended at %d of the blob, and data ends at %d", i, c, blobEnd, dataEnd)
		}
		if x.Find(c.Off) != i || x.Find(c.Off+c.Len-1) != i {
			t.Fatalf("chunk %d is %+v, and its bytes are in chunks %d and %d", i, c, x.Find(c.Off), x.Find(c.Off+c.Len-1))
		}
		if err := x.Verify(i, make([]byte, min(c.BlobLen, 1<<16))); err == nil {
			t.Fatalf("chunk %d is verified by zeros", i)
		}
		end, blobEnd = c.Off+c.Len, c.BlobOff+c.BlobLen
	}
	if end != x.Size() || x.Find(end) != -1 {
		t.Fatalf("chunks end at %d of %d bytes", end, x.Size())
	}
}

// FuzzVeritySuper: a superblock is refused with one of our errors, or written again it is
// the same; and whatever it says, opening it asks for no memory on its word.
func FuzzVeritySuper(f *testing.F) {
	f.Add(handSuper(f), int64(129*4096), uint16(4096))
	f.Add(handSuper(f)[:100], int64(0), uint16(0))
	f.Fuzz(func(t *testing.T, raw []byte, hashOffset int64, block uint16) {
		s, err := ParseVeritySuper(raw)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrUnsupported) {
				t.Errorf("error %v", err)
			}
			return
		}
		if again, err := s.Marshal(); err != nil || !bytes.Equal(again, raw[:VeritySuperSize]) {
			t.Errorf("written again it is\n%x, %v; it was\n%x", again, err, raw)
		}
		trust := VerityRoot{HashOffset: hashOffset, BlockSize: int(block), Size: 1<<63 - 1, Digest: make([]byte, s.Algorithm.Size())}
		v, err := OpenVerity(raw, trust)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Errorf("error %v", err)
			}
			return
		}
		last := v.DataSize()/int64(v.BlockSize()) - 1
		path := v.Path(nil, last)
		for i, off := range path {
			if off <= hashOffset || off > v.End()-int64(v.BlockSize()) || i > 0 && off >= path[i-1] {
				t.Errorf("the hash blocks of block %d are at %v, the tree is from %d to %d", last, path, hashOffset, v.End())
			}
		}
	})
}

// FuzzVerityRead: what is verified is what the root digest was made of, whatever was done
// to data, superblock and tree.
func FuzzVerityRead(f *testing.F) {
	const block = 512
	good := newTree(f, random(20*block, 1), VerityOptions{BlockSize: block, Salt: []byte("salt")})
	f.Add([]byte{}, uint16(0), uint8(0), uint8(20))
	f.Add([]byte{1}, uint16(5*block), uint8(0), uint8(20))
	f.Add([]byte{1}, uint16(20*block+88), uint8(3), uint8(1)) // the salt
	f.Add([]byte{1}, uint16(21*block), uint8(3), uint8(1))    // the highest hash block
	f.Add([]byte("verity\x00\x00"), uint16(20*block), uint8(19), uint8(1))
	f.Add(make([]byte, 600), uint16(20*block+510), uint8(0), uint8(1))
	f.Fuzz(func(t *testing.T, change []byte, at uint16, first, n uint8) {
		blob := bytes.Clone(good.blob)
		if int(at) < len(blob) {
			for i, b := range change[:min(len(change), len(blob)-int(at))] {
				blob[int(at)+i] ^= b
			}
		}
		v, err := OpenVerity(blob[good.size:], good.trust())
		if err != nil {
			if bytes.Equal(blob, good.blob) || !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrUnsupported) {
				t.Errorf("error %v", err)
			}
			return
		}
		off := int64(first%20) * block
		end := min(off+int64(n)*block, good.size)
		r := v.NewVerifier((&reader{blob: blob}).read, VerifierOptions{CacheBytes: 1})
		err = r.Verify(context.Background(), blob[off:end], off)
		if err == nil && !bytes.Equal(blob[off:end], good.blob[off:end]) {
			t.Errorf("bytes %d to %d were changed, and verified", off, end)
		}
		if err != nil && (bytes.Equal(blob, good.blob) || !errors.As(err, new(*MismatchError))) {
			t.Errorf("error %v", err)
		}
	})
}
