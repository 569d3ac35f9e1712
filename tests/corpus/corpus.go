// Package corpus gives tests a set of small EROFS images, one per on-disk
// feature, and what a Linux kernel shows of each.
//
// The archive holds, for every image:
//
//	NAME.erofs   the image, written by mkfs.erofs 1.9.4 from one nasty tree
//	NAME.cmd     the flags it was written with
//	NAME.jsonl   what Linux 6.18 shows of it, one JSON object a path,
//	             depth first, names in byte order ("." is the root)
//	NAME.blob    the extra device, for the image that has one
//
// It is unpacked once, into memory, when a test first asks for it.
package corpus

import (
	"archive/tar"
	"bytes"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// An Image is one file system of the corpus. Its bytes are shared by all
// tests: nobody may write to them.
type Image struct {
	Name  string // as in "lz4-frag"
	Flags string // how mkfs.erofs was called
	Data  []byte // the image
	Blob  []byte // its extra device, or nil

	listing []byte
}

// An Entry is what the kernel shows of one path.
type Entry struct {
	Path    string // the bytes of the path, which need not be UTF-8; "." is the root
	Mode    uint32 // st_mode with the type bits
	UID     uint32
	GID     uint32
	Nlink   uint32
	Ino     uint64
	MtimeNs int64

	Size   int64             // of regular files
	SHA256 string            // of regular files, in hex
	Target string            // of symbolic links
	Rdev   *[2]uint32        // major and minor, of devices
	Xattrs map[string][]byte // nil where there are none
}

// Images returns every image, by name.
func Images(t testing.TB) []Image {
	t.Helper()
	images, err := unpacked()
	if err != nil {
		t.Fatalf("corpus: %v", err)
	}
	return images
}

// Get returns the image called name.
func Get(t testing.TB, name string) Image {
	t.Helper()
	for _, im := range Images(t) {
		if im.Name == name {
			return im
		}
	}
	t.Fatalf("corpus: no image is called %q", name)
	return Image{}
}

// Listing returns what the kernel shows of the image, in the order of a depth
// first walk in byte order.
func (im Image) Listing(t testing.TB) []Entry {
	t.Helper()
	var entries []Entry
	for i, line := range bytes.Split(bytes.TrimSpace(im.listing), []byte("\n")) {
		e, err := parseEntry(line)
		if err != nil {
			t.Fatalf("corpus: %s.jsonl:%d: %v", im.Name, i+1, err)
		}
		entries = append(entries, e)
	}
	return entries
}

//go:embed corpus.tar.zst
var archive []byte

// window is what the archive was packed with: zstd --long=27.
const window = 1 << 27

var unpacked = sync.OnceValues(func() ([]Image, error) { return unpack(bytes.NewReader(archive)) })

func unpack(r io.Reader) ([]Image, error) {
	z, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(window), zstd.WithDecoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	defer z.Close()
	byName := map[string]*Image{}
	for files := tar.NewReader(z); ; {
		h, err := files.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		data, err := io.ReadAll(files)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", h.Name, err)
		}
		if err := add(byName, path.Base(h.Name), data); err != nil {
			return nil, err
		}
	}
	var images []Image
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		images = append(images, *byName[name])
	}
	return images, nil
}

// add puts one file of the archive where it belongs.
func add(byName map[string]*Image, file string, data []byte) error {
	ext := path.Ext(file)
	name := strings.TrimSuffix(file, ext)
	if ext == "" {
		return nil // the directory
	}
	im := byName[name]
	if im == nil {
		im = &Image{Name: name}
		byName[name] = im
	}
	switch ext {
	case ".erofs":
		im.Data = data
	case ".blob":
		im.Blob = data
	case ".cmd":
		im.Flags = strings.TrimSpace(string(data))
	case ".jsonl":
		im.listing = data
	default:
		return fmt.Errorf("%s: not a file of the corpus", file)
	}
	return nil
}

func parseEntry(line []byte) (Entry, error) {
	line, err := hideRawBytes(line)
	if err != nil {
		return Entry{}, err
	}
	var j struct {
		Path   string
		Mode   string
		UID    uint32
		GID    uint32
		Nlink  uint32
		Ino    uint64
		Mtime  int64 `json:"mtime_ns"`
		Size   int64
		SHA256 string
		Target string
		Rdev   *[2]uint32
		Xattrs map[string]string
	}
	d := json.NewDecoder(bytes.NewReader(line))
	d.DisallowUnknownFields()
	if err := d.Decode(&j); err != nil {
		return Entry{}, err
	}
	mode, err := strconv.ParseUint(j.Mode, 0, 32)
	if err != nil {
		return Entry{}, fmt.Errorf("mode: %w", err)
	}
	e := Entry{
		Path: showRawBytes(j.Path), Mode: uint32(mode), UID: j.UID, GID: j.GID, Nlink: j.Nlink,
		Ino: j.Ino, MtimeNs: j.Mtime, Size: j.Size, SHA256: j.SHA256, Target: showRawBytes(j.Target), Rdev: j.Rdev,
	}
	for name, value := range j.Xattrs {
		b, err := hex.DecodeString(value)
		if err != nil {
			return Entry{}, fmt.Errorf("xattr %q: %w", name, err)
		}
		if e.Xattrs == nil {
			e.Xattrs = map[string][]byte{}
		}
		e.Xattrs[showRawBytes(name)] = b
	}
	return e, nil
}

// Bytes that are not UTF-8 are in the listings as lone surrogates, byte 0xff as
// the escape \udcff. encoding/json turns those into U+FFFD, so they are moved
// to a private range before it reads the line and back to bytes afterwards.
const rawBase = 0xf700

func hideRawBytes(line []byte) ([]byte, error) {
	out := make([]byte, 0, len(line))
	for i := 0; i < len(line); {
		if line[i] != '\\' || i+1 == len(line) {
			out = append(out, line[i])
			i++
			continue
		}
		if line[i+1] != 'u' || i+6 > len(line) {
			out = append(out, line[i:i+2]...)
			i += 2
			continue
		}
		v, err := strconv.ParseUint(string(line[i+2:i+6]), 16, 16)
		if err != nil {
			return nil, err
		}
		switch n := 6; {
		case v >= 0xd800 && v < 0xdc00: // a pair: keep its second half from the next case
			n = min(12, len(line)-i)
			out = append(out, line[i:i+n]...)
			i += n
		case v >= 0xdc80 && v <= 0xdcff:
			out = fmt.Appendf(out, `\u%04x`, rawBase|v&0xff)
			i += n
		case v&^0xff == rawBase:
			return nil, fmt.Errorf("U+%04X is used for raw bytes", v)
		default:
			out = append(out, line[i:i+n]...)
			i += n
		}
	}
	return out, nil
}

func showRawBytes(s string) string {
	if !strings.ContainsFunc(s, isRawByte) {
		return s
	}
	var out []byte
	for _, r := range s {
		if isRawByte(r) {
			out = append(out, byte(r))
		} else {
			out = append(out, string(r)...)
		}
	}
	return string(out)
}

func isRawByte(r rune) bool { return r&^0xff == rawBase }
