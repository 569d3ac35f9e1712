package e2e

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

// oneFile is an image with a file that is named as its content.
func oneFile(t *testing.T, name string) []byte {
	t.Helper()
	var image memory
	b, err := mkerofs.New(&image, mkerofs.Options{})
	must(t, err)
	data := content(name, 1<<20)
	must(t, b.Add(mkerofs.Entry{Path: name, Mode: mkerofs.ModeRegular | 0o644, Mtime: time.Unix(1600000000, 0), Size: int64(len(data)),
		Open: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }}))
	_, err = b.Finish(t.Context())
	must(t, err)
	return image
}

// TestVerifiedLayers: each layer is verified by what vouches for it, and opening all costs
// one GET for each that has an index or a tree. With --verify=require none may be without.
func TestVerifiedLayers(t *testing.T) {
	require.Has(t, "root", "fuse", "kernel-erofs", "overlay")
	r, err := fakeregistry.New(fakeregistry.Options{})
	must(t, err)
	defer r.Close()
	var layers []ocipush.Layer
	for name, o := range map[string]verifiable.Options{
		"index": {Chunk: 64 << 10}, "apart": {Chunk: 64 << 10, Apart: true}, "tree": {Verity: true}, "zstd": {Chunk: 64 << 10, Zstd: true},
	} {
		layers = append(layers, verifiable.Make(t, oneFile(t, name), o).Layers()...)
	}
	_, err = ocipush.Push(t.Context(), r.URL(), "x:v1", layers, ocipush.Options{})
	must(t, err)
	_, err = ocipush.Push(t.Context(), r.URL(), "mixed:v1", append(layers, verifiable.Make(t, oneFile(t, "plain"), verifiable.Options{}).Layers()...), ocipush.Options{})
	must(t, err)
	for _, how := range []string{"fuse", "file"} {
		s := newSession(t)
		dir := s.mount(r.Addr()+"/x:v1", "--backend="+how, "--verify=require")
		for _, name := range []string{"index", "apart", "tree", "zstd"} {
			if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, content(name, 1<<20)) {
				t.Errorf("%s, %s: %d bytes, %v", how, name, len(got), err)
			}
		}
		var all []struct {
			Status backend.MountStatus `json:"status"`
		}
		must(t, json.Unmarshal([]byte(s.must("list", "--json")), &all))
		by := map[string]int{}
		for _, l := range all[0].Status.Layers {
			by[l.By]++
			if l.Verified == 0 || l.Verified != l.Fetched {
				t.Errorf("%+v", l)
			}
		}
		if by["chunk-index"] != 3 || by["dm-verity"] != 1 {
			t.Errorf("verified by %v", by)
		}
		s.must("umount", dir)
		if r := s.run(binary, "mount", "--backend="+how, "--verify=require", r.Addr()+"/mixed:v1", dir); r.code != 1 {
			t.Errorf("a layer that cannot be verified: exit code %d, %q", r.code, r.stderr)
		}
	}
}
