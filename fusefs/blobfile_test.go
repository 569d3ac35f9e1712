package fusefs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
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
	}, true, nil)
	const unbounded = 0x7fff_ffff_ffff_0000
	for name, want := range map[string]struct {
		node, size, blocks uint64
		st                 fuse.Status
	}{
		"erofs-oci.blob":     {2, unbounded, 2, fuse.OK},
		"erofs-oci.device1":  {3, unbounded, 0, fuse.OK},
		"erofs-oci.device2":  {4, unbounded, 1 << 31, fuse.OK},
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

// TestBlobRead: whole answers or none. What is asked for past the end is an error,
// but for what a page or a sector holds beside blocks of the image.
func TestBlobRead(t *testing.T) {
	page := os.Getpagesize()
	size := 3*page - 700 // in the middle of a sector
	content := sourcetest.Content(size)
	padded := append(slices.Clone(content), make([]byte, page)...)
	const data = fuse.READ_LOCKOWNER // as the kernel asks for file data
	for _, c := range []struct {
		name   string
		node   uint64
		off    int
		n, buf int
		flags  uint32
		torn   bool // a block of the image may lie across the end
		st     fuse.Status
	}{
		{name: "begin", node: 2, n: page},
		{name: "begin of data", node: 2, n: page, flags: data},
		{name: "middle", node: 2, off: page + 1, n: 5},
		{name: "last page", node: 2, off: 2 * page, n: page},
		{name: "all pages", node: 2, n: 3 * page},
		{name: "last byte", node: 2, off: size - 1, n: 1},
		{name: "last sector", node: 2, off: 3*page - 1024, n: 512, flags: data},
		{name: "sectors to the end", node: 2, off: page, n: 2*page - 512, flags: data},
		{name: "data past the last sector", node: 2, off: 2 * page, n: page, flags: data, st: fuse.EIO},
		{name: "data past the end", node: 2, off: 3*page - 512, n: 512, flags: data, st: fuse.EIO},
		{name: "a page too many", node: 2, off: page, n: 3 * page, st: fuse.EIO},
		{name: "at the end", node: 2, off: size, n: 1, st: fuse.EIO},
		{name: "next page", node: 2, off: 3 * page, n: page, st: fuse.EIO},
		{name: "torn, to the end", node: 2, off: page, n: size - page, torn: true},
		{name: "torn, last page", node: 2, off: 2 * page, n: page, torn: true, st: fuse.EIO},
		{name: "torn, last sector", node: 2, off: 3*page - 1024, n: 512, flags: data, torn: true, st: fuse.EIO},
		{name: "far", node: 2, off: 1 << 62, n: page, st: fuse.EIO},
		{name: "farthest", node: 2, off: -1, n: page, st: fuse.EIO},
		{name: "small buffer", node: 2, n: page, buf: 100, st: fuse.EIO},
		{name: "empty device", node: 3, n: page, st: fuse.EIO},
		{name: "no device", node: 4, n: 1, st: fuse.ENOENT},
		{name: "directory", node: 1, n: 1, st: fuse.ENOENT},
	} {
		t.Run(c.name, func(t *testing.T) {
			files := newBlobFiles(t.Context(), backend.Volume{
				Primary: sourcetest.Memory(content), Devices: []backend.Source{sourcetest.Memory(nil)},
			}, !c.torn, nil)
			buf := slices.Repeat([]byte{0xaa}, max(c.buf, c.n))
			if c.buf > 0 {
				buf = buf[:c.buf]
			}
			in := fuse.ReadIn{InHeader: fuse.InHeader{NodeId: c.node}, Offset: uint64(c.off), Size: uint32(c.n), ReadFlags: c.flags}
			result, st := files.Read(nil, &in, buf)
			if st != c.st {
				t.Fatalf("%v, want %v", st, c.st)
			}
			if st != fuse.OK {
				return
			}
			got, st := result.Bytes(nil)
			if st != fuse.OK || !bytes.Equal(got, padded[c.off:c.off+c.n]) {
				t.Errorf("%v, %d bytes", st, len(got))
			}
		})
	}
}

// TestCheckWhole: a block that lies across the end of a blob is noticed, or not
// ruled out.
func TestCheckWhole(t *testing.T) {
	plain, multi := corpus.Get(t, "plain").Data, corpus.Get(t, "multidev")
	patched := func(off int, v uint32) []byte {
		b := slices.Clone(plain)
		b[1024+8] &^= 1 // no checksum
		binary.LittleEndian.PutUint32(b[1024+off:], v)
		return b
	}
	const blocks, incompatible = 0x24, 0x50
	silent := patched(blocks, 0)
	for name, c := range map[string]struct {
		image, device []byte
		whole         bool
		err           string
	}{
		"whole":                   {image: plain, whole: true},
		"more follows":            {image: append(slices.Clone(plain), 1), whole: true},
		"of unsaid length":        {image: silent, whole: true},
		"of unsaid length, torn":  {image: silent[:len(silent)-1]},
		"not known here":          {image: patched(incompatible, 1<<31)},
		"cut off":                 {image: plain[:len(plain)-1], err: "was cut off"},
		"with a device":           {image: multi.Data, device: multi.Blob, whole: true},
		"with a device, and more": {image: multi.Data, device: append(slices.Clone(multi.Blob), 1), whole: true},
		"device cut off":          {image: multi.Data, device: multi.Blob[:len(multi.Blob)-1], err: "device 1"},
	} {
		v := backend.Volume{Primary: sourcetest.Memory(c.image)}
		if c.device != nil {
			v.Devices = []backend.Source{sourcetest.Memory(c.device)}
		}
		whole, err := CheckVolume(t.Context(), v)
		if whole != c.whole || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %v, %v; want %v, %q", name, whole, err, c.whole, c.err)
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
			files := newBlobFiles(ctx, backend.Volume{Primary: failing{10_000, err}}, true, slog.New(slog.NewTextHandler(&said, nil)))
			failed := 0
			files.failed = func(errno syscall.Errno) {
				if errno == syscall.EIO {
					failed++
				}
			}
			in := fuse.ReadIn{InHeader: fuse.InHeader{NodeId: firstBlob}, Size: 4096}
			if result, st := files.Read(nil, &in, make([]byte, 4096)); st != fuse.EIO || result != nil {
				t.Errorf("%v: %v, %v", err, result, st)
			}
			quiet := ended && errors.Is(err, context.Canceled)
			told := strings.Contains(said.String(), err.Error()) && strings.Contains(said.String(), "file=erofs-oci.blob")
			if counted := failed == 1; counted == quiet || failed > 1 {
				t.Errorf("%v, ended %v: counted %d times", err, ended, failed)
			}
			if told == quiet {
				t.Errorf("%v, ended %v: logged %q", err, ended, said.String())
			}
			cancel()
		}
	}
}
