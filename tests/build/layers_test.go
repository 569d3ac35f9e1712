package build

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/debian"
	"github.com/erofs-oci/erofs-oci/tests/dockerregistry"
	"github.com/erofs-oci/erofs-oci/tests/require"
)

// A fixture is a Debian in five layers, and where it can be had.
type fixture struct {
	dir      string
	layout   string         // an OCI layout with the image "app", whose layers are of gzip
	rootfs   string         // what umoci unpacks of it
	want     []corpus.Entry // what is in that
	registry string
	gzip     string // the image in the registry
	zstd     string // the same with layers of zstd
	utils    *debian.Utils
}

// debianParts are what of a Debian goes into the lowest layer: 30 MB in 1,900 files, some of every sort that it has.
var debianParts = []string{
	"bin", "sbin", "lib", "lib64", "etc", "usr/bin", "usr/lib/apt", "usr/lib/x86_64-linux-gnu/perl-base", "usr/share/doc", "usr/share/perl5",
	"var/lib/dpkg",
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	require.Has(t, "debian", "root", "umoci", "skopeo", "docker-registry", "kernel-erofs")
	f := &fixture{dir: t.TempDir(), utils: debian.Mkfs(t), registry: dockerregistry.Start(t)}
	f.layout = filepath.Join(f.dir, "layout")
	image := f.layout + ":app"
	other(t, "umoci", "init", "--layout", f.layout)
	other(t, "umoci", "new", "--image", image)
	other(t, "umoci", "raw", "add-layer", "--image", image, f.base(t))
	bundle := filepath.Join(f.dir, "bundle")
	other(t, "umoci", "unpack", "--image", image, bundle)
	changeTree(t, filepath.Join(bundle, "rootfs"))
	other(t, "umoci", "repack", "--refresh-bundle", "--image", image, bundle)
	other(t, "umoci", "insert", "--opaque", "--image", image, f.cover(t), "/usr/share/perl5")
	other(t, "umoci", "raw", "add-layer", "--image", image, f.changes(t))
	// From here what umoci has unpacked is without two layers, so it unpacks anew.
	bundle = filepath.Join(f.dir, "bundle-4")
	other(t, "umoci", "unpack", "--image", image, bundle)
	changeBack(t, filepath.Join(bundle, "rootfs"))
	other(t, "umoci", "repack", "--image", image, bundle)
	bundle = filepath.Join(f.dir, "bundle-5")
	other(t, "umoci", "unpack", "--image", image, bundle)
	f.rootfs = filepath.Join(bundle, "rootfs")
	f.want = walk(t, f.rootfs)
	f.serve(t)
	return f
}

