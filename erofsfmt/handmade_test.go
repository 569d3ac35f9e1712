package erofsfmt

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"testing"

	"github.com/ulikunitz/xz/lzma"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// A handmade is an image that no mkfs writes, with one file of known content.
type handmade struct {
	name    string
	fake    *fake
	want    []byte   // the file, or the beginning of one that is larger
	devices [][]byte // the extra devices

	// Linux agrees, from this release on where its erofs says that it knows all of
	// these features. The zero version stands for one that cannot be asked: why
	// says why.
	linux    [2]int
	features []string
	why      string
}

func handmadeImages(t testing.TB) []handmade {
	return slices.Concat(headImages(t), holeImages(t), recordImages(t), plainImages(t), farImages(t), deviceImages(t),
		fragmentImages(t), inodeImages(t), blockSizeImages(t))
}

// Each holds what was put in, read whole and in pieces.
func TestHandmade(t *testing.T) {
	for _, h := range handmadeImages(t) {
		t.Run(h.name, func(t *testing.T) {
			var o Options
			for _, d := range h.devices {
				o.Devices = append(o.Devices, memory(d))
			}
			im, ino := h.fake.open(t, o)
			for _, step := range []int{max(1, len(h.want)), 5000, 777} {
				for off := 0; off < len(h.want); off += step {
					p := make([]byte, min(step, len(h.want)-off))
					if err := im.ReadFile(context.Background(), ino, p, int64(off)); err != nil {
						t.Fatal(err)
					}
					if want := h.want[off : off+len(p)]; !bytes.Equal(p, want) {
						t.Fatalf("%d bytes at %d differ: %.20x, want %.20x", len(p), off, p, want)
					}
				}
			}
		})
	}
}

// prose is n bytes that every algorithm makes less than half of, down to a few
// hundred bytes.
func prose(n int, seed byte) []byte {
	b := bytes.Repeat([]byte("the quick brown fox jumps over the lazy dog. "), n/45+1)[:n]
	for i := int(seed); i < n; i += 89 {
		b[i] = seed + byte(i>>6)
	}
	return b
}

// encodeBy encodes with one of the algorithms of the format.
func encodeBy(t testing.TB, alg int, data []byte) []byte {
	t.Helper()
	switch alg {
	case ondisk.AlgLz4:
		return compressLz4(t, data)
	case ondisk.AlgLzma:
		return compressLzma(t, data, lzma.Properties{LC: 3, LP: 0, PB: 2})
	case ondisk.AlgDeflate:
		return compressDeflate(t, data)
	}
	return compressZstd(t, data)
}

// announce has the superblock list algorithms, each with its configuration.
func (f *fake) announce(algs ...int) {
	f.super.FeatureIncompat |= ondisk.IncompatLz4ZeroPadding | ondisk.IncompatComprCfgs
	slices.Sort(algs)
	var cfgs []byte
	for _, alg := range slices.Compact(algs) {
		f.super.ComprAlgs |= 1 << alg
		cfgs = append(cfgs, [][]byte{
			ondisk.AlgLz4:     le(uint16(14), uint16(65535), uint16(16), [10]byte{}),
			ondisk.AlgLzma:    le(uint16(14), uint32(1<<16), uint16(0), [8]byte{}),
			ondisk.AlgDeflate: le(uint16(6), [6]byte{15}),
			ondisk.AlgZstd:    le(uint16(6), [6]byte{0, 10}),
		}[alg]...)
	}
	f.more[ondisk.SuperOffset+ondisk.SuperSize] = cfgs
}

// A packer lays the extents of a file out, each at the beginning of an lcluster
// and in blocks of its own, and writes the full index of them.
type packer struct {
	t     testing.TB
	f     *fake
	alg   [2]int // of HEAD1 and HEAD2
	big   [2]bool
	block int // the next
	index []byte
	data  []byte // of the file so far
	lbits uint   // log2 of the blocks of an lcluster
}

