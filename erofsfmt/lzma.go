package erofsfmt

import (
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
	more, err := s.run(dst)
	if err != nil {
		return err
	}
	if s.rc.over > 0 {
		return errLzmaShort
	}
	// An encoder that ends with the output leaves nothing: no rest of a match, no
	// input, and the range decoder at 0 after its last normalisation.
	if s.rc.normalize(); !prefix && (more || s.rc.code != 0 || s.rc.pos != len(in)) {
		return errLzmaEnd
	}
	return nil
}

const (
	lzmaProbInit  = 1024               // one half of 1<<11
	lzmaRound     = 1<<32 + 31 - 1<<11 // what is added to a probability before >>5 moves it up
	lzmaStates    = 12
	lzmaMaxPos    = 1 << 4
	lzmaMinMatch  = 2
	lzmaLenStates = 4
	lzmaEndPos    = 14 // distances from this slot on have direct bits
)

// A rangeDecoder reads bits whose probabilities adapt. Reading past the end
// yields zeros and counts them.
type rangeDecoder struct {
	in   []byte
	pos  int
	over int
	rng  uint32
	code uint32
}

func (r *rangeDecoder) normalize() {
	if r.rng < 1<<24 {
		r.rng, r.code = r.rng<<8, r.code<<8|r.next()
	}
}

func (r *rangeDecoder) next() uint32 {
	if r.pos < len(r.in) {
		b := r.in[r.pos]
		r.pos++
		return uint32(b)
	}
	r.over++
	return 0
}

func (r *rangeDecoder) bit(p *uint16) uint32 {
	if r.rng < 1<<24 {
		r.normalize()
	}
	bound := r.rng >> 11 * uint32(*p)
	if r.code < bound {
		r.rng = bound
		*p += (1<<11 - *p) >> 5
		return 0
	}
	r.rng -= bound
	r.code -= bound
	*p -= *p >> 5
	return 1
}

// The functions that read several bits hold the decoder's fields in registers, and
// have no branch on a bit: in well compressed data nobody can foretell it. mask is
// all ones for a 0.

// tree reads bits most significant first; probs has 1<<bits entries.
func (r *rangeDecoder) tree(probs []uint16, bits uint) uint32 {
	rng, code := r.rng, r.code
	m := uint32(1)
	for range bits {
		if rng < 1<<24 {
			rng, code = rng<<8, code<<8|r.next()
		}
		p := &probs[m]
		bound := rng >> 11 * uint32(*p)
		below := int64(code) - int64(bound)
		mask := uint32(below >> 63)
		rng -= bound
		rng += (bound - rng) & mask
		code = uint32(below) + bound&mask
		*p -= uint16(int32(uint32(*p)+(lzmaRound&mask)) >> 5)
		m = m<<1 + 1 + mask
	}
	r.rng, r.code = rng, code
	return m - 1<<bits
}

// reverse reads bits least significant first.
func (r *rangeDecoder) reverse(probs []uint16, bits uint) uint32 {
	rng, code := r.rng, r.code
	m, v := uint32(1), uint32(0)
	for i := range bits {
		if rng < 1<<24 {
			rng, code = rng<<8, code<<8|r.next()
		}
		p := &probs[m]
		bound := rng >> 11 * uint32(*p)
		below := int64(code) - int64(bound)
		mask := uint32(below >> 63)
		rng -= bound
		rng += (bound - rng) & mask
		code = uint32(below) + bound&mask
		*p -= uint16(int32(uint32(*p)+(lzmaRound&mask)) >> 5)
		m = m<<1 + 1 + mask
		v |= (1 + mask) << i
	}
	r.rng, r.code = rng, code
	return v
}

// hinted reads the 8 bits of a literal after a match; probs has 0x300 entries. The
// bits of the byte at the match's distance are a hint, until one differs.
func (r *rangeDecoder) hinted(probs []uint16, hint uint32) uint32 {
	rng, code := r.rng, r.code
	m, offs := uint32(1), uint32(0x100)
	for range 8 {
		if rng < 1<<24 {
			rng, code = rng<<8, code<<8|r.next()
		}
		hint <<= 1
		bit := hint & offs
		p := &probs[offs+bit+m]
		bound := rng >> 11 * uint32(*p)
		below := int64(code) - int64(bound)
		mask := uint32(below >> 63)
		rng -= bound
		rng += (bound - rng) & mask
		code = uint32(below) + bound&mask
		*p -= uint16(int32(uint32(*p)+(lzmaRound&mask)) >> 5)
		m = m<<1 + 1 + mask
		offs &= bit ^ mask
	}
	r.rng, r.code = rng, code
	return m
}

// direct reads bits of equal probability.
func (r *rangeDecoder) direct(bits uint) uint32 {
	v := uint32(0)
	for range bits {
		r.normalize()
		r.rng >>= 1
		b := uint32(1)
		if r.code < r.rng {
			b = 0
		} else {
			r.code -= r.rng
		}
		v = v<<1 | b
	}
	return v
}

