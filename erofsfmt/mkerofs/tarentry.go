package mkerofs

import (
	"archive/tar"
	"bytes"
	"cmp"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"math"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// fromTar makes an entry of a header and what follows it.
func (l *Layers) fromTar(h *tar.Header, data *tarData) (Entry, error) {
	if h.Typeflag == tar.TypeLink {
		if h.Linkname == "" {
			return Entry{}, errors.New("hard link to nothing")
		}
		return Entry{Path: h.Name, Link: h.Linkname}, nil
	}
	e, err := convert(h)
	if err == nil {
		err = l.count(&e)
	}
	if err == nil && e.Size > 0 {
		e.Open, err = l.keep(h, data)
	}
	return e, err
}

// count adds the data of e to that of all.
func (l *Layers) count(e *Entry) error {
	if e.Link != "" || e.Mode&ModeType != ModeRegular || e.Size <= 0 {
		return nil
	}
	if e.Size > math.MaxInt64-l.bytes || l.o.MaxBytes > 0 && l.bytes+e.Size > l.o.MaxBytes {
		return fmt.Errorf("%d bytes: %w than %d", e.Size, ErrTooMuch, l.o.MaxBytes)
	}
	l.bytes += e.Size
	return nil
}

// convert makes an entry of a header, but for its data.
func convert(h *tar.Header) (Entry, error) {
	e := Entry{Path: h.Name, Mode: uint32(h.Mode) & 0o7777, Mtime: h.ModTime}
	if h.Uid < 0 || h.Gid < 0 || int64(h.Uid) > math.MaxUint32 || int64(h.Gid) > math.MaxUint32 {
		return e, fmt.Errorf("owner %d:%d: must be from 0 to %d", h.Uid, h.Gid, uint32(math.MaxUint32))
	}
	e.UID, e.GID = uint32(h.Uid), uint32(h.Gid)
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		e.Mode |= ModeRegular
		e.Size = h.Size
	case tar.TypeDir:
		e.Mode |= ModeDir
	case tar.TypeSymlink:
		e.Mode |= ModeSymlink
		e.Target = h.Linkname
	case tar.TypeFifo:
		e.Mode |= ModeFifo
	case tar.TypeChar, tar.TypeBlock:
		e.Mode |= ModeChar
		if h.Typeflag == tar.TypeBlock {
			e.Mode = e.Mode&^ModeType | ModeBlock
		}
		if h.Devmajor < 0 || h.Devmajor > maxMajor || h.Devminor < 0 || h.Devminor > maxMinor {
			return e, fmt.Errorf("device %d:%d: must be at most %d:%d", h.Devmajor, h.Devminor, maxMajor, maxMinor)
		}
		e.Major, e.Minor = uint32(h.Devmajor), uint32(h.Devminor)
	default:
		return e, fmt.Errorf("tar entry of type %q: is not known", h.Typeflag)
	}
	var err error
	e.Xattrs, err = tarXattrs(h)
	return e, err
}

// The PAX records of extended attributes: star's and GNU tar's, whose values are raw; libarchive's, whose names are
// percent-encoded and whose values are base64; and ACLs as text.
const (
	paxXattr        = "SCHILY.xattr."
	paxLibarchive   = "LIBARCHIVE.xattr."
	paxACLAccess    = "SCHILY.acl.access"
	paxACLDefault   = "SCHILY.acl.default"
	xattrACLAccess  = "system.posix_acl_access"
	xattrACLDefault = "system.posix_acl_default"
)

// tarXattrs gives the extended attributes of an entry. Where several records speak of one, star's counts.
func tarXattrs(h *tar.Header) (map[string][]byte, error) {
	attrs := make(map[string][]byte)
	for key, value := range h.PAXRecords {
		if name, ok := strings.CutPrefix(key, paxLibarchive); ok {
			decoded, err := url.PathUnescape(name)
			if err != nil {
				return nil, fmt.Errorf("record %.80q: %w", key, err)
			}
			raw, err := base64.StdEncoding.WithPadding(base64.NoPadding).DecodeString(strings.TrimRight(value, "=\n"))
			if err != nil {
				return nil, fmt.Errorf("record %.80q: %w", key, err)
			}
			attrs[decoded] = raw
		}
	}
	for key, name := range map[string]string{paxACLAccess: xattrACLAccess, paxACLDefault: xattrACLDefault} {
		if text := h.PAXRecords[key]; text != "" {
			raw, err := encodeACL(text)
			if err != nil {
				return nil, fmt.Errorf("record %s: %w", key, err)
			}
			attrs[name] = raw
		}
	}
	for key, value := range h.PAXRecords {
		if name, ok := strings.CutPrefix(key, paxXattr); ok {
			attrs[name] = []byte(value)
		}
	}
	return attrs, nil
}

// ACL entries as the kernel stores them (include/uapi/linux/posix_acl_xattr.h): u16 tag, u16 permissions, u32 id.
const (
	aclVersion   = 2
	aclUserObj   = 0x01
	aclUser      = 0x02
	aclGroupObj  = 0x04
	aclGroup     = 0x08
	aclMask      = 0x10
	aclOther     = 0x20
	aclNoID      = math.MaxUint32
	aclMaxInText = 1024 // entries; a file system has room for less
)

