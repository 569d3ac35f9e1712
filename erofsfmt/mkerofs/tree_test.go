package mkerofs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/tests/corpus"
)

// content is size bytes that depend on seed, none of them zero.
func content(seed uint64, size int) []byte {
	p := make([]byte, size)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)}).Read(p)
	return bytes.ReplaceAll(p, []byte{0}, []byte{1})
}

func opener(data []byte) func() (io.ReadCloser, error) {
	return func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
}

func regular(path string, mtime time.Time, data []byte) Entry {
	return Entry{Path: path, Mode: ModeRegular | 0o644, Mtime: mtime, Size: int64(len(data)), Open: opener(data)}
}

// corpusTree is the corpus's nasty tree, with contents of our own of the same sizes.
func corpusTree(t testing.TB) []Entry {
	var entries []Entry
	first := make(map[uint64]string) // path by inode number
	for i, c := range corpus.Get(t, "plain").Listing(t) {
		e := Entry{
			Path: c.Path, Mode: c.Mode, UID: c.UID, GID: c.GID, Mtime: time.Unix(0, c.MtimeNs), Xattrs: c.Xattrs, Target: c.Target,
		}
		if c.Rdev != nil {
			e.Major, e.Minor = c.Rdev[0], c.Rdev[1]
		}
		if e.Mode&ModeType == ModeRegular {
			data := content(uint64(i), int(c.Size))
			e.Size, e.Open = c.Size, opener(data)
		}
		if e.Mode&ModeType != ModeDir && c.Nlink > 1 {
			if link, ok := first[c.Ino]; ok {
				e = Entry{Path: c.Path, Link: link}
			} else {
				first[c.Ino] = c.Path
			}
		}
		entries = append(entries, e)
	}
	return entries
}

// edgeTree has what lies at the edges of this builder.
func edgeTree(blockSize int) []Entry {
	at := time.Unix(1_700_000_000, 0)
	entries := []Entry{{Path: ".", Mode: ModeDir | 0o1777, UID: 7, GID: 8, Mtime: at.Add(5)}}
	add := func(e Entry) { entries = append(entries, e) }
	bs := blockSize
	for i, size := range []int{0, 1, 31, 32, 33, bs/2 - 1, bs / 2, bs/2 + 1, bs - 1, bs, bs + 1, 2*bs - 1, 2 * bs, 2*bs + 1, 10*bs + 17, 3 << 20} {
		add(regular(fmt.Sprintf("sizes/%02d", i), at, content(uint64(size), size)))
	}
	// Directories from small to large, so that their ends lie at every place of a block, and names on both sides of
	// "." and "..".
	for n := range 40 {
		for i := range n {
			add(regular(fmt.Sprintf("dirs/%02d/%s%03d", n, strings.Repeat("n", n*3), i), at, nil))
		}
		add(Entry{Path: fmt.Sprintf("dirs/%02d/!", n), Mode: ModeFifo | 0o600, Mtime: at})
		add(Entry{Path: fmt.Sprintf("dirs/%02d/-x", n), Mode: ModeSocket | 0o600, Mtime: at})
		add(Entry{Path: fmt.Sprintf("dirs/%02d/...", n), Mode: ModeDir | 0o700, Mtime: at})
	}
	for i := range 100 {
		prefix := fmt.Sprintf("%03d\xff\n ", i)
		add(regular("longest/"+prefix+strings.Repeat("x", 255-len(prefix)), at, []byte{byte(i)}))
	}
	for _, n := range []int{1, 59, 60, bs/2 - 64, bs / 2, bs/2 + 1, bs - 33, bs - 32, maxTarget} {
		if n > maxTarget {
			continue
		}
		add(Entry{Path: fmt.Sprintf("links/%d", n), Mode: ModeSymlink | 0o777, Mtime: at, Target: strings.Repeat("t/", n/2) + strings.Repeat("e", n%2)})
	}
	for i, d := range [][2]uint32{{0, 0}, {1, 3}, {255, 255}, {259, 256}, {4095, 1<<20 - 1}} {
		add(Entry{Path: fmt.Sprintf("dev/c%d", i), Mode: ModeChar | 0o620, Mtime: at, Major: d[0], Minor: d[1]})
		add(Entry{Path: fmt.Sprintf("dev/b%d", i), Mode: ModeBlock | 0o660, Mtime: at, Major: d[0], Minor: d[1]})
	}
	for i, ids := range [][2]uint32{{65535, 65535}, {65536, 0}, {0, 65536}, {1<<32 - 2, 1<<31 + 5}} {
		add(Entry{Path: fmt.Sprintf("ids/%d", i), Mode: ModeRegular | 0o6755, UID: ids[0], GID: ids[1], Mtime: at})
	}
	for i, m := range []time.Time{time.Unix(0, 0), time.Unix(-1, 999_999_999), time.Unix(1<<33, 1), time.Unix(-1<<33, 0), at.Add(1)} {
		add(regular(fmt.Sprintf("times/%d", i), m, []byte("t")))
	}
	add(regular("links/hard0", at, []byte("hard")))
	for i := range 20 {
		add(Entry{Path: fmt.Sprintf("dev/hard%d", i), Link: "links/hard0"})
	}
	add(Entry{Path: "dev/softhard", Link: "links/59"})
	return append(entries, xattrEntries(at, bs)...)
}