// packed makes a file of zeros yet to be filled, with blocks of 1<<bits bytes.
func packed(t testing.TB, bits uint8, alg1, alg2 int) *packer {
	f := newFake(full, 0)
	f.super.BlkSzBits = bits
	return &packer{t: t, f: f, alg: [2]int{alg1, alg2}, block: max(1, 16384>>bits)}
}

// put stores a pcluster in the next blocks, at the end of them.
func (p *packer) put(in []byte) (at, n int) {
	bits := p.f.super.BlkSzBits
	at, n = p.block, (len(in)+1<<bits-1)>>bits
	p.f.blocks[at] = append(make([]byte, n<<bits-len(in)), in...)
	p.block += n
	return at, n
}

// add makes an extent of data: head says whether it is plain, or of which
// algorithm.
func (p *packer) add(head uint16, data []byte) {
	p.t.Helper()
	in := data
	if typ := head & ondisk.LclusterTypeMask; typ != fPlain {
		in = encodeBy(p.t, p.alg[typ/fHead2], data)
	}
	at, n := p.put(in)
	p.entry(head, len(data), n, at)
	p.data = append(p.data, data...)
}

// entry writes the index of an extent of size bytes in n blocks.
func (p *packer) entry(head uint16, size, n, at int) {
	p.index = append(p.index, le(head, uint16(0), uint32(at))...)
	bits := uint(p.f.super.BlkSzBits) + p.lbits
	count := (size + 1<<bits - 1) >> bits
	big := p.big[0]
	if head&ondisk.LclusterTypeMask != fHead1 {
		big = p.big[1]
	}
	if n > 1 && (!big || count == 1) {
		p.t.Fatalf("an extent of %d bytes in %d blocks has no room to say so", size, n)
	}
	for i := 1; i < count; i++ {
		back := uint16(i)
		if i == 1 && big {
			back = cblk | uint16(n)
		}
		p.index = append(p.index, le(fNonhead, uint16(0), back, uint16(count-i))...)
	}
}

// done finishes the image.
func (p *packer) done(advise uint16) *fake {
	for i, bit := range []uint16{ondisk.AdviseBigPcluster1, ondisk.AdviseBigPcluster2} {
		if p.big[i] {
			advise |= bit
		}
	}
	p.f.announce(p.alg[0], p.alg[1])
	p.f.inode.Size = uint64(len(p.data))
	p.f.inode.U = 1
	p.f.body = join(mapHeader(full, 0, advise, uint8(p.alg[1]<<4|p.alg[0]), uint8(p.lbits)), p.index)
	return p.f
}

// Files of two algorithms, which no mkfs writes.
func headImages(t testing.TB) []handmade {
	var out []handmade
	for _, alg := range []int{ondisk.AlgLzma, ondisk.AlgDeflate, ondisk.AlgZstd} {
		p := packed(t, 12, ondisk.AlgLz4, alg)
		p.f.super.FeatureIncompat |= ondisk.IncompatComprHead2
		for i := range 3 {
			p.add(fHead1, prose(2*k4, byte(i)))
			p.add(fHead2, prose(3*k4, byte(i+10)))
			p.add(fPlain, pattern(k4, byte(i)))
		}
		p.add(fHead2, prose(k4+99, 77))
		out = append(out, handmade{name: "HEAD1 lz4, HEAD2 " + algNames[alg], fake: p.done(0), want: p.data,
			linux: [2]int{5, 17}, features: []string{"compr_head2"}})
	}
	for _, big := range [][2]bool{{true, false}, {false, true}, {true, true}} {
		p := packed(t, 12, ondisk.AlgDeflate, ondisk.AlgLz4)
		p.f.super.FeatureIncompat |= ondisk.IncompatComprHead2
		p.big = big
		content := func(head int, seed uint64) []byte {
			if big[head] {
				return text(5*k4, seed) // some blocks
			}
			return prose(5*k4, byte(seed)) // one
		}
		for i := range uint64(3) {
			p.add(fHead1, content(0, i))
			p.add(fHead2, content(1, i+10))
			p.add(fHead2, prose(k4, byte(i))) // a head follows: there is no block count
		}
		out = append(out, handmade{name: fmt.Sprintf("HEAD1 big %v, HEAD2 big %v", big[0], big[1]), fake: p.done(0), want: p.data,
			linux: [2]int{5, 17}, features: []string{"compr_head2"}})
	}
	return append(out, compactHead2(t))
}

