package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
	"github.com/erofs-oci/erofs-oci/registry/integrity"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

const testChunk = 64 << 10

// imageBytes are about as compressible as files; nothing here looks at what they mean.
func imageBytes(n int) []byte {
	rng := rand.New(rand.NewPCG(7, uint64(n)))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.IntN(8))
	}
	return b
}

// A pushed blob lies in a registry, and in a mirror of it.
type pushed struct {
	*verifiable.Blob
	registry, mirror *fakeregistry.Registry // mirror may be nil
	ref              registry.Reference
	conf             string
}

func push(t *testing.T, b *verifiable.Blob, mirrored bool) *pushed {
	t.Helper()
	p := &pushed{Blob: b}
	start := func() *fakeregistry.Registry {
		r, err := fakeregistry.New(fakeregistry.Options{})
		must(t, err)
		t.Cleanup(func() { r.Close() })
		_, err = ocipush.Push(t.Context(), r.URL(), "x:v1", b.Layers(), ocipush.Options{})
		must(t, err)
		return r
	}
	p.registry = start()
	text := ""
	if mirrored {
		p.mirror = start()
		text = fmt.Sprintf("[[registry]]\nlocation = %q\n[[registry.mirror]]\nlocation = %q\n", p.registry.Addr(), p.mirror.Addr())
	}
	p.conf = filepath.Join(t.TempDir(), "registries.conf")
	must(t, os.WriteFile(p.conf, []byte(text), 0o600))
	var err error
	p.ref, err = registry.ParseReference(p.registry.Addr() + "/x:v1")
	must(t, err)
	return p
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A reader is a layer, opened, and what it said.
type reader struct {
	*layerSource
	t     *testing.T
	wrong atomic.Pointer[error]
	told  chan struct{} // closed when it is wrong
	said  []string
	cache *blobcache.Cache
}

// open opens the first layer. What was asked for before is not counted any more.
func (p *pushed) open(t *testing.T, verify string) (*reader, error) {
	t.Helper()
	return p.openIn(t, t.TempDir(), verify, registry.Options{})
}

// openIn is open with a cache that others use.
func (p *pushed) openIn(t *testing.T, dir, verify string, options registry.Options) (*reader, error) {
	t.Helper()
	return p.openBy(t, dir, verify, options, blobcache.Options{})
}

// openBy is openIn with a cache of these options.
func (p *pushed) openBy(t *testing.T, dir, verify string, options registry.Options, keep blobcache.Options) (*reader, error) {
	t.Helper()
	options.RegistriesConf = p.conf
	client, err := registry.New(options)
	must(t, err)
	t.Cleanup(func() { client.Close() })
	im, err := client.Resolve(t.Context(), p.ref, registry.Selector{})
	must(t, err)
	cache, err := blobcache.New(dir, keep)
	must(t, err)
	t.Cleanup(func() { cache.Close() })
	p.reset()
	r := &reader{t: t, cache: cache, told: make(chan struct{})}
	o := &layerOpener{
		client: client, ref: p.ref, image: im, cache: cache, dir: dir, verify: verify, log: slog.New(slog.DiscardHandler),
		say:     func(format string, args ...any) { r.said = append(r.said, fmt.Sprintf(format, args...)) },
		onWrong: func(err error) { r.wrong.Store(&err); close(r.told) },
	}
	r.layerSource, err = o.open(t.Context(), im.Layers[0])
	if err == nil {
		t.Cleanup(func() { r.Close() })
	}
	return r, err
}

func (p *pushed) reset() {
	p.registry.ResetStats()
	if p.mirror != nil {
		p.mirror.ResetStats()
	}
}

func (p *pushed) gets() (n int, sent int64) {
	n, sent = p.registry.Stats().BlobGETs, p.registry.Stats().BlobBytes
	if p.mirror != nil {
		n, sent = n+p.mirror.Stats().BlobGETs, sent+p.mirror.Stats().BlobBytes
	}
	return n, sent
}

// readAll has several read all of it in pieces of n. Whatever comes without an error is
// what the image has; failed is how many pieces did not come.
func (r *reader) readAll(want []byte, n int) (failed int64) {
	r.t.Helper()
	if r.Size() != int64(len(want)) {
		r.t.Fatalf("%d bytes can be read, want %d", r.Size(), len(want))
	}
	var failures atomic.Int64
	var readers sync.WaitGroup
	for k := range 4 {
		readers.Go(func() {
			for off := k * n; off < len(want); off += 4 * n {
				p := make([]byte, min(n, len(want)-off))
				if err := r.ReadAt(context.Background(), p, int64(off)); err != nil {
					failures.Add(1)
				} else if !bytes.Equal(p, want[off:off+len(p)]) {
					r.t.Errorf("wrong bytes at %d reach a reader", off)
				}
			}
		})
	}
	readers.Wait()
	return failures.Load()
}

// vouchedKinds are the blobs that can be verified by parts, and by what they are.
func vouchedKinds() map[string]verifiable.Options {
	return map[string]verifiable.Options{
		"index":        {Chunk: testChunk},
		"index apart":  {Chunk: testChunk, Apart: true},
		"odd index":    {Chunk: 50_001},
		"tree":         {Verity: true},
		"both":         {Chunk: testChunk, Verity: true},
		"zstd":         {Chunk: testChunk, Zstd: true},
		"zstd apart":   {Chunk: testChunk, Zstd: true, Apart: true},
		"zstd, odd":    {Chunk: 50_001, Zstd: true},
		"zstd, a tree": {Chunk: testChunk, Zstd: true, Verity: true},
	}
}

// by is what a blob of these options is verified by, and what of it can be read.
func by(o verifiable.Options, b *verifiable.Blob) (string, []byte) {
	switch {
	case o.Chunk > 0:
		return byIndex, b.Plain
	case o.Verity:
		return byTree, b.Plain[:b.HashOffset]
	case o.Zstd:
		return byBlob, b.Plain
	}
	return byNothing, b.Plain
}

const imageSize = 1<<20 + 212_345

// TestOpenLayer: each kind is read right, opening costs one request at most, and no byte
// comes twice.
func TestOpenLayer(t *testing.T) {
	kinds := vouchedKinds()
	kinds["nothing"] = verifiable.Options{}
	for name, o := range kinds {
		t.Run(name, func(t *testing.T) {
			b := verifiable.Make(t, imageBytes(imageSize), o)
			p := push(t, b, false)
			r, err := p.open(t, verifyAuto)
			must(t, err)
			how, want := by(o, b)
			n, sent := p.gets()
			if (n != 1) != (how == byNothing) || n > 1 || sent > 256<<10 {
				t.Errorf("opening: %d GETs, %d bytes", n, sent)
			}
			if st := r.status(); st.By != how || st.Fetched != 0 || st.Verified != 0 || st.Size != int64(len(want)) {
				t.Errorf("opened: %+v", st)
			}
			if failed := r.readAll(want, 30_000); failed > 0 {
				t.Errorf("%d reads failed", failed)
			}
			total := int64(len(b.Data))
			if o.Apart {
				total += int64(len(b.Index))
			}
			extra := int64(0)
			switch {
			case o.Chunk == 50_001 && o.Zstd:
				extra = total // chunks are no units of the cache
			case o.Chunk == 50_001:
				extra = total
			}
			if _, sent := p.gets(); sent < int64(len(want))/100 || sent > total+extra {
				t.Errorf("%d bytes were sent of a blob of %d", sent, total)
			}
			if how == byNothing {
				<-r.checked
				how = byBlob
			}
			st := r.status()
			if st.By != how || st.Fetched != st.Size || st.Verified != st.Size || st.Wrong != "" {
				t.Errorf("all is read: %+v", st)
			}
			for _, bad := range [][2]int64{{-1, 1}, {st.Size, 1}, {st.Size - 1, 2}, {1 << 62, 1}} {
				if err := r.ReadAt(t.Context(), make([]byte, bad[1]), bad[0]); err == nil || r.ReadResident(make([]byte, bad[1]), bad[0]) {
					t.Errorf("%v can be read", bad)
				}
			}
			if !r.ReadResident(make([]byte, 100), 5) {
				t.Error("what is here is not resident")
			}
		})
	}
}

// flips has a bit at off of the layer's blob be wrong; always, or the first time.
func flips(b *verifiable.Blob, off int, always bool) fakeregistry.Plan {
	var met atomic.Bool
	size := len(b.Data)
	f := fakeregistry.FlipBit(int64(off))
	return func(req *http.Request) *fakeregistry.Fault {
		var first, last int
		if _, err := fmt.Sscanf(req.Header.Get("Range"), "bytes=%d-%d", &first, &last); err != nil {
			first, last = 0, size-1
		}
		if off < first || off > last || !always && met.Swap(true) {
			return nil
		}
		return &f
	}
}

// TestManInTheMiddle flips a bit of a chunk: once, always, and at a lying mirror. Never does
// a wrong byte reach a reader; what can be had right comes.
func TestManInTheMiddle(t *testing.T) {
	for name, o := range vouchedKinds() {
		b := verifiable.Make(t, imageBytes(imageSize), o)
		_, want := by(o, b)
		off := 1_000_000 // in the image
		if o.Zstd {
			off = b.Frames[5] + 20
		}
		for _, c := range []struct {
			name     string
			mirrored bool
			always   bool
			fails    bool
		}{
			{"once", false, false, false},
			{"always", false, true, true},
			{"lying mirror", true, true, false},
		} {
			t.Run(name+", "+c.name, func(t *testing.T) {
				p := push(t, b, c.mirrored)
				liar := p.registry
				if c.mirrored {
					liar = p.mirror
				}
				liar.SetFault(flips(b, off, c.always).OnBlobs())
				r, err := p.open(t, verifyRequire)
				must(t, err)
				failed := r.readAll(want, 30_000)
				if (failed > 0) != c.fails {
					t.Errorf("%d reads failed", failed)
				}
				// What fails is the cache's chunk that has the bit; where the index has no
				// unit, the two that its chunk may lie in.
				most := int64(2 * 256 << 10)
				if o.Chunk == testChunk {
					most = testChunk
				}
				if again := r.readAll(want, 1000); (again > 0) != c.fails || again > most/1000+2 {
					t.Errorf("%d reads of 1000 bytes failed", again)
				}
				if st := r.status(); st.Wrong != "" || st.Verified != st.Fetched {
					t.Errorf("%+v", st)
				}
			})
		}
	}
}

// TestWrongVouchers flips a bit of what a blob is verified by: it is fetched again, and
// refused if it stays wrong.
func TestWrongVouchers(t *testing.T) {
	for _, c := range []struct {
		name string
		o    verifiable.Options
		off  func(b *verifiable.Blob) int
	}{
		{"index", verifiable.Options{Chunk: testChunk}, func(b *verifiable.Blob) int { return b.IndexOffset + 40 }},
		{"magic of the index", verifiable.Options{Chunk: testChunk}, func(b *verifiable.Blob) int { return b.IndexOffset }},
		{"index, in spite of a tree", verifiable.Options{Chunk: testChunk, Verity: true}, func(b *verifiable.Blob) int { return b.IndexOffset + 5 }},
		{"frame of the index", verifiable.Options{Chunk: testChunk, Zstd: true}, func(b *verifiable.Blob) int { return b.IndexOffset + 1 }},
		{"superblock", verifiable.Options{Verity: true}, func(b *verifiable.Blob) int { return b.HashOffset + 8 }},
		{"salt", verifiable.Options{Verity: true}, func(b *verifiable.Blob) int { return b.HashOffset + 88 }},
		{"root of the tree", verifiable.Options{Verity: true}, func(b *verifiable.Blob) int { return b.HashOffset + 4096 + 9 }},
	} {
		b := verifiable.Make(t, imageBytes(imageSize), c.o)
		_, want := by(c.o, b)
		for _, always := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, always=%v", c.name, always), func(t *testing.T) {
				p := push(t, b, false)
				p.registry.SetFault(flips(b, c.off(b), always).OnBlobs())
				r, err := p.open(t, verifyAuto)
				if n, _ := p.gets(); n != 2 {
					t.Errorf("%d GETs, want 2", n)
				}
				if always {
					if err == nil {
						t.Fatal("opened")
					}
					return
				}
				must(t, err)
				if failed := r.readAll(want, 100_000); failed > 0 {
					t.Errorf("%d reads failed", failed)
				}
			})
		}
	}
	// A leaf of the tree is looked at when a block is verified by it.
	b := verifiable.Make(t, imageBytes(imageSize), verifiable.Options{Verity: true})
	p := push(t, b, false)
	p.registry.SetFault(flips(b, len(b.Plain)-4096, true).OnBlobs())
	r, err := p.open(t, verifyAuto)
	must(t, err)
	if err := r.ReadAt(t.Context(), make([]byte, 1000), 0); err != nil {
		t.Errorf("by another leaf: %v", err)
	}
	var m *integrity.MismatchError
	if err := r.ReadAt(t.Context(), make([]byte, 1000), int64(b.HashOffset)-1000); !errors.As(err, &m) || m.Level != 1 {
		t.Errorf("by the wrong leaf: %v", err)
	}
}

