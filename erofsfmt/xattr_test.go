package erofsfmt

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
)

// The published vectors of xxHash.
func TestXXH32(t *testing.T) {
	for _, c := range []struct {
		in   string
		seed uint32
		want uint32
	}{
		{"", 0, 0x02cc5d05},
		{"", 0x9e3779b1, 0x36b78ae7},
		{"a", 0, 0x550d7456},
		{"abc", 0, 0x32d153ff},
		{"Nobody inspects the spammish repetition", 0, 0xe2293b2f},
	} {
		if got := xxh32(c.in, c.seed); got != c.want {
			t.Errorf("%q, seed %#x: %#x, want %#x", c.in, c.seed, got, c.want)
		}
	}
}

// Names that an inode does not have are not found, whether or not the filter
// tells, and the filter never hides one that it has.
func TestXattrFilter(t *testing.T) {
	ctx := context.Background()
	im := openCorpus(t, corpus.Get(t, "xattr-filter"))
	if !im.sb.xattrFilter {
		t.Fatal("no filter")
	}
	ino := find(t, im, "xattr", "many")
	names, err := im.Xattrs(ctx, ino)
	if err != nil || len(names) < 20 {
		t.Fatalf("%q, %v", names, err)
	}
	for _, name := range names {
		if _, err := im.Xattr(ctx, ino, name); err != nil {
			t.Error(err)
		}
		for _, no := range []string{name + "x", name[:len(name)-1]} {
			if slices.Contains(names, no) {
				continue
			}
			if _, err := im.Xattr(ctx, ino, no); !errors.Is(err, ErrNoXattr) {
				t.Errorf("%q: %v", no, err)
			}
		}
	}
}

func TestXattrNames(t *testing.T) {
	for _, c := range []struct {
		name string
		base uint8
		rest string
		ok   bool
	}{
		{"user.a", 1, "a", true},
		{"security.capability", 6, "capability", true},
		{"trusted.overlay.opaque", 4, "overlay.opaque", true},
		{"system.posix_acl_access", 2, "", true},
		{"system.posix_acl_default", 3, "", true},
		{"system.posix_acl_access2", 2, "2", false},
		{"user.", 1, "", false},
		{"lustre.x", 0, "", false},
		{"", 0, "", false},
	} {
		base, rest, ok := splitXattrName(c.name)
		if ok != c.ok || ok && (base != c.base || rest != c.rest) {
			t.Errorf("%q: %d, %q, %v", c.name, base, rest, ok)
		}
	}
}

// withXattrs is a fake whose file has xattrs made of the given bytes, which
// follow the header.
func withXattrs(shared byte, body []byte) *fake {
	f := newFake(ondisk.LayoutPlain, 0)
	f.body = append([]byte{0, 0, 0, 0, shared, 0, 0, 0, 0, 0, 0, 0}, body...)
	f.inode.XattrIcount = uint16(len(body)/4 + 1)
	return f
}

func entry(index byte, name, value string) []byte {
	b := append([]byte{byte(len(name)), index}, binary.LittleEndian.AppendUint16(nil, uint16(len(value)))...)
	b = append(append(b, name...), value...)
	return append(b, make([]byte, -len(b)&3)...)
}

func list(t *testing.T, f *fake) (string, error) {
	t.Helper()
	im, ino := f.open(t, Options{})
	names, err := im.Xattrs(context.Background(), ino)
	var out []string
	for _, n := range names {
		v, err := im.Xattr(context.Background(), ino, n)
		if err != nil {
			t.Errorf("%q: %v", n, err)
		}
		out = append(out, n+"="+string(v))
	}
	return strings.Join(out, " "), err
}

