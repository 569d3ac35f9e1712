package erofsfmt

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// Plain extents that keep their place in the block, extents that take a part of
// a pcluster, and what older builders wrote.
func plainImages(t testing.TB) []handmade {
	// File bytes 5096 to 9192 are at 1000 of their block, then at 0 of it.
	inter := newFake(full, 3*k4-700)
	inter.announce(ondisk.AlgLz4)
	head, plain, last := prose(k4+1000, 1), pattern(k4, 2), prose(k4-1700, 3)
	turned := join(plain[k4-1000:], plain[:k4-1000])
	p := packed(t, 12, ondisk.AlgLz4, ondisk.AlgLz4)
	b0, _ := p.put(compressLz4(t, head))
	b1, _ := p.put(turned)
	b2, _ := p.put(compressLz4(t, last))
	inter.blocks = p.f.blocks
	inter.inode.U = 3
	inter.body = join(mapHeader(full, 0, ondisk.AdviseInterlaced, 0, 0), le(fHead1, uint16(0), uint32(b0), fPlain, uint16(1000), uint32(b1),
		fHead1, uint16(1000), uint32(b2)))

	shared := newFake(full, 3*k4)
	shared.announce(ondisk.AlgDeflate)
	data := prose(2*k4, 4)
	q := packed(t, 12, ondisk.AlgDeflate, ondisk.AlgDeflate)
	at, _ := q.put(compressDeflate(t, data))
	shared.blocks, shared.inode.U = q.f.blocks, 1
	shared.body = join(mapHeader(full, 0, 0, ondisk.AlgDeflate<<4|ondisk.AlgDeflate, 0), le(
		fHead1|ondisk.LclusterPartial, uint16(0), uint32(at), fHead1, uint16(0), uint32(at), fNonhead, uint16(0), uint16(1), uint16(1)))

	old := packed(t, 12, ondisk.AlgLz4, ondisk.AlgLz4)
	old.add(fHead1, prose(4*k4, 1))
	old.add(fHead1, prose(k4, 1))
	for i := 1; i < 4; i++ {
		old.index[8*i+6] = 0 // the distance to the next head
	}

	legacy := zipped(t, text(50000, 3), false)
	legacy.inode.U = 7
	lclusters := packed(t, 12, ondisk.AlgLz4, ondisk.AlgLz4)
	lclusters.lbits = 2 // of four blocks
	lclusters.add(fHead1, prose(8*k4, 1))
	lclusters.add(fHead1, prose(4*k4, 2))

	// One pcluster as large as they get.
	large := packed(t, 12, ondisk.AlgLz4, ondisk.AlgLz4)
	large.big[0] = true
	noise := make([]byte, 1_141_000)
	rand.NewChaCha8([32]byte{1}).Read(noise[100_000:])
	large.add(fHead1, noise)
	largest := large.done(0)
	largest.more[ondisk.SuperOffset+ondisk.SuperSize] = le(uint16(14), uint16(65535), uint16(ondisk.MaxPcluster/k4), [10]byte{})

	return []handmade{
		{name: "a pcluster of 1 MiB", fake: largest, want: large.data, linux: [2]int{5, 13}, features: []string{"big_pcluster"}},
		{name: "interlaced in a full index", fake: inter, want: join(head, plain, last), linux: [2]int{6, 1}},
		{name: "partial references", fake: shared, want: join(data[:k4], data), linux: [2]int{6, 6}},
		{name: "no distance to the next head", fake: old.done(0), want: old.data, linux: [2]int{5, 4}},
		{name: "LZ4 before zero padding", fake: legacy, want: text(50000, 3), linux: [2]int{5, 4}},
		{name: "lclusters of four blocks", fake: lclusters.done(0), want: lclusters.data, linux: [2]int{6, 14}},
	}
}

// far is a byte that takes more than 32 bits of block number to name.
const (
	farBlock = 0x2_0000_0007
	farByte  = int64(farBlock) * k4
)

