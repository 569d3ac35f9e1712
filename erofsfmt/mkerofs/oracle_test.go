package mkerofs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"os/exec"
	"path"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/debian"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// The kernel shows exactly what was added.
func TestKernelReadsImages(t *testing.T) {
	require.Has(t, "root", "kernel-erofs")
	require.Long(t, "has the kernel read many images")
	for _, im := range images(t) {
		if im.options.BlockSize > os.Getpagesize() {
			continue // which Linux refuses
		}
		t.Run(im.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := unix.Mount(im.build(t), dir, "erofs", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, ""); err != nil {
				t.Fatalf("mount: %v", err)
			}
			defer func() {
				if err := unix.Unmount(dir, 0); err != nil {
					t.Error(err)
				}
			}()
			got, err := tree.Walk(dir)
			if err != nil {
				t.Fatal(err)
			}
			for _, diff := range tree.Diff(wanted(t, im.entries), got, tree.Ino) {
				t.Error(diff)
			}
		})
	}
}

// Our own reader shows exactly what was added, with every block size, and finds every name.
func TestReaderReadsImages(t *testing.T) {
	require.Long(t, "reads many images")
	for _, im := range images(t) {
		t.Run(im.name, func(t *testing.T) {
			var m memory
			buildTo(t, &m, im.options, im.entries)
			image, err := erofsfmt.Open(context.Background(), sourcetest.Memory(m))
			if err != nil {
				t.Fatal(err)
			}
			r := reading{t: t, image: image}
			r.visit(".", image.Root())
			for _, diff := range tree.Diff(wanted(t, im.entries), r.entries, tree.Ino) {
				t.Error(diff)
			}
		})
	}
}

// A reading collects what a tree holds.
type reading struct {
	t       testing.TB
	image   *erofsfmt.Image
	entries []corpus.Entry

	keepData bool // in place of its hash
}

func (r *reading) must(name string, err error) {
	if err != nil {
		r.t.Fatalf("%.80q: %v", name, err)
	}
}

func (r *reading) visit(name string, nid erofsfmt.Nid) {
	ctx := context.Background()
	ino, err := r.image.Inode(ctx, nid)
	r.must(name, err)
	r.entries = append(r.entries, r.entry(name, &ino))
	if !ino.IsDir() {
		return
	}
	var names []erofsfmt.Dirent
	r.must(name, r.image.ReadDir(ctx, &ino, 0, func(e erofsfmt.Dirent) bool {
		names = append(names, e)
		return true
	}))
	for _, e := range names {
		if found, err := r.image.Lookup(ctx, &ino, e.Name); err != nil || found != e.Nid {
			r.t.Errorf("%.80q in %.80q: lookup gives nid %d, %v; readdir %d", e.Name, name, found, err, e.Nid)
		}
		if e.Name != "." && e.Name != ".." {
			r.visit(path.Join(name, e.Name), e.Nid)
		}
	}
}

func (r *reading) entry(name string, ino *erofsfmt.Inode) corpus.Entry {
	ctx := context.Background()
	e := corpus.Entry{
		Path: name, Mode: ino.Mode, UID: ino.UID, GID: ino.GID, Nlink: ino.Nlink, MtimeNs: ino.Mtime*1e9 + int64(ino.MtimeNsec),
	}
	var err error
	switch ino.Mode & ModeType {
	case ModeRegular:
		data := make([]byte, ino.Size)
		r.must(name, r.image.ReadFile(ctx, ino, data, 0))
		sum := sha256.Sum256(data)
		e.Size, e.SHA256 = ino.Size, hex.EncodeToString(sum[:])
		if r.keepData {
			e.SHA256 = string(data)
		}
	case ModeSymlink:
		e.Size = ino.Size
		e.Target, err = r.image.Readlink(ctx, ino)
		r.must(name, err)
	case ModeChar, ModeBlock:
		e.Rdev = &[2]uint32{ino.Major(), ino.Minor()}
	}
	attrs, err := r.image.Xattrs(ctx, ino)
	r.must(name, err)
	for _, attr := range attrs {
		if e.Xattrs == nil {
			e.Xattrs = make(map[string][]byte)
		}
		e.Xattrs[attr], err = r.image.Xattr(ctx, ino, attr)
		r.must(name, err)
	}
	return e
}

