package mkerofs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
)

// What Entries lists makes the same image again, and comes in the order that it promises.
func TestEntriesMakeTheSameImage(t *testing.T) {
	for _, tree := range [][]Entry{edgeTree(4096), shareTree(), nil} {
		var want memory
		o := Options{SourceDateEpoch: time.Unix(1_600_000_000, 0), UUID: [16]byte{1}}
		b, err := New(&want, o)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range tree {
			if err := b.Add(e); err != nil {
				t.Fatal(err)
			}
		}
		before := slices.Collect(b.Entries())
		if _, err := b.Finish(t.Context()); err != nil {
			t.Fatal(err)
		}
		after := slices.Collect(b.Entries())
		for _, entries := range [][]Entry{before, after} {
			if entries[0].Path != "." {
				t.Errorf("first is %q", entries[0].Path)
			}
			// A directory's entries follow it if each slash counts as less than all other bytes.
			if !slices.IsSortedFunc(entries[1:], func(a, b Entry) int {
				return strings.Compare(strings.ReplaceAll(a.Path, "/", "\x00"), strings.ReplaceAll(b.Path, "/", "\x00"))
			}) {
				t.Error("not in order")
			}
			var got memory
			buildTo(t, &got, o, entries)
			if !bytes.Equal(got, want) {
				t.Error("another image")
			}
		}
	}
}

func TestEntriesByHand(t *testing.T) {
	b, err := New(new(memory), Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range []Entry{
		{Path: "b/z", Mode: ModeFifo}, {Path: "b-", Mode: ModeSocket}, {Path: "b/a", Link: "b/z"}, {Path: "a", Link: "b/z"},
		{Path: "s", Mode: ModeSymlink, Target: "to"},
	} {
		if err := b.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	for e := range b.Entries() {
		got = append(got, fmt.Sprintf("%s %o %s%s", e.Path, e.Mode, e.Link, e.Target))
	}
	want := []string{". 40755 ", "a 10000 ", "b 40755 ", "b/a 0 a", "b/z 0 a", "b- 140000 ", "s 120000 to"}
	if !slices.Equal(got, want) {
		t.Errorf("%q\nwant %q", got, want)
	}
	for e := range b.Entries() { // one that ends early ends
		if e.Path == "b/a" {
			break
		}
	}
}

// treeOf is entries in the words of tarOf, and "path c" for a character device 0:0, "path +name=value" for one more
// attribute of the entry before.
func treeOf(t testing.TB, lines ...string) []Entry {
	var entries []Entry
	for _, line := range lines {
		name, rest, _ := strings.Cut(line, " ")
		e := Entry{Path: strings.TrimSuffix(name, "/"), Mode: ModeRegular | 0o644, Mtime: time.Unix(0, 0)}
		kind, value, _ := strings.Cut(rest, " ")
		switch {
		case strings.HasPrefix(kind, "+"):
			key, value, _ := strings.Cut(kind[1:], "=")
			last := &entries[len(entries)-1]
			if last.Path != e.Path {
				t.Fatalf("%q does not follow its entry", line)
			}
			if last.Xattrs == nil {
				last.Xattrs = make(map[string][]byte)
			}
			last.Xattrs[key] = []byte(value)
			continue
		case kind == "c":
			e.Mode = ModeChar
		case kind == "->":
			e.Mode, e.Target = ModeSymlink|0o777, value
		case kind == "=>":
			e = Entry{Path: e.Path, Link: value}
		case kind == "=":
			e.Size, e.Open = int64(len(value)), opener([]byte(value))
		case strings.HasSuffix(name, "/"):
			e.Mode = ModeDir | 0o755
		}
		entries = append(entries, e)
	}
	return entries
}

func seq(entries []Entry) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		for _, e := range entries {
			if !yield(e, nil) {
				return
			}
		}
	}
}

