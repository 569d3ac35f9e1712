package profile

import (
	"cmp"
	"container/heap"
	_ "crypto/sha256" // of digests
	_ "crypto/sha512"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
)

// A Profile is what was read. New, Parse, Merge and a Recorder make one; it is not to be changed.
type Profile struct {
	Blobs []Blob // by digest
}

// A Blob is what was read of one.
type Blob struct {
	Digest string
	Size   int64
	Reads  []Read // by order; no byte is in two of them
}

// A Read is bytes of a blob, and when they were first wanted: after those of a lower order, in any of the blobs. No two
// have the same order.
type Read struct {
	Order    int
	Off, Len int64
}

// A Range is bytes of a blob.
type Range struct {
	Digest   string
	Off, Len int64
}

// maxOrder bounds orders on their way in, so that they can be added.
const maxOrder = 1<<31 - 1

// maxSize bounds the size of a blob: those of all that a profile may have can be added.
const maxSize = 1 << 48

// New makes a profile of blobs whose reads may overlap, come one after the other in any way, and have the same order:
// then the digest and the offset decide. A byte in several has the lowest order.
func New(blobs []Blob) (*Profile, error) {
	p := &Profile{}
	for _, b := range blobs {
		if err := b.check(); err != nil {
			return nil, fmt.Errorf("profile: %w", err)
		}
		p.Blobs = append(p.Blobs, Blob{b.Digest, b.Size, flatten(b.Reads)})
	}
	slices.SortFunc(p.Blobs, func(a, b Blob) int { return strings.Compare(a.Digest, b.Digest) })
	for i := 1; i < len(p.Blobs); i++ {
		if p.Blobs[i].Digest == p.Blobs[i-1].Digest {
			return nil, fmt.Errorf("profile: blob %s is there twice", p.Blobs[i].Digest)
		}
	}
	p.renumber()
	return p, nil
}

// check refuses a blob that cannot be.
func (b *Blob) check() error {
	if err := checkDigest(b.Digest); err != nil {
		return err
	}
	if b.Size < 0 || b.Size > maxSize {
		return fmt.Errorf("blob %s: its size is %d, which is not between 0 and %d", b.Digest, b.Size, int64(maxSize))
	}
	for _, r := range b.Reads {
		if err := r.check(b.Size); err != nil {
			return fmt.Errorf("blob %s: %w", b.Digest, err)
		}
	}
	return nil
}

// check does not compute Off+Len, which may overflow.
func (r Read) check(size int64) error {
	switch {
	case r.Order < 0 || r.Order > maxOrder:
		return fmt.Errorf("the order %d of a read is not between 0 and %d", r.Order, maxOrder)
	case r.Len <= 0 || r.Off < 0 || r.Off > size || r.Len > size-r.Off:
		return fmt.Errorf("a read of %d bytes at %d does not lie in its %d bytes", r.Len, r.Off, size)
	}
	return nil
}

// checkDigest allows what an OCI digest may be: it is printed and compared, and comes from a file.
func checkDigest(s string) error {
	if err := digest.Digest(s).Validate(); err != nil {
		return fmt.Errorf("%.80q is not a digest: %w", s, err)
	}
	return nil
}

// renumber makes the orders 0, 1, 2, …: the places of the reads in the sequence of all. Reads that follow each other there
// and in their blob become one. So there is one way only to say the same.
func (p *Profile) renumber() {
	type step struct {
		blob int
		Read
	}
	var all []step
	for i := range p.Blobs {
		for _, r := range p.Blobs[i].Reads {
			all = append(all, step{i, r})
		}
		p.Blobs[i].Reads = nil
	}
	slices.SortFunc(all, func(a, b step) int {
		return cmp.Or(cmp.Compare(a.Order, b.Order), cmp.Compare(a.blob, b.blob), cmp.Compare(a.Off, b.Off))
	})
	order, last := -1, -1
	for _, s := range all {
		reads := &p.Blobs[s.blob].Reads
		if n := len(*reads); s.blob == last && (*reads)[n-1].Off+(*reads)[n-1].Len == s.Off {
			(*reads)[n-1].Len += s.Len
			continue
		}
		order, last = order+1, s.blob
		*reads = append(*reads, Read{order, s.Off, s.Len})
	}
}

// Blob finds a blob by its digest.
func (p *Profile) Blob(digest string) (Blob, bool) {
	i, ok := slices.BinarySearchFunc(p.Blobs, digest, func(b Blob, d string) int { return strings.Compare(b.Digest, d) })
	if !ok {
		return Blob{}, false
	}
	return p.Blobs[i], true
}

// Bytes are how many were read.
func (b Blob) Bytes() (n int64) {
	for _, r := range b.Reads {
		n += r.Len
	}
	return n
}

