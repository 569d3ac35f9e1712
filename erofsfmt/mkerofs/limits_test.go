package mkerofs

import (
	"archive/tar"
	"bytes"
	"errors"
	"runtime"
	"strings"
	"testing"
	"time"
)

// TestLongestPath: a path may have 4096 bytes, here 2048 names, and not one more; listing such a tree takes little.
func TestLongestPath(t *testing.T) {
	longest := strings.Repeat("a/", 2047) + "bc"
	b, err := New(nil, Options{})
	if err != nil {
		t.Fatal(err)
	}
	l, err := NewLayers(b, LayerOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := l.Apply(t.Context(), bytes.NewReader(tarOf(t, longest))); err != nil {
		t.Fatal(err)
	}
	if err := b.Add(Entry{Path: longest + "d", Mode: ModeFifo}); err == nil || !strings.Contains(err.Error(), "path of 4097 bytes") {
		t.Errorf("4097 bytes: %v", err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	n, last := 0, ""
	for e := range b.Entries() {
		n++
		last = e.Path
	}
	runtime.ReadMemStats(&after)
	// Of 2047 directories two strings each, "a/a/a" and the same with a slash: 2 * 2047 * 2047 bytes.
	if took := after.TotalAlloc - before.TotalAlloc; n != 1+2048 || last != longest || took > 16<<20 {
		t.Errorf("%d entries, the last of %d bytes, with %d bytes of memory", n, len(last), took)
	}
}

// TestSourceDateEpochBelow: what is made of the layers below has no later times either.
func TestSourceDateEpochBelow(t *testing.T) {
	const epoch, later = 1000, 2000
	file := func(name string) tarEntry {
		return tarEntry{Header: tar.Header{Name: name, Mode: 0o644, ModTime: time.Unix(later, 0)}}
	}
	dir := func(name string) tarEntry {
		return tarEntry{Header: tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o700, ModTime: time.Unix(later, 0)}}
	}
	below, err := New(nil, Options{})
	if err != nil {
		t.Fatal(err)
	}
	lower, err := NewLayers(below, LayerOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer lower.Close()
	if err := lower.Apply(t.Context(), bytes.NewReader(tarWith(t, dir("./"), dir("d/"), file("d/a"), file("d/x")))); err != nil {
		t.Fatal(err)
	}
	for limit, want := range map[int64]int64{0: later, epoch: epoch} {
		o := Options{}
		if limit != 0 {
			o.SourceDateEpoch = time.Unix(limit, 0)
		}
		b, err := New(nil, o)
		if err != nil {
			t.Fatal(err)
		}
		l, err := NewLayers(b, LayerOptions{Overlay: true, Lower: below})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		link := tarEntry{Header: tar.Header{Name: "d/b", Linkname: "d/a", Typeflag: tar.TypeLink}}
		if err := l.Apply(t.Context(), bytes.NewReader(tarWith(t, link, file("d/.wh.x")))); err != nil {
			t.Fatal(err)
		}
		var got []string
		for e := range b.Entries() {
			got = append(got, e.Path)
			if e.Link == "" && e.Mtime.Unix() != want {
				t.Errorf("limit %d: %s has time %d", limit, e.Path, e.Mtime.Unix())
			}
		}
		if list := strings.Join(got, " "); list != ". d d/a d/b d/x" {
			t.Errorf("limit %d: %s", limit, list)
		}
	}
}

func TestMaxEntries(t *testing.T) {
	layers := [][]byte{tarOf(t, "a/b/c = 1"), tarOf(t, "a/b/d = 1", ".wh.x")} // a, a/b, a/b/c; a/b/d and .wh.x
	if _, err := layered(t, LayerOptions{MaxEntries: 5}, layers...); err != nil {
		t.Error(err)
	}
	for most := int64(1); most < 5; most++ {
		if _, err := layered(t, LayerOptions{MaxEntries: most}, layers...); !errors.Is(err, ErrTooMany) {
			t.Errorf("%d: %v", most, err)
		}
	}
}
