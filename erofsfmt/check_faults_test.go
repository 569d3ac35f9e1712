package erofsfmt

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"slices"
	"strings"
	"testing"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
)

// A patient is an image of the corpus that is given a fault.
type patient struct {
	t       *testing.T
	im      *Image // before
	data    []byte
	devices []ReaderAt
}

func newPatient(t *testing.T, image string) *patient {
	c := corpus.Get(t, image)
	p := &patient{t: t, im: openCorpus(t, c), data: bytes.Clone(c.Data)}
	if c.Blob != nil {
		p.devices = []ReaderAt{memory(c.Blob)}
	}
	return p
}

// inode is where an inode lies, and its nid.
func (p *patient) inode(path string) (at int64, nid Nid) {
	p.t.Helper()
	ino := p.find(path)
	return p.im.locate(ino.Nid).off, ino.Nid
}

func (p *patient) find(path string) *Inode {
	p.t.Helper()
	return find(p.t, p.im, strings.FieldsFunc(path, func(r rune) bool { return r == '/' })...)
}

// entry is where an entry of a directory and its name lie.
func (p *patient) entry(dir, name string) (at, nameAt int64) {
	p.t.Helper()
	ino := p.find(dir)
	m := p.im.mapper(ino)
	defer m.release()
	bs := p.im.sb.BlockSize()
	content := make([]byte, ino.Size)
	if err := p.im.ReadFile(context.Background(), ino, content, 0); err != nil {
		p.t.Fatal(err)
	}
	for start := int64(0); start < ino.Size; start += bs {
		b, err := parseDirBlock(content[start:min(start+bs, ino.Size)])
		if err != nil {
			p.t.Fatal(err)
		}
		e, err := m.extentAt(context.Background(), start)
		if err != nil {
			p.t.Fatal(err)
		}
		for i := range b.n {
			d, got, err := b.entry(i)
			if err != nil {
				p.t.Fatal(err)
			}
			if string(got) == name {
				block := e.at.off + start - e.la
				return block + int64(i)*ondisk.DirentSize, block + int64(d.NameOff)
			}
		}
	}
	p.t.Fatalf("%q has no %q", dir, name)
	return 0, 0
}

// extent maps a byte of a file.
func (p *patient) extent(path string, off int64) extent {
	p.t.Helper()
	m := p.im.mapper(p.find(path))
	defer m.release()
	e, err := m.extentAt(context.Background(), off)
	if err != nil {
		p.t.Fatal(err)
	}
	return e
}

// inner is an lcluster without a head in an extent that is not the file's first.
func (p *patient) inner(path string) (lcn int64, e extent) {
	p.t.Helper()
	for e = p.extent(path, 0); e.la == 0 || e.end()>>12-e.la>>12 < 2; e = p.extent(path, e.end()) {
	}
	return e.la>>12 + 1, e
}

// body is where what follows an inode and its xattrs lies.
func (p *patient) body(path string, align int64) int64 { return p.im.bodyAt(p.find(path), align).off }

// xattrs is where the xattrs of an inode lie.
func (p *patient) xattrs(path string) int64 {
	ino := p.find(path)
	return p.im.metaAt(ino, int64(ino.headSize)).off
}

func (p *patient) packed() *Inode {
	p.t.Helper()
	ino, err := p.im.packedInode(context.Background())
	if err != nil {
		p.t.Fatal(err)
	}
	return ino
}

// put overwrites bytes.
func (p *patient) put(at int64, v ...any) { copy(p.data[at:], le(v...)) }

// super changes the superblock.
func (p *patient) super(edit func(*ondisk.Super)) {
	var s ondisk.Super
	b := p.data[ondisk.SuperOffset:]
	if _, err := binary.Decode(b, binary.LittleEndian, &s); err != nil {
		p.t.Fatal(err)
	}
	edit(&s)
	copy(b, s.Append(nil))
}

// sign makes the checksum right again.
func (p *patient) sign() {
	end := max(ondisk.SuperOffset, p.im.sb.BlockSize())
	if end == ondisk.SuperOffset {
		end += p.im.sb.BlockSize()
	}
	p.put(ondisk.SuperOffset+ondisk.ChecksumOffset, uint32(0))
	p.put(ondisk.SuperOffset+ondisk.ChecksumOffset, ^crc32.Checksum(p.data[ondisk.SuperOffset:end], crc32.MakeTable(crc32.Castagnoli)))
}

