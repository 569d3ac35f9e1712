package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
)

// A difference is one thing in which two trees differ.
type difference struct {
	Path string `json:"path"`
	What string `json:"what"` // path, type, mode, owner, time, size, device, target, link, xattr NAME, content
	A    string `json:"a"`
	B    string `json:"b"`
}

func (d difference) String() string {
	switch {
	case d.What == "path" && d.B == "":
		return fmt.Sprintf("%s: only in A, %s", printable(d.Path), d.A)
	case d.What == "path":
		return fmt.Sprintf("%s: only in B, %s", printable(d.Path), d.B)
	}
	return fmt.Sprintf("%s: %s: %s, and %s", printable(d.Path), d.What, d.A, d.B)
}

// ignorable are the words of --ignore, and the kinds of difference that they are for.
func ignorable() map[string]string {
	return map[string]string{
		"owner": "owner", "mode": "mode", "times": "time", "xattrs": "xattr", "links": "link", "content": "content",
	}
}

// A treeDiff compares two trees.
type treeDiff struct {
	ctx     context.Context
	ignored map[string]bool         // kinds of difference
	report  func(d difference) bool // says whether more is wanted
	step    *step

	sides   [2]*mkerofs.Builder
	inodes  [2]map[string]mkerofs.Entry // by first name, once they are needed
	entries int64
	bytes   int64 // compared
	buffers [2][]byte
}

// treeOrder is a path as Entries has them in order: what is in a directory comes before what its name is the beginning of.
func treeOrder(path string) string {
	if path == "." {
		return ""
	}
	return "\x00" + strings.ReplaceAll(path, "/", "\x00")
}

// run reports every difference. The trees are in the order of Builder.Entries.
func (d *treeDiff) run() error {
	d.buffers = [2][]byte{make([]byte, bufferBytes), make([]byte, bufferBytes)}
	nextA, stopA := iter.Pull(d.sides[0].Entries())
	defer stopA()
	nextB, stopB := iter.Pull(d.sides[1].Entries())
	defer stopB()
	a, inA := nextA()
	b, inB := nextB()
	for inA || inB {
		if err := d.ctx.Err(); err != nil {
			return err
		}
		d.entries++
		order := strings.Compare(treeOrder(a.Path), treeOrder(b.Path))
		var more bool
		var err error
		switch {
		case !inB || inA && order < 0:
			more = d.report(difference{Path: a.Path, What: "path", A: kindOf(&a)})
			a, inA = nextA()
		case !inA || order > 0:
			more = d.report(difference{Path: b.Path, What: "path", B: kindOf(&b)})
			b, inB = nextB()
		default:
			more, err = d.pair(a, b)
			a, inA = nextA()
			b, inB = nextB()
		}
		if err != nil || !more {
			return err
		}
	}
	return nil
}

// bufferBytes is how much of two files is compared at a time.
const bufferBytes = 256 << 10

// pair compares what two trees have at a path, and says whether more is wanted.
func (d *treeDiff) pair(a, b mkerofs.Entry) (bool, error) {
	if a.Link == b.Link && a.Link != "" {
		return true, nil // compared at their first names
	}
	found := d.links(a.Link, b.Link, a.Path)
	a, b = d.inode(0, a), d.inode(1, b)
	found = append(found, d.attributes(&a, &b)...)
	for _, f := range found {
		what, _, _ := strings.Cut(f.What, " ")
		if !d.ignored[what] && !d.report(f) {
			return false, nil
		}
	}
	if kindOf(&a) != kindOf(&b) || a.Size != b.Size || a.Size == 0 || a.Open == nil || d.ignored["content"] {
		return true, nil
	}
	at, err := d.contents(&a, &b)
	if err != nil || at < 0 {
		return true, err
	}
	d.step.set(d.bytes, "")
	return d.report(difference{Path: a.Path, What: "content", A: fmt.Sprintf("another byte at %d", at), B: "that of B"}), nil
}

// links compares which file of its tree a name is another one of.
func (d *treeDiff) links(a, b, path string) []difference {
	if a == b {
		return nil
	}
	text := func(first string) string {
		if first == "" {
			return "a file of its own"
		}
		return "the same file as " + printable(first)
	}
	return []difference{{Path: path, What: "link", A: text(a), B: text(b)}}
}

