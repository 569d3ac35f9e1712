package blobcache

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"
)

// TestSizes: a blob is found by its digest and origin, whatever somebody else says of it.
func TestSizes(t *testing.T) {
	dir := t.TempDir() + "/cache"
	c := openCacheAt(t, dir, Options{ChunkSize: cs, Readahead: -1})
	for _, b := range []struct {
		size   int
		origin string
		unit   int64
	}{{10, "one", cs}, {3*cs + 1, "one", cs}, {3*cs + 1, "one", 2 * cs}, {99, "two", cs}} {
		s := newServer(b.size)
		kept := openWith(t, c, s, OpenOptions{Origin: b.origin, ChunkSize: b.unit})
		if err := readNow(ctx, kept, s, 0, int64(b.size)); err != nil {
			t.Fatal(err)
		}
	}
	sizes := func(want ...int64) {
		t.Helper()
		for i, origin := range []string{"one", "two", "three"} {
			expect := [][]int64{want[:len(want)-1], want[len(want)-1:], nil}[i]
			if got, err := c.Sizes(testDigest, origin); err != nil || !slices.Equal(got, expect) {
				t.Errorf("%s: %v, %v; want %v", origin, got, err, expect)
			}
		}
	}
	sizes(10, 3*cs+1, 99)
	if _, err := c.Sizes("sha256:short", "one"); err == nil {
		t.Error("found something that is no digest")
	}
	// A header that is damaged says nothing.
	name := dir + "/" + version + "/" + fileName(nameOf(testDigest, 10, "one"), cs)
	if err := os.Truncate(name, 100); err != nil {
		t.Fatal(err)
	}
	sizes(3*cs+1, 99)
	for digest, want := range map[string]bool{testDigest: true, testDigest[:70] + "0": false} {
		if has, err := c.Has(digest); err != nil || has != want {
			t.Errorf("%s: %v, %v", digest, has, err)
		}
	}
}

// TestSizesOfWhatIsHere: a size of which nothing is here says nothing, and one of which all is here says more than
// others.
func TestSizesOfWhatIsHere(t *testing.T) {
	c := openCacheAt(t, t.TempDir(), Options{ChunkSize: cs, Readahead: -1})
	open := func(size, read int64, want ...int64) {
		t.Helper()
		s := newServer(int(size))
		b := openWith(t, c, s, OpenOptions{Origin: "one"})
		if err := errors.Join(readNow(ctx, b, s, 0, read), b.Close()); err != nil {
			t.Fatal(err)
		}
		if got, err := c.Sizes(testDigest, "one"); err != nil || !slices.Equal(got, want) {
			t.Errorf("%v, %v; want %v", got, err, want)
		}
	}
	open(123, 0)
	if has, err := c.Has(testDigest); has || err != nil {
		t.Errorf("something is here: %v", err)
	}
	open(4*cs, cs, 4*cs)
	open(9*cs, cs, 4*cs, 9*cs)
	open(2*cs, 2*cs, 2*cs)
	open(3*cs, 3*cs, 2*cs, 3*cs)
	open(5*cs, 4*cs, 2*cs, 3*cs)
}

// A resting is a Fetcher of data that is verified by another blob, which it reads before it answers.
type resting struct {
	*server
	beneath *Blob
	waiting *sync.WaitGroup // until all have a slot
}

func (r *resting) Fetch(ctx context.Context, off, n int64) (io.ReadCloser, int64, int64, error) {
	r.waiting.Done()
	r.waiting.Wait()
	if err := r.beneath.ReadAt(ctx, make([]byte, cs), off); err != nil {
		return nil, 0, 0, err
	}
	return r.server.Fetch(ctx, off, n)
}

// TestBeneath: flights that have all the slots there are get what they verify by, and do not have to wait until it is
// said that nothing goes on.
func TestBeneath(t *testing.T) {
	stage(t, func(t *testing.T) {
		const flights = 2
		c := openCache(t, Options{ChunkSize: cs, MaxFetches: flights, Readahead: -1})
		tree := newServer(flights * cs)
		var waiting sync.WaitGroup
		waiting.Add(flights)
		data := newServer(flights * cs)
		r := &resting{data, openWith(t, c, tree, OpenOptions{Origin: "tree", Beneath: true}), &waiting}
		b, err := c.Open(testDigest, flights*cs, r, OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { b.Close() })
		began := time.Now()
		var readers sync.WaitGroup
		for i := range int64(flights) {
			readers.Go(func() {
				if err := readNow(ctx, b, data, i*cs, cs); err != nil {
					t.Error(err)
				}
			})
		}
		readers.Wait()
		if d := time.Since(began); d > 0 {
			t.Errorf("it took %v, and nobody was slow", d)
		}
		tree.checkOnce(t)
	})
}

// TestStrayFiles: what has not the name of a blob's file is in nobody's way, and stays: neither read nor counted nor
// evicted, even where a blob's header is in it.
func TestStrayFiles(t *testing.T) {
	dir := t.TempDir() + "/cache"
	o := Options{ChunkSize: cs, Readahead: -1}
	s := newServer(3 * cs)
	fillCache(t, dir, o, s)
	want, err := openCacheAt(t, dir, o).Usage()
	if err != nil {
		t.Fatal(err)
	}
	nameless := newLayout(testDigest, 3*cs, cs) // without origin
	strays := map[string][]byte{
		fileName(testDigest, cs): nameless.header(),
		"notes.4096":             []byte("mine"),
		"sha256-":                nil,
	}
	for name, content := range strays {
		if err := os.WriteFile(filepath.Join(dir, version, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c := openCacheAt(t, dir, o)
	asked := len(s.asked())
	b := openBlob(t, c, s)
	if err := errors.Join(readNow(ctx, b, s, 0, 3*cs), b.Close()); err != nil || len(s.asked()) != asked {
		t.Errorf("what is kept beside them: requests %v, %v", s.asked(), err)
	}
	if list, err := c.List(); err != nil || len(list) != 1 || list[0].Digest != testDigest || list[0].Present != 3*cs {
		t.Errorf("list: %+v, %v", list, err)
	}
	if got, err := c.Usage(); err != nil || got.Blobs != 1 || got.Occupied != want.Occupied {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
	if sizes, err := c.Sizes(testDigest, ""); err != nil || !slices.Equal(sizes, []int64{3 * cs}) {
		t.Errorf("sizes %v, %v", sizes, err)
	}
	if err := c.Verify(ctx, func(k Check) error {
		if k.Chunks != 3 || k.Damaged != 0 {
			t.Errorf("%+v", k)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if _, err := c.Remove(testDigest); err != nil {
		t.Error(err)
	}
	if _, err := c.Remove(testDigest); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("there is no more of it: %v", err)
	}
	if _, err := c.Prune(0); err != nil {
		t.Error(err)
	}
	for name, content := range strays {
		if got, err := os.ReadFile(filepath.Join(dir, version, name)); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
}
