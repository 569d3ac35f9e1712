// Package mkerofs builds EROFS images. A Builder is told the tree, an entry at a time and in any order in which a
// hard link comes after its target, or by Layers, which read the tar archives of a container image; Finish lays it out
// and writes it.
//
//	 0      1024         metadata                                                      data
//	┌──────┬────────────┬───────────────────────────────────────┬──────────────────┬───────────────────────┐
//	│ zero │ superblock │ inodes, each with its xattrs, index   │ shared xattrs,   │ regular files, those  │
//	│      │  to block  │ and what is short: directories, link  │ directories that │ of Options.Order first│
//	│      │            │ targets, ends of files                │ have whole blocks│ then the packed inode │
//	└──────┴────────────┴───────────────────────────────────────┴──────────────────┴───────────────────────┘
//	                     root; then the entries of a directory side by side, directory by directory
//
// All metadata lies together at the front, so that listing a tree reads one run of bytes. What a file holds is asked
// for in Finish, in the order of the disk, and passes through: memory is needed for the tree, 8 bytes for each pcluster,
// and for the segments on their way, 4 MiB each. That for the tree grows with the entries and the directories that they
// imply, some hundred bytes each, without a limit of its own: of archives that nobody vouches for,
// LayerOptions.MaxEntries sets one. The superblock is written last, so that a build that broke off is no image.
//
// How large the index of a compressed file is, is known when it was compressed: compressed data waits in a temporary
// file (Options.TempDir) for the metadata to be written, as much as the image will have. Images without compression
// need none. Layers spool what cannot be read again.
//
// The image is a function of the entries and the options: not of the order of Add, of the clock, of the number of
// processors or of chance. The UUID, where none is given, is derived from everything else.
//
// # Compression
//
// A file is cut into segments of 4 MiB, which are compressed side by side, and these into extents, each of which is
// compressed to a pcluster. LZ4 is encoded here, since it is to fill a given output: as much input is taken as has room.
// The libraries for zstd and DEFLATE want to know their input instead, so they are asked several times, each time with
// what the last one suggests, until little of the last block stays empty. Where that saves no block, the data stays as
// it is, and a file that takes no less room altogether is stored like one that was never compressed.
//
// Linux reads what is written here since 5.4; what takes a later one is said where it is asked for. zstd takes 6.10,
// DEFLATE 6.6.
//
// # Inodes
//
// An inode takes 32 bytes where its ids, link count and size fit in the compact form and its time is the superblock's,
// for which the most frequent one is taken; else 64. (Linux since 6.15 would give compact inodes times of their own;
// older ones would show wrong ones.) Extended attributes that four inodes or more have are stored once.
//
// # Images without data
//
// Options.MetadataOnly makes an image of the whole tree in which all files read as zeros: the size and the layout of
// the metadata can be looked at, and a tree of any size tried, in no time (mkfs.erofs calls it --clean=0). What is to be
// used must not be made so, since nothing tells such an image from one whose files hold zeros.
//
// The package does not read directories or decompress layers, and writes neither LZMA, compressed metadata, encoded
// extents, extra devices nor 48-bit block addresses.
package mkerofs

