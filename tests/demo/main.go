// Command demo shows erofs-oci's main job on a machine that has nothing but Go:
// it starts a registry in this process, pushes an EROFS image to it, mounts the
// image with the erofs-oci program, reads a few files, and says how little of the
// image was fetched for that. It leaves nothing behind.
//
// Where FUSE is not to be had it says so and reads the same files through the
// reader, without a mount.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
)

func main() {
	binary := flag.String("binary", "bin/erofs-oci", "the erofs-oci program")
	flag.Parse()
	// Ctrl-C makes the next step fail, and what was begun is still cleaned up.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *binary); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// fetchedAtMost is the part of the image, in per cent, that the demo may fetch.
const fetchedAtMost = 5.0

func run(ctx context.Context, binary string) (err error) {
	binary, err = filepath.Abs(binary)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "erofs-oci-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()

	image, want, err := buildImage(ctx, filepath.Join(dir, "image.erofs"), binary)
	if err != nil {
		return fmt.Errorf("build the image: %w", err)
	}
	defer image.Close()
	size, err := image.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	reg, err := fakeregistry.New(fakeregistry.Options{Dir: dir})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, reg.Close()) }()
	layer := ocipush.Layer{MediaType: registry.MediaTypeErofs, Data: image, Size: size}
	if _, err := ocipush.Push(ctx, reg.URL(), "demo/rootfs:v1", []ocipush.Layer{layer}, ocipush.Options{}); err != nil {
		return fmt.Errorf("push: %w", err)
	}
	ref := reg.Addr() + "/demo/rootfs:v1"
	fmt.Printf("pushed   %s, an EROFS image of %.1f MiB\n", ref, mib(size))
	reg.ResetStats()

	s := &session{binary: binary, dir: dir, ref: ref, want: want}
	if why := noFuse(); why != nil {
		fmt.Printf("no mount %v; reading through the reader instead\n", why)
		err = s.readWithoutMount(ctx)
	} else {
		err = s.readThroughMount(ctx)
	}
	if err != nil {
		return err
	}
	stats := reg.Stats()
	part := 100 * float64(stats.BlobBytes) / float64(size)
	fmt.Printf("fetched  %.2f MiB of %.1f MiB (%.1f %%) in %d GETs\n", mib(stats.BlobBytes), mib(size), part, stats.BlobGETs)
	if part >= fetchedAtMost {
		return fmt.Errorf("that is not under %.0f %%", fetchedAtMost)
	}
	return nil
}

func mib(n int64) float64 { return float64(n) / (1 << 20) }

// noFuse says why this process cannot mount, or nil.
func noFuse() error {
	dev, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	dev.Close()
	if os.Geteuid() != 0 {
		_, err = backend.Fusermount()
	}
	return err
}

// fileSum is a file that the demo reads and what it must hold.
type fileSum struct {
	path string
	sum  [sha256.Size]byte
}

// buildImage writes an image of made-up files and of one that is there, the
// program itself, and returns the files to read.
func buildImage(ctx context.Context, path, binary string) (*os.File, []fileSum, error) {
	f, err := os.Create(path)
	if err != nil {
		return nil, nil, err
	}
	b, err := mkerofs.New(f, mkerofs.Options{Label: "demo"})
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	want, err := addFiles(b, binary)
	if err == nil {
		_, err = b.Finish(ctx)
	}
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return f, want, nil
}

