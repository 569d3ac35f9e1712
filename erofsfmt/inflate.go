package erofsfmt

import (
	"encoding/binary"
	"errors"
	"math/bits"
)

var (
	errInflateShort = errors.New("it ends before its output does")
	errInflateCode  = errors.New("a bad deflate code")
	errInflateBlock = errors.New("a bad deflate block")
	errInflateMatch = errors.New("a deflate match before the beginning")
)

// An inflater decodes raw DEFLATE (RFC 1951) from one slice to another. The
// library, which reads from a stream and keeps a window, takes twice as long.
//
// A stream is a row of blocks; each is stored, or coded with the fixed Huffman
// codes, or with codes that it begins with. Bits are taken from the low end of
// each byte; buf has n of them, and whatever is above those is not looked at
// or is what will be read next.
type inflater struct {
	in  []byte
	pos int // in in
	buf uint64
	n   uint
	// over counts the zero bytes that were added after the end.
	over int

	fixed      bool // lit and dist are the fixed codes
	lens       [inflateLits + inflateDists]uint8
	lit, dist  huffmanTable
	codeLength huffmanTable
}

const (
	inflateLits  = 288 // with two that are never used
	inflateDists = 32  // the same
	inflateBits  = 15  // of the longest code
)

// A huffmanTable finds the entry of a code by the next huffmanBits of input, or,
// for longer codes, by an entry that leads to the rest.
//
//	bits of an entry   0-4  length of the code
//	                   5-7  flags
//	                  8-12  how many bits follow the code
//	                  16-   the literal, or what the bits are added to, or where
//	                        in rest the longer codes are
//
// Neither lengths nor distances are added to 0, so an entry without a value
// and without a flag is no code.
type huffmanTable struct {
	primary  [1 << huffmanBits]uint32
	rest     []uint32
	restMask uint64
}

const (
	huffmanBits    = 10
	huffmanLiteral = 1 << 5
	huffmanLonger  = 1 << 6
	huffmanEnd     = 1 << 7
)

// inflateEntries are what symbols stand for, without the length of their code.
type inflateEntries struct {
	lit        [inflateLits]uint32
	dist       [inflateDists]uint32
	codeLength [len(codeLengthOrder)]uint32
}

var entriesOfInflate = makeInflateEntries()

// codeLengthOrder is the order in which a block has the lengths of the codes for
// lengths.
var codeLengthOrder = [...]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

func makeInflateEntries() *inflateEntries {
	e := &inflateEntries{}
	for i := range 256 {
		e.lit[i] = uint32(i)<<16 | huffmanLiteral
	}
	e.lit[256] = huffmanEnd
	base := uint32(3)
	for i := range 28 {
		extra := uint32(max(0, i/4-1))
		e.lit[257+i] = base<<16 | extra<<8
		base += 1 << extra
	}
	e.lit[285] = 258 << 16
	base = 1
	for i := range 30 {
		extra := uint32(max(0, i/2-1))
		e.dist[i] = base<<16 | extra<<8
		base += 1 << extra
	}
	for i := range e.codeLength {
		e.codeLength[i] = uint32(i)<<16 | huffmanLiteral
	}
	return e
}

// build makes the table of the canonical code with these lengths. A code is
// complete, or has one symbol of one bit where that is in order, or none.
func (t *huffmanTable) build(lens []uint8, entries []uint32, single bool) error {
	var count, next [inflateBits + 1]uint32
	for _, l := range lens {
		count[l]++
	}
	count[0] = 0
	longest, code, left := 0, uint32(0), 1
	for l := 1; l <= inflateBits; l++ {
		left = left<<1 - int(count[l])
		if left < 0 {
			return errInflateBlock
		}
		code = (code + count[l-1]) << 1
		next[l] = code
		if count[l] > 0 {
			longest = l
		}
	}
	if left > 0 && (longest > 1 || longest == 1 && !single) {
		return errInflateBlock
	}
	if left > 0 {
		clear(t.primary[:])
	}
	t.rest = t.rest[:0]
	t.restMask = 1<<max(0, longest-huffmanBits) - 1
	if longest > huffmanBits {
		clear(t.primary[:]) // an entry that leads to the rest is made once
	}
	for symbol, l := range lens {
		if l == 0 {
			continue
		}
		reversed := bits.Reverse32(next[l]) >> (32 - l)
		next[l]++
		t.set(reversed, uint(l), entries[symbol]|uint32(l))
	}
	return nil
}