// zeroed makes all data zeros.
func zeroed(entries []Entry) []Entry {
	for i := range entries {
		entries[i].Open = opener(make([]byte, entries[i].Size))
	}
	return entries
}

// xattrEntries has bodies of many sizes, so that inodes with short tails come to lie at every place of a block.
func xattrEntries(at time.Time, bs int) []Entry {
	var entries []Entry
	for i := range 200 {
		e := regular(fmt.Sprintf("xattrs/%03d", i), at, content(uint64(i), i*13%bs))
		e.Xattrs = map[string][]byte{
			"user.n" + strings.Repeat("a", i%250): content(uint64(i), i*7),
			"trusted.t":                           nil,
			"security.s":                          {0, 1, 2},
		}
		entries = append(entries, e)
	}
	return append(entries,
		Entry{Path: "xattrs/dir", Mode: ModeDir | 0o755, Mtime: at, Xattrs: map[string][]byte{"user.big": content(1, 9000)}},
		Entry{Path: "xattrs/link", Mode: ModeSymlink | 0o777, Mtime: at, Target: "dir", Xattrs: map[string][]byte{"trusted.overlay.x": []byte("y")}},
		Entry{Path: "xattrs/fifo", Mode: ModeFifo | 0o644, Mtime: at, Xattrs: map[string][]byte{"trusted.z": []byte("z")}})
}

// words is size bytes of text that becomes half as long, or less, when compressed.
func words(seed uint64, size int) []byte {
	rng := rand.New(rand.NewPCG(seed, 1))
	var list [300]string
	for i := range list {
		list[i] = string(content(seed+uint64(i), 2+rng.IntN(9)))
	}
	p := make([]byte, 0, size+10)
	for len(p) < size {
		p = append(append(p, list[rng.IntN(1+rng.IntN(len(list)))]...), ' ')
	}
	return p[:size]
}

// mixed changes between text, noise and zeros.
func mixed(seed uint64, size int) []byte {
	rng := rand.New(rand.NewPCG(seed, 2))
	var p []byte
	for len(p) < size {
		n := 1 + rng.IntN(1+rng.IntN(1<<17))
		switch rng.IntN(3) {
		case 0:
			p = append(p, words(rng.Uint64()%7, n)...)
		case 1:
			p = append(p, content(rng.Uint64(), n)...)
		default:
			p = append(p, make([]byte, n*10)...)
		}
	}
	return p[:size]
}

