package fusefs

import (
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// GetXAttr is asked each time, for images without extended attributes, too. ENOSYS
// would have the kernel never ask again, but the format does not say that no inode
// has any; and listxattr(2) would fail with EOPNOTSUPP from then on, where the
// kernel's erofs lists nothing. ACLs the kernel remembers.
func (f *fileSystem) GetXAttr(cancel <-chan struct{}, header *fuse.InHeader, name string, dest []byte) (uint32, fuse.Status) {
	ctx := f.begin(cancel, header)
	defer f.finish(ctx)
	ino, err := f.inode(ctx, header.NodeId)
	if err != nil {
		return 0, f.fail(ctx, "getxattr", header.NodeId, err)
	}
	value, err := f.im.Xattr(ctx, &ino, name)
	if err != nil {
		return 0, f.fail(ctx, "getxattr", header.NodeId, err)
	}
	return fit(dest, value)
}

func (f *fileSystem) ListXAttr(cancel <-chan struct{}, header *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	ctx := f.begin(cancel, header)
	defer f.finish(ctx)
	ino, err := f.inode(ctx, header.NodeId)
	if err != nil {
		return 0, f.fail(ctx, "listxattr", header.NodeId, err)
	}
	names, err := f.im.Xattrs(ctx, &ino)
	if err != nil {
		return 0, f.fail(ctx, "listxattr", header.NodeId, err)
	}
	var list []byte
	for _, n := range names {
		// As on the kernel's erofs, who may not read trusted.* does not see
		// it. FUSE tells the user, not the capability, hence root.
		if strings.HasPrefix(n, "trusted.") && (header.Uid != 0 || !f.trusted) {
			continue
		}
		list = append(append(list, n...), 0)
	}
	return fit(dest, list)
}

// fit copies an answer whose length the caller may only be asking for.
func fit(dest, answer []byte) (uint32, fuse.Status) {
	n := uint32(len(answer))
	if len(dest) < len(answer) {
		return n, fuse.ERANGE
	}
	copy(dest, answer)
	return n, fuse.OK
}
