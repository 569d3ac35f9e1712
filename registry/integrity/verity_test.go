package integrity

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
)

// These root digests are what veritysetup 2.6.1 says, so no program is needed here.
func TestVerityRoot(t *testing.T) {
	for _, c := range []struct {
		blocks int
		salt   []byte
		root   string
	}{
		// SHA-256 of 4096 zeros.
		{1, nil, "ad7facb2586fc6e966c004d7d1d16b024f5805ff7cb47c7a85dabd8b48892ca7"},
		{2, nil, "90b10db56173e2e7c847f6ff3ed85a3aebb140bc0064ec9a156ae5b2e71db988"},
		{129, nil, "3e5d285ca1f11edfca6327028471f08b75634ff3361264b88d79ee2e95cacb84"},
		{129, []byte{0, 0xff}, "a8196b95ee03ed9718fee2a38f8626207ca14cb5dbcf086be5a3edcf3297702b"},
	} {
		f := newTree(t, make([]byte, c.blocks*4096), VerityOptions{Salt: c.salt})
		if got := hex.EncodeToString(f.root); got != c.root {
			t.Errorf("%d blocks, salt %x: root digest %s, want %s", c.blocks, c.salt, got, c.root)
		}
	}
}

// Where the hash blocks are, by hand. Blocks of 512 hold 16 digests of SHA-256, or 8 of
// SHA-512; in the table positions are in blocks.
func TestVerityPath(t *testing.T) {
	for _, c := range []struct {
		blocks int64
		alg    Algorithm
		end    int64
		paths  map[int64][]int64
	}{
		{1, SHA256, 2, map[int64][]int64{0: nil}},
		{2, SHA256, 4, map[int64][]int64{0: {3}, 1: {3}}},
		{16, SHA256, 18, map[int64][]int64{0: {17}, 15: {17}}},
		{17, SHA256, 21, map[int64][]int64{0: {19, 18}, 15: {19, 18}, 16: {20, 18}}},
		{256, SHA256, 256 + 1 + 1 + 16, map[int64][]int64{0: {258, 257}, 255: {273, 257}}},
		// 17 leaves, 2 above them, 1 at the top
		{257, SHA256, 257 + 1 + 1 + 2 + 17, map[int64][]int64{0: {261, 259, 258}, 255: {276, 259, 258}, 256: {277, 260, 258}}},
		{9, SHA512, 9 + 1 + 1 + 2, map[int64][]int64{0: {11, 10}, 7: {11, 10}, 8: {12, 10}}},
	} {
		f := newTree(t, random(int(c.blocks)*512, 1), VerityOptions{BlockSize: 512, Algorithm: c.alg})
		v := f.open(t)
		if v.End() != c.end*512 || int64(len(f.blob)) != v.End() || v.DataSize() != c.blocks*512 || v.BlockSize() != 512 || v.Algorithm() != c.alg {
			t.Errorf("%d blocks, %v: end %d of %d, want %d; data %d, block %d, %v", c.blocks, c.alg, v.End(), len(f.blob), c.end*512, v.DataSize(), v.BlockSize(), v.Algorithm())
		}
		for n, want := range c.paths {
			got := v.Path(nil, n)
			for i := range got {
				got[i] /= 512
			}
			if !slices.Equal(got, want) {
				t.Errorf("block %d of %d, %v: path %v, want %v", n, c.blocks, c.alg, got, want)
			}
		}
	}
}

// borders are numbers of blocks around where another hash block, or another level, begins.
func borders(fanout int) []int {
	sq := fanout * fanout
	return []int{1, 2, fanout - 1, fanout, fanout + 1, 2 * fanout, sq - 1, sq, sq + 1}
}

