package mkerofs

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
)

// LayerOptions say how layers are put into an image. The zero value works.
type LayerOptions struct {
	// Overlay keeps whiteouts in the form that overlayfs has: character devices 0:0, and directories with
	// trusted.overlay.opaque. That is for an image of one layer, to be mounted over others.
	Overlay bool
	// Lower, with Overlay, has the layers that the image is to be mounted over. What an archive does not say, because
	// it speaks of a change to those, is taken from there: directories on the way to an entry, symbolic links among
	// them, and what a hard link is another name of. It must not change before Finish.
	Lower *Builder
	// MaxBytes is how much data files may have in all layers together; 0 is no limit. Not more is spooled.
	MaxBytes int64
	// Warn is told what of an entry has no place in EROFS and is left out.
	Warn func(path, what string)
}

// ErrTooMuch is the error of a layer that has more data than LayerOptions.MaxBytes leaves room for.
var ErrTooMuch = errors.New("all files together have more")

// Layers put the layers of a container image into a Builder, one over the other: tar archives
// (https://github.com/opencontainers/image-spec/blob/main/layer.md), and, with ApplyEntries, trees.
//
// An entry takes the place of what is at its path, in this layer or a lower one; directories are merged. ".wh.NAME"
// removes NAME and ".wh..wh..opq" everything in its directory, of lower layers only, wherever in the layer they stand.
//
// Paths go through symbolic links of the image as they do in a running container, so an absolute target begins at the
// image's root. A path with "..", an absolute one, and a link that leads above the root are refused.
type Layers struct {
	b     *Builder
	o     LayerOptions
	data  *spool
	bytes int64
	layer int32 // the number of the current one, from 1

	whiteouts []whiteout
	hidden    map[string]bool // paths of the current layer's whiteouts, where hard links may be others
}

// A whiteout waits for the end of its layer.
type whiteout struct {
	dir   *node
	name  string // "" for all of dir
	below *node  // what the layers below have in the place of dir, where that is known
}

const (
	whiteoutPrefix = ".wh."
	whiteoutOpaque = ".wh..wh..opq"
	whiteoutOther  = ".wh..wh." // of aufs itself, which means nothing here
)

// NewLayers prepares b for layers. What was added to b before is below them.
func NewLayers(b *Builder, o LayerOptions) (*Layers, error) {
	data, err := b.newSpool()
	if err != nil {
		return nil, err
	}
	return &Layers{b: b, o: o, data: data}, nil
}

// Close gives free what Apply spooled. Finish comes before it.
func (l *Layers) Close() error { return l.data.Close() }

// Apply puts a layer, an uncompressed tar archive, on top of the others. The data of its files goes to a temporary file
// in Options.TempDir.
func (l *Layers) Apply(ctx context.Context, r io.Reader) error {
	pos := &position{ctx: ctx, r: r}
	return l.apply(pos, pos, nil)
}

// ApplyAt is Apply for an archive that can be read again: Finish reads the data of its files from there.
func (l *Layers) ApplyAt(ctx context.Context, r io.ReaderAt, size int64) error {
	pos := &position{ctx: ctx, r: io.NewSectionReader(r, 0, size)}
	return l.apply(seekable{pos}, pos, r)
}

// A position counts what was read of an archive.
type position struct {
	ctx context.Context
	r   io.Reader
	off int64
}

func (p *position) Read(b []byte) (int, error) {
	if err := p.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := p.r.Read(b)
	p.off += int64(n)
	return n, err
}

// A seekable position lets package tar pass over data.
type seekable struct{ *position }

func (s seekable) Seek(off int64, whence int) (int64, error) {
	n, err := s.r.(io.Seeker).Seek(off, whence)
	s.off = n
	return n, err
}

func (l *Layers) apply(r io.Reader, pos *position, at io.ReaderAt) error {
	if err := l.begin(); err != nil {
		return err
	}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return l.end()
		}
		if err != nil {
			return fmt.Errorf("at byte %d: %w", pos.off, err)
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		get := func() (Entry, error) { return l.fromTar(h, &tarData{r: tr, pos: pos, at: at}) }
		if err := l.entry(h.Name, WhiteoutsOCI, get); err != nil {
			return fmt.Errorf("%.300q: %w", h.Name, err)
		}
	}
}

// begin begins a layer.
func (l *Layers) begin() error {
	if l.b.finished {
		return errors.New("the image is finished")
	}
	l.layer++
	l.whiteouts, l.hidden = nil, nil
	if lower := l.below(); lower != nil && l.layer == 1 {
		root := missingDir(lower)
		root.children, root.layers = l.b.root.children, l.b.root.layers
		l.b.root = root
	}
	return nil
}