// TestPoison: without anything to verify parts by, wrong bytes are noticed when all are
// here. From then on nothing is read any more.
func TestPoison(t *testing.T) {
	b := verifiable.Make(t, imageBytes(imageSize), verifiable.Options{})
	p := push(t, b, false)
	p.registry.SetFault(flips(b, 1_000_000, true).OnBlobs())
	r, err := p.open(t, verifyAuto)
	must(t, err)
	buf := make([]byte, 100_000)
	for off := int64(0); off < imageSize-int64(len(buf)); off += int64(len(buf)) {
		if st := r.status(); st.By != byNothing || st.Verified != 0 {
			t.Fatalf("%+v", st)
		}
		// Read ahead or not: some day the last byte is here, and then this fails.
		if err := r.ReadAt(t.Context(), buf, off); err != nil {
			break
		}
	}
	if err := r.ReadAt(t.Context(), buf[:10], imageSize-10); err != nil && r.wrong.Load() == nil {
		t.Error(err)
	}
	<-r.told
	var wrong *wrongError
	if err := r.ReadAt(t.Context(), buf[:10], 0); !errors.As(err, &wrong) || exitCode(err) != exitWrong {
		t.Errorf("a read after that: %v", err)
	}
	if r.ReadResident(buf[:10], 0) {
		t.Error("it is resident")
	}
	if st := r.status(); st.By != byNothing || st.Verified != 0 || !strings.Contains(st.Wrong, r.digest) {
		t.Errorf("%+v", st)
	}
	if n, sent := p.gets(); sent != int64(len(b.Data)) {
		t.Errorf("%d GETs and %d bytes for a blob of %d", n, sent, len(b.Data))
	}
	if err := r.Close(); !errors.As(err, &wrong) {
		t.Errorf("closed: %v", err)
	}
}