// set enters a code, its first bit lowest, wherever it is a prefix.
func (t *huffmanTable) set(code uint32, l uint, entry uint32) {
	if l <= huffmanBits {
		for i := code; i < 1<<huffmanBits; i += 1 << l {
			t.primary[i] = entry
		}
		return
	}
	first := &t.primary[code&(1<<huffmanBits-1)]
	if *first == 0 {
		*first = uint32(len(t.rest))<<16 | huffmanLonger
		for range t.restMask + 1 {
			t.rest = append(t.rest, 0)
		}
	}
	rest := t.rest[*first>>16:][:t.restMask+1]
	for i := code >> huffmanBits; uint64(i) <= t.restMask; i += 1 << (l - huffmanBits) {
		rest[i] = entry
	}
}

// find returns the entry of the code that buf begins with.
func (t *huffmanTable) find(buf uint64) uint32 {
	e := t.primary[buf&(1<<huffmanBits-1)]
	if e&huffmanLonger != 0 {
		e = t.rest[uint64(e>>16)+buf>>huffmanBits&t.restMask]
	}
	return e
}

// refill has at least 56 bits in buf; after the end of the input they are 0.
func (s *inflater) refill() {
	if s.pos+8 <= len(s.in) {
		s.buf |= binary.LittleEndian.Uint64(s.in[s.pos:]) << s.n
		s.pos += int(63-s.n) / 8
		s.n |= 56
		return
	}
	for ; s.n < 56; s.n += 8 {
		if s.pos == len(s.in) {
			s.over++
			continue
		}
		s.buf |= uint64(s.in[s.pos]) << s.n
		s.pos++
	}
}

func (s *inflater) drop(n uint) {
	s.buf >>= n
	s.n -= n
}

// take returns the next n bits, at most 32, which refill has provided.
func (s *inflater) take(n uint) uint32 {
	v := uint32(s.buf & (1<<n - 1))
	s.drop(n)
	return v
}

// short says whether bits were taken that were not there.
func (s *inflater) short() bool { return uint(s.over)*8 > s.n }

// inflate fills dst from in; unless prefix is set, in decodes to nothing more.
func (s *inflater) inflate(dst, in []byte, prefix bool) error {
	s.in, s.pos, s.buf, s.n, s.over = in, 0, 0, 0, 0
	defer func() { s.in = nil }()
	di := 0
	for last := false; !last; {
		s.refill()
		last = s.take(1) == 1
		kind := s.take(2)
		if s.short() {
			return errInflateShort
		}
		var err error
		switch kind {
		case 0:
			di, err = s.storedBlock(dst, di, prefix)
		case 1:
			if err = s.fixedCodes(); err == nil {
				di, err = s.codedBlock(dst, di, prefix)
			}
		case 2:
			if err = s.readCodes(); err == nil {
				di, err = s.codedBlock(dst, di, prefix)
			}
		default:
			err = errInflateBlock
		}
		if err != nil {
			return err
		}
		if prefix && di == len(dst) {
			return nil
		}
	}
	if di < len(dst) {
		return errInflateShort
	}
	return nil
}

