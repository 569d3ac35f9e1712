package erofsfmt

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
	"github.com/erofs-oci/erofs-oci/tests/layered"
)

// union opens the layers of a stack, which has the lowest first.
func openStack(t testing.TB, images [][]byte, o Options) *Image {
	t.Helper()
	im, err := OpenLayers(context.Background(), layersOf(images), o)
	if err != nil {
		t.Fatal(err)
	}
	return im
}

func layersOf(images [][]byte) []Layer {
	var layers []Layer
	for _, im := range slices.Backward(images) {
		layers = append(layers, Layer{Image: memory(im)})
	}
	return layers
}

// A lister writes down all that an image says, a line a path.
type lister struct {
	t     testing.TB
	im    *Image
	lines []string
	dirs  []Nid
}

func listAll(t testing.TB, im *Image) *lister {
	t.Helper()
	l := &lister{t: t, im: im}
	root := l.inode(im.Root())
	l.walk(".", root, root.Nid)
	return l
}

func (l *lister) inode(nid Nid) *Inode {
	l.t.Helper()
	ino, err := l.im.Inode(context.Background(), nid)
	if err != nil {
		l.t.Fatalf("nid %#x: %v", uint64(nid), err)
	}
	if ino.Nid != nid || ino.Ino != l.im.Ino(nid) {
		l.t.Errorf("nid %#x is %#x, with number %d and %d", uint64(nid), uint64(ino.Nid), ino.Ino, l.im.Ino(nid))
	}
	return &ino
}

func (l *lister) walk(name string, ino *Inode, parent Nid) {
	l.t.Helper()
	l.lines = append(l.lines, l.facts(name, ino))
	if !ino.IsDir() {
		return
	}
	l.dirs = append(l.dirs, ino.Nid)
	if up, err := l.im.Lookup(context.Background(), ino, ".."); err != nil || up != parent {
		l.t.Errorf("%q/.. is %#x, %v; want %#x", name, uint64(up), err, uint64(parent))
	}
	for _, e := range l.entries(ino) {
		switch nid, err := l.im.Lookup(context.Background(), ino, e.Name); {
		case err != nil || nid != e.Nid:
			l.t.Fatalf("%q/%q is listed as %#x, and found as %#x, %v", name, e.Name, uint64(e.Nid), uint64(nid), err)
		case e.Name == "." || e.Name == "..":
			continue
		}
		child := l.inode(e.Nid)
		if e.Type != uint8(child.Mode>>12) {
			l.t.Errorf("%q/%q is listed as %d, mode %#o", name, e.Name, e.Type, child.Mode)
		}
		l.walk(path.Join(name, e.Name), child, ino.Nid)
	}
}

// entries are those of a directory, asked for in one call and in many.
func (l *lister) entries(dir *Inode) []Dirent {
	l.t.Helper()
	var all []Dirent
	err := l.im.ReadDir(context.Background(), dir, 0, func(e Dirent) bool {
		all = append(all, e)
		return true
	})
	if err != nil {
		l.t.Fatal(err)
	}
	pos := int64(0)
	for i := range len(all) + 1 {
		var one []Dirent
		err := l.im.ReadDir(context.Background(), dir, pos, func(e Dirent) bool {
			one = append(one, e)
			return len(one) < 2 // the second counts as not seen
		})
		if err != nil || i < len(all) && (len(one) == 0 || one[0] != all[i]) || i == len(all) && len(one) > 0 {
			l.t.Fatalf("entry %d, from %#x: %+v, %v", i, pos, one, err)
		}
		if i < len(all) {
			pos = one[0].Next
		}
	}
	return all
}

// facts leaves out the numbers of inodes and the links of directories.
func (l *lister) facts(name string, ino *Inode) string {
	l.t.Helper()
	ctx := context.Background()
	s := fmt.Sprintf("%q %#o %d:%d %d.%d", name, ino.Mode, ino.UID, ino.GID, ino.Mtime, ino.MtimeNsec)
	if !ino.IsDir() {
		s += fmt.Sprintf(" links %d size %d device %d", ino.Nlink, ino.Size, ino.Rdev)
	}
	names, err := l.im.Xattrs(ctx, ino)
	slices.Sort(names)
	for _, x := range names {
		value, err := l.im.Xattr(ctx, ino, x)
		if err != nil {
			l.t.Fatal(err)
		}
		s += fmt.Sprintf(" %s=%q", x, value)
	}
	if err != nil {
		l.t.Fatal(err)
	}
	switch ino.Mode & modeType {
	case modeLnk:
		target, err := l.im.Readlink(ctx, ino)
		s += fmt.Sprintf(" -> %q, %v", target, err)
	case modeReg:
		p := make([]byte, ino.Size)
		err := l.im.ReadFile(ctx, ino, p, 0)
		s += fmt.Sprintf(" %x, %v", sha256.Sum256(p), err)
	}
	return s
}

