package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

// mustOpen opens the first layer, with a cache that others use.
func (p *pushed) mustOpen(t *testing.T, dir, verify string) *reader {
	t.Helper()
	r, err := p.openIn(t, dir, verify, registry.Options{})
	must(t, err)
	return r
}

// TestPoisonShared: two mounts of one blob share a cache, and both find it wrong. Nothing
// of it is left.
func TestPoisonShared(t *testing.T) {
	b := verifiable.Make(t, imageBytes(imageSize), verifiable.Options{})
	p := push(t, b, false)
	p.registry.SetFault(flips(b, 300_000, true).OnBlobs())
	dir := t.TempDir()
	first, second := p.mustOpen(t, dir, verifyAuto), p.mustOpen(t, dir, verifyAuto)
	buf := make([]byte, 100)
	for off := int64(0); off < imageSize-100; off += 100_000 {
		for _, r := range []*reader{first, second} {
			// Read ahead or not: some day the last byte is here, and then this fails.
			var wrong *wrongError
			if err := r.ReadAt(t.Context(), buf, off); err != nil && !errors.As(err, &wrong) {
				t.Error(err)
			}
		}
	}
	<-first.told
	<-second.told
	for _, r := range []*reader{first, second} {
		if err := r.Close(); exitCode(err) != exitWrong {
			t.Errorf("closed: %v", err)
		}
	}
	cache, err := blobcache.New(dir, blobcache.Options{})
	must(t, err)
	defer cache.Close()
	list, err := cache.List()
	must(t, err)
	if len(list) > 0 {
		t.Errorf("kept: %+v", list)
	}
}

// TestStrangersShareNothing: what one registry sent unverified is not read by who mounts the
// same blob from another, and what was let in without a look is not shown to who verifies.
func TestStrangersShareNothing(t *testing.T) {
	for name, o := range map[string]verifiable.Options{
		"nothing": {}, "index": {Chunk: testChunk}, "odd index": {Chunk: 50_001}, "tree": {Verity: true},
	} {
		t.Run(name, func(t *testing.T) {
			b := verifiable.Make(t, imageBytes(imageSize), o)
			evil, good := push(t, b, false), push(t, b, false)
			evil.registry.SetFault(flips(b, 10, true).OnBlobs())
			dir := t.TempDir()
			buf := make([]byte, 100)
			e := evil.mustOpen(t, dir, verifyOff)
			must(t, e.ReadAt(t.Context(), buf, 0))
			if bytes.Equal(buf, b.Plain[:100]) {
				t.Error("the test proves nothing: right bytes came")
			}
			g := good.mustOpen(t, dir, verifyAuto)
			if st := g.status(); st.Fetched != 0 || st.Verified != 0 {
				t.Errorf("before any read: %+v", st)
			}
			must(t, g.ReadAt(t.Context(), buf, 0))
			if !bytes.Equal(buf, b.Plain[:100]) {
				t.Error("wrong bytes of another registry")
			}
			list, err := g.cache.List()
			must(t, err)
			image, beside := 0, 0
			for _, k := range list {
				switch {
				case k.Digest == g.digest && k.Size > imageSize/2:
					image++
				case k.Digest == g.digest && o.Verity, o.Chunk > 0 && k.Size == int64(len(b.Index)):
					beside++ // the parts of the tree, and the index, which has a digest of its own
				default:
					t.Errorf("kept: %+v", k)
				}
			}
			if image != 2 || (beside == 1) != (o.Verity || o.Chunk > 0) || beside > 1 {
				t.Errorf("%d images and %d indexes or trees are kept, want 2 images", image, beside)
			}
		})
	}
}

