package registry_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/registry"
)

func createLayout(t *testing.T, path, name string) *registry.Layout {
	t.Helper()
	l, err := registry.CreateLayout(path, name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func openLayout(t *testing.T, path, name string) *registry.Layout {
	t.Helper()
	l, err := registry.OpenLayout(path, name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func toJSON(t *testing.T, v any) []byte {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// putImage puts an image of one layer into a sink, under target, and returns the
// descriptor of its manifest with its platform.
func putImage(t *testing.T, s registry.Sink, target string, layer []byte, features ...string) ocispec.Descriptor {
	t.Helper()
	put := func(mediaType string, data []byte) ocispec.Descriptor {
		desc := ocispec.Descriptor{MediaType: mediaType, Digest: sum(data), Size: int64(len(data))}
		if _, err := s.PutBlob(t.Context(), desc, bytes.NewReader(data), registry.PutOptions{}); err != nil {
			t.Fatal(err)
		}
		return desc
	}
	p := ocispec.Platform{OS: "linux", Architecture: "amd64", OSFeatures: features}
	config := ocispec.Image{Platform: p, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{sum(layer)}}}
	m := ocispec.Manifest{MediaType: ociManifest, Config: put(ocispec.MediaTypeImageConfig, toJSON(t, config)),
		Layers: []ocispec.Descriptor{put(ocispec.MediaTypeImageLayer, layer)}}
	m.SchemaVersion = 2
	desc, err := s.PutManifest(t.Context(), target, ociManifest, toJSON(t, m))
	if err != nil {
		t.Fatal(err)
	}
	desc.Platform = &p
	return desc
}

func putIndex(t *testing.T, s registry.Sink, target string, of ...ocispec.Descriptor) ocispec.Descriptor {
	t.Helper()
	index := ocispec.Index{MediaType: ociIndex, Manifests: of}
	index.SchemaVersion = 2
	desc, err := s.PutManifest(t.Context(), target, ociIndex, toJSON(t, index))
	if err != nil {
		t.Fatal(err)
	}
	return desc
}

func readAll(t *testing.T, s registry.Store, desc ocispec.Descriptor) []byte {
	t.Helper()
	body, err := s.Blob(t.Context(), desc)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	got, err := io.ReadAll(body)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// entries are what index.json lists: NAME=HEX, shortened.
func entries(t *testing.T, dir string) string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil {
		t.Fatal(err)
	}
	var index ocispec.Index
	if err := json.Unmarshal(raw, &index); err != nil {
		t.Fatal(err)
	}
	var list []string
	for _, e := range index.Manifests {
		list = append(list, e.Annotations[ocispec.AnnotationRefName]+"="+short(e))
	}
	return strings.Join(list, " ")
}

func short(d ocispec.Descriptor) string { return d.Digest.Encoded()[:8] }

func TestLayout(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "layout")
	l := createLayout(t, dir, "")
	tarLayer, erofs := noise(3<<20+1), noise(5000)
	tarImage := putImage(t, l, "", tarLayer)
	erofsImage := putImage(t, l, "", erofs, "erofs")
	if got, want := entries(t, dir), "="+short(tarImage)+" ="+short(erofsImage); got != want {
		t.Errorf("index.json lists %s, want %s", got, want)
	}
	index := putIndex(t, l, "v1", tarImage, erofsImage)
	if got, want := entries(t, dir), "v1="+short(index); got != want {
		t.Errorf("index.json lists %s, want %s", got, want)
	}
	for name, prefer := range map[string]registry.Prefer{"tar": registry.PreferTar, "erofs": registry.PreferErofs} {
		for _, target := range []string{"", "v1", index.Digest.String()} {
			im, err := registry.ResolveIn(t.Context(), openLayout(t, dir, ""), target, registry.Selector{Platform: "linux/amd64", Prefer: prefer})
			if err != nil {
				t.Fatalf("%s %q: %v", name, target, err)
			}
			want, layer := tarImage, tarLayer
			if prefer == registry.PreferErofs {
				want, layer = erofsImage, erofs
			}
			if im.Digest != want.Digest || im.IndexDigest != index.Digest || im.Index.Digest != index.Digest || sum(im.Index.Raw) != index.Digest ||
				im.Manifest.Digest != want.Digest || sum(im.Manifest.Raw) != want.Digest || im.Manifest.Size != want.Size || im.Manifest.MediaType != ociManifest {
				t.Errorf("%s %q: %+v", name, target, im)
			}
			if !bytes.Equal(readAll(t, l, im.Layers[0].Descriptor), layer) {
				t.Errorf("%s %q: other bytes", name, target)
			}
			config, err := registry.ImageConfigIn(t.Context(), l, im)
			if err != nil || config.Architecture != "amd64" {
				t.Errorf("%s %q: config %+v, %v", name, target, config, err)
			}
		}
	}
	// A store of somebody else's is as good.
	foreign := struct{ registry.Store }{l}
	im, err := registry.ResolveIn(t.Context(), foreign, "v1", registry.Selector{Platform: "linux/amd64"})
	if err != nil || im.Digest != erofsImage.Digest {
		t.Errorf("%+v, %v", im, err)
	}
	if c, err := registry.ImageConfigIn(t.Context(), foreign, im); err != nil || c.OS != "linux" {
		t.Errorf("%+v, %v", c, err)
	}
	// A second image, and a name that moves.
	other := putImage(t, l, "v2", noise(10))
	moved := putIndex(t, l, "v1", erofsImage)
	if got, want := entries(t, dir), "v2="+short(other)+" v1="+short(moved); got != want {
		t.Errorf("index.json lists %s, want %s", got, want)
	}
	for target, want := range map[string]string{
		"":   "it holds 2 images; name one of v2, v1",
		"v3": `no image "v3", only v2, v1`,
	} {
		if _, err := l.Manifest(t.Context(), target); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "oci:"+dir) {
			t.Errorf("%q: %v", target, err)
		}
	}
	if doc, err := openLayout(t, dir, "v2").Manifest(t.Context(), ""); err != nil || doc.Digest != other.Digest {
		t.Errorf("v2: %+v, %v", doc, err)
	}
	missing := ocispec.Descriptor{Digest: sum([]byte("missing")), Size: 7}
	if _, err := l.Blob(t.Context(), missing); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing blob: %v", err)
	}
	if _, err := registry.ResolveIn(t.Context(), l, "v2", registry.Selector{Platform: "linux/s390x"}); err == nil || !strings.Contains(err.Error(), "the image is for linux/amd64") {
		t.Errorf("another platform: %v", err)
	}
	noLitter(t, dir)
}

// noLitter finds files that somebody should have renamed or removed.
func noLitter(t *testing.T, dir string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if strings.HasPrefix(d.Name(), ".tmp") {
			t.Errorf("%s is left behind", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func TestLayoutPutBlob(t *testing.T) {
	dir := t.TempDir()
	l := createLayout(t, dir, "")
	data := noise(2<<20 + 5)
	desc := describe(data)
	file := filepath.Join(dir, "blobs", "sha256", desc.Digest.Encoded())
	put := func(content []byte) (registry.PutResult, int64, error) {
		var last int64
		r, err := l.PutBlob(t.Context(), desc, bytes.NewReader(content), registry.PutOptions{Progress: func(n int64) { last = n }})
		return r, last, err
	}
	for name, content := range map[string][]byte{"other bytes": noise(2<<20 + 6)[1:], "too short": data[1:]} {
		if _, _, err := put(content); err == nil {
			t.Errorf("%s: no error", name)
		}
		if _, err := os.Lstat(file); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: the blob is there: %v", name, err)
		}
	}
	if r, last, err := put(data); err != nil || r != (registry.PutResult{Sent: desc.Size}) || last != desc.Size {
		t.Errorf("%+v, %d, %v", r, last, err)
	}
	if r, last, err := put(nil); err != nil || r != (registry.PutResult{Existed: true}) || last != 0 {
		t.Errorf("again: %+v, %d, %v", r, last, err)
	}
	// A blob that was cut short is written anew.
	if err := os.Truncate(file, 100); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Blob(t.Context(), desc); err == nil || !strings.Contains(err.Error(), "100 bytes, its descriptor says 2097157") {
		t.Errorf("cut short: %v", err)
	}
	if r, _, err := put(data); err != nil || r.Sent != desc.Size || !bytes.Equal(readAll(t, l, desc), data) {
		t.Errorf("mended: %+v, %v", r, err)
	}
	// Another algorithm has another directory; no bytes at all are a blob, too.
	long := ocispec.Descriptor{Digest: digest.SHA512.FromBytes(nil)}
	if _, err := l.PutBlob(t.Context(), long, bytes.NewReader(nil), registry.PutOptions{}); err != nil || len(readAll(t, l, long)) != 0 {
		t.Errorf("sha512: %v", err)
	}
	for _, bad := range []ocispec.Descriptor{{Digest: "sha256:../../x"}, {Digest: "md5:d41d8cd98f00b204e9800998ecf8427e"}, {Digest: desc.Digest, Size: -1}} {
		if _, err := l.PutBlob(t.Context(), bad, bytes.NewReader(nil), registry.PutOptions{}); err == nil {
			t.Errorf("%+v: no error", bad)
		}
		if _, err := l.Blob(t.Context(), bad); err == nil {
			t.Errorf("%+v: no error", bad)
		}
	}
	noLitter(t, dir)
}

// What else an index.json holds stays there.
func TestLayoutKeeps(t *testing.T) {
	dir := t.TempDir()
	l := createLayout(t, dir, "")
	foreign := fmt.Sprintf(`{"mediaType":"a/b","digest":"%s","size":3,"urls":["https://x"],"novel":{"z":1,"a":[null]}}`, sum([]byte("foreign")))
	if err := os.WriteFile(filepath.Join(dir, "index.json"), []byte(`{"schemaVersion":2,"manifests":[`+foreign+`],"annotations":{"k":"v"},"novel":7}`), 0o644); err != nil {
		t.Fatal(err)
	}
	desc := putImage(t, l, "v1", noise(10))
	raw, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf(`{"annotations":{"k":"v"},"manifests":[%s,{"mediaType":%q,"digest":%q,"size":%d,"annotations":{"org.opencontainers.image.ref.name":"v1"}}],"novel":7,"schemaVersion":2}`,
		foreign, ociManifest, desc.Digest, desc.Size)
	if string(raw) != want {
		t.Errorf("index.json is\n%s, want\n%s", raw, want)
	}
}

func TestLayoutRefuses(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "outside")
	secret := []byte("not for this layout")
	if err := os.WriteFile(outside, secret, 0o600); err != nil {
		t.Fatal(err)
	}
	desc := describe(secret)
	blob := filepath.Join("blobs", "sha256", desc.Digest.Encoded())
	write := func(name, text string) func(string) error {
		return func(dir string) error { return os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644) }
	}
	for name, tc := range map[string]struct {
		spoil func(dir string) error
		want  string
	}{
		"a link that leads out":    {func(dir string) error { return os.Symlink(outside, filepath.Join(dir, blob)) }, "path escapes"},
		"a pipe":                   {func(dir string) error { return syscall.Mkfifo(filepath.Join(dir, blob), 0o600) }, "not a regular file"},
		"a directory":              {func(dir string) error { return os.Mkdir(filepath.Join(dir, blob), 0o700) }, "not a regular file"},
		"another version":          {write("oci-layout", `{"imageLayoutVersion":"2.0.0"}`), `image layout version "2.0.0"`},
		"no version":               {func(dir string) error { return os.Remove(filepath.Join(dir, "oci-layout")) }, "not an OCI image layout"},
		"an index that is none":    {write("index.json", "[]"), "index.json: json: cannot unmarshal"},
		"an index that is null":    {write("index.json", "null"), "it holds no image"},
		"an entry that leads out":  {write("index.json", `{"manifests":[{"digest":"sha256:../../../etc/passwd"}]}`), "entry 0: digest"},
		"other bytes":              {write(blob, strings.Repeat("x", len(secret))), "bytes received have"},
		"an index that is too big": {write("index.json", strings.Repeat(" ", 4<<20+1)), "4194305 bytes, more than 4194304"},
		"no index":                 {func(dir string) error { return os.Remove(filepath.Join(dir, "index.json")) }, "index.json"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			createLayout(t, dir, "")
			entry := fmt.Sprintf(`{"manifests":[{"mediaType":%q,"digest":%q,"size":%d}]}`, ociManifest, desc.Digest, desc.Size)
			if err := write("index.json", entry)(dir); err != nil {
				t.Fatal(err)
			}
			if err := tc.spoil(dir); err != nil {
				t.Fatal(err)
			}
			l, err := registry.OpenLayout(dir, "")
			if err == nil {
				defer l.Close()
				_, err = l.Manifest(t.Context(), "")
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), dir) {
				t.Errorf("%v, want %q", err, tc.want)
			}
		})
	}
	dir := t.TempDir()
	if err := write("precious", "")(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := registry.CreateLayout(dir, ""); err == nil || !strings.Contains(err.Error(), "holds precious and is not an OCI image layout") {
		t.Errorf("a directory of other things: %v", err)
	}
	l := createLayout(t, t.TempDir(), "")
	for _, tc := range []struct{ target, mediaType, want string }{
		{"a\nb", ociIndex, "not one printable word"}, {"v1", "", "no media type"}, {sum(nil).String(), ociIndex, "asked for"},
	} {
		if _, err := l.PutManifest(t.Context(), tc.target, tc.mediaType, []byte(`{}`)); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%q: %v", tc.target, err)
		}
	}
}

// Many writers at once: each finds its image in the end.
func TestLayoutWriters(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "layout")
	const writers = 8
	var all sync.WaitGroup
	errs := make([]error, writers)
	for i := range writers {
		all.Go(func() {
			errs[i] = func() error {
				l, err := registry.CreateLayout(dir, "")
				if err != nil {
					return err
				}
				defer l.Close()
				raw := fmt.Appendf(nil, `{"schemaVersion":2,"manifests":[],"annotations":{"n":"%d"}}`, i)
				_, err = l.PutManifest(t.Context(), fmt.Sprintf("v%d", i), ociIndex, raw)
				return err
			}()
		})
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	for i := range writers {
		l := openLayout(t, dir, fmt.Sprintf("v%d", i))
		if doc, err := l.Manifest(t.Context(), ""); err != nil || !strings.Contains(string(doc.Raw), fmt.Sprintf(`"n":"%d"`, i)) {
			t.Errorf("v%d: %s, %v", i, doc.Raw, err)
		}
	}
	noLitter(t, dir)
}
