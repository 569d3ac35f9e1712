package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"

	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

// A shelf is an image of one or more layers in a registry, and a cache.
type shelf struct {
	t        *testing.T
	registry *fakeregistry.Registry
	blobs    []*verifiable.Blob
	want     [][]byte // of each layer
	ref      string
	dir      string // of the cache
	options  registry.Options
	verify   string
	size     string // --cache-size
	blob     digest.Digest
	said     bytes.Buffer
	log      bytes.Buffer
}

func newShelf(t *testing.T, kinds ...verifiable.Options) *shelf {
	t.Helper()
	return newShelfAt(t, fakeregistry.Options{}, ocipush.Options{}, kinds...)
}

func newShelfAt(t *testing.T, o fakeregistry.Options, push ocipush.Options, kinds ...verifiable.Options) *shelf {
	t.Helper()
	s := &shelf{t: t, dir: filepath.Join(t.TempDir(), "cache"), verify: verifyAuto}
	var err error
	s.registry, err = fakeregistry.New(o)
	must(t, err)
	t.Cleanup(func() { s.registry.Close() })
	var layers []ocipush.Layer
	for i, kind := range kinds {
		b := verifiable.Make(t, imageBytes(imageSize+i), kind)
		_, want := by(kind, b)
		s.blobs, s.want = append(s.blobs, b), append(s.want, want)
		layers = append(layers, b.Layers()...)
	}
	_, err = ocipush.Push(t.Context(), s.registry.URL(), "x:v1", layers, push)
	must(t, err)
	s.ref = s.registry.Addr() + "/x:v1"
	s.options = registry.Options{RegistriesConf: filepath.Join(t.TempDir(), "registries.conf")}
	must(t, os.WriteFile(s.options.RegistriesConf, nil, 0o600))
	return s
}

// open opens the image as mount does. What was asked for before is not counted any more.
func (s *shelf) open(offline bool) (*opened, error) {
	s.t.Helper()
	ref, err := parseRef(s.ref)
	must(s.t, err)
	o := &sourceOptions{ref: ref, client: s.options, cacheDir: s.dir, verify: s.verify, keep: keepOptions{size: s.size}}
	o.selector.Blob = s.blob
	if offline {
		o.goOffline()
	}
	s.said.Reset()
	s.log.Reset()
	s.registry.ResetStats()
	p := &program{stderr: &s.said, stdout: io.Discard, getenv: func(string) string { return "" }}
	return p.open(s.t.Context(), o, slog.New(slog.NewTextHandler(&s.log, nil)))
}

func (s *shelf) mustOpen(offline bool) *opened {
	s.t.Helper()
	o, err := s.open(offline)
	must(s.t, err)
	s.t.Cleanup(func() { o.Close() })
	return o
}

// readAll reads all layers, and says how many pieces failed. What comes is right.
func (s *shelf) readAll(o *opened) (failed int) {
	s.t.Helper()
	for i, l := range o.layers {
		want := s.want[i]
		if l.blob.Size() != int64(len(want)) {
			s.t.Fatalf("layer %d has %d bytes, want %d", i, l.blob.Size(), len(want))
		}
		for off := 0; off < len(want); off += 100_000 {
			p := make([]byte, min(100_000, len(want)-off))
			if err := l.blob.ReadAt(context.Background(), p, int64(off)); err != nil {
				failed++
			} else if !bytes.Equal(p, want[off:off+len(p)]) {
				s.t.Errorf("layer %d: wrong bytes at %d", i, off)
			}
		}
	}
	return failed
}

// fill reads the image once, and all of it.
func (s *shelf) fill() {
	s.t.Helper()
	o := s.mustOpen(false)
	if failed := s.readAll(o); failed > 0 {
		s.t.Fatalf("%d reads failed", failed)
	}
	must(s.t, o.Close())
}

// requests are how many came but for those that find out what the registry speaks.
func (s *shelf) requests() (n int) {
	for _, r := range s.registry.Requests() {
		if r.Path != "/v2/" {
			n++
		}
	}
	return n
}

