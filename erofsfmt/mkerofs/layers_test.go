package mkerofs

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
)

// tarOf makes an archive of lines:
//
//	path/           a directory
//	path/ 0700      one with this mode
//	path = text     a file
//	path -> target  a symbolic link
//	path => target  a hard link
//	path            an empty file
func tarOf(t testing.TB, lines ...string) []byte {
	var headers []tarEntry
	for _, line := range lines {
		h := tar.Header{Name: line, Mode: 0o644, Typeflag: tar.TypeReg}
		data := ""
		if name, target, ok := strings.Cut(line, " -> "); ok {
			h.Name, h.Linkname, h.Typeflag = name, target, tar.TypeSymlink
		} else if name, target, ok := strings.Cut(line, " => "); ok {
			h.Name, h.Linkname, h.Typeflag = name, target, tar.TypeLink
		} else if name, text, ok := strings.Cut(line, " = "); ok {
			h.Name, data = name, text
		} else if name, mode, ok := strings.Cut(line, "/ "); ok {
			h.Name, h.Typeflag = name+"/", tar.TypeDir
			if _, err := fmt.Sscanf(mode, "%o", &h.Mode); err != nil {
				t.Fatal(err)
			}
		} else if strings.HasSuffix(line, "/") {
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		}
		headers = append(headers, tarEntry{h, data})
	}
	return tarWith(t, headers...)
}

type tarEntry struct {
	tar.Header
	data string
}

