package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
	"github.com/erofs-oci/erofs-oci/registry/integrity"
	"github.com/erofs-oci/erofs-oci/registry/profile"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

// Nothing can be fetched where nothing may be asked for.
func TestPrefetchOffline(t *testing.T) {
	for args, want := range map[string]string{
		"--prefetch=all --offline": "--offline and --prefetch=all exclude each other", "--prefetch=none --offline": "", "--offline": "", "--prefetch=meta": "",
	} {
		app := &cli.App{Flags: append(prefetchFlags(), &cli.BoolFlag{Name: "offline"}), Action: func(c *cli.Context) error {
			_, err := readPrefetchOptions(c)
			return err
		}}
		err := app.Run(append([]string{"test"}, strings.Fields(args)...))
		if want == "" && err != nil || want != "" && (err == nil || exitCode(err) != exitUsage || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", args, err, want)
		}
	}
}

// prefetching has a layer fetched in the background until the test ends.
func (r *reader) prefetching(how prefetchOptions) *prefetcher {
	r.t.Helper()
	o := &opened{cache: r.cache, layers: []openedLayer{{blob: r.layerSource}}}
	o.startPrefetch(how, slog.New(slog.DiscardHandler))
	r.t.Cleanup(o.prefetch.Close)
	return o.prefetch
}

// Everything that can be read of a layer is fetched once, whatever it is verified by, and no more.
func TestPrefetchKinds(t *testing.T) {
	kinds := vouchedKinds()
	kinds["nothing"] = verifiable.Options{}
	for name, kind := range kinds {
		t.Run(name, func(t *testing.T) {
			const size = 3 << 20
			p := push(t, verifiable.Make(t, imageBytes(size), kind), false)
			r, err := p.open(t, verifyAuto)
			must(t, err)
			_, opening := p.gets()
			f := r.prefetching(prefetchOptions{mode: prefetchAll})
			f.done.Wait()
			if st := f.Status(); st.State != backend.PrefetchDone || st.Fetched != r.Size() || st.Wanted != r.Size() {
				t.Errorf("%+v of %d bytes", st, r.Size())
			}
			gets, sent := p.gets()
			// Chunks of an odd index are more than the cache wants, at both ends.
			most := int64(len(p.Data))
			if strings.Contains(name, "odd") {
				most += int64(2 * gets * 50_001)
			}
			if sent-opening > most {
				t.Errorf("%d bytes came of a blob of %d", sent-opening, len(p.Data))
			}
			if failed := r.readAll(p.Plain[:r.Size()], 100_000); failed > 0 {
				t.Errorf("%d reads failed", failed)
			}
			if now, _ := p.gets(); now != gets {
				t.Errorf("reading took %d GETs", now-gets)
			}
		})
	}
}

// What is in the budget is fetched, to the last chunk that fits, and nothing else; what is here costs nothing.
func TestPrefetchBudget(t *testing.T) {
	const size = 10<<20 + 5
	p := push(t, verifiable.Make(t, imageBytes(size), verifiable.Options{Chunk: testChunk}), false)
	for _, c := range []struct{ here, budget, want int64 }{
		{0, 1, 0}, {0, testChunk - 1, 0}, {0, testChunk, testChunk}, {0, 5<<20 + 1000, 5 << 20}, {0, size - 1, size - 5}, {0, size, size}, {0, size + 1, size},
		{2 << 20, 3 << 20, 5 << 20},
	} {
		r, err := p.open(t, verifyAuto)
		must(t, err)
		must(t, r.cached.Prefetch(t.Context(), 0, c.here))
		f := r.prefetching(prefetchOptions{mode: prefetchAll, bytes: c.budget})
		f.done.Wait()
		st, here := f.Status(), size-r.absent(0, size)
		// The first chunk is looked at for metadata, of which there is none.
		if want := c.want; here != want {
			t.Errorf("%+v: %d bytes are here, want %d: %+v", c, here, want, st)
		}
		if over := c.want < size; (st.State == backend.PrefetchStopped) != over || over && !strings.Contains(st.Error, "--prefetch-budget") {
			t.Errorf("%+v: %+v", c, st)
		}
		must(t, r.Close())
	}
}