// end does what the whiteouts of the layer say.
func (l *Layers) end() error {
	for _, w := range l.whiteouts {
		if err := l.whiteOut(w); err != nil {
			return err
		}
	}
	return nil
}

// entry puts what get gives into the tree, or remembers the whiteout that it is. get is not called for what is one by
// its name.
func (l *Layers) entry(name string, form WhiteoutForm, get func() (Entry, error)) error {
	path, err := tarPath(name)
	if err != nil {
		return err
	}
	var at spot // the directory of the entry; none for the root
	base := ""
	if len(path) > 0 {
		base = path[len(path)-1]
		if at, err = l.way(path[:len(path)-1], true); err != nil {
			var file *notDirError
			if form == WhiteoutsOCI && strings.HasPrefix(base, whiteoutPrefix) && errors.As(err, &file) {
				// Something took the place of the directory. Tools say of each file in it that it is gone, too.
				return nil
			}
			return err
		}
	}
	if form == WhiteoutsOCI {
		if is, err := l.namedWhiteout(at, base); is || err != nil {
			return err
		}
	}
	e, err := get()
	if err != nil {
		return err
	}
	var marks overlayMarks
	if form == WhiteoutsOverlay {
		if marks, err = takeOverlayMarks(&e); err != nil {
			return err
		}
		if l.whiteoutLink(&e, path, marks.whiteout) {
			l.whiteouts = append(l.whiteouts, whiteout{at.dir, base, at.below})
			return nil
		}
	}
	n, err := l.put(at.dir, base, e)
	if err == nil && marks.opaque {
		below := l.below()
		if at.dir != nil {
			below = at.below.has(base)
		}
		l.whiteouts = append(l.whiteouts, whiteout{n, "", below})
	}
	return err
}

// namedWhiteout remembers the whiteout that a name is.
func (l *Layers) namedWhiteout(at spot, name string) (is bool, err error) {
	switch hidden, ok := strings.CutPrefix(name, whiteoutPrefix); {
	case name == whiteoutOpaque:
		l.whiteouts = append(l.whiteouts, whiteout{at.dir, "", at.below})
		return true, nil
	case strings.HasPrefix(name, whiteoutOther):
		return true, nil
	case ok && (hidden == "" || hidden == "." || hidden == ".."):
		return true, fmt.Errorf("whiteout of %q, which is no name", hidden)
	case ok:
		l.whiteouts = append(l.whiteouts, whiteout{at.dir, hidden, at.below})
		return true, nil
	}
	return false, nil
}

// put makes e what dir has by that name; without a dir, the root.
func (l *Layers) put(dir *node, name string, e Entry) (*node, error) {
	if dir == nil && (e.Link != "" || e.Mode&ModeType != ModeDir) {
		return nil, errors.New("the root must be a directory")
	}
	if e.Link != "" {
		n, err := l.linked(e.Link)
		if err == nil {
			l.place(dir, name, n)
		}
		return n, err
	}
	e.Xattrs = l.storable(e.Path, e.Xattrs)
	n, err := l.b.newNode(e)
	if err != nil {
		return nil, err
	}
	old := l.b.root
	if dir != nil {
		old = dir.children[name]
	}
	if old != nil && old.children != nil && n.children != nil {
		n.children, n.layers = old.children, old.layers
		// Whiteouts in the directory are those of the one that takes its place.
		for i := range l.whiteouts {
			if l.whiteouts[i].dir == old {
				l.whiteouts[i].dir = n
			}
		}
	}
	if dir == nil {
		l.b.root = n
		return n, nil
	}
	l.place(dir, name, n)
	return n, nil
}

// storable leaves out, with a warning, the attributes that EROFS has no place for.
func (l *Layers) storable(path string, attrs map[string][]byte) map[string][]byte {
	var kept map[string][]byte
	for _, name := range slices.Sorted(maps.Keys(attrs)) {
		if _, _, err := splitXattrName(name); err != nil {
			if l.o.Warn != nil {
				l.o.Warn(path, err.Error())
			}
			continue
		}
		if kept == nil {
			kept = make(map[string][]byte)
		}
		kept[name] = attrs[name]
	}
	return kept
}

// place puts n into dir, as of this layer.
func (l *Layers) place(dir *node, name string, n *node) {
	if dir.layers == nil {
		dir.layers = make(map[string]int32)
	}
	dir.children[name] = n
	dir.layers[name] = l.layer
}

