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
	// MaxEntries is how many entries all layers may have together, whiteouts and the directories that are implied among
	// them; 0 is no limit. Memory grows with them.
	MaxEntries int64
	// Warn is told what of an entry has no place in EROFS and is left out.
	Warn func(path, what string)
}

// ErrTooMuch is the error of a layer that has more data than LayerOptions.MaxBytes leaves room for.
var ErrTooMuch = errors.New("all files together have more")

// ErrTooMany is the error of layers with more entries than LayerOptions.MaxEntries.
var ErrTooMany = errors.New("all layers together have more entries")

// Layers put the layers of a container image into a Builder, one over the other: tar archives
// (https://github.com/opencontainers/image-spec/blob/main/layer.md), and, with ApplyEntries, trees.
//
// An entry takes the place of what is at its path, in this layer or a lower one; directories are merged. ".wh.NAME"
// removes NAME and ".wh..wh..opq" everything in its directory, of lower layers only, wherever in the layer they stand.
// An entry whose path goes through what an earlier whiteout of its layer removes finds nothing there: no link is
// followed, and the directories on the way are new ones.
//
// Paths go through symbolic links of the image as they do in a running container, so an absolute target begins at the
// image's root, and so does an absolute target of a hard link. A path with "..", an absolute one, one that is longer than
// 4096 bytes where it leads to, and a link that leads above the root are refused. "/" is the root, as "." is.
type Layers struct {
	b       *Builder
	o       LayerOptions
	data    *spool
	bytes   int64
	entries int64 // so far
	layer   int32 // the number of the current one, from 1

	// Of the current layer:
	removed removed
	hidden  map[string]bool  // paths of whiteouts, where hard links may be others
	plinks  map[string]*node // files in a directory of aufs, which hard links are to
}

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
			return l.whiteOut()
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
	l.removed, l.hidden, l.plinks = removed{}, nil, nil
	if lower := l.below(); lower != nil && l.layer == 1 {
		root := l.missingDir(lower)
		root.children, root.layers = l.b.root.children, l.b.root.layers
		l.b.root = root
	}
	return nil
}

// more counts an entry.
func (l *Layers) more() error {
	if l.entries++; l.o.MaxEntries > 0 && l.entries > l.o.MaxEntries {
		return fmt.Errorf("%w than %d", ErrTooMany, l.o.MaxEntries)
	}
	return nil
}

// entry puts what get gives into the tree, or remembers the whiteout that it is. get is not called for what is one by
// its name.
func (l *Layers) entry(name string, form WhiteoutForm, get func() (Entry, error)) error {
	path, err := tarPath(name)
	if err == nil {
		err = l.more()
	}
	if err != nil {
		return err
	}
	if form == WhiteoutsOCI {
		if is, err := l.aufs(path, get); is || err != nil {
			return err
		}
	}
	at, base, mark, err := l.find(path, form)
	if err != nil {
		var file *notDirError
		if mark && errors.As(err, &file) {
			// Something took the place of the directory. Tools say of each file in it that it is gone, too.
			return nil
		}
		return err
	}
	if mark {
		return l.remove(at, base)
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
			if !at.gone {
				l.removed.of(at).names[base] = true
			}
			return nil
		}
	}
	n, err := l.put(at.dir, base, e)
	if err == nil && marks.opaque {
		below := l.below()
		if at.dir != nil {
			below = at.below.has(base)
		}
		l.removed.of(spot{dir: n, below: below}).opaque = true
	}
	return err
}

// find gives the directory of an entry, or none for the root, and whether the entry is a whiteout by its name.
func (l *Layers) find(path []string, form WhiteoutForm) (at spot, base string, mark bool, err error) {
	if len(path) == 0 {
		return spot{}, "", false, nil
	}
	base = path[len(path)-1]
	mark = form == WhiteoutsOCI && strings.HasPrefix(base, whiteoutPrefix)
	why := toPut
	if mark {
		why = toRemove
	}
	if at, err = l.way(path[:len(path)-1], why); err == nil {
		err = checkLength(at.length + len(base))
	}
	return at, base, mark, err
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
		l.removed.move(old, n)
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
	path, err := linkPath(target)
	if err != nil {
		return nil, fmt.Errorf("hard link: %w", err)
	}
	if len(path) == 0 {
		return nil, errors.New("hard link to the root")
	}
	if len(path) == 2 && path[0] == aufsLinks && l.plinks[path[1]] != nil {
		return l.plinks[path[1]], nil
	}
	if n, err := l.copyUp(path); n != nil || err != nil {
		return n, err
	}
	at, err := l.way(path[:len(path)-1], toLook)
	if err != nil {
		return nil, fmt.Errorf("hard link to %q: %w", target, err)
	}
	n := at.dir.has(path[len(path)-1])
	switch {
	case n == nil:
		return nil, fmt.Errorf("hard link to %q, which is not there", target)
	case n.children != nil:
		return nil, fmt.Errorf("hard link to %q, which is a directory", target)
	}
	return n, nil
}

// tarPath takes the path of an entry apart. "./a/" is "a"; the root, which some tools call "/", is empty.
func tarPath(path string) ([]string, error) {
	if err := checkLength(len(path)); err != nil {
		return nil, err
	}
	names := slices.DeleteFunc(strings.Split(path, "/"), func(s string) bool { return s == "" || s == "." })
	if len(names) == 0 {
		return nil, nil
	}
	if strings.HasPrefix(path, "/") {
		return nil, fmt.Errorf("path %.300q: is absolute; make the archive with names relative to the root, as tar -C does", path)
	}
	return splitPath(strings.Join(names, "/"))
}

// linkPath is tarPath for the target of a hard link. An absolute one begins at the image's root.
func linkPath(target string) ([]string, error) { return tarPath(strings.TrimLeft(target, "/")) }
