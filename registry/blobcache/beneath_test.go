package blobcache

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// beneath opens the test's blob as one that others are verified by, and reads its first half.
func beneath(t *testing.T, c *Cache) *Blob {
	t.Helper()
	s := newServer(8 * cs)
	b := openWith(t, c, s, OpenOptions{Origin: "tree", Beneath: true})
	if err := readNow(ctx, b, s, 0, 4*cs); err != nil {
		t.Fatal(err)
	}
	return b
}

// TestBeneathGoesLast: what layers are verified by was read once, and goes after what was read since.
func TestBeneathGoesLast(t *testing.T) {
	stage(t, func(t *testing.T) {
		c := openCache(t, Options{ChunkSize: cs, Readahead: -1, MaxBytes: 2 * regionSize})
		tree := beneath(t, c)
		s := newServer(8 * regionSize)
		b := openWith(t, c, s, OpenOptions{})
		for off := int64(0); off < b.Size(); off += regionSize {
			time.Sleep(time.Second)
			if err := readNow(ctx, b, s, off, regionSize); err != nil {
				t.Fatal(err)
			}
		}
		if st := c.Stats(); st.Evictions < 5 {
			t.Errorf("%+v: the test shows nothing", st)
		}
		if !tree.ReadResident(make([]byte, 4*cs), 0) {
			t.Error("it went before what was read later")
		}
	})
}

// TestBeneathStays: other processes leave it alone, however long nobody reads it; and when it is closed, it was used
// until then, also where it was let go of.
func TestBeneathStays(t *testing.T) {
	stage(t, func(t *testing.T) {
		dir := t.TempDir()
		caches := quietCaches(t, dir, 2)
		fill := beneath(t, caches[1])
		if err := fill.Close(); err != nil {
			t.Fatal(err)
		}
		s := newServer(8 * cs)
		tree := openWith(t, caches[0], s, OpenOptions{Origin: "tree", Beneath: true}) // and reads nothing
		data := openWith(t, caches[0], s, OpenOptions{})
		if err := readNow(ctx, data, s, 0, 2*cs); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * idle)
		if freed, err := caches[1].Prune(0); err != nil || kept(t, caches[1]) != 4*cs {
			t.Errorf("%d bytes freed, %v; %d are kept, want the %d beneath", freed, err, kept(t, caches[1]), 4*cs)
		}
		time.Sleep(time.Minute)
		closed := time.Now()
		if err := errors.Join(data.Close(), tree.Close()); err != nil {
			t.Fatal(err)
		}
		list, err := caches[1].List()
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range list {
			if k.Present > 0 && k.Used.Before(closed.Truncate(time.Second)) {
				t.Errorf("%+v: closed at %v", k, closed)
			}
		}
		if _, err := caches[1].Prune(0); err != nil || kept(t, caches[1]) != 0 {
			t.Errorf("%d bytes are kept of what is closed, %v", kept(t, caches[1]), err)
		}
	})
}

// TestKeep: what somebody could not fetch again stays for as long as he has it open, although he does not read it; and is
// no newer for that.
func TestKeep(t *testing.T) {
	for _, keep := range []bool{false, true} {
		t.Run(fmt.Sprintf("keep %v", keep), func(t *testing.T) {
			stage(t, func(t *testing.T) { keepOpen(t, keep) })
		})
	}
}

func keepOpen(t *testing.T, keep bool) {
	caches := quietCaches(t, t.TempDir(), 2)
	s := newServer(3*regionSize + 5)
	fill := openWith(t, caches[1], s, OpenOptions{})
	for _, off := range []int64{0, regionSize - cs, 3 * regionSize} { // 2 regions of 4
		if err := readNow(ctx, fill, s, off, min(cs, fill.Size()-off)); err != nil {
			t.Fatal(err)
		}
	}
	if err := fill.Close(); err != nil {
		t.Fatal(err)
	}
	const here = 2*cs + 5
	used := time.Now()
	b := openWith(t, caches[0], s, OpenOptions{Keep: keep})
	if err := readNow(ctx, b, s, 0, cs); err != nil {
		t.Fatal(err)
	}
	want := map[bool]int64{true: here}[keep]
	for range 3 {
		time.Sleep(2 * idle)
		if _, err := caches[1].Prune(0); err != nil || kept(t, caches[1]) != want {
			t.Fatalf("%d bytes are kept, want %d, %v", kept(t, caches[1]), want, err)
		}
	}
	time.Sleep(2 * houseEvery) // it notices
	if present, _ := b.Present(0); present != keep || b.Stats().ChunksPresent != map[bool]int64{true: 3}[keep] {
		t.Errorf("the first chunk is said to be there: %v, with %d others", present, b.Stats().ChunksPresent-1)
	}
	if when := b.store.used.at(3); keep && (when == 0 || when > used.UnixMicro()) {
		t.Errorf("what nobody has read since %v counts as used at %d", used, when)
	}
	for _, off := range []int64{regionSize - cs, 3 * regionSize} {
		if err := readNow(ctx, b, s, off, min(cs, b.Size()-off)); err != nil {
			t.Error(err)
		}
	}
	if again := len(s.asked()) - 3; keep != (again == 0) {
		t.Errorf("%d requests after what was here", again)
	}
	if !keep {
		return
	}
	synctest.Wait() // who looks after the house just now holds the blob, too
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := caches[1].Prune(0); err != nil || kept(t, caches[1]) != 0 {
		t.Errorf("%d bytes are kept of what is closed, %v", kept(t, caches[1]), err)
	}
}
