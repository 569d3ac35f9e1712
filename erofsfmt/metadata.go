package erofsfmt

import (
	"cmp"
	"context"
	"errors"
	"slices"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// A Range is a run of an image's bytes.
type Range struct{ Off, Len int64 }

func (r Range) end() int64 { return r.Off + r.Len }

// MetadataOptions are how metadata is loaded. The zero value works.
type MetadataOptions struct {
	// Unit is what fetch brings whole, wherever in it a range begins and ends: ranges begin and end at multiples of
	// it. 0 means 4 KiB.
	Unit int64
	// Gap is how far apart ranges are that are asked for as one, with what is between them: a request costs about as
	// much as so many bytes. 0 means 256 KiB; negative: only neighbours are joined.
	Gap int64
}

const (
	defaultGap = 256 << 10
	// guessPerInode is what is asked for at once for each inode that the superblock announces: 32 or 64 bytes of the
	// inode, 12 and the name of its entry. It is less than most images have, since what is too little costs a request,
	// and what is too much the data of files.
	guessPerInode = 48
	maxGuess      = 32 << 20
	// densePerInode is what metadata has for each inode where nothing else lies in between, the ends of small files that
	// are with their inodes included.
	densePerInode = 2 << 10
	// maxWholeBox is how large a metabox is at most that is loaded as a whole.
	maxWholeBox = 1 << 30
	// dirWindow is how much of a directory is asked for before it was seen that the blocks before it are some.
	dirWindow = 1 << 20
	// loaderCache is for the pages and pclusters that one round looks at again and again.
	loaderCache = 8 << 20
	// maxParked is how many inodes wait for their bytes before these are asked for.
	maxParked = 1 << 16
	// What a hostile image can have, which is small itself: directories that all lie at one place, with entries that lead
	// to each other.
	maxWalkDirs    = 1 << 20
	maxWalkEntries = 1 << 26
	// fewEntries is how many are looked at in any image, beside one for each of its bytes: an entry has 13 at least.
	fewEntries = 1 << 20
)

// MetadataStats count what was loaded.
type MetadataStats struct {
	Rounds  int   // calls of fetch
	Bytes   int64 // asked for, to the unit
	Entries int64 // of directories
	Dirs    int64
	Faults  int64 // what cannot be made sense of, and was left to whoever wants to read it
	Unread  int64 // what the source did not give though it had been fetched
	Err     error // of the first of these
	Stopped bool  // there is more than any image should have, and it was left alone
}

// LoadMetadata has all that is needed to list the image in src brought near: what stat(2), readdir(3), readlink(2) and
// the extended attributes of every inode are read from. It is for a source of which some bytes are here and others are
// far away.
//
// It walks the tree. Before it looks at bytes it asks fetch for them: fetch is called with what is needed next of
// everything that the walk has come to, in order, apart by more than Gap, and returns when src can give that without
// going far; what it could not bring, src.ReadAt is to fail for. So the number of calls goes by the depth of the tree and
// not by the number of directories, and for an image whose metadata lies together it is two or three:
//
//	superblock ─► a guess: where metadata begins, as much as so many inodes have
//	              ─► the root ─► its blocks ─┬─► inodes, their xattrs, targets of links
//	                                         └─► directories ─► their blocks ─► …
//
// What comes with a unit counts as here. Inodes and directories of a metabox, and those whose data is a fragment, lead to
// the pclusters that they are decoded from; the indexes of regular files are not looked at.
//
// What is corrupt is counted and left alone; the walk goes on. It ends when everything was looked at, with an error of
// fetch, with ctx, or when the image cannot be opened. Memory is bounded: a few bytes for each directory, and
// some MiB (35 of them for a million files); and so is the time that an image takes whose directories lead to each other.
func LoadMetadata(ctx context.Context, src ReaderAt, o MetadataOptions, fetch func(ctx context.Context, ranges []Range) error) (MetadataStats, error) {
	l := newLoader(src, o, fetch)
	err := l.load(ctx)
	return l.stats, err
}

// A loader walks an image of which it has only what it asked for.
type loader struct {
	gate  *gate
	gap   int64
	fetch func(ctx context.Context, ranges []Range) error

	im      *Image
	boxHere bool // the metabox is here
	ready   []errand
	parked  []errand          // until what they miss is here
	seen    map[uint64]uint64 // directories, a bit each
	stats   MetadataStats

	maxDirs, maxEntries int64
}

func newLoader(src ReaderAt, o MetadataOptions, fetch func(ctx context.Context, ranges []Range) error) *loader {
	if o.Gap == 0 {
		o.Gap = defaultGap
	}
	unit := (max(o.Unit, 1) + pageSize - 1) &^ (pageSize - 1) // metadata is read by the page
	return &loader{
		gate: &gate{src: src, unit: unit}, gap: max(o.Gap, 0), fetch: fetch, seen: map[uint64]uint64{},
		maxDirs: maxWalkDirs, maxEntries: min(maxWalkEntries, fewEntries+min(src.Size(), maxWalkEntries)),
	}
}

// An errand is to look at an inode or, where list is set, at the blocks of a directory from pos on.
type errand struct {
	nid  Nid
	pos  int64
	list bool
}

func (l *loader) load(ctx context.Context) error {
	err := l.until(ctx, func() (err error) {
		l.im, err = OpenWith(ctx, l.gate, Options{CacheBytes: loaderCache})
		return err
	})
	if err != nil {
		return err
	}
	l.guess()
	for _, special := range []func(context.Context) error{l.wholeBox, l.prefixes} {
		if err := l.until(ctx, func() error { return special(ctx) }); err != nil {
			if err := l.skip(ctx, err); err != nil {
				return err
			}
		}
	}
	l.ready = append(l.ready, errand{nid: l.im.Root()})
	for len(l.ready)+len(l.parked) > 0 && !l.stats.Stopped {
		if n := len(l.ready); n > 0 && len(l.parked) < maxParked {
			next := l.ready[n-1]
			l.ready = l.ready[:n-1]
			if err := l.do(ctx, next); err != nil {
				return err
			}
			continue
		}
		if err := l.bring(ctx); err != nil {
			return err
		}
	}
	return nil
}

// until has f tried until nothing is absent that it needs.
func (l *loader) until(ctx context.Context, f func() error) error {
	for {
		err := f()
		if !errors.Is(err, errAbsent) {
			return err
		}
		if err := l.bring(ctx); err != nil {
			return err
		}
	}
}

// bring has everything fetched that was found missing, and lets go on who waited for it.
func (l *loader) bring(ctx context.Context) error {
	if ranges := l.gate.wanted(l.joinable); len(ranges) > 0 {
		l.stats.Rounds++
		for _, r := range ranges {
			l.stats.Bytes += r.Len
		}
		if err := l.fetch(ctx, ranges); err != nil {
			return err
		}
		for _, r := range ranges {
			l.gate.have.add(r)
		}
	}
	l.ready = append(l.ready, l.parked...)
	l.parked = l.parked[:0]
	return nil
}

// joinable is how far apart ranges may be to be asked for as one, if the last of them ends at end. Where before that
// there is little room for anything but metadata, what is between them will be needed, too.
func (l *loader) joinable(end int64) int64 {
	if l.im != nil && l.gap > 0 && uint64(max(end-l.start(), 0))/densePerInode <= l.im.sb.Inodes {
		return max(l.gap, maxGuess)
	}
	return l.gap
}

// start is where inodes begin.
func (l *loader) start() int64 { return int64(l.im.sb.MetaBlkaddr) << l.im.sb.BlockBits }

// guess asks for as much as the inodes should take. Without it each level of the tree would be a round.
func (l *loader) guess() {
	n := int64(min(l.im.sb.Inodes, maxGuess/guessPerInode)) * guessPerInode
	l.gate.needs(l.start(), n)
}

// wholeBox has all of the metabox loaded, if it is of a size that makes sense.
func (l *loader) wholeBox(ctx context.Context) error {
	if !l.im.sb.incompat(ondisk.IncompatMetabox) {
		return nil
	}
	box, err := l.im.metaboxInode(ctx)
	if err != nil || box.Size > maxWholeBox {
		return err
	}
	if err := l.data(ctx, box, 0, box.Size); err != nil {
		return err
	}
	l.boxHere = true
	return nil
}

// prefixes has the image's own xattr prefixes read, which the kernel does when it mounts.
func (l *loader) prefixes(ctx context.Context) error {
	_, err := l.im.longPrefixes(ctx)
	return err
}

// do runs an errand. Its error ends the walk.
func (l *loader) do(ctx context.Context, e errand) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	var err error
	if e.list {
		err = l.list(ctx, &e)
	} else {
		err = l.inode(ctx, e.nid)
	}
	if errors.Is(err, errAbsent) {
		l.parked = append(l.parked, e)
		return nil
	}
	return l.skip(ctx, err)
}