import (
	"errors"
	"fmt"
	"io"
	"math/bits"
	"strings"
	"time"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// Options of an image. The zero value works.
type Options struct {
	BlockSize int      // a power of two from 512 to 65536; 4096 if zero. Linux mounts those up to its page size
	Label     string   // volume name, at most 16 bytes
	UUID      [16]byte // derived from the image if zero
	// InlineMax bytes at the end of a regular file, those that do not fill a block, lie behind its inode instead of
	// in a block of their own. It makes images smaller, and metadata larger by file data. At most a block; of a tree of
	// small files half a block leaves the image 1 to 2 % larger than that, and makes what listing it reads half as much.
	InlineMax int

	// ChunkSize, where it is not 0, lays uncompressed files out in chunks of so many bytes, a power of two from a block
	// to 4 MiB. Chunks with the same content are stored once, and chunks of zeros not at all: Linux 5.15.
	ChunkSize int
	// XattrPrefixes are beginnings of names of extended attributes, like "trusted.overlay.", that are stored once:
	// Linux 6.4. Together with Fragments they are not used, since Linux before 6.17 would not find them.
	XattrPrefixes []string
	// MetadataOnly leaves the data of all files out, for tests and for measuring: they keep their sizes and read as
	// zeros, which are holes. Entry.Open is not called. An image for users must not be made so.
	MetadataOnly bool
	// SourceDateEpoch, where it is not zero, takes the place of all later times, of what is taken from LayerOptions.Lower
	// too.
	SourceDateEpoch time.Time
	// Order are paths of files whose data is to lie before that of all others, in this order: those that will be read
	// first. What is no file of the tree is passed over.
	Order []string

	Compression Compression
	Workers     int    // that compress, at most 8; as many as there are processors if zero. The image is the same
	TempDir     string // where compressed data waits for the metadata, as much as there is of it; os.TempDir() if empty
	// TempLimit is how many bytes the temporary files of this builder and of its Layers may have together, holes not
	// counted; 0 is no limit. More ends in ErrTempLimit.
	TempLimit int64
	// Progress, if there is one, is told by Finish how many files with data were consumed so far, and how many bytes of
	// them: in the middle of large files, too. It is not called by two goroutines at once, and holds Finish up.
	Progress func(files, bytes int64)
}

// The types of Entry.Mode, as stat(2) has them.
const (
	ModeType    = 0o170000
	ModeSocket  = 0o140000
	ModeSymlink = 0o120000
	ModeRegular = 0o100000
	ModeBlock   = 0o060000
	ModeDir     = 0o040000
	ModeChar    = 0o020000
	ModeFifo    = 0o010000
)

// Entry is a path of the tree and what is there.
type Entry struct {
	Path string // from the root, parted by slashes, without a leading one; "." is the root itself
	Link string // path of an earlier entry, not a directory, that this is another name of; no other field counts then

	Mode     uint32 // type and permissions, as st_mode of stat(2)
	UID, GID uint32
	Mtime    time.Time
	Xattrs   map[string][]byte // by full name; system.posix_acl_access and _default in the kernel's form

	Target       string // of a symbolic link
	Major, Minor uint32 // of a device
	Size         int64  // of a regular file
	// Open gives exactly Size bytes. It is called by Finish, once, unless Size is 0; in a compressed image several
	// files are opened at the same time. In a chunked image a reader that has SkipHole() (int64, error) is asked for
	// zeros that it need not read: it passes over them and says how many they are, 0 where data may follow.
	Open func() (io.ReadCloser, error)
}

// A node is an inode to be: an entry, however many names it has, and where it will lie.
type node struct {
	Entry
	children map[string]*node // of a directory
	layers   map[string]int32 // of a directory: which layer each of its names is of, if one
	parent   *node            // of a directory
	names    []string         // of a directory, in the order of the disk, with "." and ".."
	attrs    []xattr          // in the order of their names; Entry.Xattrs is nil
	xattrs   []byte           // as on disk; made by Finish
	stored   *stored          // of a regular file in a compressed image
	place
}

// Builder makes one image. It is not safe for parallel use.
type Builder struct {
	w         io.WriterAt
	options   Options
	blockBits int
	root      *node
	packed    *node // the packed inode: before the files are compressed, and later if it is not empty
	finished  bool
	buffers   buffers
	prefixes  []xattrPrefix
	stats     Stats    // when it is finished
	progress  progress // while it is being finished
	temp      tempRoom
}

const defaultBlockSize = 4096

// New begins an image that Finish writes to w, several pieces at the same time. What w had there before does not matter: every byte is written.
func New(w io.WriterAt, o Options) (*Builder, error) {
	if o.BlockSize == 0 {
		o.BlockSize = defaultBlockSize
	}
	blockBits := bits.Len(uint(o.BlockSize)) - 1
	if o.BlockSize != 1<<blockBits || blockBits < ondisk.MinBlockBits || blockBits > ondisk.MaxBlockBits {
		return nil, fmt.Errorf("block size %d: must be a power of two from %d to %d", o.BlockSize, 1<<ondisk.MinBlockBits, 1<<ondisk.MaxBlockBits)
	}
	if most := len(ondisk.Super{}.VolumeName); len(o.Label) > most {
		return nil, fmt.Errorf("label %q: longer than %d bytes", o.Label, most)
	}
	if o.InlineMax < 0 || o.InlineMax > o.BlockSize {
		return nil, fmt.Errorf("inline tails of %d bytes: must be from 0 to a block, %d", o.InlineMax, o.BlockSize)
	}
	if err := o.Compression.check(o.BlockSize); err != nil {
		return nil, err
	}
	if err := o.checkChunks(); err != nil {
		return nil, err
	}
	prefixes, err := checkPrefixes(o.XattrPrefixes)
	if err != nil {
		return nil, err
	}
	if o.Compression.Fragments {
		prefixes = nil
	}
	if o.Workers < 0 || o.Workers > maxWorkers {
		return nil, fmt.Errorf("%d workers: must be from 0 to %d", o.Workers, maxWorkers)
	}
	if o.TempLimit < 0 {
		return nil, fmt.Errorf("limit of %d bytes for temporary files: must not be negative", o.TempLimit)
	}
	b := &Builder{w: w, options: o, blockBits: blockBits, prefixes: prefixes, temp: tempRoom{limit: o.TempLimit}}
	b.root = b.impliedDir()
	return b, nil
}

// impliedDir is a directory that nothing has been said of: the root, or the parent of an entry.
func (b *Builder) impliedDir() *node {
	n := b.makeNode(Entry{Mode: ModeDir | 0o755, Mtime: time.Unix(0, 0)}, nil)
	n.children = make(map[string]*node)
	return n
}

// makeNode makes a node of e, which was checked, and of its attributes. Every node that has a name comes from here, so
// that no time is later than SourceDateEpoch.
func (b *Builder) makeNode(e Entry, attrs []xattr) *node {
	n := &node{Entry: e, attrs: attrs}
	n.Xattrs = nil // attrs are these
	if limit := b.options.SourceDateEpoch; !limit.IsZero() && n.Mtime.After(limit) {
		n.Mtime = limit
	}
	return n
}

// Add puts e into the tree. Directories on its way that are missing are made, with mode 0755, owner 0 and time 0,
// until an entry of their own comes. Where something is already at the path, e takes its place; a directory that
// takes the place of a directory keeps what is in it. Of e, Open alone is used later.
func (b *Builder) Add(e Entry) error {
	if b.finished {
		return fmt.Errorf("add %q: the image is finished", e.Path)
	}
	if err := b.add(e); err != nil {
		return fmt.Errorf("add %q: %w", e.Path, err)
	}
	return nil
}

func (b *Builder) add(e Entry) error {
	path, err := splitPath(e.Path)
	if err != nil {
		return err
	}
	n, err := b.newNode(e)
	if err != nil {
		return err
	}
	if len(path) == 0 {
		if n.Mode&ModeType != ModeDir {
			return errors.New("the root must be a directory")
		}
		n.children = b.root.children
		b.root = n
		return nil
	}
	dir, err := b.mkdirAll(path[:len(path)-1])
	if err != nil {
		return err
	}
	name := path[len(path)-1]
	if old := dir.children[name]; old != nil && old.children != nil && n.children != nil {
		n.children = old.children
	}
	dir.children[name] = n
	return nil
}

// newNode checks e and gives its node, which for a hard link is the one that is there already.
func (b *Builder) newNode(e Entry) (*node, error) {
	if e.Link != "" {
		return b.linkTarget(e.Link)
	}
	if err := b.checkEntry(e); err != nil {
		return nil, err
	}
	attrs, err := b.splitXattrs(e.Xattrs)
	if err != nil {
		return nil, err
	}
	n := b.makeNode(e, attrs)
	switch e.Mode & ModeType {
	case ModeDir:
		n.children = make(map[string]*node)
		n.Size = 0
	case ModeSymlink:
		n.Size = int64(len(e.Target))
	case ModeRegular:
	default:
		n.Size = 0
	}
	return n, nil
}

func (b *Builder) linkTarget(link string) (*node, error) {
	path, err := splitPath(link)
	if err != nil {
		return nil, fmt.Errorf("hard link: %w", err)
	}
	n := b.root
	for _, name := range path {
		n = n.children[name] // nil for what is no directory
		if n == nil {
			return nil, fmt.Errorf("hard link to %q, which was not added", link)
		}
	}
	if n.children != nil {
		return nil, fmt.Errorf("hard link to %q, which is a directory", link)
	}
	return n, nil
}

func (b *Builder) mkdirAll(path []string) (*node, error) {
	dir := b.root
	for i, name := range path {
		next := dir.children[name]
		if next == nil {
			next = b.impliedDir()
			dir.children[name] = next
		}
		if next.children == nil {
			return nil, fmt.Errorf("%q is not a directory", strings.Join(path[:i+1], "/"))
		}
		dir = next
	}
	return dir, nil
}

// maxPath is how long a path may be, as Linux has it, and so how deep a tree: nobody could open what is deeper by its
// path, and an archive of a few bytes could name a directory for every second one of them.
const maxPath = 4096

func checkLength(n int) error {
	if n > maxPath {
		return fmt.Errorf("path of %d bytes: longer than %d; move what is there nearer to the root", n, maxPath)
	}
	return nil
}

// splitPath takes a path apart and refuses whatever could leave the tree or has no place in a directory.
func splitPath(path string) ([]string, error) {
	if path == "." {
		return nil, nil
	}
	if err := checkLength(len(path)); err != nil {
		return nil, err
	}
	names := strings.Split(path, "/")
	for _, name := range names {
		switch {
		case name == "" || name == "." || name == "..":
			return nil, fmt.Errorf("path %q: must be relative to the root, without empty, . or .. parts", path)
		case len(name) > ondisk.NameLen:
			return nil, fmt.Errorf("name %.40q… of %d bytes: longer than %d", name, len(name), ondisk.NameLen)
		case strings.Contains(name, "\x00"):
			return nil, fmt.Errorf("name %q: has a NUL", name)
		}
	}
	return names, nil
}

// Linux gives a device number 12 bits of major and 20 of minor, and a link target less than a page.
const (
	maxMajor  = 1<<12 - 1
	maxMinor  = 1<<20 - 1
	maxTarget = 4095
)

func (b *Builder) checkEntry(e Entry) error {
	if e.Mode > 0o177777 {
		return fmt.Errorf("mode %#o: has more than 16 bits", e.Mode)
	}
	switch e.Mode & ModeType {
	case ModeDir, ModeFifo, ModeSocket:
	case ModeRegular:
		if e.Size < 0 || e.Size > 0 && e.Open == nil && !b.options.MetadataOnly {
			return fmt.Errorf("size %d: must not be negative, and needs Open where it is not 0", e.Size)
		}
	case ModeSymlink:
		if len(e.Target) == 0 || len(e.Target) > maxTarget || strings.Contains(e.Target, "\x00") {
			return fmt.Errorf("link target of %d bytes: must have 1 to %d, and no NUL", len(e.Target), maxTarget)
		}
	case ModeChar, ModeBlock:
		if e.Major > maxMajor || e.Minor > maxMinor {
			return fmt.Errorf("device %d:%d: must be at most %d:%d", e.Major, e.Minor, maxMajor, maxMinor)
		}
	default:
		return fmt.Errorf("mode %#o: unknown type", e.Mode)
	}
	return nil
}