// Addresses above 2^32 blocks of 4 KiB, which is 16 TiB.
func farImages(t testing.TB) []handmade {
	data := pattern(2*k4, 3)

	flat := newFake(ondisk.LayoutPlain, 2*k4)
	flat.inode.U, flat.inode.Nb = farBlock&0xffffffff, farBlock>>32
	flat.far[farByte] = data

	inline := newFake(ondisk.LayoutInline, 2*k4+10)
	inline.inode.U, inline.inode.Nb, inline.body = farBlock&0xffffffff, farBlock>>32, pattern(10, 1)
	inline.far[farByte] = data

	small := newFake(ondisk.LayoutPlain, 0)
	small.more[fakeFile*32] = le(&ondisk.InodeCompact{Format: ondisk.FormatNlink1, Mode: modeReg | 0o600, Nb: farBlock >> 32,
		Size: 2 * k4, U: farBlock & 0xffffffff})
	small.far[farByte] = data

	chunks := newFake(ondisk.LayoutChunk, 4*k4)
	chunks.super.FeatureIncompat = ondisk.IncompatChunkedFile
	chunks.inode.U = ondisk.ChunkIndexes | ondisk.Chunk48Bit
	chunks.body = le(uint16(farBlock>>32), uint16(0), uint32(farBlock&0xffffffff), uint16(0xffff), uint16(0), uint32(0xffffffff),
		uint16(farBlock>>32), uint16(0), uint32(farBlock&0xffffffff+1), uint16(0), uint16(0), uint32(0xffffffff)) // the last is a block, not a hole
	chunks.far[farByte] = data
	chunks.far[0xffffffff*k4] = pattern(k4, 8)

	plain := prose(2*k4, 6)
	enc := compressLz4(t, plain)
	records := newFake(full, 4*k4)
	records.announce(ondisk.AlgLz4)
	n := uint32(1)<<ondisk.ExtentFmtShift | uint32(len(enc))
	pa := uint64(farByte) + 77
	records.body = join(mapHeader(full, 2, ondisk.AdviseExtents|2<<1, 0, 0), make([]byte, 8),
		le(n, uint32(pa), uint32(pa>>32), uint32(0), n, uint32(pa), uint32(pa>>32), uint32(2*k4)))
	records.far[int64(pa)] = enc

	sums := newFake(full, 2*k4)
	sums.announce(ondisk.AlgLz4)
	sums.body = join(mapHeader(full, 0, ondisk.AdviseExtents, 0, 1), le(pa, n)) // an lcluster of two blocks
	sums.far[int64(pa)] = enc

	return append(farInodes(),
		far("a plain file beyond 2^32 blocks", flat, data), far("an inline file beyond 2^32 blocks", inline, join(data, pattern(10, 1))),
		far("a compact inode with a block beyond 2^32", small, data),
		far("chunks beyond 2^32 blocks", chunks, join(data[:k4], make([]byte, k4), data[k4:], pattern(k4, 8))),
		far("records beyond 2^44", records, join(plain, plain)), far("records of 4 bytes beyond 2^44", sums, plain))
}

func far(name string, f *fake, want []byte) handmade {
	f.super.FeatureIncompat |= ondisk.Incompat48Bit
	if f.super.RootNid8b == 0 {
		f.super.RootNid8b, f.super.RootNid2b = fakeRoot, 0
	}
	return handmade{name: name, fake: f, want: want, linux: [2]int{6, 15}, features: []string{"48bit"}}
}

// farInodes has inodes there.
func farInodes() []handmade {
	nid := newFake(ondisk.LayoutInline, 100)
	nid.more[fakeRoot*32+64+2*ondisk.DirentSize] = le(uint64(farByte / 32)) // of the third entry
	nid.far[farByte] = join(le(&ondisk.InodeExtended{Format: 1 | ondisk.LayoutInline<<1, Mode: modeReg | 0o644, Nlink: 1, Size: 100}), pattern(100, 4))
	nid.file = Nid(farByte / 32)

	root := newFake(ondisk.LayoutInline, 100)
	root.body = pattern(100, 5)
	dir := dirBytes("", ".", int(farByte/32), "..", int(farByte/32), "f", fakeFile)
	root.far[farByte] = join(le(&ondisk.InodeExtended{Format: 1 | ondisk.LayoutInline<<1, Mode: modeDir | 0o755, Nlink: 2, Size: uint64(len(dir))}), dir)
	root.super.RootNid8b, root.super.RootNid2b = uint64(farByte/32), 0
	return []handmade{far("an inode beyond 2^44", nid, pattern(100, 4)), far("a root beyond 2^44", root, pattern(100, 5))}
}

