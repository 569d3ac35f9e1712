package erofsfmt

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"
)

// FS shows the image as an io/fs file system with ReadDir, Stat, Lstat, ReadLink
// and ReadFile. Files that are not directories are io.Seekers and io.ReaderAts.
// FileInfo.Sys is an *Inode.
//
// Open and Stat follow symbolic links; an absolute target begins at the root of
// the image, and ".." of the root is the root, as after chroot(2).
//
// io/fs knows only names that are UTF-8. ReadDir lists the others too, and their
// Info works, but Open refuses them as it must; they can be read by the nid
// in FileInfo.Sys.
func (im *Image) FS() fs.FS { return fsys{im} }

type fsys struct{ im *Image }

var (
	_ fs.ReadDirFS  = fsys{}
	_ fs.StatFS     = fsys{}
	_ fs.ReadFileFS = fsys{}
	_ fs.ReadLinkFS = fsys{}
)

// maxLinks is how many symbolic links one name may lead through, as in Linux.
const maxLinks = 40

var errLoop = errors.New("too many levels of symbolic links")

// resolve finds the inode of a name. The last component is followed if it is a
// symbolic link and follow is set.
func (f fsys) resolve(op, name string, follow bool) (Inode, error) {
	if !fs.ValidPath(name) {
		return Inode{}, &fs.PathError{Op: op, Path: name, Err: fs.ErrInvalid}
	}
	ino, err := f.walk(name, follow)
	if err != nil {
		return ino, &fs.PathError{Op: op, Path: name, Err: err}
	}
	return ino, nil
}

func (f fsys) walk(name string, follow bool) (Inode, error) {
	ctx := context.Background()
	root, err := f.im.Inode(ctx, f.im.Root())
	if err != nil {
		return root, err
	}
	above := []Inode{root} // the directories from the root to where we are
	todo := strings.Split(name, "/")
	for links := 0; len(todo) > 0; {
		part := todo[0]
		todo = todo[1:]
		here := above[len(above)-1]
		if !here.IsDir() {
			return here, fs.ErrNotExist
		}
		switch part {
		case "", ".":
			continue
		case "..":
			above = above[:max(1, len(above)-1)]
			continue
		}
		nid, err := f.im.Lookup(ctx, &here, part)
		if err != nil {
			return here, err
		}
		ino, err := f.im.Inode(ctx, nid)
		if err != nil {
			return ino, err
		}
		if ino.Mode&modeType != modeLnk || len(todo) == 0 && !follow {
			above = append(above, ino)
			continue
		}
		if links++; links > maxLinks {
			return ino, errLoop
		}
		target, err := f.im.Readlink(ctx, &ino)
		if err != nil {
			return ino, err
		}
		if strings.HasPrefix(target, "/") {
			above = above[:1]
		}
		todo = append(strings.Split(target, "/"), todo...)
	}
	return above[len(above)-1], nil
}

func (f fsys) Open(name string) (fs.File, error) {
	ino, err := f.resolve("open", name, true)
	if err != nil {
		return nil, err
	}
	info := fileInfo{path.Base(name), ino}
	if ino.IsDir() {
		return &openDir{im: f.im, path: name, info: info}, nil
	}
	return &openFile{im: f.im, path: name, info: info}, nil
}

func (f fsys) Stat(name string) (fs.FileInfo, error)  { return f.stat("stat", name, true) }
func (f fsys) Lstat(name string) (fs.FileInfo, error) { return f.stat("lstat", name, false) }

func (f fsys) stat(op, name string, follow bool) (fs.FileInfo, error) {
	ino, err := f.resolve(op, name, follow)
	if err != nil {
		return nil, err
	}
	return fileInfo{path.Base(name), ino}, nil
}

func (f fsys) ReadLink(name string) (string, error) {
	ino, err := f.resolve("readlink", name, false)
	if err != nil {
		return "", err
	}
	target, err := f.im.Readlink(context.Background(), &ino)
	if err != nil {
		return "", &fs.PathError{Op: "readlink", Path: name, Err: err}
	}
	return target, nil
}

func (f fsys) ReadFile(name string) ([]byte, error) {
	file, err := f.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	// Growing as it goes, so that an image cannot name a size and have it allocated.
	return io.ReadAll(file)
}

func (f fsys) ReadDir(name string) ([]fs.DirEntry, error) {
	file, err := f.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	dir, ok := file.(*openDir)
	if !ok {
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: errors.New("not a directory")}
	}
	entries, err := dir.ReadDir(-1)
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	return entries, err
}

// An openFile is a file that is not a directory. Special files are empty.
type openFile struct {
	im     *Image
	path   string
	info   fileInfo
	pos    int64
	closed bool
}

var (
	_ io.ReaderAt = (*openFile)(nil)
	_ io.Seeker   = (*openFile)(nil)
)

func (f *openFile) err(op string, err error) error {
	return &fs.PathError{Op: op, Path: f.path, Err: err}
}

func (f *openFile) Stat() (fs.FileInfo, error) {
	if f.closed {
		return nil, f.err("stat", fs.ErrClosed)
	}
	return f.info, nil
}

func (f *openFile) Close() error {
	if f.closed {
		return f.err("close", fs.ErrClosed)
	}
	f.closed = true
	return nil
}

