// Package fusefs serves an erofsfmt.Image over FUSE.
//
// It translates: a FUSE request to a call of the reader, the reader's answer to
// FUSE's form, an error to an errno (errno.go, the only place). It keeps no
// state for a node or an open file:
//
//   - a FUSE node id is computed from the EROFS nid and back (nodeid.go), so
//     FORGET has nothing to do and memory does not grow with the tree;
//   - OPEN and OPENDIR are answered with ENOSYS where the kernel takes that for
//     "never ask again", so that opening costs no request and the page cache is
//     kept;
//   - a READDIR cookie is the position of an entry, as in the kernel's erofs.
//
// All this holds for an image of several layers, too: the reader shows them as one.
//
// What it does beside answering is to keep the processors busy for who reads from
// front to back (readahead.go, streams.go), and to give the page cache what a
// random read had to decode beside what was asked for (surplus.go).
//
// The image cannot change, so entries and attributes, and names that are not
// there, are valid for ever.
//
// A request is not ended by an interrupt: the runtime of a Go program interrupts
// its own system calls all the time, and a stat(2) must not fail of it. How long
// a request may wait is bounded below, by the source's deadlines. Who is being killed
// does not wait so long (request.go): the kernel would keep it until there is an
// answer. It is looked for when an interrupt comes, among the threads that this
// process sees, and what was being fetched for it goes on for others.
package fusefs

import (
	"context"
	"log/slog"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/erofsfmt"
)

// forever is the validity of entries and attributes, in seconds. The kernel
// takes what exceeds its clock for its clock's end.
const forever = 1 << 32

// nameMax is the longest name that EROFS can hold.
const nameMax = 255

// capNoOpendir is FUSE_NO_OPENDIR_SUPPORT of linux/fuse.h (5.1).
const capNoOpendir = 1 << 24

// fileSystem answers requests. RawFileSystem's default answers ENOSYS to
// whatever is not here.
type fileSystem struct {
	fuse.RawFileSystem
	// ctx is the life of the mount.
	ctx context.Context
	im  *erofsfmt.Image
	sb  erofsfmt.Superblock
	ids nodeIDs
	log *slog.Logger
	// device is the mount.
	device backend.Device
	// streams is set by Init if the kernel does not read far enough ahead.
	streams *streams
	// surplus is set by Init if the kernel takes it.
	surplus *surplus
	// trusted says that root may see trusted.* attributes: root of the first
	// user namespace, the only one that the kernel lets read them.
	trusted bool
	// noOpen and noOpendir are set by Init, before the first request.
	noOpen, noOpendir bool
	// revoking is set if the bytes may turn out to be wrong.
	revoking *revoking
	failed   failures
	requests sync.Pool         // of *request, of which nobody waits
	dying    func(uint32) bool // of the thread that waits for a request
}

func newFileSystem(ctx context.Context, im *erofsfmt.Image, log *slog.Logger) *fileSystem {
	return &fileSystem{
		RawFileSystem: fuse.NewDefaultRawFileSystem(),
		ctx:           ctx,
		im:            im,
		sb:            im.Super(),
		ids:           nodeIDs{root: im.Root()},
		log:           orNone(log),
		dying:         dying,
	}
}

func (f *fileSystem) String() string { return "erofs-oci" }

func (f *fileSystem) Init(s *fuse.Server) {
	flags := s.KernelSettings().Flags64()
	if f.revoking != nil {
		f.revoking.server.Store(s)
	}
	f.noOpen = flags&fuse.CAP_NO_OPEN_SUPPORT != 0
	f.noOpendir = flags&capNoOpendir != 0
	if raiseReadahead(f.device) != nil {
		f.streams = &streams{im: f.im, ctx: f.ctx}
	}
	if s.KernelSettings().SupportsNotify(fuse.NOTIFY_STORE_CACHE) {
		f.surplus = &surplus{store: s.InodeNotifyStoreCache}
	}
}

// end waits for what runs in the background, after ctx has ended.
func (f *fileSystem) end() {
	if f.streams != nil {
		f.streams.wait()
	}
	if f.surplus != nil {
		f.surplus.wait()
	}
}

// inode reads the inode behind a FUSE node id.
func (f *fileSystem) inode(ctx context.Context, node uint64) (erofsfmt.Inode, error) {
	if err := f.revoking.why(); err != nil {
		return erofsfmt.Inode{}, err
	}
	return f.im.Inode(ctx, f.ids.nid(node))
}

func (f *fileSystem) Lookup(cancel <-chan struct{}, header *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	ctx := f.begin(cancel, header)
	defer f.finish(ctx)
	if len(name) > nameMax {
		return fuse.Status(syscall.ENAMETOOLONG)
	}
	dir, err := f.inode(ctx, header.NodeId)
	if err != nil {
		return f.fail(ctx, "lookup", header.NodeId, err)
	}
	nid, err := f.im.Lookup(ctx, &dir, name)
	if isNotExist(err) {
		// Node id 0 with a validity is a negative entry.
		out.NodeId, out.EntryValid = 0, forever
		return fuse.OK
	}
	if err != nil {
		return f.fail(ctx, "lookup", header.NodeId, err)
	}
	ino, err := f.im.Inode(ctx, nid)
	if err != nil {
		return f.fail(ctx, "lookup", header.NodeId, err)
	}
	f.fillEntry(&ino, out)
	return fuse.OK
}

