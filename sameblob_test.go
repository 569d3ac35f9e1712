package main

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"testing"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
	"github.com/erofs-oci/erofs-oci/registry/verified"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

// A twin is a blob that is opened twice in one mount, as two layers with one digest are, in
// a cache that a test can empty.
type twin struct {
	cache *blobcache.Cache
	a, b  *layerSource
	told  chan error
}

func (p *pushed) openTwice(t *testing.T) *twin {
	t.Helper()
	client, err := registry.New(registry.Options{RegistriesConf: p.conf})
	must(t, err)
	t.Cleanup(func() { client.Close() })
	im, err := client.Resolve(t.Context(), p.ref, registry.Selector{})
	must(t, err)
	dir := t.TempDir()
	cache, err := blobcache.New(dir, blobcache.Options{Readahead: -1}) // what is being fetched is not evicted
	must(t, err)
	t.Cleanup(func() { cache.Close() })
	w := &twin{cache: cache, told: make(chan error, 2)}
	o := &layerOpener{client: client, ref: p.ref, image: im, cache: cache, dir: dir, verify: verifyAuto, log: slog.New(slog.DiscardHandler),
		say: func(string, ...any) {}, onWrong: func(err error) { w.told <- err }}
	for _, s := range []**layerSource{&w.a, &w.b} {
		*s, err = o.open(t.Context(), im.Layers[0])
		must(t, err)
		t.Cleanup(func() { (*s).Close() })
	}
	return w
}

// empty evicts all that is in the cache.
func (w *twin) empty(t *testing.T) {
	t.Helper()
	_, err := w.cache.Prune(0)
	must(t, err)
	if present, _ := w.a.Present(0); present {
		t.Fatal("the cache is not empty")
	}
}

// TestServedIsChecked: where only the whole blob can be verified, a chunk that comes as
// another one than it was served poisons the mount, whichever of the two was right. So what
// the check of the whole finds right is what was served.
func TestServedIsChecked(t *testing.T) {
	b := verifiable.Make(t, imageBytes(imageSize), verifiable.Options{})
	for _, c := range []struct {
		name        string
		first, then bool // the bytes are wrong
		whole       bool // all of it is read the first time
		same        bool
	}{
		{"wrong, then right", true, false, false, false},
		{"right, then wrong", false, true, false, false},
		{"found right, then wrong", false, true, true, false},
		{"right and evicted", false, false, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := push(t, b, false)
			lie := flips(b, 10, true).OnBlobs()
			set := func(wrong bool) {
				p.registry.SetFault(nil)
				if wrong {
					p.registry.SetFault(lie)
				}
			}
			w := p.openTwice(t)
			set(c.first)
			buf, all := make([]byte, 100), make([]byte, imageSize)
			must(t, w.a.ReadAt(t.Context(), buf, 0))
			if bytes.Equal(buf, b.Plain[:100]) == c.first {
				t.Fatal("the registry does not lie as it should")
			}
			if c.whole {
				must(t, w.a.ReadAt(t.Context(), all, 0))
				<-w.a.checked
				<-w.b.checked
				if st := w.a.status(); st.By != byBlob {
					t.Fatalf("all was read: %+v", st)
				}
			}
			w.empty(t)
			set(c.then)
			err := w.b.ReadAt(t.Context(), all, 0) // by the other one
			if c.same {
				if err != nil || !bytes.Equal(all, b.Plain) || w.a.status().Wrong != "" {
					t.Errorf("again: %v, %+v", err, w.a.status())
				}
				return
			}
			var changed *verified.ChangedError
			if !errors.As(err, &changed) || changed.Off != 0 {
				t.Errorf("again: %v", err)
			}
			for range 2 {
				var wrong *wrongError
				if err := <-w.told; !errors.As(err, &wrong) || !errors.As(err, &changed) {
					t.Errorf("told %v", err)
				}
			}
			for _, s := range []*layerSource{w.a, w.b} {
				if st := s.status(); st.By != byNothing || st.Verified != 0 || st.Wrong == "" {
					t.Errorf("%+v", st)
				}
				if err := s.ReadAt(t.Context(), buf, 500_000); exitCode(err) != exitWrong {
					t.Errorf("a read after that: %v", err)
				}
				if s.ReadResident(buf, 500_000) {
					t.Error("it is resident")
				}
				if err := s.Close(); exitCode(err) != exitWrong {
					t.Errorf("closed: %v", err)
				}
			}
		})
	}
}

// TestFoundWrong: a mount that an earlier server found wrong serves nothing, and asks for
// nothing.
func TestFoundWrong(t *testing.T) {
	for name, o := range map[string]verifiable.Options{"nothing": {}, "index": {Chunk: testChunk}} {
		b := verifiable.Make(t, imageBytes(imageSize), o)
		p := push(t, b, false)
		r, err := p.open(t, verifyAuto)
		must(t, err)
		p.reset()
		src := &opened{layers: []openedLayer{{blob: r.layerSource}}}
		before := (&wrongError{fmt.Errorf("blob %s: as was found", r.digest)}).Error()
		src.foundWrong(before)
		buf := make([]byte, 100)
		if err := r.ReadAt(t.Context(), buf, 0); err == nil || err.Error() != before || exitCode(err) != exitWrong {
			t.Errorf("%s: read: %v", name, err)
		}
		if n, _ := p.gets(); n != 0 || r.ReadResident(buf, 0) {
			t.Errorf("%s: %d GETs", name, n)
		}
		if st := src.status(); st.Layers[0].Wrong != before {
			t.Errorf("%s: %+v", name, st)
		}
		if err := r.Close(); exitCode(err) != exitWrong {
			t.Errorf("%s: closed: %v", name, err)
		}
		if r.wrong.Load() != nil {
			t.Errorf("%s: it is told again", name)
		}
	}
}
