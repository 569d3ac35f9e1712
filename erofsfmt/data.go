package erofsfmt

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// An extent is a run of a file's bytes and where they are: at.plen bytes at a
// place, to be decoded to llen bytes from la, or llen bytes stored as they are.
type extent struct {
	la, llen int64
	kind     extentKind
	at       place
	plen     int64 // encoded
	alg      uint8 // encoded
	partial  bool  // encoded: plen bytes decode to more than llen
}

type extentKind uint8

const (
	hole extentKind = iota
	stored
	encoded
)

func (e *extent) end() int64 { return e.la + e.llen }

// A mapper maps and reads one file during one call. It comes from a pool, since it
// would be the one allocation of a read.
type mapper struct {
	im   *Image
	ino  *Inode
	meta metaReader
	z    zindex
	g    gather

	surplus func(*Decoded) // as in ReadFileSurplus
}

// mapper lends a mapper; it goes back by release.
func (im *Image) mapper(ino *Inode) *mapper {
	m, ok := im.mappers.Get().(*mapper)
	if !ok {
		m = &mapper{im: im}
		m.meta.im = im
	}
	m.ino = ino
	return m
}

// release gives a mapper back without what it knew and pointed to. Its buffers
// stay with it.
func (m *mapper) release() {
	clear(m.g.pieces) // of the caller's memory
	clear(m.g.coming)
	m.ino, m.z, m.surplus = nil, zindex{}, nil
	m.g = gather{pieces: m.g.pieces[:0], coming: m.g.coming[:0]}
	m.meta = metaReader{im: m.im, spill: m.meta.spill}
	m.im.mappers.Put(m)
}

// extentAt maps byte off of the file, which lies inside it. It is the only
// function that knows the layouts (fs/erofs/data.c erofs_map_blocks).
func (m *mapper) extentAt(ctx context.Context, off int64) (extent, error) {
	var e extent
	var err error
	switch m.ino.layout {
	case ondisk.LayoutPlain, ondisk.LayoutInline:
		e, err = m.flatAt(off)
	case ondisk.LayoutChunk:
		e, err = m.chunkAt(ctx, off)
	default:
		e, err = m.compressedAt(ctx, off)
	}
	if err == nil && (off < e.la || off >= e.end()) {
		err = nowhere.corrupt("an extent at %d of %d bytes for byte %d", e.la, e.llen, off)
	}
	return e, err
}

// flatAt maps data that is in one run of blocks, except that the inline layout
// keeps the last block after the inode.
func (m *mapper) flatAt(off int64) (extent, error) {
	bs := m.im.sb.BlockSize()
	size := m.ino.Size
	if m.ino.startBlk == ondisk.NullAddr {
		return extent{llen: size, kind: hole}, nil
	}
	e := extent{kind: stored, llen: size}
	if m.ino.layout == ondisk.LayoutInline {
		e.llen = (size - 1) / bs * bs
	}
	if off < e.llen {
		var err error
		e.at, err = m.im.deviceAt(0, m.im.blockOff(m.ino.startBlk))
		return e, err
	}
	e.la, e.llen = e.llen, size-e.llen
	e.at = m.im.bodyAt(m.ino, 1)
	if e.at.off&(bs-1)+e.llen > bs {
		return e, e.at.corrupt("inline data of %d bytes crosses its block", e.llen)
	}
	return e, nil
}

