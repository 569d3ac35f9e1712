package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
)

// network prints what a mount of each image asks a registry for.
func (b *bench) network(ctx context.Context) error {
	if os.Geteuid() != 0 {
		return errors.New("the network needs root: it mounts")
	}
	small, err := fileOfSize(b.tree, 4096)
	if err != nil {
		return err
	}
	if err := b.need(ctx); err != nil {
		return err
	}
	steps := []struct {
		name   string
		script string // of the directory "$1"
	}{
		{"`ls -lR`", `ls -lR "$1" >/dev/null`},
		{"one file of 4 KiB", fmt.Sprintf(`cat "$1/"%q >/dev/null`, small)},
	}
	fmt.Println("| from a registry | work | GETs | mkfs.erofs | ratio | MB | mkfs.erofs | ratio |\n|---|---|---|---|---|---|---|---|")
	for _, kind := range b.kinds {
		for _, s := range steps {
			var gets [2]int
			var bytes [2]int64
			for i, who := range []string{"ours", "theirs"} {
				if gets[i], bytes[i], err = b.fetched(ctx, b.image(kind, who), s.script); err != nil {
					return fmt.Errorf("%s, %s of %s: %w", kind, s.name, who, err)
				}
			}
			fmt.Printf("| %s | %s | %d | %d | %.2f | %.2f | %.2f | %.2f |\n", allKinds()[kind].name, s.name, gets[0], gets[1],
				float64(gets[0])/float64(gets[1]), float64(bytes[0])/1e6, float64(bytes[1])/1e6, float64(bytes[0])/float64(bytes[1]))
		}
	}
	fmt.Println("\nMounting included.")
	return nil
}

// need makes the images that no other work has made.
func (b *bench) need(ctx context.Context) error {
	for _, kind := range b.kinds {
		for who, build := range map[string]func(context.Context, string, string) (cost, error){
			"ours":   b.ours,
			"theirs": func(ctx context.Context, kind, source string) (cost, error) { return b.theirs(ctx, kind, source) },
		} {
			if _, err := os.Stat(b.image(kind, who)); err == nil {
				continue
			}
			if _, err := build(ctx, kind, b.tree); err != nil {
				return err
			}
		}
	}
	return nil
}

// fetched counts what a script asks for, with the mount that it takes.
func (b *bench) fetched(ctx context.Context, image, script string) (gets int, bytes int64, err error) {
	r, ref, err := serve(ctx, b.dir, image)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	dir, err := os.MkdirTemp(b.dir, "mnt-")
	if err != nil {
		return 0, 0, err
	}
	cache, err := os.MkdirTemp(b.dir, "cache-")
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(cache), os.Remove(dir)) }()
	mount := exec.CommandContext(ctx, b.binary, "mount", "--backend=fuse", "--cache-dir="+cache, ref, dir)
	if _, err := run(mount, ""); err != nil {
		return 0, 0, err
	}
	_, err = run(exec.CommandContext(ctx, "sh", "-c", script, "sh", dir), "")
	if _, failed := run(exec.CommandContext(ctx, b.binary, "umount", dir), ""); failed != nil {
		err = errors.Join(err, failed)
	}
	s := r.Stats()
	return s.BlobGETs, s.BlobBytes, err
}

// serve puts an image into a registry of its own.
func serve(ctx context.Context, dir, image string) (*fakeregistry.Registry, string, error) {
	f, err := os.Open(image)
	if err != nil {
		return nil, "", err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, "", err
	}
	r, err := fakeregistry.New(fakeregistry.Options{Dir: dir})
	if err != nil {
		return nil, "", err
	}
	layer := ocipush.Layer{MediaType: registry.MediaTypeErofs, Data: f, Size: st.Size()}
	if _, err := ocipush.Push(ctx, r.URL(), "bench/image:v1", []ocipush.Layer{layer}, ocipush.Options{}); err != nil {
		return nil, "", errors.Join(err, r.Close())
	}
	r.ResetStats()
	return r, r.Addr() + "/bench/image:v1", nil
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