// Chunks on several devices, found by id, by address, and by both.
func deviceImages(t testing.TB) []handmade {
	first, second, own := pattern(2*k4, 2), pattern(k4, 3), pattern(k4, 1)
	index := func(device uint16, blk uint64) []byte { return le(uint16(blk>>32), device, uint32(blk)) }
	mixed := func(format uint32, uniaddr uint64) *fake {
		f := newFake(ondisk.LayoutChunk, 6*k4)
		f.super.FeatureIncompat = ondisk.IncompatChunkedFile | ondisk.IncompatDeviceTable
		if format&ondisk.Chunk48Bit != 0 {
			f.super.FeatureIncompat |= ondisk.Incompat48Bit
			f.super.RootNid8b, f.super.RootNid2b = fakeRoot, 0
		}
		f.super.ExtraDevices, f.super.DevtSlotOff = 2, 22 // at byte 2816
		f.more[22*128] = le(&ondisk.Device{BlocksLo: 2, UniaddrLo: 100}, &ondisk.Device{BlocksLo: 1, UniaddrLo: uint32(uniaddr), UniaddrHi: uint16(uniaddr >> 32)})
		f.inode.U = ondisk.ChunkIndexes | format
		f.body = join(index(0, 1), index(1, 1), index(0, uniaddr), index(2, 0), index(0, 1<<48-1), index(0, 101))
		f.blocks[1] = own
		return f
	}
	want := join(own, first[k4:], second, second, make([]byte, k4), first[k4:])
	both := [][]byte{first, second}

	flat := mixed(0, 200)
	flat.blocks[100], flat.blocks[200] = first, second
	flatWant := want

	blocks := newFake(ondisk.LayoutChunk, 3*k4)
	blocks.super = mixed(0, 200).super
	blocks.more = mixed(0, 200).more
	blocks.body = le(uint32(101), uint32(1), uint32(200))
	blocks.blocks[1] = own
	return []handmade{
		{name: "device ids mixed in one file", fake: mixed(0, 200), devices: both, want: want, linux: [2]int{5, 16}, features: []string{"device_table"}},
		{name: "a device mapped beyond 2^32 blocks", fake: mixed(ondisk.Chunk48Bit, farBlock), devices: both, want: want,
			linux: [2]int{6, 15}, features: []string{"device_table", "48bit"}},
		{name: "device ids of a flat device", fake: flat, want: flatWant, linux: [2]int{6, 12}, features: []string{"device_table"}},
		{name: "a block map over devices", fake: blocks, devices: both, want: join(first[k4:], own, second), linux: [2]int{5, 16}, features: []string{"device_table"}},
	}
}

// Fragments: tails and whole files in a packed inode, far into it.
func fragmentImages(t testing.TB) []handmade {
	content := pattern(3*k4, 7)
	withPacked := func(size uint64) *fake {
		f := newFake(full, size)
		f.announce(ondisk.AlgLz4)
		f.super.FeatureIncompat |= ondisk.IncompatFragments | ondisk.IncompatChunkedFile
		f.super.PackedNid = 96 // at byte 3072: 8 GiB in chunks of 2 GiB, all but the last holes
		f.more[96*32] = join(le(&ondisk.InodeExtended{Format: 1 | ondisk.LayoutChunk<<1, Mode: modeReg, Nlink: 1, Size: 3<<32 + 3*k4, U: 20}),
			le(uint32(0xffffffff), uint32(0xffffffff), uint32(0xffffffff), uint32(8)))
		f.blocks[8] = content
		return f
	}
	tail := withPacked(2*k4 + 50)
	head := prose(k4+96, 3)
	in := compressLz4(t, head)
	tail.blocks[20], tail.inode.U = append(make([]byte, k4-len(in)), in...), 1
	tail.body = join(mapHeader(full, 5, ondisk.AdviseFragment, 0, 0), le(
		fHead1, uint16(0), uint32(20), fHead1, uint16(96), uint32(3), fNonhead, uint16(0), uint16(1), uint16(1)))

	whole := withPacked(k4 + 7)
	whole.body = le(uint64(1<<63 | 3<<32 | 100))

	record := withPacked(2 * k4)
	record.super.FeatureIncompat |= ondisk.Incompat48Bit
	record.blocks[20] = tail.blocks[20]
	record.inode.U = 1
	record.body = join(mapHeader(full, 2, ondisk.AdviseExtents|2<<1|ondisk.AdviseFragment, 0, 0), make([]byte, 8), le(
		uint32(1<<ondisk.ExtentFmtShift|k4), uint32(20*k4), uint32(0), uint32(0),
		uint32(9), uint32(3), uint32(0), uint32(k4+96)))
	linux := func(h handmade, major, minor int, features ...string) handmade {
		h.linux, h.features = [2]int{major, minor}, append(features, "fragments")
		return h
	}
	return []handmade{
		linux(handmade{name: "a tail 12 GiB into the packed inode", fake: tail, want: join(head, content[5:5+k4-46])}, 6, 1),
		linux(handmade{name: "a whole file 12 GiB into the packed inode", fake: whole, want: content[100 : 100+k4+7]}, 6, 1),
		linux(handmade{name: "the last record is a fragment", fake: record, want: join(head, content[9:9+k4-96])}, 6, 15, "48bit"),
	}
}

