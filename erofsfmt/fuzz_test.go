package erofsfmt

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
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

func probe(t testing.TB, data []byte, entries int, bytes int64) (errs int) {
	// What is remembered is limited too, so that memory says something.
	im, err := OpenWith(context.Background(), memory(data), Options{CacheBytes: 4 << 20})
	p := &prober{t: t, im: im, entries: entries, bytes: bytes, seen: map[Nid]bool{}}
	if p.check(err) {
		p.visit(im.Root())
	}
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

// Mutations of every image of the corpus, the same ones each time: bits flipped,
// bytes set to what hurts, runs copied over others, the end cut off. Each image
// is opened, walked and read; nothing panics, hangs or takes much memory.
func TestMutations(t *testing.T) {
	perImage := 12
	if testing.Short() {
		perImage = 3
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	total, failed := 0, 0
	for i, c := range corpus.Images(t) {
		rnd := rand.New(rand.NewPCG(3, uint64(i)))
		for n := range perImage {
			data := mutate(bytes.Clone(c.Data), rnd)
			began := time.Now()
			errs := probe(t, data, 300, 1<<20)
			if d := time.Since(began); d > 10*time.Second {
				t.Errorf("%s, mutation %d took %v", c.Name, n, d)
			}
			if total++; errs > 0 {
				failed++
			}
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 64<<20 {
		t.Errorf("%d bytes more after %d images", grown, total)
	}
	if failed < total/4 {
		t.Errorf("only %d of %d mutations were noticed", failed, total)
	}
}

// mutate changes metadata more often than data: that is where the traps are.
func mutate(b []byte, rnd *rand.Rand) []byte {
	b[ondisk.SuperOffset+8] &^= ondisk.CompatSbChksum
	spot := func() int {
		if rnd.IntN(4) == 0 {
			return rnd.IntN(len(b))
		}
		return ondisk.SuperOffset + rnd.IntN(min(len(b), 64<<10)-ondisk.SuperOffset)
	}
	for range 1 + rnd.IntN(24) {
		i := spot()
		switch rnd.IntN(6) {
		case 0, 1:
			b[i] ^= 1 << rnd.IntN(8)
		case 2:
			b[i] = []byte{0, 1, 0x7f, 0x80, 0xff}[rnd.IntN(5)]
		case 3:
			fill := byte(0xff * rnd.IntN(2))
			for j := i; j < min(i+8, len(b)); j++ {
				b[j] = fill
			}
		case 4:
			copy(b[i:min(i+64, len(b))], b[spot():])
		case 5:
			if rnd.IntN(8) == 0 {
				b = b[:max(ondisk.SuperOffset+ondisk.SuperSize, i)]
			}
		}
	}
	return b
}

// Numbers that a hostile image would like to be believed.
func TestGiantClaims(t *testing.T) {
	for name, edit := range map[string]func(*fake){
		"chunks of 2^47 bytes": func(f *fake) { f.inode.Format, f.inode.U = 1|4<<1, ondisk.ChunkIndexes|31 },
		"a block map of 2^60":  func(f *fake) { f.inode.Format, f.inode.U = 1|4<<1, 0 },
		"inline of 2^62":       func(f *fake) { f.inode.Format = 1 | 2<<1 },
		"a full index":         func(f *fake) { f.inode.Format = 1 | 1<<1 },
		"a compact index":      func(f *fake) { f.inode.Format, f.body = 1|3<<1, mapHeader(compact, 0, 1, 0, 0) },
		"records of 4 bytes":   func(f *fake) { f.inode.Format, f.body = 1|1<<1, mapHeader(full, 0, 1, 0, 0) },
		"2^48 records": func(f *fake) {
			f.inode.Format, f.body = 1|1<<1, mapHeader(full, 0xffffffff, 1|2<<1, 0xff, 0x7f)
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(ondisk.LayoutPlain, 1<<62)
			f.super.FeatureIncompat = ondisk.IncompatLz4ZeroPadding
			edit(f)
			im, ino := f.open(t, Options{})
			for _, off := range []int64{0, 1 << 40, 1<<62 - 4096} {
				p := &prober{t: t, im: im}
				p.check(im.ReadFile(context.Background(), ino, make([]byte, 4096), off))
			}
		})
	}
}
