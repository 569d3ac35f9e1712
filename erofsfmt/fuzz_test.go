package erofsfmt

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"testing"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// A prober looks at everything in an image that may be hostile, up to limits.
// Every error has to be one that the package promises.
type prober struct {
	t       testing.TB
	im      *Image
	entries int   // left to look at
	bytes   int64 // left to read
	seen    map[Nid]bool
	errs    int
}

// probeCache limits what is remembered, so that memory says something.
const probeCache = 4 << 20

func probe(t testing.TB, data []byte, entries int, bytes int64) (errs int) {
	im, err := OpenWith(context.Background(), memory(data), Options{CacheBytes: probeCache})
	p := &prober{t: t, im: im, entries: entries, bytes: bytes, seen: map[Nid]bool{}}
	if p.check(err) {
		p.visit(im.Root())
	}
	probeMetadata(t, data)
	return p.errs
}

// check says whether there is no error, and fails for one that is not promised.
func (p *prober) check(err error) bool {
	if err == nil {
		return true
	}
	p.errs++
	var fe *FormatError
	if !errors.As(err, &fe) {
		p.t.Fatalf("%T: %v", err, err)
	}
	for _, known := range []error{ErrCorrupt, ErrUnsupported, ErrNotErofs, io.ErrUnexpectedEOF} {
		if fe.Err == known {
			return false
		}
	}
	p.t.Fatalf("%v", err)
	return false
}

func (p *prober) visit(nid Nid) {
	if p.seen[nid] || p.entries <= 0 {
		return
	}
	p.seen[nid] = true
	p.entries--
	ctx := context.Background()
	ino, err := p.im.Inode(ctx, nid)
	if !p.check(err) {
		return
	}
	p.xattrs(&ino)
	switch ino.Mode & modeType {
	case modeDir:
		p.dir(&ino)
	case modeLnk:
		_, err := p.im.Readlink(ctx, &ino)
		p.check(err)
	case modeReg:
		p.read(&ino)
	}
}

func (p *prober) xattrs(ino *Inode) {
	names, err := p.im.Xattrs(context.Background(), ino)
	p.check(err)
	for _, n := range names {
		if _, err := p.im.Xattr(context.Background(), ino, n); err != ErrNoXattr {
			p.check(err)
		}
	}
}

func (p *prober) dir(dir *Inode) {
	ctx := context.Background()
	var entries []Dirent
	p.check(p.im.ReadDir(ctx, dir, 0, func(e Dirent) bool {
		entries = append(entries, e)
		return len(entries) < 2000
	}))
	for _, e := range entries {
		if len(e.Name) == 0 || len(e.Name) > 255 || bytes.ContainsAny([]byte(e.Name), "/\x00") {
			p.t.Fatalf("name %q", e.Name)
		}
		if _, err := p.im.Lookup(ctx, dir, e.Name); err != fs.ErrNotExist {
			p.check(err)
		}
		if e.Name != ".." {
			p.visit(e.Nid)
		}
	}
}

// read reads the beginning, the end and something between.
func (p *prober) read(ino *Inode) {
	for _, off := range []int64{0, ino.Size / 2, max(0, ino.Size-1000)} {
		n := min(ino.Size-off, 200000)
		if p.bytes -= n; p.bytes < 0 {
			return
		}
		p.check(p.im.ReadFile(context.Background(), ino, make([]byte, n), off))
	}
}

