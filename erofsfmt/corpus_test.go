package erofsfmt

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/erofs-oci/erofs-oci/tests/corpus"
)

// supported are the images of the corpus that this reader reads: all of them.
// The list is written out so that an image which disappears or does not open
// any more is noticed.
var supported = []string{
	"48bit", "48bit-lz4-frag", "48bit-zstd", "blk1024-lz4", "blk512", "blockmap", "chunk-indexes", "chunked",
	"chunked64k", "compact", "deflate", "deflate-64k", "dot-omitted", "dsunit", "extended", "fingerprint", "inline",
	"legacy-zstd", "lz4", "lz4-1m", "lz4-dedupe", "lz4-frag", "lz4-legacy", "lz4-zip", "lz4hc-64k", "lzma", "lzma-all",
	"lzma-lc", "metabox", "metabox-zstd", "metazone", "multi-algo", "multidev", "noxattr", "nosbcrc", "plain",
	"xattr-filter", "xattr-plain-prefix", "xattr-prefix", "zD", "zstd", "zstd-64k", "zstd-all", "zstd-maxext",
}

func openCorpus(t testing.TB, c corpus.Image) *Image {
	t.Helper()
	var o Options
	if c.Blob != nil {
		o.Devices = []ReaderAt{memory(c.Blob)}
	}
	im, err := OpenWith(context.Background(), memory(c.Data), o)
	if err != nil {
		t.Fatalf("%s: %v", c.Name, err)
	}
	return im
}

// visit walks a tree depth first in byte order, as the listings do.
func visit(t testing.TB, im *Image, fn func(name string, ino *Inode)) {
	t.Helper()
	ctx := context.Background()
	var walk func(name string, nid Nid)
	walk = func(name string, nid Nid) {
		ino, err := im.Inode(ctx, nid)
		if err != nil {
			t.Errorf("%q: %v", name, err)
			return
		}
		fn(name, &ino)
		if !ino.IsDir() {
			return
		}
		for _, e := range readDir(t, im, &ino) {
			if e.Name != "." && e.Name != ".." {
				walk(path.Join(name, e.Name), e.Nid)
			}
		}
	}
	walk(".", im.Root())
}

func readDir(t testing.TB, im *Image, dir *Inode) []Dirent {
	t.Helper()
	var entries []Dirent
	err := im.ReadDir(context.Background(), dir, 0, func(e Dirent) bool {
		entries = append(entries, e)
		return true
	})
	if err != nil {
		t.Errorf("nid %d: %v", dir.Nid, err)
	}
	return entries
}

// Every image equals what the kernel shows of it.
func TestCorpusEqualsKernel(t *testing.T) {
	var names []string
	for _, c := range corpus.Images(t) {
		names = append(names, c.Name)
		t.Run(c.Name, func(t *testing.T) {
			im := openCorpus(t, c)
			var got []corpus.Entry
			visit(t, im, func(name string, ino *Inode) {
				got = append(got, describe(t, im, name, ino))
			})
			compare(t, got, c.Listing(t))
		})
	}
	if want := slices.Sorted(slices.Values(supported)); !slices.Equal(names, want) {
		t.Errorf("the corpus is %q, want %q", names, want)
	}
}

// describe shows an inode as a listing does.
func describe(t testing.TB, im *Image, name string, ino *Inode) corpus.Entry {
	ctx := context.Background()
	e := corpus.Entry{
		Path: name, Mode: ino.Mode, UID: ino.UID, GID: ino.GID, Nlink: ino.Nlink, Ino: ino.Ino,
		MtimeNs: ino.Mtime*1e9 + int64(ino.MtimeNsec),
	}
	var err error
	switch ino.Mode & modeType {
	case modeReg:
		e.Size = ino.Size
		p := make([]byte, ino.Size)
		err = im.ReadFile(ctx, ino, p, 0)
		sum := sha256.Sum256(p)
		e.SHA256 = hex.EncodeToString(sum[:])
	case modeLnk:
		e.Size = ino.Size
		e.Target, err = im.Readlink(ctx, ino)
	case modeChr, modeBlk:
		e.Rdev = &[2]uint32{ino.Major(), ino.Minor()}
	}
	if err != nil {
		t.Errorf("%q: %v", name, err)
	}
	names, err := im.Xattrs(ctx, ino)
	if err != nil {
		t.Errorf("%q: %v", name, err)
	}
	for _, n := range names {
		if e.Xattrs == nil {
			e.Xattrs = map[string][]byte{}
		}
		if e.Xattrs[n], err = im.Xattr(ctx, ino, n); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	return e
}

func compare(t *testing.T, got, want []corpus.Entry) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("%d paths, want %d", len(got), len(want))
	}
	for i := range min(len(got), len(want)) {
		g, w := got[i], want[i]
		if g.Path != w.Path {
			t.Fatalf("path %d is %q, want %q", i, g.Path, w.Path)
		}
		if (g.Rdev == nil) != (w.Rdev == nil) || g.Rdev != nil && *g.Rdev != *w.Rdev {
			t.Errorf("%q: device %v, want %v", g.Path, g.Rdev, w.Rdev)
		}
		if len(g.Xattrs) != len(w.Xattrs) {
			t.Errorf("%q: %d xattrs, want %d", g.Path, len(g.Xattrs), len(w.Xattrs))
		}
		for n, v := range w.Xattrs {
			if gv, ok := g.Xattrs[n]; !ok || !bytes.Equal(gv, v) {
				t.Errorf("%q: xattr %q is %x, want %x", g.Path, n, gv, v)
			}
		}
		g.Rdev, w.Rdev, g.Xattrs, w.Xattrs = nil, nil, nil, nil
		if gs, ws := strings.TrimSpace(show(g)), strings.TrimSpace(show(w)); gs != ws {
			t.Errorf("got  %s\nwant %s", gs, ws)
		}
	}
}