type aclEntry struct {
	tag, perm uint16
	id        uint32
}

// encodeACL makes the kernel's form of an ACL's text: entries parted by commas or lines, each
// "user:[NAME or ID]:rwx[:ID]", or group, mask or other.
func encodeACL(text string) ([]byte, error) {
	var list []aclEntry
	for item := range strings.FieldsFuncSeq(text, func(r rune) bool { return r == ',' || r == '\n' }) {
		item, _, _ = strings.Cut(item, "#")
		if item = strings.TrimSpace(item); item == "" {
			continue
		}
		e, err := parseACLEntry(item)
		if err != nil {
			return nil, fmt.Errorf("ACL entry %.80q: %w", item, err)
		}
		if list = append(list, e); len(list) > aclMaxInText {
			return nil, fmt.Errorf("ACL of more than %d entries", aclMaxInText)
		}
	}
	slices.SortFunc(list, func(a, b aclEntry) int { return cmp.Or(cmp.Compare(a.tag, b.tag), cmp.Compare(a.id, b.id)) })
	b := le.AppendUint32(nil, aclVersion)
	for _, e := range list {
		b = le.AppendUint16(b, e.tag)
		b = le.AppendUint16(b, e.perm)
		b = le.AppendUint32(b, e.id)
	}
	return b, nil
}

func parseACLEntry(item string) (e aclEntry, err error) {
	fields := strings.Split(strings.TrimPrefix(item, "default:"), ":")
	if len(fields) == 2 { // "mask:rwx" and "other:rwx" of old tools
		fields = []string{fields[0], "", fields[1]}
	}
	if len(fields) < 3 || len(fields) > 4 {
		return e, errors.New("must be TYPE:[WHO]:PERMISSIONS[:ID]")
	}
	tags := map[string][2]uint16{
		"user": {aclUserObj, aclUser}, "u": {aclUserObj, aclUser}, "group": {aclGroupObj, aclGroup}, "g": {aclGroupObj, aclGroup},
		"mask": {aclMask, 0}, "m": {aclMask, 0}, "other": {aclOther, 0}, "o": {aclOther, 0},
	}
	tag, ok := tags[fields[0]]
	if !ok {
		return e, errors.New("must be of a user, a group, a mask or others")
	}
	for _, c := range fields[2] {
		bit := strings.IndexRune("xwr", c)
		if bit < 0 && c != '-' {
			return e, fmt.Errorf("permission %q", c)
		}
		if bit >= 0 {
			e.perm |= 1 << bit
		}
	}
	if fields[1] == "" {
		e.tag, e.id = tag[0], aclNoID
		return e, nil
	}
	if e.tag = tag[1]; e.tag == 0 {
		return e, errors.New("names someone")
	}
	id, err := strconv.ParseUint(fields[len(fields)-1], 10, 32) // "user:NAME:rwx:ID"
	if len(fields) == 3 {
		id, err = strconv.ParseUint(fields[1], 10, 32)
	}
	if err != nil {
		return e, errors.New("has a name without a number")
	}
	e.id = uint32(id)
	return e, nil
}

// tarData is where the data of an entry is.
type tarData struct {
	r   io.Reader   // the data; of sparse files with zeros for the holes
	pos *position   // of the archive, where the data begins
	at  io.ReaderAt // the archive, if it can be read again
}

// keep makes the data of h available to Finish.
func (l *Layers) keep(h *tar.Header, d *tarData) (func() (io.ReadCloser, error), error) {
	section := func(r io.ReaderAt, off int64) func() (io.ReadCloser, error) {
		return func() (io.ReadCloser, error) { return io.NopCloser(io.NewSectionReader(r, off, h.Size)), nil }
	}
	if d.at != nil && !sparse(h) {
		return section(d.at, d.pos.off), nil
	}
	off := l.data.size
	n, err := l.data.copySparse(d.r)
	if err == nil && n != h.Size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, fmt.Errorf("its data, after %d bytes: %w", n, err)
	}
	return section(l.data.f, off), nil
}

// sparse says that the archive does not have the data of h in one piece.
func sparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// copySparse appends all of r, with holes in the file for what is zero.
func (s *spool) copySparse(r io.Reader) (total int64, err error) {
	buf := make([]byte, 64<<10)
	for {
		n, err := io.ReadFull(r, buf)
		if p := buf[:n]; n > 0 && !zero(p) {
			if err := s.take(n); err != nil {
				return total, err
			}
			if _, err := s.f.WriteAt(p, s.size); err != nil {
				return total, err
			}
		}
		s.size += int64(n)
		total += int64(n)
		switch err {
		case nil:
		case io.EOF, io.ErrUnexpectedEOF:
			return total, s.f.Truncate(s.size) // what follows the last data
		default:
			return total, err
		}
	}
}

func zero(p []byte) bool { return p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1]) }
