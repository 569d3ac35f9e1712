package mkerofs

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// A file of 12,388 bytes: an extent of 8492, which ends in block 2, and one of 3896, which ends with the file.
func TestIndexByHand(t *testing.T) {
	for _, c := range []struct {
		name    string
		z       Compression
		blocks  uint16 // of the first extent
		last    uint16 // of the second
		tail    int64
		frag    bool
		fragOff int64
		want    string
	}{
		{"compact", Compression{Algorithm: LZ4}, 1, 1, 0, false, 0,
			"00000000 0000 00 00  0010 0120 09000000  2c11 6400 0a000000"},
		{"compact, big", Compression{Algorithm: Zstd, ClusterSize: 8192}, 2, 1, 0, false, 0,
			"00000000 0600 03 00  0010 0228 0a000000  2c11 6400 0c000000"},
		{"compact, tail", Compression{Algorithm: Deflate, TailPacking: true}, 1, 0, 55, false, 0,
			"00003700 0800 02 00  0010 0120 09000000  2c11 6400 0a000000"},
		{"full", Compression{Algorithm: LZ4, FullIndex: true}, 1, 1, 0, false, 0,
			"00000000 0000 00 00  0000000000000000  01000000 0a000000  02000000 0100 0100  01002c01 0b000000  00006400 00000000"},
		{"full, big", Compression{Algorithm: LZ4, FullIndex: true, ClusterSize: 8192}, 2, 1, 0, false, 0,
			"00000000 0200 00 00  0000000000000000  01000000 0a000000  02000000 0208 0100  01002c01 0c000000  00006400 00000000"},
		{"fragment", Compression{Algorithm: LZ4, Fragments: true}, 1, 0, 0, true, 0xabcdef,
			"efcdab00 2000 00 00  0010 0120 09000000  2c11 6400 0a000000"},
		{"far fragment", Compression{Algorithm: LZ4, Fragments: true}, 1, 0, 0, true, 0x5_00abcdef,
			"efcdab00 2000 00 00  0000000000000000  01000000 0a000000  02000000 0100 0100  01002c01 05000000  00006400 00000000"},
	} {
		if err := c.z.check(4096); err != nil {
			t.Fatal(err)
		}
		x := index{
			Compression: &c.z, blockBits: 12, size: 12388, block: 10, tail: c.tail, fragment: c.frag, fragOff: c.fragOff,
			extents: []extent{{8492, c.blocks, true}, {3896, c.last, true}},
		}
		got, want := x.append(nil, 40), strings.ReplaceAll(c.want, " ", "")
		if hex.EncodeToString(got) != want {
			t.Errorf("%s:\n got %x\nwant %s", c.name, got, want)
		}
		if n := x.length(40); n != int64(len(got)) {
			t.Errorf("%s: length %d, but %d bytes", c.name, n, len(got))
		}
	}
}

// 40 blocks, index at a multiple of 32 and behind one: how many entries have 4 and 2 bytes.
func TestIndexLength(t *testing.T) {
	z := Compression{Algorithm: LZ4}
	for _, c := range []struct{ start, blocks, want int64 }{
		{64, 40, 8 + 2*32 + 8*4},
		{64 + 8, 40, 8 + 6*4 + 2*32 + 2*4},
		{64 + 24, 17, 8 + 2*4 + 15*4 + 4},
		{64 + 24, 18, 8 + 2*4 + 32},
		{64, 1, 8 + 8},
		{64 + 8, 5, 8 + 24},
	} {
		x := index{Compression: &z, blockBits: 12, size: c.blocks * 4096}
		if got := x.length(c.start); got != c.want {
			t.Errorf("%d blocks at %d: %d bytes, want %d", c.blocks, c.start, got, c.want)
		}
	}
}

