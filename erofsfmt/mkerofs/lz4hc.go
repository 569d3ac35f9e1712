package mkerofs

const (
	lz4HCBits   = 15
	lz4HCWindow = 1 << 16
)

// lz4HC finds matches in chains of all earlier places of each hash, and looks at the next places before it takes one,
// as LZ4's high compression levels do.
type lz4HC struct {
	attempts int    // places of a chain that are looked at
	base     uint32 // as of lz4Fast
	next     int    // the first place of the source that is in no chain
	heads    [1 << lz4HCBits]uint32
	chain    [lz4HCWindow]uint16 // distance to the place before of the same hash; 0 for none
}

// lz4HCAttempts says how many places are looked at, by level.
func lz4HCAttempts(level int) int {
	return [...]int{3: 3, 4: 4, 5: 6, 6: 8, 7: 12, 8: 16, 9: 24, 10: 64, 11: 256, 12: 2048}[level]
}

func (e *lz4HC) begin(src []byte) {
	if int64(e.base)+2*int64(maxSegment) > 1<<31 || e.base == 0 {
		clear(e.heads[:])
		e.base = 0
	}
	e.base += maxSegment
	e.next = 0
}

func lz4HCHash(v uint32) uint32 { return v * 2654435761 >> (32 - lz4HCBits) }

// insert puts all places before end into their chains.
func (e *lz4HC) insert(src []byte, end int) {
	for i := e.next; i < end; i++ {
		head := &e.heads[lz4HCHash(le.Uint32(src[i:]))]
		place := e.base + uint32(i)
		distance := place - *head
		if distance > lz4MaxDistance {
			distance = 0
		}
		e.chain[i%lz4HCWindow] = uint16(distance)
		*head = place
	}
	e.next = max(e.next, end)
}

// A lz4Match is length bytes at place at that are also at place at-distance.
type lz4Match struct{ at, length, distance int }

func (m lz4Match) end() int { return m.at + m.length }

// longest finds the longest match that covers ip and begins at low or behind it. It must be longer than least, which is
// at least 3 and no less than ip-low.
func (e *lz4HC) longest(src []byte, from, low, ip, least int) (best lz4Match) {
	e.insert(src, ip+1)
	best.length = least
	end := len(src) - lz4LastBytes
	match, v := ip, le.Uint32(src[ip:])
	for range e.attempts {
		distance := int(e.chain[match%lz4HCWindow])
		match -= distance
		last := low + best.length // a longer match covers this byte
		if distance == 0 || match < from || ip-match > lz4MaxDistance || last >= end {
			break
		}
		if le.Uint32(src[last-3:]) != le.Uint32(src[last-3-(ip-match):]) || le.Uint32(src[match:]) != v {
			continue
		}
		length := lz4MinMatch + matchLength(src[ip+lz4MinMatch:end], src[match+lz4MinMatch:])
		back := 0
		for ip-back > low && match-back > from && src[ip-back-1] == src[match-back-1] {
			back++
		}
		if length+back > best.length {
			best = lz4Match{ip - back, length + back, ip - match}
		}
	}
	if best.distance == 0 {
		return lz4Match{}
	}
	return best
}

// fill encodes src[from:] until it or dst ends. Matches do not reach behind from.
func (e *lz4HC) fill(dst, src []byte, from int) (n, c int) {
	o := lz4Output{dst: dst, anchor: from}
	last := len(src) - lz4LastMatch
	for ip := from; ip <= last && ip < o.anchor+o.room(); {
		m := e.longest(src, from, ip, ip, lz4MinMatch-1)
		if m.length == 0 {
			ip += 1 + (ip-o.anchor)>>8
			continue
		}
		for {
			// A longer match may begin within this one: this one is cut, or dropped if nothing would be left.
			next := lz4Match{}
			if at := m.end() - 3; at <= last {
				next = e.longest(src, from, m.at, at, m.length)
			}
			if next.length != 0 && next.at-m.at < lz4MinMatch {
				m = next
				continue
			}
			if next.length != 0 {
				m.length = min(m.length, next.at-m.at)
			}
			if o.sequence(src, m.at, m.length, m.distance) {
				n, c = o.finish(src)
				return n - from, c
			}
			if next.length == 0 {
				break
			}
			m = next
		}
		ip = o.anchor
	}
	n, c = o.finish(src)
	return n - from, c
}
