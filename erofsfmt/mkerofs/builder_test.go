package mkerofs

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
	"github.com/erofs-oci/erofs-oci/tests/require"
)

// The smallest image with a file, every place computed by hand:
//
//	4096  root, compact; 4128 its 40 bytes: 3 entries, then ".", "..", "a"
//	4192  a, extended, since its time is another; nid 131
//	8192  a's 5 bytes
func TestSmallImageByHand(t *testing.T) {
	at := time.Unix(0x11223344, 0x55)
	a := regular("a", at.Add(1), []byte("hello"))
	a.UID, a.Mode = 0x01020304, ModeRegular|0o4711
	var m memory
	size := buildTo(t, &m, Options{}, []Entry{{Path: ".", Mode: ModeDir | 0o750, UID: 0x0607, GID: 0x0809, Mtime: at}, a})
	if size != 3*4096 || len(m) != 3*4096 {
		t.Fatalf("size %d, %d bytes written; want %d", size, len(m), 3*4096)
	}
	for _, c := range []struct {
		what string
		off  int64
		want string
	}{
		{"magic", 1024, "e2e1f5e0"},
		{"compatible features, block bits, slots, root nid, inodes", 1032, "03000000 0c 00 8000 0200000000000000"},
		{"epoch, nanoseconds, blocks", 1048, "4433221100000000 55000000 03000000"},
		{"metadata and xattr block", 1064, "00000000 00000000"},
		{"incompatible features to the end", 1104, strings.Repeat("00", 4096-1104)},
		{"root: inline, mode, 2 links, size", 4096, "0400 0000 e841 0200 28000000"},
		{"root: time, block, number, ids", 4108, "00000000 00000000 01000000 0706 0908 00000000"},
		{"root's entries", 4128, "8000000000000000 2400 02 00  8000000000000000 2500 02 00  8300000000000000 2700 01 00"},
		{"root's names, then nothing", 4164, "2e 2e2e 61" + strings.Repeat("00", 4192-4168)},
		{"a: extended and plain, mode, size", 4192, "0100 0000 c989 0000 0500000000000000"},
		{"a: block, number, ids", 4208, "02000000 02000000 04030201 00000000"},
		{"a: time, links", 4224, "4433221100000000 56000000 01000000" + strings.Repeat("00", 16)},
		{"a's bytes", 8192, "68656c6c6f" + strings.Repeat("00", 4091)},
	} {
		want := strings.ReplaceAll(c.want, " ", "")
		if got := hex.EncodeToString(m[c.off : c.off+int64(len(want)/2)]); got != want {
			t.Errorf("%s, at %d:\n got %s\nwant %s", c.what, c.off, got, want)
		}
	}
}

func TestDirBlocks(t *testing.T) {
	name := strings.Repeat("a", 25)
	for _, c := range []struct {
		names []string
		want  string // of blocks of 64 bytes; an entry takes 12 and its name
		size  int64
	}{
		{[]string{".", ".."}, "[0 2]27", 27},
		{[]string{".", "..", name}, "[0 3]64", 64},
		{[]string{".", "..", name, "b"}, "[0 3]64 [3 4]13", 64 + 13},
		{[]string{".", "..", name + "a"}, "[0 2]27 [2 3]38", 64 + 38},
		{[]string{"!", ".", "..", "a", "b"}, "[0 4]53 [4 5]13", 64 + 13},
		{[]string{name + name + "aa", ".", name + name + "ab"}, "[0 1]64 [1 2]13 [2 3]64", 3 * 64},
	} {
		var got []string
		for span, used := range dirBlocks(c.names, 64) {
			got = append(got, fmt.Sprintf("%v%d", span, used))
		}
		if strings.Join(got, " ") != c.want || dirSize(c.names, 64) != c.size {
			t.Errorf("%q: %s, size %d; want %s, %d", c.names, got, dirSize(c.names, 64), c.want, c.size)
		}
	}
}