// TestCloseEndsTheCheck: who closes does not wait for the whole to be read.
func TestCloseEndsTheCheck(t *testing.T) {
	b := verifiable.Make(t, imageBytes(imageSize), verifiable.Options{})
	r, err := push(t, b, false).open(t, verifyAuto)
	must(t, err)
	if failed := r.readAll(b.Plain, 1<<20); failed > 0 {
		t.Error(failed)
	}
	must(t, r.Close())
	<-r.checked
}

// TestVerifyRequire refuses what cannot be verified before a byte of it is fetched.
func TestVerifyRequire(t *testing.T) {
	b := verifiable.Make(t, imageBytes(imageSize), verifiable.Options{})
	p := push(t, b, false)
	if _, err := p.open(t, verifyRequire); !errors.Is(err, errUnverifiable) {
		t.Errorf("opened: %v", err)
	}
	if n, _ := p.gets(); n != 0 {
		t.Errorf("%d GETs", n)
	}
	unknown := verifiable.Make(t, imageBytes(imageSize), verifiable.Options{Chunk: testChunk})
	unknown.Annotations[registry.AnnotationChunkIndexType] = "application/vnd.erofs.chunk-index.v9"
	p = push(t, unknown, false)
	if _, err := p.open(t, verifyRequire); !errors.Is(err, errUnverifiable) {
		t.Errorf("with an unknown index: %v", err)
	}
	r, err := p.open(t, verifyAuto)
	must(t, err)
	if st := r.status(); st.By != byNothing {
		t.Errorf("with an unknown index: %+v", st)
	}
}

