package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
)

const (
	maxLinks = 40   // as many symbolic links the kernel follows in a path
	maxDepth = 2048 // directories in each other: a path of more exceeds PATH_MAX
)

// An imageFile is a file of an image, and where in the image it was found.
type imageFile struct {
	path string // "." is the root
	ino  erofsfmt.Inode
}

// findPath finds a path of an image as path_resolution(7) describes, the root being
// the image's. The last symbolic link is followed if followLast is set.
func findPath(ctx context.Context, im *erofsfmt.Image, name string, followLast bool) (erofsfmt.Inode, error) {
	ino, err := im.Inode(ctx, im.Root())
	if err != nil {
		return ino, err
	}
	way := []erofsfmt.Inode{ino} // from the root to where we are
	links := 0
	for rest := strings.Split(name, "/"); len(rest) > 0; {
		part := rest[0]
		rest = rest[1:]
		here := &way[len(way)-1]
		switch {
		case !here.IsDir():
			return ino, notThere(name, syscall.ENOTDIR)
		case part == "" || part == ".":
			continue
		case part == "..":
			way = way[:max(1, len(way)-1)]
			continue
		}
		next, err := child(ctx, im, here, part)
		if err != nil {
			return ino, notThere(name, err)
		}
		if fileType(&next) != unix.S_IFLNK || len(rest) == 0 && !followLast {
			way = append(way, next)
			continue
		}
		target, err := im.Readlink(ctx, &next)
		if err != nil {
			return ino, notThere(name, err)
		}
		if links++; links > maxLinks {
			return ino, notThere(name, syscall.ELOOP)
		}
		if strings.HasPrefix(target, "/") {
			way = way[:1]
		}
		rest = append(strings.Split(target, "/"), rest...)
	}
	return way[len(way)-1], nil
}

func child(ctx context.Context, im *erofsfmt.Image, dir *erofsfmt.Inode, name string) (erofsfmt.Inode, error) {
	nid, err := im.Lookup(ctx, dir, name)
	if err != nil {
		return erofsfmt.Inode{}, err
	}
	return im.Inode(ctx, nid)
}

// notThere says which path of the image an error is about.
func notThere(name string, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = errors.New("there is no such file in the image")
	}
	return fmt.Errorf("%s: %w", printable(name), err)
}

func fileType(ino *erofsfmt.Inode) uint32 { return ino.Mode & unix.S_IFMT }

// A treeWalk visits files of an image, directories before what is in them, names
// in the order of the image.
type treeWalk struct {
	im    *erofsfmt.Image
	visit func(path string, ino *erofsfmt.Inode) error
	dirs  dirSet
}

// A dirSet knows the directories that were walked: in an image that is not corrupt
// each is found once.
type dirSet map[erofsfmt.Nid]struct{}

func (s dirSet) enter(path string, ino *erofsfmt.Inode) error {
	if _, ok := s[ino.Nid]; ok {
		return fmt.Errorf("%s: the directory with nid %d has two places: %w", printable(path), ino.Nid, erofsfmt.ErrCorrupt)
	}
	if strings.Count(path, "/") >= maxDepth {
		return fmt.Errorf("%.60s...: more than %d directories in each other", printable(path), maxDepth)
	}
	s[ino.Nid] = struct{}{}
	return nil
}

// walkPaths visits the given files, what is below them, and the directories on the
// way to them. Without paths it is the whole image. Symbolic links are not followed.
func walkPaths(ctx context.Context, im *erofsfmt.Image, paths []string, visit func(path string, ino *erofsfmt.Inode) error) error {
	w := &treeWalk{im: im, visit: visit, dirs: dirSet{}}
	if len(paths) == 0 {
		paths = []string{"."}
	}
	onTheWay := map[string]bool{}
	for _, p := range outermost(paths) {
		file, err := w.approach(ctx, p, onTheWay)
		if err != nil {
			return err
		}
		if err := w.all(ctx, file); err != nil {
			return err
		}
	}
	return nil
}

// outermost cleans paths and leaves out those that are below others.
func outermost(paths []string) []string {
	var clean []string
	for _, p := range paths {
		// Cleaned as an absolute path, ".." ends at the root.
		if p = path.Clean("/" + p)[1:]; p == "" {
			return []string{"."}
		}
		clean = append(clean, p)
	}
	slices.Sort(clean)
	clean = slices.Compact(clean)
	return slices.DeleteFunc(slices.Clone(clean), func(p string) bool {
		return slices.ContainsFunc(clean, func(q string) bool { return strings.HasPrefix(p, q+"/") })
	})
}

// approach visits the directories on the way to a file, each once.
func (w *treeWalk) approach(ctx context.Context, name string, visited map[string]bool) (imageFile, error) {
	root, err := w.im.Inode(ctx, w.im.Root())
	at := imageFile{".", root}
	if err != nil || name == "." {
		return at, err
	}
	for part := range strings.SplitSeq(name, "/") {
		if fileType(&at.ino) == unix.S_IFLNK {
			return at, fmt.Errorf("%s: %s is a symbolic link, which is not followed here", printable(name), printable(at.path))
		}
		if !at.ino.IsDir() {
			return at, notThere(name, syscall.ENOTDIR)
		}
		if !visited[at.path] {
			visited[at.path] = true
			if err := w.visit(at.path, &at.ino); err != nil {
				return at, err
			}
		}
		if at.ino, err = child(ctx, w.im, &at.ino, part); err != nil {
			return at, notThere(name, err)
		}
		at.path = path.Join(at.path, part)
	}
	return at, nil
}

func (w *treeWalk) all(ctx context.Context, file imageFile) error {
	if err := w.visit(file.path, &file.ino); err != nil || !file.ino.IsDir() {
		return err
	}
	if err := w.dirs.enter(file.path, &file.ino); err != nil {
		return err
	}
	return eachFile(ctx, w.im, file, func(f imageFile) error { return w.all(ctx, f) })
}

// eachFile calls fn with what is in a directory.
func eachFile(ctx context.Context, im *erofsfmt.Image, dir imageFile, fn func(imageFile) error) error {
	var failed error
	err := im.ReadDir(ctx, &dir.ino, 0, func(e erofsfmt.Dirent) bool {
		if e.Name == "." || e.Name == ".." {
			return true
		}
		failed = func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			// The reader has looked at it; it becomes part of a path.
			if e.Name == "" || strings.ContainsAny(e.Name, "/\x00") {
				return fmt.Errorf("%s: the name %q: %w", printable(dir.path), e.Name, erofsfmt.ErrCorrupt)
			}
			name := path.Join(dir.path, e.Name)
			ino, err := im.Inode(ctx, e.Nid)
			if err != nil {
				return fmt.Errorf("%s: %w", printable(name), err)
			}
			return fn(imageFile{name, ino})
		}()
		return failed == nil
	})
	if failed != nil || err == nil {
		return failed
	}
	return fmt.Errorf("%s: %w", printable(dir.path), err)
}

// name is the last element of the path.
func (f imageFile) name() string { return path.Base(f.path) }
