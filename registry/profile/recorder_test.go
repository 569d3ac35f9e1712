package profile

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"testing"
)

const (
	unit   = 256 << 10
	blobMB = 64
)

// A touch is a unit of a blob.
type touch struct {
	blob int
	unit int64
}

// record has a run touch units of two blobs in order.
func record(t testing.TB, run []touch) string {
	t.Helper()
	r := NewRecorder(nil)
	blobs := twoBlobs(t, r)
	for _, x := range run {
		blobs[x.blob].Touch(x.unit*unit+5, 10)
	}
	p, err := r.Profile()
	must(t, err)
	return encoded(t, p)
}

func twoBlobs(t testing.TB, r *Recorder) []*Touches {
	t.Helper()
	a, err := r.Blob(db, blobMB<<20, unit) // the lower layer has the higher digest
	must(t, err)
	b, err := r.Blob(da, blobMB<<20, unit)
	must(t, err)
	return []*Touches{a, b}
}

// TestRecorder: units and orders, computed by hand.
func TestRecorder(t *testing.T) {
	const empty = `"A":{"size":67108864,"reads":[]}`
	for _, c := range []struct {
		name, want string
		run        []touch
	}{
		{"nothing", empty + `,"B":{"size":67108864,"reads":[]}`, nil},
		{"one unit", empty + `,"B":{"size":67108864,"reads":[[0,262144,262144]]}`, []touch{{0, 1}, {0, 1}}},
		{"a region, by offset", empty + `,"B":{"size":67108864,"reads":[[0,0,262144],[1,786432,524288],[2,1835008,262144]]}`,
			[]touch{{0, 4}, {0, 7}, {0, 0}, {0, 3}}},
		{"regions, by first touch", empty + `,"B":{"size":67108864,"reads":[[0,20971520,262144],[1,21757952,262144],[2,12582912,262144]]}`,
			[]touch{{0, 83}, {0, 48}, {0, 80}}},
		// What crosses a border comes in any order, and is one read.
		{"side by side", empty + `,"B":{"size":67108864,"reads":[[0,18612224,524288]]}`, []touch{{0, 72}, {0, 71}}},
		{"not side by side", empty + `,"B":{"size":67108864,"reads":[[0,20971520,262144],[1,16777216,262144]]}`, []touch{{0, 80}, {0, 64}}},
		{"what goes forward is one read", empty + `,"B":{"size":67108864,"reads":[[0,262144,5242880]]}`,
			[]touch{{0, 1}, {0, 2}, {0, 3}, {0, 5}, {0, 6}, {0, 4}, {0, 8}, {0, 7}, {0, 10}, {0, 9}, {0, 11}, {0, 12}, {0, 13}, {0, 14}, {0, 16}, {0, 15}, {0, 18}, {0, 17}, {0, 19}, {0, 20}}},
		// The superblocks come first, in the order of the layers.
		{"heads", `"A":{"size":67108864,"reads":[[1,0,262144],[2,4194304,262144]]},"B":{"size":67108864,"reads":[[0,0,262144]]}`,
			[]touch{{1, 16}, {1, 0}, {0, 0}}},
		{"both", `"A":{"size":67108864,"reads":[[0,12582912,262144],[2,14680064,262144]]},"B":{"size":67108864,"reads":[[1,8388608,262144]]}`,
			[]touch{{1, 48}, {0, 32}, {1, 56}}},
	} {
		if got, want := record(t, c.run), named(`{"version":1,"blobs":{`+c.want+`}}`)+"\n"; got != want {
			t.Errorf("%s:\n%swant\n%s", c.name, got, want)
		}
	}
}

// TestDeterministic: who comes first inside a region, across the border of two, or to the heads of two layers does not
// change a byte.
func TestDeterministic(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	// What the run waits for comes one after the other; what is in one step comes at the same time.
	steps := [][]touch{
		{{0, 0}, {1, 0}},
		{{0, 3}, {0, 7}},
		{{1, 9}},
		{{1, 100}, {1, 101}, {1, 102}, {1, 99}},
		{{1, 200}},
		{{0, 79}, {0, 80}},
		{{1, 110}, {1, 105}},
		{{0, 33}, {0, 40}, {0, 39}},
	}
	want := record(t, slices.Concat(steps...))
	for range 200 {
		var run []touch
		for _, step := range steps {
			rng.Shuffle(len(step), func(i, j int) { step[i], step[j] = step[j], step[i] })
			run = append(run, step...)
		}
		if got := record(t, run); got != want {
			t.Fatalf("%v:\n%swant\n%s", run, got, want)
		}
	}
	// It does depend on the order of what is far apart.
	slices.Reverse(steps)
	if record(t, slices.Concat(steps...)) == want {
		t.Error("the reverse is the same")
	}
}

// TestTouchEdges: ranges of many units, the short last one, and what does not lie in the blob.
func TestTouchEdges(t *testing.T) {
	const size = 10*unit + 100
	for _, c := range []struct {
		off  int64
		n    int
		want []Read
	}{
		{0, 0, nil}, {-1, 1, nil}, {size, 1, nil}, {size - 1, 2, nil}, {1<<63 - 1, 1, nil}, {0, -1, nil},
		{0, 1, []Read{{0, 0, unit}}},
		{unit - 1, 1, []Read{{0, 0, unit}}},
		{unit - 1, 2, []Read{{0, 0, 2 * unit}}},
		{size - 1, 1, []Read{{0, 10 * unit, 100}}},
		{0, size, []Read{{0, 0, size}}},
	} {
		r := NewRecorder(nil)
		b, err := r.Blob(da, size, unit)
		must(t, err)
		b.Touch(c.off, c.n)
		p, err := r.Profile()
		must(t, err)
		if got := p.Blobs[0].Reads; !slices.Equal(got, c.want) {
			t.Errorf("%d bytes at %d: %v, want %v", c.n, c.off, got, c.want)
		}
		select {
		case <-r.Changed():
			if c.want == nil {
				t.Errorf("%d bytes at %d: changed", c.n, c.off)
			}
		default:
			if c.want != nil {
				t.Errorf("%d bytes at %d: not changed", c.n, c.off)
			}
		}
		b.Touch(c.off, c.n)
		select {
		case <-r.Changed():
			t.Errorf("%d bytes at %d: changed by what was touched before", c.n, c.off)
		default:
		}
	}
	var none *Touches
	none.Touch(0, 1)
}