// inode is the entry of what e is another name of, under the name of e.
func (d *treeDiff) inode(side int, e mkerofs.Entry) mkerofs.Entry {
	if e.Link == "" {
		return e
	}
	if d.inodes[side] == nil {
		d.inodes[side] = make(map[string]mkerofs.Entry)
		for f := range d.sides[side].Entries() {
			if f.Link == "" && f.Mode&mkerofs.ModeType != mkerofs.ModeDir {
				d.inodes[side][f.Path] = f
			}
		}
	}
	path := e.Path
	e = d.inodes[side][e.Link]
	e.Path = path
	return e
}

// attributes compares all but the data.
func (d *treeDiff) attributes(a, b *mkerofs.Entry) (list []difference) {
	if x, y := kindOf(a), kindOf(b); x != y {
		return []difference{{Path: a.Path, What: "type", A: x, B: y}} // nothing else means the same then
	}
	add := func(what, x, y string) {
		if x != y {
			list = append(list, difference{a.Path, what, x, y})
		}
	}
	mode := func(e *mkerofs.Entry) string { return fmt.Sprintf("%#o", e.Mode&^mkerofs.ModeType) }
	if a.Mode&mkerofs.ModeType != mkerofs.ModeSymlink { // whose mode means nothing
		add("mode", mode(a), mode(b))
	}
	add("owner", fmt.Sprintf("%d:%d", a.UID, a.GID), fmt.Sprintf("%d:%d", b.UID, b.GID))
	add("time", timeText(a.Mtime), timeText(b.Mtime))
	add("size", fmt.Sprint(a.Size), fmt.Sprint(b.Size))
	add("device", fmt.Sprintf("%d:%d", a.Major, a.Minor), fmt.Sprintf("%d:%d", b.Major, b.Minor))
	add("target", printable(a.Target), printable(b.Target))
	names := maps.Clone(a.Xattrs)
	if names == nil {
		names = map[string][]byte{}
	}
	maps.Copy(names, b.Xattrs)
	for _, name := range slices.Sorted(maps.Keys(names)) {
		add("xattr "+printable(name), xattrText(a, name), xattrText(b, name))
	}
	return list
}

func timeText(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.999999999Z") }

func xattrText(e *mkerofs.Entry, name string) string {
	value, ok := e.Xattrs[name]
	if !ok {
		return "none"
	}
	if len(value) > 80 {
		return fmt.Sprintf("%d bytes, %.32x…", len(value), value)
	}
	return fmt.Sprintf("%q", value)
}

// kindOf says what a file is.
func kindOf(e *mkerofs.Entry) string {
	if e.Link != "" {
		return "a hard link to " + printable(e.Link)
	}
	switch e.Mode & mkerofs.ModeType {
	case mkerofs.ModeDir:
		return "a directory"
	case mkerofs.ModeRegular:
		return "a file"
	case mkerofs.ModeSymlink:
		return "a symbolic link"
	case mkerofs.ModeChar:
		return "a character device"
	case mkerofs.ModeBlock:
		return "a block device"
	case mkerofs.ModeFifo:
		return "a fifo"
	default:
		return "a socket"
	}
}

// contents compares the data of two files of the same size: where the first difference is, or -1.
func (d *treeDiff) contents(a, b *mkerofs.Entry) (at int64, err error) {
	var readers [2]io.ReadCloser
	for i, e := range []*mkerofs.Entry{a, b} {
		r, openErr := e.Open()
		if openErr != nil {
			return 0, fmt.Errorf("%s: %w", printable(a.Path), openErr)
		}
		readers[i] = r
		defer func() { err = errors.Join(err, r.Close()) }()
	}
	for off := int64(0); off < a.Size; {
		n := min(int64(bufferBytes), a.Size-off)
		for i, r := range readers {
			if _, err := io.ReadFull(r, d.buffers[i][:n]); err != nil {
				return 0, fmt.Errorf("%s, of %s, after %d bytes: %w", printable(a.Path), "AB"[i:i+1], off, err)
			}
		}
		x, y := d.buffers[0][:n], d.buffers[1][:n]
		d.bytes += n
		d.step.set(d.bytes, "")
		if !bytes.Equal(x, y) {
			i := 0
			for x[i] == y[i] {
				i++
			}
			return off + int64(i), nil
		}
		off += n
	}
	return -1, nil
}
