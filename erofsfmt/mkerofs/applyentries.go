package mkerofs

import (
	"context"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
)

// A WhiteoutForm is how a layer marks what it removes of those below.
type WhiteoutForm int

const (
	// WhiteoutsNone is an ordinary tree: nothing is a mark.
	WhiteoutsNone WhiteoutForm = iota
	// WhiteoutsOCI are the names ".wh.NAME" and ".wh..wh..opq", as in tar layers.
	WhiteoutsOCI
	// WhiteoutsOverlay are those of overlayfs's upper directories, as in EROFS layers: a character device 0:0, or an
	// empty file with trusted.overlay.whiteout (Linux 6.7), where something is removed; trusted.overlay.opaque on a
	// directory, "y" where everything below it is, "x" where it may have such empty files.
	WhiteoutsOverlay
)

// ApplyEntries puts a layer on top of the others that is no tar archive: a directory, or the tree of an EROFS layer.
// form says how it marks what it removes. A directory comes before what is in it, and a hard link after its target.
func (l *Layers) ApplyEntries(ctx context.Context, entries iter.Seq2[Entry, error], form WhiteoutForm) error {
	if err := l.begin(); err != nil {
		return err
	}
	for e, err := range entries {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		get := func() (Entry, error) { return e, l.count(&e) }
		if err := l.entry(e.Path, form, get); err != nil {
			return fmt.Errorf("%.300q: %w", e.Path, err)
		}
	}
	return l.whiteOut()
}

// Attributes of overlayfs (fs/overlayfs/overlayfs.h, Documentation/filesystems/overlayfs.rst).
const (
	overlayPrefix   = "trusted.overlay."
	overlayOpaque   = overlayPrefix + "opaque"
	overlayWhiteout = overlayPrefix + "whiteout"
)

// overlayMarks are what an entry means to overlayfs.
type overlayMarks struct {
	whiteout bool
	opaque   bool
}

// takeOverlayMarks takes overlayfs's attributes from e. What it cannot do without reading other layers is an error.
func takeOverlayMarks(e *Entry) (marks overlayMarks, err error) {
	kind := e.Mode & ModeType
	marks.whiteout = e.Link == "" && kind == ModeChar && e.Major == 0 && e.Minor == 0
	var others map[string][]byte
	for _, name := range slices.Sorted(maps.Keys(e.Xattrs)) {
		value := e.Xattrs[name]
		feature, ok := strings.CutPrefix(name, overlayPrefix)
		switch {
		case !ok:
			if others == nil {
				others = make(map[string][]byte)
			}
			others[name] = value
		case name == overlayOpaque && kind == ModeDir && string(value) == "y":
			marks.opaque = true
		case name == overlayOpaque && kind == ModeDir && string(value) == "x":
		case name == overlayWhiteout && kind == ModeRegular && e.Size == 0:
			marks.whiteout = true
		case feature == "origin" || feature == "impure" || feature == "nlink" || feature == "uuid":
			// Notes to itself, of inode numbers and of links, that say nothing of what the tree holds.
		default:
			return marks, fmt.Errorf("attribute %s=%.40q: overlayfs's %s says that the rest is in another layer or has another meaning, which is not known here; "+
				"mount the layers with overlayfs and take the tree that it shows", name, value, feature)
		}
	}
	e.Xattrs = others
	return marks, nil
}

// whiteoutLink says that e, which is at path, is a whiteout or another name of one: overlayfs makes hard links of them.
func (l *Layers) whiteoutLink(e *Entry, path []string, whiteout bool) bool {
	if len(path) == 0 {
		return false
	}
	if e.Link != "" {
		target, err := linkPath(e.Link)
		whiteout = err == nil && l.hidden[strings.Join(target, "/")]
	}
	if whiteout {
		if l.hidden == nil {
			l.hidden = make(map[string]bool)
		}
		l.hidden[strings.Join(path, "/")] = true
	}
	return whiteout
}