// Offsets in an inode.
const (
	inodeXattrs = 2
	inodeMode   = 4
	inodeSize   = 8
	inodeU      = 16
	inodeNsec   = 40 // of an extended one
	inodeNlink  = 44 // of an extended one
)

// faultTests make a fault and say what check has to say of it, line by line.
var faultTests = []struct {
	name, image string
	damage      func(p *patient) []string
}{
	{"a wrong link count", "plain", func(p *patient) []string {
		at, nid := p.inode("mixed/half")
		p.put(at+inodeNlink, uint32(2))
		return []string{fmt.Sprintf(`byte %d: nid %d "/mixed/half": link count 2, but only 1 of the names were found`, at, nid)}
	}},
	{"a name too many", "plain", func(p *patient) []string {
		at, nid := p.inode("hard/a")
		p.put(at+inodeNlink, uint32(2))
		return []string{fmt.Sprintf(`byte %d: nid %d "/hard/c": link count 2, which this name exceeds`, at, nid)}
	}},
	{"a link count of 0", "plain", func(p *patient) []string {
		at, nid := p.inode("mixed/half")
		p.put(at+inodeNlink, uint32(0))
		return []string{fmt.Sprintf(`byte %d: nid %d "/mixed/half": link count 0, which this name exceeds`, at, nid)}
	}},
	{"a directory's wrong link count", "plain", func(p *patient) []string {
		at, nid := p.inode("perm")
		p.put(at+inodeNlink, uint32(7))
		return []string{fmt.Sprintf(`byte %d: nid %d "/perm": link count 7 of a directory with 1 directories in it, want 3`, at, nid)}
	}},
	{"an entry out of order", "plain", func(p *patient) []string {
		_, name := p.entry("hard", "b")
		p.put(name, []byte("z"))
		at, _ := p.entry("hard", "c")
		_, nid := p.inode("hard")
		return []string{fmt.Sprintf(`byte %d: nid %d "/hard": entry "c" comes after "z", so that it is not found`, at, nid)}
	}},
	{"the same name twice", "plain", func(p *patient) []string {
		_, name := p.entry("hard", "b")
		p.put(name, []byte("a"))
		at, _ := p.entry("hard", "b")
		_, nid := p.inode("hard")
		return []string{fmt.Sprintf(`byte %d: nid %d "/hard": entry "a" comes after "a", so that it is not found`, at, nid)}
	}},
	{"blocks of a directory out of order", "plain", func(p *patient) []string {
		var names []string
		for _, e := range readDir(p.t, p.im, p.find("bigdir")) {
			names = append(names, e.Name)
		}
		for i, name := range names[1:] {
			before, _ := p.entry("bigdir", names[i])
			at, nameAt := p.entry("bigdir", name)
			if before>>12 != at>>12 { // the first of a block
				p.put(nameAt, []byte("!"))
				_, nid := p.inode("bigdir")
				return []string{fmt.Sprintf(`byte %d: nid %d "/bigdir": entry %q comes after %q, so that it is not found`, at, nid, "!"+name[1:], names[i])}
			}
		}
		return []string{"bigdir has one block"}
	}},
	{`a missing ".."`, "plain", func(p *patient) []string {
		entry, name := p.entry("hard", "..")
		p.put(name, []byte("._"))
		_, root := p.inode("/")
		at, nid := p.inode("hard")
		return []string{
			fmt.Sprintf(`byte %d: nid %d "/hard/._": a directory that has another name already: a loop, or a hard link`, entry, root),
			fmt.Sprintf(`byte %d: nid %d "/hard": no entry ".."`, at, nid),
			fmt.Sprintf(`byte %d: nid %d "/hard": link count 2 of a directory with 1 directories in it, want 3`, at, nid),
		}
	}},
	{`a wrong "."`, "plain", func(p *patient) []string {
		at, _ := p.entry("hard", ".")
		_, root := p.inode("/")
		p.put(at, uint64(root))
		_, nid := p.inode("hard")
		return []string{fmt.Sprintf(`byte %d: nid %d "/hard": entry "." is nid %d, want %d`, at, nid, root, nid)}
	}},
	{`a wrong ".."`, "plain", func(p *patient) []string {
		at, _ := p.entry("deep/d0", "..")
		_, root := p.inode("/")
		p.put(at, uint64(root))
		_, nid := p.inode("deep/d0")
		_, up := p.inode("deep")
		return []string{fmt.Sprintf(`byte %d: nid %d "/deep/d0": entry ".." is nid %d, want %d`, at, nid, root, up)}
	}},
	{`a wrong type of "."`, "plain", func(p *patient) []string {
		at, _ := p.entry("hard", ".")
		p.put(at+10, []byte{ondisk.FtRegular})
		_, nid := p.inode("hard")
		return []string{fmt.Sprintf(`byte %d: nid %d "/hard": entry "." has file type 1, want 2`, at, nid)}
	}},
	{"a wrong file type", "plain", func(p *patient) []string {
		at, _ := p.entry("mixed", "half")
		p.put(at+10, []byte{ondisk.FtSymlink})
		_, nid := p.inode("mixed/half")
		return []string{fmt.Sprintf(`byte %d: nid %d "/mixed/half": file type 7 in the directory, but mode 0100644`, at, nid)}
	}},
	{"an unknown file type", "plain", func(p *patient) []string {
		at, _ := p.entry("mixed", "half")
		p.put(at+10, []byte{200})
		_, nid := p.inode("mixed/half")
		return []string{fmt.Sprintf(`byte %d: nid %d "/mixed/half": file type 200 in the directory, but mode 0100644`, at, nid)}
	}},
	{"a directory loop", "plain", func(p *patient) []string {
		at, _ := p.entry("deep/d0/d1/d2", "d3")
		_, nid := p.inode("deep/d0")
		p.put(at, uint64(nid))
		return []string{fmt.Sprintf(`byte %d: nid %d "/deep/d0/d1/d2/d3": a directory that has another name already: a loop, or a hard link`, at, nid)}
	}},
	{"a name with a slash", "plain", func(p *patient) []string {
		at, name := p.entry("hard", "c")
		p.put(name, []byte("/"))
		_, nid := p.inode("hard")
		return []string{fmt.Sprintf(`byte %d: nid %d "/hard": entry 4 is called "/"`, at, nid)}
	}},
	{"a directory block without entries", "plain", func(p *patient) []string {
		at, _ := p.entry("hard", ".")
		p.put(at+8, uint16(0))
		_, nid := p.inode("hard")
		return []string{fmt.Sprintf(`byte %d: nid %d "/hard": first name at 0 of a directory block of 66 bytes`, at, nid)}
	}},
	{"a mode that is none", "plain", func(p *patient) []string {
		at, nid := p.inode("mixed/half")
		p.put(at+inodeMode, uint16(0o644))
		return []string{fmt.Sprintf(`byte %d: nid %d "/mixed/half": mode 0644`, at, nid)}
	}},
	{"an unknown layout", "plain", func(p *patient) []string {
		at, nid := p.inode("mixed/half")
		p.put(at, uint16(1|6<<1))
		return []string{fmt.Sprintf(`byte %d: nid %d "/mixed/half": data layout 6: unsupported`, at, nid)}
	}},
	{"an inode past the end", "plain", func(p *patient) []string {
		at, _ := p.entry("mixed", "half")
		p.put(at, uint64(1<<40))
		return []string{fmt.Sprintf(`byte %d: nid %d "/mixed/half": metadata past the end, which is at %d`, int64(1<<45), int64(1<<40), len(p.data))}
	}},
	{"nanoseconds", "plain", func(p *patient) []string {
		at, nid := p.inode("mixed/half")
		p.put(at+inodeNsec, uint32(1e9))
		return []string{fmt.Sprintf(`byte %d: nid %d "/mixed/half": 1000000000 nanoseconds in its time`, at, nid)}
	}},
	{"a NUL in a link's target", "plain", func(p *patient) []string {
		at, nid := p.inode("ln-short")
		p.put(p.body("ln-short", 1)+3, []byte{0})
		return []string{fmt.Sprintf(`byte %d: nid %d "/ln-short": nid %d: symbolic link with a NUL at 3`, at, nid, nid)}
	}},
	{"fewer inodes than there are", "plain", func(p *patient) []string {
		p.super(func(s *ondisk.Super) { s.Inos = 268 })
		return []string{`byte 1024: the superblock counts 268 inodes, 269 were found`}
	}},
	{"an image that is too short for its blocks", "plain", func(p *patient) []string {
		p.super(func(s *ondisk.Super) { s.BlocksLo = 1 << 20 })
		return []string{fmt.Sprintf(`byte %d: the end of what should be 1048576 blocks, 4294967296 bytes`, len(p.data))}
	}},
	{"a root that is a file", "plain", func(p *patient) []string {
		at, nid := p.inode("mixed/half")
		p.super(func(s *ondisk.Super) { s.RootNid2b = uint16(nid) })
		return []string{fmt.Sprintf(`byte %d: the root, nid %d, is not a directory: mode 0100644`, at, nid)}
	}},
	{"an extent past the end", "plain", func(p *patient) []string {
		at, nid := p.inode("mixed/half")
		p.put(at+inodeU, uint32(1<<20))
		return []string{fmt.Sprintf(`byte 4294967296: nid %d "/mixed/half": bytes 0 to 154000 of the file, 154000 bytes, are past the end, which is at %d`, nid, len(p.data))}
	}},
	{"overlapping extents", "plain", func(p *patient) []string {
		at, _ := p.inode("sizes/t4097") // two blocks
		e := p.extent("sizes/t65536", 0)
		p.put(at+inodeU, uint32(e.at.off>>12)+3)
		_, nid := p.inode("sizes/t65536")
		return []string{fmt.Sprintf(`byte %d: nid %d "/sizes/t65536": a plain file where there is a plain file`, e.at.off+3<<12, nid)}
	}},
	{"data over metadata", "plain", func(p *patient) []string {
		at, nid := p.inode("mixed/half")
		root, _ := p.inode("/")
		p.put(at+inodeU, uint32(root>>12))
		return []string{fmt.Sprintf(`byte %d: nid %d "/mixed/half": a plain file where there is metadata`, root&^4095, nid)}
	}},
	{"an inode in another's data", "inline", func(p *patient) []string {
		holder, other := p.inode("sizes/t511")
		inner := (p.body("sizes/t511", 1) + 63) &^ 31
		fifo, _ := p.inode("dev/fifo")
		copy(p.data[inner:inner+64], p.data[fifo:fifo+64])
		at, _ := p.entry("dev", "fifo")
		p.put(at, uint64(inner/32))
		end := p.body("sizes/t511", 1) + 511
		return []string{fmt.Sprintf(`byte %d: nid %d "/sizes/t511": metadata up to %d, and another inode's is among it`, holder, other, end)}
	}},
	{"a chunk over metadata", "chunk-indexes", func(p *patient) []string {
		p.put(p.body("mixed/half", 8), uint16(0), uint16(0), uint32(0))
		_, nid := p.inode("mixed/half")
		return []string{fmt.Sprintf(`byte 0: nid %d "/mixed/half": chunks where there is metadata`, nid)}
	}},
	{"a chunk past the end", "chunk-indexes", func(p *patient) []string {
		p.put(p.body("mixed/half", 8), uint16(0), uint16(0), uint32(99999))
		_, nid := p.inode("mixed/half")
		return []string{fmt.Sprintf(`byte %d: nid %d "/mixed/half": bytes 0 to 4096 of the file, 4096 bytes, are past the end, which is at %d`, 99999<<12, nid, len(p.data))}
	}},
	{"a bad device id", "multidev", func(p *patient) []string {
		// A second device, since the id's bits above those that one needs do not count.
		table := (len(p.data) + 127) &^ 127
		p.data = append(p.data, make([]byte, table+2*ondisk.DeviceSize-len(p.data))...)
		p.super(func(s *ondisk.Super) {
			copy(p.data[table:], p.data[int(s.DevtSlotOff)*ondisk.DeviceSize:][:ondisk.DeviceSize])
			s.ExtraDevices, s.DevtSlotOff = 2, uint16(table/ondisk.DeviceSize)
		})
		p.devices = append(p.devices, memory{})
		p.put(p.body("mixed/half", 8)+2, uint16(3))
		_, nid := p.inode("mixed/half")
		e := p.extent("mixed/half", 0)
		return []string{fmt.Sprintf(`byte %d: nid %d "/mixed/half": device id 3 of 2`, e.at.off, nid)}
	}},
	{"a device that is cut off", "multidev", func(p *patient) []string {
		e := p.extent("xattr/x9", 0) // the last one
		p.devices[0] = p.devices[0].(memory)[:e.at.off]
		_, nid := p.inode("xattr/x9")
		return []string{
			fmt.Sprintf(`byte %d of the device 1: the end of what should be 265 blocks, 1085440 bytes`, e.at.off),
			fmt.Sprintf(`byte %d of the device 1: nid %d "/xattr/x9": bytes 0 to 333 of the file, 333 bytes, are past the end, which is at %[1]d`, e.at.off, nid),
		}
	}},
	{"a cut pcluster", "lz4", func(p *patient) []string {
		e := p.extent("mixed/half", 0)
		clear(p.data[e.at.off+2048 : e.at.off+e.plen])
		_, nid := p.inode("mixed/half")
		return []string{fmt.Sprintf(`byte %d: nid %d "/mixed/half": lz4 pcluster of %d bytes for %d at 0 of the file: `, e.at.off, nid, e.plen, e.llen)}
	}},
	{"a pcluster of zeros", "zstd", func(p *patient) []string {
		e := p.extent("mixed/half", 0)
		clear(p.data[e.at.off : e.at.off+e.plen])
		_, nid := p.inode("mixed/half")
		return []string{fmt.Sprintf(`byte %d: nid %d "/mixed/half": a pcluster that begins with 4096 zeros`, e.at.off, nid)}
	}},
	{"a pcluster that decodes to another length", "deflate", func(p *patient) []string {
		e, other := p.extent("mixed/half", 0), p.extent("mixed/zeros", 0)
		copy(p.data[e.at.off:e.at.off+e.plen], p.data[other.at.off:other.at.off+other.plen])
		_, nid := p.inode("mixed/half")
		return []string{fmt.Sprintf(`byte %d: nid %d "/mixed/half": deflate pcluster of %d bytes for %d at 0 of the file: `, e.at.off, nid, e.plen, e.llen)}
	}},
	{"a distance to no head", "lz4-legacy", func(p *patient) []string {
		lcn, _ := p.inner("mixed/half")
		at := p.body("mixed/half", 8) + ondisk.MapHeaderSize + 8 + lcn*ondisk.LclusterIndexSize
		p.put(at+4, uint16(0))
		_, nid := p.inode("mixed/half")
		return []string{fmt.Sprintf(`byte %d: nid %d "/mixed/half": lcluster %d is 0 lclusters from its head`, at+8, nid, lcn)}
	}},
	{"a distance to another head", "lz4-legacy", func(p *patient) []string {
		lcn, e := p.inner("mixed/half")
		start := p.body("mixed/half", 8) + ondisk.MapHeaderSize
		p.put(start+8+lcn*ondisk.LclusterIndexSize+4, uint16(lcn))
		_, nid := p.inode("mixed/half")
		return []string{fmt.Sprintf(`byte %d: nid %d "/mixed/half": byte %d of the file leads to an extent at 0 of `, start, nid, lcn<<12) +
			fmt.Sprintf(`%d bytes, which is at %d of %d bytes`, e.end(), e.la, e.llen)}
	}},
	{"an algorithm that there is not", "lz4", func(p *patient) []string {
		p.put(p.body("mixed/zeros", 8)+6, []byte{ondisk.AlgZstd})
		_, nid := p.inode("mixed/zeros")
		e := p.extent("mixed/zeros", 0)
		return []string{fmt.Sprintf(`byte %d: nid %d "/mixed/zeros": compressed with zstd, which the image does not announce`, e.at.off, nid)}
	}},
	{"lclusters too large for the index", "lz4", func(p *patient) []string {
		p.put(p.body("mixed/zeros", 8)+7, []byte{7})
		at, nid := p.inode("mixed/zeros")
		return []string{fmt.Sprintf(`byte %d: nid %d "/mixed/zeros": a compact index for lclusters of 524288 bytes: unsupported`, at+64+8, nid)}
	}},
	{"a bad fragment offset", "lz4-frag", func(p *patient) []string {
		at := p.body("sizes/t511", 8)
		p.put(at, uint64(1<<63|1<<40))
		_, nid := p.inode("sizes/t511")
		return []string{fmt.Sprintf(`byte %d of the packed inode: nid %d "/sizes/t511": bytes 0 to 511 of the file, 511 bytes, are past the end, which is at %d`, int64(1<<40), nid, p.packed().Size)}
	}},
	{"a bad xattr", "xattr-filter", func(p *patient) []string {
		at := p.xattrs("xattr/x1") + ondisk.XattrHeaderSize + 4*int64(p.data[p.xattrs("xattr/x1")+4])
		p.put(at+2, uint16(60000))
		_, nid := p.inode("xattr/x1")
		n := ondisk.XattrEntrySize + int(p.data[at]) + 60000
		left := p.xattrs("xattr/x1") + int64(p.find("xattr/x1").xattrSize) - at
		return []string{fmt.Sprintf(`byte %d: nid %d "/xattr/x1": an xattr of %d bytes where %d are left`, at, nid, n, left)}
	}},
	{"too many shared xattrs", "xattr-filter", func(p *patient) []string {
		at := p.xattrs("xattr/x1")
		p.put(at+4, []byte{200})
		_, nid := p.inode("xattr/x1")
		return []string{fmt.Sprintf(`byte %d: nid %d "/xattr/x1": 200 shared xattrs in %d bytes`, at, nid, p.find("xattr/x1").xattrSize)}
	}},
	{"a shared xattr past the end", "xattr-filter", func(p *patient) []string {
		at := p.xattrs("xattr/x1") + ondisk.XattrHeaderSize
		p.put(at, uint32(1<<30))
		_, nid := p.inode("xattr/x1")
		return []string{fmt.Sprintf(`byte %d: nid %d "/xattr/x1": shared xattr %d is past the end, which is at %d`, at, nid, 1<<30, len(p.data))}
	}},
	{"an unknown xattr prefix", "xattr-filter", func(p *patient) []string {
		at := p.xattrs("xattr/x1") + ondisk.XattrHeaderSize + 4*int64(p.data[p.xattrs("xattr/x1")+4])
		p.put(at+1, []byte{9})
		_, nid := p.inode("xattr/x1")
		return []string{fmt.Sprintf(`byte %d: nid %d "/xattr/x1": xattr with prefix 9, which means nothing`, at, nid)}
	}},
	{"a long xattr prefix that there is not", "xattr-filter", func(p *patient) []string {
		at := p.xattrs("xattr/x1") + ondisk.XattrHeaderSize + 4*int64(p.data[p.xattrs("xattr/x1")+4])
		p.put(at+1, []byte{0x83})
		_, nid := p.inode("xattr/x1")
		return []string{fmt.Sprintf(`byte %d: nid %d "/xattr/x1": xattr with long prefix 3 of 0`, at, nid)}
	}},
	{"a wrong name filter", "xattr-filter", func(p *patient) []string {
		at := p.xattrs("xattr/x0")
		p.put(at, ^uint32(0))
		shared := p.im.sharedXattrAt(binary.LittleEndian.Uint32(p.data[at+ondisk.XattrHeaderSize:]))
		_, nid := p.inode("xattr/x0")
		return []string{
			fmt.Sprintf(`byte %d: nid %d "/xattr/x0": xattr "user.n0", of which the name filter 0xffffffff says that it is not there`, at+16, nid),
			fmt.Sprintf(`byte %d: nid %d "/xattr/x0": xattr "user.same", of which the name filter 0xffffffff says that it is not there`, shared.off, nid),
		}
	}},
	{"a long xattr prefix of nothing", "xattr-plain-prefix", func(p *patient) []string {
		p.put(p.im.sb.xattrPrefixStart+2, []byte{77})
		return []string{fmt.Sprintf(`byte %d: long xattr prefix 0 builds on 77, which means nothing`, p.im.sb.xattrPrefixStart)}
	}},
	{"a packed inode that is a directory", "lz4-frag", func(p *patient) []string {
		at := p.im.locate(p.packed().Nid).off
		p.put(at+inodeMode, uint16(modeDir|0o755))
		return []string{fmt.Sprintf(`byte %d: nid %d "packed inode": nid %[2]d holds other inodes' data but has mode 040755`, at, p.packed().Nid)}
	}},
}

// Each fault has its line, and nothing else is said.
func TestCheckFaults(t *testing.T) {
	for _, c := range faultTests {
		t.Run(c.name, func(t *testing.T) {
			p := newPatient(t, c.image)
			want := c.damage(p)
			p.sign()
			faults, stats := checkAll(t, p.data, CheckOptions{Options: Options{Devices: p.devices}})
			var got []string
			for _, f := range faults {
				got = append(got, f.String())
			}
			if stats.Faults != len(got) || !slices.EqualFunc(got, want, strings.HasPrefix) {
				t.Errorf("%d faults\n%s\nwant\n%s", stats.Faults, strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
		})
	}
}