// storedBlock copies a block that begins at the next byte with its length, twice.
func (s *inflater) storedBlock(dst []byte, di int, prefix bool) (int, error) {
	s.drop(s.n % 8)
	s.refill()
	n := s.take(16)
	if inverted := s.take(16); s.short() {
		return di, errInflateShort
	} else if n != ^inverted&0xffff {
		return di, errInflateBlock
	}
	// What is in buf goes back, but for the zeros. refill may have left bits
	// above n.
	s.pos -= int(s.n)/8 - s.over
	s.buf, s.n, s.over = 0, 0, 0
	want := int(n)
	if want > len(dst)-di {
		if !prefix {
			return di, errLength
		}
		want = len(dst) - di
	}
	if want > len(s.in)-s.pos {
		return di, errInflateShort
	}
	copy(dst[di:], s.in[s.pos:s.pos+want])
	s.pos += want
	return di + want, nil
}

func (s *inflater) fixedCodes() error {
	if s.fixed {
		return nil
	}
	for i := range s.lens {
		switch {
		case i < 144:
			s.lens[i] = 8
		case i < 256:
			s.lens[i] = 9
		case i < 280:
			s.lens[i] = 7
		case i < inflateLits:
			s.lens[i] = 8
		default:
			s.lens[i] = 5
		}
	}
	s.fixed = true
	return s.buildCodes(s.lens[:inflateLits], s.lens[inflateLits:])
}

func (s *inflater) buildCodes(lit, dist []uint8) error {
	if err := s.lit.build(lit, entriesOfInflate.lit[:], true); err != nil {
		return err
	}
	return s.dist.build(dist, entriesOfInflate.dist[:], true)
}

// readCodes reads the lengths of the codes of a block, which are coded too.
func (s *inflater) readCodes() error {
	s.fixed = false
	s.refill()
	lits, dists, lengths := int(s.take(5))+257, int(s.take(5))+1, int(s.take(4))+4
	if lits > 286 || dists > 30 {
		return errInflateBlock
	}
	var lens [len(codeLengthOrder)]uint8
	for _, i := range codeLengthOrder[:lengths] {
		s.refill()
		lens[i] = uint8(s.take(3))
	}
	if err := s.codeLength.build(lens[:], entriesOfInflate.codeLength[:], false); err != nil {
		return err
	}
	for i := 0; i < lits+dists; {
		s.refill()
		e := s.codeLength.find(s.buf)
		if e == 0 {
			return errInflateCode
		}
		s.drop(uint(e & 31))
		length, n := uint8(e>>16), 1
		switch length {
		case 16:
			if i == 0 {
				return errInflateBlock
			}
			length, n = s.lens[i-1], int(s.take(2))+3
		case 17:
			length, n = 0, int(s.take(3))+3
		case 18:
			length, n = 0, int(s.take(7))+11
		}
		if s.short() {
			return errInflateShort
		}
		if n > lits+dists-i {
			return errInflateBlock
		}
		for ; n > 0; n-- {
			s.lens[i] = length
			i++
		}
	}
	if s.lens[256] == 0 {
		return errInflateBlock
	}
	return s.buildCodes(s.lens[:lits], s.lens[lits:lits+dists])
}

// codedBlock decodes a block: quickly, where neither input nor output can end in
// the middle of it, then with care.
func (s *inflater) codedBlock(dst []byte, di int, prefix bool) (int, error) {
	di, ended, err := s.quickly(dst, di)
	for err == nil && !ended {
		s.refill()
		e := s.lit.find(s.buf)
		s.drop(uint(e & 31))
		switch {
		case s.short():
			return di, errInflateShort
		case e&huffmanEnd != 0:
			return di, nil
		case di == len(dst) && prefix:
			return di, nil
		case di == len(dst) && e != 0:
			return di, errLength
		case e&huffmanLiteral != 0:
			dst[di] = byte(e >> 16)
			di++
			continue
		}
		var n, dist int
		if n, dist, err = s.match(e); err == nil {
			if dist > di {
				return di, errInflateMatch
			}
			if n > len(dst)-di && !prefix {
				return di, errLength
			}
			di = copyMatch(dst, di, dist, n)
		}
	}
	return di, err
}