// sameLines fails the test unless both list the same.
func sameLines(t *testing.T, want, got []string) {
	t.Helper()
	slices.Sort(want)
	slices.Sort(got)
	for _, w := range want {
		if _, ok := slices.BinarySearch(got, w); !ok {
			t.Errorf("missing: %.200s", w)
		}
	}
	for _, g := range got {
		if _, ok := slices.BinarySearch(want, g); !ok {
			t.Errorf("not to be there: %.200s", g)
		}
	}
}

// TestUnion: the layers show what the one image shows that they were merged to.
func TestUnion(t *testing.T) {
	for name, stack := range layered.Cases() {
		for how, o := range map[string]mkerofs.Options{
			"plain": {}, "512": {BlockSize: 512}, "lz4": {Compression: mkerofs.Compression{Algorithm: mkerofs.LZ4, TailPacking: true}},
		} {
			if testing.Short() && how != "lz4" && how != "plain" {
				continue
			}
			t.Run(name+"/"+how, func(t *testing.T) {
				want := listAll(t, open(t, stack.Squashed(t, o)))
				if len(want.lines) < 2 {
					t.Fatalf("only %q", want.lines)
				}
				images := stack.Layers(t, o)
				sameLines(t, want.lines, listAll(t, openStack(t, images, Options{})).lines)
				if how == "plain" && len(stack) < 100 {
					// Without memory, and with hardly any.
					sameLines(t, want.lines, listAll(t, openStack(t, images, Options{CacheBytes: -1})).lines)
					sameLines(t, want.lines, listAll(t, openStack(t, images, Options{CacheBytes: 1 << 14})).lines)
				}
			})
		}
	}
}

func open(t testing.TB, image []byte) *Image {
	t.Helper()
	im, err := Open(context.Background(), memory(image))
	if err != nil {
		t.Fatal(err)
	}
	return im
}

// TestUnionRandom is TestUnion for layers that nobody thought of.
func TestUnionRandom(t *testing.T) {
	seeds, paths := 150, 0
	if testing.Short() {
		seeds = 30
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			stack := layered.Random(uint64(seed), 2+seed%9)
			o := mkerofs.Options{BlockSize: 512 << (seed % 4)}
			want := listAll(t, open(t, stack.Squashed(t, o)))
			sameLines(t, want.lines, listAll(t, openStack(t, stack.Layers(t, o), Options{})).lines)
			paths += len(want.lines)
		})
	}
	if paths < 8*seeds {
		t.Errorf("%d paths in %d images", paths, seeds)
	}
}

// TestUnionWithoutHistory: what a nid is does not depend on what was asked before.
func TestUnionWithoutHistory(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for seed := range 30 {
		images := layered.Random(uint64(seed), 6).Layers(t, mkerofs.Options{})
		known := listAll(t, openStack(t, images, Options{}))
		want := make(map[Nid][]Dirent)
		for _, d := range known.dirs {
			want[d] = known.entries(known.inode(d))
		}
		r.Shuffle(len(known.dirs), func(i, j int) { known.dirs[i], known.dirs[j] = known.dirs[j], known.dirs[i] })
		all := &lister{t: t, im: openStack(t, images, Options{})}
		for _, d := range known.dirs {
			alone := &lister{t: t, im: openStack(t, images, Options{CacheBytes: -1})}
			for _, l := range []*lister{all, alone} {
				if got := l.entries(l.inode(d)); !slices.Equal(got, want[d]) {
					t.Errorf("seed %d, nid %#x: %+v, want %+v", seed, uint64(d), got, want[d])
				}
			}
		}
	}
}

