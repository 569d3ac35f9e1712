package erofsfmt

import (
	"context"
	"fmt"
	"testing"

	"github.com/erofs-oci/erofs-oci/tests/corpus"
)

// memory is an image in memory.
type memory []byte

func (m memory) ReadAt(_ context.Context, p []byte, off int64) error {
	if n := copy(p, m[off:]); n != len(p) {
		return fmt.Errorf("memory: %d of %d bytes", n, len(p))
	}
	return nil
}

func (m memory) Size() int64 { return int64(len(m)) }

func show(e corpus.Entry) string { return fmt.Sprintf("%+v", e) }

// files are the regular files of an image with their content.
func files(t testing.TB, im *Image) map[Nid][]byte {
	t.Helper()
	out := map[Nid][]byte{}
	visit(t, im, func(name string, ino *Inode) {
		if ino.Mode&modeType != modeReg {
			return
		}
		p := make([]byte, ino.Size)
		if err := im.ReadFile(context.Background(), ino, p, 0); err != nil {
			t.Fatalf("%q: %v", name, err)
		}
		out[ino.Nid] = p
	})
	return out
}

// find is the inode at a path of names, which may be any bytes.
func find(t testing.TB, im *Image, names ...string) *Inode {
	t.Helper()
	ctx := context.Background()
	ino, err := im.Inode(ctx, im.Root())
	for _, n := range names {
		if err != nil {
			break
		}
		var nid Nid
		if nid, err = im.Lookup(ctx, &ino, n); err == nil {
			ino, err = im.Inode(ctx, nid)
		}
	}
	if err != nil {
		t.Fatalf("%q: %v", names, err)
	}
	return &ino
}
