package mkerofs

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
)

// Whatever the layers are, and in whatever form each comes: the image holds what a model of them says, which is made of
// sets of paths and knows nothing of how the builder does it:
//
//	a path of a lower layer stays, unless
//	  the layer has that path itself (two directories are one), or
//	  the layer has something else than a directory where the path leads through, or
//	  the path or a directory on the way is whited out, or one on the way is opaque.
func TestRandomLayers(t *testing.T) {
	seeds := uint64(1000)
	if testing.Short() {
		seeds = 100
	}
	marks := 0
	for seed := range seeds {
		rng := rand.New(rand.NewPCG(seed, 4))
		lower := make(view)
		var layers []*modelLayer
		for range 1 + rng.IntN(4) {
			l := randomLayer(rng, lower)
			layers = append(layers, l)
			lower = l.over(lower)
			marks += len(l.gone) + len(l.opaque)
		}
		got := applyModel(t, rng, layers)
		if want := lower.lines(); got != want {
			t.Errorf("seed %d: %s\nwant %s", seed, got, want)
			for i, l := range layers {
				t.Logf("layer %d: %q", i+1, l.archive)
			}
			return
		}
	}
	if marks < int(seeds) {
		t.Errorf("only %d whiteouts", marks)
	}
}

// A thing is what a path is: a directory, a link, or a file, which may have several paths.
type thing struct {
	kind byte // '/', '>' or '='
	text string
}

// A view is what is visible, by path.
type view map[string]*thing

// lines is a view in the words of lines.
func (v view) lines() string {
	names := make(map[*thing]int)
	for _, th := range v {
		names[th]++
	}
	var list []string
	// A directory's entries follow it if each slash counts as less than all other bytes.
	for _, p := range slices.SortedFunc(maps.Keys(v), func(a, b string) int {
		return strings.Compare(strings.ReplaceAll(a, "/", "\x00"), strings.ReplaceAll(b, "/", "\x00"))
	}) {
		switch th := v[p]; th.kind {
		case '/':
			list = append(list, p+"/")
		case '>':
			list = append(list, p+" -> "+th.text)
		default:
			line := p + " = " + th.text
			if n := names[th]; n > 1 {
				line += fmt.Sprintf(" x%d", n)
			}
			list = append(list, line)
		}
	}
	return strings.Join(list, ", ")
}

// A modelLayer is a layer as sets, and as an archive in the words of tarOf.
type modelLayer struct {
	own     view // what it has, directories that are implied included
	gone    map[string]bool
	opaque  map[string]bool
	archive []string
}

// above are the directories on the way to p, "." not among them.
func above(p string) (dirs []string) {
	for d := path.Dir(p); d != "."; d = path.Dir(d) {
		dirs = append(dirs, d)
	}
	return dirs
}

// shows says that the layer leaves p of the layers below visible.
func (l *modelLayer) shows(p string, lower view) bool {
	if own := l.own[p]; own != nil && (own.kind != '/' || lower[p].kind != '/') || l.gone[p] || l.opaque["."] {
		return false
	}
	for _, d := range above(p) {
		if own := l.own[d]; own != nil && own.kind != '/' || l.gone[d] || l.opaque[d] {
			return false
		}
	}
	return true
}

// over is what is visible of the layer and those below.
func (l *modelLayer) over(lower view) view {
	v := maps.Clone(l.own)
	for p, th := range lower {
		if l.own[p] == nil && l.shows(p, lower) {
			v[p] = th
		}
	}
	return v
}

// now is what is at p before whiteouts count.
func (l *modelLayer) now(p string, lower view) *thing {
	marked := *l
	marked.gone, marked.opaque = nil, nil
	if own := l.own[p]; own != nil {
		return own
	}
	if lower[p] != nil && marked.shows(p, lower) {
		return lower[p]
	}
	return nil
}

func randomLayer(rng *rand.Rand, lower view) *modelLayer {
	l := &modelLayer{own: make(view), gone: make(map[string]bool), opaque: make(map[string]bool)}
	for range 1 + rng.IntN(12) {
		parts := make([]string, 1+rng.IntN(3))
		for i := range parts {
			parts[i] = string("abc"[rng.IntN(3)])
		}
		p := strings.Join(parts, "/")
		switch rng.IntN(8) {
		case 0:
			l.remove(p, lower, rng.IntN(4) == 0)
		case 1:
			l.link(rng, p, lower)
		case 2:
			l.put(p, lower, &thing{'>', fmt.Sprint("nowhere", rng.IntN(10))})
		case 3, 4:
			l.put(p, lower, &thing{kind: '/'})
		default:
			l.put(p, lower, &thing{'=', fmt.Sprint("text ", rng.IntN(1000))})
		}
	}
	return l
}

