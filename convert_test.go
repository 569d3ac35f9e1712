package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
)

// A pushed image is one in a registry of the test.
type testImage struct {
	platform ocispec.Platform
	layers   [][]byte // tar archives
	history  []ocispec.History
}

func tarOf(t *testing.T, names ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range names {
		name, data, _ := strings.Cut(name, " = ")
		h := &tar.Header{Name: name, Mode: 0o644, Size: int64(len(data))}
		if strings.HasSuffix(name, "/") {
			h.Typeflag, h.Mode = tar.TypeDir, 0o711
		}
		if err := errors.Join(w.WriteHeader(h), second(w.Write([]byte(data)))); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// pushTest puts an image into a sink.
func pushTest(t *testing.T, to registry.Sink, target string, im testImage) ocispec.Descriptor {
	t.Helper()
	put := func(mediaType string, data []byte) ocispec.Descriptor {
		d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
		if _, err := to.PutBlob(t.Context(), d, bytes.NewReader(data), registry.PutOptions{}); err != nil {
			t.Fatal(err)
		}
		return d
	}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Annotations: map[string]string{"a": "b"}}
	config := ocispec.Image{Platform: im.platform, History: im.history, Config: ocispec.ImageConfig{Env: []string{"A=b"}}, RootFS: ocispec.RootFS{Type: "layers"}}
	for _, l := range im.layers {
		d := put(ocispec.MediaTypeImageLayer, l)
		m.Layers = append(m.Layers, d)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, d.Digest)
	}
	m.Config = put(ocispec.MediaTypeImageConfig, marshal(t, config))
	desc, err := to.PutManifest(t.Context(), target, ocispec.MediaTypeImageManifest, marshal(t, m))
	if err != nil {
		t.Fatal(err)
	}
	desc.Platform = &im.platform
	return desc
}

