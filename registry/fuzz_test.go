package registry

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// FuzzArchive opens whatever there is, and reads the image in it to its end.
func FuzzArchive(f *testing.F) {
	pack := func(files ...string) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for i := 0; i < len(files); i += 2 {
			h := &tar.Header{Name: files[i], Size: int64(len(files[i+1])), Typeflag: tar.TypeReg}
			if to, ok := strings.CutPrefix(files[i+1], "->"); ok {
				h.Linkname, h.Typeflag, h.Size = to, tar.TypeSymlink, 0
			}
			if err := w.WriteHeader(h); err != nil {
				f.Fatal(err)
			}
			if h.Size > 0 {
				if _, err := io.WriteString(w, files[i+1]); err != nil {
					f.Fatal(err)
				}
			}
		}
		if err := w.Close(); err != nil {
			f.Fatal(err)
		}
		return b.Bytes()
	}
	config := `{"rootfs":{"diff_ids":["` + digest.FromString("layer").String() + `"]}}`
	f.Add(pack("m/layer.tar", "layer", "n", "->m/layer.tar", "c", config, "manifest.json", `[{"Config":"c","Layers":["n"]}]`))
	manifest := `{"schemaVersion":2,"config":{},"layers":[]}`
	d := digest.FromString(manifest)
	f.Add(pack("oci-layout", `{"imageLayoutVersion":"1.0.0"}`, blobName(d), manifest, "index.json", `{"manifests":[{"digest":"`+d.String()+`"}]}`))
	f.Add([]byte("\x1f\x8b\x08"))
	f.Fuzz(func(t *testing.T, data []byte) {
		h, err := newHolder(bytes.NewReader(data), int64(len(data)), "x", "")
		if err != nil {
			return
		}
		im, err := ResolveIn(t.Context(), foreignHolder{h}, "", Selector{})
		if err != nil {
			return
		}
		for _, l := range im.Layers {
			body, err := h.blob(t.Context(), l.Descriptor)
			if err != nil {
				continue
			}
			n, err := io.Copy(io.Discard, body)
			if err != nil || n != l.Size || n > int64(len(data)) {
				t.Errorf("a layer of %d bytes has %d, %v", l.Size, n, err)
			}
		}
	})
}

// foreignHolder is an Archive without a file.
type foreignHolder struct{ holder }

func (h foreignHolder) Manifest(ctx context.Context, target string) (Document, error) {
	return manifestIn(ctx, h, target)
}

func (h foreignHolder) Blob(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	return blobIn(ctx, h, desc)
}

// FuzzLayoutIndex reads an index.json, and lists an image in it: what was there
// before must still be there.
func FuzzLayoutIndex(f *testing.F) {
	d := digest.FromString("x")
	f.Add([]byte(`{"schemaVersion":2,"manifests":[{"digest":"`+d.String()+`","annotations":{"org.opencontainers.image.ref.name":"v1"}}]}`), "v1")
	f.Add([]byte(`{"manifests":[{"digest":"`+d.String()+`"},{"digest":"`+digest.FromString("y").String()+`"}],"Manifests":[]}`), "")
	f.Add([]byte(`null`), "v2")
	f.Fuzz(func(t *testing.T, raw []byte, name string) {
		s := &shelf{what: "x", open: func(string) (io.ReadCloser, int64, error) {
			return io.NopCloser(bytes.NewReader(raw)), int64(len(raw)), nil
		}}
		if found, err := s.find(name); err == nil && checkDigest(found.Digest) != nil {
			t.Errorf("found %+v", found)
		}
		if checkName(name) != nil {
			return // as PutManifest does
		}
		added := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("z"), Size: 1}
		after, err := listed(raw, name, added, nil)
		if err != nil {
			return
		}
		again, err := listed(after, name, added, nil)
		if err != nil || !bytes.Equal(again, after) {
			t.Errorf("a second time: %q, %v; the first %q", again, err, after)
		}
		if was, is := namesBut(t, raw, name), namesBut(t, after, name); !slices.Equal(was, is) {
			t.Errorf("listed were %q, and now %q", was, is)
		}
	})
}

// namesBut are the names in an index.json, but for one.
func namesBut(t *testing.T, raw []byte, but string) (names []string) {
	var fields map[string]json.RawMessage
	var entries []ocispec.Descriptor
	if err := json.Unmarshal(raw, &fields); err != nil {
		t.Fatal(err)
	}
	if fields["manifests"] == nil {
		return nil
	}
	if err := json.Unmarshal(fields["manifests"], &entries); err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if n := e.Annotations[ocispec.AnnotationRefName]; n != "" && n != but {
			names = append(names, n)
		}
	}
	return names
}