// chunkAt maps data that is in chunks of equal size, each with an entry in a
// table after the inode.
func (m *mapper) chunkAt(ctx context.Context, off int64) (extent, error) {
	bits := uint(m.im.sb.BlockBits) + uint(m.ino.chunkFmt&ondisk.ChunkBlkBitsMask)
	chunk := off >> bits
	e := extent{la: chunk << bits, kind: stored}
	e.llen = min(1<<bits, m.ino.Size-e.la)
	if m.ino.chunkFmt&ondisk.ChunkIndexes == 0 {
		b, err := m.meta.bytes(ctx, m.im.bodyAt(m.ino, ondisk.BlockMapEntrySize).plus(chunk*ondisk.BlockMapEntrySize), ondisk.BlockMapEntrySize)
		if err != nil {
			return e, err
		}
		blk := binary.LittleEndian.Uint32(b)
		if blk == ^uint32(0) {
			e.kind = hole
			return e, nil
		}
		e.at, err = m.im.deviceAt(0, m.im.blockOff(uint64(blk)))
		return e, err
	}
	b, err := m.meta.bytes(ctx, m.im.bodyAt(m.ino, ondisk.ChunkIndexSize).plus(chunk*ondisk.ChunkIndexSize), ondisk.ChunkIndexSize)
	if err != nil {
		return e, err
	}
	idx := ondisk.DecodeChunkIndex(b)
	mask := uint64(1)<<32 - 1
	if m.ino.chunkFmt&ondisk.Chunk48Bit != 0 {
		mask = 1<<48 - 1
	}
	blk := (uint64(idx.StartBlkHi)<<32 | uint64(idx.StartBlkLo)) & mask
	if blk == mask {
		e.kind = hole
		return e, nil
	}
	e.at, err = m.im.deviceAt(int(idx.DeviceID&m.im.deviceMask()), m.im.blockOff(blk))
	return e, err
}

// ReadFile fills all of p with the file's bytes from off, or returns an error.
// Bytes past ino.Size are not there to be read: asking for them is an error.
func (im *Image) ReadFile(ctx context.Context, ino *Inode, p []byte, off int64) error {
	return im.ReadFileSurplus(ctx, ino, p, off, nil)
}

// A Decoded is a run of a file's bytes that had to be decoded for a read.
type Decoded struct {
	Off  int64  // in the file
	Data []byte // which others may read, too
	b    *block
}

// Release says that nobody looks at Data any more.
func (d *Decoded) Release() { d.b.release() }

// ReadFileSurplus is ReadFile for who has use for what is decoded beside p: surplus
// gets each extent of which p is only a part, unless it was remembered, and is to
// have it released. It may be called by several goroutines, before
// ReadFileSurplus returns.
func (im *Image) ReadFileSurplus(ctx context.Context, ino *Inode, p []byte, off int64, surplus func(*Decoded)) error {
	if im.union != nil {
		return im.union.readFile(ctx, ino, p, off, surplus)
	}
	switch ino.Mode & modeType {
	case modeReg, modeDir, modeLnk:
	default:
		return fmt.Errorf("erofs: nid %d has no data: mode %#o", ino.Nid, ino.Mode)
	}
	if off < 0 || off > ino.Size-int64(len(p)) {
		return fmt.Errorf("erofs: nid %d has %d bytes, not %d at %d", ino.Nid, ino.Size, len(p), off)
	}
	m := im.mapper(ino)
	defer m.release()
	m.surplus = surplus
	if err := m.read(ctx, p, off); err != nil {
		return fmt.Errorf("nid %d: %w", uint64(ino.Nid), err)
	}
	return nil
}

// read maps and reads what ReadFile has checked.
func (m *mapper) read(ctx context.Context, p []byte, off int64) error {
	for done := 0; done < len(p); {
		e, err := m.extentAt(ctx, off+int64(done))
		if err != nil {
			return err
		}
		skip := off + int64(done) - e.la
		n := int(min(int64(len(p)-done), e.llen-skip))
		switch e.kind {
		case hole:
			clear(p[done : done+n])
		case stored:
			err = m.addStored(ctx, e.at.plus(skip), p[done:done+n])
		case encoded:
			err = m.addEncoded(ctx, piece{extent: e, skip: skip, dst: p[done : done+n], surplus: m.surplus})
		}
		if err != nil {
			return err
		}
		done += n
	}
	if err := m.flushStored(ctx); err != nil {
		return err
	}
	return m.finishEncoded(ctx)
}

// A gather joins what is contiguous on the source into one read: chunks that
// lie in a row, and pclusters, which nearly always do.
type gather struct {
	at  place  // of dst
	dst []byte // stored bytes that are yet to be read

	pieces []piece // encoded, contiguous on the source
	encLen int64
	coming []piece // that others are decoding
}