// reach makes sure that the archive may have an entry at p: what it has itself on the way must be directories, and what
// is none below is replaced by one.
func (l *modelLayer) reach(p string, lower view) bool {
	dirs := above(p)
	slices.Reverse(dirs)
	for _, d := range dirs {
		switch at := l.now(d, lower); {
		case at != nil && at.kind != '/' && l.own[d] != nil:
			return false
		case at != nil && at.kind != '/' && !l.removed(d): // through what was removed before, the way is free
			l.archive = append(l.archive, d+"/")
		}
		if l.own[d] == nil {
			l.own[d] = &thing{kind: '/'}
		}
	}
	return true
}

// removed says that whiteouts so far remove p of the layers below.
func (l *modelLayer) removed(p string) bool {
	return l.gone[p] || l.opaque["."] || slices.ContainsFunc(above(p), func(d string) bool { return l.gone[d] || l.opaque[d] })
}

// put adds an entry, unless the archive has another kind of it already: what comes of that depends on who unpacks.
func (l *modelLayer) put(p string, lower view, th *thing) bool {
	if old := l.own[p]; old != nil && (old.kind == '/') != (th.kind == '/') || !l.reach(p, lower) {
		return false
	}
	switch th.kind {
	case '/':
		l.archive = append(l.archive, p+"/")
	case '>':
		l.archive = append(l.archive, p+" -> "+th.text)
	default:
		l.archive = append(l.archive, p+" = "+th.text)
	}
	l.own[p] = th
	return true
}

// link adds a hard link to a file that is there, or a file if none is.
func (l *modelLayer) link(rng *rand.Rand, p string, lower view) {
	if old := l.own[p]; old != nil && old.kind == '/' || !l.reach(p, lower) {
		return
	}
	var files []string
	for _, v := range []view{l.own, lower} {
		for q := range v {
			// What p takes the place of may be a directory that leads to others.
			if th := l.now(q, lower); th != nil && th.kind == '=' && q != p && !slices.Contains(above(q), p) {
				files = append(files, q)
			}
		}
	}
	if len(files) == 0 {
		l.put(p, lower, &thing{'=', "alone"})
		return
	}
	slices.Sort(files)
	q := files[rng.IntN(len(files))]
	l.archive = append(l.archive, p+" => "+q)
	l.own[p] = l.now(q, lower)
}

// remove adds a whiteout of p, or says that it is opaque.
func (l *modelLayer) remove(p string, lower view, opaque bool) {
	dir := path.Dir(p)
	if opaque {
		dir = p
	}
	if dir != "." && !l.put(dir, lower, &thing{kind: '/'}) {
		return
	}
	if opaque {
		l.opaque[p] = true
		l.archive = append(l.archive, p+"/.wh..wh..opq")
		return
	}
	l.gone[p] = true
	l.archive = append(l.archive, path.Join(dir, ".wh."+path.Base(p)))
}

// entries is the layer as a tree with the marks of overlayfs.
func (l *modelLayer) entries(t testing.TB) []Entry {
	var list []Entry
	for _, p := range slices.Sorted(maps.Keys(l.own)) { // a directory comes before what is in it
		th := l.own[p]
		e := treeOf(t, p+"/")[0]
		switch th.kind {
		case '>':
			e = treeOf(t, p+" -> "+th.text)[0]
		case '=':
			e = treeOf(t, p+" = "+th.text)[0]
		default:
			if l.opaque[p] || l.gone[p] {
				e.Xattrs = map[string][]byte{overlayOpaque: []byte("y")}
			}
		}
		list = append(list, e)
	}
	for _, p := range slices.Sorted(maps.Keys(l.gone)) {
		if l.own[p] == nil {
			list = append(list, Entry{Path: p, Mode: ModeChar, Mtime: time.Unix(0, 0)})
		}
	}
	return list
}

// links says that the archive has hard links, of which those to lower layers have no place in a tree.
func (l *modelLayer) links() bool {
	return slices.ContainsFunc(l.archive, func(s string) bool { return strings.Contains(s, " => ") })
}

// applyModel builds the layers, each in one of the forms that layers come in, and gives what the image holds.
func applyModel(t testing.TB, rng *rand.Rand, layers []*modelLayer) string {
	t.Helper()
	var m memory
	b, err := New(&m, Options{TempDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	all, err := NewLayers(b, LayerOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := all.Close(); err != nil {
			t.Error(err)
		}
	}()
	for i, l := range layers {
		archive := tarOf(t, l.archive...)
		switch form := rng.IntN(4); {
		case form == 0:
			err = all.Apply(t.Context(), io.MultiReader(bytes.NewReader(archive)))
		case form == 1 || l.links():
			err = all.ApplyAt(t.Context(), bytes.NewReader(archive), int64(len(archive)))
		case form == 2:
			err = all.ApplyEntries(t.Context(), seq(treeOf(t, l.archive...)), WhiteoutsOCI)
		default:
			err = all.ApplyEntries(t.Context(), seq(l.entries(t)), WhiteoutsOverlay)
		}
		if err != nil {
			t.Fatalf("layer %d, %q: %v", i+1, l.archive, err)
		}
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
	return lines(r.entries)
}
