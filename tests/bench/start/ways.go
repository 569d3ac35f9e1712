package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/erofs-oci/erofs-oci/tests/start"
)

// A way is how to get from an image in the registry to a Python that has run.
type way struct {
	name  string
	image string // as a person calls it
	// prepare, if not nil, is what happens before and does not count.
	prepare func(ctx context.Context, dir string) error
	// run does it, in a directory of its own that prepare has had, too.
	run func(ctx context.Context, dir string) (cost, error)
}

// ways are all of them.
func (b *bench) ways() []way {
	all := []way{
		{name: "skopeo, umoci", image: "tar.gz", run: b.pulling(b.unpackWithUmoci)},
		{name: "one GET, tar -xz", image: "tar.gz", run: b.pulling(b.unpackWithTar)},
	}
	for _, image := range b.images {
		all = append(all, way{name: "extract", image: image, run: b.pulling(func(ctx context.Context, dir string) (string, error) {
			root := filepath.Join(dir, "root")
			return root, b.site.Run(ctx, "extract", "--keep=owner,xattrs,times", "--cache-dir="+filepath.Join(dir, "cache"), b.site.Ref(image), root)
		})})
		for _, backend := range b.backends {
			all = append(all, b.lazy(image, backend)...)
		}
	}
	return all
}

// lazy are the ways that mount.
func (b *bench) lazy(image, backend string) []way {
	once := func(ctx context.Context, dir string, flags ...string) (cost, error) {
		return b.mounted(ctx, image, start.MountOptions{Backend: backend, Cache: filepath.Join(dir, "cache"), Flags: flags})
	}
	with := func(flags ...string) func(context.Context, string) (cost, error) {
		return func(ctx context.Context, dir string) (cost, error) { return once(ctx, dir, flags...) }
	}
	// before is a mount whose cost is not counted.
	before := func(flags ...string) func(context.Context, string) error {
		return func(ctx context.Context, dir string) error { _, err := once(ctx, dir, flags...); return err }
	}
	profile := func(dir string) string { return filepath.Join(dir, "profile.json") }
	ways := []way{
		{name: "none", run: with()},
		{name: "meta", run: with("--prefetch=meta")},
		{name: "all", run: with("--prefetch=all")},
		{
			name: "profile",
			prepare: func(ctx context.Context, dir string) error {
				if err := before("--record="+profile(dir))(ctx, dir); err != nil {
					return err
				}
				return os.RemoveAll(filepath.Join(dir, "cache"))
			},
			run: func(ctx context.Context, dir string) (cost, error) { return once(ctx, dir, "--prefetch="+profile(dir)) },
		},
		{name: "warm", prepare: before(), run: with()},
		{
			name: "offline",
			prepare: func(ctx context.Context, dir string) error {
				m, err := b.site.Mount(ctx, image, start.MountOptions{Backend: backend, Cache: filepath.Join(dir, "cache"), Flags: []string{"--prefetch=all"}})
				if err != nil {
					return err
				}
				return errors.Join(m.Fetched(ctx), m.Unmount(ctx))
			},
			run: with("--offline"),
		},
	}
	for i := range ways {
		ways[i].image = image + ", " + backend
	}
	return ways
}

// A cost is what a start took.
type cost struct {
	time  time.Duration
	gets  int // of blobs
	bytes int64
	by    *start.Fetches // nil where nobody counts by cause
}

// since is the cost of what has happened since begin, when the counts were reset.
func (b *bench) since(begin time.Time) cost {
	took := time.Since(begin)
	s := b.site.Stats()
	return cost{time: took, gets: s.BlobGETs, bytes: s.BlobBytes}
}

// mounted is one start from a mount.
func (b *bench) mounted(ctx context.Context, image string, o start.MountOptions) (c cost, err error) {
	b.site.ResetStats()
	begin := time.Now()
	m, err := b.site.Mount(ctx, image, o)
	if err != nil {
		return cost{}, err
	}
	defer func() { err = errors.Join(err, m.Unmount(ctx)) }()
	if err := b.python(ctx, m.Dir); err != nil {
		return cost{}, err
	}
	c = b.since(begin)
	by, err := m.Fetches(ctx)
	c.by = &by
	return c, err
}

func (b *bench) python(ctx context.Context, root string) error {
	run := start.Python
	if b.oneCore {
		run = start.PythonOnOneCore
	}
	_, err := run(ctx, root)
	return err
}

// pulling is a start from a root file system that unpack makes of all of the image.
func (b *bench) pulling(unpack func(ctx context.Context, dir string) (root string, err error)) func(context.Context, string) (cost, error) {
	return func(ctx context.Context, dir string) (cost, error) {
		b.site.ResetStats()
		begin := time.Now()
		root, err := unpack(ctx, dir)
		if err == nil {
			err = b.python(ctx, root)
		}
		return b.since(begin), err
	}
}

// once is one round of a way.
func (b *bench) once(ctx context.Context, w way) (c cost, err error) {
	dir, err := os.MkdirTemp(b.dir, "way-")
	if err != nil {
		return cost{}, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if w.prepare != nil {
		if err := w.prepare(ctx, dir); err != nil {
			return cost{}, fmt.Errorf("prepare: %w", err)
		}
	}
	return w.run(ctx, dir)
}
