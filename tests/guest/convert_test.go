package guest

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// convertedPart is what of a Debian the lower layer has.
const convertedPart = "usr/lib/apt"

// testConverted makes one EROFS layer of two tar layers, a part of a Debian and a change to it, here in the guest, and
// mounts it.
func testConverted(t *testing.T, _ version) {
	var images []Image
	readJSON(t, imagesFile, &images)
	i := slices.IndexFunc(images, func(im Image) bool { return im.Name == "part-lz4" })
	reg := startRegistry(t)
	lower := program(t, "extract", "--tar", serveDisk(t, reg, images[i]), convertedPart)
	var all []corpus.Entry
	readJSON(t, filepath.Join(listingsDir, images[i].Tree+".json"), &all)
	want, gone := changedPart(t, all)
	ref := reg.Addr() + "/converted:v1"
	upper := upperLayer(t, gone, want[len(want)-1])
	layers := []ocipush.Layer{ocipush.Bytes(tarLayer, []byte(lower)), ocipush.Bytes(tarLayer, upper)}
	if _, err := ocipush.Push(t.Context(), reg.URL(), "tar:v1", layers, ocipush.Options{}); err != nil {
		t.Fatal(err)
	}
	program(t, "convert", "--squash", "--tmp", t.TempDir(), reg.Addr()+"/tar:v1", ref)

	dir := t.TempDir()
	program(t, "mount", "--backend=nbd", "--cache-dir", t.TempDir(), ref, dir)
	same(t, want, dir, tree.Ino, tree.DirNlink)
	server := onlyEntry(t, "running").PID
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, server)
	leftInRunDir(t)
}

const (
	tarLayer     = "application/vnd.oci.image.layer.v1.tar"
	addedContent = "what the upper layer adds\n"
)

// changedPart is what both layers show together: of all entries those of the part, without the file that is gone, and
// in the end one that is added.
func changedPart(t *testing.T, all []corpus.Entry) (want []corpus.Entry, gone string) {
	t.Helper()
	for _, e := range all {
		above := e.Path == "." || strings.HasPrefix(convertedPart, e.Path+"/")
		if !above && e.Path != convertedPart && !strings.HasPrefix(e.Path, convertedPart+"/") {
			continue
		}
		if gone == "" && e.SHA256 != "" && e.Nlink == 1 {
			gone = e.Path
			continue
		}
		want = append(want, e)
	}
	if gone == "" || len(want) < 20 {
		t.Fatalf("%s has %d paths", convertedPart, len(want))
	}
	sum := sha256.Sum256([]byte(addedContent))
	return append(want, corpus.Entry{
		Path: convertedPart + "/added", Mode: unix.S_IFREG | 0o4711, UID: 12, GID: 1 << 20, Nlink: 1, MtimeNs: -1_500_000_000,
		Size: int64(len(addedContent)), SHA256: hex.EncodeToString(sum[:]), Xattrs: map[string][]byte{"user.layer": []byte("upper")},
	}), gone
}

// upperLayer is an archive that takes one file away and adds another.
func upperLayer(t *testing.T, gone string, added corpus.Entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []*tar.Header{
		{Name: filepath.Join(filepath.Dir(gone), ".wh."+filepath.Base(gone)), Typeflag: tar.TypeReg},
		{
			Name: added.Path, Typeflag: tar.TypeReg, Size: added.Size, Mode: int64(added.Mode &^ unix.S_IFMT), Uid: int(added.UID), Gid: int(added.GID),
			ModTime: time.Unix(0, added.MtimeNs), Format: tar.FormatPAX, PAXRecords: map[string]string{"SCHILY.xattr.user.layer": "upper"},
		},
	} {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Write([]byte(addedContent)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}
