package registry_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/registry"
)

// An entry is a member of a tar archive: a file, or a link where to is set.
type entry struct {
	name string
	data []byte
	to   string
	kind byte // 0: a file or a symbolic link
}

func tarOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Size: int64(len(e.data)), Mode: 0o644, Linkname: e.to, Typeflag: e.kind}
		if e.kind == 0 && e.to != "" {
			h.Typeflag = tar.TypeSymlink
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(e.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gzipped(t testing.TB, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func writeArchive(t *testing.T, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image.tar")
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func openArchive(t *testing.T, path, name string) *registry.Archive {
	t.Helper()
	a, err := registry.OpenArchive(path, name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	return a
}

// config is a configuration with these layers.
func config(layers ...[]byte) []byte {
	var ids []string
	for _, l := range layers {
		ids = append(ids, fmt.Sprintf("%q", sum(l)))
	}
	return fmt.Appendf(nil, `{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[%s]}}`, strings.Join(ids, ","))
}

// What docker save wrote in its years: layers in directories, links between them,
// several images.
func TestArchiveDocker(t *testing.T) {
	one, two := tarOf(t, entry{name: "etc/one", data: noise(70_000)}), tarOf(t, entry{name: "etc/two", data: []byte("2")})
	packed := gzipped(t, two)
	conf := config(one, two, one)
	path := writeArchive(t, tarOf(t,
		entry{name: "aa/", kind: tar.TypeDir},
		entry{name: "aa/layer.tar", data: one},
		entry{name: "./bb/layer.tar", data: packed},
		entry{name: "cc/layer.tar", to: "../aa/layer.tar"},
		entry{name: "dd/layer.tar", to: "cc/layer.tar", kind: tar.TypeLink},
		entry{name: sum(conf).Encoded() + ".json", data: conf},
		entry{name: "manifest.json", data: fmt.Appendf(nil, `[
			{"Config":"%s.json","RepoTags":["example/app:v1","registry.example:5000/app:v1"],"Layers":["aa/layer.tar","bb/layer.tar","dd/layer.tar"]},
			{"Config":"gone.json","RepoTags":["other:latest"],"Layers":[]}]`, sum(conf).Encoded())},
	))
	want := fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v2+json",`+
		`"config":{"mediaType":"application/vnd.docker.container.image.v1+json","digest":"%s","size":%d},"layers":[`+
		`{"mediaType":"application/vnd.docker.image.rootfs.diff.tar","digest":"%s","size":%d},`+
		`{"mediaType":"application/vnd.docker.image.rootfs.diff.tar.gzip","digest":"%s","size":%d},`+
		`{"mediaType":"application/vnd.docker.image.rootfs.diff.tar","digest":"%s","size":%d}]}`,
		sum(conf), len(conf), sum(one), len(one), sum(packed), len(packed), sum(one), len(one))
	for _, name := range []string{"example/app:v1", "docker.io/example/app:v1", "registry.example:5000/app:v1"} {
		a := openArchive(t, path, name)
		im, err := registry.ResolveIn(t.Context(), a, "", registry.Selector{Platform: "linux/amd64", Prefer: registry.PreferTar})
		if err != nil {
			t.Fatal(err)
		}
		if string(im.Manifest.Raw) != want || im.Digest != sum([]byte(want)) || im.MediaType != dockerManifest || im.Index != nil {
			t.Errorf("%s: manifest\n%s, want\n%s", name, im.Manifest.Raw, want)
		}
		for i, layer := range [][]byte{one, packed, one} {
			if !bytes.Equal(readAll(t, a, im.Layers[i].Descriptor), layer) {
				t.Errorf("%s: layer %d has other bytes", name, i)
			}
		}
		if doc, err := a.Manifest(t.Context(), im.Digest.String()); err != nil || string(doc.Raw) != want {
			t.Errorf("%s: by digest: %s, %v", name, doc.Raw, err)
		}
	}
	for name, want := range map[string]string{
		"":        "it holds 2 images; name one of example/app:v1, registry.example:5000/app:v1, other:latest",
		"app:v1":  `no image "app:v1", only example/app:v1, `,
		"other":   "config: gone.json: file does not exist",
		"x:../..": `no image "x:../.."`,
	} {
		a := openArchive(t, path, name)
		if _, err := a.Manifest(t.Context(), ""); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%q: %v, want %q", name, err, want)
		}
	}
	a := openArchive(t, path, "example/app:v1")
	if _, err := a.Manifest(t.Context(), sum(nil).String()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("another digest: %v", err)
	}
	if _, err := a.Blob(t.Context(), describe(nil)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("another blob: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := a.Manifest(ctx, ""); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// A tar file of a layout, as docker save writes it today: with manifest.json, too.
func TestArchiveLayout(t *testing.T) {
	dir := t.TempDir()
	l := createLayout(t, dir, "")
	layer := noise(100_000)
	image := putImage(t, l, "", layer)
	index := putIndex(t, l, "v1", image)
	raw, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil {
		t.Fatal(err)
	}
	named := strings.Replace(string(raw), `"org.opencontainers.image.ref.name":"v1"`, `"io.containerd.image.name":"docker.io/library/app:v1","org.opencontainers.image.ref.name":"v1"`, 1)
	if err := os.WriteFile(filepath.Join(dir, "index.json"), []byte(named), 0o644); err != nil {
		t.Fatal(err)
	}
	var files []entry
	err = fs.WalkDir(os.DirFS(dir), ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(filepath.Join(dir, path))
		files = append(files, entry{name: path, data: data})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	files = append(files, entry{name: "manifest.json", data: []byte(`[{"Config":"gone","Layers":[]}]`)})
	path := writeArchive(t, tarOf(t, files...))
	for _, name := range []string{"", "v1", "app:v1", "docker.io/library/app:v1"} {
		a := openArchive(t, path, name)
		im, err := registry.ResolveIn(t.Context(), a, "", registry.Selector{Platform: "linux/amd64"})
		if err != nil || im.IndexDigest != index.Digest || im.Digest != image.Digest || !bytes.Equal(readAll(t, a, im.Layers[0].Descriptor), layer) {
			t.Errorf("%q: %+v, %v", name, im, err)
		}
	}
	if _, err := openArchive(t, path, "v2").Manifest(t.Context(), ""); err == nil || !strings.Contains(err.Error(), `no image "v2", only docker.io/library/app:v1`) {
		t.Errorf("v2: %v", err)
	}
}

func TestArchiveRefuses(t *testing.T) {
	layer := tarOf(t, entry{name: "x", data: []byte("x")})
	conf := config(layer)
	save := func(manifest string, more ...entry) []byte {
		return tarOf(t, append(more, entry{name: "c.json", data: conf}, entry{name: "l.tar", data: layer},
			entry{name: "manifest.json", data: []byte(manifest)})...)
	}
	good := `[{"Config":"c.json","Layers":["l.tar"]}]`
	if _, err := openArchive(t, writeArchive(t, save(good)), "").Manifest(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	hex := strings.Repeat("a", 64)
	whole := save(good)
	for name, tc := range map[string]struct {
		archive []byte
		want    string
	}{
		"gzip":               {gzipped(t, whole), "is compressed with gzip and cannot be read in place; unpack it first: gunzip < FILE > FILE.tar"},
		"zstd":               {[]byte("\x28\xb5\x2f\xfd........"), "unzstd"},
		"xz":                 {[]byte("\xfd7zXZ\x00........"), "unxz"},
		"bzip2":              {[]byte("BZh91AY&SY....."), "bunzip2"},
		"empty":              {nil, "neither index.json nor manifest.json"},
		"no tar":             {bytes.Repeat([]byte("x"), 1024), "member 0: archive/tar: invalid tar header"},
		"cut after a member": {whole[:len(whole)-2048], "neither index.json nor manifest.json"},
		"cut in a member":    {whole[:len(whole)-1024-500], "member 2: 40 bytes at 4096, the archive ends at 4108"},
		"no image":           {save(`[]`), "it holds no image"},
		"null":               {save(`[null]`), "config: : file does not exist"},
		"no list":            {save(`{}`), "manifest.json: json: cannot unmarshal"},
		"no such layer":      {save(`[{"Config":"c.json","Layers":["m.tar"]}]`), "layer 0: m.tar: file does not exist"},
		"other layers":       {save(`[{"Config":"c.json","Layers":["l.tar","l.tar"]}]`), "manifest.json lists 2 layers, the configuration 1"},
		"other bytes":        {save(`[{"Config":"c.json","Layers":["c.json"]}]`), "layer 0: c.json has sha256:"},
		"another config":     {save(`[{"Config":"`+hex+`.json","Layers":["l.tar"]}]`, entry{name: hex + ".json", data: conf}), "config " + hex + ".json has sha256:"},
		"no config":          {save(`[{"Config":"l.tar","Layers":["l.tar"]}]`), "config l.tar: invalid character"},
		"outside":            {save(`[{"Config":"../../etc/passwd","Layers":["l.tar"]}]`, entry{name: "../../etc/passwd", data: conf}), "etc/passwd: file does not exist"},
		"a link outside":     {save(`[{"Config":"p","Layers":["l.tar"]}]`, entry{name: "p", to: "../../etc/passwd"}), "config: p: file does not exist"},
		"a link to itself":   {save(`[{"Config":"a","Layers":["l.tar"]}]`, entry{name: "a", to: "b"}, entry{name: "b", to: "a"}), "too many links"},
		"a directory":        {save(`[{"Config":"d","Layers":["l.tar"]}]`, entry{name: "d/", kind: tar.TypeDir}), "config: d: file does not exist"},
		"layout, no version": {tarOf(t, entry{name: "index.json", data: []byte("{}")}), "oci-layout: file does not exist"},
	} {
		t.Run(name, func(t *testing.T) {
			path := writeArchive(t, tc.archive)
			a, err := registry.OpenArchive(path, "")
			if err == nil {
				defer a.Close()
				_, err = a.Manifest(t.Context(), "")
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("%v, want %q", err, tc.want)
			}
		})
	}
	if _, err := registry.OpenArchive(t.TempDir(), ""); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a directory: %v", err)
	}
	if _, err := registry.OpenArchive(filepath.Join(t.TempDir(), "x"), ""); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("nothing: %v", err)
	}
}

// An absolute name is one within the archive, and the last of two of a name counts.
func TestArchiveNames(t *testing.T) {
	layer := tarOf(t)
	conf := config(layer)
	a := openArchive(t, writeArchive(t, tarOf(t,
		entry{name: "/c.json", data: []byte("{}")}, entry{name: "c.json", data: conf}, entry{name: "l", to: "/x/../m"}, entry{name: "m", data: layer},
		entry{name: "manifest.json", data: []byte(`[{"Config":"./c.json","Layers":["/l"]}]`)},
	)), "")
	doc, err := a.Manifest(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(doc.Raw, &m); err != nil || m.Config.Digest != sum(conf) || m.Layers[0].Digest != sum(layer) {
		t.Errorf("%s, %v", doc.Raw, err)
	}
}
