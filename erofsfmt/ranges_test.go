package erofsfmt

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// Ranges are what a set of bytes would be, one by one.
func TestRanges(t *testing.T) {
	const size = 64
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		var s ranges
		var set [size]bool
		for range 1 + rnd.IntN(20) {
			off := rnd.Int64N(size - 1)
			r := Range{off, 1 + rnd.Int64N(min(8, size-off))}
			s.add(r)
			for i := r.Off; i < r.end(); i++ {
				set[i] = true
			}
			var want ranges
			for i := int64(0); i < size; i++ {
				switch n := len(want); {
				case !set[i]:
				case n > 0 && want[n-1].end() == i:
					want[n-1].Len++
				default:
					want = append(want, Range{i, 1})
				}
			}
			if !slices.Equal(s, want) {
				t.Fatalf("%v added: %v, want %v", r, s, want)
			}
			off = rnd.Int64N(size - 1)
			r = Range{off, 1 + rnd.Int64N(size-off)}
			left, covered := [size]bool{}, true
			for i := r.Off; i < r.end(); i++ {
				left[i] = !set[i]
				covered = covered && set[i]
			}
			if got := s.covers(r.Off, r.Len); got != covered {
				t.Fatalf("%v covers %v: %v", s, r, got)
			}
			for _, l := range s.without(nil, r) {
				for i := l.Off; i < l.end(); i++ {
					if !left[i] {
						t.Fatalf("%v without %v has %v", r, s, l)
					}
					left[i] = false
				}
			}
			if slices.Contains(left[:], true) {
				t.Fatalf("%v without %v lacks something", r, s)
			}
		}
	}
}

func TestJoined(t *testing.T) {
	for _, c := range []struct {
		gap      int64
		in, want []Range
	}{
		{0, nil, nil},
		{0, []Range{{0, 5}, {5, 5}, {11, 1}}, []Range{{0, 10}, {11, 1}}},
		{1, []Range{{0, 5}, {5, 5}, {11, 1}}, []Range{{0, 12}}},
		{0, []Range{{0, 10}, {2, 3}, {2, 3}, {9, 2}}, []Range{{0, 11}}},
		{100, []Range{{0, 10}, {110, 10}, {221, 1}}, []Range{{0, 120}, {221, 1}}},
	} {
		if got := joined(slices.Clone(c.in), c.gap); !slices.Equal(got, c.want) {
			t.Errorf("%v, %d: %v, want %v", c.in, c.gap, got, c.want)
		}
	}
}
