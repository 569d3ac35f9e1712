package main

import (
	"archive/tar"
	"context"
	"io"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
)

// An archiver writes files of an image to a tar archive in PAX form, in the order
// of the image. Nothing in it depends on the machine or the time.
type archiver struct {
	ctx     context.Context
	im      *erofsfmt.Image
	tar     *tar.Writer
	step    *step
	names   map[erofsfmt.Nid]string // of the files with more names than one, the first
	sockets int
}

func newArchiver(ctx context.Context, im *erofsfmt.Image, w io.Writer, t *step) *archiver {
	return &archiver{ctx: ctx, im: im, tar: tar.NewWriter(w), step: t, names: map[erofsfmt.Nid]string{}}
}

func (a *archiver) add(path string, ino *erofsfmt.Inode) error {
	a.step.file(a.im.Super().Inodes)
	name := "./" + path
	if path == "." {
		name = "./"
	}
	if first, ok := a.names[ino.Nid]; ok {
		h := header(name, ino)
		h.Typeflag, h.Linkname = tar.TypeLink, first
		return notThere(path, a.tar.WriteHeader(h))
	}
	if ino.Nlink > 1 && !ino.IsDir() {
		a.names[ino.Nid] = name
	}
	return notThere(path, a.addFirst(name, ino))
}

func (a *archiver) addFirst(name string, ino *erofsfmt.Inode) error {
	h := header(name, ino)
	switch fileType(ino) {
	case unix.S_IFREG:
		h.Typeflag, h.Size = tar.TypeReg, ino.Size
	case unix.S_IFDIR:
		h.Typeflag, h.Name = tar.TypeDir, strings.TrimSuffix(name, "/")+"/"
	case unix.S_IFLNK:
		target, err := a.im.Readlink(a.ctx, ino)
		if err != nil {
			return err
		}
		h.Typeflag, h.Linkname = tar.TypeSymlink, target
	case unix.S_IFCHR:
		h.Typeflag, h.Devmajor, h.Devminor = tar.TypeChar, int64(ino.Major()), int64(ino.Minor())
	case unix.S_IFBLK:
		h.Typeflag, h.Devmajor, h.Devminor = tar.TypeBlock, int64(ino.Major()), int64(ino.Minor())
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	default:
		a.sockets++
		return nil
	}
	all, err := readXattrs(a.ctx, a.im, ino)
	if err != nil {
		return err
	}
	for _, x := range all {
		h.PAXRecords[paxXattr(x.name)] = string(x.value)
	}
	if err := a.tar.WriteHeader(h); err != nil || h.Typeflag != tar.TypeReg {
		return err
	}
	return stream(a.ctx, a.im, ino, func(p []byte, _ int64) error {
		n, err := a.tar.Write(p)
		a.step.add(n)
		return err
	})
}

func header(name string, ino *erofsfmt.Inode) *tar.Header {
	return &tar.Header{
		Format: tar.FormatPAX, Name: name, Mode: int64(ino.Mode &^ unix.S_IFMT), Uid: int(ino.UID), Gid: int(ino.GID),
		ModTime: time.Unix(ino.Mtime, int64(ino.MtimeNsec)), PAXRecords: map[string]string{},
	}
}

// paxXattr is the name of a record with an extended attribute. GNU tar writes what
// would end the name, and its own sign of that, in the form of URLs.
func paxXattr(name string) string {
	return "SCHILY.xattr." + strings.NewReplacer("%", "%25", "=", "%3D").Replace(name)
}