// allKinds are those of layers: verified by parts, as a whole, or whole before anything is read.
func allKinds() map[string][]verifiable.Options {
	kinds := map[string][]verifiable.Options{"nothing": {{}}, "zstd, whole": {{Zstd: true}}}
	var several []verifiable.Options
	for name, o := range vouchedKinds() {
		kinds[name] = []verifiable.Options{o}
		several = append(several, o)
	}
	kinds["several"] = append(several, verifiable.Options{}, verifiable.Options{Zstd: true})
	return kinds
}

// TestSecondMount: what was read costs nothing the next time; a tag costs the GET that says where it leads now, a
// digest not even that.
func TestSecondMount(t *testing.T) {
	for name, kinds := range allKinds() {
		t.Run(name, func(t *testing.T) {
			s := newShelf(t, kinds...)
			s.fill()
			o := s.mustOpen(false)
			if failed := s.readAll(o); failed > 0 {
				t.Errorf("%d reads failed", failed)
			}
			if st := s.registry.Stats(); st.ManifestGETs != 1 || s.requests() != 1 {
				t.Errorf("the tag: %+v, want one GET of a manifest", st)
			}
			byDigest, err := registry.ParseReference(s.ref)
			must(t, err)
			byDigest.Tag, byDigest.Digest = "", o.image.Digest
			s.ref = byDigest.String()
			if failed := s.readAll(s.mustOpen(false)); failed > 0 {
				t.Errorf("%d reads failed", failed)
			}
			if n := s.requests(); n != 0 {
				t.Errorf("the digest: %d requests", n)
			}
		})
	}
}

// TestFirstMountCostsNoMore: what is kept beside a layer is fetched as before, in as many requests, and no byte more.
func TestFirstMountCostsNoMore(t *testing.T) {
	for name, c := range map[string]struct {
		kind verifiable.Options
		sent func(b *verifiable.Blob) int
	}{
		"index":       {verifiable.Options{Chunk: testChunk}, func(b *verifiable.Blob) int { return len(b.Data) - b.IndexOffset }},
		"index apart": {verifiable.Options{Chunk: testChunk, Apart: true}, func(b *verifiable.Blob) int { return len(b.Index) }},
		"tree":        {verifiable.Options{Verity: true}, func(b *verifiable.Blob) int { return len(b.Data) - b.HashOffset }},
		"both":        {verifiable.Options{Chunk: testChunk, Verity: true}, func(b *verifiable.Blob) int { return len(b.Data) - b.IndexOffset }},
		"zstd":        {verifiable.Options{Chunk: testChunk, Zstd: true}, func(b *verifiable.Blob) int { return len(b.Data) - b.IndexOffset }},
		"zstd, whole": {verifiable.Options{Zstd: true}, func(b *verifiable.Blob) int { return len(b.Data) }},
	} {
		s := newShelf(t, c.kind)
		s.mustOpen(false)
		if st := s.registry.Stats(); st.BlobGETs != 1 || st.BlobBytes != int64(c.sent(s.blobs[0])) || st.ManifestGETs != 1 {
			t.Errorf("%s: %+v, want one GET of %d bytes", name, st, c.sent(s.blobs[0]))
		}
	}
}

// TestManyOpenAtOnce: those who begin at the same time fetch what they need beside the layers once between them.
func TestManyOpenAtOnce(t *testing.T) {
	for name, kind := range map[string]verifiable.Options{"index": {Chunk: testChunk}, "tree": {Verity: true}, "whole": {Zstd: true}} {
		s := newShelf(t, kind)
		s.registry.SetLatency(20 * time.Millisecond)
		ref, err := parseRef(s.ref)
		must(t, err)
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() {
				p := &program{stderr: io.Discard, stdout: io.Discard, getenv: func(string) string { return "" }}
				o, err := p.open(t.Context(), &sourceOptions{ref: ref, client: s.options, cacheDir: s.dir, verify: verifyAuto}, slog.New(slog.DiscardHandler))
				if err != nil {
					t.Error(err)
					return
				}
				if err := o.Close(); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if st := s.registry.Stats(); st.BlobGETs != 1 {
			t.Errorf("%s: %+v, want one GET of a blob", name, st)
		}
	}
}

// TestKeptOfWholeAnswers: a server that knows no ranges sends more than is to be kept.
func TestKeptOfWholeAnswers(t *testing.T) {
	for name, kinds := range allKinds() {
		if name == "several" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			s := newShelf(t, kinds...)
			s.registry.SetFault(fakeregistry.NoRanges().OnBlobs())
			s.fill()
			s.registry.Stop()
			if failed := s.readAll(s.mustOpen(true)); failed > 0 {
				t.Errorf("%d reads failed: %s", failed, s.log.String())
			}
		})
	}
}