// A layer that is in an image twice is fetched, and counted, once.
func TestPrefetchOfALayerTwice(t *testing.T) {
	const size = 3 << 20
	p := push(t, verifiable.Make(t, imageBytes(size), verifiable.Options{Chunk: testChunk}), false)
	r, err := p.open(t, verifyAuto)
	must(t, err)
	o := &opened{cache: r.cache, layers: []openedLayer{{blob: r.layerSource}, {blob: r.layerSource}}}
	o.startPrefetch(prefetchOptions{mode: prefetchAll}, slog.New(slog.DiscardHandler))
	defer o.prefetch.Close()
	o.prefetch.done.Wait()
	if st := o.prefetch.Status(); st.State != backend.PrefetchDone || st.Wanted != size || st.Fetched != size {
		t.Errorf("%+v, want %d bytes", st, size)
	}
}

// A cache fetches units, and those that are larger than a piece count whole, and once.
func TestPrefetchBudgetOfLargeUnits(t *testing.T) {
	const size, unit = 18<<20 + 5, 8 << 20
	p := push(t, verifiable.Make(t, imageBytes(size), verifiable.Options{Chunk: unit}), false)
	for _, c := range []struct{ budget, want int64 }{
		{unit - 1, 0}, {unit, unit}, {unit + unit/2, unit}, {2*unit + 5, 2 * unit}, {size - 1, 2 * unit}, {size, size},
	} {
		r, err := p.open(t, verifyAuto)
		must(t, err)
		if got := r.cached.Unit(); got != unit {
			t.Fatalf("the unit is %d", got)
		}
		f := r.prefetching(prefetchOptions{mode: prefetchAll, bytes: c.budget})
		f.done.Wait()
		if here := size - r.absent(0, size); here != c.want {
			t.Errorf("%+v: %d bytes are here: %+v", c, here, f.Status())
		}
		must(t, r.Close())
	}
}

// A breakingFetcher has bodies of a few bytes, whatever they should have.
type breakingFetcher struct{ size, bytes int64 }

func (f breakingFetcher) Fetch(_ context.Context, off, n int64) (io.ReadCloser, int64, int64, error) {
	body := io.Reader(bytes.NewReader(make([]byte, min(n, f.bytes))))
	if n > f.bytes {
		body = io.MultiReader(body, iotest.ErrReader(errors.New("broken")))
	}
	return io.NopCloser(body), off, f.size, nil
}

// What came of a piece that broke off is paid for.
func TestPrefetchBudgetOfWhatBreaksOff(t *testing.T) {
	const size, budget, chunk = 16 << 20, 3 << 20, 256 << 10
	cache, err := blobcache.New(filepath.Join(t.TempDir(), "cache"), blobcache.Options{ChunkSize: chunk, MaxPrefetches: 1})
	must(t, err)
	b, err := cache.Open("sha256:"+strings.Repeat("0", 64), size, breakingFetcher{size, chunk + 5}, blobcache.OpenOptions{})
	must(t, err)
	l := &layerSource{cached: b, bytes: b, size: size}
	f := &prefetcher{cache: cache, how: prefetchOptions{mode: prefetchAll, bytes: budget}}
	for _, next := range cutPieces(nil, l, chunk, 0, size) {
		for err, tries := errors.New("not yet tried"), 0; err != nil && !errors.Is(err, errBudget); tries++ {
			if err = f.bringPiece(t.Context(), next); tries > 2*prefetchPiece/chunk {
				t.Fatal(err)
			}
		}
	}
	if here := size - l.absent(0, size); here != budget {
		t.Errorf("%d bytes are here of %d in the budget", here, budget)
	}
	must(t, errors.Join(b.Close(), cache.Close()))
}

// reaches waits until the fetching is in a state.
func (p *prefetcher) reaches(t *testing.T, state backend.PrefetchState) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(20 * time.Second); p.Status().State != state; <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("%+v, want %s", p.Status(), state)
		}
	}
}

