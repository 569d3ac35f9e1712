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
//	bits of an entry   0-5  how many bits the code has with those that follow it
//	                   6-7  flags
//	                  8-13  length of the code
//	                    14  a flag
//	                 16-30  the literal, or what the bits after the code are added
//	                        to, or where in rest the longer codes are
//	                    31  it is a literal
//
// The counts of bits are where a shift takes them without a mask.
type huffmanTable struct {
	primary  [1 << huffmanBits]uint32
	rest     []uint32
	restMask uint64
}

const (
	huffmanBits = 10
	huffmanMask = 1<<huffmanBits - 1

	huffmanLonger  = 1 << 6
	huffmanNone    = 1 << 7 // no code
	huffmanEnd     = 1 << 14
	huffmanLiteral = 1 << 31

	// A match has none of these, nor has nearly any literal.
	huffmanSeldom = huffmanLonger | huffmanNone | huffmanEnd
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
		e.lit[257+i] = base<<16 | extra
		base += 1 << extra
	}
	e.lit[285] = 258 << 16
	e.lit[286], e.lit[287] = huffmanNone, huffmanNone
	base = 1
	for i := range 30 {
		extra := uint32(max(0, i/2-1))
		e.dist[i] = base<<16 | extra
		base += 1 << extra
	}
	e.dist[30], e.dist[31] = huffmanNone, huffmanNone
	for i := range e.codeLength {
		e.codeLength[i] = uint32(i) << 16
	}
	return e
}

// build makes the table of the canonical code with these lengths. A code is
// complete, or has one symbol of one bit where that is in order, or none.
//
// Codes are entered from the shortest on, into a table that is as large as their
// length needs and doubles from one length to the next: that writes less than to
// enter each code wherever it is a prefix.
func (t *huffmanTable) build(lens []uint8, entries []uint32, single bool) error {
	var count, next [inflateBits + 1]uint16
	for _, l := range lens {
		count[l&inflateBits]++
	}
	count[0] = 0
	longest, left := 0, 1
	for l := 1; l <= inflateBits; l++ {
		left = left<<1 - int(count[l])
		if left < 0 {
			return errInflateBlock
		}
		if count[l] > 0 {
			longest = l
		}
		next[l] = next[l-1] + count[l-1]
	}
	if left > 0 && (longest > 1 || longest == 1 && !single) {
		return errInflateBlock
	}
	var byCode [inflateLits]uint16
	for symbol, l := range lens {
		if l > 0 {
			byCode[next[l&inflateBits]] = uint16(symbol)
			next[l&inflateBits]++
		}
	}
	t.enter(byCode[:], count[:], entries, longest)
	return nil
}

// enter makes the table of symbols in the order of their codes, count[l] of which
// have codes of l bits.
func (t *huffmanTable) enter(symbols, count []uint16, entries []uint32, longest int) {
	t.primary[0] = huffmanNone
	code := uint32(0)
	for l := 1; l <= huffmanBits; l++ {
		half := 1 << (l - 1)
		copy(t.primary[half:], t.primary[:half])
		for _, symbol := range symbols[:count[l]] {
			t.primary[code&huffmanMask] = entries[symbol] + uint32(l<<8|l)
			code = nextCode(code, l)
		}
		symbols = symbols[count[l]:]
	}
	t.rest = t.rest[:0]
	t.restMask = 1<<max(0, longest-huffmanBits) - 1
	for l := huffmanBits + 1; l <= longest; l++ {
		for _, symbol := range symbols[:count[l]] {
			t.enterLonger(code, l, entries[symbol]+uint32(l<<8|l))
			code = nextCode(code, l)
		}
		symbols = symbols[count[l]:]
	}
}

// nextCode is the code of l bits after this one. Their first bit is the lowest,
// so one is added from the other end; after the last code comes 0.
func nextCode(code uint32, l int) uint32 {
	zeros := ^code & (1<<(l&31) - 1)
	if zeros == 0 {
		return 0
	}
	highest := uint32(1) << ((bits.Len32(zeros) - 1) & 31)
	return code&(highest-1) | highest
}

// enterLonger enters a code of more than huffmanBits bits.
func (t *huffmanTable) enterLonger(code uint32, l int, entry uint32) {
	first := &t.primary[code&huffmanMask]
	if *first == huffmanNone {
		*first = uint32(len(t.rest))<<16 | huffmanLonger
		for range t.restMask + 1 {
			t.rest = append(t.rest, huffmanNone)
		}
	}
	rest := t.rest[*first>>16:][:t.restMask+1]
	for i := code >> huffmanBits; uint64(i) <= t.restMask; i += 1 << (l - huffmanBits) {
		rest[i] = entry
	}
}

// find returns the entry of the code that buf begins with.
func (t *huffmanTable) find(buf uint64) uint32 {
	e := t.primary[buf&huffmanMask]
	if e&huffmanLonger != 0 {
		e = t.longer(e, buf)
	}
	return e
}

// longer returns the entry that e leads to.
func (t *huffmanTable) longer(e uint32, buf uint64) uint32 {
	return t.rest[uint64(e>>16)+buf>>huffmanBits&t.restMask]
}