// tinyImages are small seeds with something of everything.
func tinyImages(t testing.TB) [][]byte {
	data := text(20000, 8)
	seeds := [][]byte{zipped(t, data, true).bytes(t), zipped(t, data, false).bytes(t)}
	x := withXattrs(1, join(le(uint32(2)), entry(4, "t", "v"), entry(0x80, "a", "b")))
	x.super.FeatureIncompat = ondisk.IncompatXattrPrefixes
	x.super.XattrPrefixCount, x.super.XattrPrefixStart, x.super.XattrBlkaddr = 1, 2816/4, 0
	x.more[2816] = le(uint16(2), [2]byte{4, 'x'})
	seeds = append(seeds, x.bytes(t))
	for _, c := range extentTests {
		f := newFake(c.layout, c.size)
		f.super.FeatureIncompat = c.super.FeatureIncompat | ondisk.IncompatLz4ZeroPadding
		f.super.ComprAlgs, f.super.PackedNid = c.super.ComprAlgs, c.super.PackedNid
		if c.super.FeatureIncompat&ondisk.IncompatComprCfgs != 0 {
			f.more[ondisk.SuperOffset+ondisk.SuperSize] = le(uint16(14), [14]byte{}, uint16(6), [6]byte{15})
		}
		f.inode.U, f.inode.Nb, f.body = c.u, c.nb, c.body
		seeds = append(seeds, f.bytes(t))
	}
	return seeds
}

func FuzzImage(f *testing.F) {
	for _, b := range tinyImages(f) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > ondisk.SuperOffset+12 {
			data[ondisk.SuperOffset+8] &^= ondisk.CompatSbChksum // the fuzzer cannot compute it
		}
		probe(t, data, 100, 4<<20)
	})
}

// A parser's target has an image around its bytes, so that the fuzzer need not
// find out how one is made.

// around has the fake opened, as its superblock lets it, and probed.
func around(t *testing.T, f *fake) {
	probe(t, f.bytes(t), 10, 1<<20)
}

// FuzzSuper has all that is said in the first 4 KiB, behind 1 KiB of nothing.
func FuzzSuper(f *testing.F) {
	for _, b := range tinyImages(f) {
		f.Add(b[ondisk.SuperOffset:4096])
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		image := append(make([]byte, ondisk.SuperOffset), data...)
		if len(data) > 12 {
			image[ondisk.SuperOffset+8] &^= ondisk.CompatSbChksum
		}
		probe(t, image, 3, 100_000)
	})
}

// FuzzInode has an inode with all that may follow it, in an image that knows every
// feature.
func FuzzInode(f *testing.F) {
	for _, c := range extentTests {
		fake := newFake(c.layout, c.size)
		fake.inode.U, fake.inode.Nb = c.u, c.nb
		f.Add(le(&fake.inode), c.body, uint8(12))
	}
	x := withXattrs(1, join(le(uint32(2)), entry(4, "t", "v"), entry(0x80, "a", "b")))
	f.Add(le(&x.inode), x.body, uint8(9))
	f.Fuzz(func(t *testing.T, inode, body []byte, bits uint8) {
		fake := newFake(0, 0)
		fake.announce(0, 1, 2, 3)
		fake.super.BlkSzBits = ondisk.MinBlockBits + bits%8
		fake.super.FeatureIncompat |= ondisk.IncompatAll &^ ondisk.IncompatMetabox &^ ondisk.IncompatDeviceTable
		fake.super.RootNid8b, fake.super.PackedNid = fakeRoot, fakeFile
		fake.more[fakeFile*32] = inode[:min(len(inode), ondisk.InodeExtendedSize)]
		fake.body = body[:min(len(body), 1<<16)]
		fake.blocks[20] = compressLz4(t, pattern(4096, 1))
		around(t, fake)
	})
}

// FuzzXattrs has the xattrs of an inode, those that it shares, and the prefixes.
func FuzzXattrs(f *testing.F) {
	f.Add(uint8(1), join(le(uint32(2)), entry(4, "t", "v"), entry(0x80, "a", "b")), append(make([]byte, 8), entry(1, "s", "v")...), le(uint16(2), [2]byte{4, 'x'}), "user.s")
	f.Add(uint8(0), entry(2, "", "acl"), []byte{}, []byte{}, "system.posix_acl_access")
	f.Fuzz(func(t *testing.T, shared uint8, own, others, prefixes []byte, name string) {
		fake := withXattrs(shared, own[:min(len(own), 1<<14)&^3])
		fake.super.FeatureIncompat = ondisk.IncompatXattrPrefixes
		fake.super.FeatureCompat = ondisk.CompatXattrFilter
		fake.super.XattrPrefixCount, fake.super.XattrPrefixStart, fake.super.XattrBlkaddr = uint8(len(prefixes)/3), 5*1024, 9
		fake.blocks[5], fake.blocks[9] = prefixes, others
		im, ino := fake.open(t, Options{})
		p := &prober{t: t, im: im}
		p.xattrs(ino)
		if _, err := im.Xattr(context.Background(), ino, name); err != ErrNoXattr {
			p.check(err)
		}
	})
}

