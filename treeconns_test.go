package main

import (
	"bytes"
	"context"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

// TestTreeConnections reads an image with a tree of two parts over fewer connections than
// there are readers, from empty and from filled caches: nobody keeps a connection and waits
// for another one to get a part of the tree. No byte comes twice.
func TestTreeConnections(t *testing.T) {
	const mib = 1 << 20
	image := imageBytes(40 * mib)
	b := verifiable.Make(t, image, verifiable.Options{Verity: true})
	for _, c := range []struct{ conns, readers int }{{1, 1}, {1, 8}, {2, 16}, {registry.DefaultMaxConns, 16}} {
		p := push(t, b, false)
		p.registry.SetLatency(5 * time.Millisecond)
		dir := t.TempDir()
		for _, cached := range []bool{false, true} {
			client, err := registry.New(registry.Options{RegistriesConf: p.conf, MaxConnsPerHost: c.conns, ErrorWait: 10 * time.Second})
			must(t, err)
			im, err := client.Resolve(t.Context(), p.ref, registry.Selector{})
			must(t, err)
			cache, err := blobcache.New(dir, blobcache.Options{})
			must(t, err)
			o := &layerOpener{client: client, ref: p.ref, image: im, cache: cache, dir: dir, verify: verifyRequire, log: slog.New(slog.DiscardHandler),
				say: func(string, ...any) {}, onWrong: func(err error) { t.Error(err) }}
			p.reset()
			s, err := o.open(t.Context(), im.Layers[0])
			must(t, err)
			var readers sync.WaitGroup
			for k := range int64(c.readers) {
				readers.Go(func() {
					buf := make([]byte, mib)
					for at := k; at < 40; at += int64(c.readers) {
						if err := s.ReadAt(context.Background(), buf, at*mib); err != nil {
							t.Errorf("%+v: at %d MiB: %v", c, at, err)
						} else if !bytes.Equal(buf, image[at*mib:(at+1)*mib]) {
							t.Errorf("%+v: at %d MiB: wrong bytes", c, at)
						}
					}
				})
			}
			readers.Wait()
			n, sent := p.gets()
			most := int64(len(b.Data))
			if cached {
				most = int64(len(b.Data) - len(image)) // of the tree, if of anything
			}
			if sent > most {
				t.Errorf("%+v, cached %v: %d GETs, %d bytes; want %d at most", c, cached, n, sent, most)
			}
			must(t, s.Close())
			must(t, cache.Close())
			must(t, client.Close())
		}
	}
}

// TestTreeWithoutRanges: a server that answers each request with the whole blob sends the tree behind it, too, so that a
// body that goes on and on takes the only connection for as long as parts of the tree are needed to verify it.
func TestTreeWithoutRanges(t *testing.T) {
	const mib = 1 << 20
	image := imageBytes(100 * mib)
	b := verifiable.Make(t, image, verifiable.Options{Verity: true})
	for name, size := range map[string]int64{"kept": 0, "no room": 1} {
		t.Run(name, func(t *testing.T) {
			p := push(t, b, false)
			p.registry.SetFault(fakeregistry.NoRanges().OnBlobs())
			r, err := p.openBy(t, t.TempDir(), verifyRequire, registry.Options{MaxConnsPerHost: 1, ErrorWait: 3 * time.Second}, blobcache.Options{MaxBytes: size})
			must(t, err)
			last := []byte{0}
			must(t, r.ReadAt(t.Context(), last, int64(len(image))-1))
			if last[0] != image[len(image)-1] {
				t.Error("wrong byte")
			}
			if size > 0 {
				return // each read costs as much
			}
			if failed := r.readAll(image, mib); failed > 0 {
				t.Errorf("%d reads failed", failed)
			}
			// Of the four parts of the tree, of the body that turns out to be the whole blob, and of the one that is read.
			if n, _ := p.gets(); n > 6 {
				t.Errorf("%d GETs, want 6 at most", n)
			}
		})
	}
}

// TestTreeFromTheFront is the same from the first byte on: that it is the whole blob shows later.
func TestTreeFromTheFront(t *testing.T) {
	const mib = 1 << 20
	image := imageBytes(100 * mib)
	b := verifiable.Make(t, image, verifiable.Options{Verity: true})
	p := push(t, b, false)
	p.registry.SetFault(fakeregistry.NoRanges().OnBlobs())
	r, err := p.openIn(t, t.TempDir(), verifyRequire, registry.Options{MaxConnsPerHost: 1, ErrorWait: 3 * time.Second})
	must(t, err)
	if failed := r.readAll(image, mib); failed > 0 {
		t.Errorf("%d reads failed", failed)
	}
}
