package erofsfmt

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// File types of directory entries, as readdir(3) has them.
const (
	DT_UNKNOWN = 0
	DT_FIFO    = 1
	DT_CHR     = 2
	DT_DIR     = 4
	DT_BLK     = 6
	DT_REG     = 8
	DT_LNK     = 10
	DT_SOCK    = 12
)

// A Dirent is an entry of a directory.
type Dirent struct {
	Name string
	Nid  Nid
	Type uint8 // DT_REG and so on; DT_UNKNOWN if the image does not say
	Next int64 // ReadDir goes on from here
}

// dirTypes maps the types of the disk to those of readdir(3).
var dirTypes = [...]uint8{DT_UNKNOWN,
	ondisk.FtRegular: DT_REG, ondisk.FtDir: DT_DIR, ondisk.FtChrdev: DT_CHR, ondisk.FtBlkdev: DT_BLK,
	ondisk.FtFifo: DT_FIFO, ondisk.FtSock: DT_SOCK, ondisk.FtSymlink: DT_LNK}

// A dirBlock is one block of a directory: entries from the front, their names
// behind them, sorted by the bytes of the names.
type dirBlock struct {
	data []byte
	n    int
}

// parseDirBlock finds out how many entries there are: the first name begins
// where the entries end (fs/erofs/namei.c erofs_find_target_block).
func parseDirBlock(data []byte) (dirBlock, error) {
	if len(data) < ondisk.DirentSize {
		return dirBlock{}, nowhere.corrupt("directory block of %d bytes", len(data))
	}
	first := int(ondisk.DecodeDirent(data).NameOff)
	if first == 0 || first%ondisk.DirentSize != 0 || first >= len(data) {
		return dirBlock{}, nowhere.corrupt("first name at %d of a directory block of %d bytes", first, len(data))
	}
	return dirBlock{data, first / ondisk.DirentSize}, nil
}

// entry returns entry i and its name, which is part of the block
// (fs/erofs/dir.c erofs_fill_dentries).
func (b dirBlock) entry(i int) (ondisk.Dirent, []byte, error) {
	d := ondisk.DecodeDirent(b.data[i*ondisk.DirentSize:])
	start, end := int(d.NameOff), len(b.data)
	if i+1 < b.n {
		end = int(ondisk.DecodeDirent(b.data[(i+1)*ondisk.DirentSize:]).NameOff)
	}
	if start < b.n*ondisk.DirentSize || start >= end || end > len(b.data) {
		return d, nil, nowhere.corrupt("entry %d has its name at %d to %d of a block of %d bytes", i, start, end, len(b.data))
	}
	name := b.data[start:end]
	if i+1 == b.n {
		name, _, _ = bytes.Cut(name, []byte{0})
	}
	if len(name) == 0 || len(name) > ondisk.NameLen {
		return d, nil, nowhere.corrupt("entry %d has a name of %d bytes", i, len(name))
	}
	// The kernel's readdir answers EIO to a slash; a NUL it would show.
	if bytes.IndexByte(name, '/') >= 0 || bytes.IndexByte(name, 0) >= 0 {
		return d, nil, nowhere.corrupt("entry %d is called %q", i, name)
	}
	return d, name, nil
}

// A dirReader reads the blocks of one directory during one call.
type dirReader struct {
	m    *mapper
	data metaReader
	buf  []byte
}

// newDirReader makes a dirReader; its mapper is to be released.
func (im *Image) newDirReader(dir *Inode) (dirReader, error) {
	if !dir.IsDir() {
		return dirReader{}, fmt.Errorf("erofs: nid %d is not a directory: mode %#o", uint64(dir.Nid), dir.Mode)
	}
	return dirReader{m: im.mapper(dir), data: metaReader{im: im}}, nil
}

// block reads a block of the directory; it is valid until the next call. Where
// it is stored in the image or the metabox, it comes from the metadata pages,
// else it is read like any file.
func (r *dirReader) block(ctx context.Context, blk int64) (dirBlock, error) {
	off := blk << r.m.im.sb.BlockBits
	n := min(r.m.im.sb.BlockSize(), r.m.ino.Size-off)
	e, err := r.m.extentAt(ctx, off)
	if err != nil {
		return dirBlock{}, err
	}
	var data []byte
	if e.kind == stored && off+n <= e.end() && (e.at.src == 0 || e.at.src == inMetabox) {
		data, err = r.data.bytes(ctx, e.at.plus(off-e.la), int(n))
	} else {
		if r.buf == nil {
			r.buf = make([]byte, r.m.im.sb.BlockSize())
		}
		data = r.buf[:n]
		err = r.m.read(ctx, data, off)
	}
	if err != nil {
		return dirBlock{}, err
	}
	b, err := parseDirBlock(data)
	if err != nil {
		return b, fmt.Errorf("block %d: %w", blk, err)
	}
	return b, nil
}

// Lookup finds name in a directory: first its block by the blocks' first
// names, then the entry, both by halving (fs/erofs/namei.c erofs_namei). The
// error is fs.ErrNotExist if there is no such name.
func (im *Image) Lookup(ctx context.Context, dir *Inode, name string) (Nid, error) {
	if im.union != nil {
		return im.union.lookup(ctx, dir, name)
	}
	r, err := im.newDirReader(dir)
	if err != nil {
		return 0, err
	}
	defer r.m.release()
	if name == "." {
		return dir.Nid, nil
	}
	nid, err := r.lookup(ctx, []byte(name))
	if err != nil && err != fs.ErrNotExist {
		return 0, fmt.Errorf("nid %d: %w", uint64(dir.Nid), err)
	}
	return nid, err
}