// TestNextMount: a later mount fetches nothing that lies there, index and tree included, and counts as verified what
// it has looked at.
func TestNextMount(t *testing.T) {
	for name, o := range vouchedKinds() {
		t.Run(name, func(t *testing.T) {
			b := verifiable.Make(t, imageBytes(imageSize), o)
			_, want := by(o, b)
			p := push(t, b, false)
			dir := t.TempDir()
			r := p.mustOpen(t, dir, verifyAuto)
			if failed := r.readAll(want, 30_000); failed > 0 {
				t.Fatal(failed)
			}
			must(t, r.Close())
			r = p.mustOpen(t, dir, verifyAuto)
			if st := r.status(); st.Fetched != st.Size || st.Verified != 0 {
				t.Errorf("before any read: %+v", st)
			}
			if failed := r.readAll(want, 30_000); failed > 0 {
				t.Error(failed)
			}
			if n, _ := p.gets(); n != 0 {
				t.Errorf("%d GETs", n)
			}
			st, all := r.status(), int64(len(want))
			if o.Zstd || o.Chunk == 50_001 && !o.Verity {
				all = 0 // what lies there is what came out of the verification; its chunks are not looked at again
			}
			if st.Verified != all {
				t.Errorf("all is read: %+v, want %d verified", st, all)
			}
		})
	}
}

// TestWrongThenRight: wrong bytes that were read, and come right when they are fetched anew,
// are noticed though the whole is right in the end.
func TestWrongThenRight(t *testing.T) {
	b := verifiable.Make(t, imageBytes(imageSize), verifiable.Options{})
	p := push(t, b, false)
	p.registry.SetFault(flips(b, 10, true).OnBlobs())
	r := p.mustOpen(t, t.TempDir(), verifyAuto)
	buf := make([]byte, imageSize)
	must(t, r.ReadAt(t.Context(), buf[:100], 0))
	if bytes.Equal(buf[:100], b.Plain[:100]) {
		t.Error("the test proves nothing: right bytes came")
	}
	p.registry.SetFault(nil)
	_, err := r.cache.Prune(0)
	must(t, err)
	var wrong *wrongError
	if err := r.ReadAt(t.Context(), buf, 0); err != nil && !errors.As(err, &wrong) {
		t.Error(err)
	}
	<-r.told
	if err := r.ReadAt(t.Context(), buf[:10], 0); !errors.As(err, &wrong) || !errors.Is(err, errChanged) {
		t.Errorf("a read after that: %v", err)
	}
}

// TestWholeAgain: a check of the whole that the network ended is not taken for one that was
// made, and a blob of which parts were fetched anew is checked anew.
func TestWholeAgain(t *testing.T) {
	b := verifiable.Make(t, imageBytes(imageSize), verifiable.Options{})
	p := push(t, b, false)
	r, err := p.openIn(t, t.TempDir(), verifyAuto, registry.Options{ErrorWait: 2 * time.Second})
	must(t, err)
	evict := func() {
		t.Helper()
		_, err := r.cache.Prune(0)
		must(t, err)
		if st := r.status(); st.Fetched > 0 {
			t.Fatalf("not all was evicted: %+v", st)
		}
	}
	if failed := r.readAll(b.Plain, 1<<20); failed > 0 {
		t.Fatal(failed)
	}
	<-r.checked
	if st := r.status(); st.By != byBlob || st.Verified != imageSize {
		t.Errorf("%+v", st)
	}
	evict()
	p.registry.SetFault(fakeregistry.Always(fakeregistry.Fault{Status: 503}).OnBlobs())
	if r.checkWhole() || r.layerSource.wrong.Load() != nil {
		t.Error("a check that the network ended is taken for one that was made")
	}
	p.registry.SetFault(flips(b, 10, true).OnBlobs())
	buf := make([]byte, imageSize)
	must(t, r.ReadAt(t.Context(), buf[:100], 0))
	if passed, _ := r.cached.Passed(0); passed {
		t.Error("what was fetched anew, and is not the same, has passed")
	}
	var wrong *wrongError
	if err := r.ReadAt(t.Context(), buf, 0); err != nil && !errors.As(err, &wrong) {
		t.Error(err)
	}
	<-r.told
	if st := r.status(); st.By != byNothing || st.Verified != 0 || !strings.Contains(st.Wrong, r.digest) {
		t.Errorf("%+v", st)
	}
}