// A doorman counts who comes to where the registry was.
type doorman struct {
	net.Listener
	mu    sync.Mutex // guards what follows
	calls int
}

func stand(t *testing.T, addr string) *doorman {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	must(t, err)
	d := &doorman{Listener: l}
	var end sync.WaitGroup
	end.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			d.mu.Lock()
			d.calls++
			d.mu.Unlock()
			c.Close()
		}
	})
	t.Cleanup(func() { l.Close(); end.Wait() })
	return d
}

func (d *doorman) called() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.calls
}

// TestOffline: an image that is all here needs no registry, and nobody tries to reach it.
func TestOffline(t *testing.T) {
	for name, kinds := range allKinds() {
		t.Run(name, func(t *testing.T) {
			s := newShelf(t, kinds...)
			s.fill()
			s.registry.Stop()
			door := stand(t, s.registry.Addr())
			o := s.mustOpen(true)
			if failed := s.readAll(o); failed > 0 {
				t.Errorf("%d reads failed: %s", failed, s.log.String())
			}
			for i, l := range o.layers {
				l.blob.settle(t.Context())
				if st := l.blob.status(); st.Wrong != "" || st.Fetched != st.Size || st.By == byNothing {
					t.Errorf("layer %d: %+v", i, st)
				}
			}
			if said := s.said.String(); strings.Contains(said, "is here") {
				t.Errorf("said %q", said)
			}
			must(t, o.Close())
			if n := door.called(); n != 0 {
				t.Errorf("somebody came %d times", n)
			}
		})
	}
}

// TestOfflineIncomplete: what is here is read, what is not fails at once, and it is said before.
func TestOfflineIncomplete(t *testing.T) {
	for name, kind := range map[string]verifiable.Options{"nothing": {}, "index": {Chunk: testChunk}, "tree": {Verity: true}, "zstd": {Chunk: testChunk, Zstd: true}} {
		t.Run(name, func(t *testing.T) {
			s := newShelf(t, kind)
			s.options.ErrorWait = time.Minute
			o := s.mustOpen(false)
			p := make([]byte, 1000)
			must(t, o.layers[0].blob.ReadAt(t.Context(), p, 0))
			must(t, o.Close())
			o = s.mustOpen(true)
			if !strings.Contains(s.said.String(), "erofs-oci: layer 0: ") || !strings.Contains(s.said.String(), "% of it is here; reads of the rest fail\n") || strings.Count(s.said.String(), "\n") != 1 {
				t.Errorf("said %q", s.said.String())
			}
			l := o.layers[0].blob
			must(t, l.ReadAt(t.Context(), p, 0))
			if !bytes.Equal(p, s.want[0][:1000]) {
				t.Error("wrong bytes")
			}
			began := time.Now()
			if err := l.ReadAt(t.Context(), p, l.Size()-1000); !errors.Is(err, errOffline) || strings.Contains(err.Error(), "\n") {
				t.Errorf("what is not here: %v", err)
			}
			if d := time.Since(began); d > 10*time.Second {
				t.Errorf("it took %v to fail", d)
			}
			if n := s.registry.Stats().Requests; n != 0 {
				t.Errorf("%d requests", n)
			}
		})
	}
}

