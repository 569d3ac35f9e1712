package erofsfmt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
)

// Pieces at random equal the whole, with a cache, with a tiny one and without.
func TestRandomReads(t *testing.T) {
	for _, c := range corpus.Images(t) {
		t.Run(c.Name, func(t *testing.T) {
			want := files(t, openCorpus(t, c))
			limits := []int64{0, 64 << 10, -1}
			if testing.Short() {
				limits = limits[:2]
			}
			for _, limit := range limits {
				o := Options{CacheBytes: limit}
				if c.Blob != nil {
					o.Devices = []ReaderAt{memory(c.Blob)}
				}
				im, err := OpenWith(context.Background(), memory(c.Data), o)
				if err != nil {
					t.Fatal(err)
				}
				rounds := 8
				if limit != 0 || testing.Short() {
					rounds = 1 // without memory every read decodes
				}
				randomReads(t, im, want, rounds, rand.New(rand.NewPCG(1, uint64(limit))))
				if used := im.pages.used + im.pclusters.used; limit > 0 && used > limit {
					t.Errorf("%d bytes are remembered, of %d", used, limit)
				}
			}
		})
	}
}

func randomReads(t testing.TB, im *Image, want map[Nid][]byte, rounds int, rnd *rand.Rand) {
	ctx := context.Background()
	for nid, content := range want {
		ino, err := im.Inode(ctx, nid)
		if err != nil {
			t.Error(err)
			return
		}
		for range rounds {
			off := rnd.Int64N(ino.Size + 1)
			p := make([]byte, rnd.Int64N(min(ino.Size-off, 40000)+1))
			if err := im.ReadFile(ctx, &ino, p, off); err != nil {
				t.Error(err)
			} else if !bytes.Equal(p, content[off:off+int64(len(p))]) {
				t.Errorf("nid %d: %d bytes at %d differ", nid, len(p), off)
			}
		}
	}
}

func TestParallelReads(t *testing.T) {
	for _, name := range []string{"lz4-frag", "zstd-all", "deflate-64k", "lzma-all", "metabox-zstd", "48bit-lz4-frag"} {
		c := corpus.Get(t, name)
		want := files(t, openCorpus(t, c))
		im := openCorpus(t, c) // one that remembers nothing yet
		var wg sync.WaitGroup
		for i := range uint64(8) {
			wg.Go(func() { randomReads(t, im, want, 8, rand.New(rand.NewPCG(2, i))) })
		}
		wg.Wait()
	}
}

func TestReadFileBounds(t *testing.T) {
	im := openCorpus(t, corpus.Get(t, "lz4"))
	ctx := context.Background()
	ino := find(t, im, "sizes", "t4096")
	for _, c := range []struct{ off, n int64 }{{-1, 1}, {0, ino.Size + 1}, {ino.Size, 1}, {1 << 62, 1}} {
		if err := im.ReadFile(ctx, ino, make([]byte, c.n), c.off); err == nil {
			t.Errorf("%d bytes at %d of %d were read", c.n, c.off, ino.Size)
		}
	}
	if err := im.ReadFile(ctx, ino, nil, ino.Size); err != nil {
		t.Errorf("nothing at the end: %v", err)
	}
	if err := im.ReadFile(ctx, find(t, im, "dev", "null"), nil, 0); err == nil {
		t.Error("a device was read")
	}
}

// A cut image gives the same bytes or an error, never other bytes.
func TestTruncated(t *testing.T) {
	for _, name := range []string{"plain", "inline", "chunked", "lz4", "lz4-legacy", "48bit-lz4-frag", "metabox", "deflate"} {
		c := corpus.Get(t, name)
		want := files(t, openCorpus(t, c))
		whole, failed := 0, 0
		for cut := 0; cut < len(c.Data); cut += len(c.Data)/50 + 1 {
			im, err := Open(context.Background(), memory(c.Data[:cut]))
			if err != nil {
				failed++
				continue
			}
			for nid, content := range want {
				ino, err := im.Inode(context.Background(), nid)
				p := make([]byte, len(content))
				if err == nil {
					err = im.ReadFile(context.Background(), &ino, p, 0)
				}
				if err != nil {
					failed++
				} else if whole++; !bytes.Equal(p, content) {
					t.Fatalf("%s cut to %d: nid %d has other bytes", name, cut, nid)
				}
				if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Fatalf("%s cut to %d: nid %d: %v", name, cut, nid, err)
				}
			}
		}
		if whole == 0 || failed == 0 {
			t.Errorf("%s: %d reads succeeded, %d failed", name, whole, failed)
		}
	}
}

