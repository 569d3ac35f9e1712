package build

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/require"
)

// TestDebian: what is made of the image is what umoci unpacks of it, wherever it comes from and wherever it goes.
func TestDebian(t *testing.T) {
	f := newFixture(t)
	t.Run("Fixture", func(t *testing.T) { testFixture(t, f) })
	t.Run("Build", func(t *testing.T) { testBuild(t, f) })
	t.Run("Layouts", func(t *testing.T) { testLayouts(t, f) })
	t.Run("MetadataOnly", func(t *testing.T) { testMetadataOnly(t, f) })
	t.Run("Squash", func(t *testing.T) { testSquash(t, f) })
	t.Run("PerLayer", func(t *testing.T) { testPerLayer(t, f) })
	t.Run("Push", func(t *testing.T) { testPush(t, f) })
}

// testFixture: what the tests are about came through the tools that made the image. If not, nothing is proved.
func testFixture(t *testing.T, f *fixture) {
	all := make(map[string]corpus.Entry, len(f.want))
	for _, e := range f.want {
		all[e.Path] = e
	}
	for _, gone := range []string{
		"usr/share/doc/apt", "usr/bin/zdiff", "hard/two", "usr/bin/gunzip", "usr/bin/tac/inside", "share/own", "hard/sort", "usr/share/three",
		"usr/share/perl5/Debconf", "usr/share/perl5/Dpkg/only", "usr/lib/apt/methods/http", "usr/lib/apt/solvers",
	} {
		if _, there := all[gone]; there {
			t.Errorf("%s is still there", gone)
		}
	}
	kind := func(name string) uint32 { return all[name].Mode & unix.S_IFMT }
	for what, ok := range map[string]bool{
		"many files":                      len(all) > 1500,
		"a directory that was a file":     kind("usr/share/doc/bash") == unix.S_IFDIR && all["usr/share/doc/bash/again"].Size == 5,
		"a file that was a directory":     kind("usr/bin/tac") == unix.S_IFREG && all["usr/bin/tac"].Size == 10,
		"a link that was a directory":     kind("share") == unix.S_IFLNK,
		"a file that was a link":          kind("usr/share/doc/coreutils") == unix.S_IFREG,
		"a covered directory":             kind("usr/share/perl5/Dpkg") == unix.S_IFDIR,
		"names of a file in two layers":   all["hard/one"].Nlink == 3 && all["hard/five"].Ino == all["hard/one"].Ino,
		"a moved hard link":               all["hard/moved"].Nlink == 2 && all["hard/moved"].Ino == all["hard/moved-too"].Ino,
		"a time before 1970":              all["sparse"].MtimeNs == -86_400_500_000_000,
		"another, of the fourth layer":    all["usr/bin/fifo2"].MtimeNs == -4_750_000_000,
		"nanoseconds":                     all["to-long"].MtimeNs == 987_654_321,
		"large owners":                    all["usr/bin/mount"].UID == 3_000_000 && all["usr/bin/mount"].GID == 4_000_000_000,
		"a changed owner":                 all["usr/bin/env"].UID == 12 && all["usr/bin/env"].GID == 34,
		"set-user-ID and sticky":          all["usr/bin/mount"].Mode&0o7777 == 0o5755,
		"a capability":                    len(all["usr/bin/umount"].Xattrs["security.capability"]) == 20,
		"an attribute with a zero in it":  string(all["usr/bin/mount"].Xattrs["user.comment"]) == "a value\x00\n",
		"an attribute that was taken off": all["usr/bin/mount"].Xattrs["user.long"] == nil,
		"an attribute of a directory":     string(all["usr/share/doc/dpkg"].Xattrs["user.dir"]) == "x",
		"an ACL":                          len(all["usr/bin/cat"].Xattrs["system.posix_acl_access"]) == 44,
		"devices":                         all["usr/bin/disk"].Rdev != nil && *all["usr/bin/disk"].Rdev == [2]uint32{259, 1 << 12} && kind("usr/bin/null") == unix.S_IFCHR,
		"a fifo":                          kind("usr/bin/fifo") == unix.S_IFIFO,
		"a sparse file":                   all["sparse"].Size == 3<<20,
	} {
		if !ok {
			t.Errorf("the image has no example of %s", what)
		}
	}
}

