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

// images is every tree with options that change the layout.
func images(t testing.TB) []image {
	list := []image{
		{"corpus", Options{}, corpusTree(t)},
		{"corpus, inline", Options{InlineMax: 2048, Label: "a label of 16 b."}, corpusTree(t)},
		{"wide", Options{}, wideTree()},
		{"wide, 512", Options{BlockSize: 512, InlineMax: 256}, wideTree()},
		{"empty", Options{}, nil},
	}
	for _, bs := range []int{512, 1024, 2048, 4096, 16384, 65536} {
		list = append(list,
			image{fmt.Sprintf("edges, %d", bs), Options{BlockSize: bs}, edgeTree(bs)},
			image{fmt.Sprintf("edges, %d, inline", bs), Options{BlockSize: bs, InlineMax: bs / 2}, edgeTree(bs)},
			image{fmt.Sprintf("edges, %d, a little inline", bs), Options{BlockSize: bs, InlineMax: 40}, edgeTree(bs)})
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

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	if end := off + int64(len(p)); end > int64(len(*m)) {
		*m = append(*m, make([]byte, end-int64(len(*m)))...)
	}
	return copy((*m)[off:], p), nil
}