// dataTree has files whose data takes every way through compression.
func dataTree(bs int) []Entry {
	at := time.Unix(1_700_000_000, 0)
	var entries []Entry
	add := func(path string, data []byte) { entries = append(entries, regular(path, at, data)) }
	for i, size := range []int{1, 12, 13, 100, bs - 1, bs, bs + 1, 2 * bs, 2*bs + 7, 5*bs + 100, 16 * bs, 31*bs + 5, 100_000} {
		add(fmt.Sprintf("words/%02d", i), words(uint64(i), size))
		add(fmt.Sprintf("mixed/%02d", i), mixed(uint64(i), size))
		add(fmt.Sprintf("noise/%02d", i), content(uint64(i), size))
		add(fmt.Sprintf("zeros/%02d", i), make([]byte, size))
		add(fmt.Sprintf("words-again/%02d", i), words(uint64(i), size))
	}
	for i := range 40 {
		e := regular(fmt.Sprintf("heads/%02d", i), at, words(uint64(i), i*bs*37/40))
		e.Xattrs = map[string][]byte{"user.n" + strings.Repeat("a", i): content(uint64(i), i*7)}
		entries = append(entries, e)
	}
	add("larger", mixed(9, 700_001))
	return append(entries, Entry{Path: "link", Link: "larger"}, Entry{Path: "empty", Mode: ModeRegular, Mtime: at})
}

// bigTree has files of several segments, too.
func bigTree() []Entry {
	at := time.Unix(1_700_000_000, 0)
	entries := dataTree(4096)
	add := func(path string, data []byte) { entries = append(entries, regular(path, at, data)) }
	add("big/one", words(1, maxSegment))
	add("big/mixed", mixed(2, 2*maxSegment+12345))
	add("big/words", words(3, maxSegment+1))
	add("big/noise", content(4, maxSegment+4096+1))
	add("big/zeros", make([]byte, 3*maxSegment+1))
	add("big/noise, then words", append(content(5, maxSegment), words(5, 10_000)...))
	return entries
}

// shareTree has attributes that many files have, and names with long beginnings.
func shareTree() []Entry {
	at := time.Unix(1_700_000_000, 0)
	entries := []Entry{{Path: ".", Mode: ModeDir | 0o755, Mtime: at, Xattrs: map[string][]byte{"security.selinux": []byte("root_t")}}}
	for i := range 300 {
		e := regular(fmt.Sprintf("f%03d", i), at, content(uint64(i), i*31))
		e.Xattrs = map[string][]byte{
			"security.selinux":                       []byte(fmt.Sprintf("system_u:object_r:type%d_t:s0", i%70)),
			"trusted.overlay.redirect":               []byte(fmt.Sprintf("/%d", i)),
			"trusted.overlay.opaque":                 []byte("y"),
			"trusted.overlay.":                       nil,
			"trusted.o":                              []byte("almost"),
			"user.org.example.very.long.beginning.x": {byte(i)},
		}
		if i == 17 {
			for j := range 400 { // more than an inode can share
				e.Xattrs[fmt.Sprintf("user.many%d", j)] = []byte("same")
			}
		}
		entries = append(entries, e)
	}
	for i := range xattrShareFrom {
		e := regular(fmt.Sprintf("g%d", i), at, nil)
		e.Xattrs = make(map[string][]byte)
		for j := range 400 {
			e.Xattrs[fmt.Sprintf("user.many%d", j)] = []byte("same")
		}
		entries = append(entries, e)
	}
	return entries
}

// chunkTree has chunks that are the same, and holes.
func chunkTree() []Entry {
	at := time.Unix(1_700_000_000, 0)
	var entries []Entry
	add := func(path string, parts ...[]byte) {
		entries = append(entries, regular(path, at, bytes.Join(parts, nil)))
	}
	a, b, zero := content(1, 8192), content(2, 8192), make([]byte, 8192)
	add("a", a)
	add("aba", a, b, a)
	add("a and a little", a, b[:100])
	add("a and a little again", a, b[:100])
	add("sparse", zero, zero, a, zero, zero, zero[:5])
	add("zeros alone", zero[:4097])
	add("zero", zero[:1])
	add("small", a[:10])
	add("half", a[:4096])
	add("unaligned", b[1:], a)
	add("large", content(3, 3_000_000))
	return entries
}

// wideTree has a directory of 10,000 entries.
func wideTree() []Entry {
	at := time.Unix(1, 0)
	var entries []Entry
	for i := range 10_000 {
		entries = append(entries, regular(fmt.Sprintf("wide/entry-%d", i), at, []byte{byte(i), byte(i >> 8)}))
	}
	return entries
}

