package erofsfmt

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/backend/kmount"
	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// A badExtent is a file whose byte off cannot be mapped.
type badExtent struct {
	name   string
	layout int
	size   uint64
	big    bool // the image announces big pclusters
	body   []byte
	off    int64
	want   error
	linux  unix.Errno // 0: some kernels read something there
}

func badExtents() []badExtent {
	entries := func(advise uint16, algs, bits uint8, vs ...any) []byte {
		return join(mapHeader(full, 0, advise, algs, bits), le(vs...))
	}
	one := []any{fHead1, uint16(0), uint32(1)}
	return []badExtent{
		{"inline data across a block", ondisk.LayoutInline, 3000, false, nil, 0, ErrCorrupt, unix.EUCLEAN},
		// Past the end of a file that it has mounted the kernel may read zeros.
		{"chunk table past the end", ondisk.LayoutChunk, 1 << 40, false, nil, 1<<40 - 1, io.ErrUnexpectedEOF, 0},
		{"index past the end", full, 1 << 40, false, entries(0, 0, 0), 1<<40 - 1, io.ErrUnexpectedEOF, 0},
		{"head inside lcluster 0", full, k4, false, entries(0, 0, 0, fHead1, uint16(9), uint32(1)), 0, ErrCorrupt, unix.EUCLEAN},
		{"head past its lcluster", full, k4, false, entries(0, 0, 0, fHead1, uint16(4096), uint32(1)), 0, ErrCorrupt, unix.EUCLEAN},
		{"distance 0", full, 2 * k4, false, entries(0, 0, 0, fHead1, uint16(0), uint32(1), fNonhead, uint16(0), uint16(0), uint16(1)), k4, ErrCorrupt, unix.EUCLEAN},
		{"distance 0 on the way", full, 3 * k4, false,
			entries(0, 0, 0, fHead1, uint16(0), uint32(1), fNonhead, uint16(0), uint16(0), uint16(1), fNonhead, uint16(0), uint16(1), uint16(1)), 2 * k4, ErrCorrupt, unix.EUCLEAN},
		{"distance beyond the beginning", full, 2 * k4, false,
			entries(0, 0, 0, fHead1, uint16(0), uint32(1), fNonhead, uint16(0), uint16(2), uint16(1)), k4, ErrCorrupt, unix.EUCLEAN},
		{"block count without big pclusters", full, 2 * k4, false,
			entries(0, 0, 0, fHead1, uint16(0), uint32(1), fNonhead, uint16(0), uint16(cblk|1), uint16(1)), k4, ErrCorrupt, unix.EUCLEAN},
		{"distance 2 after a big head", full, 2 * k4, true,
			entries(ondisk.AdviseBigPcluster1, 0, 0, fHead1, uint16(0), uint32(1), fNonhead, uint16(0), uint16(2), uint16(1)), 0, ErrCorrupt, unix.EUCLEAN},
		{"big pclusters not announced", full, k4, false, entries(ondisk.AdviseBigPcluster1, 0, 0, one...), 0, ErrCorrupt, unix.EUCLEAN},
		{"compact with one big head", compact, k4, true, mapHeader(compact, 0, ondisk.AdviseBigPcluster1, 0, 0), 0, ErrCorrupt, unix.EUCLEAN},
		{"compact pack that counts nothing", compact, 2 * k4, true,
			join(mapHeader(compact, 0, ondisk.AdviseBigPcluster1|ondisk.AdviseBigPcluster2, 0, 0), pack(16, 12, 1, nonhead(1), head(0))), k4, ErrCorrupt, unix.EUCLEAN},
		{"compact block count without big pclusters", compact, 2 * k4, false,
			join(mapHeader(compact, 0, 0, 0, 0), pack(16, 12, 1, head(0), nonhead(cblk|1))), k4, ErrCorrupt, unix.EUCLEAN},
		{"lclusters too large for a compact index", compact, k4, false, mapHeader(compact, 0, 0, 0, 3), 0, ErrUnsupported, unix.EINVAL},
		{"algorithm not announced", full, k4, false, entries(0, ondisk.AlgZstd, 0, one...), 0, ErrCorrupt, unix.EUCLEAN},
		{"algorithm 9", full, k4, false, entries(0, 9, 0, one...), 0, ErrUnsupported, unix.EOPNOTSUPP},
		{"too little plain data", full, 2 * k4, false,
			entries(0, 0, 0, fPlain, uint16(0), uint32(1), fNonhead, uint16(0), uint16(1), uint16(1)), k4, ErrCorrupt, unix.EUCLEAN},
		{"compressed to more", full, 3 * k4, false, entries(0, 0, 0,
			fHead1, uint16(0), uint32(1), fHead1, uint16(1), uint32(2), fHead1, uint16(0), uint32(3)), k4 + 1, ErrCorrupt, 0},
		{"inline pcluster across a block", full, k4, false,
			join(mapHeader(full, 4000<<16, ondisk.AdviseInline, 0, 0), le(one...)), 0, ErrCorrupt, unix.EUCLEAN},
		{"no block count after a big head", full, 2 * k4, true,
			entries(ondisk.AdviseBigPcluster1, 0, 0, fHead1, uint16(0), uint32(1), fNonhead, uint16(0), uint16(1), uint16(1)), 0, ErrCorrupt, 0},
		{"pcluster of 2 MiB", full, 1 << 24, false, entries(ondisk.AdviseExtents|1<<1, 0, 11, uint32(1<<28|0x1fffff), uint32(0)), 0, ErrUnsupported, unix.EOPNOTSUPP},
		{"extent of 16 MiB", full, 1 << 24, false, entries(ondisk.AdviseExtents|1<<1, 0, 12, uint32(1<<28|5), uint32(0)), 0, ErrUnsupported, unix.EOPNOTSUPP},
	}
}

