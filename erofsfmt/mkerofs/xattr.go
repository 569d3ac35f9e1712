package mkerofs

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"math/bits"
	"slices"
	"strings"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
)

// An xattr is an extended attribute of an entry.
type xattr struct {
	xattrPrefix // of the kernel's
	suffix      string
	value       string
}

// An xattrPrefix is the beginning of a name: one that Linux has a number for, and what follows it. Names of the list
// XattrPrefixes have such a beginning in common.
type xattrPrefix struct {
	base  uint8
	infix string
}

// xattrBases are the beginnings that Linux has numbers for. The ACLs are whole names.
func xattrBases() map[string]uint8 {
	return map[string]uint8{
		"user.":                    ondisk.XattrUser,
		"trusted.":                 ondisk.XattrTrusted,
		"security.":                ondisk.XattrSecurity,
		"system.posix_acl_access":  ondisk.XattrPosixAclAccess,
		"system.posix_acl_default": ondisk.XattrPosixAclDefault,
	}
}

// splitXattrName takes a full name apart as Linux does.
func splitXattrName(name string) (base uint8, suffix string, err error) {
	for prefix, base := range xattrBases() {
		suffix, ok := strings.CutPrefix(name, prefix)
		if whole := !strings.HasSuffix(prefix, "."); !ok || whole != (suffix == "") {
			continue
		}
		if len(suffix) > math.MaxUint8 || strings.Contains(suffix, "\x00") {
			return 0, "", fmt.Errorf("xattr %.80q: must have at most %d bytes behind %s, and no NUL", name, math.MaxUint8, prefix)
		}
		return base, suffix, nil
	}
	return 0, "", fmt.Errorf("xattr %.80q: EROFS has no place for it; drop it, or store it as user., trusted., security. or an ACL", name)
}

// splitXattrs checks the attributes of an entry.
func (b *Builder) splitXattrs(xattrs map[string][]byte) ([]xattr, error) {
	if len(xattrs) == 0 {
		return nil, nil
	}
	list := make([]xattr, 0, len(xattrs))
	size := ondisk.XattrHeaderSize
	for _, name := range slices.Sorted(maps.Keys(xattrs)) {
		base, suffix, err := splitXattrName(name)
		if err != nil {
			return nil, err
		}
		value := xattrs[name]
		if len(value) > math.MaxUint16 {
			return nil, fmt.Errorf("xattr %s: value of %d bytes is longer than %d", name, len(value), math.MaxUint16)
		}
		list = append(list, xattr{xattrPrefix{base, ""}, suffix, string(value)})
		size += (ondisk.XattrEntrySize + len(suffix) + len(value) + 3) &^ 3
	}
	if most := ondisk.XattrHeaderSize + 4*(math.MaxUint16-1); size > most {
		return nil, fmt.Errorf("xattrs take %d bytes, an inode can have %d", size, most)
	}
	return list, nil
}

// checkPrefixes splits Options.XattrPrefixes.
func checkPrefixes(names []string) ([]xattrPrefix, error) {
	if most := ondisk.XattrLongPrefix - 1; len(names) > most {
		return nil, fmt.Errorf("%d xattr prefixes: more than %d", len(names), most)
	}
	var list []xattrPrefix
	for _, name := range names {
		base, infix, err := splitXattrName(name)
		if err != nil {
			return nil, fmt.Errorf("xattr prefix: %w", err)
		}
		if infix == "" {
			return nil, fmt.Errorf("xattr prefix %q: Linux has a number for it", name)
		}
		list = append(list, xattrPrefix{base, infix})
	}
	return list, nil
}

// encode writes the entry behind b, with the longest of the prefixes that it begins with.
func (x *xattr) encode(b []byte, prefixes []xattrPrefix) []byte {
	number, suffix := x.base, x.suffix
	for i, p := range prefixes {
		if rest, ok := strings.CutPrefix(x.suffix, p.infix); ok && p.base == x.base && len(rest) < len(suffix) {
			number, suffix = ondisk.XattrLongPrefix|uint8(i), rest
		}
	}
	b = ondisk.XattrEntry{NameLen: uint8(len(suffix)), NameIndex: number, ValueSize: uint16(len(x.value))}.Append(b)
	b = append(append(b, suffix...), x.value...)
	return append(b, make([]byte, -len(b)&3)...)
}