// The tree is the one that the definition makes, and verifies the data.
func TestVerityBorders(t *testing.T) {
	for _, o := range []VerityOptions{
		{BlockSize: 512}, {BlockSize: 512, Algorithm: SHA512, Salt: random(256, 2)}, {BlockSize: 1024, Salt: []byte{7}},
	} {
		for _, blocks := range borders(o.BlockSize / o.Algorithm.Size()) {
			t.Run(fmt.Sprintf("%d of %d, %v", blocks, o.BlockSize, o.Algorithm), func(t *testing.T) {
				data := random(blocks*o.BlockSize, 1)
				f := newTree(t, data, o)
				root, levels := naiveTree(data, o.BlockSize, o.Algorithm, o.Salt)
				if !bytes.Equal(f.root, root) || !bytes.Equal(f.blob[len(data)+o.BlockSize:], levels) {
					t.Fatal("not the tree that the definition makes")
				}
				if !allZero(f.blob[len(data)+VeritySuperSize : len(data)+o.BlockSize]) {
					t.Error("behind the superblock are no zeros")
				}
				r := f.open(t).NewVerifier((&reader{blob: f.blob}).read, VerifierOptions{})
				if err := r.Verify(context.Background(), data, 0); err != nil {
					t.Fatal(err)
				}
				last := flipped(data, len(data)*8-1)
				wantMismatch(t, r.Verify(context.Background(), last, 0), "data block", 0, int64(blocks-1), int64(len(data)-o.BlockSize))
			})
		}
	}
}

// A changed bit is noticed wherever it is: in the data, in each hash block of each level,
// in the zeros behind the last digest.
func TestVerityNoticesEachBit(t *testing.T) {
	const block = 512
	f := newTree(t, random(257*block, 1), VerityOptions{BlockSize: block, Salt: []byte("salt")})
	v := f.open(t)
	levels := []struct {
		what   string
		level  int
		first  int64 // in blocks
		blocks int64
		below  int64 // data blocks below one
	}{
		{"data block", 0, 0, 257, 1}, {"hash block", 1, 261, 17, 16}, {"hash block", 2, 259, 2, 256}, {"hash block", 3, 258, 1, 4096},
	}
	for _, l := range levels {
		for n := range l.blocks {
			for _, bit := range []int64{0, 8*block/2 + 3, 8*block - 1} {
				off := (l.first + n) * block
				blob := flipped(f.blob, int(off*8+bit))
				r := v.NewVerifier((&reader{blob: blob}).read, VerifierOptions{})
				at := n * l.below * block
				for range 2 { // what was found wrong is not remembered as right
					wantMismatch(t, r.Verify(context.Background(), blob[at:at+block], at), l.what, l.level, n, off)
				}
			}
		}
	}
}

// Each bit of the superblock is noticed, but for the UUID, which means nothing here.
func TestVeritySuperBits(t *testing.T) {
	f := newTree(t, random(17*512, 1), VerityOptions{BlockSize: 512, Salt: []byte("salt"), UUID: [16]byte{1}})
	unnoticed := 0
	for bit := range VeritySuperSize * 8 {
		v, err := OpenVerity(flipped(f.blob[f.size:], bit), f.trust())
		if err != nil {
			continue
		}
		r := v.NewVerifier((&reader{blob: f.blob}).read, VerifierOptions{})
		if err := r.Verify(context.Background(), f.blob[:512], 0); errors.As(err, new(*MismatchError)) {
			continue
		}
		unnoticed++
		if bit/8 < 16 || bit/8 >= 32 {
			t.Errorf("bit %d of byte %d makes no difference", bit%8, bit/8)
		}
	}
	if unnoticed != 128 {
		t.Errorf("%d bits make no difference, want the 128 of the UUID", unnoticed)
	}
}