func (c *badExtent) fake() *fake {
	f := newFake(c.layout, c.size)
	f.super.FeatureIncompat, f.super.ComprAlgs = ondisk.IncompatLz4ZeroPadding, 1<<ondisk.AlgLz4
	if c.big {
		f.super.FeatureIncompat |= ondisk.IncompatBigPcluster
		f.more[ondisk.SuperOffset+ondisk.SuperSize] = le(uint16(14), [14]byte{})
	}
	f.inode.U = 1
	if c.layout == ondisk.LayoutChunk {
		f.super.FeatureIncompat |= ondisk.IncompatChunkedFile
		f.inode.U = 0
	}
	f.body = c.body
	return f
}

// What cannot be mapped is refused with a reason.
func TestExtentAtRefuses(t *testing.T) {
	for _, c := range badExtents() {
		t.Run(c.name, func(t *testing.T) {
			im, ino := c.fake().open(t, Options{})
			m := im.mapper(ino)
			e, err := m.extentAt(context.Background(), c.off)
			if !errors.Is(err, c.want) {
				t.Errorf("%+v, %v; want %v", e, err, c.want)
			}
			var fe *FormatError
			if !errors.As(err, &fe) {
				t.Errorf("%T is not a FormatError", err)
			}
		})
	}
}

// The kernel refuses the same, by FIEMAP(2), which says why; read(2) says EIO.
func TestKernelRefusesExtents(t *testing.T) {
	require.Has(t, "root", "kernel-erofs", "loop")
	for _, c := range badExtents() {
		if c.linux == 0 || !strict(t) {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			dir, file := t.TempDir(), c.fake().image(t).write(t, t.TempDir())
			if _, err := kmount.MountFile(file, dir, kmount.Options{}); err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := unix.Unmount(dir, 0); err != nil {
					t.Error(err)
				}
			}()
			f, err := os.Open(filepath.Join(dir, "f"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := mapOf(f, c.off); err != c.linux {
				t.Errorf("%v, want %v", err, c.linux)
			}
			if n, err := f.ReadAt(make([]byte, 1), c.off); err == nil {
				t.Errorf("%d bytes were read", n)
			}
		})
	}
}

// strict says whether the kernel is one that makes all of these checks.
func strict(t testing.TB) bool {
	v := kernelVersion(t)
	return v[0] > 6 || v[0] == 6 && v[1] >= 17
}

// mapOf asks the kernel where a byte of a file is.
func mapOf(f *os.File, off int64) error {
	const fsIocFiemap = 0xc020660b
	ask := struct {
		start, length                   uint64
		flags, mapped, extents, reserve uint32
		extent                          [56]byte
	}{start: uint64(off), length: 1, extents: 1}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsIocFiemap, uintptr(unsafe.Pointer(&ask)))
	if errno != 0 {
		return errno
	}
	return nil
}

// A badImage is one that cannot be opened, or not walked through.
type badImage struct {
	name  string
	fake  *fake
	want  error
	linux unix.Errno // 0: some kernels show something there
}

