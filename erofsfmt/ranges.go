package erofsfmt

import "slices"

// ranges are bytes of a source: in order, and none touches another.
type ranges []Range

// at is the first that ends at or behind off.
func (s ranges) at(off int64) int {
	i, _ := slices.BinarySearchFunc(s, off, func(r Range, off int64) int {
		if r.end() < off {
			return -1
		}
		return 1
	})
	return i
}

// covers says whether all of n bytes from off are among them.
func (s ranges) covers(off, n int64) bool {
	i := s.at(off + n)
	return i < len(s) && s[i].Off <= off
}

// add adds a range that is not empty.
func (s *ranges) add(r Range) {
	i := s.at(r.Off)
	j := i
	for ; j < len(*s) && (*s)[j].Off <= r.end(); j++ {
		end := max(r.end(), (*s)[j].end())
		r.Off = min(r.Off, (*s)[j].Off)
		r.Len = end - r.Off
	}
	*s = slices.Replace(*s, i, j, r)
}

// without appends what of r is not among them.
func (s ranges) without(out []Range, r Range) []Range {
	for i := s.at(r.Off); i < len(s) && s[i].Off < r.end() && r.Len > 0; i++ {
		if before := s[i].Off - r.Off; before > 0 {
			out = append(out, Range{r.Off, before})
		}
		end := r.end()
		r.Off = max(r.Off, min(s[i].end(), end))
		r.Len = end - r.Off
	}
	if r.Len > 0 {
		out = append(out, r)
	}
	return out
}

// joined joins ranges, which are in order of their beginnings, where they are no more than gap apart. It makes use of
// their memory.
func joined(all []Range, gap int64) []Range {
	out := all[:0]
	for _, r := range all {
		if n := len(out); n > 0 && r.Off-out[n-1].end() <= gap {
			out[n-1].Len = max(out[n-1].end(), r.end()) - out[n-1].Off
			continue
		}
		out = append(out, r)
	}
	return out
}