// testBuild: the image is the same from layers of gzip and of zstd, from a registry, a layout and archives,
// and of what umoci unpacked.
func testBuild(t *testing.T, f *fixture) {
	u := newUser(t)
	dir := t.TempDir()
	image := filepath.Join(dir, "image.erofs")
	want := u.digest("build", "-o", image, f.gzip)
	kernelShows(t, image, f.want)
	u.sound(f.utils, image)
	f.erofsfuseShows(t, image)
	u.same(f.rootfs, image)
	u.same(f.zstd, image)

	ociArchive, dockerArchive := filepath.Join(dir, "oci.tar"), filepath.Join(dir, "docker.tar")
	skopeoCopy(t, "oci:"+f.layout+":app", "oci-archive:"+ociArchive+":app")
	skopeoCopy(t, "oci:"+f.layout+":app", "docker-archive:"+dockerArchive+":debian/app:v1")
	docker := f.registry + "/debian/docker:v1"
	skopeoCopy(t, "docker://"+f.gzip, "docker://"+docker, "--format=v2s2")
	for _, source := range []string{
		f.zstd, docker, "oci:" + f.layout, "oci-archive:" + ociArchive + ":app", "docker-archive:" + dockerArchive + ":debian/app:v1", f.rootfs, image,
	} {
		if got := u.digest("build", "-o", filepath.Join(dir, "again.erofs"), "--overwrite", source); got != want {
			t.Errorf("of %s: %s, want %s", source, got, want)
		}
	}
}