// A piece is the part of an encoded extent that is wanted: len(dst) bytes after
// the first skip. A nil dst means that all of it is to be remembered.
type piece struct {
	extent
	skip    int64
	dst     []byte
	surplus func(*Decoded)
}

// want is how many bytes of the extent must be there.
func (pc *piece) want() int64 {
	if pc.dst == nil {
		return pc.llen
	}
	return pc.skip + int64(len(pc.dst))
}

func (pc *piece) whole() bool { return pc.skip == 0 && int64(len(pc.dst)) == pc.llen }

func (im *Image) key(pc *piece) cacheKey {
	return cacheKey{at: pc.at, plen: pc.plen, layer: im.layer, alg: pc.alg + 1}
}

// addStored has dst read from a place. Its memory follows that of the call before.
func (m *mapper) addStored(ctx context.Context, at place, dst []byte) error {
	g := &m.g
	n := len(g.dst)
	if n > 0 && g.at.plus(int64(n)) == at && cap(g.dst)-n >= len(dst) && &g.dst[:n+1][n] == &dst[0] {
		g.dst = g.dst[:n+len(dst)]
		return nil
	}
	if err := m.flushStored(ctx); err != nil {
		return err
	}
	g.at, g.dst = at, dst
	return nil
}

func (m *mapper) flushStored(ctx context.Context) error {
	dst := m.g.dst
	m.g.dst = nil
	if len(dst) == 0 {
		return nil
	}
	return m.im.readPlace(ctx, dst, m.g.at)
}

// addEncoded has a piece decoded, or copies it if it is remembered.
func (m *mapper) addEncoded(ctx context.Context, pc piece) error {
	g := &m.g
	b, coming := m.im.pclusters.look(m.im.key(&pc), pc.want())
	if b != nil {
		copy(pc.dst, b.data[pc.skip:])
		b.release()
		return nil
	}
	if coming {
		g.coming = append(g.coming, pc)
		return nil
	}
	if n := len(g.pieces); n > 0 {
		last := &g.pieces[n-1]
		if last.at.plus(last.plen) != pc.at || g.encLen+pc.plen > ondisk.MaxPcluster {
			if err := m.flushEncoded(ctx); err != nil {
				return err
			}
		}
	}
	g.pieces = append(g.pieces, pc)
	g.encLen += pc.plen
	return nil
}

// finishEncoded decodes what is gathered, then waits for what others decode.
func (m *mapper) finishEncoded(ctx context.Context) error {
	g := &m.g
	if err := m.flushEncoded(ctx); err != nil {
		return err
	}
	for n := len(g.coming); n > 0; n = len(g.coming) {
		pc := g.coming[n-1]
		g.coming = g.coming[:n-1]
		if err := m.im.pclusters.wait(ctx, m.im.key(&pc)); err != nil {
			return err
		}
		if err := m.addEncoded(ctx, pc); err != nil {
			return err
		}
		if err := m.flushEncoded(ctx); err != nil {
			return err
		}
	}
	return nil
}

// flushEncoded reads the gathered pclusters at once and decodes each.
func (m *mapper) flushEncoded(ctx context.Context) error {
	g := &m.g
	if len(g.pieces) == 0 {
		return nil
	}
	buf := m.im.buffers.get(g.encLen)
	defer m.im.buffers.put(buf)
	if err := m.im.readPlace(ctx, *buf, g.pieces[0].at); err != nil {
		return err
	}
	if err := m.im.decodePieces(ctx, g.pieces, *buf); err != nil {
		return err
	}
	clear(g.pieces)
	g.pieces, g.encLen = g.pieces[:0], 0
	return nil
}

// worthSharing is how many decoded bytes of each algorithm take about 100 µs:
// less is not worth waking another processor for.
var worthSharing = [ondisk.AlgCount]int64{
	ondisk.AlgLz4: 256 << 10, ondisk.AlgZstd: 64 << 10, ondisk.AlgDeflate: 64 << 10, ondisk.AlgLzma: 8 << 10,
}