// What turns out to be wrong as a whole was not fetched, whatever was to be, and is not said to be here: not a moment
// before that, and not if it comes to light later.
func TestPrefetchWrongWhole(t *testing.T) {
	const size = 3 << 20
	p := push(t, verifiable.Make(t, imageBytes(size), verifiable.Options{}), false)
	all, err := profile.New([]profile.Blob{{Digest: digest.FromBytes(p.Data).String(), Size: size, Reads: []profile.Read{{Len: size}}}})
	must(t, err)
	for name, how := range map[string]prefetchOptions{"all": {mode: prefetchAll}, "profile": {mode: "/profile", profile: all}} {
		t.Run(name, func(t *testing.T) {
			fetch := func(said io.Writer) (*reader, *prefetcher) {
				r, err := p.open(t, verifyAuto)
				must(t, err)
				o := &opened{cache: r.cache, layers: r.layers(p.Blob)}
				o.startPrefetch(how, slog.New(slog.NewTextHandler(said, nil)))
				t.Cleanup(o.prefetch.Close)
				o.prefetch.done.Wait()
				return r, o.prefetch
			}
			p.registry.SetFault(fakeregistry.Always(fakeregistry.FlipBit(1_000_000)).OnBlobs())
			var said strings.Builder
			r, f := fetch(&said)
			if st := f.Status(); st.State != backend.PrefetchStopped || !strings.Contains(st.Error, wrongPrefix) || !strings.Contains(st.Error, r.digest) {
				t.Errorf("%+v", st)
			}
			if log := said.String(); strings.Contains(log, "is here") || strings.Count(log, "no more is fetched") != 1 || !strings.Contains(log, wrongPrefix) {
				t.Errorf("the log is %q", log)
			}

			p.registry.SetFault(nil)
			r, f = fetch(io.Discard)
			if st := f.Status(); st.State != backend.PrefetchDone || !r.right.Load() {
				t.Errorf("%+v; it was looked at: %v", st, r.right.Load())
			}
			r.poison(errChanged)
			if st := f.Status(); st.State != backend.PrefetchStopped || !strings.Contains(st.Error, errChanged.Error()) {
				t.Errorf("when it is wrong after all: %+v", st)
			}
		})
	}
}

// A profile of another image has nothing to fetch, and that is not how it was meant; one that is empty has said all.
func TestPrefetchForeignProfile(t *testing.T) {
	const size = 3 << 20
	p := push(t, verifiable.Make(t, imageBytes(size), verifiable.Options{Chunk: testChunk}), false)
	own := profile.Blob{Digest: digest.FromBytes(p.Data).String(), Size: int64(len(p.Data)), Reads: []profile.Read{{Len: testChunk}}}
	other := profile.Blob{Digest: digest.FromString("another").String(), Size: size, Reads: []profile.Read{{Len: testChunk}}}
	for _, c := range []struct {
		blobs []profile.Blob
		state backend.PrefetchState
		want  int64
	}{
		{[]profile.Blob{other}, backend.PrefetchStopped, 0},
		{[]profile.Blob{own, other}, backend.PrefetchDone, testChunk},
		{nil, backend.PrefetchDone, 0},
	} {
		r, err := p.open(t, verifyAuto)
		must(t, err)
		reads, err := profile.New(c.blobs)
		must(t, err)
		o := &opened{cache: r.cache, layers: r.layers(p.Blob)}
		o.startPrefetch(prefetchOptions{mode: "/of.profile", profile: reads}, slog.New(slog.DiscardHandler))
		o.prefetch.done.Wait()
		st := o.prefetch.Status()
		if st.State != c.state || st.Wanted != c.want || st.Fetched != c.want || (st.State == backend.PrefetchStopped) != strings.Contains(st.Error, "/of.profile") {
			t.Errorf("%v: %+v", c.blobs, st)
		}
		o.prefetch.Close()
	}
}

// What came counts from when it is here, not only when all that was asked for at a time is: of a piece that breaks off,
// too, and of what readers fetch.
func TestPrefetchCountsWhatIsHere(t *testing.T) {
	const size, chunk, part = 4 << 20, 256 << 10, 5 // one piece: of several the second may come first
	cache, err := blobcache.New(filepath.Join(t.TempDir(), "cache"), blobcache.Options{ChunkSize: chunk, MaxPrefetches: 1})
	must(t, err)
	fetcher := &endingFetcher{Fetcher: breakingFetcher{size, size}}
	fetcher.from.Store(part * chunk)
	b, err := cache.Open("sha256:"+strings.Repeat("0", 64), size, fetcher, blobcache.OpenOptions{})
	must(t, err)
	l := &layerSource{cached: b, bytes: b, size: size}
	p := &prefetcher{cache: cache, layers: []*layerSource{l}, how: prefetchOptions{mode: prefetchAll}, log: slog.New(slog.DiscardHandler)}
	p.begin()
	pieces := cutPieces(nil, l, chunk, 0, size)
	p.want(pieces)
	if err := p.bringAll(t.Context(), pieces, func(piece) {}); err == nil {
		t.Error("what cannot be had was fetched")
	}
	if st := p.Status(); st.Wanted != size || st.Fetched != part*chunk {
		t.Errorf("%d bytes are here: %+v", part*chunk, st)
	}
	fetcher.from.Store(size)
	must(t, b.ReadAt(t.Context(), make([]byte, 1), size-1))
	if st := p.Status(); st.Fetched != (part+1)*chunk {
		t.Errorf("and the last chunk: %+v", st)
	}
	must(t, errors.Join(b.Close(), cache.Close()))
}

// An endingFetcher has nothing from some byte on.
type endingFetcher struct {
	blobcache.Fetcher
	from atomic.Int64
}

