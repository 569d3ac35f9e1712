package guest

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// Where the guest finds what is known of the images of Debian, which are its
// disks.
const (
	imagesFile  = "/debian/images.json"
	listingsDir = "/debian"
)

// addDebian gives the job the images, all but the one that nobody looks at here.
func addDebian(t *testing.T, dir, cache string, job Job) {
	t.Helper()
	set, err := DebianImages(t.Context(), cache)
	if err != nil {
		t.Fatal(err)
	}
	var images []Image
	for _, im := range set.Images {
		if im.Name == NetworkImage {
			continue
		}
		images = append(images, im)
		job.Disks[im.Name] = set.File(im)
		job.Files[filepath.Join(listingsDir, im.Tree+".json")] = set.Listing(im)
	}
	index := filepath.Join(dir, "images.json")
	if err := writeJSON(index, images); err != nil {
		t.Fatal(err)
	}
	job.Files[imagesFile] = index
}

// testDebian mounts a whole Debian, and a part of it in each compression, as a user
// does: by the program, out of a registry. Kernels that know the compression find
// every owner, mode, link, device, attribute and byte of the source; others refuse.
func testDebian(t *testing.T, kernel version) {
	var images []Image
	readJSON(t, imagesFile, &images)
	reg := startRegistry(t)
	for _, im := range images {
		if im.Tree == "whole" && kernel.before(version{6, 12}) {
			continue // of the same compression as a part: half a minute for nothing new
		}
		t.Run(im.Name, func(t *testing.T) {
			defer nothingLeft(t)
			ref := serveDisk(t, reg, im)
			dir := t.TempDir()
			_, err := tryProgram(t, "mount", "--backend=nbd", "--cache-dir", t.TempDir(), ref, dir)
			if kernel.before(since[im.Name]) {
				if err == nil {
					t.Error("mounted by a kernel that is too old for it")
					program(t, "umount", dir)
				}
				leftInRunDir(t)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var want []corpus.Entry
			readJSON(t, filepath.Join(listingsDir, im.Tree+".json"), &want)
			same(t, want, dir, tree.Ino, tree.DirNlink)
			server := onlyEntry(t, "running").PID
			if err := unix.Unmount(dir, 0); err != nil {
				t.Fatal(err)
			}
			awaitEnd(t, server)
			leftInRunDir(t)
		})
	}
}

// serveDisk has the registry serve the disk that an image is.
func serveDisk(t *testing.T, r *fakeregistry.Registry, im Image) (ref string) {
	t.Helper()
	disk, err := os.Open(filepath.Join("/disks", im.Name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { disk.Close() })
	r.PutBlob("debian", im.Digest, disk, im.Size)
	layer := ocipush.Layer{MediaType: registry.MediaTypeErofs, Digest: im.Digest, Size: im.Size}
	if _, err := ocipush.Push(t.Context(), r.URL(), "debian:"+im.Name, []ocipush.Layer{layer}, ocipush.Options{}); err != nil {
		t.Fatal(err)
	}
	return r.Addr() + "/debian:" + im.Name
}