// decodePieces decodes contiguous pieces, which are in, on as many processors as
// have nothing to do for the image and as it pays for.
func (im *Image) decodePieces(ctx context.Context, pieces []piece, in []byte) error {
	const unit = 256
	work := int64(0) // unit is worth a processor
	for i := range pieces {
		work += pieces[i].llen * unit / worthSharing[pieces[i].alg]
	}
	helpers := 0
	for want := min(int(work/unit), len(pieces)) - 1; helpers < want && im.takeProcessor(); {
		helpers++
	}
	if helpers > 0 {
		return im.share(ctx, helpers, pieces, in)
	}
	for i := range pieces {
		if err := im.decodePiece(ctx, &pieces[i], in[:pieces[i].plen]); err != nil {
			return err
		}
		in = in[pieces[i].plen:]
	}
	return nil
}

// takeProcessor says whether one more goroutine may decode.
func (im *Image) takeProcessor() bool {
	select {
	case im.helpers <- struct{}{}:
		return true
	default:
		return false
	}
}

// share decodes pieces in this goroutine and in helpers, which are taken already,
// and returns the first error.
func (im *Image) share(ctx context.Context, helpers int, pieces []piece, in []byte) error {
	start := pieces[0].at.off
	var taken atomic.Int64
	var failed error
	var once sync.Once
	work := func() {
		for i := taken.Add(1); i <= int64(len(pieces)); i = taken.Add(1) {
			pc := &pieces[i-1]
			at := pc.at.off - start
			if err := im.decodePiece(ctx, pc, in[at:at+pc.plen]); err != nil {
				once.Do(func() { failed = err })
				taken.Store(int64(len(pieces)))
			}
		}
	}
	var others sync.WaitGroup
	for range helpers {
		others.Go(func() {
			defer func() { <-im.helpers }()
			work()
		})
	}
	work()
	others.Wait()
	return failed
}

// decodePiece decodes straight into the caller's buffer what the caller wants
// whole, and remembers what it does not.
func (im *Image) decodePiece(ctx context.Context, pc *piece, in []byte) error {
	if pc.whole() {
		return im.decode(&pc.extent, in, pc.dst)
	}
	return im.remember(ctx, pc, func(out []byte) error { return im.decode(&pc.extent, in, out) })
}

// remember has an extent decoded by decode, unless it is remembered or others are
// at it, and copies what is wanted of it.
func (im *Image) remember(ctx context.Context, pc *piece, decode func(out []byte) error) error {
	made := false
	b, err := im.pclusters.fill(ctx, im.key(pc), pc.llen, func() (*block, error) {
		b := newBlock(im.buffers, pc.llen)
		made = true
		return b, decode(b.data)
	})
	if err != nil {
		return err
	}
	copy(pc.dst, b.data[pc.skip:])
	if made && pc.surplus != nil {
		b.refs.Add(1)
		pc.surplus(&Decoded{pc.la, b.data, b})
	}
	b.release()
	return nil
}

// Prefetch decodes what bytes off to off+n of a file are encoded in, and remembers
// it, as far as the file goes. It is for who foresees a read and does not wait for
// it. LZ4 is left to the read, since decoding it takes no longer than copying.
func (im *Image) Prefetch(ctx context.Context, ino *Inode, off, n int64) error {
	if im.union != nil {
		l, inner := im.union.inLayer(ino)
		return im.union.located(l, l.Prefetch(ctx, &inner, off, n))
	}
	if ino.Mode&modeType != modeReg || off < 0 || off >= ino.Size {
		return nil
	}
	m := im.mapper(ino)
	defer m.release()
	for end := off + min(n, ino.Size-off); off < end; {
		e, err := m.extentAt(ctx, off)
		if err == nil && e.kind == encoded && e.alg != ondisk.AlgLz4 {
			err = m.addEncoded(ctx, piece{extent: e})
		}
		if err != nil {
			return fmt.Errorf("nid %d: %w", uint64(ino.Nid), err)
		}
		off = e.end()
	}
	if err := m.flushEncoded(ctx); err != nil {
		return fmt.Errorf("nid %d: %w", uint64(ino.Nid), err)
	}
	return nil
}