func (f *endingFetcher) Fetch(ctx context.Context, off, n int64) (io.ReadCloser, int64, int64, error) {
	from := f.from.Load()
	if off+n <= from {
		return f.Fetcher.Fetch(ctx, off, n)
	}
	if off >= from {
		return nil, 0, 0, errors.New("there is nothing")
	}
	body, start, total, err := f.Fetcher.Fetch(ctx, off, from-off)
	if err == nil {
		body = io.NopCloser(io.MultiReader(body, iotest.ErrReader(errors.New("broken"))))
	}
	return body, start, total, err
}

// A chunk that is wrong is left out alone.
func TestPrefetchWrongChunk(t *testing.T) {
	const size, bad = 9 << 20, 3_000_000
	p := push(t, verifiable.Make(t, imageBytes(size), verifiable.Options{Chunk: testChunk}), false)
	r, err := p.open(t, verifyAuto)
	must(t, err)
	p.registry.SetFault(fakeregistry.Always(fakeregistry.FlipBit(bad)).OnBlobs())
	f := r.prefetching(prefetchOptions{mode: prefetchAll})
	f.reaches(t, backend.PrefetchWaiting)
	if st := f.Status(); r.absent(0, size) != testChunk || r.absent(bad, 1) != 1 || st.Fetched != size-testChunk || st.Error == "" {
		t.Errorf("%d bytes are not here: %+v", r.absent(0, size), st)
	}
	p.registry.SetFault(nil)
	f.done.Wait()
	if st := f.Status(); st.State != backend.PrefetchDone || st.Fetched != size || st.Error != "" {
		t.Errorf("%+v", st)
	}
}

// Why the fetching waited is not said of one that runs again.
func TestPrefetchRunsAgain(t *testing.T) {
	p := &prefetcher{log: slog.New(slog.DiscardHandler)}
	p.begin()
	p.trouble(errors.New("the registry is away"))
	if st := p.Status(); st.State != backend.PrefetchWaiting || st.Error != "the registry is away" {
		t.Errorf("%+v", st)
	}
	p.begin()
	if st := p.Status(); st.State != backend.PrefetchRunning || st.Error != "" {
		t.Errorf("%+v", st)
	}
}

// Metadata that is wrong does not keep the rest of it from being fetched, and is fetched when it is right.
func TestPrefetchWrongMetadata(t *testing.T) {
	im := corpus.Get(t, "plain")
	b := verifiable.Make(t, im.Data, verifiable.Options{Chunk: 4096})
	p := push(t, b, false)
	r, err := p.open(t, verifyAuto)
	must(t, err)
	var pages []erofsfmt.Range
	_, err = erofsfmt.LoadMetadata(t.Context(), memorySource(im.Data), erofsfmt.MetadataOptions{Gap: -1},
		func(_ context.Context, all []erofsfmt.Range) error { pages = append(pages, all...); return nil })
	must(t, err)
	// One of those that were asked for last: nothing is found by way of it.
	last := pages[len(pages)-1]
	bad := last.Off + last.Len - 4096
	p.registry.SetFault(fakeregistry.Always(fakeregistry.FlipBit(bad)).OnBlobs())
	f := r.prefetching(prefetchOptions{mode: prefetchMeta})
	f.reaches(t, backend.PrefetchWaiting)
	for _, page := range pages {
		for off := page.Off; off < page.Off+page.Len; off += 4096 {
			if missing := r.absent(off, 4096) > 0; missing != (off == bad) {
				t.Errorf("the page at %d: missing %v", off, missing)
			}
		}
	}
	p.registry.SetFault(nil)
	f.done.Wait()
	if st := f.Status(); st.State != backend.PrefetchDone || r.absent(bad, 4096) > 0 {
		t.Errorf("%+v", st)
	}
}

// memorySource is an image in memory.
type memorySource []byte

func (m memorySource) Size() int64 { return int64(len(m)) }

func (m memorySource) ReadAt(_ context.Context, p []byte, off int64) error {
	copy(p, m[off:])
	return nil
}

