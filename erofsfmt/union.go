package erofsfmt

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// A Layer is an image that is laid over others.
type Layer struct {
	Image   ReaderAt
	Devices []ReaderAt // as in Options
	Name    string     // what errors call it; "layer N", counted from the lowest, if empty
}

// MaxLayers is how many images can be laid over each other, here and in the kernel
// (fs/overlayfs/params.h OVL_MAX_STACK).
const MaxLayers = 500

// openAtOnce is how many layers are opened side by side.
const openAtOnce = 16

// errOneImage is for what looks at how things are stored.
var errOneImage = errors.New("erofs: several layers are stored in several images: look at one of them at a time")

// OpenLayers opens images that lie over each other, the topmost first, as one, which
// shows what the kernel's overlayfs would with all of them as lower layers. Each is
// opened as OpenWith does it, several at the same time. CacheBytes of o is for all of
// them together; its Devices are not used.
//
// # What is shown
//
// A path shows what the topmost layer has there. Directories of several layers at
// one path are merged, from the top down to one that has the attribute
// trusted.overlay.opaque="y", or to something that is no directory. A character
// device 0:0 says that there is nothing at its path, here and below. Neither is
// shown, nor are attributes named trusted.overlay.*.
//
// It differs from overlayfs where that shows too much: a root directory can be
// opaque, too, and a device 0:0 is never listed. ReadDir begins with "." and "..", and
// goes on by the bytes of the names.
//
// Parts of overlayfs that change what a name or an inode means (redirect_dir,
// metacopy, whiteouts that are attributes) are ErrUnsupported.
//
// # Nids
//
// The nid of an inode is that of its layer with the layer's number in front, so that
// nothing has to be remembered:
//
//	bit  63   62 … 54   53 … 0
//	    | box | layer  | nid in the layer's image |
//
// Layers are counted from 0, the topmost, so that nids of that are what they are in
// its image. A directory is the topmost of those that are merged. Which others are
// merged with it follows from its path, which is found again by way of ".." and of
// the directories above it: see union.stack. What that finds is remembered, but
// never more than follows from the images alone.
//
// An inode's st_ino is made in the same way. The link count of every directory is 1,
// which is what overlayfs, and others who do not count subdirectories, show; a hard
// link counts the names in its own layer.
func OpenLayers(ctx context.Context, layers []Layer, o Options) (*Image, error) {
	switch n := len(layers); {
	case n == 0:
		return nil, errors.New("erofs: no layers")
	case n == 1:
		o.Devices = layers[0].Devices
		return OpenWith(ctx, layers[0].Image, o)
	case n > MaxLayers:
		return nil, fmt.Errorf("erofs: %d layers: %d is the most", n, MaxLayers)
	}
	limit := o.cacheBytes()
	u := &union{layers: make([]*Image, len(layers)), shown: make([]string, len(layers)), roots: make([]dirAt, len(layers))}
	u.stacks.limit, u.children.limit, u.tops.limit = limit/16, limit/16, limit/32
	with := newShared(limit - limit/16 - limit/16 - limit/32)
	errs := make([]error, len(layers))
	var opening sync.WaitGroup
	free := make(chan struct{}, openAtOnce)
	for i, l := range layers {
		if u.shown[i] = l.Name; l.Name == "" {
			u.shown[i] = fmt.Sprintf("layer %d", len(layers)-1-i)
		}
		opening.Go(func() {
			free <- struct{}{}
			defer func() { <-free }()
			errs[i] = u.open(ctx, i, l, with)
		})
	}
	opening.Wait()
	for i, err := range errs {
		if err != nil {
			return nil, u.numbered(i, err) // one is enough: a registry that fails fails for all
		}
	}
	return &Image{union: u, sb: u.super()}, nil
}

// Layers are the images that OpenLayers laid over each other, the topmost first; the
// image itself if it is one.
func (im *Image) Layers() []*Image {
	if im.union == nil {
		return []*Image{im}
	}
	return slices.Clone(im.union.layers)
}