// Numbers in inodes: times before 1970 and far after, 32-bit ids, nid 0, inodes
// across blocks, xattrs with prefixes of the image's own.
func inodeImages(t testing.TB) []handmade {
	body := pattern(40, 1)
	inline := func(edit func(*fake)) *fake {
		f := newFake(ondisk.LayoutInline, uint64(len(body)))
		f.body = body
		edit(f)
		return f
	}
	compactAt := func(sec uint32) []byte {
		return join(le(&ondisk.InodeCompact{Format: ondisk.LayoutInline << 1, Mode: modeReg | 0o600, Nb: 3, Size: uint32(len(body)), Mtime: sec, UID: 65535, GID: 65534}), body)
	}
	out := []handmade{
		{name: "a time before 1970", fake: inline(func(f *fake) { f.inode.Mtime, f.inode.MtimeNsec = -86400*365*200, 999_999_999 })},
		{name: "a time far away", fake: inline(func(f *fake) { f.inode.Mtime, f.inode.MtimeNsec = 1<<33+5, 1 })},
		{name: "ids and links of 32 bits", fake: inline(func(f *fake) { f.inode.UID, f.inode.GID, f.inode.Nlink = 0xfffffffe, 0x80000001, 0xffffffff })},
		{name: "a compact inode before 1970", fake: inline(func(f *fake) {
			f.super.Epoch, f.super.FixedNsec = -5_000_000_000, 123_456_789
			f.more[fakeFile*32] = compactAt(0)
		})},
		{name: "nid 0", fake: inline(func(f *fake) { f.file = 0 })},
		{name: "an inode across blocks", fake: inline(func(f *fake) { f.file, f.blocks[1] = 127, nil; f.blocks[2] = make([]byte, k4) })},
		{name: "bits of a mode", fake: inline(func(f *fake) { f.inode.Mode = modeReg | 0o7777 })},
	}
	for i := range out {
		out[i].want, out[i].linux = body, [2]int{5, 4}
	}
	out[3].linux = [2]int{6, 17} // epochs before 1970
	long := func(f *fake) *fake {
		f.super.FeatureIncompat |= ondisk.IncompatXattrPrefixes
		f.super.XattrPrefixCount, f.super.XattrPrefixStart = 1, 2
		return f
	}
	dir := compressedDir(t)
	out = append(out, handmade{name: "a compressed directory", fake: dir.f, want: dir.data, linux: [2]int{5, 4}})
	prefix := join(make([]byte, 8), le(uint16(9), [9]byte([]byte("\x04overlay."))))
	packedInode := long(withXattrs(0, join(entry(0x80, "opaque", "y"), entry(1, "big", strings.Repeat("v", 5000)))))
	packedInode.super.FeatureIncompat |= ondisk.IncompatFragments
	packedInode.super.PackedNid = 48 + 8*32 // at byte 9728
	packedInode.more[(48+8*32)*32] = le(&ondisk.InodeExtended{Format: 1, Mode: modeReg, Nlink: 1, Size: 20, U: 4})
	packedInode.blocks[4] = prefix
	plain := long(withXattrs(1, join(le(uint32(2)), entry(0x80, "opaque", "y"))))
	plain.super.FeatureCompat |= ondisk.CompatPlainXattrPrefixes
	plain.super.XattrPrefixStart = (3*k4 + 8) / 4
	plain.super.XattrBlkaddr = 1
	plain.blocks[1] = append(make([]byte, 8), entry(0x80, "shared", strings.Repeat("s", 4090))...) // into the next block
	plain.blocks[3] = prefix
	return append(out, metaboxImage(t, long, prefix),
		handmade{name: "long prefixes in the packed inode", fake: packedInode, linux: [2]int{6, 4}, features: []string{"fragments"}},
		handmade{name: "long prefixes in the image", fake: plain, linux: [2]int{6, 17}})
}

