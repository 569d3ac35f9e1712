package main

import (
	"context"
	"errors"
	"io"
	"iter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
)

// imageEntries gives the files of an image, a directory before what is in it. What they hold is read later, as long as
// life lasts.
func imageEntries(ctx, life context.Context, im *erofsfmt.Image) iter.Seq2[mkerofs.Entry, error] {
	return func(yield func(mkerofs.Entry, error) bool) {
		first := map[erofsfmt.Nid]string{} // of the files with more names than one, the first
		err := walkPaths(ctx, im, nil, func(path string, ino *erofsfmt.Inode) error {
			e := mkerofs.Entry{Path: path, Link: first[ino.Nid]}
			if e.Link == "" {
				if ino.Nlink > 1 && !ino.IsDir() {
					first[ino.Nid] = path
				}
				var err error
				if e, err = imageEntry(ctx, life, im, path, ino); err != nil {
					return notThere(path, err)
				}
			}
			if !yield(e, nil) {
				return errStop
			}
			return nil
		})
		if err != nil && !errors.Is(err, errStop) {
			yield(mkerofs.Entry{}, err)
		}
	}
}

func imageEntry(ctx, life context.Context, im *erofsfmt.Image, path string, ino *erofsfmt.Inode) (mkerofs.Entry, error) {
	e := mkerofs.Entry{
		Path: path, Mode: ino.Mode, UID: ino.UID, GID: ino.GID, Mtime: time.Unix(ino.Mtime, int64(ino.MtimeNsec)),
	}
	var err error
	switch fileType(ino) {
	case unix.S_IFREG:
		e.Size = ino.Size
		of := *ino
		e.Open = func() (io.ReadCloser, error) { return openFile(life, im, of), nil }
	case unix.S_IFLNK:
		e.Target, err = im.Readlink(ctx, ino)
	case unix.S_IFCHR, unix.S_IFBLK:
		e.Major, e.Minor = ino.Major(), ino.Minor()
	}
	if err != nil {
		return e, err
	}
	all, err := readXattrs(ctx, im, ino)
	if len(all) > 0 {
		e.Xattrs = make(map[string][]byte, len(all))
	}
	for _, x := range all {
		e.Xattrs[x.name] = x.value
	}
	return e, err
}

// A fileReader is the data of a file of an image from front to back. What comes next is read meanwhile.
type fileReader struct {
	*io.PipeReader
	end func() // of the one who reads ahead
}

func openFile(ctx context.Context, im *erofsfmt.Image, ino erofsfmt.Inode) io.ReadCloser {
	r, w := io.Pipe()
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		w.CloseWithError(stream(ctx, im, &ino, func(p []byte, _ int64) error {
			_, err := w.Write(p)
			return err
		}))
	}()
	return fileReader{r, func() { cancel(); <-ended }}
}

func (f fileReader) Close() error {
	err := f.PipeReader.Close()
	f.end()
	return err
}