func (f *fileSystem) GetAttr(cancel <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	ctx := f.begin(cancel, &in.InHeader)
	defer f.finish(ctx)
	ino, err := f.inode(ctx, in.NodeId)
	if err != nil {
		return f.fail(ctx, "getattr", in.NodeId, err)
	}
	out.AttrValid = forever
	f.fillAttr(&ino, &out.Attr)
	return fuse.OK
}

func (f *fileSystem) Readlink(cancel <-chan struct{}, header *fuse.InHeader) ([]byte, fuse.Status) {
	ctx := f.begin(cancel, header)
	defer f.finish(ctx)
	ino, err := f.inode(ctx, header.NodeId)
	if err != nil {
		return nil, f.fail(ctx, "readlink", header.NodeId, err)
	}
	f.revoking.note(header.NodeId)
	target, err := f.im.Readlink(ctx, &ino)
	if err != nil {
		return nil, f.fail(ctx, "readlink", header.NodeId, err)
	}
	return []byte(target), fuse.OK
}

func (f *fileSystem) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if f.noOpen {
		return fuse.ENOSYS
	}
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE
	return fuse.OK
}

func (f *fileSystem) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if f.noOpendir {
		return fuse.ENOSYS
	}
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE | fuse.FOPEN_CACHE_DIR
	return fuse.OK
}

func (f *fileSystem) Read(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	ctx := f.begin(cancel, &in.InHeader)
	defer f.finish(ctx)
	ino, err := f.inode(ctx, in.NodeId)
	if err != nil {
		return nil, f.fail(ctx, "read", in.NodeId, err)
	}
	size := uint64(ino.Size)
	if in.Offset >= size {
		return fuse.ReadResultData(nil), fuse.OK
	}
	f.revoking.note(in.NodeId)
	buf = buf[:min(uint64(len(buf)), uint64(in.Size), size-in.Offset)]
	if f.streams != nil && size > uint64(len(buf)) {
		f.streams.saw(&ino, int64(in.Offset), int64(len(buf)))
	}
	err = f.readFile(ctx, in, &ino, buf)
	if err == nil {
		err = f.revoking.why() // since it began
	}
	if err != nil {
		return nil, f.fail(ctx, "read", in.NodeId, err, "offset", in.Offset, "bytes", len(buf))
	}
	return fuse.ReadResultData(buf), fuse.OK
}

func (f *fileSystem) readFile(ctx context.Context, in *fuse.ReadIn, ino *erofsfmt.Inode, buf []byte) error {
	off, n := int64(in.Offset), int64(len(buf))
	if f.surplus == nil || n > surplusRead || n == ino.Size {
		return f.im.ReadFile(ctx, ino, buf, off)
	}
	size, end := ino.Size, off+n
	if begin, stop := f.surplus.around(in.NodeId, size, off, n); begin < stop {
		w, _ := f.surplus.windows.Get().(*[window]byte)
		if w == nil {
			w = new([window]byte)
		}
		data := w[:stop-begin]
		// Where the rest of the window cannot be read, what was asked for may.
		if err := f.im.ReadFile(ctx, ino, data, begin); err == nil {
			copy(buf, data[off-begin:])
			f.surplus.give(in.NodeId, size, off, end, run{begin, data}, func() { f.surplus.windows.Put(w) })
			return nil
		}
	}
	return f.im.ReadFileSurplus(ctx, ino, buf, off, func(d *erofsfmt.Decoded) {
		f.surplus.give(in.NodeId, size, off, end, run{d.Off, d.Data}, d.Release)
	})
}

func (f *fileSystem) StatFs(_ <-chan struct{}, header *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	out.Bsize = uint32(f.sb.BlockSize())
	out.Frsize = out.Bsize
	out.Blocks = f.sb.Blocks
	out.Files = f.sb.Inodes
	out.NameLen = nameMax
	return fuse.OK
}

// Flush has nothing to do, ever: ENOSYS spares close(2) the request.
func (f *fileSystem) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.ENOSYS }

// Access is not asked for: default_permissions lets the kernel decide.
func (f *fileSystem) Access(<-chan struct{}, *fuse.AccessIn) fuse.Status { return fuse.ENOSYS }

func (f *fileSystem) fillEntry(ino *erofsfmt.Inode, out *fuse.EntryOut) {
	out.NodeId = f.ids.node(ino.Nid)
	out.Generation = 1
	out.EntryValid = forever
	out.AttrValid = forever
	f.fillAttr(ino, &out.Attr)
}

// fillAttr shows what the kernel's erofs shows; there is one time for all three.
func (f *fileSystem) fillAttr(ino *erofsfmt.Inode, a *fuse.Attr) {
	*a = fuse.Attr{
		Ino:       ino.Ino,
		Size:      uint64(ino.Size),
		Blocks:    ino.Blocks,
		Atime:     uint64(ino.Mtime),
		Mtime:     uint64(ino.Mtime),
		Ctime:     uint64(ino.Mtime),
		Atimensec: ino.MtimeNsec,
		Mtimensec: ino.MtimeNsec,
		Ctimensec: ino.MtimeNsec,
		Mode:      ino.Mode,
		Nlink:     ino.Nlink,
		Owner:     fuse.Owner{Uid: ino.UID, Gid: ino.GID},
		Rdev:      ino.Rdev,
		Blksize:   uint32(f.sb.BlockSize()),
	}
}