// TestUnionParallel: many may ask at the same time, with little to be remembered.
func TestUnionParallel(t *testing.T) {
	stack := layered.Random(77, 8)
	want := listAll(t, open(t, stack.Squashed(t, mkerofs.Options{}))).lines
	im := openStack(t, stack.Layers(t, mkerofs.Options{}), Options{CacheBytes: 1 << 15})
	for range 8 {
		t.Run("reader", func(t *testing.T) {
			t.Parallel()
			sameLines(t, slices.Clone(want), listAll(t, im).lines)
		})
	}
}

// TestUnionNids: nids of a layer and of the union are each other's inverse.
func TestUnionNids(t *testing.T) {
	u := &union{}
	for _, c := range []struct {
		layer int
		nid   Nid
		want  Nid
	}{
		{0, 0, 0}, {0, 36, 36}, {1, 0, 1 << 54}, {499, 5, 499<<54 | 5}, {2, 1<<63 | 7, 1<<63 | 2<<54 | 7}, {0, 1<<54 - 2, 1<<54 - 2},
	} {
		got := u.nid(c.layer, c.nid)
		if layer, nid := u.apart(got); got != c.want || layer != c.layer || nid != c.nid {
			t.Errorf("layer %d, nid %#x: %#x, which is layer %d, nid %#x", c.layer, uint64(c.nid), uint64(got), layer, uint64(nid))
		}
	}
	// What no image has stays in its layer.
	if layer, nid := u.apart(u.nid(3, 1<<60)); layer != 3 || nid != maxNid {
		t.Errorf("a wrong nid becomes layer %d, nid %#x", layer, uint64(nid))
	}
}

// TestUnionNumbers: no two files have one st_ino, also where layers are alike.
func TestUnionNumbers(t *testing.T) {
	stack := layered.Many(7)
	im := openStack(t, stack.Layers(t, mkerofs.Options{}), Options{})
	seen := make(map[uint64]string)
	err := fs.WalkDir(im.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		ino := info.Sys().(*Inode).Ino
		if other, ok := seen[ino]; ok {
			t.Errorf("%s and %s are both %d", other, name, ino)
		}
		seen[ino] = name
		return nil
	})
	if err != nil || len(seen) != 3+8 {
		t.Errorf("%d files, %v", len(seen), err)
	}
	if sb := im.Super(); sb.Inodes != 7*5 || im.RootLayers() != 7 || len(im.Layers()) != 7 {
		t.Errorf("%d inodes, %d layers", sb.Inodes, im.RootLayers())
	}
}

// TestUnionPositions: a position that was never given is refused.
func TestUnionPositions(t *testing.T) {
	im := openStack(t, layered.Cases()["files"].Layers(t, mkerofs.Options{}), Options{})
	root, err := im.Inode(context.Background(), im.Root())
	if err != nil {
		t.Fatal(err)
	}
	for _, pos := range []int64{-1, 4, 3 + 12*1000, 1<<54 + 4, 2<<54 | 3, 1<<54 | 1<<50, 1<<63 - 1} {
		err := im.ReadDir(context.Background(), &root, pos, func(Dirent) bool { return true })
		if err == nil || pos >= 0 && !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("position %#x: %v", pos, err)
		}
	}
}

// TestUnionRefuses what it would show wrongly.
func TestUnionRefuses(t *testing.T) {
	root := layered.Dir(".", 0o755)
	for _, c := range []struct {
		entry layered.Entry
		name  string
	}{
		{layered.File("x", "").With("trusted.overlay.metacopy", ""), "metacopy"},
		{layered.Dir("x", 0o755).With("trusted.overlay.redirect", "/y"), "redirect"},
		{layered.File("x", "").With("trusted.overlay.whiteout", ""), "whiteout"},
		{layered.Dir("x", 0o755).With("trusted.overlay.opaque", "x"), "opaque"},
	} {
		stack := layered.Stack{{root, layered.Dir("x", 0o755), layered.File("x/f", "1")}, {root, c.entry}}
		im := openStack(t, stack.Layers(t, mkerofs.Options{}), Options{})
		_, err := fs.Stat(im.FS(), "x/f")
		if _, statErr := fs.Stat(im.FS(), "x"); c.name != "opaque" {
			err = statErr
		}
		if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), c.name) || !strings.Contains(err.Error(), "layer 1: ") {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	im := openStack(t, layered.Many(2).Layers(t, mkerofs.Options{}), Options{})
	ino := find(t, im, "etc", "version")
	if _, err := im.Stored(context.Background(), ino); err == nil {
		t.Error("says how it is stored")
	}
	if err := im.Extents(context.Background(), ino, nil); err == nil {
		t.Error("says where it is stored")
	}
	if _, err := im.XattrPrefixes(context.Background()); err == nil {
		t.Error("has prefixes")
	}
}