func TestEncodeXattrs(t *testing.T) {
	long := strings.Repeat("n", 255)
	for _, c := range []struct {
		xattrs map[string][]byte
		want   string // hex, or what the error says
	}{
		{nil, ""},
		{map[string][]byte{"user.ab": []byte("xyz")}, "000000000000000000000000 02010300 6162 78797a 000000"},
		{map[string][]byte{"trusted.t": nil, "security.s": {1, 2, 3}},
			"000000000000000000000000 01060300 73 010203  01040000 74 000000"},
		{map[string][]byte{"system.posix_acl_access": {9}, "system.posix_acl_default": {8}},
			"000000000000000000000000 00020100 09 000000  00030100 08 000000"},
		{map[string][]byte{"user." + long: nil}, "000000000000000000000000 ff010000" + strings.Repeat("6e", 255) + "00"},
		{map[string][]byte{"user." + long + "n": nil}, "at most 255 bytes"},
		{map[string][]byte{"user.a\x00b": nil}, "no NUL"},
		{map[string][]byte{"user.": nil}, "no place for it"},
		{map[string][]byte{"lustre.lov": nil}, "no place for it"},
		{map[string][]byte{"system.posix_acl_accessory": nil}, "no place for it"},
		{map[string][]byte{"system.nfs4_acl": nil}, "no place for it"},
		{map[string][]byte{"user.a": make([]byte, 65536)}, "longer than 65535"},
		{map[string][]byte{"user.a": make([]byte, 65535), "user.b": make([]byte, 65535), "user.c": make([]byte, 65535), "user.d": make([]byte, 65535)},
			"xattrs take 262172 bytes, an inode can have 262148"},
	} {
		var b Builder
		attrs, err := b.splitXattrs(c.xattrs)
		got := b.encodeBody(attrs, nil)
		if len(got) > 0 {
			clear(got[:4]) // the name filter, which has a test of its own
		}
		if err != nil {
			if !strings.Contains(err.Error(), c.want) || c.want == "" {
				t.Errorf("%.60v: %v, want %s", c.xattrs, err, c.want)
			}
		} else if want := strings.ReplaceAll(c.want, " ", ""); hex.EncodeToString(got) != want {
			t.Errorf("%.60v:\n got %x\nwant %s", c.xattrs, got, want)
		}
	}
}

