package verified_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
	"github.com/erofs-oci/erofs-oci/registry/chunked"
	"github.com/erofs-oci/erofs-oci/registry/integrity"
	"github.com/erofs-oci/erofs-oci/registry/verified"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

// gaps reads a body to its end, and gives the bytes that it has and the gaps in them.
func gaps(body io.Reader) (got []byte, missing []*integrity.GapError, err error) {
	for {
		p, err := io.ReadAll(body)
		got = append(got, p...)
		var gap *integrity.GapError
		if !errors.As(err, &gap) {
			return got, missing, err
		}
		missing = append(missing, gap)
	}
}

// TestStreamOfWrongBytes: a chunk that is wrong is a gap in the body, of the bytes that were asked for and no others. It
// is fetched from elsewhere by who asks for it again, as often as there are places; nothing else is.
func TestStreamOfWrongBytes(t *testing.T) {
	b := verifiable.Make(t, random(5*chunk+100), verifiable.Options{Chunk: chunk})
	s := serve(b.Data, nil)
	s.places = 2
	x := openIndex(t, s, place(b))
	s.taken()
	s.flip = at(2*chunk + 5)
	for k, c := range []struct {
		off, n    int64
		gap       request // of no place
		temporary bool
		asked     request
	}{
		{0, 4 * chunk, request{0, 2 * chunk, chunk}, true, request{0, 0, 4 * chunk}},
		{2*chunk + 10, chunk, request{0, 2*chunk + 10, chunk - 10}, true, request{1, 2 * chunk, 2 * chunk}},
		{3 * chunk, chunk, request{}, true, request{1, 3 * chunk, chunk}},
		{2*chunk - 1, 7, request{0, 2 * chunk, 6}, false, request{0, chunk, 2 * chunk}},
		{2 * chunk, 1, request{0, 2 * chunk, 1}, true, request{0, 2 * chunk, chunk}}, // begins anew
	} {
		body, start, _, err := x.Stream().Fetch(t.Context(), c.off, c.n)
		if err != nil || start != c.off {
			t.Fatalf("%d: from %d, %v", k, start, err)
		}
		got, missing, err := gaps(body)
		if err != nil {
			t.Errorf("%d: %v", k, err)
		}
		want := bytes.Clone(b.Plain[c.off : c.off+c.n])
		if c.gap.n > 0 {
			want = slices.Delete(want, int(c.gap.off-c.off), int(c.gap.off+c.gap.n-c.off))
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%d: %d bytes, want %d", k, len(got), len(want))
		}
		switch {
		case c.gap.n == 0 && len(missing) > 0 || c.gap.n > 0 && len(missing) != 1:
			t.Errorf("%d: gaps %v", k, missing)
		case c.gap.n > 0:
			var w *verified.WrongError
			if m := missing[0]; m.Off != c.gap.off || m.Len != c.gap.n || !isMismatch(m) || !errors.As(m, &w) || w.Temporary() != c.temporary {
				t.Errorf("%d: gap %d+%d (%v), want %+v", k, m.Off, m.Len, m, c)
			}
		}
		if asked := s.taken(); !slices.Equal(asked, []request{c.asked}) {
			t.Errorf("%d: fetched %v, want %v", k, asked, c.asked)
		}
	}
	s.flip = nil
	if got, err := get(t, x.Stream(), chunk, 2*chunk); err != nil || !bytes.Equal(got, b.Plain[chunk:3*chunk]) || s.taken()[0].place != 1 {
		t.Errorf("right in the end: %v", err)
	}
	if _, err := get(t, x.Stream(), chunk, 2*chunk); err != nil || s.taken()[0].place != 1 {
		t.Errorf("right again: %v", err)
	}
}

func isMismatch(err error) bool {
	var m *integrity.MismatchError
	return errors.As(err, &m)
}

// cachedFrames is an image in zstd frames behind a cache.
func cachedFrames(t *testing.T, x *verified.Index) *blobcache.Blob {
	t.Helper()
	m, err := chunked.New(x.ChunkIndex, x.Stream())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return cached(t, m, blobcache.OpenOptions{ChunkSize: chunk, Vouched: true}, x.Size())
}

