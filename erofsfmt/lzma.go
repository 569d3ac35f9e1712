package erofsfmt

import (
	"encoding/binary"
	"errors"
	"sync"
)

// MicroLZMA is an LZMA1 stream without a header: its first byte, which is
// always 0 in LZMA, holds the complement of the properties byte instead, the
// dictionary size is in the superblock, and the output size is known, so there
// is no end marker. The output is small, so it serves as the dictionary.

var (
	errLzmaProps = errors.New("bad lzma properties")
	errLzmaMatch = errors.New("an lzma match before the beginning")
	errLzmaShort = errors.New("it ends before its output does")
	errLzmaEnd   = errors.New("it does not end with its output")
)

type lzmaDecompressor struct {
	dict int
	pool sync.Pool // of *lzmaState
}

func (d *lzmaDecompressor) decode(dst, in []byte, prefix bool) error {
	s, _ := d.pool.Get().(*lzmaState)
	if s == nil {
		s = &lzmaState{}
	}
	defer d.pool.Put(s)
	if err := s.init(in, d.dict); err != nil {
		return err
	}
	more, err := s.run(dst, in)
	if err != nil {
		return err
	}
	// An encoder that ends with the output leaves nothing: no rest of a match, no
	// input, and the range decoder at 0 after its last normalisation.
	if !prefix && (more || !s.ended(in)) {
		return errLzmaEnd
	}
	return nil
}

const (
	lzmaProbInit = 1024               // one half of 1<<11
	lzmaRound    = 1<<32 + 31 - 1<<11 // what is added to a probability before >>5 moves it up
	lzmaStates   = 16                 // of which 12 are used
	lzmaMaxPos   = 1 << 4

	lzmaLiteralBits = 4 // of lc+lp at most
	lzmaMinMatch    = 2
	lzmaLenStates   = 4
	lzmaEndPos      = 14 // distances from this slot on have direct bits
)

type lzmaLen struct {
	choice [2]uint16
	low    [lzmaMaxPos][8]uint16
	mid    [lzmaMaxPos][8]uint16
	high   [256]uint16
}

// lzmaProbs are the probabilities that a stream begins with at one half.
type lzmaProbs struct {
	isMatch    [lzmaStates][lzmaMaxPos]uint16
	isRep      [lzmaStates]uint16
	isRep0     [lzmaStates]uint16
	isRep1     [lzmaStates]uint16
	isRep2     [lzmaStates]uint16
	isRep0Long [lzmaStates][lzmaMaxPos]uint16
	slot       [lzmaLenStates][64]uint16
	special    [128]uint16
	align      [16]uint16
	match      lzmaLen
	rep        lzmaLen
	literal    [1 << lzmaLiteralBits][0x300]uint16
}

// An lzmaState decodes a stream.
type lzmaState struct {
	rc         rangeDecoder
	lc, lpMask uint32
	posMask    uint32
	dict       uint32
	state      uint32
	reps       [4]uint32
	more       bool // the last match goes on behind the output
	tail       [2 * lzmaInRoom]byte
	probs      lzmaProbs
}

func (s *lzmaState) init(in []byte, dict int) error {
	if len(in) < 5 {
		return errLzmaShort
	}
	props := uint32(^in[0])
	lc, lp, pb := props%9, props/9%5, props/45
	if pb > 4 || lc+lp > lzmaLiteralBits {
		return errLzmaProps
	}
	s.lc, s.lpMask, s.posMask, s.dict = lc, 1<<lp-1, 1<<pb-1, uint32(dict)
	s.state, s.reps, s.more = 0, [4]uint32{}, false
	s.rc = rangeDecoder{pos: 5, rng: 1<<32 - 1, code: binary.BigEndian.Uint32(in[1:])}
	s.probs.reset(lc + lp)
	return nil
}