// skip counts an error that is none of the walk's.
func (l *loader) skip(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var fe *FormatError
	if errors.As(err, &fe) {
		l.stats.Faults++
		return nil
	}
	l.stats.Unread++
	if l.stats.Err == nil {
		l.stats.Err = err
	}
	return nil
}

// inode needs an inode, its xattrs, and the target of a link; a directory is to be listed, once.
func (l *loader) inode(ctx context.Context, nid Nid) error {
	at := l.im.locate(nid)
	if err := l.needs(ctx, at, ondisk.InodeCompactSize); err != nil {
		return err
	}
	ino, err := l.im.readInode(ctx, nid)
	if err != nil {
		return err
	}
	if err := l.needs(ctx, at, int64(ino.headSize)+int64(ino.xattrSize)); err != nil {
		return err
	}
	if err := l.sharedXattrs(ctx, &ino); err != nil {
		return err
	}
	switch ino.Mode & modeType {
	case modeLnk:
		if ino.Size > 0 && ino.Size <= maxLink {
			return l.data(ctx, &ino, 0, ino.Size)
		}
	case modeDir:
		if l.firstSeen(nid) {
			l.stats.Dirs++
			l.ready = append(l.ready, errand{nid: nid, list: true})
		}
	}
	return nil
}

// firstSeen notes a directory.
func (l *loader) firstSeen(nid Nid) bool {
	word, bit := uint64(nid)>>6, uint64(1)<<(nid&63)
	if l.seen[word]&bit != 0 {
		return false
	}
	l.seen[word] |= bit
	l.stats.Stopped = l.stats.Stopped || l.stats.Dirs >= l.maxDirs
	return true
}

