package fusefs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"strings"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
)

// failing is a source of n bytes that cannot be read.
type failing struct {
	n   int64
	err error
}

func (f failing) Size() int64                                 { return f.n }
func (f failing) ReadAt(context.Context, []byte, int64) error { return f.err }

func TestBlobLookup(t *testing.T) {
	files := newBlobFiles(t.Context(), backend.Volume{
		Primary: sourcetest.Memory(make([]byte, 513)),
		Devices: []backend.Source{sourcetest.Memory(nil), failing{n: 1 << 40}},
	}, nil)
	for name, want := range map[string]struct {
		node, size, blocks uint64
		st                 fuse.Status
	}{
		"erofs-oci.blob":     {2, 513, 2, fuse.OK},
		"erofs-oci.device1":  {3, 0, 0, fuse.OK},
		"erofs-oci.device2":  {4, 1 << 40, 1 << 31, fuse.OK},
		"erofs-oci.device3":  {st: fuse.ENOENT},
		"erofs-oci.device0":  {st: fuse.ENOENT},
		"erofs-oci.device01": {st: fuse.ENOENT},
		"":                   {st: fuse.ENOENT},
		"..":                 {st: fuse.ENOENT},
	} {
		var out fuse.EntryOut
		st := files.Lookup(nil, &fuse.InHeader{NodeId: rootNode}, name, &out)
		if st != want.st || out.NodeId != want.node || out.Size != want.size || out.Blocks != want.blocks {
			t.Errorf("%q: %v, %+v; want %+v", name, st, out, want)
		}
		if st == fuse.OK && (out.Mode != syscall.S_IFREG|0o400 || out.Nlink != 1) {
			t.Errorf("%q: mode %#o, %d links", name, out.Mode, out.Nlink)
		}
	}
	for node, want := range map[uint64]struct {
		st   fuse.Status
		mode uint32
	}{
		1: {fuse.OK, syscall.S_IFDIR | 0o500}, 2: {fuse.OK, syscall.S_IFREG | 0o400},
		0: {st: fuse.ENOENT}, 5: {st: fuse.ENOENT}, math.MaxUint64: {st: fuse.ENOENT},
	} {
		var out fuse.AttrOut
		in := fuse.GetAttrIn{InHeader: fuse.InHeader{NodeId: node}}
		if st := files.GetAttr(nil, &in, &out); st != want.st || out.Mode != want.mode {
			t.Errorf("node %d: %v, mode %#o, want %+v", node, st, out.Mode, want)
		}
	}
}

func TestBlobRead(t *testing.T) {
	content := sourcetest.Content(10_000)
	files := newBlobFiles(t.Context(), backend.Volume{Primary: sourcetest.Memory(content)}, nil)
	for _, c := range []struct {
		node, off uint64
		n, buf    int
		from, to  int // of content
		st        fuse.Status
	}{
		{node: 2, off: 0, n: 4096, buf: 4096, from: 0, to: 4096},
		{node: 2, off: 8192, n: 4096, buf: 4096, from: 8192, to: 10_000},
		{node: 2, off: 9_999, n: 1, buf: 4096, from: 9_999, to: 10_000},
		{node: 2, off: 0, n: 4096, buf: 100, from: 0, to: 100},
		{node: 2, off: 10_000, n: 4096, buf: 4096},
		{node: 2, off: 1 << 62, n: 4096, buf: 4096},
		{node: 2, off: math.MaxUint64, n: 4096, buf: 4096},
		{node: 3, n: 1, buf: 1, st: fuse.ENOENT},
		{node: 1, n: 1, buf: 1, st: fuse.ENOENT},
	} {
		in := fuse.ReadIn{InHeader: fuse.InHeader{NodeId: c.node}, Offset: c.off, Size: uint32(c.n)}
		result, st := files.Read(nil, &in, make([]byte, c.buf))
		if st != c.st {
			t.Errorf("%+v: %v", c, st)
		}
		if st != fuse.OK {
			continue
		}
		got, st := result.Bytes(nil)
		if st != fuse.OK || !bytes.Equal(got, content[c.from:c.to]) {
			t.Errorf("%+v: %v, %d bytes", c, st, len(got))
		}
	}
}

// TestBlobErrors: whatever a source says is EIO, and its reason is logged unless
// the mount has ended.
func TestBlobErrors(t *testing.T) {
	for _, err := range []error{errors.New("the registry answered 503"), fmt.Errorf("gone: %w", fs.ErrNotExist), context.DeadlineExceeded, context.Canceled} {
		for _, ended := range []bool{false, true} {
			ctx, cancel := context.WithCancel(t.Context())
			if ended {
				cancel()
			}
			var said strings.Builder
			files := newBlobFiles(ctx, backend.Volume{Primary: failing{10_000, err}}, slog.New(slog.NewTextHandler(&said, nil)))
			in := fuse.ReadIn{InHeader: fuse.InHeader{NodeId: firstBlob}, Size: 4096}
			if result, st := files.Read(nil, &in, make([]byte, 4096)); st != fuse.EIO || result != nil {
				t.Errorf("%v: %v, %v", err, result, st)
			}
			quiet := ended && errors.Is(err, context.Canceled)
			told := strings.Contains(said.String(), err.Error()) && strings.Contains(said.String(), "file=erofs-oci.blob")
			if told == quiet {
				t.Errorf("%v, ended %v: logged %q", err, ended, said.String())
			}
			cancel()
		}
	}
}