func tarWith(t testing.TB, entries ...tarEntry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		e.Size = int64(len(e.data))
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// layered builds an image of layers and gives what it holds. Odd layers are read as streams.
func layered(t testing.TB, o LayerOptions, layers ...[]byte) ([]corpus.Entry, error) {
	t.Helper()
	var m memory
	b, err := New(&m, Options{InlineMax: 4096, TempDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	l, err := NewLayers(b, o)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}()
	for i, layer := range layers {
		if i%2 == 1 {
			err = l.Apply(t.Context(), io.MultiReader(bytes.NewReader(layer)))
		} else {
			err = l.ApplyAt(t.Context(), bytes.NewReader(layer), int64(len(layer)))
		}
		if err != nil {
			return nil, err
		}
	}
	if _, err := b.Finish(context.Background()); err != nil {
		return nil, fmt.Errorf("finish: %w", err)
	}
	image, err := erofsfmt.Open(t.Context(), sourcetest.Memory(m))
	if err != nil {
		t.Fatal(err)
	}
	r := reading{t: t, image: image, keepData: true}
	r.visit(".", image.Root())
	return r.entries, nil
}

// lines is the contents of an image in the words of tarOf, without a root that has no attributes.
func lines(entries []corpus.Entry) string {
	var list []string
	for _, e := range entries {
		switch {
		case e.Path == "." && len(e.Xattrs) == 0:
		case e.Mode&ModeType == ModeDir:
			list = append(list, e.Path+"/")
			if mode := e.Mode &^ ModeType; mode != 0o755 {
				list[len(list)-1] += fmt.Sprintf(" %#o", mode)
			}
		case e.Mode&ModeType == ModeSymlink:
			list = append(list, e.Path+" -> "+e.Target)
		case e.Mode&ModeType == ModeChar:
			list = append(list, fmt.Sprintf("%s c%d:%d", e.Path, e.Rdev[0], e.Rdev[1]))
		default:
			line := e.Path
			if e.SHA256 != "" {
				line += " = " + e.SHA256
			}
			if e.Nlink > 1 {
				line += fmt.Sprintf(" x%d", e.Nlink)
			}
			list = append(list, line)
		}
		for name, value := range e.Xattrs {
			list[len(list)-1] += fmt.Sprintf(" %s=%s", name, value)
		}
	}
	return strings.Join(list, ", ")
}

func TestLayers(t *testing.T) {
	type layers [][]string
	for _, c := range []struct {
		name   string
		layers layers
		want   string
	}{
		{"replace", layers{{"a = 1", "b = 1"}, {"a = 2"}}, "a = 2, b = 1"},
		{"last wins", layers{{"a = 1", "a = 2", "d/", "d/x = 1", "d/", "d/x = 2"}}, "a = 2, d/, d/x = 2"},
		{"dots and slashes", layers{{"./", "./a/", "./a//./b = 1"}}, "a/, a/b = 1"},
		{"implied directories", layers{{"a/b/c = 1"}}, "a/, a/b/, a/b/c = 1"},
		{"directories merge", layers{{"d/", "d/a = 1"}, {"d/", "d/b = 2"}}, "d/, d/a = 1, d/b = 2"},
		{"file for directory", layers{{"d/", "d/a = 1"}, {"d = 2"}}, "d = 2"},
		{"directory for file", layers{{"d = 1"}, {"d/", "d/a = 2"}}, "d/, d/a = 2"},
		{"whiteout", layers{{"a = 1", "d/", "d/b = 1"}, {".wh.a", "d/.wh.b"}}, "d/"},
		{"whiteout of a directory", layers{{"d/", "d/a = 1", "d/e/f = 1"}, {".wh.d"}}, ""},
		{"whiteout of nothing", layers{{"a = 1"}, {".wh.b", "x/.wh.y"}}, "a = 1, x/"},
		{"whiteout hides lower layers only", layers{{"a = 1"}, {"a = 2", ".wh.a"}}, "a = 2"},
		{"whiteout before", layers{{"a = 1"}, {".wh.a", "a = 2"}}, "a = 2"},
		{"removed, made again", layers{{"d/", "d/a = 1"}, {".wh.d", "d/", "d/b = 2"}}, "d/, d/b = 2"},
		{"made again, removed", layers{{"d/", "d/a = 1"}, {"d/", "d/b = 2", ".wh.d"}}, "d/, d/b = 2"},
		{"two layers later", layers{{"a = 1"}, {".wh.a"}, {"a = 3"}}, "a = 3"},
		{"opaque", layers{{"d/", "d/a = 1", "d/e/f = 1"}, {"d/", "d/.wh..wh..opq", "d/b = 2"}}, "d/, d/b = 2"},
		{"opaque, last", layers{{"d/a = 1"}, {"d/b = 2", "d/.wh..wh..opq"}}, "d/, d/b = 2"},
		{"opaque, then the directory", layers{{"d/a = 1"}, {"d/.wh..wh..opq", "d/b = 2", "d/"}}, "d/, d/b = 2"},
		{"opaque root", layers{{"a = 1"}, {".wh..wh..opq", "b = 2"}}, "b = 2"},
		{"opaque root, then the root", layers{{"a = 1"}, {".wh..wh..opq", "./", "b = 2"}}, "b = 2"},
		{"opaque root, then the root, alone", layers{{".wh..wh..opq", "./", "b = 2"}}, "b = 2"},
		{"opaque keeps what is new below", layers{{"d/e/a = 1"}, {"d/e/b = 2", "d/.wh..wh..opq"}}, "d/, d/e/, d/e/b = 2"},
		{"whiteout where a file is", layers{{"d/", "d/a = 1"}, {"d = 2", "d/.wh.a", "d/.wh..wh..opq"}}, "d = 2"},
		{"whiteout where a file was", layers{{"d = 1"}, {"d/.wh.a"}}, "d = 1"},
		{"aufs", layers{{"a = 1"}, {".wh..wh.plnk/", ".wh..wh.aufs"}}, "a = 1"},
		{"aufs's own", layers{{"a = 1"}, {".wh..wh.plnk/", ".wh..wh.plnk/1.2 = 3", "b => .wh..wh.plnk/1.2", "c => /.wh..wh.plnk/1.2",
			".wh..wh.orph/", ".wh..wh.orph/d/e = 1", ".wh..wh.orph/f -> g", ".wh..wh.plnk/sub/x = 1"}}, "a = 1, b = 3 x2, c = 3 x2"},
		{"the root in other words", layers{{"/ 0700", "//", "/./", "a = 1"}, {"/.//"}}, "a = 1"},
		{"removed link, then through it", layers{{"etc/x = 1", "d -> etc"}, {".wh.d", "d/f = 2"}}, "d/, d/f = 2, etc/, etc/x = 1"},
		{"through a link, then removed", layers{{"etc/", "d -> etc"}, {"d/f = 2", ".wh.d"}}, "etc/, etc/f = 2"},
		{"removed file, then below it", layers{{"d = 1"}, {".wh.d", "d/f = 2"}}, "d/, d/f = 2"},
		{"removed directory is another", layers{{"d/ 0700", "d/a = 1", "d/e -> /d", "d/g = 1"}, {".wh.d", "d/e/f = 2", "d/g/h = 2"}}, "d/, d/e/, d/e/f = 2, d/g/, d/g/h = 2"},
		{"removed in the middle", layers{{"d/ 0700", "d/a = 1"}, {"d/f = 2", ".wh.d", "d/g = 2"}}, "d/, d/f = 2, d/g = 2"},
		{"opaque, then through what is in it", layers{{"d/ 0700", "d/e -> ../x", "d/g/ 0700", "x/"}, {"d/.wh..wh..opq", "d/e/f = 2", "d/g/h = 2"}},
			"d/ 0700, d/e/, d/e/f = 2, d/g/, d/g/h = 2, x/"},
		{"removed, then through a new link", layers{{"d -> a"}, {".wh.d", "b/", "d -> b", "d/f = 2"}}, "b/, b/f = 2, d -> b"},
		{"a link to what is removed", layers{{"usr/lib/ 0700", "usr/lib/a = 1", "lib -> usr/lib"}, {".wh.usr", "lib/x = 2"}}, "lib -> usr/lib, usr/, usr/lib/, usr/lib/x = 2"},
		{"whiteouts in what is removed", layers{{"d/a = 1", "d/e/b = 1"}, {".wh.d", "d/.wh.a", "d/e/.wh.b", "d/.wh..wh..opq"}}, ""},
		{"whiteouts through a removed link", layers{{"etc/x = 1", "d -> etc"}, {".wh.d", "d/.wh.x", "d/.wh..wh..opq"}}, "etc/, etc/x = 1"},
		{"whiteouts in what is made again", layers{{"d/a = 1"}, {".wh.d", "d/f = 2", "d/.wh.f", "d/.wh.a"}}, "d/, d/f = 2"},
		{"hard link to what is removed", layers{{"d/a = 1"}, {".wh.d", "d/b = 2", "c => d/a"}}, "c = 1, d/, d/b = 2"},
		{"nested opaque", layers{{"d/e/f/a = 1", "d/e/b = 1", "d/c = 1"}, {"d/e/f/.wh..wh..opq", "d/e/.wh..wh..opq", "d/.wh..wh..opq", ".wh.d"}}, ""},
		{"absolute hard links", layers{{"d/a = 1", "e -> d", "b => /d/a"}, {"c => //e//a"}}, "b = 1 x3, c = 1 x3, d/, d/a = 1 x3, e -> d"},
		{"hard link", layers{{"a = 1", "b => a", "d/c => ./a"}}, "a = 1 x3, b = 1 x3, d/, d/c = 1 x3"},
		{"hard link to a lower layer", layers{{"a = 1"}, {"b => a"}}, "a = 1 x2, b = 1 x2"},
		{"hard link outlives its target", layers{{"a = 1"}, {"b => a", ".wh.a"}}, "b = 1"},
		{"hard link keeps what is replaced", layers{{"a = 1", "b => a"}, {"a = 2"}}, "a = 2, b = 1"},
		{"hard link of a symbolic link", layers{{"s -> x", "t => s"}}, "s -> x, t -> x"},
		{"through a link", layers{{"usr/lib/", "lib -> usr/lib"}, {"lib/x = 1"}}, "lib -> usr/lib, usr/, usr/lib/, usr/lib/x = 1"},
		{"through an absolute link", layers{{"run/", "var/run -> /run"}, {"var/run/x = 1"}}, "run/, run/x = 1, var/, var/run -> /run"},
		{"through links up and down", layers{{"a/b/", "a/c -> ../a/./b"}, {"a/c/x = 1"}}, "a/, a/b/, a/b/x = 1, a/c -> ../a/./b"},
		{"a link instead of a directory", layers{{"d/", "d/a = 1", "e/"}, {"d -> e"}, {"d/b = 3"}}, "d -> e, e/, e/b = 3"},
		{"whiteout through a link", layers{{"d/a = 1", "e -> d"}, {"e/.wh.a"}}, "d/, e -> d"},
	} {
		var archives [][]byte
		for _, layer := range c.layers {
			archives = append(archives, tarOf(t, layer...))
		}
		got, err := layered(t, LayerOptions{}, archives...)
		if err != nil || lines(got) != c.want {
			t.Errorf("%s: %s, %v\nwant %s", c.name, lines(got), err, c.want)
		}
	}
}

func TestOverlayLayer(t *testing.T) {
	got, err := layered(t, LayerOptions{Overlay: true}, tarOf(t,
		".wh.gone", "d/", "d/.wh.a", "opaque/.wh..wh..opq", "opaque/x = 1", ".wh.again", "again/", ".wh.file", "file = 1", "dup/.wh..wh..opq", ".wh.dup"))
	const want = "again/ trusted.overlay.opaque=y, d/, d/a c0:0, dup/ trusted.overlay.opaque=y, file = 1, gone c0:0, " +
		"opaque/ trusted.overlay.opaque=y, opaque/x = 1"
	if err != nil || lines(got) != want {
		t.Errorf("%s, %v\nwant %s", lines(got), err, want)
	}
}

// TestLowerLayers: what an archive does not say is taken from the layers below.
func TestLowerLayers(t *testing.T) {
	for _, c := range []struct {
		name         string
		lower, layer []string
		want         string
	}{
		{"a directory on the way", []string{"d/ 0700", "d/a = 1"}, []string{"d/b = 2"}, "d/ 0700, d/b = 2"},
		{"a whiteout's directory", []string{"d/ 0700", "d/a = 1"}, []string{"d/.wh.a"}, "d/ 0700, d/a c0:0"},
		{"through a link below", []string{"usr/lib/ 0711", "lib -> usr/lib"}, []string{"lib/x = 1"}, "usr/, usr/lib/ 0711, usr/lib/x = 1"},
		{"through an absolute link below", []string{"run/ 0711", "var/run -> /run"}, []string{"var/run/x = 1"}, "run/ 0711, run/x = 1, var/"},
		{"a link that is replaced", []string{"usr/lib/", "lib -> usr/lib"}, []string{"lib/", "lib/x = 1"}, "lib/, lib/x = 1"},
		{"a hard link to a file below", []string{"d/ 0700", "d/a = 1"}, []string{"b => d/a"}, "b = 1 x2, d/ 0700, d/a = 1 x2"},
		{"a hard link through a link below", []string{"d/a = 1", "e -> d"}, []string{"b => e/a"}, "b = 1 x2, d/, d/a = 1 x2"},
		{"a hard link to a file of both", []string{"a = 1"}, []string{"a = 2", "b => a"}, "a = 2 x2, b = 2 x2"},
		{"whiteouts of nothing", []string{"d/"}, []string{".wh.x", "d/.wh.y", "e/.wh..wh..opq", "e/.wh.z"}, "d/, e/"},
		{"an opaque directory", []string{"d/ 0700", "d/a = 1"}, []string{"d/.wh..wh..opq", "d/b = 2"}, "d/ 0700 trusted.overlay.opaque=y, d/b = 2"},
		{"an opaque root", []string{"a = 1"}, []string{".wh..wh..opq", "b = 2"}, "./ trusted.overlay.opaque=y, b = 2"},
		{"a whiteout where a file is below", []string{"d = 1"}, []string{"d/.wh.a"}, ""},
		{"a removed link below", []string{"etc/x = 1", "d -> etc"}, []string{".wh.d", "d/f = 2"}, "d/ trusted.overlay.opaque=y, d/f = 2"},
		{"a removed file below", []string{"d = 1"}, []string{".wh.d", "d/f = 2"}, "d/ trusted.overlay.opaque=y, d/f = 2"},
		{"a removed directory below", []string{"d/ 0700", "d/e/ 0700", "d/g -> /x", "x/"}, []string{".wh.d", "d/e/f = 2", "d/g/h = 2"},
			"d/ trusted.overlay.opaque=y, d/e/, d/e/f = 2, d/g/, d/g/h = 2"},
		{"through an opaque directory", []string{"d/ 0700", "d/g -> /x", "x/"}, []string{"d/.wh..wh..opq", "d/g/h = 2"},
			"d/ 0700 trusted.overlay.opaque=y, d/g/, d/g/h = 2"},
		{"whiteouts in what is removed", []string{"d/a = 1"}, []string{".wh.d", "d/.wh.a", "d/.wh..wh..opq"}, "d c0:0"},
		{"a hard link to what is removed", []string{"d/ 0700", "d/a = 1"}, []string{".wh.d", "b => d/a"}, "b = 1, d c0:0"},
		{"a hard link through a removed link", []string{"etc/a = 1", "d -> etc"}, []string{".wh.d", "b => d/a"}, "b = 1, d c0:0"},
		{"a hard link to a removed file", []string{"a = 1"}, []string{".wh.a", "b => /a"}, "a c0:0, b = 1"},
	} {
		var m memory
		lower, err := New(&m, Options{TempDir: t.TempDir()})
		if err != nil {
			t.Fatal(err)
		}
		below, err := NewLayers(lower, LayerOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := below.Apply(t.Context(), bytes.NewReader(tarOf(t, c.lower...))); err != nil {
			t.Fatal(err)
		}
		got, err := layered(t, LayerOptions{Overlay: true, Lower: lower}, tarOf(t, c.layer...))
		if err != nil || lines(got) != c.want {
			t.Errorf("%s: %s, %v\nwant %s", c.name, lines(got), err, c.want)
		}
		if err := below.Close(); err != nil {
			t.Error(err)
		}
	}
	for _, layer := range []string{"f/x = 1", "b => gone", "b => d", "b => f/x", "up/x = 1"} {
		lower, err := New(nil, Options{})
		if err != nil {
			t.Fatal(err)
		}
		below, err := NewLayers(lower, LayerOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := below.Apply(t.Context(), bytes.NewReader(tarOf(t, "f = 1", "d/", "up -> ../x"))); err != nil {
			t.Fatal(err)
		}
		if got, err := layered(t, LayerOptions{Overlay: true, Lower: lower}, tarOf(t, layer)); err == nil {
			t.Errorf("%s was taken: %s", layer, lines(got))
		}
		below.Close()
	}
}

func TestLayersRefuse(t *testing.T) {
	cut := tarOf(t, "a = text")[:514]
	for _, c := range []struct {
		name string
		tar  []byte
		want string
	}{
		{"parent", tarOf(t, "../a = 1"), ".. parts"},
		{"parent inside", tarOf(t, "d/", "d/../a = 1"), ".. parts"},
		{"absolute", tarOf(t, "/etc/passwd = 1"), "is absolute; make the archive with"},
		{"link to parent", tarOf(t, "a => ../b"), ".. parts"},
		{"absolute hard link to nothing", tarOf(t, "a => /b"), "not there"},
		{"absolute hard link to parent", tarOf(t, "a => /../b"), ".. parts"},
		{"absolute hard link to the root", tarOf(t, "a => /"), "the root"},
		{"above the root", tarOf(t, "d -> ../..", "d/x = 1"), "above the root"},
		{"above the root later", tarOf(t, "a/b/", "a/l -> b/../../../etc", "a/l/x = 1"), "above the root"},
		{"loop", tarOf(t, "a -> b", "b -> a", "a/x = 1"), "more than 40 symbolic links"},
		{"loop of itself", tarOf(t, "a -> a/a", "a/x = 1"), "more than 40 symbolic links"},
		{"below a file", tarOf(t, "a = 1", "a/b = 1"), "not a directory"},
		{"hard link to nothing", tarOf(t, "a => b"), "not there"},
		{"hard link below nothing", tarOf(t, "a => b/c"), "not there"},
		{"hard link to a directory", tarOf(t, "d/", "a => d"), "is a directory"},
		{"hard link to the root", tarOf(t, "a => ./"), "the root"},
		{"root as a file", tarOf(t, ". = 1"), "root must be"},
		{"hard link to what aufs does not have", tarOf(t, "a => .wh..wh.plnk/1.2"), "not there"},
		{"long path", tarOf(t, strings.Repeat("a/", 500_000)+"f = 1"), "path of 1000001 bytes"},
		{"long path through a link", tarOf(t, strings.Repeat("a/", 1500), "l -> "+strings.Repeat("a/", 1500), "l/"+strings.Repeat("a/", 1500)+"f = 1"), "longer than 4096"},
		{"long hard link", tarOf(t, "a => "+strings.Repeat("a/", 4096)+"f"), "path of 8193 bytes"},
		{"long name", tarOf(t, strings.Repeat("n", 256)), "longer than 255"},
		{"whiteout of the parent", tarOf(t, ".wh..."), "is no name"},
		{"whiteout of nothing", tarOf(t, ".wh."), "is no name"},
		{"cut off", cut, "unexpected EOF"},
		{"too much", tarOf(t, "a = "+strings.Repeat("x", 600), "b = "+strings.Repeat("x", 401)), "more than 1000"},
		{"too much of nothing", sparseTar(1 << 60), "more than 1000"},
		{"noise", content(1, 2000), "invalid tar header"},
		{"owner", tarWith(t, tarEntry{Header: tar.Header{Name: "a", Uid: math.MaxUint32 + 1, Format: tar.FormatPAX}}), "owner"},
		{"device", tarWith(t, tarEntry{Header: tar.Header{Name: "a", Typeflag: tar.TypeChar, Devmajor: 4096}}), "device 4096:0"},
		{"acl", paxTar(t, "SCHILY.acl.access", "user:jan:rwx"), "without a number"},
		{"xattr name", paxTar(t, "LIBARCHIVE.xattr.user.%zz", "eA"), "invalid URL escape"},
		{"xattr value", paxTar(t, "LIBARCHIVE.xattr.user.a", "!"), "illegal base64"},
	} {
		for _, layers := range [][][]byte{{c.tar}, {tarOf(t), c.tar}} { // read at, and as a stream
			if got, err := layered(t, LayerOptions{MaxBytes: 1000}, layers...); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: %s, %v, want %q", c.name, lines(got), err, c.want)
			}
		}
	}
}

func paxTar(t testing.TB, records ...string) []byte {
	h := tar.Header{Name: "a", Mode: 0o644, Format: tar.FormatPAX, PAXRecords: make(map[string]string)}
	for i := 0; i < len(records); i += 2 {
		h.PAXRecords[records[i]] = records[i+1]
	}
	return tarWith(t, tarEntry{Header: h})
}

// What a header says comes through.
func TestLayerMetadata(t *testing.T) {
	at := time.Unix(-5, 123456789)
	long := strings.Repeat("directory/", 30) + strings.Repeat("n", 255)
	archive := tarWith(t,
		tarEntry{Header: tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o1755, ModTime: time.Unix(7, 0)}},
		tarEntry{Header: tar.Header{Name: "file", Mode: 0o6755, Uid: 1<<32 - 2, Gid: 1 << 31, ModTime: at, Format: tar.FormatPAX,
			PAXRecords: map[string]string{
				"SCHILY.xattr.user.raw": "a\x00b", "LIBARCHIVE.xattr.user.%25enc": "/wAB", "LIBARCHIVE.xattr.user.raw": "eA",
				"SCHILY.acl.access": "user::rw-,user:1000:r-x,user:web:rw-:33,group::r--,mask::rwx,other::---", "SCHILY.xattr.com.apple.x": "y",
			}}, data: "data"},
		tarEntry{Header: tar.Header{Name: long, Mode: 0o600, Format: tar.FormatGNU, Uid: 1 << 22}},
		tarEntry{Header: tar.Header{Name: "fifo", Typeflag: tar.TypeFifo, Mode: 0o600}},
		tarEntry{Header: tar.Header{Name: "block", Typeflag: tar.TypeBlock, Mode: 0o600, Devmajor: 259, Devminor: 70000}},
		tarEntry{Header: tar.Header{Name: "global", Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "x"}}},
	)
	var warned []string
	entries, err := layered(t, LayerOptions{Warn: func(path, what string) { warned = append(warned, path+": "+what) }}, archive)
	if err != nil {
		t.Fatal(err)
	}
	byPath := make(map[string]corpus.Entry)
	for _, e := range entries {
		byPath[e.Path] = e
	}
	if e := byPath["."]; e.Mode != ModeDir|0o1755 || e.MtimeNs != 7e9 {
		t.Errorf("root: %+v", e)
	}
	e := byPath["file"]
	if e.Mode != ModeRegular|0o6755 || e.UID != 1<<32-2 || e.GID != 1<<31 || e.MtimeNs != at.UnixNano() || e.SHA256 != "data" {
		t.Errorf("file: %+v", e)
	}
	acl := "02000000 01000600ffffffff 0200060021000000 02000500e8030000 04000400ffffffff 10000700ffffffff 20000000ffffffff"
	for name, want := range map[string]string{
		"user.raw": "610062", "user.%enc": "ff0001", "system.posix_acl_access": strings.ReplaceAll(acl, " ", ""),
	} {
		if got := hex.EncodeToString(e.Xattrs[name]); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
	if len(e.Xattrs) != 3 || len(warned) != 1 || !strings.Contains(warned[0], "com.apple.x") {
		t.Errorf("%d xattrs, warnings %q", len(e.Xattrs), warned)
	}
	if e := byPath[long]; e.Mode != ModeRegular|0o600 || e.UID != 1<<22 {
		t.Errorf("long name: %+v", e)
	}
	if e := byPath["block"]; e.Mode != ModeBlock|0o600 || *e.Rdev != [2]uint32{259, 70000} {
		t.Errorf("block device: %+v", e)
	}
	if e := byPath["fifo"]; e.Mode != ModeFifo|0o600 {
		t.Errorf("fifo: %+v", e)
	}
	if _, ok := byPath["global"]; ok || len(byPath) != 4+31 {
		t.Errorf("%d entries", len(byPath))
	}
}

func TestACLText(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"u::rwx\ng::r\no::-", "02000000 01000700ffffffff 04000400ffffffff 20000000ffffffff"},
		{"default:user::rwx,mask:r,other:x # all", "02000000 01000700ffffffff 10000400ffffffff 20000100ffffffff"},
		{"group:4294967294:w", "02000000 08000200feffffff"},
		{"user", "must be TYPE"},
		{"user::r:1:2", "must be TYPE"},
		{"owner::r", "must be of"},
		{"user::q", "permission"},
		{"mask:5:r", "names someone"},
		{"user:-1:r", "without a number"},
		{strings.Repeat("u::r,", 1025), "more than 1024"},
	} {
		got, err := encodeACL(c.text)
		if err != nil {
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("%.40q: %v, want %s", c.text, err, c.want)
			}
		} else if hex.EncodeToString(got) != strings.ReplaceAll(c.want, " ", "") {
			t.Errorf("%.40q: %x, want %s", c.text, got, c.want)
		}
	}
}

