package integrity

import (
	"errors"
	"fmt"
)

// What is wrong with an index or a tree, for errors.Is.
var (
	// ErrCorrupt: it breaks a rule of its format.
	ErrCorrupt = errors.New("corrupt")
	// ErrUnsupported: it uses what is not known here. A layer whose chunk index is
	// unsupported is to be read as if it had none, from front to back.
	ErrUnsupported = errors.New("unsupported")
	// ErrNoChecksum: the chunk index has no checksums, so it verifies nothing.
	ErrNoChecksum = errors.New("integrity: the chunk index has no checksums")
)

// A FormatError says what in a chunk index or a superblock cannot be read, and where.
type FormatError struct {
	In   string // what Off is a byte of: "chunk index", "dm-verity superblock", …
	Off  int64  // the byte where it is
	What string // what is wrong
	Err  error  // ErrCorrupt or ErrUnsupported
}

func (e *FormatError) Error() string {
	return fmt.Sprintf("integrity: %s: %s, at byte %d: %v", e.In, e.What, e.Off, e.Err)
}

func (e *FormatError) Unwrap() error { return e.Err }

// A GapError is an error of a body, and of some of its bytes only: those it does not give.
// The body goes on behind them, for who knows that; who does not stops there, as at any
// error.
type GapError struct {
	Off, Len int64 // of the bytes, counted as the body's are
	Err      error
}

func (e *GapError) Error() string { return e.Err.Error() }

func (e *GapError) Unwrap() error { return e.Err }

// Gap says which bytes do not come.
func (e *GapError) Gap() (off, n int64) { return e.Off, e.Len }

// A MismatchError says that bytes are not those whose digest is known: they were
// changed after it was made, where they lie or on their way. It may help to fetch them
// again, from elsewhere; they must not be used.
type MismatchError struct {
	What      string // "chunk", "data block" or "hash block"
	Index     int64  // of the chunk, or of the block in its level, from 0
	Level     int    // 0: a chunk or data block; n: a hash block n levels above the data
	Off, Len  int64  // where it is: in the blob for a chunk, in the image for a block
	Algorithm Algorithm
	Want, Got []byte // digests
}

func (e *MismatchError) Error() string {
	what := e.What
	if e.Level > 0 {
		what = fmt.Sprintf("level %d %s", e.Level, e.What)
	}
	return fmt.Sprintf("integrity: %s %d (%d bytes at %d) was changed: its %v is %x, want %x",
		what, e.Index, e.Len, e.Off, e.Algorithm, e.Got, e.Want)
}