// base makes the lowest layer, by GNU tar: times to the nanosecond, extended attributes, sparse and hard links.
func (f *fixture) base(t *testing.T) string {
	t.Helper()
	dir, file := filepath.Join(f.dir, "base"), filepath.Join(f.dir, "base.tar")
	must(t, os.Mkdir(dir, 0o755))
	cp := exec.CommandContext(t.Context(), "cp", append(append([]string{"--archive", "--parents"}, debianParts...), dir)...)
	cp.Dir = debian.Root(t)
	if said, err := cp.CombinedOutput(); err != nil {
		t.Fatalf("cp: %v: %s", err, said)
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	again, err := filepath.Glob(at("usr/bin/perl5*")) // another name of the largest
	must(t, err)
	for _, name := range again {
		must(t, os.Remove(name))
	}
	// struct vfs_cap_data of version 2: CAP_NET_RAW, permitted and effective.
	capability := append([]byte{0x01, 0x00, 0x00, 0x02, 0x00, 0x20, 0x00, 0x00}, make([]byte, 12)...)
	// struct posix_acl_xattr: the owner rwx, user 1000 r-x, the group r-x, mask r-x, others r-x.
	acl := []byte{2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 2, 0, 5, 0, 232, 3, 0, 0, 4, 0, 5, 0, 255, 255, 255, 255,
		16, 0, 5, 0, 255, 255, 255, 255, 32, 0, 5, 0, 255, 255, 255, 255}
	long := strings.Repeat("a long name, ", 19)
	must(t,
		unix.Setxattr(at("usr/bin/umount"), "security.capability", capability, 0),
		unix.Setxattr(at("usr/bin/mount"), "user.comment", []byte("a value\x00\n"), 0),
		unix.Setxattr(at("usr/bin/mount"), "user.long", bytes.Repeat([]byte("long"), 600), 0),
		unix.Setxattr(at("usr/bin"), "user.comment", []byte("of a directory"), 0),
		unix.Setxattr(at("usr/bin/cat"), "system.posix_acl_access", acl, 0),
		unix.Mknod(at("usr/bin/fifo"), unix.S_IFIFO|0o620, 0),
		unix.Mknod(at("usr/bin/disk"), unix.S_IFBLK|0o600, int(unix.Mkdev(259, 1<<12))),
		unix.Mknod(at("usr/bin/null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))),
		os.Lchown(at("usr/bin/mount"), 3_000_000, 4_000_000_000),
		os.Chmod(at("usr/bin/mount"), 0o755|os.ModeSetuid|os.ModeSticky),
		os.Remove(at("usr/bin/perl")), // the largest
		os.Mkdir(at("hard"), 0o750), os.Mkdir(at(long), 0o755),
		os.WriteFile(at("hard/one"), []byte("one file"), 0o640),
		os.Link(at("hard/one"), at("hard/two")), os.Link(at("hard/one"), at("usr/share/three")), os.Link(at("hard/one"), at(long+"/four")),
		os.WriteFile(at("sparse"), []byte("begin"), 0o600), os.Truncate(at("sparse"), 3<<20),
		os.Symlink(long, at("to-long")), os.Symlink("usr/share", at("share")),
	)
	for name, ns := range map[string]int64{
		"hard/one": 1_234_567_890_123_456_789, "to-long": 987_654_321, "usr/bin/fifo": 0, "hard": -1, "sparse": -86_400_500_000_000,
	} {
		ts := []unix.Timespec{unix.NsecToTimespec(ns), unix.NsecToTimespec(ns)}
		must(t, unix.UtimesNanoAt(unix.AT_FDCWD, at(name), ts, unix.AT_SYMLINK_NOFOLLOW))
	}
	other(t, "tar", "--format=pax", "--xattrs", "--xattrs-include=*", "--numeric-owner", "--sparse", "-C", dir, "-cf", file, ".")
	return file
}

// changeTree is what the second layer changes.
func changeTree(t *testing.T, root string) {
	t.Helper()
	at := func(name string) string { return filepath.Join(root, name) }
	must(t,
		// Gone: a directory, a file, one of several names of a file.
		os.RemoveAll(at("usr/share/doc/apt")), os.Remove(at("usr/bin/zdiff")), os.Remove(at("hard/two")),
		// A directory gives way to a file, and to a symbolic link, and a file to a directory.
		os.RemoveAll(at("usr/share/doc/bash")), os.WriteFile(at("usr/share/doc/bash"), []byte("not a directory\n"), 0o644),
		os.RemoveAll(at("usr/share/doc/coreutils")), os.Symlink("dpkg", at("usr/share/doc/coreutils")),
		os.Remove(at("usr/bin/tac")), os.Mkdir(at("usr/bin/tac"), 0o711), os.WriteFile(at("usr/bin/tac/inside"), []byte("inside"), 0o400),
		os.Remove(at("share")), os.Mkdir(at("share"), 0o755), os.WriteFile(at("share/own"), nil, 0o644),
		// Both names of a file are moved, another file gets a second one.
		os.Rename(at("usr/bin/gunzip"), at("hard/moved")), os.Rename(at("usr/bin/uncompress"), at("hard/moved-too")),
		os.Link(at("usr/bin/sort"), at("hard/sort")),
		os.Lchown(at("usr/bin/env"), 12, 34), os.Chmod(at("usr/bin/env"), 0o700),
		unix.Removexattr(at("usr/bin/mount"), "user.long"),
		unix.Setxattr(at("usr/bin/cat"), "user.new", []byte("new"), 0),
	)
}

// cover makes the directory that the third layer puts over another: of what that has, nothing may be seen.
func (f *fixture) cover(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(f.dir, "cover")
	must(t, os.Mkdir(dir, 0o755), os.Mkdir(filepath.Join(dir, "Dpkg"), 0o755), os.WriteFile(filepath.Join(dir, "Dpkg/only"), []byte("only this"), 0o644))
	return dir
}

// changes makes the fourth layer, by Go's package tar: what stands in no order, and forms that tools seldom write.
func (f *fixture) changes(t *testing.T) string {
	t.Helper()
	file := filepath.Join(f.dir, "changes.tar")
	when := time.Unix(-5, 250_000_000)
	write(t, file, archive(t,
		tar.Header{Name: "late/new", Mode: 0o600, Typeflag: tar.TypeReg, ModTime: when},
		tar.Header{Name: "late/", Mode: 0o500, Typeflag: tar.TypeDir, ModTime: when},
		tar.Header{Name: "usr/share/doc/dpkg/added", Mode: 0o644, Typeflag: tar.TypeReg, Uid: 1 << 22, Gid: 1<<32 - 2, ModTime: when},
		tar.Header{Name: "usr/share/doc/dpkg/", Mode: 0o750, Typeflag: tar.TypeDir, ModTime: when, PAXRecords: map[string]string{"SCHILY.xattr.user.dir": "x"}},
		tar.Header{Name: "usr/lib/apt/methods/.wh.http", Typeflag: tar.TypeReg},
		tar.Header{Name: "usr/lib/apt/solvers/.wh..wh..opq", Typeflag: tar.TypeReg},
		tar.Header{Name: "usr/lib/apt/solvers/mine", Mode: 0o755, Typeflag: tar.TypeReg, ModTime: when},
		tar.Header{Name: "hard/five", Linkname: "hard/one", Typeflag: tar.TypeLink},
		tar.Header{Name: "usr/bin/fifo2", Mode: 0o644, Typeflag: tar.TypeFifo, ModTime: when},
	))
	return file
}

// changeBack is what the fifth layer changes: what was replaced is what it was before, or something else once more.
func changeBack(t *testing.T, root string) {
	t.Helper()
	at := func(name string) string { return filepath.Join(root, name) }
	must(t,
		os.Remove(at("usr/share/doc/bash")), os.Mkdir(at("usr/share/doc/bash"), 0o755), os.WriteFile(at("usr/share/doc/bash/again"), []byte("again"), 0o644),
		os.RemoveAll(at("usr/bin/tac")), os.WriteFile(at("usr/bin/tac"), []byte("#!/bin/sh\n"), 0o755),
		os.Remove(at("usr/share/doc/coreutils")), os.WriteFile(at("usr/share/doc/coreutils"), []byte("a file"), 0o644),
		os.RemoveAll(at("share")), os.Symlink("usr/share", at("share")),
		os.Remove(at("hard/sort")), os.Rename(at("usr/share/three"), at("usr/bin/three")),
		os.Remove(at("usr/share/perl5/Dpkg/only")), os.RemoveAll(at("usr/lib/apt/solvers")),
	)
}

// archive makes a tar archive. A file's content is its name, unless it is a whiteout.
func archive(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		h.Format = tar.FormatPAX
		content := ""
		if h.Typeflag == tar.TypeReg && !strings.Contains(h.Name, ".wh.") {
			content = h.Name
			h.Size = int64(len(content))
		}
		must(t, w.WriteHeader(&h))
		if _, err := w.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	must(t, w.Close())
	return b.Bytes()
}

func write(t testing.TB, file string, data []byte) {
	t.Helper()
	must(t, os.WriteFile(file, data, 0o600))
}

// serve has skopeo bring the image to the registry, with layers of gzip and of zstd.
func (f *fixture) serve(t *testing.T) {
	t.Helper()
	f.gzip, f.zstd = f.registry+"/debian/gzip:v1", f.registry+"/debian/zstd:v1"
	skopeoCopy(t, "oci:"+f.layout+":app", "docker://"+f.gzip)
	// Through a layout: of a registry skopeo would take the gzip blobs that are there.
	layout := "oci:" + filepath.Join(f.dir, "layout-zstd") + ":app"
	skopeoCopy(t, "oci:"+f.layout+":app", layout, "--dest-compress", "--dest-compress-format", "zstd")
	skopeoCopy(t, layout, "docker://"+f.zstd)
	for ref, kind := range map[string]string{f.gzip: "+gzip", f.zstd: "+zstd"} {
		var m struct{ Layers []struct{ MediaType string } }
		must(t, json.Unmarshal([]byte(other(t, "skopeo", "inspect", "--raw", "--tls-verify=false", "docker://"+ref)), &m))
		if len(m.Layers) != 5 {
			t.Fatalf("%s has %d layers", ref, len(m.Layers))
		}
		for _, l := range m.Layers {
			if !strings.HasSuffix(l.MediaType, kind) {
				t.Fatalf("%s has a layer of %s", ref, l.MediaType)
			}
		}
	}
}

func skopeoCopy(t testing.TB, from, to string, flags ...string) {
	t.Helper()
	args := append([]string{"--insecure-policy", "--tmpdir", t.TempDir(), "copy", "--quiet", "--all", "--src-tls-verify=false", "--dest-tls-verify=false"}, flags...)
	other(t, "skopeo", append(args, from, to)...)
}