// TestOfflineRefused: what cannot be found without the registry is one line that says so.
func TestOfflineRefused(t *testing.T) {
	refused := func(s *shelf, want error, texts ...string) {
		s.t.Helper()
		o, err := s.open(true)
		if err == nil {
			o.Close()
			s.t.Error("opened")
			return
		}
		line := oneLine(err)
		if !errors.Is(err, want) || exitCode(err) != exitFailure {
			s.t.Errorf("%v", err)
		}
		for _, text := range append(texts, "--offline") {
			if !strings.Contains(line, text) {
				s.t.Errorf("%q does not say %q", line, text)
			}
		}
		if n := s.registry.Stats().Requests; n != 0 {
			s.t.Errorf("%d requests", n)
		}
	}
	index := verifiable.Options{Chunk: testChunk}
	s := newShelf(t, index)
	refused(s, errNeverMounted, s.ref, "not mounted before")
	s.fill()
	s.mustOpen(true)
	s.registry.Stop()
	if _, err := s.open(false); err == nil || !strings.Contains(err.Error(), "--offline takes what it led to the last time") {
		t.Errorf("without --offline: %v", err)
	}
	other := *s
	other.ref = s.registry.Addr() + "/x:v2"
	if _, err := other.open(false); err == nil || strings.Contains(err.Error(), "--offline") {
		t.Errorf("what was never mounted, without --offline: %v", err)
	}
	refused(&other, errNeverMounted, other.ref)
	other.ref = s.registry.Addr() + "/y:v1"
	refused(&other, errNeverMounted, other.ref)
	other.ref = s.ref
	other.options.SkipTLSVerify = true // what a stranger may have said is not what this one said
	refused(&other, errNeverMounted, other.ref)
	other = *s
	other.blob = digest.FromString("not here")
	refused(&other, errOffline, other.blob.String())

	for _, what := range []string{"manifest", "index"} {
		s := newShelf(t, index)
		o := s.mustOpen(false)
		gone := map[string]digest.Digest{"manifest": o.image.Digest, "index": digest.FromBytes(s.blobs[0].Index)}[what]
		must(t, o.Close())
		s.removeKept(gone.String())
		refused(s, errOffline)
	}
	s = newShelf(t, verifiable.Options{Zstd: true})
	o := s.mustOpen(false)
	must(t, o.Close())
	s.removeKept(digest.FromBytes(s.blobs[0].Data).String())
	refused(s, errOffline, "are missing")
}

func (s *shelf) removeKept(d string) {
	s.t.Helper()
	c, err := blobcache.New(s.dir, blobcache.Options{})
	must(s.t, err)
	defer c.Close()
	_, err = c.Remove(d)
	must(s.t, err)
}

// TestOfflineBlob: a blob that is in no manifest is found by what is kept of it.
func TestOfflineBlob(t *testing.T) {
	s := newShelf(t, verifiable.Options{})
	data := imageBytes(300_000)
	d, err := ocipush.PushBlob(t.Context(), s.registry.URL(), "x", ocipush.Bytes(registry.MediaTypeErofs, data), ocipush.Options{})
	must(t, err)
	s.blob, s.want = d, [][]byte{data}
	s.fill()
	if failed := s.readAll(s.mustOpen(true)); failed > 0 {
		t.Errorf("%d reads failed", failed)
	}
	if n := s.registry.Stats().Requests; n != 0 {
		t.Errorf("%d requests", n)
	}
}

// TestMovedTag: the new image online, the last known one offline.
func TestMovedTag(t *testing.T) {
	s := newShelf(t, verifiable.Options{Chunk: testChunk})
	s.fill()
	old := s.want[0]
	b := verifiable.Make(t, imageBytes(imageSize/2), verifiable.Options{Chunk: testChunk})
	_, err := ocipush.Push(t.Context(), s.registry.URL(), "x:v1", b.Layers(), ocipush.Options{})
	must(t, err)
	for _, c := range []struct {
		offline bool
		want    []byte
	}{{true, old}, {false, b.Plain}, {true, b.Plain}} {
		s.want = [][]byte{c.want}
		o := s.mustOpen(c.offline)
		if failed := s.readAll(o); failed > 0 {
			t.Errorf("offline %v: %d reads failed", c.offline, failed)
		}
		must(t, o.Close())
	}
}

