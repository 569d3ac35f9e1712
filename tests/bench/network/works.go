package main

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// list asks the kernel what ls -lR asks it.
func list(dir string) (read int64, err error) {
	return 0, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return stat(path)
	})
}

func stat(path string) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		_, err := os.Readlink(path)
		return err
	}
	_, err := unix.Lgetxattr(path, "system.posix_acl_access", nil)
	if err != nil && !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.ENOTSUP) {
		return &fs.PathError{Op: "lgetxattr", Path: path, Err: err}
	}
	return nil
}

// readAll is list, and reads each file.
func readAll(dir string) (total int64, err error) {
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := stat(path); err != nil || !d.Type().IsRegular() {
			return err
		}
		n, err := read(path)
		total += n
		return err
	})
	return total, err
}

func read(path string) (total int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for p := make([]byte, 128<<10); ; {
		n, err := f.Read(p)
		total += int64(n)
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// survey counts the entries, and finds a file that is about as large as size.
func survey(dir string, size int64) (file string, found int64, entries int, err error) {
	gap := int64(1 << 62)
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		entries++
		info, err := d.Info()
		if err != nil || !info.Mode().IsRegular() {
			return err
		}
		n := info.Size()
		if far := max(n-size, size-n); far < gap {
			file, found, gap = path, n, far
		}
		return nil
	})
	if err != nil {
		return "", 0, 0, err
	}
	file, err = filepath.Rel(dir, file)
	return file, found, entries, err
}