// bad makes one of an image with a file of ten bytes.
func bad(name string, want error, linux unix.Errno, edit func(f *fake)) badImage {
	f := newFake(ondisk.LayoutInline, 10)
	f.body = pattern(10, 1)
	edit(f)
	return badImage{name, f, want, linux}
}

func badImages(t testing.TB) []badImage {
	return slices.Concat(badSupers(), badInodes(), badData(t))
}

func badSupers() []badImage {
	return []badImage{
		bad("an unknown incompatible feature", ErrUnsupported, unix.EINVAL, func(f *fake) { f.super.FeatureIncompat = 1 << 9 }),
		bad("large directory blocks", ErrUnsupported, unix.EINVAL, func(f *fake) { f.super.DirBlkBits = 1 }),
		bad("a superblock longer than a block", ErrCorrupt, unix.EINVAL, func(f *fake) { f.super.ExtSlots = 200 }),
		bad("a wrong checksum", ErrCorrupt, unix.EBADMSG, func(f *fake) { f.super.FeatureCompat = ondisk.CompatSbChksum }),
		bad("a root that is a file", ErrCorrupt, unix.EINVAL, func(f *fake) { f.super.RootNid2b = fakeFile }),
		bad("an unknown algorithm", ErrUnsupported, unix.EOPNOTSUPP, func(f *fake) {
			f.super.FeatureIncompat, f.super.ComprAlgs = ondisk.IncompatComprCfgs, 16
		}),
		bad("a zstd window of 2 MiB", ErrUnsupported, unix.EINVAL, func(f *fake) {
			f.announce(ondisk.AlgZstd)
			f.more[ondisk.SuperOffset+ondisk.SuperSize] = le(uint16(6), [6]byte{0, 11})
		}),
		bad("an lzma dictionary of 16 MiB", ErrCorrupt, unix.EINVAL, func(f *fake) {
			f.announce(ondisk.AlgLzma)
			f.more[ondisk.SuperOffset+ondisk.SuperSize] = le(uint16(14), uint32(16<<20), [10]byte{})
		}),
		bad("a metabox without a place", ErrCorrupt, unix.EUCLEAN, func(f *fake) { f.super.FeatureIncompat = ondisk.IncompatMetabox }),
	}
}

func badInodes() []badImage {
	dir := func(edit func(b []byte)) func(*fake) {
		return func(f *fake) {
			b := dirBytes("", ".", fakeFile, "..", fakeRoot, "a", fakeFile)
			f.inode.Mode, f.inode.Size, f.body = modeDir|0o755, uint64(len(b)), b
			edit(b)
		}
	}
	xattrs := func(shared byte, body []byte) func(*fake) {
		return func(f *fake) { *f = *withXattrs(shared, body) }
	}
	return []badImage{
		bad("inode format bits", ErrUnsupported, unix.EOPNOTSUPP, func(f *fake) { f.inode.Format |= 1 << 5 }),
		bad("a data layout", ErrUnsupported, unix.EOPNOTSUPP, func(f *fake) { f.inode.Format = 1 | 5<<1 }),
		bad("no file type", ErrCorrupt, unix.EUCLEAN, func(f *fake) { f.inode.Mode = 0o644 }),
		bad("a negative size", ErrCorrupt, unix.EUCLEAN, func(f *fake) { f.inode.Size = 1 << 63 }),
		bad("chunk format bits", ErrUnsupported, unix.EOPNOTSUPP, func(f *fake) { f.inode.Format, f.inode.U = 1|4<<1, 0x80 }),
		bad("compressed without an algorithm", ErrCorrupt, 0, func(f *fake) { f.inode.Format = 1 | 1<<1 }),
		bad("the first name in the entries", ErrCorrupt, unix.EUCLEAN, dir(func(b []byte) { b[8] = 11 })),
		bad("the first name past the block", ErrCorrupt, unix.EUCLEAN, dir(func(b []byte) { b[9] = 0xf0 })),
		bad("a name past the end", ErrCorrupt, unix.EUCLEAN, dir(func(b []byte) { b[32] = 200 })),
		bad("names in the wrong order", ErrCorrupt, unix.EUCLEAN, dir(func(b []byte) { b[20] = 35 })),
		bad("an empty name", ErrCorrupt, unix.EUCLEAN, dir(func(b []byte) { b[39] = 0 })),
		bad("a slash in a name", ErrCorrupt, unix.EIO, dir(func(b []byte) { b[39] = '/' })),
		bad("xattrs of nothing", ErrUnsupported, unix.EOPNOTSUPP, xattrs(0, nil)),
		bad("an xattr past the end", ErrCorrupt, unix.EUCLEAN, xattrs(0, join([]byte{1, 1, 200, 0}, []byte("a123")))),
		bad("too many shared xattrs", ErrCorrupt, 0, xattrs(9, make([]byte, 8))),
	}
}