// FuzzExtents has the index of a file: whatever it says, an extent holds the byte
// that was asked for and is of a size that can be allocated.
func FuzzExtents(f *testing.F) {
	for _, c := range extentTests {
		for off := range c.want {
			f.Add(uint8(c.layout), c.size, c.u, c.nb, c.body, off)
		}
	}
	f.Fuzz(func(t *testing.T, layout uint8, size uint64, u uint32, nb uint16, body []byte, off int64) {
		fake := newFake(int(layout%5), size%uint64(farAway))
		fake.announce(0, 1, 2, 3)
		fake.super.FeatureIncompat |= ondisk.Incompat48Bit | ondisk.IncompatFragments | ondisk.IncompatBigPcluster
		fake.super.PackedNid = 99
		fake.inode.U, fake.inode.Nb, fake.body = u, nb, body[:min(len(body), 1<<16)]
		im, err := Open(context.Background(), memory(fake.bytes(t)))
		p := &prober{t: t, im: im}
		if !p.check(err) {
			t.Fatal(err)
		}
		ino, err := im.Inode(context.Background(), fakeFile)
		if !p.check(err) || ino.Size == 0 {
			return
		}
		off = int64(uint64(off) % uint64(ino.Size))
		m := im.mapper(&ino)
		defer m.release()
		e, err := m.extentAt(context.Background(), off)
		if !p.check(err) {
			return
		}
		if off < e.la || off >= e.end() || e.end() < e.la {
			t.Fatalf("byte %d: %+v", off, e)
		}
		if e.kind == encoded && (e.plen <= 0 || e.plen > ondisk.MaxPcluster || e.llen > ondisk.MaxPclusterPlain || e.alg >= ondisk.AlgCount) {
			t.Fatalf("byte %d: %+v", off, e)
		}
	})
}

// FuzzDecompress has what a pcluster holds: what decodes whole, decodes the same
// as a prefix, and nothing else happens than an error.
func FuzzDecompress(f *testing.F) {
	all := codecs(f)
	for i, c := range all {
		f.Add(uint8(i), c.compress(f, text(300, 1)), uint16(300))
	}
	f.Fuzz(func(t *testing.T, alg uint8, in []byte, n uint16) {
		d := all[int(alg)%len(all)].d
		out, prefix := make([]byte, n), make([]byte, n/2)
		err := d.decode(out, in, false)
		if prefixErr := d.decode(prefix, in, true); err == nil && (prefixErr != nil || !bytes.Equal(prefix, out[:n/2])) {
			t.Fatalf("%d bytes decode, %d of them: %v", n, n/2, prefixErr)
		}
	})
}

func FuzzDirBlock(f *testing.F) {
	f.Add(dirBytes("", ".", 1, "..", 2, "a", 3), "a")
	f.Add(dirBytes("\x00\x00", "b", 1), "x")
	f.Fuzz(func(t *testing.T, data []byte, name string) {
		b, err := parseDirBlock(data)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		for i := range b.n {
			_, got, err := b.entry(i)
			if err == nil && (len(got) == 0 || len(got) > ondisk.NameLen) {
				t.Fatalf("entry %d is called %q", i, got)
			}
		}
		if _, err := b.find([]byte(name)); err != nil && err != fs.ErrNotExist && !errors.Is(err, ErrCorrupt) {
			t.Fatal(err)
		}
	})
}