func addFiles(b *mkerofs.Builder, binary string) ([]fileSum, error) {
	st, err := os.Stat(binary)
	if err != nil {
		return nil, err
	}
	err = b.Add(mkerofs.Entry{
		Path: "usr/bin/erofs-oci", Mode: mkerofs.ModeRegular | 0o755, Mtime: st.ModTime(), Size: st.Size(),
		Open: func() (io.ReadCloser, error) { return os.Open(binary) },
	})
	if err != nil {
		return nil, err
	}
	var want []fileSum
	random := rand.NewChaCha8(sha256.Sum256([]byte("demo")))
	for i := range 200 {
		// Sizes from 1 KiB to 2 MiB, most of them small, as in real trees.
		data := make([]byte, 1<<(10+i%12))
		random.Read(data)
		path := fmt.Sprintf("srv/data/%02d/file-%03d", i%10, i)
		err := b.Add(mkerofs.Entry{
			Path: path, Mode: mkerofs.ModeRegular | 0o644, Mtime: st.ModTime(), Size: int64(len(data)),
			Open: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil },
		})
		if err != nil {
			return nil, err
		}
		if i%50 == 1 {
			want = append(want, fileSum{path, sha256.Sum256(data)})
		}
	}
	return want, b.Add(mkerofs.Entry{Path: "current", Mode: mkerofs.ModeSymlink | 0o777, Mtime: st.ModTime(), Target: "srv/data/01"})
}

// session is one use of the image.
type session struct {
	binary, dir, ref string
	want             []fileSum
}

// erofsOCI runs the program under test, with its state in the demo's directory.
func (s *session) erofsOCI(args ...string) error {
	cmd := exec.Command(s.binary, args...)
	cmd.Env = append(os.Environ(), "EROFS_OCI_RUN_DIR="+filepath.Join(s.dir, "run"))
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("erofs-oci %s: %w", args[0], err)
	}
	return nil
}

func (s *session) readThroughMount(ctx context.Context) (err error) {
	target := filepath.Join(s.dir, "mnt")
	if err := os.Mkdir(target, 0o755); err != nil {
		return err
	}
	begin := time.Now()
	if err := s.erofsOCI("mount", "--backend=fuse", "--cache-dir", filepath.Join(s.dir, "cache"), s.ref, target); err != nil {
		return err
	}
	fmt.Printf("mounted  in %v:\n", time.Since(begin).Round(time.Millisecond))
	defer func() { err = errors.Join(err, s.erofsOCI("umount", target)) }()
	if err := s.erofsOCI("list"); err != nil {
		return err
	}
	return s.read(ctx, os.DirFS(target))
}

func (s *session) readWithoutMount(ctx context.Context) (err error) {
	ref, err := registry.ParseReference(s.ref)
	if err != nil {
		return err
	}
	client, err := registry.New(registry.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, client.Close()) }()
	im, err := client.Resolve(ctx, ref, registry.Selector{})
	if err != nil {
		return err
	}
	layer, err := im.ErofsLayer(registry.Selector{})
	if err != nil {
		return err
	}
	fetcher, err := client.Blob(ref, layer.Descriptor)
	if err != nil {
		return err
	}
	cache, err := blobcache.New(filepath.Join(s.dir, "cache"), blobcache.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cache.Close()) }()
	blob, err := cache.Open(layer.Digest.String(), layer.Size, fetcher, blobcache.OpenOptions{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, blob.Close()) }()
	erofs, err := erofsfmt.Open(ctx, blob)
	if err != nil {
		return err
	}
	return s.read(ctx, erofs.FS())
}

// read lists the whole tree and compares the chosen files.
func (s *session) read(ctx context.Context, root fs.FS) error {
	files := 0
	err := fs.WalkDir(root, ".", func(_ string, d fs.DirEntry, err error) error {
		if err == nil {
			_, err = d.Info()
		}
		files++
		return errors.Join(err, ctx.Err())
	})
	if err != nil {
		return fmt.Errorf("list: %w", err)
	}
	fmt.Printf("listed   %d paths\n", files)
	if files < 200 {
		return errors.New("paths are missing")
	}
	for _, w := range s.want {
		data, err := fs.ReadFile(root, w.path)
		if err != nil {
			return err
		}
		sum := sha256.Sum256(data)
		fmt.Printf("read     %s, %d bytes, sha256 %x...\n", w.path, len(data), sum[:8])
		if !slices.Equal(sum[:], w.sum[:]) {
			return fmt.Errorf("%s: sha256 %x, want %x", w.path, sum, w.sum)
		}
	}
	return nil
}
