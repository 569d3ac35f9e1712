package mkerofs

import (
	"errors"
	"fmt"
	"strings"
)

// A notDirError is that of a path which leads through something that is no directory.
type notDirError struct{ name string }

func (e *notDirError) Error() string { return fmt.Sprintf("%q on the way is not a directory", e.name) }

// maxLinks is how many symbolic links a path may go through, as in Linux.
const maxLinks = 40

// A purpose is what a path is followed for.
type purpose int

const (
	// toLook finds what is there before whiteouts count, since they wait for the end of the layer. Nothing is made.
	toLook purpose = iota
	// toPut makes the directories that are missing, and does not see what the layer has removed already.
	toPut
	// toRemove is toPut, but in what the layer has removed there is nothing more to remove, nor a directory to make.
	toRemove
)

// A spot is a directory of the layer that is being made, and what the layers below have at its path.
type spot struct {
	dir, below *node
	gone       bool // the layer has removed what those below have here, by a whiteout farther up
	length     int  // of its path, with a slash behind it
}

// link is the symbolic link that the spot is, of whichever layer.
func (s spot) link() *node {
	for _, n := range []*node{s.dir, s.below} {
		if n != nil {
			if n.Mode&ModeType == ModeSymlink {
				return n
			}
			return nil
		}
	}
	return nil
}

// way goes down a path of directories, from the root, through symbolic links. With toLook, the spot has no dir where the
// layers below alone have one.
func (l *Layers) way(path []string, why purpose) (spot, error) {
	trail := []spot{{dir: l.b.root, below: l.below()}}
	throughGone := false
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
		next, err := l.step(trail[len(trail)-1], name, why)
		if err != nil {
			return spot{}, err
		}
		link := next.link()
		if link == nil {
			trail = append(trail, next)
			continue
		}
		if links++; links > maxLinks {
			return spot{}, fmt.Errorf("more than %d symbolic links on the way", maxLinks)
		}
		throughGone = throughGone || next.gone && link == next.below
		if strings.HasPrefix(link.Target, "/") {
			trail = trail[:1]
		}
		path = append(strings.Split(link.Target, "/"), path...)
	}
	at := trail[len(trail)-1]
	at.gone = at.gone || throughGone && why == toLook
	return at, nil
}

// step goes from a directory to what it has by that name: a directory, which is made if it may be, or a link.
func (l *Layers) step(here spot, name string, why purpose) (spot, error) {
	next := spot{
		dir: here.dir.has(name), below: here.below.has(name), length: here.length + len(name) + 1,
		gone: here.gone || l.removed.has(here.dir, name),
	}
	if err := checkLength(next.length); err != nil {
		return spot{}, err
	}
	var old *node // that the layer has removed
	if next.gone && why != toLook {
		next.below = nil
		if next.dir == nil || here.dir.layers[name] != l.layer {
			if why == toRemove {
				return spot{}, &notDirError{name}
			}
			old, next.dir = next.dir, nil
		}
	}
	switch {
	case next.link() != nil, next.dir.isDir():
		return next, nil
	case next.dir != nil, next.below != nil && !next.below.isDir():
		return spot{}, &notDirError{name}
	case why != toLook:
		var err error
		next.dir, err = l.makeDir(here.dir, name, next.below, old)
		return next, err
	case next.below == nil:
		return spot{}, fmt.Errorf("%q is not there", name)
	}
	return next, nil
}

// makeDir makes a directory that the layer does not speak of. In the place of one that the layer has removed, it keeps
// what is in that: the end of the layer takes away what is of lower layers, and hard links find it until then.
func (l *Layers) makeDir(parent *node, name string, below, old *node) (*node, error) {
	if err := l.more(); err != nil {
		return nil, err
	}
	if _, err := splitPath(name); err != nil { // of a link's target
		return nil, err
	}
	dir := l.missingDir(below)
	if old.isDir() {
		dir.children, dir.layers = old.children, old.layers
		l.removed.move(old, dir)
	}
	l.place(parent, name, dir)
	return dir, nil
}