// match reads what follows the code of a length.
func (s *inflater) match(e uint32) (n, dist int, err error) {
	n = int(e>>16) + int(s.take(uint(e>>8&31)))
	d := s.dist.find(s.buf)
	s.drop(uint(d & 31))
	dist = int(d>>16) + int(s.take(uint(d>>8&31)))
	switch {
	case s.short():
		err = errInflateShort
	case e>>16 == 0 || d>>16 == 0:
		err = errInflateCode
	}
	return n, dist, err
}

// What quickly needs to be left of input and output: input for one refill;
// output for two literals and the longest match.
const (
	inflateInRoom  = 8
	inflateOutRoom = 2 + 258
)

// quickly decodes as much of a block as it can without a look at the ends. It
// has inflater's fields in registers, and is long because a call for each symbol
// would take as much time as the symbol.
func (s *inflater) quickly(dst []byte, di int) (_ int, ended bool, err error) {
	in, pos, buf, n := s.in, s.pos, s.buf, s.n
	lit, dist := &s.lit, &s.dist
	for pos+inflateInRoom <= len(in) && di+inflateOutRoom <= len(dst) {
		buf |= binary.LittleEndian.Uint64(in[pos:]) << (n & 63)
		pos += int(63-n) / 8
		n |= 56
		e := lit.primary[buf&(1<<huffmanBits-1)]
		if e&huffmanLiteral != 0 {
			// A short literal leaves enough for another one, and so on.
			buf >>= e & 31
			n -= uint(e & 31)
			dst[di] = byte(e >> 16)
			di++
			e = lit.primary[buf&(1<<huffmanBits-1)]
			if e&huffmanLiteral != 0 {
				buf >>= e & 31
				n -= uint(e & 31)
				dst[di] = byte(e >> 16)
				di++
				e = lit.primary[buf&(1<<huffmanBits-1)]
			}
			if n < 48 {
				// Too few for the longest match, which has 48 bits.
				if e&huffmanLiteral != 0 || pos+inflateInRoom > len(in) {
					continue
				}
				buf |= binary.LittleEndian.Uint64(in[pos:]) << (n & 63)
				pos += int(63-n) / 8
				n |= 56
			}
		}
		if e&huffmanLonger != 0 {
			e = lit.rest[uint64(e>>16)+buf>>huffmanBits&lit.restMask]
		}
		buf >>= e & 31
		n -= uint(e & 31)
		if e&huffmanLiteral != 0 {
			dst[di] = byte(e >> 16)
			di++
			continue
		}
		if e>>16 == 0 {
			ended = e&huffmanEnd != 0
			if !ended {
				err = errInflateCode
			}
			break
		}
		extra := e >> 8 & 31
		length := int(e>>16) + int(buf&(1<<extra-1))
		buf >>= extra
		n -= uint(extra)
		d := dist.primary[buf&(1<<huffmanBits-1)]
		if d&huffmanLonger != 0 {
			d = dist.rest[uint64(d>>16)+buf>>huffmanBits&dist.restMask]
		}
		buf >>= d & 31
		n -= uint(d & 31)
		extra = d >> 8 & 31
		back := int(d>>16) + int(buf&(1<<extra-1))
		buf >>= extra
		n -= uint(extra)
		if d>>16 == 0 {
			err = errInflateCode
			break
		}
		if back > di {
			err = errInflateMatch
			break
		}
		if back >= 8 && length <= 16 {
			// Most matches are short, and two words are quicker than a call.
			to, from := dst[di:di+16], dst[di-back:]
			binary.LittleEndian.PutUint64(to, binary.LittleEndian.Uint64(from))
			binary.LittleEndian.PutUint64(to[8:], binary.LittleEndian.Uint64(from[8:]))
			di += length
			continue
		}
		di = copyMatch(dst, di, back, length)
	}
	// Whole bytes that were only peeked at are above n: they are read again.
	s.pos, s.n = pos, n
	s.buf = buf & (1<<n - 1)
	return di, ended, err
}