func marshal(t *testing.T, v any) []byte {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// repository is one of a registry of the test.
func repository(t *testing.T, r *fakeregistry.Registry, name string) *registry.Repository {
	t.Helper()
	c, err := registry.New(registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	ref, err := registry.ParseReference(r.Addr() + "/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return c.Repository(ref)
}

// command runs one of the program's, and gives the exit code and what it printed.
func command(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	t.Setenv("TMPDIR", t.TempDir())
	var out, err bytes.Buffer
	code = run(append([]string{"erofs-oci"}, args...), strings.NewReader(""), &out, &err)
	return code, out.String(), err.String()
}

func readIndex(t *testing.T, s registry.Store, target string) (index ocispec.Index) {
	t.Helper()
	doc, err := s.Manifest(t.Context(), target)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(doc.Raw, &index); err != nil {
		t.Fatal(err)
	}
	return index
}

// TestConvert: an index of two platforms, an attestation, and somebody's signature become an index of four images, of
// which the tar ones are what they were.
func TestConvert(t *testing.T) {
	r, err := fakeregistry.New(fakeregistry.Options{Referrers: true, Upload: fakeregistry.Upload{Mount: true}})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	src := repository(t, r, "src:v1")
	layers := [][]byte{
		tarOf(t, "d/", "d/a = one", "d/b = two", "gone = x"),
		tarOf(t, ".wh.gone", "d/c = three", "d/.wh.b"),
	}
	history := []ocispec.History{{CreatedBy: "first"}, {CreatedBy: "empty", EmptyLayer: true}, {CreatedBy: "second"}}
	amd := pushTest(t, src, "", testImage{ocispec.Platform{OS: "linux", Architecture: "amd64"}, layers, history})
	arm := pushTest(t, src, "", testImage{ocispec.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}, layers[:1], nil})
	attested := pushTest(t, src, "", testImage{ocispec.Platform{OS: "unknown", Architecture: "unknown"}, layers[:1], nil})
	top, err := src.PutManifest(t.Context(), "v1", ocispec.MediaTypeImageIndex, marshal(t, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{amd, arm, attested}, Annotations: map[string]string{"x": "y"},
	}))
	if err != nil {
		t.Fatal(err)
	}
	signature := pushSignature(t, src, top)
	code, stdout, stderr := command(t, "convert", "--all-platforms", r.Addr()+"/src:v1", r.Addr()+"/dst:v2")
	if code != 0 {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	for _, want := range []string{signature.String() + " refers to " + top.Digest.String(), attested.Digest.String() + " is for no platform"} {
		if !strings.Contains(stderr, want) {
			t.Errorf("%q is not said: %s", want, stderr)
		}
	}
	dst := repository(t, r, "dst:v2")
	index := readIndex(t, dst, "")
	if len(index.Manifests) != 4 || index.Annotations["x"] != "y" || strings.Count(stdout, "\n") != 3 {
		t.Fatalf("%+v\n%s", index, stdout)
	}
	for i, tarImage := range []ocispec.Descriptor{amd, arm} {
		got, erofs := index.Manifests[2*i], index.Manifests[2*i+1]
		if got.Digest != tarImage.Digest || got.Platform.Architecture != tarImage.Platform.Architecture || len(got.Platform.OSFeatures) != 0 {
			t.Errorf("entry %d is %+v, not the tar image %s", 2*i, got, tarImage.Digest)
		}
		if erofs.Platform.Architecture != tarImage.Platform.Architecture || !slices.Equal(erofs.Platform.OSFeatures, []string{"erofs"}) {
			t.Errorf("entry %d is %+v", 2*i+1, erofs)
		}
		checkConverted(t, dst, erofs.Digest, 2-i)
	}
	// The tree of both, and of the squashed image, is the same.
	if code, _, stderr := command(t, "convert", "--squash", "--erofs-only", r.Addr()+"/src@"+amd.Digest.String(), "oci:"+filepath.Join(t.TempDir(), "x")); code != 0 {
		t.Error(stderr)
	}
	code, stdout, stderr = command(t, "diff", "--platform", "linux/amd64", r.Addr()+"/src:v1", r.Addr()+"/dst:v2")
	if code != 0 || !strings.Contains(stdout, "no differences in 4 paths") {
		t.Errorf("%d: %s%s", code, stdout, stderr)
	}
}

func pushSignature(t *testing.T, to registry.Sink, subject ocispec.Descriptor) digest.Digest {
	t.Helper()
	empty := []byte("{}")
	d := ocispec.Descriptor{MediaType: "application/vnd.oci.empty.v1+json", Digest: digest.FromBytes(empty), Size: 2}
	if _, err := to.PutBlob(t.Context(), d, bytes.NewReader(empty), registry.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	subject.Platform = nil
	raw := marshal(t, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: "application/x-signature",
		Config: d, Layers: []ocispec.Descriptor{d}, Subject: &subject,
	})
	desc, err := to.PutManifest(t.Context(), "", ocispec.MediaTypeImageManifest, raw)
	if err != nil {
		t.Fatal(err)
	}
	return desc.Digest
}

// checkConverted looks at the manifest and the configuration of a converted image.
func checkConverted(t *testing.T, s registry.Store, d digest.Digest, layers int) {
	t.Helper()
	im, err := registry.ResolveIn(t.Context(), s, d.String(), registry.Selector{})
	if err != nil {
		t.Fatal(err)
	}
	config, err := registry.ImageConfigIn(t.Context(), s, im)
	if err != nil {
		t.Fatal(err)
	}
	if len(im.Layers) != layers || len(config.RootFS.DiffIDs) != layers || !slices.Equal(config.Config.Env, []string{"A=b"}) ||
		!slices.Equal(config.OSFeatures, []string{"erofs"}) || im.Annotations()["a"] != "b" {
		t.Errorf("%+v\n%+v", im, config)
	}
	for i, l := range im.Layers {
		role := registry.RoleLower
		if i == layers-1 {
			role = ""
		}
		if l.MediaType != registry.MediaTypeErofs || l.Annotations[registry.AnnotationRole] != role || config.RootFS.DiffIDs[i] != l.Digest ||
			l.Annotations[registry.AnnotationVerityRoot] == "" || l.Annotations[registry.AnnotationChunkIndexDigest] == "" {
			t.Errorf("layer %d: %+v", i, l)
		}
	}
	if layers == 2 && len(config.History) != 3 {
		t.Errorf("history %+v", config.History)
	}
}

// TestConvertMountsBlobs: what the registry has in the source's repository is not sent.
func TestConvertMountsBlobs(t *testing.T) {
	r, err := fakeregistry.New(fakeregistry.Options{Upload: fakeregistry.Upload{Mount: true}})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	layer := tarOf(t, "a = "+strings.Repeat("x", 100_000))
	pushTest(t, repository(t, r, "src:v1"), "v1", testImage{ocispec.Platform{OS: "linux", Architecture: "amd64"}, [][]byte{layer}, nil})
	r.ResetStats()
	code, stdout, stderr := command(t, "convert", "--platform", "linux/amd64", r.Addr()+"/src:v1", r.Addr()+"/dst:v1")
	if code != 0 || strings.Count(stderr, "mounted from another repository") != 2 {
		t.Fatalf("%d: %s%s", code, stdout, stderr)
	}
	// The layer and the configuration, once each: what is mounted is not read.
	if got := r.Stats().BlobGETs; got != 2+1 {
		t.Errorf("%d GETs of blobs, want the configuration twice, for its platform and to change it, and the layer", got)
	}
}

// TestConvertRefuses: what cannot be converted is said in one line, and nothing gets the name.
func TestConvertRefuses(t *testing.T) {
	r, err := fakeregistry.New(fakeregistry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	platform := ocispec.Platform{OS: "linux", Architecture: "amd64"}
	src := repository(t, r, "src:v1")
	pushTest(t, src, "bad", testImage{platform, [][]byte{tarOf(t, "../x = 1")}, nil})
	pushTest(t, src, "none", testImage{platform, nil, nil})
	pushTest(t, src, "good", testImage{platform, [][]byte{tarOf(t, "x = 1")}, nil})
	if code, _, stderr := command(t, "convert", "--erofs-only", r.Addr()+"/src:good", r.Addr()+"/src:erofs"); code != 0 {
		t.Fatal(stderr)
	}
	for name, c := range map[string]struct {
		args []string
		code int
		want string
	}{
		"a path out of the tree": {[]string{r.Addr() + "/src:bad", r.Addr() + "/dst:v1"}, exitFailure, `"../x"`},
		"no layers":              {[]string{r.Addr() + "/src:none", r.Addr() + "/dst:v1"}, exitFailure, "no layers"},
		"EROFS already":          {[]string{r.Addr() + "/src:erofs", r.Addr() + "/dst:v1"}, exitFailure, "EROFS already"},
		"no index":               {[]string{"--all-platforms", r.Addr() + "/src:good", r.Addr() + "/dst:v1"}, exitFailure, "leave --all-platforms out"},
		"to a file":              {[]string{r.Addr() + "/src:good", "./x"}, exitUsage, "registry or to oci:DIR"},
		"from a directory":       {[]string{".", r.Addr() + "/dst:v1"}, exitUsage, "holds no container image"},
		"a path":                 {[]string{"./", r.Addr() + "/dst:v1"}, exitUsage, "holds no container image"},
		"a name without a file":  {[]string{"--metadata-only", r.Addr() + "/src:good", r.Addr() + "/dst:v1"}, exitUsage, "metadata-only"},
		"plain HTTP for two":     {[]string{"--plain-http", "docker.io/library/x", "registry.example/x"}, exitUsage, "are two"},
		"no TLS for two":         {[]string{"--tls-verify=false", "docker.io/library/x", r.Addr() + "/x"}, exitUsage, "are two"},
		"one password for two":   {[]string{"--username=me", "docker.io/library/x", r.Addr() + "/dst:v1"}, exitUsage, "are two"},
	} {
		code, _, stderr := command(t, append([]string{"convert"}, c.args...)...)
		last := stderr[strings.LastIndexByte(strings.TrimSuffix(stderr, "\n"), '\n')+1:]
		if code != c.code || !strings.HasPrefix(last, "erofs-oci: ") || !strings.Contains(last, c.want) {
			t.Errorf("%s: %d, %s; want %d, %s", name, code, stderr, c.code, c.want)
		}
	}
	if _, err := repository(t, r, "dst:v1").Manifest(t.Context(), "v1"); err == nil {
		t.Error("something got the name")
	}
}

// TestConvertKeepsVariants: old configurations do not know their variant, and the index does.
func TestConvertKeepsVariants(t *testing.T) {
	r, err := fakeregistry.New(fakeregistry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	src := repository(t, r, "src:v1")
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	for _, variant := range []string{"v5", "v7"} {
		d := pushTest(t, src, "", testImage{ocispec.Platform{OS: "linux", Architecture: "arm"}, [][]byte{tarOf(t, variant+" = 1")}, nil})
		d.Platform = &ocispec.Platform{OS: "linux", Architecture: "arm", Variant: variant}
		index.Manifests = append(index.Manifests, d)
	}
	if _, err := src.PutManifest(t.Context(), "v1", ocispec.MediaTypeImageIndex, marshal(t, index)); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := command(t, "convert", "--all-platforms", r.Addr()+"/src:v1", r.Addr()+"/dst:v1"); code != 0 {
		t.Fatal(stderr)
	}
	for _, variant := range []string{"v5", "v7"} {
		code, stdout, stderr := command(t, "diff", "--platform", "linux/arm/"+variant, r.Addr()+"/src:v1", r.Addr()+"/dst:v1")
		if code != 0 || !strings.Contains(stdout, "no differences in 2 paths") {
			t.Errorf("%s: %d, %s%s", variant, code, stdout, stderr)
		}
	}
	code, _, stderr := command(t, "convert", "--platform", "linux/arm/v7", r.Addr()+"/src:v1", r.Addr()+"/one:v1")
	if code != 0 || !strings.Contains(stderr, "1 other images of the index") {
		t.Errorf("%d, %s", code, stderr)
	}
}

// TestHostileManifest: a digest that is none is an error, whoever asks for it.
func TestHostileManifest(t *testing.T) {
	r, err := fakeregistry.New(fakeregistry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	src := repository(t, r, "src:v1")
	good := pushTest(t, src, "", testImage{ocispec.Platform{OS: "linux", Architecture: "amd64"}, [][]byte{tarOf(t, "x = 1")}, nil})
	doc, err := src.Manifest(t.Context(), good.Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(doc.Raw, &m); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []digest.Digest{"", "abc", "sha256:", "sha256:../../etc/passwd", "x:" + digest.Digest(strings.Repeat("0", 64))} {
		m.Layers[0].Digest = bad
		if _, err := src.PutManifest(t.Context(), "bad", ocispec.MediaTypeImageManifest, marshal(t, m)); err != nil {
			t.Fatal(err)
		}
		for _, args := range [][]string{{"build", "-o", filepath.Join(t.TempDir(), "x")}, {"convert"}, {"inspect"}} {
			args = append(args, r.Addr()+"/src:bad")
			if args[0] == "convert" {
				args = append(args, r.Addr()+"/dst:v1")
			}
			if code, _, stderr := command(t, args...); code != exitFailure || !strings.Contains(stderr, "layer 0") {
				t.Errorf("%s of %q: %d, %s", args[0], bad, code, stderr)
			}
		}
	}
}