// erofsfuseShows is kernelShows for the reader of erofs-utils, which shows whole seconds.
func (f *fixture) erofsfuseShows(t *testing.T, image string) {
	t.Helper()
	require.Has(t, "fuse")
	dir := t.TempDir()
	if said, err := f.utils.Command(t.Context(), "erofsfuse", image, dir).CombinedOutput(); err != nil {
		t.Fatalf("erofsfuse: %v: %s", err, said)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	want := slices.Clone(f.want)
	for i, e := range want {
		want[i].MtimeNs = time.Unix(0, e.MtimeNs).Unix() * 1e9
	}
	shows(t, dir, want)
}

// testLayouts: whatever an image is made like, it is sound, shows the same, and is the same on one processor and on two.
func testLayouts(t *testing.T, f *fixture) {
	u := newUser(t)
	dir, source := t.TempDir(), filepath.Join(f.rootfs, "usr/bin")
	want := walk(t, source)
	tarball := filepath.Join(dir, "source.tar")
	other(t, "tar", "--format=pax", "--xattrs", "--xattrs-include=*", "--numeric-owner", "-C", source, "-cf", tarball, ".")
	for name, flags := range map[string][]string{
		"plain":   {"--compress=none"},
		"flat":    {"--compress=none", "--inline-max=0"},
		"chunks":  {"--chunk-size=16KiB"},
		"lz4hc":   {"--compress=lz4hc", "--cluster-size=64KiB", "--tail-packing"},
		"zstd":    {"--compress=zstd", "--cluster-size=64KiB", "--fragments", "--dedupe"},
		"deflate": {"--compress=deflate", "--cluster-size=16KiB", "--fragments"},
		"many":    {"--cluster-size=32KiB", "--tail-packing", "--dedupe", "--label=proof", "--xattr-prefix=user.com", "--uuid=00112233-4455-6677-8899-aabbccddeeff"},
	} {
		t.Run(name, func(t *testing.T) {
			u.t = t
			image, again := filepath.Join(dir, name+".erofs"), filepath.Join(dir, name+"-again.erofs")
			env := u.env
			defer func() { u.env = env }()
			u.env = append(slices.Clone(env), "GOMAXPROCS=1")
			one := u.digest("build", append(flags, "-o", image, tarball)...)
			u.env = append(slices.Clone(env), "GOMAXPROCS=2")
			if two := u.digest("build", append(flags, "-o", again, source)...); two != one {
				t.Errorf("on one processor, of an archive: %s; on two, of a directory: %s", one, two)
			}
			u.env = env
			kernelShows(t, image, want)
			u.sound(f.utils, image)
		})
	}
	u.t = t
}

// testMetadataOnly: all is there but the data, which reads as zeros.
func testMetadataOnly(t *testing.T, f *fixture) {
	u := newUser(t)
	image := filepath.Join(t.TempDir(), "image.erofs")
	d := u.digest("build", "--metadata-only", "-o", image, f.gzip)
	u.sound(f.utils, image)
	want := slices.Clone(f.want)
	for i := range want {
		if want[i].SHA256 != "" {
			want[i].SHA256 = digest.FromBytes(make([]byte, want[i].Size)).Encoded()
		}
	}
	kernelShows(t, image, want)
	u.same(f.rootfs, image, "--ignore=content")
	if st, err := os.Stat(image); err != nil || st.Size() > 1<<20 {
		t.Errorf("the metadata of %d files has %d bytes, %v", len(want), st.Size(), err)
	}
	if again := u.digest("build", "--metadata-only", "-o", image, "--overwrite", f.rootfs); again != d {
		t.Errorf("%s of layers, %s of a directory", d, again)
	}
}

// mounted calls use with a directory that an image is mounted on.
func (u *user) mounted(backend, ref string, use func(dir string)) {
	u.t.Helper()
	require.Has(u.t, "fuse")
	dir := u.t.TempDir()
	u.must("mount", "--backend="+backend, ref, dir)
	defer u.must("umount", dir)
	use(dir)
}

// testSquash: one layer of five, through a registry, shows the same by each backend, and others carry it as it is.
func testSquash(t *testing.T, f *fixture) {
	u := newUser(t)
	ref := f.registry + "/debian/squashed:v1"
	d := u.digest("convert", "--squash", f.zstd, ref)
	for _, backend := range []string{"file", "fuse"} {
		u.mounted(backend, ref, func(dir string) { shows(t, dir, f.want) })
	}
	u.same(f.rootfs, ref)
	f.carried(t, ref, d, 2)
	tarFirst(t, f, ref, f.zstd)
}

// testPerLayer: five layers of five, from one processor and from two, put over each other are the tree.
func testPerLayer(t *testing.T, f *fixture) {
	u := newUser(t)
	ref := f.registry + "/debian/layers:v1"
	env := u.env
	u.env = append(slices.Clone(env), "GOMAXPROCS=1")
	d := u.digest("convert", f.gzip, ref)
	u.env = append(slices.Clone(env), "GOMAXPROCS=2")
	layout := "oci:" + filepath.Join(t.TempDir(), "layout") + ":app"
	if again := u.digest("convert", "oci:"+f.layout+":app", layout); again != d {
		t.Errorf("%s on one processor, through a registry; %s on two, through a layout", d, again)
	}
	u.env = env
	f.sameButLinks(t, u, f.rootfs, ref)
	f.sameButLinks(t, u, f.gzip, layout)
	f.carried(t, ref, d, 2)
	tarFirst(t, f, ref, f.gzip)
	layers := erofsLayers(t, strings.TrimSuffix(strings.TrimPrefix(layout, "oci:"), ":app"))
	if len(layers) != 5 {
		t.Fatalf("%d EROFS layers", len(layers))
	}
	for _, l := range layers {
		u.sound(f.utils, l)
	}
	overlaid(t, layers, func(dir string) { sameByOverlay(t, dir, f.want) })
	for _, backend := range []string{"file", "fuse"} {
		u.mounted(backend, ref, func(dir string) { sameByOverlay(t, dir, f.want) })
	}
}

// sameButLinks is same, but for the one file that the fourth layer gives another name: as with overlayfs, it is copied
// up, and the names that only the layers below know stay with the original.
func (f *fixture) sameButLinks(t *testing.T, u *user, a, b string) {
	t.Helper()
	u.same(a, b, "--ignore=links")
	r := u.run("diff", "--json", a, b)
	var report struct{ Differences []struct{ Path, What string } }
	must(t, json.Unmarshal([]byte(r.stdout), &report))
	var found []string
	for _, d := range report.Differences {
		found = append(found, d.What+" "+d.Path)
	}
	if r.code != 1 || !slices.Equal(found, []string{"link hard/five", "link hard/one"}) {
		t.Errorf("diff %s %s: exit code %d, %q", a, b, r.code, found)
	}
}

// carried has skopeo copy what is in the registry to a layout and back, which must not change it.
func (f *fixture) carried(t *testing.T, ref, want string, manifests int) {
	t.Helper()
	layout, back := "oci:"+filepath.Join(t.TempDir(), "layout")+":app", ref+"-back"
	skopeoCopy(t, "docker://"+ref, layout, "--preserve-digests")
	skopeoCopy(t, layout, "docker://"+back, "--preserve-digests")
	for _, name := range []string{"docker://" + ref, layout, "docker://" + back} {
		raw := other(t, "skopeo", "inspect", "--raw", "--tls-verify=false", name)
		if got := digestOf(raw); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
		if n := strings.Count(raw, `"platform"`); n != manifests {
			t.Errorf("%s has %d manifests, want %d: %s", name, n, manifests, raw)
		}
	}
}

// tarFirst fails the test unless ref is an index that has the image source in the first place and one of EROFS in the
// second.
func tarFirst(t *testing.T, f *fixture, ref, source string) {
	t.Helper()
	inspect := func(ref string) string {
		return other(t, "skopeo", "inspect", "--raw", "--tls-verify=false", "docker://"+ref)
	}
	var index struct {
		Manifests []struct {
			Digest   string
			Platform struct {
				Features []string `json:"os.features"`
			}
		}
	}
	must(t, json.Unmarshal([]byte(inspect(ref)), &index))
	if len(index.Manifests) != 2 || index.Manifests[0].Digest != digestOf(inspect(source)) || len(index.Manifests[0].Platform.Features) != 0 ||
		!slices.Equal(index.Manifests[1].Platform.Features, []string{"erofs"}) {
		t.Errorf("%s is %+v", ref, index)
	}
}

// testPush: an image of mkfs.erofs is pushed, mounted, and carried by others.
func testPush(t *testing.T, f *fixture) {
	u := newUser(t)
	image := filepath.Join(t.TempDir(), "mkfs.erofs")
	f.utils.Run(t, "--quiet", "-zdeflate", "-Efragments", "-T1", "--mkfs-time", image, f.rootfs)
	ref := f.registry + "/debian/mkfs:v1"
	d := u.digest("push", image, ref)
	for _, backend := range []string{"file", "fuse"} {
		u.mounted(backend, ref, func(dir string) { shows(t, dir, f.want) })
	}
	u.same(f.rootfs, ref)
	f.carried(t, ref, d, 0)
	// In the older form, in pieces, and without what it could be verified by.
	plain := ref + "-plain"
	u.must("push", "--quiet", "--media-type=containerd", "--upload-chunk=1MiB", "--chunk-index=0", "--dm-verity=false", image, plain)
	u.mounted("fuse", plain, func(dir string) { shows(t, dir, f.want) })
	u.must("push", "--quiet", "--media-type=containerd", "--annotation=a=b=c", image, plain)
	u.same(f.rootfs, plain)
	// Again it is the same, and is not sent.
	if said := u.run("push", image, ref); said.code != 0 || strings.Count(said.stderr, "it was there already") != 2 || !strings.Contains(said.stdout, d) {
		t.Errorf("pushed again: %+v", said)
	}
}