// wanted is what a reader must show of these entries, computed from them alone. Every entry but the root and implied
// directories must be there once.
func wanted(t testing.TB, entries []Entry) []corpus.Entry {
	byPath := map[string]corpus.Entry{".": {Path: ".", Mode: ModeDir | 0o755, Nlink: 2}}
	names := make(map[string]uint32) // by the path of the first name
	target := make(map[string]string)
	for _, e := range entries {
		for dir := path.Dir(e.Path); e.Path != "."; dir = path.Dir(dir) {
			if _, ok := byPath[dir]; !ok {
				byPath[dir] = corpus.Entry{Path: dir, Mode: ModeDir | 0o755}
			}
			if dir == "." {
				break
			}
		}
		first := e.Path
		if e.Link != "" {
			first = e.Link
		}
		target[e.Path] = first
		names[first]++
		if e.Link == "" {
			byPath[e.Path] = show(t, e)
		}
	}
	subdirs := make(map[string]uint32)
	for p, e := range byPath {
		if p != "." && e.Mode&ModeType == ModeDir {
			subdirs[path.Dir(p)]++
		}
	}
	var list []corpus.Entry
	for p, first := range target {
		if _, ok := byPath[p]; !ok { // a hard link
			byPath[p] = byPath[first]
		}
	}
	for p, e := range byPath {
		e.Path = p
		e.Nlink = names[target[p]]
		if e.Mode&ModeType == ModeDir {
			e.Nlink = 2 + subdirs[p]
		}
		list = append(list, e)
	}
	return list
}

func show(t testing.TB, e Entry) corpus.Entry {
	c := corpus.Entry{Path: e.Path, Mode: e.Mode, UID: e.UID, GID: e.GID, MtimeNs: e.Mtime.UnixNano(), Target: e.Target, Xattrs: e.Xattrs}
	switch e.Mode & ModeType {
	case ModeRegular:
		h := sha256.New()
		if e.Size > 0 {
			r, err := e.Open()
			if err != nil {
				t.Fatal(err)
			}
			if c.Size, err = io.Copy(h, r); err != nil || c.Size != e.Size {
				t.Fatalf("%q has %d bytes, %v; want %d", e.Path, c.Size, err, e.Size)
			}
		}
		c.SHA256 = hex.EncodeToString(h.Sum(nil))
	case ModeSymlink:
		c.Size = int64(len(e.Target))
	case ModeChar, ModeBlock:
		c.Rdev = &[2]uint32{e.Major, e.Minor}
	}
	return c
}

// An image is one that was built for a test.
type image struct {
	name    string
	options Options
	entries []Entry
}

// images is every tree with options that change the layout. In a short run only some are: with the race detector,
// compressing takes ten times as long.
func images(t testing.TB) []image {
	if testing.Short() {
		var few []image
		for i, im := range append(plainImages(t), compressedImages()...) {
			if i%5 == 0 {
				few = append(few, im)
			}
		}
		return few
	}
	return append(plainImages(t), compressedImages()...)
}

func plainImages(t testing.TB) []image {
	list := []image{
		{"corpus", Options{}, corpusTree(t)},
		{"corpus, inline", Options{InlineMax: 2048, Label: "a label of 16 b."}, corpusTree(t)},
		{"wide", Options{}, wideTree()},
		{"wide, 512", Options{BlockSize: 512, InlineMax: 256}, wideTree()},
		{"empty", Options{}, nil},
		{"no data", Options{MetadataOnly: true}, zeroed(edgeTree(4096))},
		{"no data, 512", Options{MetadataOnly: true, BlockSize: 512}, zeroed(edgeTree(512))},
	}
	for _, prefixes := range [][]string{nil, {"trusted.overlay.", "user.org.example.", "user.org.example.very.long.", "security.s"}} {
		list = append(list, image{fmt.Sprintf("shared xattrs, prefixes %q", prefixes), Options{XattrPrefixes: prefixes, InlineMax: 4096}, shareTree()})
	}
	for _, o := range []Options{{ChunkSize: 4096}, {ChunkSize: 8192, InlineMax: 4096}, {ChunkSize: 1 << 20}, {BlockSize: 512, ChunkSize: 8192}} {
		list = append(list, image{fmt.Sprintf("chunks of %d, blocks of %d", o.ChunkSize, o.BlockSize), o, append(chunkTree(), dataTree(4096)...)})
	}
	for _, bs := range []int{512, 1024, 2048, 4096, 16384, 65536} {
		list = append(list,
			image{fmt.Sprintf("edges, %d", bs), Options{BlockSize: bs}, edgeTree(bs)},
			image{fmt.Sprintf("edges, %d, inline", bs), Options{BlockSize: bs, InlineMax: bs / 2}, edgeTree(bs)},
			image{fmt.Sprintf("edges, %d, a little inline", bs), Options{BlockSize: bs, InlineMax: 40}, edgeTree(bs)})
	}
	return list
}

