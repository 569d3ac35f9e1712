// Package layered makes images of several EROFS layers, as a container image that was
// converted layer by layer has them, and the one image that shows the same: what a
// union of the layers has to look like.
//
// Both are made of the same tar archives by mkerofs, which merges by the rules of OCI;
// the layers are in the form of overlayfs and know nothing of each other.
package layered

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
)

// A Stack is the layers of one image, the lowest first, each a list of entries of a
// tar archive.
type Stack [][]Entry

// An Entry is a tar header and the data of a file.
type Entry struct {
	tar.Header
	Data string
}

// when makes times that tell entries from each other.
func when(seconds int64) time.Time { return time.Unix(1_600_000_000+seconds, 0) }

// Dir is a directory.
func Dir(name string, mode int64) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode, ModTime: when(mode)}}
}

// File is a regular file.
func File(name, data string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(data)), ModTime: when(int64(len(data)))}, Data: data}
}

// Symlink is a symbolic link.
func Symlink(name, target string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777, ModTime: when(1)}}
}

// Hardlink is another name of what the same layer has at target.
func Hardlink(name, target string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target}}
}

// Char is a character device.
func Char(name string, major, minor int64) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeChar, Name: name, Mode: 0o600, Devmajor: major, Devminor: minor, ModTime: when(2)}}
}

// Removed removes a path of lower layers.
func Removed(name string) Entry {
	return File(path.Join(path.Dir(name), ".wh."+path.Base(name)), "")
}

// Emptied removes all that lower layers have in a directory.
func Emptied(dir string) Entry { return File(path.Join(dir, ".wh..wh..opq"), "") }

// With is an entry with an extended attribute.
func (e Entry) With(name, value string) Entry {
	e.PAXRecords = map[string]string{"SCHILY.xattr." + name: value}
	e.Format = tar.FormatPAX
	return e
}

// Owned is an entry of somebody.
func (e Entry) Owned(uid, gid int) Entry {
	e.Uid, e.Gid = uid, gid
	return e
}

func archive(t testing.TB, entries []Entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := range entries {
		h := entries[i].Header
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, entries[i].Data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// Layers builds an image of each layer.
func (s Stack) Layers(t testing.TB, o mkerofs.Options) [][]byte {
	t.Helper()
	var images [][]byte
	for _, entries := range s {
		images = append(images, build(t, Stack{entries}, o, mkerofs.LayerOptions{Overlay: true}))
	}
	return images
}

// Squashed builds one image of all layers.
func (s Stack) Squashed(t testing.TB, o mkerofs.Options) []byte {
	t.Helper()
	return build(t, s, o, mkerofs.LayerOptions{})
}

func build(t testing.TB, s Stack, o mkerofs.Options, how mkerofs.LayerOptions) []byte {
	t.Helper()
	var out memory
	b, err := mkerofs.New(&out, o)
	if err != nil {
		t.Fatal(err)
	}
	layers, err := mkerofs.NewLayers(b, how)
	if err != nil {
		t.Fatal(err)
	}
	for _, entries := range s {
		if err == nil {
			err = layers.Apply(t.Context(), bytes.NewReader(archive(t, entries)))
		}
	}
	if err == nil {
		_, err = b.Finish(t.Context())
	}
	if err := errors.Join(err, layers.Close()); err != nil {
		t.Fatal(err)
	}
	return out
}

type memory []byte

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	if need := off + int64(len(p)); need > int64(len(*m)) {
		*m = append(*m, make([]byte, need-int64(len(*m)))...)
	}
	return copy((*m)[off:], p), nil
}

// Push pushes images as the layers of one, the lowest first.
func Push(t testing.TB, base, name string, images [][]byte) {
	t.Helper()
	var layers []ocipush.Layer
	for _, im := range images {
		layers = append(layers, ocipush.Bytes(registry.MediaTypeErofs, im))
	}
	if _, err := ocipush.Push(t.Context(), base, name, layers, ocipush.Options{}); err != nil {
		t.Fatal(err)
	}
}

// Many is a stack of n layers: each has a file of its own, and all have one path.
func Many(n int) Stack {
	var s Stack
	for i := range n {
		s = append(s, []Entry{
			Dir(".", 0o755), Dir("etc", 0o755), File("etc/version", fmt.Sprint(i)),
			Dir("all", 0o755), File(fmt.Sprintf("all/of-%03d", i), strings.Repeat("x", i)),
		})
	}
	return s
}