// sharedXattrs needs the entries that an inode has in common with others. Its own lie behind it.
func (l *loader) sharedXattrs(ctx context.Context, ino *Inode) error {
	if ino.xattrSize <= ondisk.XattrHeaderSize {
		return nil
	}
	m := metaReader{im: l.im}
	start := l.im.metaAt(ino, int64(ino.headSize))
	h, err := m.bytes(ctx, start, ondisk.XattrHeaderSize)
	if err != nil {
		return err
	}
	var missing error
	for i := range int64(h[4]) {
		id, err := m.bytes(ctx, start.plus(ondisk.XattrHeaderSize+i*4), 4)
		if err != nil {
			return err
		}
		at := l.im.sharedXattrAt(uint32(id[0]) | uint32(id[1])<<8 | uint32(id[2])<<16 | uint32(id[3])<<24)
		if err := l.xattrEntry(ctx, &m, at); err != nil && missing == nil {
			missing = err // and the others may be missing, too
		}
	}
	return missing
}

func (l *loader) xattrEntry(ctx context.Context, m *metaReader, at place) error {
	if err := l.needs(ctx, at, ondisk.XattrEntrySize); err != nil {
		return err
	}
	b, err := m.bytes(ctx, at, ondisk.XattrEntrySize)
	if err != nil {
		return err
	}
	d := ondisk.DecodeXattrEntry(b)
	return l.needs(ctx, at, ondisk.XattrEntrySize+int64(d.NameLen)+int64(d.ValueSize))
}

// list looks at the blocks of a directory, some of them at a time, and at what is in them. e.pos is where it goes on.
func (l *loader) list(ctx context.Context, e *errand) error {
	ino, err := l.im.readInode(ctx, e.nid)
	if err != nil {
		return err
	}
	r, err := l.im.newDirReader(&ino)
	if err != nil {
		return err
	}
	defer r.m.release()
	for bad := 0; e.pos < ino.Size && !l.stats.Stopped; {
		window := min(dirWindow, ino.Size-e.pos)
		if err := l.dataBy(ctx, r.m, e.pos, window); errors.Is(err, errAbsent) {
			return err
		} // what else is the matter with a block is that block's
		for end := e.pos + window; e.pos < end && !l.stats.Stopped; e.pos += l.im.sb.BlockSize() {
			if len(l.parked) >= maxParked {
				l.ready = append(l.ready, *e)
				return nil
			}
			err := l.block(ctx, &r, e.pos>>l.im.sb.BlockBits)
			if err == nil {
				continue
			}
			if bad++; bad == maxBadBlocks || errors.Is(err, errAbsent) {
				return err
			}
			if err := l.skip(ctx, err); err != nil {
				return err
			}
		}
	}
	return nil
}