// linked is what a hard link is another name of.
func (l *Layers) linked(target string) (*node, error) {
	path, err := tarPath(target)
	if err != nil {
		return nil, fmt.Errorf("hard link: %w", err)
	}
	if len(path) == 0 {
		return nil, errors.New("hard link to the root")
	}
	if n, err := l.copyUp(path); n != nil || err != nil {
		return n, err
	}
	dir, err := l.enter(path[:len(path)-1], false)
	if err != nil {
		return nil, fmt.Errorf("hard link to %q: %w", target, err)
	}
	n := dir.children[path[len(path)-1]]
	switch {
	case n == nil:
		return nil, fmt.Errorf("hard link to %q, which is not there", target)
	case n.children != nil:
		return nil, fmt.Errorf("hard link to %q, which is a directory", target)
	}
	return n, nil
}

// tarPath takes the path of an entry apart. "./a/" is "a"; the root is empty.
func tarPath(path string) ([]string, error) {
	if strings.HasPrefix(path, "/") {
		return nil, fmt.Errorf("path %.300q: is absolute", path)
	}
	names := slices.DeleteFunc(strings.Split(path, "/"), func(s string) bool { return s == "" || s == "." })
	if len(names) == 0 {
		return nil, nil
	}
	return splitPath(strings.Join(names, "/"))
}

// A notDirError is that of a path which leads through something that is no directory.
type notDirError struct{ name string }

func (e *notDirError) Error() string { return fmt.Sprintf("%q on the way is not a directory", e.name) }

// maxLinks is how many symbolic links a path may go through, as in Linux.
const maxLinks = 40

// enter goes down a path of directories, from the root, through symbolic links. What is missing is made, if it may be.
func (l *Layers) enter(path []string, create bool) (*node, error) {
	at, err := l.way(path, create)
	if err == nil && at.dir == nil {
		err = fmt.Errorf("%q is not there", strings.Join(path, "/"))
	}
	return at.dir, err
}

// way is enter for what is also of the layers below.
func (l *Layers) way(path []string, create bool) (spot, error) {
	trail := []spot{{l.b.root, l.below()}}
	for links := 0; len(path) > 0; {
		name := path[0]
		path = path[1:]
		switch name {
		case "", ".":
			continue
		case "..": // of a link's target
			if len(trail) == 1 {
				return spot{}, errors.New("a symbolic link on the way leads above the root")
			}
			trail = trail[:len(trail)-1]
			continue
		}
		here := trail[len(trail)-1]
		next := spot{here.dir.has(name), here.below.has(name)}
		link := next.link()
		switch {
		case link != nil:
			if links++; links > maxLinks {
				return spot{}, fmt.Errorf("more than %d symbolic links on the way", maxLinks)
			}
			if strings.HasPrefix(link.Target, "/") {
				trail = trail[:1]
			}
			path = append(strings.Split(link.Target, "/"), path...)
			continue
		case next.dir == nil && !create && next.below.isDir():
		case next.dir == nil && next.below != nil && !next.below.isDir():
			return spot{}, &notDirError{name}
		case next.dir == nil && !create:
			return spot{}, fmt.Errorf("%q is not there", name)
		case next.dir == nil:
			if _, err := splitPath(name); err != nil { // of a link's target
				return spot{}, err
			}
			next.dir = missingDir(next.below)
			l.place(here.dir, name, next.dir)
		case next.dir.children == nil:
			return spot{}, &notDirError{name}
		}
		trail = append(trail, next)
	}
	return trail[len(trail)-1], nil
}

// hides says that the layers below have something that w takes away. overlayfs lists a mark that hides nothing.
func (w *whiteout) hides() bool {
	if w.name == "" {
		return w.below.isDir()
	}
	return w.below.has(w.name) != nil
}

// whiteOut does what a whiteout says, when all else of its layer is there.
func (l *Layers) whiteOut(w whiteout) error {
	if l.o.Overlay {
		if l.below() != nil && !w.hides() {
			return nil
		}
		return l.keepWhiteout(w)
	}
	if w.name == "" {
		l.prune(w.dir)
		return nil
	}
	l.pruneName(w.dir, w.name)
	return nil
}

// prune removes from a directory what is of lower layers. What this layer put deeper below keeps its directories.
func (l *Layers) prune(dir *node) {
	for _, name := range slices.Sorted(maps.Keys(dir.children)) {
		l.pruneName(dir, name)
	}
}

func (l *Layers) pruneName(dir *node, name string) {
	n := dir.children[name]
	if n == nil {
		return
	}
	if n.children != nil {
		l.prune(n)
	}
	if dir.layers[name] != l.layer && len(n.children) == 0 {
		delete(dir.children, name)
	}
}