// metaboxImage has the file, its shared xattr and the prefixes in a metabox.
func metaboxImage(t testing.TB, long func(*fake) *fake, prefix []byte) handmade {
	f := long(withXattrs(1, join(le(uint32(128)), entry(0x80, "opaque", "y"))))
	f.super.FeatureIncompat |= ondisk.IncompatMetabox | ondisk.Incompat48Bit
	f.super.FeatureCompat |= ondisk.CompatSharedEAInMetabox
	f.super.ExtSlots, f.super.MetaboxNid = 1, 96
	f.super.RootNid8b, f.super.RootNid2b, f.super.XattrPrefixStart = fakeRoot, 0, 1024/4+2
	f.file = 4 | ondisk.MetaboxBit
	f.inode.Format, f.inode.Size = ondisk.FormatExtended|ondisk.LayoutInline<<ondisk.FormatLayoutBit, 40
	f.more[96*32] = le(&ondisk.InodeExtended{Format: ondisk.FormatExtended, Mode: modeReg, Nlink: 1, Size: k4, U: 4})
	data := pattern(40, 9)
	box := join(make([]byte, 4*32), le(&f.inode), f.body, data)
	box = join(box, make([]byte, 512-len(box)), entry(0x80, "shared", "s"))
	f.blocks[4] = join(box, make([]byte, 1024-len(box)), prefix)
	return handmade{name: "file, shared xattrs and prefixes in a metabox", fake: f, want: data, linux: [2]int{6, 18}, features: []string{"metabox", "48bit"}}
}

// compressedDir is a directory of two blocks in one pcluster; its files are all
// the same.
func compressedDir(t testing.TB) *packer {
	p := packed(t, 12, ondisk.AlgLz4, ondisk.AlgLz4)
	p.f.inode.Mode, p.f.inode.Nlink = modeDir|0o755, 2
	p.f.more[100*32] = le(&ondisk.InodeExtended{Format: ondisk.FormatExtended, Mode: modeReg | 0o600, Nlink: 150})
	block := []any{".", fakeFile, "..", fakeRoot}
	var data []byte
	for i := range 150 {
		block = append(block, fmt.Sprintf("name-%03d", i), 100)
		if i == 99 {
			data = dirBytes("", block...)
			data, block = append(data, make([]byte, k4-len(data))...), nil
		}
	}
	p.add(fHead1, append(data, dirBytes("", block...)...))
	p.done(0)
	return p
}