// rawHeader is a ustar header.
func rawHeader(name string, kind byte, size int) []byte {
	b := make([]byte, 512)
	copy(b, name)
	copy(b[100:], "0000644\x000000000\x000000000\x00")
	copy(b[124:], fmt.Sprintf("%011o\x00", size))
	copy(b[136:], "00000000000\x00        ")
	b[156] = kind
	copy(b[257:], "ustar\x0000")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

// sparseTar has a file of a size with "abc" at 65536 and "z" at its end, in the form of GNU tar's PAX 0.1, then another.
func sparseTar(size int64) []byte {
	var records string
	for _, r := range []string{
		fmt.Sprintf("GNU.sparse.size=%d\n", size), "GNU.sparse.numblocks=2\n", fmt.Sprintf("GNU.sparse.map=65536,3,%d,1\n", size-1),
		"GNU.sparse.name=sparse\n",
	} {
		n := len(r) + 3
		if n > 99 {
			n++
		}
		records += fmt.Sprintf("%d %s", n, r)
	}
	pad := func(s string) []byte { return append([]byte(s), make([]byte, -len(s)&511)...) }
	return bytes.Join([][]byte{
		rawHeader("x", 'x', len(records)), pad(records), rawHeader("GNUSparseFile.0/sparse", '0', 4), pad("abcz"),
		rawHeader("after", '0', 5), pad("after"), make([]byte, 1024),
	}, nil)
}

func TestSparseEntry(t *testing.T) {
	const size = 300_000
	want := make([]byte, size)
	copy(want[65536:], "abc")
	want[size-1] = 'z'
	for _, layers := range [][][]byte{{sparseTar(size)}, {tarOf(t), sparseTar(size)}} {
		got, err := layered(t, LayerOptions{}, layers...)
		if err != nil || lines(got) != "after = after, sparse = "+string(want) {
			t.Errorf("%.100q…, %v", lines(got), err)
		}
	}
}

// Hostile archives: no panic, nothing that a reader does not understand.
func FuzzTar(f *testing.F) {
	f.Add(tarOf(f, "a/", "a/b = text", "c -> a", "c/d => a/b", "a/.wh.b", ".wh..wh..opq"), false)
	f.Add(tarOf(f, "../x = 1", "/y = 1", "l -> ../..", "l/x = 1"), true)
	f.Add(sparseTar(70_000), false)
	f.Add(paxTar(f, "SCHILY.acl.access", "user:1:rwx,mask::r", "LIBARCHIVE.xattr.user.a", "eA", "SCHILY.xattr.trusted.x", "1"), true)
	f.Fuzz(func(t *testing.T, archive []byte, overlay bool) {
		if len(archive) > 1<<17 {
			return
		}
		entries, err := layered(t, LayerOptions{Overlay: overlay, MaxBytes: 1 << 20}, tarOf(t, "lower/", "lower/file = 1", "link -> lower"), archive)
		if err != nil {
			return
		}
		for _, e := range entries {
			for part := range strings.SplitSeq(e.Path, "/") {
				if part == ".." || part == "" {
					t.Errorf("path %q", e.Path)
				}
			}
		}
	})
}