// block looks at what is in a block of a directory.
func (l *loader) block(ctx context.Context, r *dirReader, blk int64) error {
	b, err := r.block(ctx, blk)
	if err != nil {
		return err
	}
	for i := range b.n {
		d, name, err := b.entry(i)
		if err != nil {
			return err
		}
		if l.stats.Entries++; l.stats.Entries > l.maxEntries {
			l.stats.Stopped = true
			return nil
		}
		if string(name) == "." || string(name) == ".." {
			continue
		}
		if err := l.do(ctx, errand{nid: Nid(d.Nid)}); err != nil {
			return err
		}
	}
	return nil
}

// data needs what a range of an inode's data is stored or encoded in.
func (l *loader) data(ctx context.Context, ino *Inode, off, n int64) error {
	m := l.im.mapper(ino)
	defer m.release()
	return l.dataBy(ctx, m, off, n)
}

func (l *loader) dataBy(ctx context.Context, m *mapper, off, n int64) error {
	var missing error
	for end := off + n; off < end; {
		e, err := m.extentAt(ctx, off)
		if err != nil {
			return errors.Join(missing, err)
		}
		stop := min(e.end(), end)
		switch e.kind {
		case stored:
			err = l.needs(ctx, e.at.plus(off-e.la), stop-off)
		case encoded:
			err = l.needs(ctx, e.at, e.plen)
		}
		if err != nil && !errors.Is(err, errAbsent) {
			return err
		}
		if err != nil {
			missing = err
		}
		off = stop
	}
	return missing
}

// needs is errAbsent unless n bytes at a place are here. They are asked for then.
func (l *loader) needs(ctx context.Context, at place, n int64) error {
	switch at.src {
	case 0:
		return l.gate.needs(at.off, n)
	case inMetabox:
		if l.boxHere {
			return nil
		}
		return l.inside(ctx, l.im.metaboxInode, at, n)
	case inPacked:
		return l.inside(ctx, l.im.packedInode, at, n)
	}
	return nil // of another device
}

// inside needs what a range of a special inode is made of.
func (l *loader) inside(ctx context.Context, holder func(context.Context) (*Inode, error), at place, n int64) error {
	ino, err := holder(ctx)
	if err != nil {
		return err
	}
	if at.off < 0 || at.off >= ino.Size {
		return at.corrupt("past the end of nid %d, which has %d bytes", uint64(ino.Nid), ino.Size)
	}
	return l.data(ctx, ino, at.off, min(n, ino.Size-at.off))
}

// errAbsent says that something is to be fetched first.
var errAbsent = errors.New("not fetched yet")

// A gate lets through to a source what was fetched, and notes what else is asked for.
type gate struct {
	src     ReaderAt
	unit    int64
	have    ranges
	missing []Range // in any order
	sorted  int     // so many of them are as in ranges
}

// Size is a ReaderAt's.
func (g *gate) Size() int64 { return g.src.Size() }

// ReadAt is a ReaderAt's.
func (g *gate) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := g.needs(off, int64(len(p))); err != nil {
		return err
	}
	return g.src.ReadAt(ctx, p, off)
}

// needs is errAbsent unless what there is of n bytes from off is here. What is past the end of the source is left to who
// reads it.
func (g *gate) needs(off, n int64) error {
	size := g.src.Size()
	if off < 0 || off >= size || n <= 0 {
		return nil
	}
	n = min(n, size-off)
	if g.have.covers(off, n) {
		return nil
	}
	first := off / g.unit * g.unit
	end := (off+n-1)/g.unit*g.unit + g.unit
	g.missing = append(g.missing, Range{first, min(end, size) - first})
	if len(g.missing) > 2*g.sorted+1024 {
		g.compact()
	}
	return errAbsent
}

// compact joins what is missing.
func (g *gate) compact() {
	slices.SortFunc(g.missing, func(a, b Range) int { return cmp.Compare(a.Off, b.Off) })
	g.missing = joined(g.missing, 0)
	g.sorted = len(g.missing)
}

// wanted is what is missing, with gaps that are not worth a request: gap says how long they may be where
// everything ends at end. Nothing is missing afterwards.
func (g *gate) wanted(gap func(end int64) int64) []Range {
	g.compact()
	var out []Range
	for _, r := range g.missing {
		out = g.have.without(out, r)
	}
	g.missing, g.sorted = nil, 0
	if len(out) == 0 {
		return nil
	}
	return joined(out, gap(out[len(out)-1].end()))
}