// TestVerifyOff looks at nothing: wrong bytes are read, and nobody says that they are right.
func TestVerifyOff(t *testing.T) {
	for name, o := range map[string]verifiable.Options{"index": {Chunk: testChunk}, "tree": {Verity: true}, "nothing": {}} {
		b := verifiable.Make(t, imageBytes(imageSize), o)
		p := push(t, b, false)
		p.registry.SetFault(flips(b, 1_000_000, true).OnBlobs())
		r, err := p.open(t, verifyOff)
		must(t, err)
		if n, _ := p.gets(); n != 0 {
			t.Errorf("%s: opening: %d GETs", name, n)
		}
		want := bytes.Clone(b.Data)
		want[1_000_000] ^= 1 << (1_000_000 % 8)
		if failed := r.readAll(want, 100_000); failed > 0 {
			t.Errorf("%s: %d reads failed", name, failed)
		}
		if st := r.status(); st.By != byNothing || st.Fetched != st.Size || st.Verified != 0 || st.Wrong != "" {
			t.Errorf("%s: %+v", name, st)
		}
	}
	// The frames of a compressed image have to be found all the same.
	b := verifiable.Make(t, imageBytes(imageSize), verifiable.Options{Chunk: testChunk, Zstd: true})
	r, err := push(t, b, false).open(t, verifyOff)
	must(t, err)
	if failed := r.readAll(b.Plain, 100_000); failed > 0 || r.status().By != byNothing {
		t.Errorf("zstd: %d reads failed, %+v", failed, r.status())
	}
}

