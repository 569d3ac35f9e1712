package main

import (
	"archive/tar"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// An imageKind is a way to make an image of a tree.
type imageKind struct {
	name  string // in the tables
	flags []string
}

// imageKinds are those that are compared. 64 KiB is the usual size of a
// pcluster; lz4 is meant for quick random reads and has 4 KiB.
func imageKinds() map[string]imageKind {
	return map[string]imageKind{
		"plain":   {"plain", nil},
		"lz4":     {"lz4 4 KiB", []string{"-zlz4"}},
		"lz4hc":   {"lz4hc 64 KiB", []string{"-zlz4hc", "-C65536"}},
		"zstd":    {"zstd 64 KiB", []string{"-zzstd", "-C65536"}},
		"deflate": {"deflate 64 KiB", []string{"-zdeflate", "-C65536"}},
		"lzma":    {"lzma 64 KiB", []string{"-zlzma", "-C65536"}},
	}
}

func imageNames() []string { return []string{"plain", "lz4", "lz4hc", "zstd", "deflate", "lzma"} }

// image makes an image of a tree, or finds it made.
func (b *bench) image(what, tree, kind string) (string, error) {
	return b.once(what+"-"+kind+".erofs", func(path string) error {
		return b.makeImage(append(imageKinds()[kind].flags, path, tree)...)
	})
}

func (b *bench) makeImage(args ...string) error {
	words := append(strings.Fields(b.mkfs), "--quiet")
	return command(words[0], append(words[1:], args...)...)
}

// once makes a file unless it is there.
func (b *bench) once(name string, do func(path string) error) (string, error) {
	path := filepath.Join(b.dir, name)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	begun := path + ".part"
	if err := errors.Join(os.RemoveAll(begun), do(begun)); err != nil {
		return "", err
	}
	return path, os.Rename(begun, path)
}

// bigName is the one file of the tree that bigTree makes: as much of a tar of
// the tree as bigSize, so that its contents are like those of the tree.
const (
	bigName = "big"
	bigSize = 240 << 20
)

func (b *bench) bigTree() (string, error) {
	return b.once("big", func(path string) error {
		if err := os.Mkdir(path, 0o755); err != nil {
			return err
		}
		script := fmt.Sprintf(`tar -cf - -C %q . 2>/dev/null | head -c %d > "$1"`, b.tree, bigSize)
		return shell(script, filepath.Join(path, bigName))
	})
}

// manyImage makes an image of n small files in directories of 1000.
func (b *bench) manyImage(n int) (string, error) {
	return b.once(fmt.Sprintf("many-%d.erofs", n), func(path string) error {
		list := path + ".tar"
		if err := writeMany(list, n); err != nil {
			return err
		}
		return errors.Join(b.makeImage("--tar=f", path, list), os.Remove(list))
	})
}

func writeMany(path string, n int) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	w := tar.NewWriter(f)
	defer func() { err = errors.Join(err, w.Close(), f.Close()) }()
	content := strings.Repeat("some text ", 10)
	for i := range n {
		if i%1000 == 0 {
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprintf("d%04d/", i/1000), Mode: 0o755}); err != nil {
				return err
			}
		}
		h := tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("d%04d/file-%03d.txt", i/1000, i%1000), Mode: 0o644, Size: int64(i % 100)}
		if err := w.WriteHeader(&h); err != nil {
			return err
		}
		if _, err := w.Write([]byte(content[:i%100])); err != nil {
			return err
		}
	}
	return nil
}