func TestCompressionRefuses(t *testing.T) {
	for _, c := range []struct {
		z    Compression
		want string
	}{
		{Compression{Algorithm: "lzma"}, "read but not written"},
		{Compression{Algorithm: "brotli"}, "take lz4"},
		{Compression{Level: 3}, "without an algorithm"},
		{Compression{Fragments: true}, "without an algorithm"},
		{Compression{Algorithm: LZ4, Level: 1}, "level 1 of lz4"},
		{Compression{Algorithm: LZ4HC, Level: 13}, "from 3 to 12"},
		{Compression{Algorithm: Zstd, Level: 23}, "from 1 to 22"},
		{Compression{Algorithm: Deflate, Level: -1}, "from 1 to 9"},
		{Compression{Algorithm: LZ4, ClusterSize: 5000}, "multiple of the block size"},
		{Compression{Algorithm: LZ4, ClusterSize: -4096}, "multiple of the block size"},
		{Compression{Algorithm: LZ4, ClusterSize: 2 << 20}, "up to 1048576"},
	} {
		if _, err := New(new(memory), Options{Compression: c.z}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", c.z, err, c.want)
		}
	}
}

// One worker or several, one processor or two: the same bytes.
func TestSameBytesOnAnyMachine(t *testing.T) {
	entries := bigTree()
	for _, z := range []Compression{
		{Algorithm: LZ4, ClusterSize: 16384, Fragments: true, Dedupe: true},
		{Algorithm: Zstd, Level: 1, ClusterSize: 65536, TailPacking: true},
	} {
		var want memory
		buildTo(t, &want, Options{Compression: z, Workers: 1}, entries)
		several, processors := []int{0, 2, 8}, []int{1, 2}
		if testing.Short() {
			several, processors = several[2:], processors[1:]
		}
		for _, workers := range several {
			for _, procs := range processors {
				before := runtime.GOMAXPROCS(procs)
				var got memory
				buildTo(t, &got, Options{Compression: z, Workers: workers}, entries)
				runtime.GOMAXPROCS(before)
				if !bytes.Equal(got, want) {
					t.Errorf("%+v: %d workers on %d processors make another image than one", z, workers, procs)
				}
			}
		}
	}
}

// Whatever the tree and the options are: the image holds the tree.
func TestRandomTrees(t *testing.T) {
	seeds := uint64(60)
	if testing.Short() {
		seeds = 20
	}
	for seed := range seeds {
		rng := rand.New(rand.NewPCG(seed, 3))
		o, entries := randomOptions(rng), randomTree(rng)
		var m memory
		buildTo(t, &m, o, entries)
		image, err := erofsfmt.Open(t.Context(), sourcetest.Memory(m))
		if err != nil {
			t.Fatalf("seed %d, %+v: %v", seed, o, err)
		}
		r := reading{t: t, image: image}
		r.visit(".", image.Root())
		for _, diff := range tree.Diff(wanted(t, entries), r.entries, tree.Ino) {
			t.Errorf("seed %d, %+v: %s", seed, o, diff)
		}
	}
}

func randomOptions(rng *rand.Rand) Options {
	flag := func() bool { return rng.IntN(2) == 0 }
	o := Options{BlockSize: 512 << rng.IntN(8), Workers: rng.IntN(4)}
	o.InlineMax = rng.IntN(o.BlockSize + 1)
	if rng.IntN(5) == 0 {
		return o
	}
	o.Compression = Compression{
		Algorithm:   []Algorithm{LZ4, LZ4HC, Zstd, Deflate}[rng.IntN(4)],
		ClusterSize: o.BlockSize * (1 + rng.IntN(16)),
		TailPacking: flag(), Fragments: flag(), Dedupe: flag(), FullIndex: flag(),
	}
	return o
}