// files are those below the cache, by what they are of.
func (s *shelf) files(match func(path string, info fs.FileInfo) bool) (found []string) {
	s.t.Helper()
	must(s.t, filepath.Walk(s.dir, func(path string, info fs.FileInfo, err error) error {
		if err == nil && info.Mode().IsRegular() && match(path, info) {
			found = append(found, path)
		}
		return err
	}))
	return found
}

// TestKeptGoesBad: a bit that flips on disk, in whatever is kept beside a layer, is noticed. Online the right bytes are
// fetched, offline there is an error; never is there a wrong byte.
func TestKeptGoesBad(t *testing.T) {
	const base = 2 << 20 // where a blob begins in its file
	named := func(d digest.Digest) func(string, fs.FileInfo) bool {
		return func(path string, _ fs.FileInfo) bool {
			return strings.HasPrefix(filepath.Base(path), strings.Replace(d.String(), ":", "-", 1))
		}
	}
	treeSize := func(b *verifiable.Blob) int64 { return base + int64(len(b.Data)-b.HashOffset) }
	for name, c := range map[string]struct {
		kind  verifiable.Options
		which func(s *shelf, manifest digest.Digest) func(string, fs.FileInfo) bool
		at    int64 // in the file
		opens bool  // offline
	}{
		"manifest": {verifiable.Options{}, func(_ *shelf, m digest.Digest) func(string, fs.FileInfo) bool { return named(m) }, base + 20, false},
		"index": {verifiable.Options{Chunk: testChunk}, func(s *shelf, _ digest.Digest) func(string, fs.FileInfo) bool {
			return named(digest.FromBytes(s.blobs[0].Index))
		}, base + 50, false},
		"root of the tree": {verifiable.Options{Verity: true}, func(s *shelf, _ digest.Digest) func(string, fs.FileInfo) bool {
			return func(path string, info fs.FileInfo) bool { return info.Size() == treeSize(s.blobs[0]) }
		}, base + 4096 + 9, false},
		"zstd, whole": {verifiable.Options{Zstd: true}, func(s *shelf, _ digest.Digest) func(string, fs.FileInfo) bool {
			return named(digest.FromBytes(s.blobs[0].Data))
		}, base + 300_000, false},
		"record": {verifiable.Options{}, func(s *shelf, _ digest.Digest) func(string, fs.FileInfo) bool {
			return func(path string, _ fs.FileInfo) bool { return filepath.Base(filepath.Dir(path)) == "references" }
		}, 70, false},
	} {
		t.Run(name, func(t *testing.T) {
			for _, online := range []bool{true, false} {
				s := newShelf(t, c.kind)
				s.fill()
				o := s.mustOpen(true)
				files := s.files(c.which(s, o.image.Digest))
				must(t, o.Close())
				if len(files) != 1 {
					t.Fatalf("found %q", files)
				}
				f, err := os.OpenFile(files[0], os.O_RDWR, 0)
				must(t, err)
				var b [1]byte
				_, err = f.ReadAt(b[:], c.at)
				must(t, err)
				b[0] ^= 8
				_, err = f.WriteAt(b[:], c.at)
				must(t, errors.Join(err, f.Close()))
				if online {
					// What is damaged is fetched again, and kept: then it is there offline, too.
					for _, offline := range []bool{false, true} {
						o := s.mustOpen(offline)
						if failed := s.readAll(o); failed > 0 {
							t.Errorf("offline %v: %d reads failed", offline, failed)
						}
						must(t, o.Close())
					}
					continue
				}
				s.registry.Stop()
				if o, err := s.open(true); err == nil {
					t.Error("opened offline")
					o.Close()
				} else if !errors.Is(err, errOffline) && !errors.Is(err, errNeverMounted) {
					t.Errorf("offline: %v", err)
				}
			}
		})
	}
}