func (f *openFile) Read(p []byte) (int, error) {
	n, err := f.ReadAt(p, f.pos)
	f.pos += int64(n)
	if n > 0 && err == io.EOF {
		err = nil
	}
	return n, err
}

func (f *openFile) ReadAt(p []byte, off int64) (int, error) {
	if f.closed {
		return 0, f.err("read", fs.ErrClosed)
	}
	if off < 0 {
		return 0, f.err("read", fs.ErrInvalid)
	}
	size := f.info.Size()
	n := int(min(int64(len(p)), max(0, size-off)))
	if n > 0 {
		if err := f.im.ReadFile(context.Background(), &f.info.ino, p[:n], off); err != nil {
			return 0, f.err("read", err)
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *openFile) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += f.pos
	case io.SeekEnd:
		offset += f.info.Size()
	}
	if f.closed || offset < 0 || whence < io.SeekStart || whence > io.SeekEnd {
		return 0, f.err("seek", fs.ErrInvalid)
	}
	f.pos = offset
	return offset, nil
}

// An openDir is a directory.
type openDir struct {
	im     *Image
	path   string
	info   fileInfo
	pos    int64
	closed bool
}

func (d *openDir) err(op string, err error) error {
	return &fs.PathError{Op: op, Path: d.path, Err: err}
}

func (d *openDir) Stat() (fs.FileInfo, error) {
	if d.closed {
		return nil, d.err("stat", fs.ErrClosed)
	}
	return d.info, nil
}

func (d *openDir) Close() error {
	if d.closed {
		return d.err("close", fs.ErrClosed)
	}
	d.closed = true
	return nil
}

func (d *openDir) Read([]byte) (int, error) { return 0, d.err("read", errors.New("is a directory")) }

func (d *openDir) ReadDir(n int) ([]fs.DirEntry, error) {
	if d.closed {
		return nil, d.err("readdir", fs.ErrClosed)
	}
	var entries []fs.DirEntry
	err := d.im.ReadDir(context.Background(), &d.info.ino, d.pos, func(e Dirent) bool {
		if n > 0 && len(entries) == n {
			return false
		}
		d.pos = e.Next
		if e.Name != "." && e.Name != ".." {
			entries = append(entries, dirEntry{d.im, e})
		}
		return true
	})
	for i := range entries {
		if err == nil {
			entries[i], err = withType(entries[i].(dirEntry))
		}
	}
	if err != nil {
		return entries, d.err("readdir", err)
	}
	if n > 0 && len(entries) == 0 {
		return nil, io.EOF
	}
	return entries, nil
}

// withType asks the inode where the directory does not say what an entry is.
func withType(d dirEntry) (fs.DirEntry, error) {
	if d.e.Type != DT_UNKNOWN {
		return d, nil
	}
	ino, err := d.im.Inode(context.Background(), d.e.Nid)
	d.e.Type = uint8(ino.Mode >> 12) // the bits of DT_*
	return d, err
}

type dirEntry struct {
	im *Image
	e  Dirent
}

func (d dirEntry) Name() string      { return d.e.Name }
func (d dirEntry) IsDir() bool       { return d.e.Type == DT_DIR }
func (d dirEntry) Type() fs.FileMode { return fileMode(uint32(d.e.Type) << 12).Type() }
func (d dirEntry) String() string    { return fs.FormatDirEntry(d) }

func (d dirEntry) Info() (fs.FileInfo, error) {
	ino, err := d.im.Inode(context.Background(), d.e.Nid)
	if err != nil {
		return nil, &fs.PathError{Op: "stat", Path: d.e.Name, Err: err}
	}
	return fileInfo{d.e.Name, ino}, nil
}

type fileInfo struct {
	name string
	ino  Inode
}

func (i fileInfo) Name() string       { return i.name }
func (i fileInfo) Mode() fs.FileMode  { return fileMode(i.ino.Mode) }
func (i fileInfo) IsDir() bool        { return i.ino.IsDir() }
func (i fileInfo) ModTime() time.Time { return time.Unix(i.ino.Mtime, int64(i.ino.MtimeNsec)) }
func (i fileInfo) Sys() any           { ino := i.ino; return &ino }
func (i fileInfo) String() string     { return fs.FormatFileInfo(i) }

// Size is what can be read: nothing of a special file.
func (i fileInfo) Size() int64 {
	switch i.ino.Mode & modeType {
	case modeReg, modeDir, modeLnk:
		return i.ino.Size
	}
	return 0
}

// fileMode turns an st_mode into Go's form.
func fileMode(mode uint32) fs.FileMode {
	m := fs.FileMode(mode & 0o777)
	for _, bit := range [...]struct {
		posix uint32
		mode  fs.FileMode
	}{{0o4000, fs.ModeSetuid}, {0o2000, fs.ModeSetgid}, {0o1000, fs.ModeSticky}} {
		if mode&bit.posix != 0 {
			m |= bit.mode
		}
	}
	switch mode & modeType {
	case modeReg:
	case modeDir:
		m |= fs.ModeDir
	case modeLnk:
		m |= fs.ModeSymlink
	case modeChr:
		m |= fs.ModeDevice | fs.ModeCharDevice
	case modeBlk:
		m |= fs.ModeDevice
	case modeFifo:
		m |= fs.ModeNamedPipe
	case modeSock:
		m |= fs.ModeSocket
	default:
		m |= fs.ModeIrregular
	}
	return m
}