// compactHead2 has heads of both kinds and plain ones in a compact index.
func compactHead2(t testing.TB) handmade {
	p := packed(t, 12, ondisk.AlgLz4, ondisk.AlgDeflate)
	p.add(fHead1, prose(2*k4, 1))
	p.add(fHead2, prose(2*k4, 2))
	p.add(fPlain, pattern(k4, 3))
	p.add(fHead2, prose(k4, 4))
	f := p.done(0)
	f.super.FeatureIncompat |= ondisk.IncompatComprHead2
	f.inode.Format = ondisk.FormatExtended | compact<<ondisk.FormatLayoutBit
	first := uint32(16384 / k4)
	f.body = join(mapHeader(compact, 0, 0, ondisk.AlgDeflate<<4|ondisk.AlgLz4, 0),
		pack(16, 12, first-1, [2]uint32{0, ondisk.LclusterHead1}, nonhead(1)),
		pack(16, 12, first, [2]uint32{0, ondisk.LclusterHead2}, nonhead(1)),
		pack(16, 12, first+1, [2]uint32{0, ondisk.LclusterPlain}, [2]uint32{0, ondisk.LclusterHead2}))
	return handmade{name: "compact, HEAD1, HEAD2 and plain", fake: f, want: p.data, linux: [2]int{5, 17}, features: []string{"compr_head2"}}
}

// Holes. What says so is behind a pcluster of zeros, as the format wants it
// for kernels that know neither way: those before 7.2 decode the zeros.
func holeImages(t testing.TB) []handmade {
	flagged := packed(t, 12, ondisk.AlgLz4, ondisk.AlgLz4)
	flagged.add(fHead1, prose(2*k4, 1))
	flagged.add(fHead1|ondisk.LclusterHole, make([]byte, 3*k4))
	flagged.add(fHead1, prose(k4, 2))
	flagged.add(fHead1|ondisk.LclusterHole, make([]byte, 500))

	counted := packed(t, 12, ondisk.AlgLz4, ondisk.AlgLz4)
	counted.big[0] = true
	counted.add(fHead1, text(4*k4, 1))
	zeros, _ := counted.put(compressLz4(t, make([]byte, 3*k4)))
	counted.entry(fHead1, 3*k4, 0, zeros) // a pcluster of 0 blocks
	counted.data = append(counted.data, make([]byte, 3*k4)...)
	counted.add(fHead1, prose(3*k4, 2))

	whole := newFake(ondisk.LayoutPlain, 3*k4+5)
	whole.inode.U, whole.inode.Nb = 0xffffffff, 0xffff

	// Without the flag the same address is one of the blocks there are.
	flag := newFake(full, 2*k4)
	flag.announce(ondisk.AlgLz4)
	flag.body = join(mapHeader(full, 0, 0, 0, 0), le(fHead1|ondisk.LclusterHole, uint16(0), uint32(0xfffffff0), fNonhead, uint16(0), uint16(1), uint16(1)))

	return []handmade{
		{name: "Z_EROFS_LI_HOLE", fake: flagged.done(0), want: flagged.data, linux: [2]int{5, 4}},
		{name: "Z_EROFS_LI_HOLE with an address that is none", fake: flag, want: make([]byte, 2*k4),
			why: "Linux before 7.2 reads there"},
		{name: "a pcluster of 0 blocks", fake: counted.done(0), want: counted.data, linux: [2]int{6, 17}},
		{name: "a plain file that is a hole", fake: whole, want: make([]byte, 3*k4+5), linux: [2]int{5, 17}},
	}
}