// One file of each kind for every block size, 512 bytes to 64 KiB.
func blockSizeImages(t testing.TB) []handmade {
	var out []handmade
	for bits := uint8(ondisk.MinBlockBits); bits <= ondisk.MaxBlockBits; bits++ {
		size := 1 << bits
		base := 16384/size + 1
		add := func(kind string, f *fake, want []byte, linux [2]int) {
			f.super.BlkSzBits = bits
			h := handmade{name: fmt.Sprintf("%s, blocks of %d", kind, size), fake: f, want: want, linux: linux}
			if size > k4 {
				h.linux, h.why = [2]int{}, "Linux has no blocks larger than a page"
			}
			out = append(out, h)
		}
		f := newFake(ondisk.LayoutChunk, uint64(5*size+100))
		f.super.FeatureIncompat = ondisk.IncompatChunkedFile
		f.inode.U = ondisk.ChunkIndexes | 1
		data := pattern(2*size, bits)
		f.blocks[base] = data
		f.body = le(uint16(0), uint16(0), uint32(base), uint16(0), uint16(0), uint32(0xffffffff), uint16(0), uint16(0), uint32(base))
		add("chunks", f, join(data, make([]byte, 2*size), data[:size+100]), [2]int{6, 4})

		if testing.Short() && size != 512 && size != k4 {
			continue // to make the rest takes its time
		}
		for _, alg := range []int{ondisk.AlgLz4, ondisk.AlgLzma, ondisk.AlgDeflate, ondisk.AlgZstd} {
			p := packed(t, bits, alg, alg)
			p.big[0] = true
			p.add(fHead1, text(4*size, 1))
			p.add(fPlain, pattern(size, 2))
			p.add(fHead1, text(2*size+9, 3))
			add("full index of "+algNames[alg], p.done(0), p.data, [2]int{6, 10})
		}
		if bits <= ondisk.CompactMaxBits4B {
			add("compact index", compactOf(t, bits, 0, 0), compactData(bits, 0), [2]int{6, 10})
		}
		if bits <= ondisk.CompactMaxBits2B {
			add("compact index of 2 bytes", compactOf(t, bits, 0, ondisk.AdviseCompacted2B), compactData(bits, 0), [2]int{6, 10})
		}
		if bits < ondisk.CompactMaxBits2B {
			lbits := ondisk.CompactMaxBits2B - bits
			add("compact index of 2 bytes and large lclusters", compactOf(t, bits, lbits, ondisk.AdviseCompacted2B), compactData(bits, lbits), [2]int{6, 14})
		}
		tail := prose(300, bits)
		in := compressLz4(t, tail)
		if 2112+8+8+8+len(in) > (2112/size+1)*size {
			continue // no room in the block of a small one
		}
		z := newFake(full, 300)
		z.announce(ondisk.AlgLz4)
		z.super.FeatureIncompat |= ondisk.IncompatZtailpacking
		z.body = join(mapHeader(full, uint32(len(in))<<16, ondisk.AdviseInline, 0, 0), le(fHead1, uint16(0), uint32(0)), in)
		add("a tail after the index", z, tail, [2]int{6, 10})
	}
	return out
}

// compactExtents is how many extents of three lclusters compactOf makes, and half
// an lcluster: with 4 byte packs before and after those of 2 bytes.
const compactExtents = 14

func compactData(bits, lbits uint8) []byte {
	var data []byte
	for i := range compactExtents {
		data = append(data, prose(3<<(bits+lbits), byte(i))...)
	}
	return append(data, prose(1<<(bits+lbits)/2, 99)...)
}

// compactOf has a compact index of packs of two sizes, written entry by entry.
func compactOf(t testing.TB, bits, lbits uint8, advise uint16) *fake {
	p := packed(t, bits, ondisk.AlgLzma, ondisk.AlgLzma)
	first, data := p.block, compactData(bits, lbits)
	n := 3 << (bits + lbits)
	total := int64(3*compactExtents + 1)
	for i := 0; i < len(data); i += n {
		if _, blocks := p.put(encodeBy(t, ondisk.AlgLzma, data[i:min(i+n, len(data))])); blocks != 1 {
			t.Fatalf("%d blocks", blocks)
		}
	}
	f := p.f
	f.announce(ondisk.AlgLzma)
	f.inode.Format, f.inode.Size, f.inode.U = ondisk.FormatExtended|compact<<ondisk.FormatLayoutBit, uint64(len(data)), 1
	entryOf := func(i int64, last bool) [2]uint32 {
		switch {
		case i >= total || i%3 == 0:
			return head(0)
		case last:
			return nonhead(uint32(3 - i%3)) // to the next head
		}
		return nonhead(uint32(i % 3))
	}
	lobits := max(int(bits+lbits), ondisk.CompactMinLobits)
	index := mapHeader(compact, 0, advise, ondisk.AlgLzma<<4|ondisk.AlgLzma, lbits)
	add := func(from int64, count, stride int) {
		var entries [][2]uint32
		for i := range count {
			entries = append(entries, entryOf(from+int64(i), i+1 == count))
		}
		heads := (from + 2) / 3 // before this pack
		index = append(index, pack(stride, lobits, uint32(first)+uint32(heads)-1, entries...)...)
	}
	at := int64(0)
	for ; at < 6; at += 2 { // 2120 is 24 bytes before a multiple of 32
		add(at, 2, 16)
	}
	// The kernel counts blocks here, not lclusters (fs/erofs/zmap.c
	// z_erofs_load_compact_lcluster).
	short := (int64(len(data)+1<<bits-1)>>bits - 6) &^ 15
	for ; advise&ondisk.AdviseCompacted2B != 0 && at-6 < short && at < total; at += 16 {
		add(at, 16, 14)
	}
	for ; at < total; at += 2 {
		add(at, 2, 16)
	}
	f.body = index
	return f
}