// Xattrs by hand, in the kernel's order: an inode's own, then the shared ones.
func TestXattrs(t *testing.T) {
	long := func(f *fake, place int) *fake {
		f.super.FeatureIncompat |= ondisk.IncompatXattrPrefixes
		f.super.FeatureCompat |= ondisk.CompatPlainXattrPrefixes
		f.super.XattrPrefixCount, f.super.XattrPrefixStart = 2, uint32(place/4)
		f.more[place] = le(uint16(9), [9]byte([]byte("\x04overlay.")), [1]byte{}, uint16(1), [1]byte{1})
		return f
	}
	sharedAt := func(f *fake) *fake {
		f.super.XattrBlkaddr = 1
		f.blocks[1] = append(make([]byte, 8), entry(1, "shared", "s")...)
		return f
	}
	for _, c := range []struct {
		name string
		f    *fake
		want string
		err  error
	}{
		{"none", newFake(ondisk.LayoutPlain, 0), "", nil},
		{"own", withXattrs(0, join(entry(1, "a", "1"), entry(6, "bb", ""), entry(2, "", "acl"))), "user.a=1 security.bb= system.posix_acl_access=acl", nil},
		{"shared", sharedAt(withXattrs(1, join(le(uint32(2)), entry(4, "t", "v")))), "trusted.t=v user.shared=s", nil},
		{"long prefixes", long(withXattrs(0, join(entry(0x80, "opaque", "y"), entry(0x81, "z", "1"))), 2816), "trusted.overlay.opaque=y user.z=1", nil},
		{"unknown long prefix", long(withXattrs(0, join(entry(0x82, "opaque", "y"), entry(1, "z", "1"))), 2816), "user.z=1", nil},
		{"unknown index", withXattrs(0, join(entry(5, "a", "1"), entry(9, "a", "1"), entry(1, "z", ""))), "user.z=", nil},
		{"header only", withXattrs(0, nil), "", ErrUnsupported},
		{"value past the end", withXattrs(0, join([]byte{1, 1, 200, 0}, []byte("a123"))), "", ErrCorrupt},
		{"name past the end", withXattrs(0, []byte{200, 1, 0, 0}), "", ErrCorrupt},
		{"too many shared", withXattrs(9, make([]byte, 8)), "", ErrCorrupt},
		{"empty long prefix", func() *fake {
			f := long(withXattrs(0, entry(0x80, "x", "y")), 2816)
			f.more[2816] = make([]byte, 16)
			return f
		}(), "", ErrCorrupt},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := list(t, c.f)
			if !errors.Is(err, c.err) || err == nil && got != c.want {
				t.Errorf("%q, %v; want %q, %v", got, err, c.want, c.err)
			}
		})
	}
}

// Long prefixes can lie in the packed inode; here its data are a plain file.
func TestLongPrefixesInPackedInode(t *testing.T) {
	f := withXattrs(0, entry(0x80, "opaque", "y"))
	f.super.FeatureIncompat = ondisk.IncompatXattrPrefixes | ondisk.IncompatFragments
	f.super.XattrPrefixCount, f.super.XattrPrefixStart, f.super.PackedNid = 1, 2, 96 // at byte 3072
	f.more[96*32] = le(&ondisk.InodeExtended{Format: ondisk.FormatExtended, Mode: modeReg, Size: 20, U: 1})
	f.blocks[1] = join(make([]byte, 8), le(uint16(9), [9]byte([]byte("\x04overlay."))))
	if got, err := list(t, f); err != nil || got != "trusted.overlay.opaque=y" {
		t.Errorf("%q, %v", got, err)
	}
}

// Large xattrs cross pages.
func TestLargeXattrs(t *testing.T) {
	value := strings.Repeat("0123456789abcdef", 4000)
	f := withXattrs(0, join(entry(1, "big", value), entry(1, "after", "x")))
	f.blocks[20] = []byte{0}
	im, ino := f.open(t, Options{})
	v, err := im.Xattr(context.Background(), ino, "user.big")
	if err != nil || !bytes.Equal(v, []byte(value)) {
		t.Errorf("%d bytes, %v", len(v), err)
	}
	if v, err = im.Xattr(context.Background(), ino, "user.after"); err != nil || string(v) != "x" {
		t.Errorf("%q, %v", v, err)
	}
}