// compressedImages have every algorithm and every part of the format that the builder writes.
func compressedImages() []image {
	var list []image
	add := func(tree []Entry, o Options) {
		z := o.Compression
		name := fmt.Sprintf("data, %s %d, blocks %d, inline %d", z.Algorithm, z.ClusterSize, o.BlockSize, o.InlineMax)
		for _, flag := range []struct {
			set  bool
			name string
		}{{z.TailPacking, "tails"}, {z.Fragments, "fragments"}, {z.Dedupe, "dedupe"}, {z.FullIndex, "full"}} {
			if flag.set {
				name += ", " + flag.name
			}
		}
		list = append(list, image{name, o, tree})
	}
	data, big := dataTree(4096), bigTree()
	for _, a := range []Algorithm{LZ4, LZ4HC, Zstd, Deflate} {
		add(data, Options{Compression: Compression{Algorithm: a}, InlineMax: 4096})
		add(data, Options{Compression: Compression{Algorithm: a, ClusterSize: 65536, TailPacking: true}})
		add(data, Options{Compression: Compression{Algorithm: a, ClusterSize: 65536, Fragments: true, TailPacking: true, Dedupe: true}})
	}
	add(big, Options{Compression: Compression{Algorithm: LZ4, TailPacking: true}})
	add(big, Options{Compression: Compression{Algorithm: LZ4, Fragments: true}})
	add(big, Options{Compression: Compression{Algorithm: LZ4, ClusterSize: 1 << 20, Fragments: true, Dedupe: true}})
	add(big, Options{Compression: Compression{Algorithm: Zstd, ClusterSize: 1 << 20, Level: 1}})
	add(shareTree(), Options{Compression: Compression{Algorithm: LZ4, Fragments: true}, XattrPrefixes: []string{"trusted.overlay."}})
	add(data, Options{Compression: Compression{Algorithm: LZ4, FullIndex: true, TailPacking: true}})
	add(data, Options{Compression: Compression{Algorithm: LZ4, FullIndex: true, Fragments: true, ClusterSize: 8192}})
	add(data, Options{Compression: Compression{Algorithm: LZ4, Dedupe: true, ClusterSize: 12288}})
	for _, bs := range []int{512, 2048, 8192, 16384, 65536} {
		tree := dataTree(bs)
		add(tree, Options{BlockSize: bs, Compression: Compression{Algorithm: LZ4, TailPacking: true}})
		add(tree, Options{BlockSize: bs, Compression: Compression{Algorithm: LZ4, ClusterSize: 2 * bs}})
	}
	return list
}

// build writes the image over a file that is full of other bytes, and gives its name.
func (im image) build(t testing.TB) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "image.erofs")
	if err := os.WriteFile(name, bytes.Repeat([]byte{0xEE}, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size := buildTo(t, f, im.options, im.entries)
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return name
}

func buildTo(t testing.TB, w io.WriterAt, o Options, entries []Entry) int64 {
	t.Helper()
	b, err := New(w, o)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if err := b.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	size, err := b.Finish(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return size
}

// memory is an image in memory.
type memory []byte

// memoryLock is for what a memory is while it grows.
var memoryLock sync.Mutex

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	memoryLock.Lock()
	defer memoryLock.Unlock()
	if end := off + int64(len(p)); end > int64(len(*m)) {
		*m = append(*m, make([]byte, end-int64(len(*m)))...)
	}
	return copy((*m)[off:], p), nil
}
