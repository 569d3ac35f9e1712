package profile

import (
	"cmp"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
)

// A Recorder notes what is read of the blobs of an image. Its methods may be called in parallel.
type Recorder struct {
	changed chan struct{} // has a token when something was touched that nobody was told of

	from *Profile // nil, or what comes before all that is touched

	mu      sync.Mutex // guards what follows, and bits going up
	blobs   []*Touches // in the order of Recorder.Blob
	regions []region   // in the order of their first touch
}

// A region is 2 MiB of a blob, or as many whole units as fit in: of these it is known when they were first touched.
type region struct {
	blob *Touches
	n    int64
}

const (
	regionSize = 2 << 20
	// span is in how much of a blob regions lie, at most, of which it does not count which one was touched first, if they
	// were touched one after the other.
	span = 2 * regionSize
)

// NewRecorder begins a recording, or goes on with one where from is not nil.
func NewRecorder(from *Profile) *Recorder {
	return &Recorder{changed: make(chan struct{}, 1), from: from}
}

// Touches are the touched bytes of one blob.
type Touches struct {
	recorder   *Recorder
	digest     string
	size, unit int64
	perRegion  int64  // units
	touched    bitmap // units
	begun      bitmap // regions
}

// Blob adds a blob, of which reads count as whole units. It is to be called in the order of the layers. A blob that is
// there already, as where two layers are the same, is the same.
func (r *Recorder) Blob(digest string, size, unit int64) (*Touches, error) {
	if err := (&Blob{Digest: digest, Size: size}).check(); err != nil {
		return nil, fmt.Errorf("profile: %w", err)
	}
	if unit <= 0 {
		return nil, fmt.Errorf("profile: blob %s: its unit is %d", digest, unit)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, t := range r.blobs {
		if t.digest != digest {
			continue
		}
		if t.size != size || t.unit != unit {
			return nil, fmt.Errorf("profile: blob %s has %d bytes by %d, and %d by %d", digest, t.size, t.unit, size, unit)
		}
		return t, nil
	}
	if r.from != nil {
		if b, ok := r.from.Blob(digest); ok && b.Size != size {
			return nil, fmt.Errorf("profile: blob %s has %d bytes, and had %d", digest, size, b.Size)
		}
	}
	t := &Touches{recorder: r, digest: digest, size: size, unit: unit, perRegion: max(regionSize/unit, 1)}
	units := divideUp(size, unit)
	t.touched, t.begun = newBitmap(units), newBitmap(divideUp(units, t.perRegion))
	r.blobs = append(r.blobs, t)
	return t, nil
}

func divideUp(n, by int64) int64 { return n/by + min(n%by, 1) }

// Touch notes that n bytes from off are read. What was touched before costs a look at a bitmap. What does not lie in the
// blob is not noted. Nil Touches note nothing.
func (t *Touches) Touch(off int64, n int) {
	if t == nil || n <= 0 || off < 0 || int64(n) > t.size-off {
		return
	}
	first, end := off/t.unit, (off+int64(n)-1)/t.unit+1
	if !t.touched.all(first, end) {
		t.first(first, end)
	}
}

// first notes that units [first, end) are read, some for the first time.
func (t *Touches) first(first, end int64) {
	r := t.recorder
	r.mu.Lock()
	defer r.mu.Unlock()
	for u := first; u < end; u++ {
		t.touched.set(u)
		if n := u / t.perRegion; !t.begun.has(n) {
			t.begun.set(n)
			r.regions = append(r.regions, region{t, n})
		}
	}
	select {
	case r.changed <- struct{}{}:
	default:
	}
}

// Changed gives a value when something was touched for the first time since it gave the last one.
func (r *Recorder) Changed() <-chan struct{} { return r.changed }

// Profile is what was touched so far.
func (r *Recorder) Profile() (*Profile, error) {
	r.mu.Lock()
	touched, regions := r.blobs, r.regions // both only grow: who touches something new need not wait for the rest
	r.mu.Unlock()
	reads := make(map[*Touches][]Read)
	for order, g := range inOrder(touched, regions) {
		first := g.n * g.blob.perRegion
		for u := first; u < min(first+g.blob.perRegion, divideUp(g.blob.size, g.blob.unit)); u++ {
			if g.blob.touched.has(u) {
				off := u * g.blob.unit
				reads[g.blob] = join(reads[g.blob], Read{order, off, min(g.blob.unit, g.blob.size-off)})
			}
		}
	}
	var blobs []Blob
	for _, t := range touched {
		blobs = append(blobs, Blob{t.digest, t.size, reads[t]})
	}
	p, err := New(blobs)
	if err != nil || r.from == nil {
		return p, err
	}
	return Merge(r.from, p)
}

// inOrder gives the regions in the order of a profile: see the package's documentation.
func inOrder(blobs []*Touches, regions []region) []region {
	var order []region
	for _, t := range blobs {
		if len(t.begun) > 0 && t.begun.has(0) {
			order = append(order, region{t, 0})
		}
	}
	heads := len(order)
	for _, g := range regions {
		if g.n > 0 {
			order = append(order, g)
		}
	}
	for rest := order[heads:]; len(rest) > 0; {
		n := near(rest)
		slices.SortFunc(rest[:n], func(a, b region) int { return cmp.Compare(a.n, b.n) })
		rest = rest[n:]
	}
	return order
}

// near says how many regions, from the first on, lie in one span of the same blob.
func near(regions []region) (n int) {
	first := regions[0]
	most := max(span/(first.blob.perRegion*first.blob.unit), 1)
	low, high := first.n, first.n
	for n = 1; n < len(regions); n++ {
		low, high = min(low, regions[n].n), max(high, regions[n].n)
		if regions[n].blob != first.blob || high-low >= most {
			break
		}
	}
	return n
}

// A bitmap is read without a lock.
type bitmap []atomic.Uint64

func newBitmap(n int64) bitmap { return make(bitmap, divideUp(n, 64)) }

func (m bitmap) has(i int64) bool { return m[i/64].Load()>>(i%64)&1 != 0 }

func (m bitmap) set(i int64) { m[i/64].Or(1 << (i % 64)) }

// all says whether every bit of [first, end) is set.
func (m bitmap) all(first, end int64) bool {
	for first < end {
		n := min(64-first%64, end-first)
		want := ^uint64(0) >> (64 - n) << (first % 64)
		if m[first/64].Load()&want != want {
			return false
		}
		first += n
	}
	return true
}
