package erofsfmt

import (
	"encoding/binary"
	"strings"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// An xattrCheck is the check of one inode's extended attributes.
type xattrCheck struct {
	*checker
	who    *owner
	filter uint32
	seen   map[string]bool
}

// xattrs checks all entries, also those that eachXattr passes over or ends at.
func (c *checker) xattrs(who *owner, ino *Inode) {
	size := int64(ino.xattrSize)
	if size == 0 {
		return
	}
	start := c.im.metaAt(ino, int64(ino.headSize))
	if size == ondisk.XattrHeaderSize {
		c.fault(who, start, "xattrs of %d bytes: unsupported", size)
		return
	}
	h, err := c.meta.bytes(c.ctx, start, ondisk.XattrHeaderSize)
	if err != nil {
		c.failed(who, start, err)
		return
	}
	x := &xattrCheck{checker: c, who: who, filter: binary.LittleEndian.Uint32(h), seen: map[string]bool{}}
	if !c.im.sb.xattrFilter {
		x.filter = 0
	}
	shared := int64(h[4])
	at := start.plus(ondisk.XattrHeaderSize + shared*4)
	left := size - ondisk.XattrHeaderSize - shared*4
	if left < 0 {
		c.fault(who, start, "%d shared xattrs in %d bytes", shared, size)
		return
	}
	for left > 0 {
		n := x.entry(at, left)
		if n == 0 {
			break
		}
		at, left = at.plus(n), left-n
	}
	for i := range shared {
		x.shared(start.plus(ondisk.XattrHeaderSize + i*4))
	}
}

// shared checks the shared entry whose id is at a place.
func (x *xattrCheck) shared(id place) {
	b, err := x.meta.bytes(x.ctx, id, 4)
	if err != nil {
		x.failed(x.who, id, err)
		return
	}
	n := binary.LittleEndian.Uint32(b)
	at := x.im.sharedXattrAt(n)
	size, err := x.im.metaSize(x.ctx, at.src)
	if err != nil {
		x.failed(x.who, id, err)
		return
	}
	if at.off > size-ondisk.XattrEntrySize {
		x.fault(x.who, id, "shared xattr %d is past the end, which is at %d", n, size)
		return
	}
	if used := x.entry(at, size-at.off); used != 0 && at.src == 0 {
		x.mark(x.who, at, used, useMeta)
	}
}

// entry checks an entry that has at most left bytes. It returns how many it
// has, or 0 where that is not known.
func (x *xattrCheck) entry(at place, left int64) int64 {
	if left < ondisk.XattrEntrySize {
		x.fault(x.who, at, "an xattr where %d bytes are left", left)
		return 0
	}
	b, err := x.meta.bytes(x.ctx, at, ondisk.XattrEntrySize)
	if err != nil {
		x.failed(x.who, at, err)
		return 0
	}
	d := ondisk.DecodeXattrEntry(b)
	used := ondisk.XattrEntrySize + int64(d.NameLen) + int64(d.ValueSize)
	if used > left {
		x.fault(x.who, at, "an xattr of %d bytes where %d are left", used, left)
		return 0
	}
	suffix, err := x.meta.bytes(x.ctx, at.plus(ondisk.XattrEntrySize), int(d.NameLen))
	if err != nil {
		x.failed(x.who, at, err)
		return 0
	}
	x.name(at, d.NameIndex, string(suffix))
	return (used + 3) &^ 3
}

// name checks what an entry is called.
func (x *xattrCheck) name(at place, index uint8, rest string) {
	if i := int(index &^ ondisk.XattrLongPrefix); index&ondisk.XattrLongPrefix != 0 {
		prefixes, err := x.im.longPrefixes(x.ctx)
		if err != nil {
			return // a fault of the image
		}
		if i >= len(prefixes) {
			x.fault(x.who, at, "xattr with long prefix %d of %d", i, len(prefixes))
			return
		}
		index, rest = prefixes[i].base, prefixes[i].infix+rest
	} else if !knownXattr(index) {
		x.fault(x.who, at, "xattr with prefix %d, which means nothing", index)
		return
	}
	prefix := basePrefix(index)
	if prefix == "" {
		return // the kernel shows nothing of it
	}
	name := prefix + rest
	whole := !strings.HasSuffix(prefix, ".")
	switch {
	case len(name) > ondisk.NameLen:
		x.fault(x.who, at, "xattr with a name of %d bytes", len(name))
	case whole != (rest == ""), strings.ContainsRune(rest, 0):
		x.fault(x.who, at, "xattr called %q", name)
	case x.seen[name]:
		x.fault(x.who, at, "a second xattr called %q", name)
	case x.filter&(1<<xattrFilterBit(index, rest)) != 0:
		x.fault(x.who, at, "xattr %q, of which the name filter %#08x says that it is not there", name, x.filter)
	}
	x.seen[name] = true
}

// knownXattr says whether a prefix number has a meaning; for the kernel need not
// show it.
func knownXattr(index uint8) bool { return basePrefix(index) != "" || index == ondisk.XattrLustre }