// A liar brings what is not right.
type liar struct{ data []byte }

func (l liar) Fetch(_ context.Context, off, n int64) (io.ReadCloser, int64, int64, error) {
	return io.NopCloser(bytes.NewReader(l.data[off : off+n])), off, int64(len(l.data)), nil
}

// TestKeptWasWrong: what an earlier mount kept of a server that sent wrong bytes is found out, removed and fetched
// again; offline it is an error, and the wrong bytes are gone.
func TestKeptWasWrong(t *testing.T) {
	for name, c := range map[string]struct {
		kind verifiable.Options
		part func(s *shelf, o *layerOpener, source *layerSource, b *remoteBlob, v registry.Vouched) (*throughCache, error)
		at   int
	}{
		"index": {verifiable.Options{Chunk: testChunk}, func(s *shelf, o *layerOpener, source *layerSource, b *remoteBlob, v registry.Vouched) (*throughCache, error) {
			return o.indexHolder(source, b, *v.Index)
		}, 50},
		"tree": {verifiable.Options{Verity: true}, func(s *shelf, o *layerOpener, source *layerSource, b *remoteBlob, v registry.Vouched) (*throughCache, error) {
			return o.treeHolder(source, b, *v.Verity)
		}, 4096 + 9},
		"whole": {verifiable.Options{Zstd: true}, func(s *shelf, o *layerOpener, source *layerSource, b *remoteBlob, v registry.Vouched) (*throughCache, error) {
			return o.wholeHolder(source, b)
		}, 300_000},
	} {
		t.Run(name, func(t *testing.T) {
			for _, offline := range []bool{false, true} {
				s := newShelf(t, c.kind)
				o := s.mustOpen(false)
				opener := &layerOpener{client: o.client, ref: o.ref.registry, image: o.image, cache: o.cache, dir: o.dir, verify: verifyAuto, log: slog.New(slog.DiscardHandler)}
				blob, err := opener.blob(o.image.Layers[0].Descriptor)
				must(t, err)
				v, err := o.image.Vouched(o.image.Layers[0])
				must(t, err)
				source := &layerSource{}
				holder, err := c.part(s, opener, source, blob, v)
				must(t, err)
				part := holder.part
				must(t, errors.Join(holder.Close(), o.Close()))
				s.lie(part, c.at)

				o, err = s.open(offline)
				if !offline {
					must(t, err)
					if failed := s.readAll(o); failed > 0 {
						t.Errorf("%d reads failed", failed)
					}
					must(t, o.Close())
					if !strings.Contains(s.log.String(), "is removed") {
						t.Errorf("log: %s", s.log.String())
					}
					s.fill() // which keeps it anew
					o, err = s.open(true)
					must(t, err)
					if failed := s.readAll(o); failed > 0 {
						t.Errorf("offline after that: %d reads failed", failed)
					}
					must(t, o.Close())
					continue
				}
				if err == nil {
					t.Error("opened offline")
					o.Close()
				} else if !errors.Is(err, errOffline) {
					t.Errorf("offline: %v", err)
				}
			}
		})
	}
}

// TestLeafWasWrong: a part of a tree that was kept wrong is found out while many read, of whom some read another part
// at that moment. All of them get what they want.
func TestLeafWasWrong(t *testing.T) {
	const mib, readers = 1 << 20, 16
	image := imageBytes(40 * mib)
	b := verifiable.Make(t, image, verifiable.Options{Verity: true})
	s := newShelf(t, verifiable.Options{})
	_, err := ocipush.Push(t.Context(), s.registry.URL(), "x:v1", b.Layers(), ocipush.Options{})
	must(t, err)
	s.blobs = []*verifiable.Blob{b}
	o := s.mustOpen(false)
	part := o.layers[0].blob.beside[0].part
	must(t, o.Close())
	if part.size <= 256<<10 {
		t.Fatalf("the tree has %d bytes, which is one part", part.size)
	}
	s.lie(part, int(part.size)-5000)
	o = s.mustOpen(false)
	var all sync.WaitGroup
	for k := range readers {
		all.Go(func() {
			p := make([]byte, mib)
			for at := k * mib; at < len(image); at += readers * mib {
				if err := o.layers[0].blob.ReadAt(context.Background(), p, int64(at)); err != nil {
					t.Errorf("at %d: %v", at, err)
				} else if !bytes.Equal(p, image[at:at+mib]) {
					t.Errorf("wrong bytes at %d", at)
				}
			}
		})
	}
	all.Wait()
	must(t, o.Close())
	if !strings.Contains(s.log.String(), "is removed") {
		t.Error("nothing was found out")
	}
}