// RootLayers is how many layers make up the root directory, and with it all that is
// shown: fewer than were opened where one of them has an opaque root.
func (im *Image) RootLayers() int {
	if im.union == nil {
		return 1
	}
	return len(im.union.rootStack(0))
}

// open opens layer i and looks at its root, which is usually beside the superblock.
func (u *union) open(ctx context.Context, i int, l Layer, with shared) error {
	if slots := l.Image.Size() / ondisk.InodeSlot; slots >= maxNid {
		return nowhere.unsupported("an image of %d bytes is too large to be one of several layers", l.Image.Size())
	}
	im, err := openImage(ctx, l.Image, l.Devices, with, uint16(i))
	if err != nil {
		return err
	}
	root, err := im.Inode(ctx, im.Root())
	if err != nil {
		return err
	}
	u.layers[i] = im
	u.roots[i] = dirAt{layer: i, ino: root}
	u.roots[i].opaque, err = u.opaque(ctx, i, &root)
	return err
}

// A union is what OpenLayers opened.
type union struct {
	layers []*Image // the topmost first
	shown  []string // in errors
	roots  []dirAt

	stacks   recent[Nid, []dirAt]   // of directories
	children recent[Nid, []childAt] // of the directory of a layer
	tops     recent[Nid, Nid]       // what the directory of a layer is a part of
}

// A dirAt is a directory of one layer.
type dirAt struct {
	layer  int
	ino    Inode // as the layer has it
	opaque bool
}

const (
	layerShift = 54
	layerMask  = 1<<9 - 1
	// maxNid is past the end of every layer's image. A directory may name a nid
	// that is no smaller: that is as wrong as this.
	maxNid = 1<<layerShift - 1
)

// nid is the nid of what has this nid in a layer's image.
func (u *union) nid(layer int, n Nid) Nid {
	return n&ondisk.MetaboxBit | Nid(layer)<<layerShift | min(n&^ondisk.MetaboxBit, maxNid)
}

// apart is the inverse of nid.
func (u *union) apart(nid Nid) (layer int, n Nid) {
	return int(nid >> layerShift & layerMask), nid & (ondisk.MetaboxBit | maxNid)
}

// ino needs no more than 55 bits for an inode of a layer: see Image.Ino.
func (u *union) ino(nid Nid) uint64 {
	layer, n := u.apart(nid)
	if layer >= len(u.layers) {
		return uint64(nid)
	}
	return uint64(layer)<<(layerShift+1) | u.layers[layer].Ino(n)
}

// super is that of the topmost layer, for all of them.
func (u *union) super() Superblock {
	sb := u.layers[0].sb
	var bytes uint64
	sb.Inodes = 0
	for _, l := range u.layers {
		bytes += l.sb.Blocks << l.sb.BlockBits
		sb.Inodes += l.sb.Inodes
	}
	sb.Blocks = bytes >> sb.BlockBits
	sb.RootNid = u.nid(0, sb.RootNid)
	return sb
}

// numbered says which layer an error is about.
func (u *union) numbered(layer int, err error) error {
	if err == nil || err == fs.ErrNotExist || err == ErrNoXattr {
		return err
	}
	return fmt.Errorf("%s: %w", u.shown[layer], err)
}

func (u *union) located(l *Image, err error) error { return u.numbered(int(l.layer), err) }

// inLayer is an inode as its layer has it.
func (u *union) inLayer(ino *Inode) (*Image, Inode) {
	layer, n := u.apart(ino.Nid)
	inner := *ino
	inner.Nid = n
	return u.layers[layer], inner
}

func (u *union) inode(ctx context.Context, nid Nid) (Inode, error) {
	layer, n := u.apart(nid)
	if layer >= len(u.layers) {
		return Inode{}, nowhere.corrupt("nid %d: there are %d layers", uint64(nid), len(u.layers))
	}
	ino, err := u.layers[layer].Inode(ctx, n)
	if err == nil {
		err = u.refuse(ctx, layer, &ino)
	}
	if err != nil {
		return Inode{}, u.numbered(layer, err)
	}
	ino.Nid, ino.Ino = nid, u.ino(nid)
	if ino.IsDir() {
		ino.Nlink = 1
	}
	return ino, nil
}