func (r *dirReader) lookup(ctx context.Context, name []byte) (Nid, error) {
	// The block wanted is the last whose first name is not above name.
	bs := r.m.im.sb.BlockSize()
	lo, hi := int64(0), (r.m.ino.Size+bs-1)>>r.m.im.sb.BlockBits
	for lo < hi {
		mid := lo + (hi-lo)/2
		b, err := r.block(ctx, mid)
		if err != nil {
			return 0, err
		}
		d, first, err := b.entry(0)
		if err != nil {
			return 0, fmt.Errorf("block %d: %w", mid, err)
		}
		c := bytes.Compare(first, name)
		if c == 0 {
			return Nid(d.Nid), nil
		}
		if c > 0 {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	if lo == 0 {
		return 0, fs.ErrNotExist
	}
	b, err := r.block(ctx, lo-1)
	if err != nil {
		return 0, err
	}
	nid, err := b.find(name)
	if err != nil && err != fs.ErrNotExist {
		return 0, fmt.Errorf("block %d: %w", lo-1, err)
	}
	return nid, err
}

// find looks for name among the entries of a block.
func (b dirBlock) find(name []byte) (Nid, error) {
	for lo, hi := 0, b.n; lo < hi; {
		mid := lo + (hi-lo)/2
		d, got, err := b.entry(mid)
		if err != nil {
			return 0, err
		}
		c := bytes.Compare(got, name)
		if c == 0 {
			return Nid(d.Nid), nil
		}
		if c > 0 {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	return 0, fs.ErrNotExist
}

// ReadDir calls fn with the entries of a directory, "." and ".." among them, in
// the order of the kernel, which is that of the image. pos is 0 or the
// Next of an earlier entry. It stops where fn returns false; that entry counts
// as not seen, so going on from the Next before it delivers it again.
//
// A position is a byte of the directory, so it is valid as long as the image is,
// and nothing is kept for it (fs/erofs/dir.c erofs_readdir).
func (im *Image) ReadDir(ctx context.Context, dir *Inode, pos int64, fn func(Dirent) bool) error {
	if im.union != nil {
		return im.union.readDir(ctx, dir, pos, fn)
	}
	r, err := im.newDirReader(dir)
	if err != nil {
		return err
	}
	defer r.m.release()
	if pos < 0 {
		return fmt.Errorf("erofs: nid %d: directory position %d", uint64(dir.Nid), pos)
	}
	if err := r.walk(ctx, pos, fn); err != nil {
		return fmt.Errorf("nid %d: %w", uint64(dir.Nid), err)
	}
	return nil
}

func (r *dirReader) walk(ctx context.Context, pos int64, fn func(Dirent) bool) error {
	size, bits := r.m.ino.Size, r.m.im.sb.BlockBits
	for pos < size {
		start := pos >> bits << bits
		b, err := r.block(ctx, start>>bits)
		if err != nil {
			return err
		}
		// The end of the block is the position after its last entry.
		i := int(pos-start+ondisk.DirentSize-1) / ondisk.DirentSize
		for pos = start + int64(len(b.data)); i < b.n; i++ {
			d, name, err := b.entry(i)
			if err != nil {
				return fmt.Errorf("block %d: %w", start>>bits, err)
			}
			e := Dirent{Name: string(name), Nid: Nid(d.Nid), Next: start + int64(i+1)*ondisk.DirentSize}
			if int(d.FileType) < len(dirTypes) {
				e.Type = dirTypes[d.FileType]
			}
			if i+1 == b.n {
				e.Next = pos
			}
			if !fn(e) {
				return nil
			}
		}
	}
	if r.m.ino.dotOmitted && pos == size {
		fn(Dirent{Name: ".", Nid: r.m.ino.Nid, Type: DT_DIR, Next: size + 1})
	}
	return nil
}

// maxLink is PATH_MAX less the NUL.
const maxLink = 4095

// Readlink returns the target of a symbolic link.
func (im *Image) Readlink(ctx context.Context, ino *Inode) (string, error) {
	if im.union != nil {
		l, inner := im.union.inLayer(ino)
		target, err := l.Readlink(ctx, &inner)
		return target, im.union.located(l, err)
	}
	if ino.Mode&modeType != modeLnk {
		return "", fmt.Errorf("erofs: nid %d is not a symbolic link: mode %#o", uint64(ino.Nid), ino.Mode)
	}
	if ino.Size == 0 || ino.Size > maxLink {
		return "", im.locate(ino.Nid).corrupt("nid %d: symbolic link of %d bytes", uint64(ino.Nid), ino.Size)
	}
	b := make([]byte, ino.Size)
	if err := im.ReadFile(ctx, ino, b, 0); err != nil {
		return "", err
	}
	if i := bytes.IndexByte(b, 0); i >= 0 {
		return "", im.locate(ino.Nid).corrupt("nid %d: symbolic link with a NUL at %d", uint64(ino.Nid), i)
	}
	return string(b), nil
}
