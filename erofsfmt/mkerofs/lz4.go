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

const lz4FastBits = 13

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
func (e *lz4Fast) fill(dst, src []byte, from int) (n, c int) {
	oldest := e.base + uint32(from) // entries below are of other sources, or behind from
	src = src[from:]
	o := lz4Output{dst: dst}
	ip := 1
	if len(src) >= 8 {
		e.table[lz4FastHash(le.Uint64(src))] = oldest
	}
	for {
		at, match := e.find(src, ip, o.anchor+o.room(), oldest)
		if at < 0 {
			break
		}
		for at > o.anchor && match > 0 && src[at-1] == src[match-1] {
			at, match = at-1, match-1
		}
		length := lz4MinMatch + matchLength(src[at+lz4MinMatch:len(src)-lz4LastBytes], src[match+lz4MinMatch:])
		if o.sequence(src, at, length, at-match) {
			break
		}
		if ip = o.anchor; ip+8 > len(src) {
			break
		}
		e.table[lz4FastHash(le.Uint64(src[ip-2:]))] = oldest + uint32(ip-2)
	}
	return o.finish(src)
}

// find finds the next match from ip on that begins before end. The longer there is none, the larger are the steps.
func (e *lz4Fast) find(src []byte, ip, end int, oldest uint32) (at, match int) {
	end = min(end, len(src)-lz4LastMatch+1)
	for tries := 1 << 6; ip < end; tries++ {
		v := le.Uint64(src[ip:])
		entry := &e.table[lz4FastHash(v)]
		found := *entry
		*entry = oldest + uint32(ip)
		if found >= oldest {
			match := int(found - oldest)
			// A place that an earlier block looked at and did not encode lies ahead.
			if match < ip && ip-match <= lz4MaxDistance && le.Uint32(src[match:]) == uint32(v) {
				return ip, match
			}
		}
		ip += tries >> 6
	}
	return -1, 0
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