// What a mount was told is what another server of it does; without its profile that fetches nothing, and says so.
func TestRecordedPrefetch(t *testing.T) {
	p, err := profile.New([]profile.Blob{{Digest: "sha256:" + strings.Repeat("0", 64), Size: 10, Reads: []profile.Read{{Off: 1, Len: 2}}}})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "profile")
	if err := profile.WriteFile(file, p); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		how         prefetchOptions
		rate, bytes int64
		file        bool
	}{
		{how: prefetchOptions{}},
		{how: prefetchOptions{mode: "meta"}},
		{how: prefetchOptions{mode: "all", rate: "1MiB", budget: "3G"}, rate: 1 << 20, bytes: 3 << 30},
		{how: prefetchOptions{mode: file, budget: "4096"}, bytes: 4096, file: true},
	} {
		a := (&sourceOptions{prefetch: c.how}).access()
		var said strings.Builder
		got := recordedPrefetch(a, slog.New(slog.NewTextHandler(&said, nil)))
		if got.mode != c.how.mode || got.bytesPerSecond != c.rate || got.bytes != c.bytes || (got.profile != nil) != c.file || said.Len() > 0 {
			t.Errorf("%+v: %+v, %s", c.how, got, said.String())
		}
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	got := recordedPrefetch(backend.Access{Prefetch: file, PrefetchRate: "1MiB"}, slog.New(slog.NewTextHandler(&said, nil)))
	if got.wanted() || !strings.Contains(said.String(), file) || strings.Count(said.String(), "\n") != 1 {
		t.Errorf("%+v, %q", got, said.String())
	}
}

func TestCutPieces(t *testing.T) {
	for _, c := range []struct{ off, n int64 }{{0, 0}, {5, 1}, {4096, prefetchPiece}, {4096, prefetchPiece + 1}, {0, 3*prefetchPiece - 1}} {
		next := c.off
		pieces := cutPieces(nil, nil, 4096, c.off, c.n)
		for _, p := range pieces {
			if p.off != next || p.n <= 0 || p.n > prefetchPiece {
				t.Errorf("%+v: %+v", c, pieces)
			}
			next += p.n
		}
		if next != c.off+c.n || int64(len(pieces)) != (c.n+prefetchPiece-1)/prefetchPiece {
			t.Errorf("%+v: %+v", c, pieces)
		}
	}
}

// Pieces end where units do.
func TestCutPiecesAtUnits(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		unit, off, n int64
		want         []int64 // where they end
	}{
		{256 << 10, 4096, 8 * mib, []int64{4 * mib, 8 * mib, 8*mib + 4096}},
		{3 * mib, 0, 7 * mib, []int64{3 * mib, 6 * mib, 7 * mib}},
		{8 * mib, 9 * mib, 16 * mib, []int64{16 * mib, 24 * mib, 25 * mib}},
		{16 * mib, 0, 40 * mib, []int64{16 * mib, 32 * mib, 40 * mib}},
	} {
		var ends []int64
		for _, p := range cutPieces(nil, nil, c.unit, c.off, c.n) {
			ends = append(ends, p.off+p.n)
		}
		if !slices.Equal(ends, c.want) {
			t.Errorf("%+v: they end at %d", c, ends)
		}
	}
}

// Bytes that are wrong are told from a network in trouble.
func TestOfOneChunk(t *testing.T) {
	for _, c := range []struct {
		err  error
		want bool
	}{
		{nil, false}, {errors.New("something"), false}, {&net.DNSError{IsTemporary: true}, false},
		{fmt.Errorf("chunk: %w", judged{}), true}, {errors.Join(integrity.ErrCorrupt, os.ErrClosed), false},
	} {
		if got := blobcache.OfOneChunk(c.err); got != c.want {
			t.Errorf("%v: %v", c.err, got)
		}
	}
}

type judged struct{}

func (judged) Error() string   { return "judged" }
func (judged) Temporary() bool { return true }

// Readers keep connections of their own, and something is always fetched.
func TestPrefetchAtOnce(t *testing.T) {
	of := &profile.Profile{}
	for _, c := range []struct {
		how  prefetchOptions
		want int
	}{
		{prefetchOptions{mode: prefetchAll}, 2},
		{prefetchOptions{mode: prefetchAll, conns: 3}, 1},
		{prefetchOptions{mode: "/profile", profile: of}, 6},
		{prefetchOptions{mode: "/profile", profile: of, conns: 100}, 6},
		{prefetchOptions{mode: "/profile", profile: of, conns: 5}, 3},
		{prefetchOptions{mode: "/profile", profile: of, conns: 1}, 1},
	} {
		if got := c.how.atOnce(); got != c.want {
			t.Errorf("%+v: %d at once, want %d", c.how, got, c.want)
		}
	}
}

// TestPrefetchWord: who mistypes a word is told which there are.
func TestPrefetchWord(t *testing.T) {
	o := prefetchOptions{mode: "/nosuch/META"}
	if err := o.resolve(); err == nil || !strings.Contains(err.Error(), "none, meta and all are the words") {
		t.Errorf("%v", err)
	}
}