// huffmanValue is the length or distance of the code with entry e and of the bits
// after it, which buf begins with.
func huffmanValue(e uint32, buf uint64) int {
	return int(e>>16) + int(buf&(1<<(e&63)-1)>>(e>>8&63))
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
		if e&huffmanNone != 0 {
			return errInflateCode
		}
		s.drop(uint(e & 63))
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
		n := huffmanValue(e, s.buf)
		s.drop(uint(e & 63))
		switch {
		case s.short():
			return di, errInflateShort
		case e&huffmanEnd != 0:
			return di, nil
		case di == len(dst) && prefix:
			return di, nil
		case e&huffmanNone != 0:
			return di, errInflateCode
		case di == len(dst):
			return di, errLength
		case e&huffmanLiteral != 0:
			dst[di] = byte(n)
			di++
			continue
		}
		d := s.dist.find(s.buf)
		dist := huffmanValue(d, s.buf)
		s.drop(uint(d & 63))
		switch {
		case s.short():
			return di, errInflateShort
		case d&huffmanNone != 0:
			return di, errInflateCode
		case dist > di:
			return di, errInflateMatch
		case n > len(dst)-di && !prefix:
			return di, errLength
		}
		di = copyMatch(dst, di, dist, n)
	}
	return di, err
}

// What quickly needs to be left of input and output: input for two refills, the
// second at most 7 bytes after the first; output for two literals and the longest
// match, which is written in whole words of 16 bytes.
const (
	inflateInRoom  = 7 + 8
	inflateOutRoom = 2 + (258+15)&^15
)

// inflateStep is how far a word of bytes that repeat at a distance reaches in whole
// repetitions. No distance is 0.
var inflateStep = [8]uint8{8, 8, 8, 6, 8, 5, 6, 7}

// quickly decodes as much of a block as it can without a look at the ends. It
// has inflater's fields in registers, and is long because a call for each symbol
// would take as much time as the symbol. Of n only the lowest 6 bits count, so
// that a whole entry can be subtracted.
func (s *inflater) quickly(dst []byte, di int) (_ int, ended bool, err error) {
	if len(s.in) < inflateInRoom || len(dst) < inflateOutRoom {
		return di, false, nil
	}
	// A slice has a register less where it ends with its memory.
	in, dst := s.in[:len(s.in):len(s.in)], dst[:len(dst):len(dst)]
	pos, buf, n := s.pos, s.buf, s.n
	lit, dist := &s.lit, &s.dist
	inEnd, outEnd := uint(len(in)-inflateInRoom), uint(len(dst)-inflateOutRoom)
	for uint(pos) <= inEnd && uint(di) <= outEnd {
		buf |= load64(in, pos) << (n & 63)
		pos += int(^n >> 3 & 7)
		n |= 56
		e := lit.primary[buf&huffmanMask]
		if e >= huffmanLiteral {
			// A short literal leaves enough for another one, and so on.
			buf >>= e & 63
			n -= uint(e)
			dst[di] = byte(e >> 16)
			di++
			e = lit.primary[buf&huffmanMask]
			if e >= huffmanLiteral {
				buf >>= e & 63
				n -= uint(e)
				dst[di] = byte(e >> 16)
				di++
				e = lit.primary[buf&huffmanMask]
				if e >= huffmanLiteral {
					buf >>= e & 63
					n -= uint(e)
					dst[di] = byte(e >> 16)
					di++
					continue
				}
			}
			// Perhaps too few are left for the longest match, which has 48 bits.
			buf |= load64(in, pos) << (n & 63)
			pos += int(^n >> 3 & 7)
			n |= 56
		}
		if e&huffmanSeldom != 0 {
			if e&huffmanLonger != 0 {
				e = lit.longer(e, buf)
			}
			if e >= huffmanLiteral || e&huffmanSeldom != 0 {
				ended = e&huffmanEnd != 0
				if e&huffmanNone != 0 {
					err = errInflateCode
					break
				}
				buf >>= e & 63
				n -= uint(e)
				if ended {
					break
				}
				dst[di] = byte(e >> 16)
				di++
				continue
			}
		}
		length := huffmanValue(e, buf)
		buf >>= e & 63
		n -= uint(e)
		d := dist.primary[buf&huffmanMask]
		if d&huffmanSeldom != 0 {
			if d&huffmanLonger != 0 {
				d = dist.longer(d, buf)
			}
			if d&huffmanNone != 0 {
				err = errInflateCode
				break
			}
		}
		back := huffmanValue(d, buf)
		buf >>= d & 63
		n -= uint(d)
		if back > di {
			err = errInflateMatch
			break
		}
		// Most matches are short, and two words are quicker than a loop.
		from := di - back
		if back >= 8 {
			store64(dst, di, load64(dst, from))
			store64(dst, di+8, load64(dst, from+8))
			for i := 16; i < length; i += 16 {
				store64(dst, di+i, load64(dst, from+i))
				store64(dst, di+i+8, load64(dst, from+i+8))
			}
		} else {
			// The distance divides step, so the same word goes there again.
			step := int(inflateStep[back&7])
			word := load64(dst, from) & (1<<(8*uint(back)) - 1)
			word |= word << (8 * uint(back))
			word |= word << (16 * uint(back))
			word |= word << (32 * uint(back))
			for i := 0; i < length; i += step {
				store64(dst, di+i, word)
			}
		}
		di += length
	}
	// Whole bytes that were only peeked at are above n: they are read again.
	s.pos, s.n = pos, n&63
	s.buf = buf & (1<<s.n - 1)
	return di, ended, err
}

// load64 and store64 name the end twice: without it a slice that is empty, and
// has nothing to point to, would have to be provided for.

func load64(b []byte, i int) uint64 { return binary.LittleEndian.Uint64(b[i : i+8 : i+8]) }

func store64(b []byte, i int, v uint64) { binary.LittleEndian.PutUint64(b[i:i+8:i+8], v) }
