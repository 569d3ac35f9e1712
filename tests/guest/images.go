package guest

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/debian"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// An Image is an EROFS image made of Debian.
type Image struct {
	// Name is such as "part-zstd", Tree what it was made of, such as "part".
	Name, Tree string
	Digest     digest.Digest
	Size       int64
}

// An ImageSet is a directory of images and of what a walk of their trees found.
type ImageSet struct {
	dir    string
	Images []Image
}

// File is where the image lies.
func (s *ImageSet) File(im Image) string { return filepath.Join(s.dir, im.Name+".erofs") }

// Listing is where the entries of the image's tree lie, as JSON.
func (s *ImageSet) Listing(im Image) string { return filepath.Join(s.dir, im.Tree+".json") }

// Get returns the image of this name.
func (s *ImageSet) Get(name string) (Image, error) {
	i := slices.IndexFunc(s.Images, func(im Image) bool { return im.Name == name })
	if i < 0 {
		return Image{}, fmt.Errorf("no image is called %s", name)
	}
	return s.Images[i], nil
}

// NetworkImage names the image whose reading over a slow network is measured:
// 26 MB and 1,400 entries.
const NetworkImage = "network"

// parts are the directories of a Debian that a tree has; none is all of them.
var parts = map[string][]string{
	"whole": nil,
	"part": {"usr/bin", "usr/sbin", "usr/lib/apt", "usr/lib/x86_64-linux-gnu/gconv",
		"usr/lib/x86_64-linux-gnu/perl-base", "usr/share/doc"},
	"network": {"usr/bin", "usr/sbin", "usr/lib/apt", "usr/lib/x86_64-linux-gnu/gconv",
		"usr/lib/x86_64-linux-gnu/perl-base"},
}

// recipes say of which tree an image is made, and how.
var recipes = []struct {
	image, tree string
	flags       []string
}{
	{"whole", "whole", []string{"-zlz4"}},
	{"part-plain", "part", nil},
	{"part-lz4", "part", []string{"-zlz4"}},
	{"part-zstd", "part", []string{"-zzstd", "-C65536"}},
	{"part-lzma", "part", []string{"-zlzma", "-C65536"}},
	{"part-deflate", "part", []string{"-zdeflate"}},
	{NetworkImage, "network", []string{"-zlz4"}},
}

// always are the flags of every image. Its build time is one that no file has: an
// inode of that second is written without a time of its own, and so without its
// nanoseconds.
var always = []string{"--quiet", "-T1", "--mkfs-time"}

// DebianImages returns the images, out of the cache or made of what the machine's
// mirror has. It needs root. To have them made anew delete the directory.
func DebianImages(ctx context.Context, cache string) (*ImageSet, error) {
	sum := sha256.Sum256(fmt.Append(nil, parts, recipes, always))
	dir, err := kept(cache, fmt.Sprintf("images-%x", sum[:4]), func(work, dir string) error {
		return makeImages(ctx, work, dir)
	})
	if err != nil {
		return nil, fmt.Errorf("images of Debian: %w", err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "images.json"))
	if err != nil {
		return nil, err
	}
	s := &ImageSet{dir: dir}
	return s, json.Unmarshal(text, &s.Images)
}

// makeImages fills dir.
func makeImages(ctx context.Context, work, dir string) error {
	root, err := debian.FetchRoot(ctx)
	if err != nil {
		return err
	}
	mkfs, err := debian.FetchUtils(ctx)
	if err != nil {
		return err
	}
	if err := errors.Join(os.Mkdir(dir, 0o755), makeTrees(ctx, root, work, dir)); err != nil {
		return err
	}
	images := make([]Image, len(recipes))
	var both errgroup.Group
	both.SetLimit(2)
	for i, r := range recipes {
		images[i] = Image{Name: r.image, Tree: r.tree}
		both.Go(func() error {
			file := filepath.Join(dir, r.image+".erofs")
			args := append(slices.Concat(always, r.flags), file, filepath.Join(work, r.tree))
			if _, err := output(mkfs.Command(ctx, "mkfs.erofs", args...)); err != nil {
				return err
			}
			return images[i].measure(file)
		})
	}
	if err := both.Wait(); err != nil {
		return err
	}
	return writeJSON(filepath.Join(dir, "images.json"), images)
}

// measure finds size and digest, so that no guest has to.
func (im *Image) measure(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if im.Digest, err = digest.FromReader(f); err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	im.Size = st.Size()
	return nil
}

// makeTrees copies the parts of root below work, and writes what a walk of each
// finds to dir. What debootstrap downloaded is no part of the whole.
func makeTrees(ctx context.Context, root, work, dir string) error {
	whole := filepath.Join(work, "whole")
	if _, err := output(exec.CommandContext(ctx, "cp", "--archive", root, whole)); err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(whole, "var/cache/apt/archives/*.deb"))
	if err != nil {
		return err
	}
	for _, name := range append(debs, filepath.Join(whole, "debootstrap")) {
		if err := os.RemoveAll(name); err != nil {
			return err
		}
	}
	if err := adorn(filepath.Join(whole, "usr/bin")); err != nil {
		return err
	}
	for name, dirs := range parts {
		if dirs != nil {
			if err := os.Mkdir(filepath.Join(work, name), 0o755); err != nil {
				return err
			}
			cp := exec.CommandContext(ctx, "cp", slices.Concat([]string{"--archive", "--parents"}, dirs, []string{filepath.Join(work, name)})...)
			cp.Dir = whole
			if _, err := output(cp); err != nil {
				return err
			}
		}
		entries, err := tree.Walk(filepath.Join(work, name))
		if err != nil {
			return err
		}
		if err := writeJSON(filepath.Join(dir, name+".json"), entries); err != nil {
			return err
		}
	}
	return nil
}

// adorn adds to the programs of a Debian what its smallest one has no example of: a
// file's capabilities, a user's attribute of a file and of a directory, a block
// device, a FIFO.
func adorn(bin string) error {
	// struct vfs_cap_data of version 2: CAP_NET_RAW, permitted and effective.
	capability := append([]byte{0x01, 0x00, 0x00, 0x02, 0x00, 0x20, 0x00, 0x00}, make([]byte, 12)...)
	mount := filepath.Join(bin, "mount")
	return errors.Join(
		unix.Setxattr(filepath.Join(bin, "umount"), "security.capability", capability, 0),
		unix.Setxattr(mount, "user.comment", []byte("a value"), 0),
		unix.Setxattr(bin, "user.comment", nil, 0),
		unix.Mknod(filepath.Join(bin, "fifo"), unix.S_IFIFO|0o620, 0),
		unix.Mknod(filepath.Join(bin, "disk"), unix.S_IFBLK|0o600, int(unix.Mkdev(259, 1<<12))),
	)
}

func writeJSON(file string, v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return os.WriteFile(file, text, 0o644)
}

// kept returns the directory name of the cache. Where it is not there yet, fill
// makes it at dir; work, which dir is in, is gone afterwards.
func kept(cache, name string, fill func(work, dir string) error) (string, error) {
	final := filepath.Join(cache, name)
	if _, err := os.Stat(final); !errors.Is(err, fs.ErrNotExist) {
		return final, err
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	work, err := os.MkdirTemp(cache, "new-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(work)
	next := filepath.Join(work, "next")
	if err := fill(work, next); err != nil {
		return "", err
	}
	// Whoever made the same at the same time has it right, too.
	if err := os.Rename(next, final); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	return final, nil
}
