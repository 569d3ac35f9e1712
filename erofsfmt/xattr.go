package erofsfmt

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/bits"
	"strings"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// The extended attributes of an inode follow it:
//
//	header | ids of shared entries, u32 each | entries, each padded to 4 bytes
//
// A shared entry lies elsewhere and serves many inodes. An entry stores its name
// without the prefix, which is a number: one of the kernel's, or, with the high
// bit, one of the image's own long prefixes, which stand for a number
// and the text that follows it ("trusted." and "overlay.", say).

// xattrPrefixes are what the numbers stand for. Those of POSIX ACLs are whole
// names. Number 5 (lustre) has no handler in the kernel, so it shows nothing.
var xattrPrefixes = [...]string{
	ondisk.XattrUser:            "user.",
	ondisk.XattrPosixAclAccess:  "system.posix_acl_access",
	ondisk.XattrPosixAclDefault: "system.posix_acl_default",
	ondisk.XattrTrusted:         "trusted.",
	ondisk.XattrSecurity:        "security.",
}

// basePrefix is the text of a number, or "" if the kernel has no handler for it.
func basePrefix(index uint8) string {
	if int(index) < len(xattrPrefixes) {
		return xattrPrefixes[index]
	}
	return ""
}

type xattrPrefix struct {
	base  uint8
	infix string
}

// An xattr is an entry as it was found.
type xattr struct {
	base   uint8
	infix  string // of a long prefix
	suffix []byte // valid until the next entry
	at     place  // of the value
	size   int
}

func (x *xattr) name() string { return basePrefix(x.base) + x.infix + string(x.suffix) }

// is says whether the entry is called base prefix + rest.
func (x *xattr) is(base uint8, rest string) bool {
	return x.base == base && len(rest) == len(x.infix)+len(x.suffix) &&
		strings.HasPrefix(rest, x.infix) && rest[len(x.infix):] == string(x.suffix)
}

// Xattrs lists the names of an inode's extended attributes in the kernel's
// order. Whether a caller may see those of "trusted." is for it to decide.
func (im *Image) Xattrs(ctx context.Context, ino *Inode) ([]string, error) {
	if im.union != nil {
		return im.union.xattrs(ctx, ino)
	}
	var names []string
	err := im.eachXattr(ctx, ino, func(x *xattr) bool {
		names = append(names, x.name())
		return true
	})
	if err != nil {
		return nil, fmt.Errorf("nid %d: xattrs: %w", uint64(ino.Nid), err)
	}
	return names, nil
}

// Xattr returns the value of an extended attribute; the error is ErrNoXattr if
// the inode has none of that name.
func (im *Image) Xattr(ctx context.Context, ino *Inode, name string) ([]byte, error) {
	if im.union != nil {
		return im.union.xattr(ctx, ino, name)
	}
	base, rest, ok := splitXattrName(name)
	if !ok || !ino.HasXattrs() {
		return nil, ErrNoXattr
	}
	value, err := im.findXattr(ctx, ino, base, rest)
	if err != nil && err != ErrNoXattr {
		return nil, fmt.Errorf("nid %d: xattr %q: %w", uint64(ino.Nid), name, err)
	}
	return value, err
}

// splitXattrName finds the number of a name's prefix.
func splitXattrName(name string) (base uint8, rest string, ok bool) {
	for i, prefix := range xattrPrefixes {
		if prefix == "" || !strings.HasPrefix(name, prefix) {
			continue
		}
		rest = name[len(prefix):]
		whole := !strings.HasSuffix(prefix, ".")
		return uint8(i), rest, whole == (rest == "")
	}
	return 0, "", false
}