// cached is a blob behind a cache where nothing is fetched ahead.
func cached(t *testing.T, f blobcache.Fetcher, o blobcache.OpenOptions, size int64) *blobcache.Blob {
	t.Helper()
	c, err := blobcache.New(t.TempDir()+"/cache", blobcache.Options{Readahead: -1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	b, err := c.Open("sha256:"+strings.Repeat("0", 64), size, f, o)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// frameRequests are those for frames from first to before end, by one place.
func frameRequest(b *verifiable.Blob, place, first, end int) request {
	return request{place, int64(b.Frames[first]), int64(b.Frames[end] - b.Frames[first])}
}

// TestNeighbours: who reads beside a frame that stays wrong, on its way in the same body, does not notice; who reads the
// frame gets an error, and what is prefetched is all but it.
func TestNeighbours(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := verifiable.Make(t, random(8*chunk), verifiable.Options{Chunk: chunk, Zstd: true})
		s := serve(b.Data, nil)
		x := openIndex(t, s, place(b))
		s.taken()
		s.flip = at(int64(b.Frames[2]) + 5)
		s.hold = make(chan struct{})
		blob := cachedFrames(t, x)
		errs := make(chan error, 2)
		go func() { errs <- blob.ReadAt(t.Context(), make([]byte, 6*chunk), 0) }()
		synctest.Wait()
		p := make([]byte, chunk)
		go func() { errs <- blob.ReadAt(t.Context(), p, 4*chunk) }()
		synctest.Wait()
		close(s.hold)
		failed := 0
		for range cap(errs) {
			if err := <-errs; isMismatch(err) {
				failed++
			} else if err != nil {
				t.Error(err)
			}
		}
		if failed != 1 || !bytes.Equal(p, b.Plain[4*chunk:5*chunk]) {
			t.Errorf("%d of two readers failed, want one", failed)
		}
		if asked, want := s.taken(), []request{frameRequest(b, 0, 0, 6), frameRequest(b, 0, 2, 3)}; !slices.Equal(asked, want) {
			t.Errorf("fetched %v, want %v", asked, want)
		}
		if err := blob.Prefetch(t.Context(), 0, x.Size()); !blobcache.OfOneChunk(err) {
			t.Errorf("prefetch: %v", err)
		}
		if err := blob.Prefetch(t.Context(), 3*chunk, 5*chunk); err != nil {
			t.Errorf("prefetch of the rest: %v", err)
		}
		for i := range int64(8) {
			if present, _ := blob.Present(i * chunk); present != (i != 2) {
				t.Errorf("chunk %d is here: %v", i, present)
			}
		}
		times := 0
		for _, r := range s.taken() {
			if r.off > int64(b.Frames[2]) && r.off < int64(b.Frames[6]) || r.off <= int64(b.Frames[2]) && r.off+r.n > int64(b.Frames[3]) && r.off != int64(b.Frames[2]) {
				t.Errorf("what was right was fetched again: %v", r)
			}
			if r.off == int64(b.Frames[2]) {
				times++
			}
		}
		if times != 2 {
			t.Errorf("prefetching asked for the wrong frame %d times, want twice", times)
		}
	})
}

// TestWrongFramesByFewConnections: the real client, with as many connections as there are bodies of which each has a
// flipped bit. Nothing is fetched while a body holds a connection that would be needed for it.
func TestWrongFramesByFewConnections(t *testing.T) {
	const frames = 400
	b := verifiable.Make(t, random(frames*chunk), verifiable.Options{Chunk: chunk, Zstd: true})
	for _, conns := range []int{1, 2} {
		flips := make(map[int]int) // bytes of the blob that are wrong once, and in how many answers they were
		for i := range conns {
			flips[b.Frames[i*frames/conns+2]+5] = 0
		}
		var mu sync.Mutex // guards flips and n
		n := 0
		h := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if !strings.Contains(r.URL.Path, "/blobs/") {
				return
			}
			data := bytes.Clone(b.Data)
			var from, to int
			if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &from, &to); err != nil {
				t.Error(err)
			}
			mu.Lock()
			n++
			for at, times := range flips {
				if from <= at && at <= to {
					flips[at]++
					if times == 0 {
						data[at] ^= 1
					}
				}
			}
			mu.Unlock()
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
		}))
		client, err := registry.New(registry.Options{PlainHTTP: true, MaxConnsPerHost: conns, ErrorWait: 4 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		ref, err := registry.ParseReference(strings.TrimPrefix(h.URL, "http://") + "/x:v1")
		if err != nil {
			t.Fatal(err)
		}
		from, err := client.Blob(ref, ocispec.Descriptor{Digest: digest.FromBytes(b.Data), Size: int64(len(b.Data))})
		if err != nil {
			t.Fatal(err)
		}
		x, err := verified.ReadIndex(t.Context(), from, from, place(b))
		if err != nil {
			t.Fatal(err)
		}
		blob := cachedFrames(t, x)
		var readers sync.WaitGroup
		for i := range conns {
			readers.Go(func() {
				p := make([]byte, frames/conns*chunk)
				off := i * len(p)
				if err := blob.ReadAt(t.Context(), p, int64(off)); err != nil || !bytes.Equal(p, b.Plain[off:off+len(p)]) {
					t.Errorf("%d connections: reader %d: %v", conns, i, err)
				}
			})
		}
		readers.Wait()
		if want := 1 + 2*conns; n != want {
			t.Errorf("%d connections: %d requests, want the index, and two for each reader", conns, n)
		}
		if err := errors.Join(blob.Close(), client.Close()); err != nil {
			t.Error(err)
		}
		h.Close()
	}
}
