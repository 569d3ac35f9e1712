package profile

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// TestNewRefuses: what a profile cannot have.
func TestNewRefuses(t *testing.T) {
	for want, blobs := range map[string][]Blob{
		"is there twice":              {{da, 1, nil}, {da, 1, nil}},
		"not a digest":                {{"sha256:" + strings.Repeat("A", 64), 1, nil}},
		"its size is -1":              {{da, -1, nil}},
		"its size is 281474976710657": {{da, 1<<48 + 1, nil}},
		"does not lie":                {{da, 10, []Read{{0, 10, 1}}}},
		"the order -1":                {{da, 10, []Read{{-1, 0, 1}}}},
		"of 9223372036854775807":      {{da, 10, []Read{{0, 1, 1<<63 - 1}}}},
	} {
		if _, err := New(blobs); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

// TestFlatten compares reads made disjoint with what each byte says.
func TestFlatten(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		const size = 60
		var reads []Read
		want := make([]int, size) // order + 1
		for range rng.IntN(12) {
			off := rng.Int64N(size)
			r := Read{rng.IntN(6), off, 1 + rng.Int64N(size-off)}
			reads = append(reads, r)
			for i := r.Off; i < r.Off+r.Len; i++ {
				if want[i] == 0 || want[i] > r.Order+1 {
					want[i] = r.Order + 1
				}
			}
		}
		flat := flatten(reads)
		got := make([]int, size)
		for i, r := range flat {
			if i > 0 && compareReads(flat[i-1], r) >= 0 {
				t.Fatalf("%v: not in order", flat)
			}
			for b := r.Off; b < r.Off+r.Len; b++ {
				if got[b] != 0 {
					t.Fatalf("%v: byte %d is there twice", flat, b)
				}
				got[b] = r.Order + 1
			}
			if r.Off+r.Len < size && want[r.Off+r.Len] == r.Order+1 {
				t.Fatalf("%v: %v could go on", flat, r)
			}
		}
		if !slices.Equal(got, want) {
			t.Fatalf("%v became %v", reads, flat)
		}
	}
}

// TestMerge: the first one's order comes first, then what only the others have.
func TestMerge(t *testing.T) {
	a := parsed(t, `{"version":1,"blobs":{"A":{"size":100,"reads":[[0,50,10],[1,0,10]]}}}`)
	b := parsed(t, `{"version":1,"blobs":{"A":{"size":100,"reads":[[0,0,20],[2,40,40]]},"B":{"size":9,"reads":[[1,0,9]]}}}`)
	for _, c := range []struct {
		of   []*Profile
		want string
	}{
		{nil, `{"version":1,"blobs":{}}`},
		{[]*Profile{a}, `{"version":1,"blobs":{"A":{"size":100,"reads":[[0,50,10],[1,0,10]]}}}`},
		{[]*Profile{a, b}, `{"version":1,"blobs":{"A":{"size":100,"reads":[[0,50,10],[1,0,20],[3,40,10],[4,60,20]]},"B":{"size":9,"reads":[[2,0,9]]}}}`},
		{[]*Profile{b, a}, `{"version":1,"blobs":{"A":{"size":100,"reads":[[0,0,20],[2,40,40]]},"B":{"size":9,"reads":[[1,0,9]]}}}`},
		{[]*Profile{a, a, a}, `{"version":1,"blobs":{"A":{"size":100,"reads":[[0,50,10],[1,0,10]]}}}`},
	} {
		m, err := Merge(c.of...)
		must(t, err)
		if got, want := encoded(t, m), named(c.want)+"\n"; got != want {
			t.Errorf("%swant\n%s", got, want)
		}
	}
	if _, err := Merge(a, parsed(t, `{"version":1,"blobs":{"A":{"size":99,"reads":[]}}}`)); err == nil || !strings.Contains(err.Error(), "100 bytes in one and 99 in another") {
		t.Errorf("of different sizes: %v", err)
	}
}

// TestDiff: what each one has for itself, and whether what they share comes in the same order.
func TestDiff(t *testing.T) {
	base := `{"version":1,"blobs":{"A":{"size":100,"reads":[[0,0,10],[1,50,10],[2,20,10]]}}}`
	for _, c := range []struct {
		name, b string
		want    []Difference
	}{
		{"the same", base, nil},
		{"less", `{"version":1,"blobs":{"A":{"size":100,"reads":[[0,50,5],[1,20,10]]}}}`,
			[]Difference{{da, 100, 100, []Range{{da, 0, 10}, {da, 55, 5}}, nil, false}}},
		{"more", `{"version":1,"blobs":{"A":{"size":100,"reads":[[0,90,1],[1,0,12],[2,50,10],[3,20,40]]}}}`,
			[]Difference{{da, 100, 100, nil, []Range{{da, 10, 2}, {da, 30, 20}, {da, 90, 1}}, false}}},
		{"another order", `{"version":1,"blobs":{"A":{"size":100,"reads":[[0,0,10],[1,20,10],[2,50,10]]}}}`,
			[]Difference{{da, 100, 100, nil, nil, true}}},
		{"another size", `{"version":1,"blobs":{"A":{"size":101,"reads":[[0,0,10],[1,50,10],[2,20,10]]}}}`,
			[]Difference{{da, 100, 101, nil, nil, false}}},
		{"another blob", `{"version":1,"blobs":{"B":{"size":9,"reads":[[0,0,9]]}}}`,
			[]Difference{{da, 100, -1, []Range{{da, 0, 10}, {da, 20, 10}, {da, 50, 10}}, nil, false}, {db, -1, 9, nil, []Range{{db, 0, 9}}, false}}},
		{"nothing of a blob more", `{"version":1,"blobs":{"A":{"size":100,"reads":[[0,0,10],[1,50,10],[2,20,10]]},"B":{"size":9,"reads":[]}}}`,
			[]Difference{{db, -1, 9, nil, nil, false}}},
	} {
		got := Diff(parsed(t, base), parsed(t, c.b))
		if !slices.EqualFunc(got, c.want, sameDifference) {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
		for i := range c.want {
			w := &c.want[i]
			w.SizeA, w.SizeB, w.OnlyA, w.OnlyB = w.SizeB, w.SizeA, w.OnlyB, w.OnlyA
		}
		if got := Diff(parsed(t, c.b), parsed(t, base)); !slices.EqualFunc(got, c.want, sameDifference) {
			t.Errorf("%s, the other way round: %+v, want %+v", c.name, got, c.want)
		}
	}
}

func sameDifference(a, b Difference) bool {
	return a.Digest == b.Digest && a.SizeA == b.SizeA && a.SizeB == b.SizeB && a.Order == b.Order &&
		slices.Equal(a.OnlyA, b.OnlyA) && slices.Equal(a.OnlyB, b.OnlyB)
}

// TestReads: in order, in whole units, and within the budget to the unit.
func TestReads(t *testing.T) {
	p := parsed(t, `{"version":1,"blobs":{"A":{"size":100,"reads":[[0,50,10],[2,0,25]]},"B":{"size":90,"reads":[[1,85,5],[2,0,1]]}}}`)
	units := func(a, b int64) func(string) int64 {
		return func(d string) int64 { return map[string]int64{da: a, db: b}[d] }
	}
	for _, c := range []struct {
		name   string
		budget int64
		unit   func(string) int64
		want   []Range
	}{
		{"as they are", 0, nil, []Range{{da, 50, 10}, {db, 85, 5}, {da, 0, 25}, {db, 0, 1}}},
		{"up to a byte", 12, nil, []Range{{da, 50, 10}, {db, 85, 2}}},
		{"up to a read", 15, nil, []Range{{da, 50, 10}, {db, 85, 5}}},
		{"units", 0, units(40, 40), []Range{{da, 40, 40}, {db, 80, 10}, {da, 0, 40}, {db, 0, 40}}},
		{"within the last unit", 50, units(40, 40), []Range{{da, 40, 40}, {db, 80, 10}}},
		{"before the last unit", 49, units(40, 40), []Range{{da, 40, 40}}},
		{"before the first", 39, units(40, 40), nil},
		{"in the middle", 67, units(10, 10), []Range{{da, 50, 10}, {db, 80, 10}, {da, 0, 30}, {db, 0, 10}}},
		{"units of a read", 45, units(10, 10), []Range{{da, 50, 10}, {db, 80, 10}, {da, 0, 20}}},
		{"not of all blobs", 35, units(10, 0), []Range{{da, 50, 10}, {da, 0, 20}}},
		{"one unit", 0, units(1000, 1000), []Range{{da, 0, 100}, {db, 0, 90}}},
	} {
		if got := p.Reads(c.budget, c.unit); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

// checkReads fails the test unless reads in units cover the profile, once, and a budget only ends them.
func checkReads(t *testing.T, p *Profile, budget, unit int64) {
	t.Helper()
	if unit == 0 {
		return
	}
	of := func(string) int64 { return unit }
	all, cut := p.Reads(0, of), p.Reads(budget, of)
	var sum int64
	for i, r := range cut {
		b, ok := p.Blob(r.Digest)
		if !ok || r.Off%unit != 0 || r.Len <= 0 || r.Len > b.Size-r.Off || (r.Off+r.Len)%unit != 0 && r.Off+r.Len != b.Size {
			t.Fatalf("%+v is not whole units of %d", r, unit)
		}
		if r.Digest != all[i].Digest || r.Off != all[i].Off || r.Len > all[i].Len {
			t.Fatalf("%v is no beginning of %v", cut, all)
		}
		sum += r.Len
	}
	if budget > 0 && sum > budget {
		t.Fatalf("%d bytes, more than %d", sum, budget)
	}
	next := int64(0) // what comes after the last one
	if n := len(cut); n > 0 && cut[n-1].Len < all[n-1].Len {
		next = all[n-1].Len - cut[n-1].Len
	} else if n < len(all) {
		next = all[n].Len
	}
	if next > 0 && sum+min(unit, next) <= budget {
		t.Fatalf("%d bytes, and one unit more would be no more than %d", sum, budget)
	}
	covered := map[string][]Read{}
	for _, r := range all {
		covered[r.Digest] = append(covered[r.Digest], Read{0, r.Off, r.Len})
	}
	for _, b := range p.Blobs {
		by := byOffset(covered[b.Digest])
		for i := 1; i < len(by); i++ {
			if by[i].Off < by[i-1].Off+by[i-1].Len {
				t.Fatalf("%v: twice", by)
			}
		}
		if left := clip(byOffset(b.Reads), by, false); len(left) != 0 {
			t.Fatalf("%v is left out of %v", left, b.Reads)
		}
	}
}