func (im *Image) findXattr(ctx context.Context, ino *Inode, base uint8, rest string) ([]byte, error) {
	if im.sb.xattrFilter {
		m := metaReader{im: im}
		b, err := m.bytes(ctx, im.metaAt(ino, int64(ino.headSize)), 4)
		if err != nil {
			return nil, err
		}
		if binary.LittleEndian.Uint32(b)&(1<<xattrFilterBit(base, rest)) != 0 {
			return nil, ErrNoXattr
		}
	}
	var found *xattr
	err := im.eachXattr(ctx, ino, func(x *xattr) bool {
		if x.is(base, rest) {
			found = &xattr{at: x.at, size: x.size}
		}
		return found == nil
	})
	if err != nil {
		return nil, err
	}
	if found == nil {
		return nil, ErrNoXattr
	}
	value := make([]byte, found.size)
	return value, im.readPlace(ctx, value, found.at)
}

// xattrFilterBit is the bit of the name filter that is clear if an inode may have
// the name (fs/erofs/xattr.c erofs_getxattr).
func xattrFilterBit(base uint8, rest string) uint32 {
	return xxh32(rest, ondisk.XattrFilterSeed+uint32(base)) % ondisk.XattrFilterBits
}

// eachXattr calls fn with the inode's own entries, then the shared ones, until it
// returns false (fs/erofs/xattr.c erofs_xattr_iter_inline and
// erofs_xattr_iter_shared).
func (im *Image) eachXattr(ctx context.Context, ino *Inode, fn func(*xattr) bool) error {
	size := int64(ino.xattrSize)
	if size == 0 {
		return nil
	}
	start := im.metaAt(ino, int64(ino.headSize))
	if size == ondisk.XattrHeaderSize {
		return start.unsupported("xattrs of %d bytes", size)
	}
	m := metaReader{im: im}
	h, err := m.bytes(ctx, start, ondisk.XattrHeaderSize)
	if err != nil {
		return err
	}
	shared := int64(h[4])
	at := start.plus(ondisk.XattrHeaderSize + shared*4)
	left := size - ondisk.XattrHeaderSize - shared*4
	if left < 0 {
		return start.corrupt("%d shared xattrs in %d bytes", shared, size)
	}
	for left > 0 {
		x, n, err := im.xattrAt(ctx, &m, at)
		if err != nil {
			return err
		}
		if n > left {
			return at.corrupt("an xattr of %d bytes where %d are left", n, left)
		}
		if x != nil && !fn(x) {
			return nil
		}
		at, left = at.plus(n), left-n
	}
	for i := range shared {
		x, err := im.sharedXattr(ctx, &m, start.plus(ondisk.XattrHeaderSize+i*4))
		if err != nil {
			return err
		}
		if x != nil && !fn(x) {
			return nil
		}
	}
	return nil
}

// sharedXattr reads the shared entry whose id is at a place.
func (im *Image) sharedXattr(ctx context.Context, m *metaReader, id place) (*xattr, error) {
	b, err := m.bytes(ctx, id, 4)
	if err != nil {
		return nil, err
	}
	at := im.sharedXattrAt(binary.LittleEndian.Uint32(b))
	x, _, err := im.xattrAt(ctx, m, at)
	return x, err
}

// sharedXattrAt is where the shared entry of an id is.
func (im *Image) sharedXattrAt(id uint32) place {
	at := place{0, int64(im.sb.XattrBlkaddr)<<im.sb.BlockBits + int64(id)*4}
	if im.sb.compat(ondisk.CompatSharedEAInMetabox) {
		at.src = inMetabox
	}
	return at
}

// xattrAt reads the entry at a place and says how many bytes it has. The entry is
// nil if the kernel would not show it.
func (im *Image) xattrAt(ctx context.Context, m *metaReader, at place) (*xattr, int64, error) {
	b, err := m.bytes(ctx, at, ondisk.XattrEntrySize)
	if err != nil {
		return nil, 0, err
	}
	d := ondisk.DecodeXattrEntry(b)
	x := &xattr{base: d.NameIndex, size: int(d.ValueSize), at: at.plus(ondisk.XattrEntrySize + int64(d.NameLen))}
	n := (ondisk.XattrEntrySize + int64(d.NameLen) + int64(d.ValueSize) + 3) &^ 3
	if d.NameIndex&ondisk.XattrLongPrefix != 0 {
		prefixes, err := im.longPrefixes(ctx)
		if err != nil {
			return nil, 0, err
		}
		i := int(d.NameIndex &^ ondisk.XattrLongPrefix)
		if i >= len(prefixes) {
			return nil, n, nil
		}
		x.base, x.infix = prefixes[i].base, prefixes[i].infix
	}
	if basePrefix(x.base) == "" {
		return nil, n, nil
	}
	x.suffix, err = m.bytes(ctx, at.plus(ondisk.XattrEntrySize), int(d.NameLen))
	return x, n, err
}

