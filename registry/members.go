package registry

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"
)

// Bounds on what an archive may have us remember. An image has some ten members a
// layer.
const (
	maxMembers     = 100_000
	maxMemberNames = 16 << 20 // bytes of all names together
	maxMemberLinks = 8        // one after the other
)

// members are the files of a tar archive, by their names: where their bytes lie, so
// that they are read in place. What lies outside the archive has no name here.
type members struct {
	archive io.ReaderAt
	files   map[string]member
}

type member struct {
	off, size int64
	link      string // the name of the member that it stands for
	sparse    bool   // not in one piece
}

// readMembers reads the headers of an archive that is size bytes long. Where a name
// comes twice the last one counts, as for whoever unpacks it.
func readMembers(archive io.ReaderAt, size int64) (*members, error) {
	section := io.NewSectionReader(archive, 0, size)
	if err := refuseCompressed(archive); err != nil {
		return nil, err
	}
	ms := &members{archive: archive, files: map[string]member{}}
	r := tar.NewReader(section)
	for n, names := 0, 0; ; n++ {
		h, err := r.Next()
		if err == io.EOF {
			return ms, nil
		}
		if err != nil {
			return nil, fmt.Errorf("member %d: %w", n, err)
		}
		if names += len(h.Name) + len(h.Linkname); n == maxMembers || names > maxMemberNames {
			return nil, fmt.Errorf("more than %d members, or their names are longer than %d bytes", maxMembers, maxMemberNames)
		}
		// A tar reader that can seek reads no byte ahead of the header.
		at, err := section.Seek(0, io.SeekCurrent)
		if err != nil {
			return nil, err
		}
		name, ok := memberName("", h.Name)
		if !ok {
			continue
		}
		switch h.Typeflag {
		case tar.TypeReg, tar.TypeGNUSparse:
			m := member{off: at, size: h.Size, sparse: isSparse(h)}
			if !m.sparse && (h.Size < 0 || h.Size > size-at) {
				return nil, fmt.Errorf("member %d: %d bytes at %d, the archive ends at %d", n, h.Size, at, size)
			}
			ms.files[name] = m
		case tar.TypeSymlink:
			ms.link(name, path.Dir(name), h.Linkname)
		case tar.TypeLink:
			ms.link(name, "", h.Linkname)
		}
	}
}

func (ms *members) link(name, dir, to string) {
	if to, ok := memberName(dir, to); ok {
		ms.files[name] = member{link: to}
	}
}

func isSparse(h *tar.Header) bool {
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return true
		}
	}
	return h.Typeflag == tar.TypeGNUSparse
}

// memberName is a name in its shortest form, seen from dir; false for one that
// leads out of the archive.
func memberName(dir, name string) (string, bool) {
	if strings.HasPrefix(name, "/") {
		dir = ""
	}
	name = path.Join(dir, strings.TrimLeft(name, "/"))
	return name, fs.ValidPath(name) && name != "."
}

// find follows links.
func (ms *members) find(name string) (member, error) {
	at, ok := memberName("", name)
	for range maxMemberLinks {
		m, known := ms.files[at]
		switch {
		case !ok, !known:
			return member{}, fmt.Errorf("%s: %w", clean(name, 200), fs.ErrNotExist)
		case m.sparse:
			return member{}, fmt.Errorf("%s is a sparse file; write the archive without --sparse", clean(name, 200))
		case m.link == "":
			return m, nil
		}
		at = m.link
	}
	return member{}, fmt.Errorf("%s: too many links", clean(name, 200))
}

func (ms *members) section(m member) *io.SectionReader {
	return io.NewSectionReader(ms.archive, m.off, m.size)
}

func (ms *members) open(name string) (io.ReadCloser, int64, error) {
	m, err := ms.find(name)
	if err != nil {
		return nil, 0, err
	}
	return io.NopCloser(ms.section(m)), m.size, nil
}

// refuseCompressed says what to do with an archive that cannot be read in place.
func refuseCompressed(r io.ReaderAt) error {
	how, err := sniff(r)
	if err != nil || how == "" {
		return err
	}
	tool := map[string]string{"gzip": "gunzip", "zstd": "unzstd", "xz": "unxz", "bzip2": "bunzip2"}[how]
	return fmt.Errorf("is compressed with %s and cannot be read in place; unpack it first: %s < FILE > FILE.tar", how, tool)
}

// sniff names the compression of what r holds; "" for none.
func sniff(r io.ReaderAt) (string, error) {
	var head [10]byte
	n, err := r.ReadAt(head[:], 0)
	if err != nil && err != io.EOF {
		return "", err
	}
	for _, c := range []struct{ magic, name string }{
		{"\x1f\x8b\x08", "gzip"}, {"\x28\xb5\x2f\xfd", "zstd"}, {"\xfd7zXZ\x00", "xz"},
	} {
		if bytes.HasPrefix(head[:n], []byte(c.magic)) {
			return c.name, nil
		}
	}
	if bytes.HasPrefix(head[:n], []byte("BZh")) && bytes.HasSuffix(head[:n], []byte("1AY&SY")) {
		return "bzip2", nil
	}
	return "", nil
}
