package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
	"github.com/erofs-oci/erofs-oci/tests/require"
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
	free     string // --cache-min-free
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
	o := &sourceOptions{ref: ref, client: s.options, cacheDir: s.dir, verify: s.verify, keep: keepOptions{size: s.size, minFree: s.free}}
	o.selector.Blob = s.blob
	if offline {
		o.goOffline()
	}
	s.said.Reset()
	s.log.Reset()
	s.registry.ResetStats()
	p := &program{stderr: &s.said, stdout: io.Discard, getenv: func(string) string { return "" }}
	o.client.Logger = slog.New(slog.NewTextHandler(&s.log, nil))
	opened, err := p.open(s.t.Context(), o, o.client.Logger)
	if err == nil {
		opened.remember()
	}
	return opened, err
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

// refused has the image be refused offline, without a request, by a line that says why.
func (s *shelf) refused(want error, texts ...string) {
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

// TestOfflineRefused: what cannot be found without the registry is one line that says so.
func TestOfflineRefused(t *testing.T) {
	index := verifiable.Options{Chunk: testChunk}
	s := newShelf(t, index)
	if _, err := s.open(true); err == nil || oneLine(err) != "cache directory "+s.dir+" does not exist; look at --cache-dir" {
		t.Errorf("a directory that is not there: %v", err)
	}
	must(t, os.Mkdir(s.dir, 0o700))
	s.refused(errNeverMounted, s.ref, "not mounted before")
	if left, err := os.ReadDir(s.dir); err != nil || len(left) > 0 {
		t.Errorf("there is %v now; %v", left, err)
	}
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
	other.refused(errNeverMounted, other.ref)
	other.ref = s.registry.Addr() + "/y:v1"
	other.refused(errNeverMounted, other.ref)
	other.ref = s.ref
	other.options.SkipTLSVerify = true // what a stranger may have said is not what this one said
	other.refused(errNeverMounted, other.ref)
	other = *s
	other.blob = digest.FromString("not here")
	other.refused(errOffline, other.blob.String())
}

// TestOfflineGone: so is an image of which something is missing without which nothing can be read.
func TestOfflineGone(t *testing.T) {
	for what, text := range map[string]string{"manifest": ": it is not kept on this machine, and", "index": "layer 0: blob %s: its chunk index: it is not kept"} {
		s := newShelf(t, verifiable.Options{Chunk: testChunk})
		o := s.mustOpen(false)
		gone := map[string]digest.Digest{"manifest": o.image.Digest, "index": digest.FromBytes(s.blobs[0].Index)}[what]
		must(t, o.Close())
		s.removeKept(gone.String())
		s.refused(errOffline, strings.Replace(text, "%s", o.layers[0].Digest.String(), 1))
	}
	s := newShelf(t, verifiable.Options{Verity: true})
	o := s.mustOpen(false)
	must(t, o.Close())
	s.removeKept(o.layers[0].Digest.String())
	s.refused(errOffline, "layer 0: ", "the beginning of its dm-verity tree: it is not kept")
	s = newShelf(t, verifiable.Options{Zstd: true})
	o = s.mustOpen(false)
	must(t, o.Close())
	s.removeKept(digest.FromBytes(s.blobs[0].Data).String())
	s.refused(errOffline, "are missing")
}

// TestOfflineTexts: what went since, and what was damaged, was not "not mounted before".
func TestOfflineTexts(t *testing.T) {
	s := newShelf(t, verifiable.Options{})
	s.fill()
	for _, path := range s.records() {
		must(t, os.WriteFile(path, []byte("{}"), 0o600))
	}
	if _, err := s.open(true); !errors.Is(err, errOffline) || !strings.Contains(err.Error(), "the record is damaged: it is not kept") {
		t.Errorf("a damaged record: %v", err)
	}
	s.fill()
	o := s.mustOpen(true)
	// Its file is there, and nothing of it: what evicts does so.
	_, err := o.cache.Prune(0)
	must(t, err)
	if _, err := s.open(true); !errors.Is(err, errOffline) || strings.Count(err.Error(), "kept") != 1 {
		t.Errorf("an evicted manifest: %v", err)
	}
}

// TestOfflineReadOnly: a cache that cannot be written cannot be used; what can be done is said.
func TestOfflineReadOnly(t *testing.T) {
	require.Has(t, "root")
	s := newShelf(t, verifiable.Options{})
	top := t.TempDir()
	must(t, unix.Mount("tmpfs", top, "tmpfs", 0, "mode=700"))
	t.Cleanup(func() { must(t, unix.Unmount(top, 0)) })
	s.dir = filepath.Join(top, "cache")
	s.fill()
	must(t, unix.Mount("", top, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	if _, err := s.open(true); !errors.Is(err, unix.EROFS) || !strings.Contains(err.Error(), "name a directory that you can write with --cache-dir") {
		t.Errorf("%v", err)
	}
}

// TestOfflineWaitsForNobody: what another process fetches, from a registry that does not answer, is not here.
func TestOfflineWaitsForNobody(t *testing.T) {
	s := newShelf(t, verifiable.Options{})
	online := s.mustOpen(false)
	asked, hold := make(chan struct{}), make(chan struct{})
	var once sync.Once
	s.registry.SetFault(fakeregistry.Plan(func(*http.Request) *fakeregistry.Fault {
		once.Do(func() { close(asked) })
		return &fakeregistry.Fault{After: 10, Stall: hold}
	}).OnBlobs())
	var reader sync.WaitGroup
	reader.Go(func() {
		if err := online.layers[0].blob.ReadAt(context.Background(), make([]byte, 10), 0); err != nil {
			t.Errorf("online: %v", err)
		}
	})
	<-asked
	o := s.mustOpen(true)
	began := time.Now()
	if err := o.layers[0].blob.ReadAt(t.Context(), make([]byte, 10), 0); !errors.Is(err, errOffline) {
		t.Errorf("offline: %v", err)
	}
	if d := time.Since(began); d > 10*time.Second { // others wait for 20 s
		t.Errorf("it took %v to fail", d)
	}
	close(hold)
	reader.Wait()
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

	// What somebody says of its size counts where nobody knows better.
	o := s.mustOpen(true)
	plainBlob, err := o.client.Blob(o.ref.registry, o.layers[0].Descriptor)
	must(t, err)
	lie := func(size, read int64) {
		t.Helper()
		b, err := o.cache.Open(d.String(), size, pattern(size), blobcache.OpenOptions{Origin: plain(plainBlob)})
		must(t, err)
		must(t, errors.Join(b.ReadAt(t.Context(), make([]byte, read), 0), b.Close()))
	}
	lie(123, 0)
	lie(2<<20, 1) // of which not all is here
	if failed := s.readAll(s.mustOpen(true)); failed > 0 {
		t.Errorf("%d reads failed", failed)
	}
	lie(124, 124)
	if _, err := s.open(true); err == nil || !strings.Contains(err.Error(), "2 different sizes") {
		t.Errorf("two of them are here: %v", err)
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

// TestMovedTagUnread: a tag that leads to something of which nothing could be read, or was only looked at, is not what it
// led to the last time; it is when that was read.
func TestMovedTagUnread(t *testing.T) {
	for name, kind := range map[string]verifiable.Options{"nothing": {}, "index": {Chunk: testChunk}, "whole": {Zstd: true}} {
		s := newShelf(t, kind)
		s.options.PlainHTTP = true // as the commands have it
		s.fill()
		old := s.want[0]
		b := verifiable.Make(t, imageBytes(imageSize/2), kind)
		_, err := ocipush.Push(t.Context(), s.registry.URL(), "x:v1", b.Layers(), ocipush.Options{})
		must(t, err)
		leadsTo := func(want []byte, after string) {
			t.Helper()
			s.want = [][]byte{want}
			o, err := s.open(true)
			if err != nil {
				t.Fatalf("%s, after %s: %v", name, after, err)
			}
			if failed := s.readAll(o); failed > 0 {
				t.Errorf("%s, after %s: %d reads failed", name, after, failed)
			}
			must(t, o.Close())
		}
		command := func(args ...string) (code int) {
			s.registry.ResetStats()
			code = run(append(append([]string{"erofs-oci"}, args...), "--plain-http", "--on-error=wait:50ms", "--cache-dir="+s.dir, s.ref), strings.NewReader(""), io.Discard, io.Discard)
			if s.registry.Stats().ManifestGETs != 1 {
				t.Errorf("%q did not ask", args)
			}
			return code
		}
		s.registry.SetFault(fakeregistry.Always(fakeregistry.Fault{Status: 503}).OnBlobs())
		if command("ls") == 0 {
			t.Error("listed")
		}
		leadsTo(old, "ls")
		s.registry.SetFault(nil)
		if command("inspect") != 0 {
			t.Error("inspect failed")
		}
		leadsTo(old, "inspect")
		s.want = [][]byte{b.Plain}
		s.fill()
		leadsTo(b.Plain, "a mount")
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
	log, err := p.newLog(logOptions{})
	must(t, err)
	t.Cleanup(p.closeLog)
	metering, err := resumeMetering(rec.Access, log.Logger)
	must(t, err)
	again, _, err := p.openRecorded(t.Context(), rec, "", metering, log)
	must(t, err)
	if failed := s.readAll(again); failed > 0 {
		t.Errorf("%d reads failed", failed)
	}
	s.prune() // it holds the documents, as the first server did
	must(t, s.mustOpen(true).Close())
	must(t, again.Close())
	if n := door.called(); n != 0 {
		t.Errorf("somebody came %d times", n)
	}
}

// TestOfflineStays: nobody takes from a mount with --offline what it could not have again, whether it has read that or
// not; until it ends.
func TestOfflineStays(t *testing.T) {
	for name, kind := range map[string]verifiable.Options{
		"plain": {}, "index": {Chunk: testChunk}, "zstd": {Chunk: testChunk, Zstd: true}, "tree": {Verity: true}, "whole": {Zstd: true},
	} {
		t.Run(name, func(t *testing.T) {
			s := newShelf(t, kind)
			s.fill()
			o := s.mustOpen(true)
			s.prune()
			if failed := s.readAll(o); failed > 0 {
				t.Errorf("%d reads failed after somebody pruned", failed)
			}
			again := s.mustOpen(true) // a server that takes over
			must(t, again.Close())
			must(t, o.Close())
			s.prune()
			if _, err := s.open(true); err == nil {
				t.Error("all of it stays, although nothing is mounted")
			}
		})
	}
}