type lzmaLen struct {
	choice [2]uint16
	low    [lzmaMaxPos][8]uint16
	mid    [lzmaMaxPos][8]uint16
	high   [256]uint16
}

func (l *lzmaLen) decode(r *rangeDecoder, posState int) int {
	if r.bit(&l.choice[0]) == 0 {
		return int(r.tree(l.low[posState][:], 3))
	}
	if r.bit(&l.choice[1]) == 0 {
		return 8 + int(r.tree(l.mid[posState][:], 3))
	}
	return 16 + int(r.tree(l.high[:], 8))
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
	literal    [0x300 << 4]uint16 // for lc+lp up to 4
}

type lzmaState struct {
	rc         rangeDecoder
	lc, lpMask uint
	posMask    int
	dict       int
	state      uint32
	reps       [4]uint32
	probs      lzmaProbs
}

func (s *lzmaState) init(in []byte, dict int) error {
	if len(in) < 5 {
		return errLzmaShort
	}
	props := uint(^in[0])
	lc, lp, pb := props%9, props/9%5, props/45
	if pb > 4 || lc+lp > 4 {
		return errLzmaProps
	}
	s.lc, s.lpMask, s.posMask, s.dict = lc, 1<<lp-1, 1<<pb-1, dict
	s.state, s.reps = 0, [4]uint32{}
	s.rc = rangeDecoder{in: in, pos: 5, rng: 1<<32 - 1,
		code: uint32(in[1])<<24 | uint32(in[2])<<16 | uint32(in[3])<<8 | uint32(in[4])}
	s.probs.reset(lc + lp)
	return nil
}

func (p *lzmaProbs) reset(literalBits uint) {
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
	half(p.literal[:0x300<<literalBits])
}

// run fills dst. more says that the last match goes on behind it.
func (s *lzmaState) run(dst []byte) (more bool, err error) {
	p := &s.probs
	for di := 0; di < len(dst); {
		if s.rc.over > 0 {
			return false, errLzmaShort
		}
		posState := di & s.posMask
		if s.rc.bit(&p.isMatch[s.state][posState]) == 0 {
			s.literal(dst, di)
			di++
			continue
		}
		var n int
		if s.rc.bit(&p.isRep[s.state]) == 0 {
			n = s.match(posState)
		} else {
			n = s.repeat(posState)
		}
		if uint64(s.reps[0]) >= uint64(min(di, s.dict)) {
			return false, errLzmaMatch
		}
		more = n > len(dst)-di
		di = copyMatch(dst, di, int(s.reps[0])+1, n)
	}
	return more, nil
}

func (s *lzmaState) literal(dst []byte, di int) {
	prev := uint(0)
	if di > 0 {
		prev = uint(dst[di-1])
	}
	ctx := (uint(di)&s.lpMask)<<s.lc | prev>>(8-s.lc)
	probs := s.probs.literal[0x300*ctx:][:0x300]
	var m uint32
	if s.state >= 7 {
		m = s.rc.hinted(probs, uint32(dst[di-int(s.reps[0])-1]))
	} else {
		m = s.rc.tree(probs, 8)
	}
	dst[di] = byte(m)
	switch {
	case s.state < 4:
		s.state = 0
	case s.state < 10:
		s.state -= 3
	default:
		s.state -= 6
	}
}

// match reads the length and distance of a match that is not a repetition.
func (s *lzmaState) match(posState int) int {
	n := s.probs.match.decode(&s.rc, posState)
	s.state = s.next(7, 10)
	copy(s.reps[1:], s.reps[:3])
	slot := s.rc.tree(s.probs.slot[min(n, lzmaLenStates-1)][:], 6)
	dist := slot
	if slot >= 4 {
		bits := uint(slot>>1 - 1)
		dist = (2 | slot&1) << bits
		if slot < lzmaEndPos {
			dist += s.rc.reverse(s.probs.special[dist-slot:], bits)
		} else {
			dist += s.rc.direct(bits-4)<<4 + s.rc.reverse(s.probs.align[:], 4)
		}
	}
	s.reps[0] = dist
	return n + lzmaMinMatch
}

// repeat reads a match at one of the last four distances.
func (s *lzmaState) repeat(posState int) int {
	p := &s.probs
	if s.rc.bit(&p.isRep0[s.state]) == 0 {
		if s.rc.bit(&p.isRep0Long[s.state][posState]) == 0 {
			s.state = s.next(9, 11)
			return 1
		}
	} else {
		i := 1
		if s.rc.bit(&p.isRep1[s.state]) != 0 {
			i = 2 + int(s.rc.bit(&p.isRep2[s.state]))
		}
		r := s.reps[i]
		copy(s.reps[1:i+1], s.reps[:i])
		s.reps[0] = r
	}
	n := p.rep.decode(&s.rc, posState)
	s.state = s.next(8, 11)
	return n + lzmaMinMatch
}

// next is the state after a match: it depends on whether a literal came before.
func (s *lzmaState) next(afterLiteral, afterMatch uint32) uint32 {
	if s.state < 7 {
		return afterLiteral
	}
	return afterMatch
}