// Nor does another root digest verify anything.
func TestVerityOtherRoot(t *testing.T) {
	f := newTree(t, random(17*512, 1), VerityOptions{BlockSize: 512})
	one := newTree(t, random(512, 1), VerityOptions{BlockSize: 512})
	for bit := range len(f.root) * 8 {
		trust := f.trust()
		trust.Digest = flipped(f.root, bit)
		v, err := OpenVerity(f.blob[f.size:], trust)
		if err != nil {
			t.Fatal(err)
		}
		r := v.NewVerifier((&reader{blob: f.blob}).read, VerifierOptions{})
		wantMismatch(t, r.Verify(context.Background(), f.blob[:512], 0), "hash block", 2, 0, 18*512)
	}
	trust := one.trust()
	trust.Digest = flipped(one.root, 0)
	v, err := OpenVerity(one.blob[512:], trust)
	if err != nil {
		t.Fatal(err)
	}
	r := v.NewVerifier((&reader{blob: one.blob}).read, VerifierOptions{})
	wantMismatch(t, r.Verify(context.Background(), one.blob[:512], 0), "data block", 0, 0, 0)
}

// Hash blocks are read from the top, once each, and only those that are needed.
func TestVerifierReads(t *testing.T) {
	const block = 512
	f := newTree(t, random(257*block, 1), VerityOptions{BlockSize: block})
	src := &reader{blob: f.blob}
	r := f.open(t).NewVerifier(src.read, VerifierOptions{})
	for _, c := range []struct {
		first, n int64
		want     []int64 // in blocks
	}{
		{3, 0, nil},
		{0, 1, []int64{258, 259, 261}},
		{0, 16, nil},
		{15, 2, []int64{262}},
		{16, 16, nil},
		{100, 33, []int64{267, 268, 269}}, // blocks 96 to 143
		{256, 1, []int64{260, 277}},
		{0, 257, []int64{263, 264, 265, 266, 270, 271, 272, 273, 274, 275, 276}},
		{0, 257, nil},
	} {
		if err := r.Verify(context.Background(), f.blob[c.first*block:(c.first+c.n)*block], c.first*block); err != nil {
			t.Fatal(err)
		}
		got := src.took()
		for i := range got {
			got[i] /= block
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%d blocks at %d: reads %v, want %v", c.n, c.first, got, c.want)
		}
	}
}

// The cache is as small as was asked for, but has a path from leaf to root.
func TestVerifierCacheIsBounded(t *testing.T) {
	const block = 512
	f := newTree(t, random(257*block, 1), VerityOptions{BlockSize: block})
	for _, c := range []struct {
		bytes       int64
		want, reads int // hash blocks remembered at the end, and read
	}{
		// From front to back a small cache has all but the highest hash block when it is
		// needed; that one was last looked at 256 blocks before.
		{1, 3, 21}, {3 * block, 3, 21}, {5*block + 511, 5, 21},
		{0, 20, 20},
	} {
		src := &reader{blob: f.blob}
		r := f.open(t).NewVerifier(src.read, VerifierOptions{CacheBytes: c.bytes})
		for n := int64(0); n < 257; n++ {
			if err := r.Verify(context.Background(), f.blob[n*block:(n+1)*block], n*block); err != nil {
				t.Fatal(err)
			}
			if len(r.blocks) != r.recent.Len() || len(r.blocks) > c.want {
				t.Fatalf("%d bytes: %d blocks remembered, %d in order; at most %d", c.bytes, len(r.blocks), r.recent.Len(), c.want)
			}
		}
		if len(r.blocks) != c.want {
			t.Errorf("%d bytes: %d blocks remembered, want %d", c.bytes, len(r.blocks), c.want)
		}
		if got := len(src.took()); got != c.reads {
			t.Errorf("%d bytes: %d hash blocks read, want %d", c.bytes, got, c.reads)
		}
	}
}

// A read that fails is an error, and nothing of it is remembered.
func TestVerifierReadFails(t *testing.T) {
	f := newTree(t, random(17*512, 1), VerityOptions{BlockSize: 512})
	gone := errors.New("gone")
	src := &reader{blob: f.blob, fail: gone}
	r := f.open(t).NewVerifier(src.read, VerifierOptions{})
	if err := r.Verify(context.Background(), f.blob[:512], 0); !errors.Is(err, gone) || errors.As(err, new(*MismatchError)) {
		t.Errorf("error %v, want %v", err, gone)
	}
	src.fail = nil
	if err := r.Verify(context.Background(), f.blob[:512], 0); err != nil {
		t.Error(err)
	}
	if n := len(src.took()); n != 2 {
		t.Errorf("%d hash blocks read, want 2", n)
	}
}