// longPrefixes reads the image's own prefixes when the first is met: each
// a length, the number it builds on, and the text after it (fs/erofs/xattr.c
// erofs_xattr_prefixes_init).
func (im *Image) longPrefixes(ctx context.Context) ([]xattrPrefix, error) {
	if p := im.prefixes.Load(); p != nil {
		return *p, nil
	}
	if !im.sb.incompat(ondisk.IncompatXattrPrefixes) {
		return nil, nil
	}
	prefixes := make([]xattrPrefix, 0, im.sb.xattrPrefixCount)
	at := place{im.prefixSource(), im.sb.xattrPrefixStart}
	for range im.sb.xattrPrefixCount {
		var n [2]byte
		if err := im.readPlace(ctx, n[:], at); err != nil {
			return nil, fmt.Errorf("long xattr prefixes: %w", err)
		}
		size := int64(binary.LittleEndian.Uint16(n[:]))
		if size < 1 || size > 1+ondisk.NameLen {
			return nil, at.corrupt("a long xattr prefix of %d bytes", size)
		}
		b := make([]byte, size)
		if err := im.readPlace(ctx, b, at.plus(2)); err != nil {
			return nil, fmt.Errorf("long xattr prefixes: %w", err)
		}
		prefixes = append(prefixes, xattrPrefix{b[0], string(b[1:])})
		at.off = (at.off + 2 + size + 3) &^ 3
	}
	im.prefixes.Store(&prefixes)
	return prefixes, nil
}

// prefixSource is where the long prefixes are.
func (im *Image) prefixSource() int {
	switch {
	case im.sb.compat(ondisk.CompatPlainXattrPrefixes):
		return 0
	case im.sb.incompat(ondisk.IncompatMetabox):
		return inMetabox
	case im.sb.incompat(ondisk.IncompatFragments) && im.sb.PackedNid != 0:
		return inPacked
	}
	return 0
}

// xxh32 is the 32-bit xxHash of s.
func xxh32(s string, seed uint32) uint32 {
	const p1, p2, p3, p4, p5 = 2654435761, 2246822519, 3266489917, 668265263, 374761393
	word := func(i int) uint32 {
		return uint32(s[i]) | uint32(s[i+1])<<8 | uint32(s[i+2])<<16 | uint32(s[i+3])<<24
	}
	n := uint32(len(s))
	h := seed + p5
	if len(s) >= 16 {
		v := [4]uint32{seed, seed, seed, seed}
		v[0] += p1
		v[0] += p2
		v[1] += p2
		v[3] -= p1
		for ; len(s) >= 16; s = s[16:] {
			for i := range v {
				v[i] = bits.RotateLeft32(v[i]+word(4*i)*p2, 13) * p1
			}
		}
		h = bits.RotateLeft32(v[0], 1) + bits.RotateLeft32(v[1], 7) + bits.RotateLeft32(v[2], 12) + bits.RotateLeft32(v[3], 18)
	}
	h += n
	for ; len(s) >= 4; s = s[4:] {
		h = bits.RotateLeft32(h+word(0)*p3, 17) * p4
	}
	for i := range len(s) {
		h = bits.RotateLeft32(h+uint32(s[i])*p5, 11) * p1
	}
	h ^= h >> 15
	h *= p2
	h ^= h >> 13
	h *= p3
	return h ^ h>>16
}
