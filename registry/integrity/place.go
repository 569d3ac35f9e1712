package integrity

import (
	"encoding/binary"
	"fmt"
	"math"
	"strconv"
	"strings"
)

// A Range is where in a blob a chunk index lies, as the layer's descriptor says.
type Range struct {
	Off int64
	End int64 // exclusive; -1: the end of the blob
}

// ParseRange reads the form "OFFSET" or "OFFSET:END" of erofs-image-spec, section 2.3:
// decimal digits and nothing else.
func ParseRange(s string) (Range, error) {
	first, last, bounded := strings.Cut(s, ":")
	off, err := parseDigits(first)
	if err != nil {
		return Range{}, fmt.Errorf("integrity: range %q: %w", s, err)
	}
	r := Range{Off: off, End: -1}
	if !bounded {
		return r, nil
	}
	if r.End, err = parseDigits(last); err != nil {
		return Range{}, fmt.Errorf("integrity: range %q: %w", s, err)
	}
	if r.End <= r.Off {
		return Range{}, fmt.Errorf("integrity: range %q is empty: %w", s, ErrCorrupt)
	}
	return r, nil
}

// parseDigits is stricter than strconv, which takes a sign.
func parseDigits(s string) (int64, error) {
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return 0, fmt.Errorf("%q is not a number: want OFFSET or OFFSET:END: %w", s, ErrCorrupt)
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s is too large: %w", s, ErrCorrupt)
	}
	return n, nil
}

// String is the form that ParseRange reads.
func (r Range) String() string {
	if r.End < 0 {
		return strconv.FormatInt(r.Off, 10)
	}
	return fmt.Sprintf("%d:%d", r.Off, r.End)
}

// In is the range in a blob of size bytes. One that does not lie in it, or has more than
// max bytes, is an error; so nothing has to be allocated on its word.
func (r Range) In(size, max int64) (off, n int64, err error) {
	end := r.End
	if end < 0 {
		end = size
	}
	if r.Off < 0 || end <= r.Off || end > size {
		return 0, 0, fmt.Errorf("integrity: the chunk index is at %v of a blob of %d bytes: %w", r, size, ErrCorrupt)
	}
	if end-r.Off > max {
		return 0, 0, fmt.Errorf("integrity: the chunk index at %v has %d bytes, more than the limit of %d: %w", r, end-r.Off, max, ErrCorrupt)
	}
	return r.Off, end - r.Off, nil
}

const (
	// FrameHeaderSize is that of the header of a zstd skippable frame, in bytes.
	FrameHeaderSize = 8

	frameMagic     = 0x184D2A50 // and the 15 after it: RFC 8878, section 3.1.2
	frameMagicMask = 0xFFFFFFF0
)

// WrapFrame is payload in a zstd skippable frame, which decoders pass over: so the index
// of a compressed image is stored.
func WrapFrame(payload []byte) ([]byte, error) {
	if uint64(len(payload)) > math.MaxUint32 {
		return nil, fmt.Errorf("integrity: %d bytes are too many for a skippable frame", len(payload))
	}
	b := make([]byte, 0, FrameHeaderSize+len(payload))
	b = binary.LittleEndian.AppendUint32(b, frameMagic)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(payload)))
	return append(b, payload...), nil
}

// UnwrapFrame is what is in the skippable frame that b is all of.
func UnwrapFrame(b []byte) ([]byte, error) {
	if len(b) < FrameHeaderSize {
		return nil, corruptFrame(int64(len(b)), "it ends within its header")
	}
	if magic := binary.LittleEndian.Uint32(b); magic&frameMagicMask != frameMagic {
		return nil, corruptFrame(0, "the magic number is %#x", magic)
	}
	payload := b[FrameHeaderSize:]
	if n := binary.LittleEndian.Uint32(b[4:]); uint64(n) != uint64(len(payload)) {
		return nil, corruptFrame(4, "it says that %d bytes follow, and %d do", n, len(payload))
	}
	return payload, nil
}

func corruptFrame(off int64, format string, args ...any) error {
	return &FormatError{In: "skippable frame", Off: off, What: fmt.Sprintf(format, args...), Err: ErrCorrupt}
}