var errFault = errors.New("injected fault")

// flaky fails every read while it is down, and in between every nth.
type flaky struct {
	memory
	down  atomic.Bool
	reads atomic.Int64
	every int64
}

func (f *flaky) ReadAt(ctx context.Context, p []byte, off int64) error {
	n := f.reads.Add(1)
	if f.down.Load() || f.every != 0 && n%f.every == 0 {
		// What a failed read leaves behind is garbage.
		for i := range p {
			p[i] = 0xee
		}
		return fmt.Errorf("read %d: %w", n, errFault)
	}
	return f.memory.ReadAt(ctx, p, off)
}

// An error of the source comes back as it is, nothing of it stays, and the same
// image reads on when the source recovers.
func TestFaultsPass(t *testing.T) {
	ctx := context.Background()
	for i, name := range []string{"plain", "inline", "chunk-indexes", "lz4", "zstd-64k", "lz4-frag", "metabox-zstd", "48bit"} {
		if testing.Short() && i%2 == 0 {
			continue
		}
		t.Run(name, func(t *testing.T) {
			c := corpus.Get(t, name)
			want := files(t, openCorpus(t, c))
			src := &flaky{memory: c.Data}
			im, err := OpenWith(ctx, src, Options{CacheBytes: 8 << 10}) // so that there is much to read
			if err != nil {
				t.Fatal(err)
			}
			src.every = 3
			faults, right := 0, 0
			for nid, content := range want {
				p := make([]byte, len(content))
				for try := 0; ; try++ {
					ino, err := im.Inode(ctx, nid)
					if err == nil {
						err = im.ReadFile(ctx, &ino, p, 0)
					}
					if err == nil {
						break
					}
					if faults++; !errors.Is(err, errFault) || errors.Is(err, ErrCorrupt) {
						t.Fatalf("%v is not the fault", err)
					}
					if try == 100 {
						src.every = 0 // this one takes many reads: let it
					}
				}
				src.every = 3
				if right++; !bytes.Equal(p, content) {
					t.Fatalf("nid %d has other bytes after a fault", nid)
				}
			}
			if faults == 0 || right == 0 {
				t.Errorf("%d faults, %d right", faults, right)
			}
		})
	}
}

func TestOpenFaultPasses(t *testing.T) {
	src := &flaky{memory: corpus.Get(t, "plain").Data}
	src.down.Store(true)
	if _, err := Open(context.Background(), src); !errors.Is(err, errFault) {
		t.Errorf("%v is not the fault", err)
	}
}

func TestContextEnds(t *testing.T) {
	im := openCorpus(t, corpus.Get(t, "lz4"))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := im.Inode(ctx, 3000); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want context.Canceled", err)
	}
}

// Images without extra devices at hand hold the devices' blocks themselves.
func TestFlatDevice(t *testing.T) {
	c := corpus.Get(t, "multidev")
	im := openCorpus(t, c)
	devices := im.Super().Devices
	if len(devices) != 1 || devices[0].Blocks != uint64(len(c.Blob))>>12 {
		t.Fatalf("devices %+v for a blob of %d bytes", devices, len(c.Blob))
	}
	want := files(t, im)

	flat := bytes.Clone(c.Data)
	at := int(devices[0].Uniaddr) << 12
	if at < len(flat) {
		t.Fatalf("the device is at byte %d of an image of %d", at, len(flat))
	}
	flat = append(flat, make([]byte, at-len(flat))...)
	flat = append(flat, c.Blob...)
	got := openCorpus(t, corpus.Image{Name: "flat", Data: flat})
	for nid, content := range files(t, got) {
		if !bytes.Equal(content, want[nid]) {
			t.Errorf("nid %d has other bytes", nid)
		}
	}

	// Neither given nor inside: an error, and no zeros.
	alone := openCorpus(t, corpus.Image{Name: "alone", Data: c.Data})
	failed := 0
	for nid := range want {
		ino, err := alone.Inode(context.Background(), nid)
		if err != nil {
			t.Fatal(err)
		}
		if err := alone.ReadFile(context.Background(), &ino, make([]byte, ino.Size), 0); err != nil {
			failed++
			if !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("%v", err)
			}
		}
	}
	if failed == 0 {
		t.Error("a missing device was read")
	}
	if _, err := OpenWith(context.Background(), memory(c.Data), Options{Devices: make([]ReaderAt, 2)}); err == nil {
		t.Error("two devices were taken for one")
	}
}