// Attributes of overlayfs (fs/overlayfs/overlayfs.h).
const (
	overlayXattrs = "trusted.overlay."
	overlayOpaque = overlayXattrs + "opaque"
)

// refuse says whether an inode is not what it seems to be.
func (u *union) refuse(ctx context.Context, layer int, ino *Inode) error {
	l := u.layers[layer]
	found := ""
	err := l.eachXattr(ctx, ino, func(x *xattr) bool {
		for _, rest := range [...]string{"overlay.redirect", "overlay.metacopy", "overlay.whiteout"} {
			if x.is(ondisk.XattrTrusted, rest) {
				found = rest
			}
		}
		return found == ""
	})
	if err != nil || found == "" {
		return err
	}
	return l.locate(ino.Nid).unsupported("nid %d has the attribute trusted.%s", uint64(ino.Nid), found)
}

// opaque says whether a directory hides what is below it.
func (u *union) opaque(ctx context.Context, layer int, dir *Inode) (bool, error) {
	value, err := u.layers[layer].Xattr(ctx, dir, overlayOpaque)
	switch {
	case errors.Is(err, ErrNoXattr):
		return false, nil
	case err != nil:
		return false, err
	case string(value) == "y":
		return true, nil
	}
	return false, u.layers[layer].locate(dir.Nid).unsupported("nid %d has %s=%.20q", uint64(dir.Nid), overlayOpaque, value)
}

// whiteout says whether an inode stands for nothing.
func (ino *Inode) whiteout() bool { return ino.Mode&modeType == modeChr && ino.Rdev == 0 }

func (u *union) readFile(ctx context.Context, ino *Inode, p []byte, off int64, surplus func(*Decoded)) error {
	l, inner := u.inLayer(ino)
	return u.located(l, l.ReadFileSurplus(ctx, &inner, p, off, surplus))
}

func (u *union) xattrs(ctx context.Context, ino *Inode) ([]string, error) {
	l, inner := u.inLayer(ino)
	all, err := l.Xattrs(ctx, &inner)
	if err != nil {
		return nil, u.located(l, err)
	}
	names := all[:0]
	for _, name := range all {
		if !strings.HasPrefix(name, overlayXattrs) {
			names = append(names, name)
		}
	}
	return names, nil
}

func (u *union) xattr(ctx context.Context, ino *Inode, name string) ([]byte, error) {
	if strings.HasPrefix(name, overlayXattrs) {
		return nil, ErrNoXattr
	}
	l, inner := u.inLayer(ino)
	value, err := l.Xattr(ctx, &inner, name)
	return value, u.located(l, err)
}

// recent remembers values up to a limit and forgets those that were not asked for
// since about half of the limit came after them. The zero value remembers nothing.
type recent[K comparable, V any] struct {
	limit int64 // bytes

	mu       sync.Mutex // guards what follows
	new, old map[K]V
	used     int64 // by new
}

// recentCost is about what an entry takes beside what its value refers to.
const recentCost = 64

func (r *recent[K, V]) get(key K) (V, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	v, ok := r.new[key]
	if !ok {
		v, ok = r.old[key]
	}
	return v, ok
}

// put remembers a value that refers to so many bytes.
func (r *recent[K, V]) put(key K, v V, bytes int64) {
	bytes += recentCost
	r.mu.Lock()
	defer r.mu.Unlock()
	if bytes > r.limit/2 {
		return
	}
	if r.used+bytes > r.limit/2 || r.new == nil {
		r.new, r.old, r.used = make(map[K]V), r.new, 0
	}
	if _, again := r.new[key]; !again {
		r.used += bytes
	}
	r.new[key] = v
}
