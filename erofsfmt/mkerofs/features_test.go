package mkerofs

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// Vectors of the xxHash specification's reference implementation.
func TestXXH32(t *testing.T) {
	for _, c := range []struct {
		in   string
		seed uint32
		want uint32
	}{
		{"", 0, 0x02CC5D05},
		{"a", 0, 0x550D7456},
		{"abc", 0, 0x32D153FF},
		{"Nobody inspects the spammish repetition", 0, 0xE2293B2F},
	} {
		if got := xxh32([]byte(c.in), c.seed); got != c.want {
			t.Errorf("%q, seed %d: %#08x, want %#08x", c.in, c.seed, got, c.want)
		}
	}
}

func TestNameFilter(t *testing.T) {
	var b Builder
	attrs, err := b.splitXattrs(map[string][]byte{"user.a": nil, "trusted.b": nil})
	if err != nil {
		t.Fatal(err)
	}
	want := ^(uint32(1)<<(xxh32([]byte("a"), 0x25BBE08F+1)%32) | uint32(1)<<(xxh32([]byte("b"), 0x25BBE08F+4)%32))
	if got := le.Uint32(b.encodeBody(attrs, nil)); got != want {
		t.Errorf("filter %#x, want %#x", got, want)
	}
}

// Four inodes share what they have in common; the fifth attribute is of one alone.
func TestSharedXattrsByHand(t *testing.T) {
	b := Builder{prefixes: []xattrPrefix{{ondisk.XattrTrusted, "overlay."}}}
	var nodes []*node
	for i := range 4 {
		attrs := map[string][]byte{"user.x": []byte("1"), "trusted.overlay.y": []byte("22")}
		if i == 3 {
			attrs["user.z"] = []byte("z")
		}
		list, err := b.splitXattrs(attrs)
		if err != nil {
			t.Fatal(err)
		}
		nodes = append(nodes, &node{attrs: list})
	}
	const shared = "01010100 78 31 0000  01800200 79 3232 00"
	if got := hex.EncodeToString(b.encodeXattrs(nodes)); got != strings.ReplaceAll(shared, " ", "") {
		t.Errorf("shared area %s, want %s", got, shared)
	}
	for i, n := range nodes {
		want := "02 00000000000000  02000000 00000000"
		if i == 3 {
			want += "01010100 7a 7a 0000"
		}
		if got := hex.EncodeToString(n.xattrs[4:]); got != strings.ReplaceAll(want, " ", "") {
			t.Errorf("inode %d: %s, want %s", i, got, want)
		}
	}
	if got, want := hex.EncodeToString(encodePrefixes(b.prefixes)), "0900"+"04"+hex.EncodeToString([]byte("overlay."))+"00"; got != want {
		t.Errorf("prefixes %s, want %s", got, want)
	}
}

func TestFeaturesRefuse(t *testing.T) {
	for _, c := range []struct {
		o    Options
		want string
	}{
		{Options{ChunkSize: 2048}, "power of two"},
		{Options{ChunkSize: 12288}, "power of two"},
		{Options{ChunkSize: 8 << 20}, "power of two"},
		{Options{ChunkSize: 4096, Compression: Compression{Algorithm: LZ4}}, "take one"},
		{Options{XattrPrefixes: []string{"user."}}, "no place"},
		{Options{XattrPrefixes: []string{"system.posix_acl_access"}}, "has a number"},
		{Options{XattrPrefixes: slices.Repeat([]string{"user.x"}, 128)}, "more than 127"},
		{Options{Workers: -1}, "workers"},
		{Options{Workers: 9}, "workers"},
	} {
		if _, err := New(new(memory), c.o); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", c.o, err, c.want)
		}
	}
}

func TestChunksAreStoredOnce(t *testing.T) {
	for _, c := range []struct {
		size int
		meta int64 // blocks: the superblock's, and those of inodes and indexes
		want int64 // blocks of data
	}{
		{8192, 2, 2*2 + 1 + 1 + 2*2 + 733}, // a and b; b's beginning; half of a; two that are not aligned; large
		{4096, 3, 4 + 1 + 4 + 733},         // half of a is a chunk of a
	} {
		b, err := New(new(memory), Options{ChunkSize: c.size})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range chunkTree() {
			if e.Path == "small" {
				continue
			}
			if err := b.Add(e); err != nil {
				t.Fatal(err)
			}
		}
		size, err := b.Finish(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got := size/4096 - c.meta; got != c.want {
			t.Errorf("chunks of %d: %d blocks of data, want %d", c.size, got, c.want)
		}
	}
}

// What is ordered lies in front, whatever else is asked for.
func TestOrder(t *testing.T) {
	at := time.Unix(0, 0)
	var entries []Entry
	for i := range 9 {
		entries = append(entries, regular(fmt.Sprintf("d/%d", i), at, words(uint64(i), 20_000)))
	}
	entries = append(entries, Entry{Path: "link", Link: "d/3"})
	order := []string{"d/7", "absent", "d", "d/7/x", "link", "d/0", "d/3", ""}
	for _, o := range []Options{{}, {Compression: Compression{Algorithm: LZ4}}} {
		o.Order = order
		b, err := New(new(memory), o)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if err := b.Add(e); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := b.Finish(t.Context()); err != nil {
			t.Fatal(err)
		}
		files := slices.Collect(func(yield func(*node) bool) {
			for _, name := range b.root.children["d"].names {
				if n := b.root.children["d"].children[name]; n != nil && !yield(n) {
					return
				}
			}
		})
		slices.SortFunc(files, func(a, b *node) int { return int(a.block) - int(b.block) })
		var got string
		for _, n := range files {
			got += strings.TrimPrefix(n.Path, "d/")
		}
		if got != "730124568" {
			t.Errorf("%v: files lie in the order %s", o.Compression.Algorithm, got)
		}
	}
}

func TestSourceDateEpoch(t *testing.T) {
	limit := time.Unix(1000, 5)
	build := func(o Options, times ...time.Time) (m memory) {
		var entries []Entry
		for i, at := range times {
			entries = append(entries, regular(fmt.Sprint(i), at, nil))
		}
		buildTo(t, &m, o, entries)
		return m
	}
	clamped := build(Options{SourceDateEpoch: limit}, limit.Add(1), time.Unix(1<<40, 0), limit, time.Unix(7, 0))
	if !bytes.Equal(clamped, build(Options{}, limit, limit, limit, time.Unix(7, 0))) {
		t.Error("later times are not the limit, or earlier ones are not kept")
	}
}
