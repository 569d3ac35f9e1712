package mkerofs

import (
	"encoding/binary"
	"math/bits"
)

var le = binary.LittleEndian

// LZ4 blocks (https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md): a row of sequences, each a token, literals
// and a match; the last one ends after its literals.
//
//	token: lengths of literals and of the match, 4 bits each; 15 goes on in bytes behind
//	| token | length … | literals | distance u16 | length … |
const (
	lz4MinMatch    = 4
	lz4MaxDistance = 1<<16 - 1
	lz4LastMatch   = 12 // a match begins at least so many bytes before the end of the block
	lz4LastBytes   = 5  // and the last bytes are literals

	// lz4Reserve is what a sequence must leave of the output: a token and literals enough to keep both rules.
	lz4Reserve = 1 + lz4LastMatch - lz4MinMatch
)

// An lz4Output is a block to be, in a buffer that it must not outgrow.
type lz4Output struct {
	dst    []byte
	op     int
	anchor int // the first byte of the input that is not encoded
}

// lz4More is how many bytes a length takes behind the token.
func lz4More(n int) int {
	if n < 15 {
		return 0
	}
	return (n-15)/255 + 1
}

// room says how many literals may still come before a match: more of them would not fit, whatever follows.
func (o *lz4Output) room() int { return len(o.dst) - o.op }

// sequence appends the literals of src up to at and a match of n bytes. If the match has to be cut to fit, or nothing
// fits, the block is full.
func (o *lz4Output) sequence(src []byte, at, n, distance int) (full bool) {
	literals := at - o.anchor
	spare := len(o.dst) - o.op - lz4Reserve - (1 + lz4More(literals) + literals + 2)
	if spare < 0 {
		return true
	}
	n -= lz4MinMatch
	if lz4More(n) > spare {
		n, full = 14+255*spare, true // the most that spare bytes can say
	}
	o.literals(src[o.anchor:at], min(n, 15))
	le.PutUint16(o.dst[o.op:], uint16(distance))
	o.op += 2
	o.length(n)
	o.anchor = at + n + lz4MinMatch
	return full
}

// literals appends a token with the lengths, and the literals.
func (o *lz4Output) literals(lit []byte, match int) {
	o.dst[o.op] = byte(min(len(lit), 15)<<4 | match)
	o.op++
	o.length(len(lit))
	o.op += copy(o.dst[o.op:], lit)
}

// length appends what of a length is not in the token.
func (o *lz4Output) length(n int) {
	if n < 15 {
		return
	}
	for n -= 15; n >= 255; n -= 255 {
		o.dst[o.op] = 255
		o.op++
	}
	o.dst[o.op] = byte(n)
	o.op++
}

// finish ends the block with as many literals of src as fit. It says how much of src is encoded, and in how many bytes.
func (o *lz4Output) finish(src []byte) (n, c int) {
	room := len(o.dst) - o.op - 1
	if room < 0 {
		return 0, 0
	}
	fits := room
	if room >= 15 {
		fits = room - 1 - (room-15)/256
	}
	literals := min(len(src)-o.anchor, fits)
	o.literals(src[o.anchor:o.anchor+literals], 0)
	return o.anchor + literals, o.op
}

const (
	lz4FastBits = 13
	// lz4Short is the room that a sequence takes whose lengths are both in its token, with all 16 bytes of a copy that
	// literals may come from.
	lz4Short = 1 + 16 + 2
)

// lz4Fast finds matches in a table of the last place of each hash, as LZ4's fast levels do.
type lz4Fast struct {
	base  uint32 // of the current source, so that a new one makes all entries too old
	table [1 << lz4FastBits]uint32
}

func (e *lz4Fast) begin(src []byte) {
	// Places are 32 bits: begin anew before they overflow.
	if int64(e.base)+2*int64(maxSegment) > 1<<31 || e.base == 0 {
		clear(e.table[:])
		e.base = 0
	}
	e.base += maxSegment
}

func lz4FastHash(v uint64) uint32 { return uint32((v << 24) * 889523592379 >> (64 - lz4FastBits)) }

// fill encodes src[from:] until it or dst ends. Matches do not reach behind from.
//
// All that is done for most sequences, which are a few bytes long, is here and in variables of its own: what goes on in
// functions or behind a pointer takes a fifth more time.
func (e *lz4Fast) fill(dst, src []byte, from int) (n, c int) {
	oldest := e.base + uint32(from) // entries below are of other sources, or behind from
	src = src[from:]
	last, body := len(src)-lz4LastMatch, len(src)-lz4LastBytes
	if last > 0 {
		e.table[lz4FastHash(le.Uint64(src))] = oldest
	}
	o := lz4Output{dst: dst}
	anchor, op := 0, 0 // those of o
	for ip := 1; ; {
		end := min(anchor+len(dst)-op-1, last)
		distance := 0
		// The longer there is no match, the larger are the steps.
		for tries := 1 << 6; ip <= end; tries++ {
			v := le.Uint64(src[ip : ip+8])
			hash := lz4FastHash(v)
			place := oldest + uint32(ip)
			back := place - e.table[hash]
			e.table[hash] = place
			// A place that an earlier block looked at and did not encode lies ahead: back is 0 or very large then.
			if back-1 < uint32(min(ip, lz4MaxDistance)) && le.Uint32(src[ip-int(back):]) == uint32(v) {
				distance = int(back)
				break
			}
			ip += tries >> 6
		}
		if distance == 0 {
			break
		}
		next := matchEnd(src[:body], ip+lz4MinMatch, distance)
		for ip > anchor && ip > distance && src[ip-1] == src[ip-1-distance] {
			ip--
		}
		literals, length := ip-anchor, next-ip
		if literals < 15 && length < 15+lz4MinMatch && op+lz4Short+lz4Reserve <= len(dst) && anchor+16 <= len(src) {
			p := dst[op : op+lz4Short]
			p[0] = byte(literals<<4 | (length - lz4MinMatch))
			*(*[16]byte)(p[1:]) = *(*[16]byte)(src[anchor:]) // what is too much will be overwritten, or lies behind the end
			le.PutUint16(p[1+literals:], uint16(distance))
			op, anchor = op+3+literals, next
		} else {
			o.anchor, o.op = anchor, op
			if o.sequence(src, ip, length, distance) {
				return o.finish(src)
			}
			anchor, op = o.anchor, o.op
		}
		if ip = anchor; ip+8 > len(src) {
			break
		}
		e.table[lz4FastHash(le.Uint64(src[ip-2:]))] = oldest + uint32(ip-2)
	}
	o.anchor, o.op = anchor, op
	return o.finish(src)
}

// matchEnd is where the bytes from at on cease to be those of a distance before.
func matchEnd(src []byte, at, distance int) int {
	for ; at+8 <= len(src); at += 8 {
		if diff := le.Uint64(src[at:at+8]) ^ le.Uint64(src[at-distance:at-distance+8]); diff != 0 {
			return at + bits.TrailingZeros64(diff)/8
		}
	}
	for at < len(src) && src[at] == src[at-distance] {
		at++
	}
	return at
}

// matchLength is how many bytes a and b have in common from their beginning. b is as long as a, or longer.
func matchLength(a, b []byte) int {
	n := 0
	for len(a)-n >= 8 && len(b)-n >= 8 {
		if diff := le.Uint64(a[n:]) ^ le.Uint64(b[n:]); diff != 0 {
			return n + bits.TrailingZeros64(diff)/8
		}
		n += 8
	}
	for n < len(a) && a[n] == b[n] {
		n++
	}
	return n
}