// TestCompressedWhole: a compressed layer without an index is fetched whole and verified
// before anything of it is used, and this is said.
func TestCompressedWhole(t *testing.T) {
	b := verifiable.Make(t, imageBytes(imageSize), verifiable.Options{Zstd: true})
	for _, mode := range []string{verifyAuto, verifyRequire} {
		p := push(t, b, false)
		r, err := p.open(t, mode)
		must(t, err)
		if n, sent := p.gets(); n != 1 || sent != int64(len(b.Data)) {
			t.Errorf("%d GETs, %d bytes of %d", n, sent, len(b.Data))
		}
		if failed := r.readAll(b.Plain, 100_000); failed > 0 {
			t.Errorf("%d reads failed", failed)
		}
		if st := r.status(); st.By != byBlob || st.Verified != st.Size {
			t.Errorf("%+v", st)
		}
		if len(r.said) != 1 || !strings.Contains(r.said[0], "are fetched first") {
			t.Errorf("said %q", r.said)
		}
	}
	for _, off := range []int{0, 20, len(b.Data) / 2, len(b.Data) - 1} {
		p := push(t, b, false)
		p.registry.SetFault(flips(b, off, true).OnBlobs())
		// Before anything is decompressed, whose error would be another one.
		if _, err := p.open(t, verifyAuto); exitCode(err) != exitWrong || errors.Is(err, integrity.ErrCorrupt) {
			t.Errorf("bit flipped at %d: %v", off, err)
		}
		if n, _ := p.gets(); n != 2 {
			t.Errorf("bit flipped at %d: %d GETs, want 2", off, n)
		}
		for _, mirrored := range []bool{false, true} {
			p := push(t, b, mirrored)
			liar := p.registry
			if mirrored {
				liar = p.mirror
			}
			liar.SetFault(flips(b, off, mirrored).OnBlobs())
			r, err := p.open(t, verifyAuto)
			if err != nil {
				t.Errorf("bit flipped at %d, mirror %v: %v", off, mirrored, err)
			} else if failed := r.readAll(b.Plain, 100_000); failed > 0 {
				t.Errorf("bit flipped at %d, mirror %v: %d reads failed", off, mirrored, failed)
			}
		}
	}
	lies := verifiable.Make(t, imageBytes(imageSize), verifiable.Options{Zstd: true})
	lies.Annotations[registry.AnnotationUncompressedDigest] = "sha256:" + strings.Repeat("0", 64)
	if _, err := push(t, lies, false).open(t, verifyAuto); err == nil {
		t.Error("an image of another digest is opened")
	}
}

// TestIndexOfAnotherKind: an index must be of the layer's kind, and of the layer.
func TestIndexOfAnotherKind(t *testing.T) {
	raw := verifiable.Make(t, imageBytes(imageSize), verifiable.Options{Chunk: testChunk})
	raw.MediaType = registry.MediaTypeErofsZstd
	if _, err := push(t, raw, false).open(t, verifyAuto); err == nil {
		t.Error("a raw image as a compressed one")
	}
	z := verifiable.Make(t, imageBytes(imageSize), verifiable.Options{Chunk: testChunk, Zstd: true, Apart: true})
	z.MediaType = registry.MediaTypeErofs
	if _, err := push(t, z, false).open(t, verifyAuto); err == nil {
		t.Error("a compressed image as a raw one")
	}
}

// TestRecordedLayer: another server verifies as the first one did.
func TestRecordedLayer(t *testing.T) {
	for name, o := range vouchedKinds() {
		b := verifiable.Make(t, imageBytes(imageSize), o)
		p := push(t, b, false)
		client, err := registry.New(registry.Options{RegistriesConf: p.conf})
		must(t, err)
		defer client.Close()
		im, err := client.Resolve(t.Context(), p.ref, registry.Selector{})
		must(t, err)
		want, err := im.Vouched(im.Layers[0])
		must(t, err)
		rec := backend.Record{Digest: im.Layers[0].Digest.String(), Size: im.Layers[0].Size,
			Integrity: []backend.LayerIntegrity{recordedIntegrity(im, im.Layers[0])}}
		again, layers := recordedLayers(rec)
		got, err := again.Vouched(layers[0].Layer)
		must(t, err)
		if fmt.Sprint(got.Verity) != fmt.Sprint(want.Verity) || got.Compressed != want.Compressed || (got.Index == nil) != (want.Index == nil) {
			t.Errorf("%s: %+v, want %+v", name, got, want)
		}
		if got.Index != nil && (got.Index.Holder.Digest != want.Index.Holder.Digest || got.Index.Digest != want.Index.Digest ||
			got.Index.Off != want.Index.Off || got.Index.Len != want.Index.Len || got.Index.DataEnd != want.Index.DataEnd) {
			t.Errorf("%s: %+v, want %+v", name, got.Index, want.Index)
		}
	}
}
