package blobcache

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// openDir opens dir, which must be ours alone to write. The check and the opening are two steps, so what was opened
// is compared with what was checked; from then on everything is relative to the open directory.
func openDir(dir string) (*os.Root, error) {
	dir = filepath.Clean(dir) // a trailing slash would make Lstat follow a link
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return nil, err
	}
	if err := checkDir(info); err != nil {
		return nil, fmt.Errorf("directory %s %w; name another one", dir, err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	opened, err := root.Stat(".")
	if err == nil && !os.SameFile(info, opened) {
		err = fmt.Errorf("directory %s was replaced while it was opened", dir)
	}
	if err != nil {
		return nil, errors.Join(err, root.Close())
	}
	return root, nil
}

func checkDir(info os.FileInfo) error {
	st, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case info.Mode()&os.ModeSymlink != 0:
		return errors.New("is a symbolic link")
	case !info.IsDir():
		return errors.New("is not a directory")
	case !ok:
		return errors.New("has no owner that can be checked")
	case int(st.Uid) != os.Geteuid():
		return fmt.Errorf("belongs to uid %d, and we are %d", st.Uid, os.Geteuid())
	case info.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("has mode %04o, which lets others write", info.Mode().Perm())
	}
	return nil
}

// createPrivate makes the sparse file of one blob and takes its name away again, so that it ends with this process.
// It has its size only after that: all that a kill in between can leave is an empty file.
func (c *Cache) createPrivate(digest string, size int64) (chunkFile, error) {
	name := strings.ReplaceAll(digest, ":", "-") + "." + rand.Text()
	f, err := c.root.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(c.root.Remove(name), f.Truncate(size)); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