// overLower puts entries over a layer and gives what the image holds.
func overLower(t testing.TB, o LayerOptions, form WhiteoutForm, lower []byte, entries iter.Seq2[Entry, error]) (string, error) {
	t.Helper()
	var m memory
	b, err := New(&m, Options{TempDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	l, err := NewLayers(b, o)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}()
	if lower != nil {
		if err := l.Apply(t.Context(), bytes.NewReader(lower)); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.ApplyEntries(t.Context(), entries, form); err != nil {
		return "", err
	}
	if _, err := b.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	image, err := erofsfmt.Open(t.Context(), sourcetest.Memory(m))
	if err != nil {
		t.Fatal(err)
	}
	r := reading{t: t, image: image, keepData: true}
	r.visit(".", image.Root())
	return lines(r.entries), nil
}

func TestApplyEntries(t *testing.T) {
	lower := []string{"a = 1", "d/", "d/x = 1", "d/y = 1", "e/f/g = 1", "lib -> d"}
	const all = "a = 1, d/, d/x = 1, d/y = 1, e/, e/f/, e/f/g = 1, lib -> d"
	for _, c := range []struct {
		name    string
		form    WhiteoutForm
		overlay bool // nothing below, marks are kept
		tree    []string
		want    string
	}{
		{"merge", WhiteoutsNone, false, []string{"./", "d/", "d/x = 2", "d/z = 2"}, "a = 1, d/, d/x = 2, d/y = 1, d/z = 2, e/, e/f/, e/f/g = 1, lib -> d"},
		{"nothing is a mark", WhiteoutsNone, false, []string{".wh.a", "d/", "d/ +trusted.overlay.opaque=y", "d/x c"},
			".wh.a, a = 1, d/ trusted.overlay.opaque=y, d/x c0:0, d/y = 1, e/, e/f/, e/f/g = 1, lib -> d"},
		{"names", WhiteoutsOCI, false, []string{".wh.a", "d/", "d/.wh..wh..opq", "d/x c"}, "d/, d/x c0:0, e/, e/f/, e/f/g = 1, lib -> d"},
		{"devices", WhiteoutsOverlay, false, []string{"a c", "d/", "d/y c", "e c", ".wh.lib"}, ".wh.lib, d/, d/x = 1, lib -> d"},
		{"devices of nothing", WhiteoutsOverlay, false, []string{"no c", "d/", "d/no c"}, all},
		{"devices that are links", WhiteoutsOverlay, false, []string{"a c", "d/", "d/x => a", "d/y => d/x"}, "d/, e/, e/f/, e/f/g = 1, lib -> d"},
		{"opaque", WhiteoutsOverlay, false, []string{"d/", "d/ +trusted.overlay.opaque=y", "d/z = 2", "e/", "e/f/", "e/f/ +trusted.overlay.opaque=y"},
			"a = 1, d/, d/z = 2, e/, e/f/, lib -> d"},
		{"opaque root", WhiteoutsOverlay, false, []string{"./", ". +trusted.overlay.opaque=y", "b = 2"}, "b = 2"},
		{"marks that are files", WhiteoutsOverlay, false, []string{"d/", "d/ +trusted.overlay.opaque=x", "d/x", "d/x +trusted.overlay.whiteout=", "d/x +user.a=b"},
			"a = 1, d/, d/y = 1, e/, e/f/, e/f/g = 1, lib -> d"},
		{"notes", WhiteoutsOverlay, false, []string{"d/", "d/ +trusted.overlay.impure=y", "d/ +trusted.overlay.origin=?", "d/ +user.a=b", "d/x = 2", "d/x +trusted.overlay.nlink=?"},
			"a = 1, d/ user.a=b, d/x = 2, d/y = 1, e/, e/f/, e/f/g = 1, lib -> d"},
		{"a directory for a link", WhiteoutsOverlay, false, []string{"lib/", "lib/n = 2"}, "a = 1, d/, d/x = 1, d/y = 1, e/, e/f/, e/f/g = 1, lib/, lib/n = 2"},
		{"other devices", WhiteoutsOverlay, false, []string{"n/", "n/a = 1", "n/b => n/a"}, strings.Replace(all, "lib -> d", "lib -> d, n/, n/a = 1 x2, n/b = 1 x2", 1)},
		{"kept", WhiteoutsOverlay, true, []string{"a c", "b => a", "d/", "d/ +trusted.overlay.opaque=y", "d/x = 2", "e/", "e/ +trusted.overlay.opaque=x", "e/f",
			"e/f +trusted.overlay.whiteout="}, "a c0:0, b c0:0, d/ trusted.overlay.opaque=y, d/x = 2, e/, e/f c0:0"},
		{"names kept", WhiteoutsOCI, true, []string{".wh.a", "d/", "d/.wh..wh..opq"}, "a c0:0, d/ trusted.overlay.opaque=y"},
		{"opaque root kept", WhiteoutsOCI, true, []string{".wh..wh..opq", "./", "a = 1"}, "./ trusted.overlay.opaque=y, a = 1"},
	} {
		below := tarOf(t, lower...)
		if c.overlay {
			below = nil
		}
		got, err := overLower(t, LayerOptions{Overlay: c.overlay}, c.form, below, seq(treeOf(t, c.tree...)))
		if err != nil || got != c.want {
			t.Errorf("%s: %s, %v\nwant %s", c.name, got, err, c.want)
		}
	}
}

func TestApplyEntriesRefuses(t *testing.T) {
	mark := func(name, attr string) []string { return []string{name, name + " +" + attr} }
	for _, c := range []struct {
		name string
		tree []string
		want string
	}{
		{"redirect", mark("d/", "trusted.overlay.redirect=/x"), "overlayfs's redirect"},
		{"metacopy", mark("f", "trusted.overlay.metacopy="), "overlayfs's metacopy"},
		{"what is to come", mark("f", "trusted.overlay.later=1"), "overlayfs's later"},
		{"opaque file", mark("f", "trusted.overlay.opaque=y"), "overlayfs's opaque"},
		{"unknown opaque", mark("d/", "trusted.overlay.opaque=z"), `opaque="z"`},
		{"whiteout with data", []string{"f = 1", "f +trusted.overlay.whiteout="}, "overlayfs's whiteout"},
		{"absolute", []string{"/a = 1"}, "is absolute"},
		{"parent", []string{"a/../b = 1"}, ".. parts"},
		{"link to nothing", []string{"a => b"}, "not there"},
		{"root as a file", []string{". = 1"}, "root must be"},
		{"root as a link", []string{"a = 1", ". => a"}, "root must be"},
		{"too much", []string{"a = 1234567890", "b = 1"}, "more than 10"},
	} {
		got, err := overLower(t, LayerOptions{MaxBytes: 10}, WhiteoutsOverlay, nil, seq(treeOf(t, c.tree...)))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %s, %v, want %q", c.name, got, err, c.want)
		}
	}
	failing := func(yield func(Entry, error) bool) { yield(Entry{}, errTest) }
	if _, err := overLower(t, LayerOptions{}, WhiteoutsNone, nil, failing); !errors.Is(err, errTest) {
		t.Errorf("a source that fails: %v", err)
	}
}

// The caller's entries stay as they are, although attributes are left out.
func TestApplyEntriesKeepsItsHandsOff(t *testing.T) {
	entries := treeOf(t, "d/", "d/ +trusted.overlay.opaque=y", "f", "f +com.apple.x=y", "f +user.a=b")
	var warned []string
	o := LayerOptions{Warn: func(path, what string) { warned = append(warned, path+": "+what) }}
	got, err := overLower(t, o, WhiteoutsOverlay, nil, seq(entries))
	if err != nil || got != "d/, f user.a=b" {
		t.Errorf("%s, %v", got, err)
	}
	if len(entries[0].Xattrs) != 1 || len(entries[1].Xattrs) != 2 {
		t.Errorf("changed: %v", entries)
	}
	if len(warned) != 1 || !strings.Contains(warned[0], "f: ") || !strings.Contains(warned[0], "com.apple.x") {
		t.Errorf("warnings %q", warned)
	}
}

// Sizes, metadata and links as ever, all data zero, no source opened, and an index entry a file.
func TestMetadataOnly(t *testing.T) {
	closed := func() (io.ReadCloser, error) { return nil, errTest }
	at := time.Unix(7, 0)
	entries := []Entry{
		{Path: "empty", Mode: ModeRegular, Mtime: at},
		{Path: "small", Mode: ModeRegular, Mtime: at, Size: 1},
		{Path: "block", Mode: ModeRegular, Mtime: at, Size: 4096, Open: closed},
		{Path: "more", Mode: ModeRegular, Mtime: at, Size: 4097, Open: closed},
		{Path: "link", Link: "more"},
		{Path: "huge", Mode: ModeRegular, Mtime: at, Size: 1<<43 + 1},
		{Path: "s", Mode: ModeSymlink | 0o777, Mtime: at, Target: "small"},
	}
	var m memory
	size := buildTo(t, &m, Options{MetadataOnly: true}, entries)
	if size != 2*4096 {
		t.Errorf("%d bytes", size)
	}
	image, err := erofsfmt.Open(t.Context(), sourcetest.Memory(m))
	if err != nil {
		t.Fatal(err)
	}
	// chunkBits and how many entries the index has, by hand.
	for _, c := range []struct {
		path   string
		size   int64
		format byte
		chunks int
	}{{"small", 1, 0x20, 1}, {"block", 4096, 0x20, 1}, {"more", 4097, 0x21, 1}, {"huge", 1<<43 + 1, 0x3f, 2}} {
		nid, err := image.Lookup(t.Context(), rootInode(t, image), c.path)
		if err != nil {
			t.Fatal(err)
		}
		ino, err := image.Inode(t.Context(), nid)
		if err != nil || ino.Size != c.size {
			t.Errorf("%s: size %d, %v", c.path, ino.Size, err)
		}
		p := bytes.Repeat([]byte{1}, 100)
		p = p[:min(int64(len(p)), c.size)]
		for _, off := range []int64{0, c.size - int64(len(p))} {
			if err := image.ReadFile(t.Context(), &ino, p, off); err != nil || !zero(p) {
				t.Errorf("%s at %d: %v, %v", c.path, off, p, err)
			}
		}
		raw := m[32*int64(nid):]
		head := 32
		if raw[0]&1 != 0 {
			head = 64
		}
		if raw[0x10] != c.format || !bytes.Equal(raw[head:head+8*c.chunks], bytes.Repeat([]byte{0xff, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff}, c.chunks)) {
			t.Errorf("%s: chunk format %#x, index %x", c.path, raw[0x10], raw[head:head+8*c.chunks])
		}
	}
	for _, o := range []Options{{ChunkSize: 4096}, {Compression: Compression{Algorithm: LZ4}}} {
		o.MetadataOnly = true
		if _, err := New(new(memory), o); err == nil || !strings.Contains(err.Error(), "neither chunks nor compression") {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

func rootInode(t testing.TB, image *erofsfmt.Image) *erofsfmt.Inode {
	ino, err := image.Inode(context.Background(), image.Root())
	if err != nil {
		t.Fatal(err)
	}
	return &ino
}

// Figures computed by hand, and progress that grows up to them.
func TestStatsAndProgress(t *testing.T) {
	at := time.Unix(7, 0)
	tree := []Entry{
		regular("a", at, content(1, 5000)), {Path: "b", Link: "a"}, regular("c", at, content(1, 5000)), regular("empty", at, nil),
		regular("zeros", at, make([]byte, maxSegment+1)), {Path: "d/s", Mode: ModeSymlink, Mtime: at, Target: "x"},
	}
	// LZ4 takes a byte for 255 zeros: 16.1 KiB for a segment of them.
	const bytesRead = 5000 + 5000 + maxSegment + 1
	for _, c := range []struct {
		name   string
		o      Options
		stored int64
		calls  int // at most so many bytes between two calls
	}{
		{"plain", Options{}, 2*8192 + maxSegment + 4096, 1 << 20},
		{"inline", Options{InlineMax: 4096}, 2*(4096+904) + maxSegment + 1, 1 << 20},
		{"chunks", Options{ChunkSize: 4096}, 8192, 4096},
		{"same", Options{Compression: Compression{Algorithm: LZ4, Dedupe: true, ClusterSize: 1 << 20}}, 8192 + 5*4096 + 4096, maxSegment},
		{"no data", Options{MetadataOnly: true}, 0, 0},
	} {
		var files, consumed, calls int64
		most := int64(0)
		c.o.Progress = func(f, b int64) {
			if f < files || b < consumed {
				t.Errorf("%s: from %d, %d to %d, %d", c.name, files, consumed, f, b)
			}
			most = max(most, b-consumed)
			files, consumed, calls = f, b, calls+1
		}
		var m memory
		b, err := New(&m, c.o)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range tree {
			if err := b.Add(e); err != nil {
				t.Fatal(err)
			}
		}
		if b.Stats() != (Stats{}) {
			t.Errorf("%s: %+v before Finish", c.name, b.Stats())
		}
		size, err := b.Finish(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got, want := b.Stats(), (Stats{Inodes: 7, Files: 4, Content: bytesRead, Stored: c.stored, Blocks: size / 4096}); got != want {
			t.Errorf("%s: %+v, want %+v", c.name, got, want)
		}
		switch {
		case c.o.MetadataOnly:
			if calls != 0 {
				t.Errorf("%s: progress of nothing", c.name)
			}
		case files != 3 || consumed != bytesRead || most > int64(c.calls):
			t.Errorf("%s: %d files, %d bytes, up to %d at once", c.name, files, consumed, most)
		}
	}
}