// xattrShareFrom is how many inodes must have an attribute for it to be shared. For fewer, one read less counts more.
const xattrShareFrom = 4

// encodeXattrs gives all nodes their xattrs as on disk, and the area of those that many have, which are told by where
// they are in it, in units of 4 bytes.
func (b *Builder) encodeXattrs(nodes []*node) (shared []byte) {
	counts := make(map[xattr]int)
	for _, n := range nodes {
		for _, x := range n.attrs {
			counts[x]++
		}
	}
	var common []xattr
	for x, count := range counts {
		if count >= xattrShareFrom {
			common = append(common, x)
		}
	}
	slices.SortFunc(common, func(x, y xattr) int {
		return cmp.Or(cmp.Compare(counts[y], counts[x]), cmp.Compare(x.base, y.base), cmp.Compare(x.suffix, y.suffix), cmp.Compare(x.value, y.value))
	})
	ids := make(map[xattr]uint32)
	for _, x := range common {
		ids[x] = uint32(len(shared) / 4)
		shared = x.encode(shared, b.prefixes)
	}
	for _, n := range nodes {
		n.xattrs = b.encodeBody(n.attrs, ids)
	}
	return shared
}

// encodeBody gives what stands between an inode and its tail: a header, the ids of shared attributes, the others by
// name. Nothing at all for none (fs/erofs/xattr.c erofs_init_inode_xattrs).
func (b *Builder) encodeBody(attrs []xattr, ids map[xattr]uint32) []byte {
	if len(attrs) == 0 {
		return nil
	}
	h := ondisk.XattrHeader{NameFilter: math.MaxUint32}
	var shared, own []byte
	for _, x := range attrs {
		h.NameFilter &^= 1 << x.filterBit()
		if id, ok := ids[x]; ok && h.SharedCount < math.MaxUint8 {
			h.SharedCount++
			shared = le.AppendUint32(shared, id)
			continue
		}
		own = x.encode(own, b.prefixes)
	}
	return append(append(h.Append(nil), shared...), own...)
}

// filterBit is the bit of the name filter that an inode with x has cleared (fs/erofs/xattr.c erofs_getxattr).
func (x *xattr) filterBit() uint32 {
	return xxh32([]byte(x.suffix), ondisk.XattrFilterSeed+uint32(x.base)) % ondisk.XattrFilterBits
}

// encodePrefixes is the table of long prefixes (fs/erofs/xattr.c erofs_xattr_prefixes_init).
func encodePrefixes(list []xattrPrefix) (b []byte) {
	for _, p := range list {
		b = le.AppendUint16(b, uint16(1+len(p.infix)))
		b = append(append(b, p.base), p.infix...)
		b = append(b, make([]byte, -len(b)&3)...)
	}
	return b
}

// xxh32 is the 32-bit xxHash (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md).
func xxh32(b []byte, seed uint32) uint32 {
	const p1, p2, p3, p4, p5 uint32 = 2654435761, 2246822519, 3266489917, 668265263, 374761393
	n := uint32(len(b))
	h := seed + p5
	if len(b) >= 16 {
		lanes := [4]uint32{seed + p1 + p2, seed + p2, seed, seed - p1}
		for ; len(b) >= 16; b = b[16:] {
			for i := range lanes {
				lanes[i] = bits.RotateLeft32(lanes[i]+le.Uint32(b[4*i:])*p2, 13) * p1
			}
		}
		h = 0
		for i, rotate := range [4]int{1, 7, 12, 18} {
			h += bits.RotateLeft32(lanes[i], rotate)
		}
	}
	h += n
	for ; len(b) >= 4; b = b[4:] {
		h = bits.RotateLeft32(h+le.Uint32(b)*p3, 17) * p4
	}
	for _, c := range b {
		h = bits.RotateLeft32(h+uint32(c)*p5, 11) * p1
	}
	h = (h ^ h>>15) * p2
	h = (h ^ h>>13) * p3
	return h ^ h>>16
}