func TestCompactOrExtended(t *testing.T) {
	at := time.Unix(100, 7)
	fits := Entry{Mode: ModeRegular | 0o644, UID: 65535, GID: 65535, Mtime: at}
	with := func(change func(*Entry)) Entry {
		e := fits
		change(&e)
		return e
	}
	b, err := New(new(memory), Options{})
	if err != nil {
		t.Fatal(err)
	}
	cases := []struct {
		name    string
		e       Entry
		compact bool
	}{
		{"fits", fits, true},
		{"size", with(func(e *Entry) { e.Size, e.Open = math.MaxUint32, opener(nil) }), true},
		{"size+1", with(func(e *Entry) { e.Size, e.Open = math.MaxUint32+1, opener(nil) }), false},
		{"uid", with(func(e *Entry) { e.UID++ }), false},
		{"gid", with(func(e *Entry) { e.GID++ }), false},
		{"seconds", with(func(e *Entry) { e.Mtime = at.Add(time.Second) }), false},
		{"nanoseconds", with(func(e *Entry) { e.Mtime = at.Add(1) }), false},
		{"linked", fits, true},
		{"linked more", fits, false},
	}
	for _, c := range cases {
		c.e.Path = c.name
		if err := b.Add(c.e); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 65535 {
		links := []string{"linked more", "linked"}
		for _, to := range links[:min(2, 65535-i)] { // the last one for one of them only
			if err := b.Add(Entry{Path: fmt.Sprintf("l/%s%d", to, i), Link: to}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := b.plan(b.walk(), nil); err != nil {
		t.Fatal(err)
	}
	for _, c := range cases {
		if got := b.root.children[c.name].compact; got != c.compact {
			t.Errorf("%s: compact %v, want %v", c.name, got, c.compact)
		}
	}
}

// All that is not file data is in front of all that is, and nothing overlaps.
func TestMetadataIsInFront(t *testing.T) {
	for _, im := range plainImages(t) {
		b, err := New(new(memory), im.options)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range im.entries {
			if err := b.Add(e); err != nil {
				t.Fatal(err)
			}
		}
		l, err := b.plan(b.walk(), nil)
		if err != nil {
			t.Fatal(err)
		}
		bs := int64(1) << b.blockBits
		end, dirs, files := l.metaStart, int64(0), l.dataBlock
		for _, n := range l.inodes {
			if n.offset < end || n.offset%ondisk.InodeSlot != 0 {
				t.Errorf("%s: inode at %d overlaps what ends at %d, or is not aligned", im.name, n.offset, end)
			}
			end = n.offset + n.headSize() + n.tail
			if n.tail > 0 && (end-n.tail)/bs != (end-1)/bs {
				t.Errorf("%s: the tail %d to %d crosses a block", im.name, end-n.tail, end)
			}
		}
		for _, n := range l.nodes {
			next := &dirs
			if n.Mode&ModeType == ModeRegular {
				next = &files
			}
			if n.blocks > 0 && int64(n.block) < *next {
				t.Errorf("%s: block %d overlaps what ends at %d", im.name, n.block, *next)
			}
			if n.blocks > 0 {
				*next = int64(n.block) + n.blocks
			}
			if got := n.blocks*bs + n.tail; n.chunks == 0 && (got < n.Size || got >= n.Size+bs) {
				t.Errorf("%s: %d bytes have room for %d", im.name, n.Size, got)
			}
		}
		if dirs > l.dataBlock || end > l.dataBlock*bs || files != l.blocks {
			t.Errorf("%s: inodes end at %d, directories at block %d, files begin at %d and end at %d of %d blocks",
				im.name, end, dirs, l.dataBlock, files, l.blocks)
		}
	}
}

// No bytes are written, so files can be as large as they like.
func TestLargeFiles(t *testing.T) {
	const tib = 1 << 40
	for _, c := range []struct {
		sizes  []int64
		blocks []uint32 // the first of each file
		total  int64    // 0: too many
	}{
		{[]int64{6*tib + 1, 5, 4 * tib}, []uint32{2, 2 + 6<<28 + 1, 2 + 6<<28 + 2}, 2 + 10<<28 + 2},
		{[]int64{16*tib - 3*4096}, []uint32{2}, math.MaxUint32},
		{[]int64{16*tib - 3*4096 + 1}, nil, 0},
		{[]int64{math.MaxInt64}, nil, 0},
		{[]int64{math.MaxInt64, math.MaxInt64, math.MaxInt64}, nil, 0},
	} {
		b, err := New(new(memory), Options{})
		if err != nil {
			t.Fatal(err)
		}
		for i, size := range c.sizes {
			if err := b.Add(Entry{Path: fmt.Sprint(i), Mode: ModeRegular, Mtime: time.Unix(0, 0), Size: size, Open: opener(nil)}); err != nil {
				t.Fatal(err)
			}
		}
		l, err := b.plan(b.walk(), nil)
		if c.total == 0 {
			if err == nil || !strings.Contains(err.Error(), "larger block size") {
				t.Errorf("%d: error %v", c.sizes, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%d: %v", c.sizes, err)
			continue
		}
		if l.blocks != c.total {
			t.Errorf("%d: %d blocks, want %d", c.sizes, l.blocks, c.total)
		}
		for i, want := range c.blocks {
			if got := b.root.children[fmt.Sprint(i)].block; got != want {
				t.Errorf("%d: file %d begins at block %d, want %d", c.sizes, i, got, want)
			}
		}
	}
}

func TestSameInputSameBytes(t *testing.T) {
	require.Long(t, "builds many images twice")
	for _, im := range images(t) {
		var first memory
		buildTo(t, &first, im.options, im.entries)
		// Hard links must stay behind their targets.
		links := slices.DeleteFunc(slices.Clone(im.entries), func(e Entry) bool { return e.Link == "" })
		others := slices.DeleteFunc(slices.Clone(im.entries), func(e Entry) bool { return e.Link != "" })
		rng := rand.New(rand.NewPCG(1, 1))
		for _, list := range [][]Entry{others, links} {
			rng.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
		}
		var second memory
		buildTo(t, &second, im.options, append(others, links...))
		if !bytes.Equal(first, second) {
			t.Errorf("%s: two builds differ", im.name)
		}
	}
}

func TestDerivedUUID(t *testing.T) {
	const from, to = ondisk.SuperOffset + 0x30, ondisk.SuperOffset + 0x40
	at := time.Unix(0, 0)
	base := []Entry{regular("a", at, []byte("content"))}
	seen := make(map[string]string)
	for _, c := range []struct {
		name    string
		o       Options
		entries []Entry
	}{
		{"base", Options{}, base},
		{"other content", Options{}, []Entry{regular("a", at, []byte("Content"))}},
		{"other content, inline", Options{InlineMax: 100}, []Entry{regular("a", at, []byte("Content"))}},
		{"other name", Options{}, []Entry{regular("b", at, []byte("content"))}},
		{"other time", Options{}, []Entry{regular("a", at.Add(1), []byte("content"))}},
		{"other label", Options{Label: "l"}, base},
		{"given", Options{UUID: [16]byte{1}}, base},
	} {
		var m memory
		buildTo(t, &m, c.o, c.entries)
		uuid := m[from:to]
		if other, ok := seen[string(uuid)]; ok {
			t.Errorf("%s has the UUID of %s", c.name, other)
		}
		seen[string(uuid)] = c.name
		if c.name == "given" {
			if uuid[0] != 1 || !bytes.Equal(uuid[1:], make([]byte, 15)) {
				t.Errorf("given UUID became %x", uuid)
			}
		} else if uuid[6]>>4 != 8 || uuid[8]>>6 != 2 {
			t.Errorf("%s: %x is not a UUID of version 8", c.name, uuid)
		}
	}
}

func TestAddReplaces(t *testing.T) {
	at := time.Unix(5, 0)
	dir := func(path string, mode uint32) Entry { return Entry{Path: path, Mode: ModeDir | mode, Mtime: at} }
	added := []Entry{
		regular("d/kept", at, []byte("kept")),
		dir("d", 0o700), // implied before, now said
		dir(".", 0o711),
		regular("f", at, []byte("old")),
		{Path: "f-link", Link: "f"},
		regular("f", at, []byte("new")),
		regular("gone/deep/file", at, nil),
		regular("gone", at, []byte("now a file")),
		regular("was-file", at, nil),
		dir("was-file", 0o755),
		regular("was-file/inside", at, []byte("x")),
	}
	want := []Entry{
		dir(".", 0o711), dir("d", 0o700), regular("d/kept", at, []byte("kept")),
		regular("f", at, []byte("new")), regular("f-link", at, []byte("old")),
		regular("gone", at, []byte("now a file")), dir("was-file", 0o755), regular("was-file/inside", at, []byte("x")),
	}
	var got, plain memory
	buildTo(t, &got, Options{}, added)
	buildTo(t, &plain, Options{}, want)
	if !bytes.Equal(got, plain) {
		t.Error("entries that replaced others are not as if they had come alone")
	}
}

func TestAddRefuses(t *testing.T) {
	long := strings.Repeat("x", 256)
	b, err := New(new(memory), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Add(regular("file", time.Unix(0, 0), nil)); err != nil {
		t.Fatal(err)
	}
	if err := b.Add(Entry{Path: "link", Mode: ModeSymlink, Target: ".."}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		e    Entry
		want string
	}{
		{Entry{Path: "", Mode: ModeDir}, "relative to the root"},
		{Entry{Path: "/abs", Mode: ModeDir}, "relative to the root"},
		{Entry{Path: "a/", Mode: ModeDir}, "relative to the root"},
		{Entry{Path: "a//b", Mode: ModeDir}, "relative to the root"},
		{Entry{Path: "./a", Mode: ModeDir}, "relative to the root"},
		{Entry{Path: "../a", Mode: ModeDir}, "relative to the root"},
		{Entry{Path: "a/../../b", Mode: ModeDir}, "relative to the root"},
		{Entry{Path: "..", Mode: ModeDir}, "relative to the root"},
		{Entry{Path: "a\x00b", Mode: ModeDir}, "NUL"},
		{Entry{Path: "d/" + long, Mode: ModeDir}, "256 bytes: longer than 255"},
		{Entry{Path: ".", Mode: ModeRegular}, "root must be a directory"},
		{Entry{Path: ".", Link: "file"}, "root must be a directory"},
		{Entry{Path: "file/below", Mode: ModeDir}, `"file" is not a directory`},
		{Entry{Path: "link/escape", Mode: ModeDir}, `"link" is not a directory`},
		{Entry{Path: "h", Link: "absent"}, "which was not added"},
		{Entry{Path: "h", Link: "file/absent"}, "which was not added"},
		{Entry{Path: "h", Link: "."}, "is a directory"},
		{Entry{Path: "h", Link: "../file"}, "relative to the root"},
		{Entry{Path: "a", Mode: 0o644}, "unknown type"},
		{Entry{Path: "a", Mode: 0o150644}, "unknown type"},
		{Entry{Path: "a", Mode: 1<<16 | ModeDir}, "more than 16 bits"},
		{Entry{Path: "a", Mode: ModeRegular, Size: -1, Open: opener(nil)}, "negative"},
		{Entry{Path: "a", Mode: ModeRegular, Size: 1}, "needs Open"},
		{Entry{Path: "a", Mode: ModeSymlink}, "link target of 0 bytes"},
		{Entry{Path: "a", Mode: ModeSymlink, Target: strings.Repeat("t", 4096)}, "link target of 4096 bytes"},
		{Entry{Path: "a", Mode: ModeSymlink, Target: "t\x00"}, "no NUL"},
		{Entry{Path: "a", Mode: ModeChar, Major: 4096}, "device 4096:0"},
		{Entry{Path: "a", Mode: ModeBlock, Minor: 1 << 20}, "device 0:1048576"},
		{Entry{Path: "a", Mode: ModeDir, Xattrs: map[string][]byte{"user.": nil}}, "no place for it"},
	} {
		if err := b.Add(c.e); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("Add(%.80q, link %q, mode %#o): %v, want %q", c.e.Path, c.e.Link, c.e.Mode, err, c.want)
		}
	}
	var got, want memory
	if _, err := b.Finish(context.Background()); err != nil {
		t.Fatal(err)
	}
	got = *b.w.(*memory)
	buildTo(t, &want, Options{}, []Entry{regular("file", time.Unix(0, 0), nil), {Path: "link", Mode: ModeSymlink, Target: ".."}})
	if !bytes.Equal(got, want) {
		t.Error("refused entries left something in the tree")
	}
}

func TestNewRefuses(t *testing.T) {
	for _, o := range []Options{
		{BlockSize: -4096}, {BlockSize: 1}, {BlockSize: 256}, {BlockSize: 5000}, {BlockSize: 1 << 17}, {Label: "17 bytes are long"},
		{InlineMax: -1}, {InlineMax: 4097},
	} {
		if _, err := New(new(memory), o); err == nil {
			t.Errorf("options %+v were accepted", o)
		}
	}
}

var errTest = errors.New("injected fault")

// A source is what Open gives in the tests of what can go wrong.
type source struct {
	io.Reader
	err error
}

func (s source) Close() error { return s.err }

type failingWriter struct{ memory }

func (f *failingWriter) WriteAt(p []byte, off int64) (int, error) {
	if off >= 8192 {
		return 0, errTest
	}
	return f.memory.WriteAt(p, off)
}

// Whatever goes wrong is an error that names the file, and leaves no superblock behind.
func TestFinishFails(t *testing.T) {
	gives := func(data string, last, closing error) func() (io.ReadCloser, error) {
		return func() (io.ReadCloser, error) {
			return source{io.MultiReader(strings.NewReader(data), errReader{last}), closing}, nil
		}
	}
	for _, c := range []struct {
		name string
		open func() (io.ReadCloser, error) // of a file of 5 bytes
		want error
		text string
	}{
		{"short", gives("1234", io.EOF, nil), io.ErrUnexpectedEOF, "after 4 bytes"},
		{"empty", gives("", io.EOF, nil), io.ErrUnexpectedEOF, "after 0 bytes"},
		{"long", gives("123456", io.EOF, nil), nil, "goes on"},
		{"breaks", gives("123", errTest, nil), errTest, `"d/file"`},
		{"breaks at its end", gives("12345", errTest, nil), errTest, "at its end"},
		{"does not open", func() (io.ReadCloser, error) { return nil, errTest }, errTest, `"d/file"`},
		{"does not close", gives("12345", io.EOF, errTest), errTest, `"d/file"`},
	} {
		for _, o := range []Options{{}, {InlineMax: 5}} {
			t.Run(fmt.Sprint(c.name, o.InlineMax), func(t *testing.T) {
				m := make(memory, 4096)
				err := finish(context.Background(), t, &m, o, c.open)
				if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
					t.Errorf("error %v, want %v with %q", err, c.want, c.text)
				}
				if le.Uint32(m[ondisk.SuperOffset:]) == ondisk.Magic {
					t.Error("a build that failed left a superblock")
				}
			})
		}
	}
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	if err := finish(ended, t, new(memory), Options{}, gives("12345", io.EOF, nil)); !errors.Is(err, context.Canceled) {
		t.Errorf("ended context: %v", err)
	}
	middle, cancel := context.WithCancel(context.Background())
	cancelling := func() (io.ReadCloser, error) { cancel(); return gives("12345", io.EOF, nil)() }
	if err := finish(middle, t, new(memory), Options{}, cancelling); !errors.Is(err, context.Canceled) {
		t.Errorf("context that ends in a file: %v", err)
	}
	if err := finish(context.Background(), t, new(failingWriter), Options{}, gives("12345", io.EOF, nil)); !errors.Is(err, errTest) {
		t.Errorf("failing writer: %v", err)
	}
}

type errReader struct{ err error }

func (e errReader) Read([]byte) (int, error) { return 0, e.err }

func finish(ctx context.Context, t *testing.T, w io.WriterAt, o Options, open func() (io.ReadCloser, error)) error {
	t.Helper()
	b, err := New(w, o)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Add(Entry{Path: "d/file", Mode: ModeRegular, Mtime: time.Unix(0, 0), Size: 5, Open: open}); err != nil {
		t.Fatal(err)
	}
	_, err = b.Finish(ctx)
	if _, again := b.Finish(ctx); again == nil {
		t.Error("an image was finished twice")
	}
	if late := b.Add(Entry{Path: "late", Mode: ModeDir}); late == nil {
		t.Error("an entry was added to a finished image")
	}
	return err
}
