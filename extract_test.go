package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
)

// build makes an image of entries and opens it, after edit has changed its bytes.
func build(t *testing.T, edit func(image []byte) []byte, entries ...mkerofs.Entry) *erofsfmt.Image {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := mkerofs.New(f, mkerofs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		e.Mtime = time.Unix(1, 0)
		if err := b.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := b.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	image, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if edit != nil {
		image = edit(image)
	}
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	src, err := backend.OpenFile(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { src.Close() })
	im, err := erofsfmt.Open(t.Context(), src)
	if err != nil {
		t.Fatal(err)
	}
	return im
}

func regular(path, content string) mkerofs.Entry {
	return mkerofs.Entry{Path: path, Mode: mkerofs.ModeRegular | 0o644, Size: int64(len(content)),
		Open: func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(content)), nil }}
}

// TestExtractTwoOfAName: an image in which a link and a directory have one name
// leads nobody out of the directory.
func TestExtractTwoOfAName(t *testing.T) {
	for _, overwrite := range []bool{false, true} {
		outside := t.TempDir()
		rename := func(image []byte) []byte {
			// The names of the root lie together, in order.
			if n := bytes.Count(image, []byte("name1name2")); n != 1 {
				t.Fatalf("the names are there %d times", n)
			}
			return withoutChecksum(bytes.ReplaceAll(image, []byte("name1name2"), []byte("name1name1")))
		}
		im := build(t, rename,
			mkerofs.Entry{Path: "name1", Mode: mkerofs.ModeSymlink | 0o777, Target: outside},
			regular("name2/file", "content"))
		out := filepath.Join(t.TempDir(), "out")
		err := extract(t.Context(), im, out, nil, extractOptions{overwrite: overwrite})
		if !overwrite && (err == nil || !strings.Contains(err.Error(), "there already")) {
			t.Errorf("got %v", err)
		}
		if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
			t.Errorf("overwrite %v: outside there are now %v, %v", overwrite, left, err)
		}
	}
}

// withoutChecksum clears the feature bit that says that there is one.
func withoutChecksum(image []byte) []byte {
	image[1024+8] &^= 1
	return image
}

// TestExtractLoop: a directory that is its own grandchild ends a walk.
func TestExtractLoop(t *testing.T) {
	im := build(t, nil, regular("a/b/file", "content"), regular("a/other", "more"))
	ctx := t.Context()
	a, err := findPath(ctx, im, "a", false)
	if err != nil {
		t.Fatal(err)
	}
	dirs := dirSet{}
	if err := dirs.enter("a", &a); err != nil {
		t.Error(err)
	}
	if err := dirs.enter("a/b/a", &a); !errors.Is(err, erofsfmt.ErrCorrupt) {
		t.Errorf("got %v", err)
	}
	if err := (dirSet{}).enter(strings.Repeat("d/", maxDepth+1), &a); err == nil {
		t.Error("there is no end to a path")
	}
}

func TestFindPath(t *testing.T) {
	link := func(path, target string) mkerofs.Entry {
		return mkerofs.Entry{Path: path, Mode: mkerofs.ModeSymlink | 0o777, Target: target}
	}
	im := build(t, nil, regular("a/b/file", "1"), regular("top", "22"), link("a/up", "../top"), link("a/abs", "/a/b"),
		link("loop", "loop"), link("out", "../../../top"))
	for name, size := range map[string]int64{
		"a/b/file": 1, "/a//b/./file": 1, "a/../top": 2, "../../top": 2, "a/up": 2, "a/abs/file": 1, "a/abs/../b/file": 1, "out": 2,
	} {
		if ino, err := findPath(t.Context(), im, name, true); err != nil || ino.Size != size || ino.IsDir() {
			t.Errorf("%s: %+v, %v", name, ino, err)
		}
	}
	for name, want := range map[string]string{
		"nosuch": "no such file in the image", "a/b/file/": "not a directory", "a/b/file/..": "not a directory",
		"loop": "too many levels", "a/abs/nosuch": "no such file",
	} {
		if _, err := findPath(t.Context(), im, name, true); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", name, err, want)
		}
	}
	if ino, err := findPath(t.Context(), im, "a/up", false); err != nil || fileType(&ino) != mkerofs.ModeSymlink {
		t.Errorf("a link, not followed: %+v, %v", ino, err)
	}
}

func TestOutermost(t *testing.T) {
	for _, c := range []struct{ paths, want []string }{
		{[]string{"b", "/a/", "./a/x", "a", "ab"}, []string{"a", "ab", "b"}},
		{[]string{"a", "."}, []string{"."}},
		{[]string{"../../etc"}, []string{"etc"}},
		{[]string{"a/..", "b"}, []string{"."}},
	} {
		if got := outermost(c.paths); !slices.Equal(got, c.want) {
			t.Errorf("%q: %q, want %q", c.paths, got, c.want)
		}
	}
}

func TestWriteSparsely(t *testing.T) {
	zeros := func(n int) string { return strings.Repeat("\x00", n) }
	for _, c := range []string{"", "x", zeros(1), zeros(3 * holeUnit), "x" + zeros(2*holeUnit) + "y", zeros(holeUnit) + "x" + zeros(5*holeUnit-1) + "z" + zeros(7)} {
		f, err := os.Create(filepath.Join(t.TempDir(), "file"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := errors.Join(writeSparsely(f, []byte(c), 5), f.Truncate(int64(5+len(c)))); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(f.Name()); err != nil || string(got) != zeros(5)+c {
			t.Errorf("%d bytes: %q, %v", len(c), got, err)
		}
	}
	if n := runLength([]byte(zeros(holeUnit)+"x"), true); n != holeUnit {
		t.Errorf("zeros end at %d", n)
	}
}

// TestStream: chunks come in order, each once, and an error on either side ends it.
func TestStream(t *testing.T) {
	content := make([]byte, 5*streamChunk+77)
	for i := range content {
		content[i] = byte(i / 1000)
	}
	im := build(t, nil, regular("file", string(content)), regular("empty", ""))
	for name, want := range map[string][]byte{"file": content, "empty": nil} {
		ino, err := findPath(t.Context(), im, name, true)
		if err != nil {
			t.Fatal(err)
		}
		var got []byte
		err = stream(t.Context(), im, &ino, func(p []byte, off int64) error {
			if off != int64(len(got)) {
				t.Errorf("%s: a chunk for %d at %d", name, off, len(got))
			}
			got = append(got, p...)
			return nil
		})
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	ino, err := findPath(t.Context(), im, "file", true)
	if err != nil {
		t.Fatal(err)
	}
	full := errors.New("full")
	if err := stream(t.Context(), im, &ino, func([]byte, int64) error { return full }); !errors.Is(err, full) {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	err = stream(ctx, im, &ino, func([]byte, int64) error { cancel(); return nil })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}
