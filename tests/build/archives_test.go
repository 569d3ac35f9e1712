package build

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
	"github.com/erofs-oci/erofs-oci/tests/require"
)

const plainTar = "application/vnd.oci.image.layer.v1.tar"

// file and dir are headers for archive.
func file(name string) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, ModTime: time.Unix(1_700_000_000, 0)}
}

func dir(name string) tar.Header {
	return tar.Header{Name: name + "/", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: time.Unix(1_700_000_000, 0)}
}

// TestArchives: however an archive is compressed, and by whatever way it comes, the image is the same.
func TestArchives(t *testing.T) {
	require.Has(t, "bzip2", "xz", "zstd")
	u := newUser(t)
	base := filepath.Dir(u.tmp)
	at := func(name string) string { return filepath.Join(base, name) }
	data := archive(t, dir("a"), file("a/file"), tar.Header{Name: "link", Linkname: "a", Typeflag: tar.TypeSymlink})
	write(t, at("rootfs.tar"), data)
	// Without -o the image is called after the archive, and is in the working directory.
	want := u.digest("build", "rootfs.tar")
	if raw, err := os.ReadFile(at("rootfs.erofs")); err != nil || digest.FromBytes(raw).String() != want {
		t.Errorf("rootfs.erofs: %d bytes, %v", len(raw), err)
	}
	if st, err := os.Stat(at("rootfs.erofs")); err != nil || st.Mode().Perm()&0o077 != 0o044 {
		t.Errorf("rootfs.erofs: %v, %v", st, err)
	}
	for ending, program := range map[string][]string{
		".tar.gz": {"gzip", "-9"}, ".tgz": {"gzip"}, ".tar.bz2": {"bzip2"}, ".tar.xz": {"xz"}, ".tar.zst": {"zstd", "-q"}, "": {"zstd", "-q"},
	} {
		name := at("rootfs" + ending)
		packed := pipe(t, data, program...)
		write(t, name, packed)
		if got := u.digest("build", "-o", at("out.erofs"), "--overwrite", name); got != want {
			t.Errorf("of %s: %s, want %s", name, got, want)
		}
		if ending != "" { // without a slash the ending says that it is a file
			if got := u.digest("build", "-o", at("out.erofs"), "--overwrite", "rootfs"+ending); got != want {
				t.Errorf("of rootfs%s: %s, want %s", ending, got, want)
			}
		}
		cmd := u.command("build", "--quiet", "-o", at("out.erofs"), "--overwrite", "-")
		cmd.Stdin = bytes.NewReader(packed)
		if out, err := cmd.Output(); err != nil || strings.TrimSpace(string(out)) != want {
			t.Errorf("of standard input, %v: %q, %v; want %s", program, out, err, want)
		}
		u.nothingLeft()
		// Of what is cut off nothing becomes an image.
		write(t, name, packed[:len(packed)-5])
		u.fails(1, "build", "-o", at("cut.erofs"), name)
		if _, err := os.Stat(at("cut.erofs")); err == nil {
			t.Errorf("an image was made of half of rootfs%s", ending)
		}
	}
}

// pipe is what a program makes of data.
func pipe(t *testing.T, data []byte, program ...string) []byte {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), program[0], program[1:]...)
	cmd.Stdin = bytes.NewReader(data)
	out, err := cmd.Output()
	must(t, err)
	return out
}

func newRegistry(t *testing.T, o fakeregistry.Options) *fakeregistry.Registry {
	t.Helper()
	r, err := fakeregistry.New(o)
	must(t, err)
	t.Cleanup(func() { must(t, r.Close()) })
	return r
}

func push(t *testing.T, r *fakeregistry.Registry, name string, layers ...ocipush.Layer) (ref string) {
	t.Helper()
	_, err := ocipush.Push(t.Context(), r.URL(), name, layers, ocipush.Options{})
	must(t, err)
	return r.Addr() + "/" + name
}

// paths are those that ls says an image has.
func (u *user) paths(image string) []string {
	u.t.Helper()
	var all []string
	listing := u.must("extract", "--tar", image)
	for r := tar.NewReader(strings.NewReader(listing)); ; {
		h, err := r.Next()
		if err != nil {
			break
		}
		if h.Name != "./" {
			all = append(all, strings.TrimPrefix(h.Name, "./"))
		}
	}
	return all
}

