package erofsfmt

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// A ReaderAt is where an image's bytes come from.
//
// ReadAt fills all of p from off, or returns a non-nil error; there is no
// short read. Calls may run in parallel. p is not kept after the call.
type ReaderAt interface {
	ReadAt(ctx context.Context, p []byte, off int64) error
	Size() int64
}

// Options are how an image is opened. The zero value works.
type Options struct {
	// Devices are the extra devices, in the order of the image's table. Either
	// all of them are given or none: then the image is expected to hold
	// their blocks itself, at each device's Uniaddr.
	Devices []ReaderAt

	// CacheBytes limits what the image remembers of its metadata and of decoded
	// pclusters. 0 means 64 MiB; a negative number means nothing at all.
	CacheBytes int64
}

// An Image is an open EROFS image, or several, laid one over the other (see
// OpenLayers). Its methods may be called in parallel. It remembers no more than
// Options.CacheBytes and has nothing to close.
type Image struct {
	sources  []ReaderAt // the image, then its devices
	sb       Superblock
	decoders [ondisk.AlgCount]decompressor // nil where the image has no such algorithm
	shared
	layer   uint16    // the number of this one among those that share
	union   *union    // of several images: then nothing else here is set but sb
	mappers sync.Pool // of *mapper

	packed   atomic.Pointer[Inode] // set when first needed
	metabox  atomic.Pointer[Inode]
	prefixes atomic.Pointer[[]xattrPrefix]
}

// shared is what the layers of a union have together.
type shared struct {
	pages     *cache // of metadata
	pclusters *cache // decoded
	buffers   *bufferPool
	helpers   chan struct{} // full when as many goroutines as processors decode
}

const defaultCacheBytes = 64 << 20

func newShared(limit int64) shared {
	return shared{
		pages:     newCache(limit / 4),
		pclusters: newCache(limit - limit/4),
		buffers:   &bufferPool{},
		helpers:   make(chan struct{}, runtime.GOMAXPROCS(0)-1),
	}
}

// cacheBytes is CacheBytes, with what 0 stands for.
func (o *Options) cacheBytes() int64 {
	if o.CacheBytes == 0 {
		return defaultCacheBytes
	}
	return o.CacheBytes
}

// Open opens the image in src.
func Open(ctx context.Context, src ReaderAt) (*Image, error) {
	return OpenWith(ctx, src, Options{})
}

// OpenWith opens the image in src. It reads the superblock and the root inode.
func OpenWith(ctx context.Context, src ReaderAt, o Options) (*Image, error) {
	return openImage(ctx, src, o.Devices, newShared(o.cacheBytes()), 0)
}

func openImage(ctx context.Context, src ReaderAt, devices []ReaderAt, with shared, layer uint16) (*Image, error) {
	sb, err := readSuper(ctx, src)
	if err != nil {
		return nil, err
	}
	if n := len(devices); n != 0 && n != len(sb.Devices) {
		return nil, fmt.Errorf("erofs: %d extra devices given, the image has %d: give all of them or none", n, len(sb.Devices))
	}
	im := &Image{sources: append([]ReaderAt{src}, devices...), sb: sb, shared: with, layer: layer}
	if im.decoders, err = newDecompressors(&im.sb, im.buffers); err != nil {
		return nil, err
	}
	root, err := im.Inode(ctx, sb.RootNid)
	if err != nil {
		return nil, fmt.Errorf("root directory: %w", err)
	}
	if !root.IsDir() {
		return nil, im.locate(root.Nid).corrupt("the root, nid %d, is not a directory: mode %#o", root.Nid, root.Mode)
	}
	return im, nil
}

// Super is what the image says of itself.
func (im *Image) Super() Superblock { return im.sb }

// Root is the root directory.
func (im *Image) Root() Nid { return im.sb.RootNid }

// packedInode is the file that holds the tails of other files.
func (im *Image) packedInode(ctx context.Context) (*Inode, error) {
	if !im.sb.incompat(ondisk.IncompatFragments) || im.sb.PackedNid == 0 {
		return nil, nowhere.corrupt("a fragment, but no packed inode")
	}
	return im.specialInode(ctx, &im.packed, im.sb.PackedNid)
}

// metaboxInode is the file that holds inodes, xattrs and indexes in place of
// the metadata area.
func (im *Image) metaboxInode(ctx context.Context) (*Inode, error) {
	if !im.sb.incompat(ondisk.IncompatMetabox) {
		return nil, nowhere.corrupt("a nid of the metabox, but no metabox")
	}
	return im.specialInode(ctx, &im.metabox, im.sb.MetaboxNid)
}

// specialInode loads an inode once. Loading it twice at the same time is
// harmless, and a failure is not remembered.
func (im *Image) specialInode(ctx context.Context, at *atomic.Pointer[Inode], nid Nid) (*Inode, error) {
	if ino := at.Load(); ino != nil {
		return ino, nil
	}
	ino, err := im.Inode(ctx, nid)
	if err != nil {
		return nil, err
	}
	if ino.Mode&modeType != modeReg {
		return nil, im.locate(nid).corrupt("nid %d holds other inodes' data but has mode %#o", nid, ino.Mode)
	}
	at.Store(&ino)
	return &ino, nil
}

// readSource is the only call of ReaderAt.ReadAt. Past the end of a source
// nothing is read: the image is cut off, or the address is wrong.
func readSource(ctx context.Context, src ReaderAt, p []byte, off int64) error {
	if size := src.Size(); off < 0 || off > size-int64(len(p)) {
		return &FormatError{Off: off, What: fmt.Sprintf("%d bytes past the end of a source of %d", len(p), size), Err: io.ErrUnexpectedEOF}
	}
	if err := src.ReadAt(ctx, p, off); err != nil {
		return fmt.Errorf("erofs: read %d bytes at %d: %w", len(p), off, err)
	}
	return nil
}