func badData(t testing.TB) []badImage {
	return []badImage{
		bad("a device that is none", ErrCorrupt, unix.ENODEV, func(f *fake) {
			*f = *newFake(ondisk.LayoutChunk, k4)
			f.super.FeatureIncompat = ondisk.IncompatChunkedFile | ondisk.IncompatDeviceTable
			f.super.ExtraDevices, f.super.DevtSlotOff = 2, 22
			f.more[22*128] = le(&ondisk.Device{BlocksLo: 2, UniaddrLo: 1}, &ondisk.Device{BlocksLo: 2, UniaddrLo: 3})
			f.inode.U, f.body = ondisk.ChunkIndexes, le(uint16(0), uint16(3), uint32(0))
		}),
		// Linux 6.18 waits for itself forever.
		bad("a fragment of the packed inode itself", ErrCorrupt, 0, func(f *fake) {
			*f = *newFake(full, 100)
			f.announce(ondisk.AlgLz4)
			f.super.FeatureIncompat |= ondisk.IncompatFragments
			f.super.PackedNid, f.body = fakeFile, le(uint64(1<<63))
		}),
		bad("a fragment where there is no packed inode", ErrCorrupt, unix.EUCLEAN, func(f *fake) {
			*f = *newFake(full, 100)
			f.announce(ondisk.AlgLz4)
			f.super.FeatureIncompat |= ondisk.IncompatFragments
			f.body = le(uint64(1 << 63))
		}),
		bad("a pcluster of zeros", ErrCorrupt, unix.EUCLEAN, func(f *fake) {
			*f = *newFake(full, 100)
			f.announce(ondisk.AlgLz4)
			f.inode.U, f.body, f.blocks[5] = 1, join(mapHeader(full, 0, 0, 0, 0), le(fHead1, uint16(0), uint32(5))), make([]byte, k4)
		}),
		bad("a pcluster cut off", ErrCorrupt, unix.EUCLEAN, func(f *fake) {
			*f = *zipped(t, text(50000, 3), true)
			clear(f.blocks[12][2000:])
		}),
	}
}

// Nothing of what the kernel refuses is read without an error.
func TestRefuses(t *testing.T) {
	for _, c := range badImages(t) {
		t.Run(c.name, func(t *testing.T) {
			if err := walkAll(c.fake.image(t)); !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
}

func TestKernelRefuses(t *testing.T) {
	require.Has(t, "root", "kernel-erofs", "loop")
	for _, c := range badImages(t) {
		if c.linux == 0 || !strict(t) {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			dir, file := t.TempDir(), c.fake.image(t).write(t, t.TempDir())
			_, err := kmount.MountFile(file, dir, kmount.Options{})
			if err == nil {
				if _, err = tree.Walk(dir); err == nil { // which takes EOPNOTSUPP for no xattrs
					_, err = unix.Llistxattr(filepath.Join(dir, "f"), nil)
				}
				if err := unix.Unmount(dir, 0); err != nil {
					t.Error(err)
				}
			}
			if !errors.Is(err, c.linux) {
				t.Errorf("%v, want %v", err, c.linux)
			}
		})
	}
}

// walkAll reads all that there is, up to the first error.
func walkAll(src ReaderAt) error {
	ctx := context.Background()
	im, err := Open(ctx, src)
	if err != nil {
		return err
	}
	var walk func(nid Nid) error
	walk = func(nid Nid) error {
		ino, err := im.Inode(ctx, nid)
		if err != nil {
			return err
		}
		names, err := im.Xattrs(ctx, &ino)
		for _, n := range names {
			if err == nil {
				_, err = im.Xattr(ctx, &ino, n)
			}
		}
		if err != nil {
			return err
		}
		if !ino.IsDir() {
			return im.ReadFile(ctx, &ino, make([]byte, ino.Size), 0)
		}
		var below []Nid
		err = im.ReadDir(ctx, &ino, 0, func(e Dirent) bool {
			if e.Nid != nid && e.Nid != im.Root() {
				below = append(below, e.Nid)
			}
			return true
		})
		for _, n := range below {
			if err == nil {
				err = walk(n)
			}
		}
		return err
	}
	return walk(im.Root())
}
