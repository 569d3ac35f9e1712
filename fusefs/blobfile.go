package fusefs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/erofs-oci/erofs-oci/backend"
)

// blobFiles is a file system of one directory with a file for each source of a
// volume:
//
//	node 1          the directory
//	node 2  blob    the image
//	node 3  device1 the first extra device, and so on
//
// The kernel's EROFS is its only reader. It knows the names, so the directory
// cannot be listed. The bytes cannot change, so names and attributes are valid
// for ever.
//
// Each file says that it is endless, and answers EIO past the end of its source:
// of a file that ends the kernel makes zeros there, without an error (fs/fuse/file.c
// fuse_short_read, fs/erofs/fileio.c erofs_fileio_ki_complete). For the same reason
// no answer is ever short.
type blobFiles struct {
	fuse.RawFileSystem
	// ctx is the life of the mount.
	ctx     context.Context
	sources []backend.Source
	log     *slog.Logger
	failed  failures
	// whole says that no block of the image lies across the end of a source. Then
	// what a page holds past it is nobody's.
	whole bool
}

// firstBlob is the node id of the first source.
const firstBlob = rootNode + 1

// endless is the size of the files: the largest multiple of any page that a file
// can have. No block address of an image comes near it.
const endless = math.MaxInt64 &^ (1<<16 - 1)

func newBlobFiles(ctx context.Context, v backend.Volume, whole bool, log *slog.Logger) *blobFiles {
	return &blobFiles{
		RawFileSystem: fuse.NewDefaultRawFileSystem(),
		ctx:           ctx,
		sources:       append([]backend.Source{v.Primary}, v.Devices...),
		log:           orNone(log),
		whole:         whole,
	}
}

// blobName is the name of source i. It ends up in /proc/mounts, and says there
// whose mount it is.
func blobName(i int) string {
	if i == 0 {
		return "erofs-oci.blob"
	}
	return fmt.Sprintf("erofs-oci.device%d", i)
}

func (f *blobFiles) String() string { return "erofs-oci blob" }

func (f *blobFiles) Lookup(_ <-chan struct{}, header *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	for i := range f.sources {
		if name == blobName(i) {
			out.NodeId, out.Generation = uint64(firstBlob+i), 1
			out.EntryValid, out.AttrValid = forever, forever
			return f.attr(out.NodeId, &out.Attr)
		}
	}
	return fuse.ENOENT
}

func (f *blobFiles) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	out.AttrValid = forever
	return f.attr(in.NodeId, &out.Attr)
}

func (f *blobFiles) attr(node uint64, a *fuse.Attr) fuse.Status {
	if node == rootNode {
		*a = fuse.Attr{Ino: node, Mode: syscall.S_IFDIR | 0o500, Nlink: 2}
		return fuse.OK
	}
	s, st := f.source(node)
	if st.Ok() {
		*a = fuse.Attr{Ino: node, Mode: syscall.S_IFREG | 0o400, Nlink: 1, Size: endless, Blocks: sectors(s) / sectorSize, Blksize: 4096}
	}
	return st
}

func (f *blobFiles) source(node uint64) (backend.Source, fuse.Status) {
	i := node - firstBlob
	if i >= uint64(len(f.sources)) {
		return nil, fuse.ENOENT
	}
	return f.sources[i], fuse.OK
}

// Open has file data go around the page cache: the kernel's EROFS keeps it in
// its own. Its metadata alone is kept here, and nowhere else.
func (f *blobFiles) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	out.OpenFlags = fuse.FOPEN_DIRECT_IO | fuse.FOPEN_KEEP_CACHE
	return fuse.OK
}

func (f *blobFiles) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	s, st := f.source(in.NodeId)
	if !st.Ok() {
		return nil, st
	}
	size, asked := uint64(s.Size()), uint64(in.Size)
	if limit := f.limit(in, s); in.Offset >= size || asked > limit-in.Offset || asked > uint64(len(buf)) {
		return nil, f.fail(in, fmt.Errorf("the image leads to %d bytes at %d, and the blob ends after %d", asked, in.Offset, size))
	}
	buf = buf[:asked]
	there := buf[:min(asked, size-in.Offset)]
	if err := s.ReadAt(f.ctx, there, int64(in.Offset)); err != nil {
		return nil, f.fail(in, err)
	}
	clear(buf[len(there):])
	return fuse.ReadResultData(buf), fuse.OK
}

// sectorSize is the least that a loop device asks for, and an EROFS block has.
const sectorSize = 512

// sectors is the size of a source in whole sectors, in bytes.
func sectors(s backend.Source) uint64 { return roundUp(s.Size(), sectorSize) }

func roundUp(n int64, unit int) uint64 {
	u := uint64(unit)
	return (uint64(n) + u - 1) / u * u
}

// limit is where what can be had for a request ends. Metadata comes in pages, of
// which the last may have blocks of the image and an end of nothing. Data is asked
// for as it lies, and then the kernel names the owner of locks
// (fs/fuse/file.c fuse_direct_io).
func (f *blobFiles) limit(in *fuse.ReadIn, s backend.Source) uint64 {
	switch {
	case !f.whole:
		return uint64(s.Size())
	case in.ReadFlags&fuse.READ_LOCKOWNER != 0:
		return sectors(s)
	}
	return roundUp(s.Size(), os.Getpagesize())
}

// fail makes EIO of every error: a source knows of no other.
func (f *blobFiles) fail(in *fuse.ReadIn, err error) fuse.Status {
	if f.ctx.Err() == nil || !errors.Is(err, context.Canceled) {
		f.failed.note(syscall.EIO)
		logFailure(f.log, "read", syscall.EIO, err, "file", blobName(int(in.NodeId-firstBlob)), "offset", in.Offset, "bytes", in.Size)
	}
	return fuse.EIO
}

// Flush has nothing to do, ever: ENOSYS spares close(2) the request.
func (f *blobFiles) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.ENOSYS }