// Devices found by id and by address, mixed in one file.
func TestDevices(t *testing.T) {
	f := newFake(ondisk.LayoutChunk, 4*4096)
	f.super.FeatureIncompat = ondisk.IncompatChunkedFile | ondisk.IncompatDeviceTable
	f.super.ExtraDevices, f.super.DevtSlotOff = 2, 22 // at byte 2816
	f.more[22*128] = le(&ondisk.Device{BlocksLo: 2, UniaddrLo: 100}, &ondisk.Device{BlocksLo: 1, UniaddrLo: 200})
	f.inode.U = ondisk.ChunkIndexes
	index := func(device uint16, blk uint32) []byte { return le(uint16(0), device, blk) }
	f.body = join(index(0, 1), index(1, 1), index(0, 200), index(0xfffe, 0)) // only the low two bits of an id count
	f.blocks[1] = pattern(4096, 1)
	first, second := pattern(2*4096, 2), pattern(4096, 3)
	im, ino := f.open(t, Options{Devices: []ReaderAt{memory(first), memory(second)}})
	p := make([]byte, ino.Size)
	if err := im.ReadFile(context.Background(), ino, p, 0); err != nil {
		t.Fatal(err)
	}
	if want := join(f.blocks[1], first[4096:], second, second); !bytes.Equal(p, want) {
		t.Error("other bytes")
	}
	f.body = join(index(3, 1))
	im, ino = f.open(t, Options{Devices: []ReaderAt{memory(first), memory(second)}})
	if err := im.ReadFile(context.Background(), ino, p, 0); !errors.Is(err, ErrCorrupt) {
		t.Errorf("device 3 of 2: %v", err)
	}
}

// Blocks of 512 bytes to 64 KiB, of which the kernel refuses those above a page.
func TestBlockSizes(t *testing.T) {
	for bits := uint8(ondisk.MinBlockBits); bits <= ondisk.MaxBlockBits; bits++ {
		size := 1 << bits
		f := newFake(ondisk.LayoutInline, uint64(2*size+100))
		f.super.BlkSzBits, f.super.MetaBlkaddr = bits, 0
		f.inode.U = uint32(8192/size + 1)
		f.body = pattern(100, 7)
		f.blocks[int(f.inode.U)] = pattern(2*size, 9)
		im, ino := f.open(t, Options{})
		p := make([]byte, ino.Size)
		if err := im.ReadFile(context.Background(), ino, p, 0); err != nil {
			t.Fatalf("2^%d: %v", bits, err)
		}
		if !bytes.Equal(p, join(pattern(2*size, 9), pattern(100, 7))) {
			t.Errorf("2^%d: other bytes", bits)
		}
		if find(t, im, "f").Nid != fakeFile {
			t.Errorf("2^%d: lookup", bits)
		}
	}
}

// counted counts reads and bytes.
type counted struct {
	memory
	reads, bytes int
}

func (c *counted) ReadAt(ctx context.Context, p []byte, off int64) error {
	c.reads++
	c.bytes += len(p)
	return c.memory.ReadAt(ctx, p, off)
}

// What is contiguous is read at once: chunks in a row, and pclusters in a row.
func TestContiguousReads(t *testing.T) {
	for _, c := range []struct {
		image string
		path  []string
		want  int // reads of a whole file whose metadata is known
	}{
		{"plain", []string{"mixed", "half"}, 1},
		{"chunked", []string{"mixed", "half"}, 2},   // there is a hole in the middle
		{"lz4", []string{"mixed", "half"}, 4},       // compressed, plain, compressed, plain
		{"lz4hc-64k", []string{"mixed", "half"}, 1}, // one pcluster
		{"zstd", []string{"mixed", "zeros"}, 1},
	} {
		img := corpus.Get(t, c.image)
		src := &counted{memory: img.Data}
		im, err := Open(context.Background(), src)
		if err != nil {
			t.Fatal(err)
		}
		ino := find(t, im, c.path...)
		p := make([]byte, ino.Size)
		if err := im.ReadFile(context.Background(), ino, p, 0); err != nil {
			t.Fatal(err)
		}
		src.reads = 0
		if err := im.ReadFile(context.Background(), ino, p, 0); err != nil {
			t.Fatal(err)
		}
		if src.reads != c.want {
			t.Errorf("%s: %d reads for %q of %d bytes, want %d", c.image, src.reads, c.path, ino.Size, c.want)
		}
	}
}