// fsck.erofs, asked to read everything, has nothing to say. The version of Debian 12 knows blocks of 4 KiB only, and neither
// long xattr prefixes nor compression but LZ4 without fragments.
func TestFsckIsContent(t *testing.T) {
	require.Long(t, "builds many images")
	require.Has(t, "mkfs.erofs")
	for _, im := range images(t) {
		z := im.options.Compression
		lz4 := z.Algorithm == Uncompressed || z.Algorithm == LZ4 || z.Algorithm == LZ4HC
		if im.options.BlockSize != 0 && im.options.BlockSize != 4096 || !lz4 || z.Fragments || z.Dedupe || im.options.XattrPrefixes != nil {
			continue
		}
		t.Run(im.name, func(t *testing.T) {
			out, err := exec.Command("fsck.erofs", "--extract", im.build(t)).CombinedOutput()
			said := strings.TrimSpace(strings.ReplaceAll(string(out), "<I> erofs: No errors found", ""))
			if err != nil || said != "" {
				t.Errorf("fsck.erofs: %v\n%s", err, out)
			}
		})
	}
}

// The tools of erofs-utils 1.9.4, which know all that is written here: fsck.erofs reads everything and has nothing to say,
// and erofsfuse shows what was added, but for parts of seconds, which it does not know. Neither takes blocks that are
// larger than a page.
func TestErofsUtilsReadImages(t *testing.T) {
	require.Has(t, "root", "fuse", "debian")
	require.Long(t, "has erofs-utils read many images")
	utils := debian.Mkfs(t)
	for _, im := range images(t) {
		if im.options.BlockSize > os.Getpagesize() {
			continue
		}
		t.Run(im.name, func(t *testing.T) {
			name := im.build(t)
			out, err := utils.Command(t.Context(), "fsck.erofs", "--extract", name).CombinedOutput()
			if said := strings.TrimSpace(strings.ReplaceAll(string(out), "<I> erofs: No errors found", "")); err != nil || said != "" {
				t.Errorf("fsck.erofs: %v\n%s", err, out)
			}
			got, err := tree.Walk(utils.Mount(t, name))
			if err != nil {
				t.Fatal(err)
			}
			want := wanted(t, im.entries)
			for i := range want {
				want[i].MtimeNs = time.Unix(0, want[i].MtimeNs).Unix() * 1e9
			}
			for _, diff := range tree.Diff(want, got, tree.Ino) {
				t.Error(diff)
			}
		})
	}
}

// A damaged image shows that fsck.erofs looked.
func TestFsckIsNotContent(t *testing.T) {
	require.Has(t, "mkfs.erofs")
	name := image{entries: []Entry{regular("file", time.Unix(0, 0), nil)}}.build(t)
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(data, []byte("...file")) // the names of the root
	if at < 0 {
		t.Fatal("the root's names are not in the image")
	}
	copy(data[at:], "...\x00ile")
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("fsck.erofs", "--extract", name).CombinedOutput(); err == nil {
		t.Errorf("fsck.erofs likes a name that begins with a NUL: %s", out)
	}
}

// dump.erofs reads the superblock as it was meant.
func TestDumpSeesSuperblock(t *testing.T) {
	require.Has(t, "mkfs.erofs")
	im := image{options: Options{Label: "label", UUID: [16]byte{0: 0xfe, 15: 1}}, entries: edgeTree(4096)}
	cmd := exec.Command("dump.erofs", "-s", im.build(t))
	cmd.Env = append(os.Environ(), "TZ=UTC")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("dump.erofs: %v\n%s", err, out)
	}
	info := strings.Join(strings.Fields(string(out)), " ")
	for _, want := range []string{
		"root nid: 128", "Filesystem features: sb_csum mtime", "UUID: fe000000-0000-0000-0000-000000000001",
		"inode metadata start block: 0", "inode count: 1297", "created: Tue Nov 14 22:13:20 2023",
	} {
		if !strings.Contains(info, want) {
			t.Errorf("dump.erofs does not say %q:\n%s", want, out)
		}
	}
}
