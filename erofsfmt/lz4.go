package erofsfmt

import (
	"encoding/binary"
	"errors"
)

var (
	errLz4Short  = errors.New("it ends before its output does")
	errLz4Offset = errors.New("a match before the beginning")
)

// lz4Prefix decodes the first len(dst) bytes of the LZ4 block that src begins
// with, and looks at nothing behind them. The library decodes whole blocks
// only and wants src to end where the block does.
//
// A block is a row of sequences: a token with two lengths of 4 bits, more bytes
// of the first length, that many literals, the distance of a match (2 bytes), more
// bytes of its length. A length of 15 goes on in bytes that are added up to
// and with the first below 255; matches have 4 bytes more than they say. The
// last sequence ends after its literals.
func lz4Prefix(dst, src []byte) error {
	di := 0
	for di < len(dst) {
		if len(src) == 0 {
			return errLz4Short
		}
		token := int(src[0])
		n, rest, ok := lz4Length(token>>4, src[1:])
		if !ok {
			return errLz4Short
		}
		src = rest
		if want := len(dst) - di; n >= want {
			n = want // the output ends here, whatever follows
		}
		if n > len(src) {
			return errLz4Short
		}
		di += copy(dst[di:], src[:n])
		if src = src[n:]; di == len(dst) {
			return nil
		}
		if len(src) < 2 {
			return errLz4Short
		}
		dist := int(binary.LittleEndian.Uint16(src))
		if dist == 0 || dist > di {
			return errLz4Offset
		}
		if n, src, ok = lz4Length(token&15, src[2:]); !ok {
			return errLz4Short
		}
		di = copyMatch(dst, di, dist, n+4)
	}
	return nil
}

// lz4Length completes a length of 4 bits. ok is false if src ends within it.
func lz4Length(n int, src []byte) (length int, rest []byte, ok bool) {
	if n < 15 {
		return n, src, true
	}
	for i, b := range src {
		n += int(b)
		if b != 255 {
			return n, src[i+1:], true
		}
	}
	return 0, nil, false
}

// copyMatch appends n bytes, or as many as fit, from dist before di, and returns
// where they end. The ranges may overlap: then the bytes repeat.
func copyMatch(dst []byte, di, dist, n int) int {
	end := min(di+n, len(dst))
	from := di - dist
	for di < end {
		// What was copied can be copied again, so the step doubles.
		di += copy(dst[di:end], dst[from:di])
	}
	return end
}