// TestRecorderBlobs: the same layer twice is one; what cannot be is refused.
func TestRecorderBlobs(t *testing.T) {
	r := NewRecorder(parsed(t, `{"version":1,"blobs":{"B":{"size":9,"reads":[]}}}`))
	one, err := r.Blob(da, 100, 4096)
	must(t, err)
	if two, err := r.Blob(da, 100, 4096); err != nil || two != one {
		t.Errorf("again: %p, %p, %v", one, two, err)
	}
	if _, err := r.Blob(da, 99, 4096); err == nil {
		t.Error("of another size")
	}
	if _, err := r.Blob(da, 100, 8192); err == nil {
		t.Error("of another unit")
	}
	if _, err := r.Blob(db, 10, 4096); err == nil {
		t.Error("of another size than recorded")
	}
	if _, err := r.Blob(digestOf("c"), 10, 0); err == nil {
		t.Error("without a unit")
	}
	if _, err := r.Blob("x", 10, 1); err == nil {
		t.Error("without a digest")
	}
	empty, err := r.Blob(digestOf("d"), 0, 4096)
	must(t, err)
	empty.Touch(0, 1)
	_, err = r.Profile()
	must(t, err)
}

// TestResume: a recording that goes on has what was there first, then what is new.
func TestResume(t *testing.T) {
	from := parsed(t, `{"version":1,"blobs":{"A":{"size":1048576,"reads":[[0,524288,262144]]},"B":{"size":9,"reads":[[1,0,9]]}}}`)
	r := NewRecorder(from)
	b, err := r.Blob(da, 1<<20, unit)
	must(t, err)
	b.Touch(0, 1)
	b.Touch(2*unit, 1)
	p, err := r.Profile()
	must(t, err)
	if got, want := encoded(t, p), named(`{"version":1,"blobs":{"A":{"size":1048576,"reads":[[0,524288,262144],[2,0,262144]]},"B":{"size":9,"reads":[[1,0,9]]}}}`)+"\n"; got != want {
		t.Errorf("%swant\n%s", got, want)
	}
}

// TestRecorderRace: whatever many readers touch is there, and only that, while others look.
func TestRecorderRace(t *testing.T) {
	r := NewRecorder(nil)
	blobs := twoBlobs(t, r)
	const units = blobMB << 20 / unit
	var readers, looker sync.WaitGroup
	stop := make(chan struct{})
	looker.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-r.Changed():
			}
			if _, err := r.Profile(); err != nil {
				t.Error(err)
			}
		}
	})
	for i := range 8 {
		readers.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 5))
			for range 4000 {
				blobs[rng.IntN(2)].Touch(3*rng.Int64N((units+2)/3)*unit, 1+rng.IntN(unit))
			}
			for u := int64(i) * 3; u < units; u += 24 { // now all of them
				blobs[0].Touch(u*unit, 1)
				blobs[1].Touch(u*unit, 1)
			}
		})
	}
	readers.Wait()
	close(stop)
	looker.Wait()
	p, err := r.Profile()
	must(t, err)
	for _, b := range p.Blobs {
		if got, want := b.Bytes(), int64((units+2)/3*unit); got != want {
			t.Errorf("%s: %d bytes, want %d", b.Digest, got, want)
		}
	}
}

// TestProfileDoesNotStopReaders: what makes a profile of what was touched does not have those wait who touch something.
func TestProfileDoesNotStopReaders(t *testing.T) {
	const units = 1 << 19
	r := NewRecorder(nil)
	b, err := r.Blob(da, units*4096, 4096)
	must(t, err)
	for u := int64(0); u < units; u += 2 {
		b.Touch(u*4096, 1)
	}
	done := make(chan error)
	go func() {
		p, err := r.Profile()
		if err == nil && len(p.Blobs[0].Reads) != units/2 {
			err = fmt.Errorf("%d reads", len(p.Blobs[0].Reads))
		}
		done <- err
	}()
	for free, held := 0, 0; ; runtime.Gosched() {
		select {
		case err := <-done:
			must(t, err)
			if held > free/10 {
				t.Errorf("of %d looks %d found it locked", free+held, held)
			}
			return
		default:
		}
		if r.mu.TryLock() {
			free++
			r.mu.Unlock()
		} else {
			held++
		}
	}
}

// BenchmarkTouch: what a recorded read costs that touches nothing new, and what one costs that is not recorded.
func BenchmarkTouch(b *testing.B) {
	blobs := twoBlobs(b, NewRecorder(nil))
	for _, c := range []struct {
		blob *Touches
		n    int
	}{{nil, 4096}, {blobs[0], 4096}, {blobs[0], 1 << 20}} {
		b.Run(fmt.Sprintf("recorded=%v,bytes=%d", c.blob != nil, c.n), func(b *testing.B) {
			b.ReportAllocs()
			c.blob.Touch(0, blobMB<<20)
			for i := 0; b.Loop(); i++ {
				c.blob.Touch(int64(i&1023)<<15, c.n)
			}
		})
	}
}