// lie has the cache keep the part as a server would send it that changed a bit.
func (s *shelf) lie(part keptPart, at int) {
	s.t.Helper()
	bad := bytes.Clone(s.blobs[0].Data[part.off:])[:part.size]
	bad[at] ^= 1
	c, err := blobcache.New(s.dir, blobcache.Options{})
	must(s.t, err)
	defer c.Close()
	_, err = c.Remove(part.digest)
	must(s.t, err)
	b, err := c.Open(part.digest, part.size, liar{bad}, blobcache.OpenOptions{ChunkSize: part.unit, Origin: part.origin})
	must(s.t, err)
	must(s.t, b.ReadAt(s.t.Context(), make([]byte, part.size), 0))
	must(s.t, b.Close())
}

// TestKeptUntilTheEnd: what an image needs beside its layers counts as used until the mount ends, so that it does not go
// before them. What of it went all the same is kept once more.
func TestKeptUntilTheEnd(t *testing.T) {
	s := newShelf(t, verifiable.Options{Chunk: testChunk})
	s.fill()
	used := func() (documents, index time.Time) {
		t.Helper()
		c, err := blobcache.New(s.dir, blobcache.Options{})
		must(t, err)
		defer c.Close()
		list, err := c.List()
		must(t, err)
		for _, k := range list {
			switch k.Digest {
			case digest.FromBytes(s.blobs[0].Index).String():
				index = k.Used
			case digest.FromBytes(s.blobs[0].Data).String():
			default:
				documents = k.Used
			}
		}
		return documents, index
	}
	o := s.mustOpen(false)
	began := time.Now().Truncate(time.Second)
	await := time.NewTimer(time.Until(began.Add(1100 * time.Millisecond))) // times of use are whole seconds
	<-await.C
	must(t, o.layers[0].blob.ReadAt(t.Context(), make([]byte, 10), imageSize-10))
	must(t, o.Close())
	if documents, index := used(); !documents.After(began) || !index.After(began) {
		t.Errorf("mounted at %v; documents were used at %v, the index at %v", began, documents, index)
	}

	s = newShelf(t, verifiable.Options{})
	o = s.mustOpen(false)
	_, err := o.cache.Prune(0)
	must(t, err)
	if _, err := s.open(true); !errors.Is(err, errOffline) {
		t.Errorf("the test proves nothing: %v", err)
	}
	must(t, o.Close())
	s.mustOpen(true)
	if !strings.Contains(s.said.String(), "layer 0: 0% of it is here") {
		t.Errorf("said %q", s.said.String())
	}
}

// TestReattachedOffline: a server that takes over a mount that was made offline asks nobody, either.
func TestReattachedOffline(t *testing.T) {
	s := newShelf(t, verifiable.Options{Chunk: testChunk}, verifiable.Options{Verity: true})
	s.options.RegistriesConf = "" // as a server has it
	s.fill()
	s.registry.Stop()
	door := stand(t, s.registry.Addr())
	o := s.mustOpen(true)
	rec := backend.Record{Reference: o.ref.String(), NBD: json.RawMessage("[{},{}]"),
		Access: backend.Access{CacheDir: s.dir, OnError: "wait:60s", Offline: true, Username: "somebody"}}
	o.record(&rec)
	must(t, o.Close())
	p := &program{stderr: &s.said, stdout: io.Discard, getenv: func(string) string { return "" }}
	log := newServerLog(io.Discard)
	metering, err := resumeMetering(rec.Access, log.Logger)
	must(t, err)
	t.Cleanup(func() { must(t, metering.Close()) })
	again, _, err := p.openRecorded(t.Context(), rec, "", metering, log)
	must(t, err)
	if failed := s.readAll(again); failed > 0 {
		t.Errorf("%d reads failed", failed)
	}
	must(t, again.Close())
	if n := door.called(); n != 0 {
		t.Errorf("somebody came %d times", n)
	}
}