func (p *lzmaProbs) reset(literalBits uint32) {
	half := func(q []uint16) {
		for i := range q {
			q[i] = lzmaProbInit
		}
	}
	for i := range lzmaStates {
		half(p.isMatch[i][:])
		half(p.isRep0Long[i][:])
	}
	for _, q := range [][]uint16{p.isRep[:], p.isRep0[:], p.isRep1[:], p.isRep2[:], p.special[:], p.align[:]} {
		half(q)
	}
	for i := range p.slot {
		half(p.slot[i][:])
	}
	for _, l := range []*lzmaLen{&p.match, &p.rep} {
		half(l.choice[:])
		half(l.high[:])
		for i := range lzmaMaxPos {
			half(l.low[i][:])
			half(l.mid[i][:])
		}
	}
	for i := range p.literal[:1<<literalBits] {
		half(p.literal[i][:])
	}
}

// A rangeDecoder reads bits whose probabilities adapt. It is small enough to be
// handed from function to function in registers, and reads from next, the
// bytes from pos on, highest first, since input, position and bound would take
// three registers of a loop that needs all that there are. For the same reason
// the loops are functions: in their caller they would share its registers.
type rangeDecoder struct {
	next      uint64
	pos       int
	rng, code uint32
}

// fill provides the bytes for 8 bits. A bit takes at most 6.05 bits of the input,
// since the least probability is 31/2048, so that the input moves by 7 bytes.
func (r rangeDecoder) fill(in []byte) rangeDecoder {
	r.next = binary.BigEndian.Uint64(in[r.pos : r.pos+8 : r.pos+8])
	return r
}

func (r rangeDecoder) normalize() rangeDecoder {
	if r.rng < 1<<24 {
		r.rng <<= 8
		r.code = r.code<<8 | uint32(r.next>>56)
		r.next <<= 8
		r.pos++
	}
	return r
}

// decide reads a bit that decides what comes next.
func (r rangeDecoder) decide(p *uint16) (_ rangeDecoder, one bool) {
	v := uint32(*p)
	bound := r.rng >> 11 * v
	if r.code < bound {
		r.rng = bound
		*p = uint16(v + (1<<11-v)>>5)
		return r, false
	}
	r.rng -= bound
	r.code -= bound
	*p = uint16(v - v>>5)
	return r, true
}

// bit reads a bit of probability v, without a branch on it: in well compressed data
// nobody can foretell it. mask is all ones for a 0.
func (r rangeDecoder) bit(v uint32) (_ rangeDecoder, after uint16, mask uint) {
	bound := r.rng >> 11 * v
	below := int64(r.code) - int64(bound)
	m := uint32(below >> 63)
	r.rng -= bound
	r.rng += (bound - r.rng) & m
	r.code = uint32(below) + bound&m
	return r, uint16(v - uint32(int32(v+(lzmaRound&m))>>5)), uint(below >> 63)
}

// tree reads bits most significant first and returns them behind a one, which makes
// them an index. Both probabilities of the next bit are loaded before the bit that
// chooses between them is known, since that is what a loop waits for.
func (r rangeDecoder) tree(probs []uint16) (rangeDecoder, uint) {
	m, v := uint(1), uint32(probs[1])
	for {
		r = r.normalize()
		var mask uint
		r, probs[m], mask = r.bit(v)
		m = m<<1 | 1
		if m >= uint(len(probs)) {
			return r, m + mask
		}
		v0, v1 := uint32(probs[m-1]), uint32(probs[m])
		v = v1 ^ (v0^v1)&uint32(mask)
		m += mask
	}
}

// reverse reads bits least significant first.
func (r rangeDecoder) reverse(probs []uint16, count uint) (rangeDecoder, uint32) {
	m, bits, v := uint(1), uint32(0), uint32(probs[1])
	for i := uint(0); ; {
		r = r.normalize()
		var mask uint
		r, probs[m], mask = r.bit(v)
		bits += uint32(1+mask) << (i & 31)
		if i++; i >= count {
			return r, bits
		}
		m = m<<1 | 1
		v0, v1 := uint32(probs[m-1]), uint32(probs[m])
		v = v1 ^ (v0^v1)&uint32(mask)
		m += mask
	}
}