// Encoded extents: a record each, where it is and how long.
func recordImages(t testing.TB) []handmade {
	a, b := prose(k4, 1), prose(k4, 2)
	ea, eb := compressLz4(t, a), compressDeflate(t, b)
	na, nb := uint32(len(ea)), uint32(len(eb))
	lz, df := uint32(1+ondisk.AlgLz4)<<ondisk.ExtentFmtShift, uint32(1+ondisk.AlgDeflate)<<ondisk.ExtentFmtShift
	make1 := func(advise uint16, lo uint32, size int, data []byte, records ...any) *fake {
		f := newFake(full, uint64(size))
		f.announce(ondisk.AlgLz4, ondisk.AlgDeflate)
		f.super.FeatureIncompat |= ondisk.Incompat48Bit
		f.inode.U = 1
		head := mapHeader(full, lo, advise|ondisk.AdviseExtents, 0, 0)
		recsz := 4 << (advise >> 1 & 3)
		f.body = join(head, make([]byte, (recsz-(2112+len(head))%recsz)%recsz), le(records...))
		f.blocks[4] = data
		return f
	}
	at := uint32(4*k4 + 100) // anywhere
	pad := make([]byte, 100)
	in := join(pad, ea, eb)
	linux := handmade{linux: [2]int{6, 15}, features: []string{"48bit"}}
	is := func(name string, f *fake, want []byte) handmade {
		h := linux
		h.name, h.fake, h.want = name, f, want
		return h
	}
	shifted := pattern(2*k4, 9)
	// Three blocks that begin 700 bytes before the end of one: those come last.
	before := k4 - 700
	tail := pattern(2*k4+700, 5)
	turned := join(tail[700:], make([]byte, before), tail[:700])
	return []handmade{
		is("records of 4 bytes", make1(0, 0, 3*k4, in, uint64(at), lz|na, uint32(0), df|nb), join(a, make([]byte, k4), b)),
		is("records of 8 bytes", make1(1<<1, 0, 3*k4, in, lz|na, at, uint32(0), uint32(0), df|nb, at+na), join(a, make([]byte, k4), b)),
		is("records of 16 bytes", make1(2<<1, 3, 3*k4, in, lz|na, at, uint32(0), uint32(0), uint32(0), uint32(0), uint32(0), uint32(k4),
			df|nb, at+na, uint32(0), uint32(2*k4)), join(a, make([]byte, k4), b)),
		is("records of 32 bytes", make1(3<<1, 3, 3*k4, in, lz|na, at, uint32(0), uint32(0), [16]byte{}, uint32(0), uint32(0), uint32(0), uint32(k4), [16]byte{},
			df|nb, at+na, uint32(0), uint32(2*k4), [16]byte{}), join(a, make([]byte, k4), b)),
		is("a hole before the first record", make1(2<<1, 1, 2*k4, in, lz|na, at, uint32(0), uint32(k4)), join(make([]byte, k4), a)),
		is("no record", make1(2<<1, 0, 2*k4, in), make([]byte, 2*k4)),
		is("a partial record", make1(2<<1, 1, k4-1000, in, lz|na|ondisk.ExtentPartial, at, uint32(0), uint32(0)), a[:k4-1000]),
		is("a shifted record", make1(2<<1, 1, len(shifted), join(pad, shifted), uint32(len(shifted)), at, uint32(0), uint32(0)), shifted),
		is("an interlaced record of three blocks", make1(2<<1|ondisk.AdviseInterlaced, 2, before+len(tail), join(make([]byte, k4), turned),
			uint32(0), uint32(0), uint32(0), uint32(0), uint32(3*k4), uint32(5*k4), uint32(0), uint32(before)), join(make([]byte, before), tail)),
		{name: "plain records of one byte", fake: make1(1<<1, 0, k4+1, join(pad, a, []byte("x")), uint32(k4), at, uint32(1), at+k4),
			want: join(a, []byte("x")), why: "Linux 6.18 answers EUCLEAN to one that is not aligned"},
	}
}