// TestNothingKept: a cache without any room is no reason not to mount, and costs no request more at the beginning.
func TestNothingKept(t *testing.T) {
	for name, kinds := range allKinds() {
		if name == "several" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			s := newShelf(t, kinds...)
			s.size = "1"
			for range 2 {
				o := s.mustOpen(false)
				if st := s.registry.Stats(); st.BlobGETs > 1 {
					t.Errorf("%+v", st)
				}
				if failed := s.readAll(o); failed > 0 {
					t.Errorf("%d reads failed", failed)
				}
				must(t, o.Close())
			}
			if _, err := s.open(true); !errors.Is(err, errOffline) {
				t.Errorf("offline: %v", err)
			}
		})
	}
}

// TestRecordsHoldNoSecret: nothing below the cache has what a private registry was told.
func TestRecordsHoldNoSecret(t *testing.T) {
	const name, password = "somebody", "correct horse battery"
	auth := "Basic " + "c29tZWJvZHk6Y29ycmVjdCBob3JzZSBiYXR0ZXJ5"
	s := newShelfAt(t, fakeregistry.Options{Auth: fakeregistry.Basic, Username: name, Password: password}, ocipush.Options{Authorization: auth}, verifiable.Options{Chunk: testChunk})
	s.options.Username, s.options.Password, s.options.PlainHTTP = name, password, true
	s.fill()
	records := 0
	for _, path := range s.files(func(string, fs.FileInfo) bool { return true }) {
		raw, err := os.ReadFile(path)
		must(t, err)
		for _, secret := range []string{name, password, "horse", strings.TrimPrefix(auth, "Basic ")} {
			if bytes.Contains(raw, []byte(secret)) {
				t.Errorf("%s has %q", path, secret)
			}
		}
		info, err := os.Stat(path)
		must(t, err)
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		if filepath.Base(filepath.Dir(path)) == "references" {
			records++
		}
	}
	if records != 1 {
		t.Errorf("%d records", records)
	}
	// Who the user is does not matter where nobody is asked.
	s.options.Username, s.options.Password = "", ""
	if failed := s.readAll(s.mustOpen(true)); failed > 0 {
		t.Errorf("%d reads failed", failed)
	}
}

// TestPruneForgets: records of images that are not kept any more go with them.
func TestPruneForgets(t *testing.T) {
	s := newShelf(t, verifiable.Options{})
	s.fill()
	records := func() int {
		return len(s.files(func(path string, _ fs.FileInfo) bool { return filepath.Base(filepath.Dir(path)) == "references" }))
	}
	cache := func(args ...string) {
		t.Helper()
		var stderr bytes.Buffer
		if code := run(append([]string{"erofs-oci", "cache"}, args...), strings.NewReader(""), io.Discard, &stderr); code != 0 {
			t.Errorf("cache %q: %s", args, stderr.String())
		}
	}
	o := s.mustOpen(true)
	manifest, layer := o.image.Digest, o.image.Layers[0].Digest
	must(t, o.Close())
	cache("rm", "--cache-dir="+s.dir, layer.String())
	if n := records(); n != 1 {
		t.Errorf("the layer is removed: %d records", n)
	}
	cache("rm", "--cache-dir="+s.dir, manifest.String())
	if n := records(); n != 0 {
		t.Errorf("the manifest is removed: %d records", n)
	}
	s.fill()
	cache("prune", "--cache-dir="+s.dir)
	if n := records(); n != 0 {
		t.Errorf("all is removed: %d records", n)
	}
}
