package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
)

// serve puts the image into a registry of its own.
func (b *bench) serve(path string, size int64) (*fakeregistry.Registry, string, error) {
	r, err := fakeregistry.New(fakeregistry.Options{Dir: b.dir})
	if err != nil {
		return nil, "", err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, "", errors.Join(err, r.Close())
	}
	defer f.Close()
	layer := ocipush.Layer{MediaType: registry.MediaTypeErofs, Data: f, Size: size}
	if _, err := ocipush.Push(context.Background(), r.URL(), "bench/image:v1", []ocipush.Layer{layer}, ocipush.Options{}); err != nil {
		return nil, "", errors.Join(err, r.Close())
	}
	r.ResetStats()
	return r, r.Addr() + "/bench/image:v1", nil
}

// network prints what each step costs in GETs, bytes and time, each from nothing.
func (b *bench) network(name, path string) (err error) {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	size := st.Size()
	r, ref, err := b.serve(path, size)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	small, err := fileOfSize(b.tree, 4096)
	if err != nil {
		return err
	}
	fmt.Printf("| %s, after mounting | GETs | MB fetched | of the image | mount | then |\n|---|---|---|---|---|---|\n", name)
	for i, step := range []struct {
		name string
		do   func(dir string) error
	}{
		{"nothing", func(string) error { return nil }},
		{"`ls -lR`", func(dir string) error { return shell(`ls -lR "$1" > /dev/null`, dir) }},
		{"one 4 KiB file", func(dir string) error { return shell(`cat "$1" > /dev/null`, filepath.Join(dir, small)) }},
		{"all files", readAll},
	} {
		r.ResetStats()
		dir, err := os.MkdirTemp(b.dir, "mnt-")
		if err != nil {
			return err
		}
		cache := filepath.Join(b.dir, fmt.Sprintf("cache-%d", i))
		mount, err := timed(func() error {
			return command(b.binary, "mount", "--backend=fuse", "--cache-dir", cache, ref, dir)
		})
		if err != nil {
			return err
		}
		then, err := timed(func() error { return step.do(dir) })
		if err := errors.Join(err, command(b.binary, "umount", dir), os.RemoveAll(cache)); err != nil {
			return err
		}
		s := r.Stats()
		fmt.Printf("| %s | %d | %.2f | %.1f %% | %d ms | %.2f s |\n", step.name, s.BlobGETs, float64(s.BlobBytes)/1e6,
			100*float64(s.BlobBytes)/float64(size), mount.Milliseconds(), then.Seconds())
	}
	fmt.Println()
	return nil
}

// fileOfSize finds a file that is about as large as size.
func fileOfSize(tree string, size int64) (string, error) {
	best, gap := "", int64(1<<62)
	err := filepath.Walk(tree, func(path string, info os.FileInfo, err error) error {
		if err != nil || !info.Mode().IsRegular() {
			return err
		}
		if d := max(info.Size()-size, size-info.Size()); d < gap {
			best, gap = path, d
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	return filepath.Rel(tree, best)
}