// hinted reads the 8 bits of a literal after a match. The bits of the byte at the
// match's distance are a hint, until one differs.
func (r rangeDecoder) hinted(probs *[0x300]uint16, hint uint) (rangeDecoder, uint) {
	hint <<= 1
	m, offs, bit := uint(1), uint(0x100), hint&0x100
	at := 0x101 + bit
	v := uint32(probs[at])
	for {
		r = r.normalize()
		var mask uint
		r, probs[at], mask = r.bit(v)
		m = m<<1 | 1
		if m >= 0x100 {
			return r, m + mask
		}
		hint <<= 1
		offs0 := offs ^ bit
		at0, at1 := offs0+hint&offs0+m-1, bit+hint&bit+m
		v0, v1 := uint32(probs[at0]), uint32(probs[at1])
		v = v1 ^ (v0^v1)&uint32(mask)
		at = at1 ^ (at0^at1)&mask
		offs = bit ^ offs&mask
		bit = hint & offs
		m += mask
	}
}

// direct reads bits of equal probability, at most 26.
func (r rangeDecoder) direct(count uint) (rangeDecoder, uint32) {
	v := uint32(0)
	for range count {
		r = r.normalize()
		r.rng >>= 1
		below := int64(r.code) - int64(r.rng)
		mask := uint32(below >> 63)
		r.code = uint32(below) + r.rng&mask
		v = v<<1 + 1 + mask
	}
	return r, v
}

// lzmaInRoom is more than what a symbol can take of the input and a fill behind it.
// A symbol has at most 22 bits with probabilities and 26 direct ones, which take
// 21 bytes.
const lzmaInRoom = 32

// run fills dst. more says that the last match goes on behind it. No bit looks for
// the end of the input: a symbol is begun only where there is room for it.
func (s *lzmaState) run(dst, in []byte) (more bool, err error) {
	di := 0
	if len(in) >= lzmaInRoom {
		if di, err = s.symbols(dst, di, in, len(in)-lzmaInRoom); err != nil {
			return false, err
		}
	}
	if di < len(dst) {
		// The end is decoded from a copy that has zeros behind it.
		start := s.rc.pos
		n := copy(s.tail[:], in[start:])
		clear(s.tail[n:])
		s.rc.pos = 0
		if _, err = s.symbols(dst, di, s.tail[:], n); err != nil {
			return false, err
		}
		if s.rc.pos > n {
			return false, errLzmaShort
		}
		s.rc.pos += start
	}
	return s.more, nil
}

// ended says whether the input ends as an encoder ends it.
func (s *lzmaState) ended(in []byte) bool {
	if s.rc.rng < 1<<24 {
		s.rc.code <<= 8
		if s.rc.pos < len(in) {
			s.rc.code |= uint32(in[s.rc.pos])
			s.rc.pos++
		}
	}
	return s.rc.code == 0 && s.rc.pos == len(in)
}

// The state is what the last symbols were: below 7, the last was a literal.
var (
	lzmaAfterLiteral = [lzmaStates]uint8{0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 4, 5}
	lzmaAfterMatch   = [lzmaStates]uint8{7, 7, 7, 7, 7, 7, 7, 10, 10, 10, 10, 10}
	lzmaAfterRep     = [lzmaStates]uint8{8, 8, 8, 8, 8, 8, 8, 11, 11, 11, 11, 11}
	lzmaAfterShort   = [lzmaStates]uint8{9, 9, 9, 9, 9, 9, 9, 11, 11, 11, 11, 11}
)

// symbols decodes until dst is full or more than inEnd bytes of in are read. The
// range decoder goes through it, and through what it calls, in registers.
func (s *lzmaState) symbols(dst []byte, di int, in []byte, inEnd int) (_ int, err error) {
	p, r := &s.probs, s.rc
	for di < len(dst) && r.pos <= inEnd {
		state, posState := s.state%lzmaStates, uint32(di)&s.posMask%lzmaMaxPos
		r = r.fill(in).normalize()
		var one bool
		if r, one = r.decide(&p.isMatch[state][posState]); !one {
			probs := s.literalProbs(dst, di)
			r = r.fill(in)
			var m uint
			if state < 7 {
				r, m = r.tree(probs[:0x100])
			} else {
				r, m = r.hinted(probs, uint(dst[di-int(s.reps[0])-1]))
			}
			dst[di] = byte(m)
			di++
			s.state = uint32(lzmaAfterLiteral[state])
			continue
		}
		n := 1
		r = r.normalize()
		if r, one = r.decide(&p.isRep[state]); !one {
			s.state = uint32(lzmaAfterMatch[state])
			r, n = p.match.decode(r, in, posState)
			r = s.distance(r, in, n)
		} else if r, one = s.repeat(r, posState); one {
			r, n = p.rep.decode(r, in, posState)
		}
		if s.reps[0] >= min(uint32(di), s.dict) {
			err = errLzmaMatch
			break
		}
		back := int(s.reps[0]) + 1
		if back >= 8 && n <= 16 && len(dst)-di >= 16 {
			// Most matches are short, and two words are quicker than a call.
			store64(dst, di, load64(dst, di-back))
			store64(dst, di+8, load64(dst, di-back+8))
			di += n
			continue
		}
		s.more = n > len(dst)-di
		di = copyMatch(dst, di, back, n)
	}
	s.rc = r
	return di, err
}