// longer is a source that says it is larger.
type longer struct {
	memory
	size int64
}

func (s longer) Size() int64 { return s.size }

// TestOpenLayersFails: the error names the layer.
func TestOpenLayersFails(t *testing.T) {
	images := layered.Many(3).Layers(t, mkerofs.Options{})
	good := layersOf(images)
	with := func(l Layer) []Layer { return []Layer{good[0], l, good[2]} }
	for _, c := range []struct {
		name   string
		layers []Layer
		want   string
		is     error
	}{
		{"none", nil, "no layers", nil},
		{"many", make([]Layer, MaxLayers+1), "501 layers", nil},
		{"garbage", with(Layer{Image: memory(make([]byte, 8192))}), "layer 1: ", ErrNotErofs},
		{"garbage with a name", with(Layer{Image: memory(make([]byte, 8192)), Name: "layer 7"}), "layer 7: ", ErrNotErofs},
		{"large", with(Layer{Image: longer{images[1], 1 << 60}}), "too large", ErrUnsupported},
		{"devices", with(Layer{Image: memory(images[1]), Devices: []ReaderAt{memory(nil)}}), "1 extra devices given", nil},
	} {
		im, err := OpenLayers(context.Background(), c.layers, Options{})
		if err == nil || im != nil || !strings.Contains(err.Error(), c.want) || c.is != nil && !errors.Is(err, c.is) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if im, err := OpenLayers(context.Background(), good[:1], Options{}); err != nil || im.union != nil {
		t.Errorf("one layer: %v", err)
	}
}

// TestOneLayerCosts: opened as a stack of one, an image is read as often as by itself,
// and so is each of several to be opened.
func TestOneLayerCosts(t *testing.T) {
	stack := layered.Cases()["wide"]
	image := stack.Squashed(t, mkerofs.Options{})
	alone, one := &counted{memory: image}, &counted{memory: image}
	im, err := Open(context.Background(), alone)
	if err != nil {
		t.Fatal(err)
	}
	listAll(t, im)
	im, err = OpenLayers(context.Background(), []Layer{{Image: one}}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	listAll(t, im)
	if alone.reads == 0 || one.reads != alone.reads || one.bytes != alone.bytes {
		t.Errorf("%d reads in a stack of one, %d alone", one.reads, alone.reads)
	}
	layers := layersOf(stack.Layers(t, mkerofs.Options{}))
	for i := range layers {
		layers[i].Image = &counted{memory: layers[i].Image.(memory)}
	}
	if _, err := OpenLayers(context.Background(), layers, Options{}); err != nil {
		t.Fatal(err)
	}
	alone = &counted{memory: image}
	if _, err := Open(context.Background(), alone); err != nil {
		t.Fatal(err)
	}
	for i := range layers {
		if n := layers[i].Image.(*counted).reads; n != alone.reads {
			t.Errorf("layer %d was read %d times to be opened, an image %d times", i, n, alone.reads)
		}
	}
}

// spoiled is a stack whose upper layer has a directory d with the files "a" and "b",
// and whose lower one has, too; spoil gets the entries of the upper one: 12 bytes each,
// then the names.
func spoiled(t testing.TB, spoil func(dir []byte, self Nid)) *Image {
	t.Helper()
	root, d := layered.Dir(".", 0o755), layered.Dir("d", 0o755)
	stack := layered.Stack{{root, d, layered.File("d/low", "1")}, {root, d, layered.File("d/a", "1"), layered.File("d/b", "2")}}
	images := stack.Layers(t, mkerofs.Options{})
	upper := open(t, images[1])
	ino := find(t, upper, "d")
	at := upper.bodyAt(ino, 1).off
	spoil(images[1][at:at+ino.Size], ino.Nid)
	return openStack(t, images, Options{})
}

// TestUnionCorrupt: what contradicts itself is corrupt, and ends.
func TestUnionCorrupt(t *testing.T) {
	readAll := func(im *Image) error {
		dir := find(t, im, "d")
		return im.ReadDir(context.Background(), dir, 0, func(Dirent) bool { return true })
	}
	if err := readAll(spoiled(t, func([]byte, Nid) {})); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(dir []byte, self Nid){
		"a circle":         func(dir []byte, self Nid) { dir[12] = byte(self) },
		"no parent":        func(dir []byte, self Nid) { copy(dir[4*12+1:], "./") },
		"a file as parent": func(dir []byte, self Nid) { copy(dir[12:20], dir[24:32]) },
		"names descend":    func(dir []byte, self Nid) { copy(dir[4*12+3:], "ba") },
		"a name twice":     func(dir []byte, self Nid) { copy(dir[4*12+3:], "aa") },
	} {
		if err := readAll(spoiled(t, spoil)); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "layer 1: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A nid that no image has is listed, and cannot be looked at.
	im := spoiled(t, func(dir []byte, _ Nid) { dir[24+7] = 0x7f })
	if err := readAll(im); err != nil {
		t.Error(err)
	}
	if _, err := fs.Stat(im.FS(), "d/a"); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a nid past the end: %v", err)
	}
}

// FuzzUnion changes a byte here and there in layers, and walks what comes of it.
func FuzzUnion(f *testing.F) {
	images := layered.Random(5, 4).Layers(f, mkerofs.Options{BlockSize: 512})
	f.Add([]byte{0, 5, 1, 200, 7, 2})
	f.Add([]byte{3, 4, 60, 255, 1, 0, 2, 6, 0, 128, 9, 9})
	f.Fuzz(func(t *testing.T, changes []byte) {
		var layers [][]byte
		for _, im := range images {
			layers = append(layers, slices.Clone(im))
		}
		for ; len(changes) >= 4; changes = changes[4:] {
			im := layers[int(changes[0])%len(layers)]
			im[(1024+int(changes[1])<<8+int(changes[2]))%len(im)] ^= changes[3]
		}
		im, err := OpenLayers(t.Context(), layersOf(layers), Options{CacheBytes: 1 << 20})
		if err != nil {
			return
		}
		entries := 0
		walkHostile(t, im, im.Root(), 0, &entries)
	})
}

// walkHostile goes down a tree in which nothing is sure.
func walkHostile(t *testing.T, im *Image, nid Nid, depth int, entries *int) {
	ino, err := im.Inode(t.Context(), nid)
	if err != nil || !ino.IsDir() || depth > 12 || *entries > 2000 {
		return
	}
	last := ""
	_ = im.ReadDir(t.Context(), &ino, 0, func(e Dirent) bool {
		*entries++
		if e.Name != "." && e.Name != ".." {
			if e.Name <= last {
				t.Errorf("%q after %q", e.Name, last)
			}
			last = e.Name
			if _, err := im.Lookup(t.Context(), &ino, e.Name); err == fs.ErrNotExist {
				t.Logf("%q is listed and not found", e.Name)
			}
			walkHostile(t, im, e.Nid, depth+1, entries)
		}
		return *entries < 2000
	})
}

// TestRecent: what is remembered has a limit, and what is asked for stays longest.
func TestRecent(t *testing.T) {
	r := recent[int, string]{limit: 10 * (recentCost + 36)} // ten values of 36 bytes
	for i := range 1000 {
		r.put(i, "v", 36)
		if kept := len(r.new) + len(r.old); kept > 10 {
			t.Fatalf("%d values are kept", kept)
		}
		if v, ok := r.get(i); !ok || v != "v" {
			t.Fatalf("%d is forgotten at once", i)
		}
	}
	if _, ok := r.get(995); !ok {
		t.Error("the last but four is forgotten")
	}
	if _, ok := r.get(900); ok {
		t.Error("the last but a hundred is not")
	}
	r.put(1, "large", r.limit)
	if _, ok := r.get(1); ok {
		t.Error("what is larger than the limit is kept")
	}
	var none recent[int, string]
	none.put(1, "v", 0)
	if _, ok := none.get(1); ok {
		t.Error("without a limit something is kept")
	}
}