// Merge makes a profile of what any of them has: what the first one has in its order, then what only the second one
// has, and so on. The same blob must have the same size everywhere.
func Merge(profiles ...*Profile) (*Profile, error) {
	blobs := make(map[string]*Blob)
	var all []Blob
	base := 0
	for _, p := range profiles {
		next := base
		for _, from := range p.Blobs {
			to := blobs[from.Digest]
			if to == nil {
				to = &Blob{Digest: from.Digest, Size: from.Size}
				blobs[from.Digest] = to
			}
			if to.Size != from.Size {
				return nil, fmt.Errorf("profile: blob %s has %d bytes in one and %d in another", from.Digest, to.Size, from.Size)
			}
			for _, r := range from.Reads {
				next = max(next, base+r.Order+1)
				to.Reads = append(to.Reads, Read{base + r.Order, r.Off, r.Len})
			}
		}
		base = next
	}
	for _, b := range blobs {
		all = append(all, *b)
	}
	return New(all)
}

// Reads are what is to be fetched, in order. Unit gives what a blob is fetched by, a chunk of a cache, and 0 for a blob
// that is not wanted: reads are made as many whole units as they touch, each of which is there once. (Without a Unit they
// are as they are.) A budget above 0 ends them before they have more bytes than that.
func (p *Profile) Reads(budget int64, unit func(digest string) int64) []Range {
	type step struct {
		order int
		unit  int64
		Range
	}
	var steps []step
	for _, b := range p.Blobs {
		u := int64(1)
		if unit != nil {
			u = unit(b.Digest)
		}
		if u <= 0 {
			continue
		}
		for _, r := range b.inUnits(u) {
			steps = append(steps, step{r.Order, u, Range{b.Digest, r.Off, r.Len}})
		}
	}
	// The blobs are sorted, and so are the reads of each.
	slices.SortStableFunc(steps, func(a, b step) int { return cmp.Compare(a.order, b.order) })
	left := budget
	if budget <= 0 {
		left = math.MaxInt64
	}
	var all []Range
	for _, s := range steps {
		wanted := s.Len
		if s.Len > left {
			s.Len = left - left%s.unit // what of its units fits
		}
		if s.Len > 0 {
			all, left = append(all, s.Range), left-s.Len
		}
		if s.Len < wanted {
			break
		}
	}
	return all
}

// inUnits are the reads, as whole units of the blob.
func (b Blob) inUnits(unit int64) []Read {
	if unit == 1 {
		return b.Reads
	}
	reads := make([]Read, len(b.Reads))
	for i, r := range b.Reads {
		off, end := r.Off-r.Off%unit, r.Off+r.Len
		if rest := end % unit; rest > 0 {
			end += min(unit-rest, b.Size-end)
		}
		reads[i] = Read{r.Order, off, end - off}
	}
	return flatten(reads)
}

// flatten makes reads of which no byte is in two: it is in that of the lowest order. They come by order, then by offset.
func flatten(reads []Read) []Read {
	reads = slices.Clone(reads)
	slices.SortFunc(reads, func(a, b Read) int { return cmp.Compare(a.Off, b.Off) })
	var flat []Read
	var begun byOrder // those that have begun, and may have ended
	for at := int64(0); len(reads) > 0 || len(begun) > 0; {
		if len(begun) == 0 {
			at = reads[0].Off
		}
		for len(reads) > 0 && reads[0].Off <= at {
			heap.Push(&begun, reads[0])
			reads = reads[1:]
		}
		first := begun[0]
		if first.Off+first.Len <= at {
			heap.Pop(&begun)
			continue
		}
		end := first.Off + first.Len
		if len(reads) > 0 {
			end = min(end, reads[0].Off)
		}
		flat = join(flat, Read{first.Order, at, end - at})
		at = end
	}
	slices.SortFunc(flat, compareReads)
	return flat
}

func compareReads(a, b Read) int {
	return cmp.Or(cmp.Compare(a.Order, b.Order), cmp.Compare(a.Off, b.Off))
}

// join appends a read, to the last one if the two are one.
func join(reads []Read, r Read) []Read {
	if n := len(reads); n > 0 && reads[n-1].Order == r.Order && reads[n-1].Off+reads[n-1].Len == r.Off {
		reads[n-1].Len += r.Len
		return reads
	}
	return append(reads, r)
}

// byOrder is a heap.
type byOrder []Read

func (h byOrder) Len() int           { return len(h) }
func (h byOrder) Less(i, j int) bool { return h[i].Order < h[j].Order }
func (h byOrder) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *byOrder) Push(r any)        { *h = append(*h, r.(Read)) }
func (h *byOrder) Pop() any {
	last := len(*h) - 1
	r := (*h)[last]
	*h = (*h)[:last]
	return r
}