// literalProbs are the probabilities of a literal that follows what is decoded.
func (s *lzmaState) literalProbs(dst []byte, di int) *[0x300]uint16 {
	ctx := uint32(di) & s.lpMask << (s.lc & 31)
	if di > 0 {
		ctx += uint32(dst[di-1]) >> ((8 - s.lc) & 31)
	}
	return &s.probs.literal[ctx%(1<<lzmaLiteralBits)]
}

// repeat reads which of the last four distances a match has. one is false for a
// match of one byte.
func (s *lzmaState) repeat(r rangeDecoder, posState uint32) (_ rangeDecoder, one bool) {
	p, state, reps := &s.probs, s.state%lzmaStates, &s.reps
	s.state = uint32(lzmaAfterRep[state])
	r = r.normalize()
	if r, one = r.decide(&p.isRep0[state]); !one {
		r = r.normalize()
		if r, one = r.decide(&p.isRep0Long[state][posState%lzmaMaxPos]); !one {
			s.state = uint32(lzmaAfterShort[state])
		}
		return r, one
	}
	r = r.normalize()
	if r, one = r.decide(&p.isRep1[state]); !one {
		reps[0], reps[1] = reps[1], reps[0]
		return r, true
	}
	r = r.normalize()
	if r, one = r.decide(&p.isRep2[state]); !one {
		reps[0], reps[1], reps[2] = reps[2], reps[0], reps[1]
		return r, true
	}
	reps[0], reps[1], reps[2], reps[3] = reps[3], reps[0], reps[1], reps[2]
	return r, true
}

// decode reads a length.
func (l *lzmaLen) decode(r rangeDecoder, in []byte, posState uint32) (rangeDecoder, int) {
	r = r.normalize()
	r, one := r.decide(&l.choice[0])
	var m uint
	if !one {
		r, m = r.fill(in).tree(l.low[posState%lzmaMaxPos][:])
		return r, int(m) - 8 + lzmaMinMatch
	}
	r = r.normalize()
	if r, one = r.decide(&l.choice[1]); !one {
		r, m = r.fill(in).tree(l.mid[posState%lzmaMaxPos][:])
		return r, int(m) + lzmaMinMatch
	}
	r, m = r.fill(in).tree(l.high[:])
	return r, int(m) - 256 + 16 + lzmaMinMatch
}

// distance reads the distance of a match that is not a repetition.
func (s *lzmaState) distance(r rangeDecoder, in []byte, n int) rangeDecoder {
	p := &s.probs
	r, m := r.fill(in).tree(p.slot[min(n-lzmaMinMatch, lzmaLenStates-1)][:])
	slot := uint32(m - 64)
	dist := slot
	if slot >= 4 {
		bits := uint(slot>>1 - 1)
		dist = (2 | slot&1) << (bits & 31)
		var low uint32
		if slot < lzmaEndPos {
			r, low = r.fill(in).reverse(p.special[dist-slot:], bits)
		} else {
			r, low = r.fill(in).direct(bits - 4)
			dist += low << 4
			r, low = r.fill(in).reverse(p.align[:], 4)
		}
		dist += low
	}
	s.reps[0], s.reps[1], s.reps[2], s.reps[3] = dist, s.reps[0], s.reps[1], s.reps[2]
	return r
}