// TestLayer: one layer alone keeps what it says of the others, in the form that overlayfs has.
func TestLayer(t *testing.T) {
	u := newUser(t)
	r := newRegistry(t, fakeregistry.Options{})
	gone, opaque := file("a/.wh.file"), file("b/.wh..wh..opq")
	ref := push(t, r, "three:v1",
		ocipush.Bytes(plainTar, archive(t, dir("a"), file("a/file"), file("a/kept"), dir("b"), file("b/old"))),
		ocipush.Bytes(plainTar, archive(t, dir("a"), gone, dir("b"), opaque, file("b/new"))),
		ocipush.Bytes(plainTar, archive(t, file("top"))))
	image := filepath.Join(filepath.Dir(u.tmp), "image.erofs")
	for layer, want := range map[string][]string{
		"0": {"a/", "a/file", "a/kept", "b/", "b/old"},
		"1": {"a/", "a/file", "b/", "b/new"},
		"2": {"top"},
		"":  {"a/", "a/kept", "b/", "b/new", "top"},
	} {
		args := []string{"build", "--quiet", "--overwrite", "-o", image}
		if layer != "" {
			args = append(args, "--layer", layer)
		}
		u.must(append(args, ref)...)
		if got := u.paths(image); !slices.Equal(got, want) {
			t.Errorf("layer %s has %q, want %q", layer, got, want)
		}
		if layer != "1" {
			continue
		}
		type inode struct {
			Type   string
			Device string
			Xattrs []struct{ Name string }
		}
		var whiteout, covering inode
		must(t, json.Unmarshal([]byte(u.must("stat", "--json", image, "a/file")), &whiteout),
			json.Unmarshal([]byte(u.must("stat", "--json", image, "b")), &covering))
		if whiteout.Type != "character device" || whiteout.Device != "0:0" {
			t.Errorf("the whiteout is %+v", whiteout)
		}
		if len(covering.Xattrs) != 1 || covering.Xattrs[0].Name != "trusted.overlay.opaque" {
			t.Errorf("the opaque directory is %+v", covering)
		}
	}
	if said := u.fails(1, "build", "--layer=3", "-o", image+"2", ref); !strings.Contains(said, "no layer 3: the image has 3, counted from 0") {
		t.Errorf("%q", said)
	}
}

// TestPlatform: of an index the wanted image is taken, and all are converted.
func TestPlatform(t *testing.T) {
	u := newUser(t)
	r := newRegistry(t, fakeregistry.Options{})
	image := func(arch, variant string) ocipush.Image {
		return ocipush.Image{
			Layers:   []ocipush.Layer{ocipush.Bytes(plainTar, archive(t, file("for-"+arch+variant)))},
			Platform: ocispec.Platform{OS: "linux", Architecture: arch, Variant: variant},
		}
	}
	_, err := ocipush.PushIndex(t.Context(), r.URL(), "multi:v1", []ocipush.Image{image("amd64", ""), image("arm64", ""), image("arm", "v7")}, ocipush.Options{})
	must(t, err)
	ref, out := r.Addr()+"/multi:v1", filepath.Join(filepath.Dir(u.tmp), "image.erofs")
	for platform, want := range map[string]string{"linux/amd64": "for-amd64", "linux/arm64": "for-arm64", "linux/arm/v7": "for-armv7"} {
		u.must("build", "--quiet", "--overwrite", "-o", out, "--platform", platform, ref)
		if got := u.paths(out); !slices.Equal(got, []string{want}) {
			t.Errorf("%s: %q", platform, got)
		}
	}
	if said := u.fails(1, "build", "-o", out+"2", "--platform=linux/s390x", ref); !strings.Contains(said, "s390x") {
		t.Errorf("%q", said)
	}
	all := r.Addr() + "/all:v1"
	u.must("convert", "--quiet", "--all-platforms", ref, all)
	for platform, want := range map[string]string{"linux/amd64": "for-amd64", "linux/arm64": "for-arm64", "linux/arm/v7": "for-armv7"} {
		if got := strings.TrimSpace(u.must("ls", "--platform", platform, all)); got != want {
			t.Errorf("converted, %s: %q", platform, got)
		}
		u.same(ref, all, "--platform", platform)
	}
}