func randomTree(rng *rand.Rand) []Entry {
	var entries []Entry
	dirs, files := []string{""}, []string{}
	for i := range 5 + rng.IntN(60) {
		path := fmt.Sprintf("%s%s%d", dirs[rng.IntN(len(dirs))], strings.Repeat("n", rng.IntN(40)), i)
		e := Entry{
			Path: path, Mode: ModeRegular | rng.Uint32N(0o10000), UID: rng.Uint32N(1 << rng.IntN(32)), GID: rng.Uint32N(1 << rng.IntN(32)),
			Mtime: time.Unix(rng.Int64N(1<<33)-1<<32, rng.Int64N(2)*rng.Int64N(1e9)),
		}
		for j := range rng.IntN(3) {
			if e.Xattrs == nil {
				e.Xattrs = make(map[string][]byte)
			}
			e.Xattrs[fmt.Sprintf("user.%d", j)] = content(uint64(i), rng.IntN(100))
		}
		switch rng.IntN(8) {
		case 0:
			e.Mode = e.Mode&^ModeType | ModeDir
			dirs = append(dirs, path+"/")
		case 1:
			e.Mode, e.Target = ModeSymlink|0o777, strings.Repeat("t", 1+rng.IntN(300))
		case 2:
			if len(files) > 0 {
				e = Entry{Path: path, Link: files[rng.IntN(len(files))]}
			}
		default:
			data := mixed(rng.Uint64()%20, rng.IntN(1<<(1+rng.IntN(18))))
			e.Size, e.Open = int64(len(data)), opener(data)
			files = append(files, path)
		}
		entries = append(entries, e)
	}
	return entries
}

// Whatever goes wrong in the middle of compressing ends the build, with all of its goroutines.
func TestCompressFails(t *testing.T) {
	for _, c := range []struct {
		name string
		open func() (io.ReadCloser, error)
		size int64
		want string
	}{
		{"small, breaks", func() (io.ReadCloser, error) { return io.NopCloser(errReader{errTest}), nil }, 100, errTest.Error()},
		{"small, short", opener(make([]byte, 99)), 100, "after 99 bytes"},
		{"small, long", opener(make([]byte, 101)), 100, "goes on after that"},
		{"big, short", opener(make([]byte, maxSegment+5)), 2 * maxSegment, "after 4194309 bytes"},
		{"big, long", opener(make([]byte, maxSegment+5)), maxSegment + 4, "goes on after that"},
		{"big, does not open", func() (io.ReadCloser, error) { return nil, errTest }, 2 * maxSegment, errTest.Error()},
	} {
		before := goleak.IgnoreCurrent()
		m := make(memory, 4096)
		b, err := New(&m, Options{Compression: Compression{Algorithm: LZ4}, TempDir: t.TempDir()})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range append(dataTree(4096), Entry{Path: "zz", Mode: ModeRegular, Mtime: time.Unix(0, 0), Size: c.size, Open: c.open}) {
			if err := b.Add(e); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := b.Finish(t.Context()); err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), `"zz"`) {
			t.Errorf("%s: %v, want %q of \"zz\"", c.name, err, c.want)
		}
		if err := goleak.Find(before); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if !bytes.Equal(m, make([]byte, len(m))) {
			t.Errorf("%s: something was written", c.name)
		}
	}
	if _, err := buildErr(Options{Compression: Compression{Algorithm: LZ4}, TempDir: "/nonexistent"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a place for temporary files: %v", err)
	}
}

// A writer that fails in the middle of the data, which several goroutines write, ends the build with all of them.
func TestWriteOfCompressedFails(t *testing.T) {
	for _, workers := range []int{1, 3} {
		before := goleak.IgnoreCurrent()
		f := &failingFrom{off: 3 << 20}
		b, err := New(f, Options{Compression: Compression{Algorithm: LZ4}, Workers: workers, TempDir: t.TempDir()})
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Add(regular("noise", time.Unix(0, 0), content(1, 6<<20))); err != nil {
			t.Fatal(err)
		}
		if _, err := b.Finish(t.Context()); !errors.Is(err, errTest) {
			t.Errorf("%d workers: %v, want %v", workers, err, errTest)
		}
		if err := goleak.Find(before); err != nil {
			t.Errorf("%d workers: %v", workers, err)
		}
		if !bytes.Equal(f.memory[:4096], make([]byte, 4096)) {
			t.Errorf("%d workers: there is a superblock", workers)
		}
	}
}

type failingFrom struct {
	memory
	off int64
}

func (f *failingFrom) WriteAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > f.off {
		return 0, errTest
	}
	return f.memory.WriteAt(p, off)
}

func buildErr(o Options) (int64, error) {
	b, err := New(new(memory), o)
	if err != nil {
		return 0, err
	}
	if err := b.Add(regular("a", time.Unix(0, 0), []byte("content"))); err != nil {
		return 0, err
	}
	return b.Finish(context.Background())
}
