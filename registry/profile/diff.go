package profile

import (
	"cmp"
	"slices"
)

// A Difference is what two profiles, A and B, say differently of one blob.
type Difference struct {
	Digest       string
	SizeA, SizeB int64   // -1 where the profile does not have the blob
	OnlyA, OnlyB []Range // what one has and the other does not, by offset
	Order        bool    // what both have, they do not have in the same order
}

// Diff compares two profiles, and has a Difference for each blob of which they do not say the same, by digest.
func Diff(a, b *Profile) []Difference {
	var all []Difference
	var bothA, bothB []Blob // of which only is left what both have
	for _, pair := range pairs(a, b) {
		d := Difference{Digest: pair.digest, SizeA: -1, SizeB: -1}
		var readsA, readsB []Read
		if pair.a != nil {
			d.SizeA, readsA = pair.a.Size, byOffset(pair.a.Reads)
		}
		if pair.b != nil {
			d.SizeB, readsB = pair.b.Size, byOffset(pair.b.Reads)
		}
		d.OnlyA, d.OnlyB = ranges(pair.digest, clip(readsA, readsB, false)), ranges(pair.digest, clip(readsB, readsA, false))
		bothA = append(bothA, Blob{Digest: pair.digest, Reads: clip(readsA, readsB, true)})
		bothB = append(bothB, Blob{Digest: pair.digest, Reads: clip(readsB, readsA, true)})
		all = append(all, d)
	}
	// What only one has leaves gaps in its order.
	(&Profile{bothA}).renumber()
	(&Profile{bothB}).renumber()
	for i := range all {
		all[i].Order = !slices.Equal(bothA[i].Reads, bothB[i].Reads)
	}
	return slices.DeleteFunc(all, func(d Difference) bool {
		return d.SizeA == d.SizeB && len(d.OnlyA) == 0 && len(d.OnlyB) == 0 && !d.Order
	})
}

// A pair is a blob in two profiles; nil where one does not have it.
type pair struct {
	digest string
	a, b   *Blob
}

func pairs(a, b *Profile) []pair {
	var all []pair
	for i, j := 0, 0; i < len(a.Blobs) || j < len(b.Blobs); {
		var p pair
		order := 0
		switch {
		case i == len(a.Blobs):
			order = 1
		case j == len(b.Blobs):
			order = -1
		default:
			order = cmp.Compare(a.Blobs[i].Digest, b.Blobs[j].Digest)
		}
		if order <= 0 {
			p.a, p.digest = &a.Blobs[i], a.Blobs[i].Digest
			i++
		}
		if order >= 0 {
			p.b, p.digest = &b.Blobs[j], b.Blobs[j].Digest
			j++
		}
		all = append(all, p)
	}
	return all
}

func byOffset(reads []Read) []Read {
	return slices.SortedFunc(slices.Values(reads), func(a, b Read) int { return cmp.Compare(a.Off, b.Off) })
}

// clip is what of the reads lies inside by, or outside of it. Both come by offset, and no byte is in two reads of one.
func clip(reads, by []Read, inside bool) (kept []Read) {
	keep := func(r Read, off, end int64, is bool) {
		if off < end && is == inside {
			kept = join(kept, Read{r.Order, off, end - off})
		}
	}
	for _, r := range reads {
		at, end := r.Off, r.Off+r.Len
		for len(by) > 0 && by[0].Off+by[0].Len <= at {
			by = by[1:]
		}
		for _, c := range by {
			if c.Off >= end {
				break
			}
			from, to := max(c.Off, at), min(c.Off+c.Len, end)
			keep(r, at, from, false)
			keep(r, from, to, true)
			at = to
		}
		keep(r, at, end, false)
	}
	return kept
}

// ranges are reads without their order, by offset as they come.
func ranges(digest string, reads []Read) (all []Range) {
	for _, r := range reads {
		if n := len(all); n > 0 && all[n-1].Off+all[n-1].Len == r.Off {
			all[n-1].Len += r.Len
		} else {
			all = append(all, Range{digest, r.Off, r.Len})
		}
	}
	return all
}
