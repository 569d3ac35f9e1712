package fusefs

import (
	"context"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
)

func (f *fileSystem) ReadDir(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	ctx := f.begin(cancel, &in.InHeader)
	defer f.finish(ctx)
	return f.readDir(ctx, in, func(e erofsfmt.Dirent) (bool, error) {
		return out.AddDirEntry(f.entry(e)), nil
	})
}

// ReadDirPlus answers with the attributes of each entry, so that listing a
// directory needs no LOOKUP for its files.
func (f *fileSystem) ReadDirPlus(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	ctx := f.begin(cancel, &in.InHeader)
	defer f.finish(ctx)
	return f.readDir(ctx, in, func(e erofsfmt.Dirent) (bool, error) {
		if e.Name == "." || e.Name == ".." {
			// Node id 0 says that the entry is a name only.
			return out.AddDirLookupEntry(f.entry(e)) != nil, nil
		}
		ino, err := f.im.Inode(ctx, e.Nid)
		if err != nil && !isFormatError(err) {
			return false, err
		}
		entry := out.AddDirLookupEntry(f.entry(e))
		if entry == nil {
			return false, nil
		}
		if err == nil {
			f.fillEntry(&ino, entry)
		}
		// An inode that cannot be understood leaves its name listed; the
		// LOOKUP that follows says what is wrong with it.
		return true, nil
	})
}

// readDir feeds the entries from the request's cookie on to add, until add has
// no room. Entries that were added before an error are delivered, and the error
// meets the next request.
func (f *fileSystem) readDir(ctx context.Context, in *fuse.ReadIn, add func(erofsfmt.Dirent) (bool, error)) fuse.Status {
	dir, err := f.inode(ctx, in.NodeId)
	if err != nil {
		return f.fail(ctx, "readdir", in.NodeId, err)
	}
	f.revoking.note(in.NodeId)
	added := 0
	var failed error
	err = f.im.ReadDir(ctx, &dir, int64(in.Offset), func(e erofsfmt.Dirent) bool {
		more, err := add(e)
		if err != nil {
			failed = err
			return false
		}
		if more {
			added++
		}
		return more
	})
	if err == nil {
		err = failed
	}
	if err != nil && added == 0 {
		return f.fail(ctx, "readdir", in.NodeId, err)
	}
	return fuse.OK
}

func (f *fileSystem) entry(e erofsfmt.Dirent) fuse.DirEntry {
	return fuse.DirEntry{
		Name: e.Name,
		Ino:  f.im.Ino(e.Nid),
		Mode: uint32(e.Type) << 12,
		Off:  uint64(e.Next),
	}
}
