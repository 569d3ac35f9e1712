package erofsfmt

import (
	"errors"
	"fmt"
)

// What is wrong with an image, for errors.Is. An error of the source itself is
// none of these: it is returned wrapped, and the same call may succeed later.
var (
	// ErrNotErofs: there is no EROFS superblock.
	ErrNotErofs = errors.New("not an EROFS image")
	// ErrCorrupt: the image breaks a rule of its format (EUCLEAN).
	ErrCorrupt = errors.New("corrupt image")
	// ErrUnsupported: the image uses what this reader does not know (EOPNOTSUPP).
	ErrUnsupported = errors.New("unsupported")
	// ErrNoXattr: the inode has no extended attribute of that name (ENODATA).
	ErrNoXattr = errors.New("no such extended attribute")
)

// A FormatError says what in an image cannot be read, and where.
//
// Err is one of the sentinels of this package, or io.ErrUnexpectedEOF where the
// image ends before what it refers to: a truncated blob is not told apart from
// a wrong address, and neither is ever read as zeros.
type FormatError struct {
	Off  int64  // the byte where it is; -1 if that is not known
	In   string // what Off is a byte of, if it is not the image: "metabox", "packed inode", "device 1"
	What string // what is wrong
	Err  error
}

func (e *FormatError) Error() string {
	where := ""
	if e.Off >= 0 {
		where = fmt.Sprintf(", at byte %d", e.Off)
		if e.In != "" {
			where += " of the " + e.In
		}
	}
	return fmt.Sprintf("erofs: %s%s: %v", e.What, where, e.Err)
}

func (e *FormatError) Unwrap() error { return e.Err }

// nowhere is the place of an error that has none.
var nowhere = place{0, -1}

func (p place) corrupt(format string, args ...any) error {
	return p.error(ErrCorrupt, format, args...)
}

func (p place) unsupported(format string, args ...any) error {
	return p.error(ErrUnsupported, format, args...)
}

func (p place) error(err error, format string, args ...any) error {
	return &FormatError{Off: p.off, In: p.in(), What: fmt.Sprintf(format, args...), Err: err}
}

func (p place) in() string {
	switch {
	case p.src == inPacked:
		return "packed inode"
	case p.src == inMetabox:
		return "metabox"
	case p.src > 0:
		return fmt.Sprintf("device %d", p.src)
	}
	return ""
}