func TestVerifierRefuses(t *testing.T) {
	f := newTree(t, random(17*512, 1), VerityOptions{BlockSize: 512})
	src := &reader{blob: f.blob}
	r := f.open(t).NewVerifier(src.read, VerifierOptions{})
	for _, c := range []struct{ off, n int64 }{
		{-512, 512}, {1, 512}, {0, 511}, {0, 513}, {17 * 512, 512}, {16 * 512, 1024}, {1 << 62, 512}, {-1 << 63, 512}, {1<<63 - 512, 1024},
	} {
		if err := r.Verify(context.Background(), make([]byte, c.n), c.off); err == nil || errors.As(err, new(*MismatchError)) {
			t.Errorf("%d bytes at %d: error %v", c.n, c.off, err)
		}
	}
	if reads := src.took(); reads != nil {
		t.Errorf("hash blocks were read, at %v", reads)
	}
}

// Many at a time, with a cache that is too small for them, and one of them unlucky.
func TestVerifierConcurrently(t *testing.T) {
	const block = 512
	f := newTree(t, random(600*block, 1), VerityOptions{BlockSize: block, Salt: []byte("salt")})
	bad := flipped(f.blob, 77*block*8)
	src := &reader{blob: f.blob}
	r := f.open(t).NewVerifier(src.read, VerifierOptions{CacheBytes: 5 * block})
	var wg sync.WaitGroup
	for g := range int64(8) {
		wg.Go(func() {
			for i := range int64(200) {
				n := (g*71 + i*37) % 590
				blob, hit := f.blob, false
				if g == 0 {
					blob, hit = bad, n <= 77 && 77 < n+10
				}
				err := r.Verify(context.Background(), blob[n*block:(n+10)*block], n*block)
				if errors.As(err, new(*MismatchError)) != hit || err != nil && !hit {
					t.Errorf("blocks %d to %d: %v", n, n+9, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestWriteVerityRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		size int64
		o    VerityOptions
	}{
		"no data":           {0, VerityOptions{}},
		"negative data":     {-4096, VerityOptions{}},
		"part of a block":   {4097, VerityOptions{}},
		"too much":          {1<<63 - 4096, VerityOptions{}},
		"block of 256":      {4096, VerityOptions{BlockSize: 256}},
		"block of 5000":     {5000, VerityOptions{BlockSize: 5000}},
		"block of 128 KiB":  {128 << 10, VerityOptions{BlockSize: 128 << 10}},
		"negative block":    {4096, VerityOptions{BlockSize: -4096}},
		"unknown algorithm": {4096, VerityOptions{Algorithm: 2}},
		"long salt":         {4096, VerityOptions{Salt: make([]byte, 257)}},
	} {
		var w bytes.Buffer
		root, n, err := WriteVerity(context.Background(), &w, bytes.NewReader(make([]byte, 1<<20)), c.size, c.o)
		if err == nil || root != nil || n != 0 || w.Len() != 0 {
			t.Errorf("%s: root %x, %d bytes, %v", name, root, n, err)
		}
	}
}

// Data that cannot be read, or ends too early, makes no tree.
func TestWriteVerityReadFails(t *testing.T) {
	data := random(4<<20, 1)
	var w bytes.Buffer
	_, n, err := WriteVerity(context.Background(), &w, bytes.NewReader(data), int64(len(data))+4096, VerityOptions{})
	if !errors.Is(err, io.ErrUnexpectedEOF) || n != 0 || w.Len() != 0 {
		t.Errorf("short data: %d bytes written, %v", n, err)
	}
	gone := errors.New("gone")
	_, n, err = WriteVerity(context.Background(), &w, failing{bytes.NewReader(data), 3 << 20, gone}, int64(len(data)), VerityOptions{})
	if !errors.Is(err, gone) || n != 0 || w.Len() != 0 {
		t.Errorf("unreadable data: %d bytes written, %v", n, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, n, err = WriteVerity(ctx, &w, bytes.NewReader(data), int64(len(data)), VerityOptions{})
	if !errors.Is(err, context.Canceled) || n != 0 || w.Len() != 0 {
		t.Errorf("cancelled: %d bytes written, %v", n, err)
	}
}

// failing cannot read what is at from and behind it.
type failing struct {
	io.ReaderAt
	from int64
	err  error
}

func (f failing) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > f.from {
		return 0, f.err
	}
	return f.ReaderAt.ReadAt(p, off)
}

// Who has gone does not wait for the rest of a large image to be hashed.
func TestWriteVerityStops(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	data := &cancelling{cancel: cancel}
	_, n, err := WriteVerity(ctx, io.Discard, data, 256<<20, VerityOptions{})
	if !errors.Is(err, context.Canceled) || n != 0 {
		t.Errorf("%d bytes written, %v", n, err)
	}
	// Each worker ends with the read that it is in, or was about to begin.
	if got, most := data.reads.Load(), int64(3+2*runtime.GOMAXPROCS(0)); got > most {
		t.Errorf("%d reads, at most %d", got, most)
	}
}

// cancelling is zeros, of which the third read is the last that somebody waits for.
type cancelling struct {
	reads  atomic.Int64
	cancel func()
}

func (c *cancelling) ReadAt(p []byte, _ int64) (int, error) {
	if c.reads.Add(1) == 3 {
		c.cancel()
	}
	clear(p)
	return len(p), nil
}

func TestVerityKeepsNothing(t *testing.T) {
	f := newTree(t, random(17*512, 1), VerityOptions{BlockSize: 512, Salt: []byte("salt")})
	super, trust := bytes.Clone(f.blob[f.size:]), f.trust()
	trust.Digest = bytes.Clone(f.root)
	v, err := OpenVerity(super, trust)
	if err != nil {
		t.Fatal(err)
	}
	clear(super)
	clear(trust.Digest)
	r := v.NewVerifier((&reader{blob: f.blob}).read, VerifierOptions{})
	if err := r.Verify(context.Background(), f.blob[:512], 0); err != nil {
		t.Errorf("the tree changed with the bytes it was opened from: %v", err)
	}
}

func TestWriteVerityWriteFails(t *testing.T) {
	data := random(129*4096, 1)
	full := errors.New("full")
	for room, want := range map[int64]int64{0: 0, 4096: 4096, 8192: 8192} {
		w := &limited{room: room, err: full}
		root, n, err := WriteVerity(context.Background(), w, bytes.NewReader(data), int64(len(data)), VerityOptions{})
		if !errors.Is(err, full) || root != nil || n != want {
			t.Errorf("room for %d bytes: %d written, root %x, %v", room, n, root, err)
		}
	}
}

// limited takes whole writes while it has room.
type limited struct {
	room int64
	err  error
}

func (l *limited) Write(p []byte) (int, error) {
	if l.room -= int64(len(p)); l.room < 0 {
		return 0, l.err
	}
	return len(p), nil
}

// An io.ReaderAt may say io.EOF along with the last bytes.
func TestWriteVerityEOFWithData(t *testing.T) {
	data := random(3*4096, 1)
	want := newTree(t, data, VerityOptions{})
	var w bytes.Buffer
	root, _, err := WriteVerity(context.Background(), &w, eager(data), int64(len(data)), VerityOptions{})
	if err != nil || !bytes.Equal(root, want.root) {
		t.Errorf("root %x, %v; want %x", root, err, want.root)
	}
}

type eager []byte

func (e eager) ReadAt(p []byte, off int64) (int, error) {
	n := copy(p, e[off:])
	if off+int64(n) == int64(len(e)) {
		return n, io.EOF
	}
	return n, nil
}
