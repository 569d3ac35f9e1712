package verified_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/erofs-oci/erofs-oci/registry/blobcache"
	"github.com/erofs-oci/erofs-oci/registry/integrity"
	"github.com/erofs-oci/erofs-oci/registry/verified"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

const chunk = 8 << 10

// place is where the index of b is.
func place(b *verifiable.Blob) verified.IndexPlace {
	end := int64(len(b.Data))
	return verified.IndexPlace{
		Off: int64(b.IndexOffset), Len: end - int64(b.IndexOffset), Framed: len(b.Frames) > 0,
		Digest: digest.FromBytes(b.Index).String(), DataEnd: int64(b.IndexOffset),
	}
}

func openIndex(t *testing.T, s *servers, p verified.IndexPlace) *verified.Index {
	t.Helper()
	x, err := verified.ReadIndex(t.Context(), s, s, p)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// TestReadIndex: an index is one request, and what is wrong with it is fetched again.
func TestReadIndex(t *testing.T) {
	raw := verifiable.Make(t, random(5*chunk+100), verifiable.Options{Chunk: chunk})
	frames := verifiable.Make(t, random(5*chunk+100), verifiable.Options{Chunk: chunk, Zstd: true})
	for _, c := range []struct {
		name   string
		blob   *verifiable.Blob
		flip   func(int, int64, int) bool
		places int
		asked  int
		fails  bool
	}{
		{"raw", raw, nil, 1, 1, false},
		{"zstd", frames, nil, 1, 1, false},
		{"flipped once", raw, once(int64(raw.IndexOffset) + 50), 1, 2, false},
		{"frame flipped once", frames, once(int64(frames.IndexOffset) + 1), 1, 2, false},
		{"flipped always", raw, at(int64(raw.IndexOffset)), 1, 2, true},
		{"flipped by a mirror", raw, func(p int, off int64, _ int) bool { return p == 0 && off == int64(raw.IndexOffset)+99 }, 2, 2, false},
		{"flipped by two mirrors", frames, func(p int, off int64, _ int) bool { return p < 2 && off == int64(frames.IndexOffset)+9 }, 3, 3, false},
	} {
		s := serve(c.blob.Data, c.flip)
		s.places = c.places
		x, err := verified.ReadIndex(t.Context(), s, s, place(c.blob))
		if (err != nil) != c.fails {
			t.Errorf("%s: %v", c.name, err)
		}
		var changed *verified.DigestError
		if c.fails && (!errors.As(err, &changed) || !strings.Contains(err.Error(), "again")) {
			t.Errorf("%s: %v", c.name, err)
		}
		if err == nil && (x.Len() != 6 || !x.Verifies() || x.Unit(4096, 1<<20) != chunk) {
			t.Errorf("%s: %d chunks in units of %d", c.name, x.Len(), x.Unit(4096, 1<<20))
		}
		if asked := s.taken(); len(asked) != c.asked {
			t.Errorf("%s: %d requests, want %d: %v", c.name, len(asked), c.asked, asked)
		}
	}
	s := serve(raw.Data, nil)
	for what, p := range map[string]verified.IndexPlace{
		"digest":       {Off: 1, Len: 10, Digest: "md5:00"},
		"short digest": {Off: 1, Len: 10, Digest: "sha256:00"},
		"length":       {Off: 1, Len: integrity.MaxChunkIndex + 1, Digest: place(raw).Digest},
		"nothing":      {Off: 1, Digest: place(raw).Digest},
	} {
		if _, err := verified.ReadIndex(t.Context(), s, s, p); err == nil {
			t.Errorf("%s: taken", what)
		}
	}
	if len(s.taken()) != 0 {
		t.Error("what makes no sense was fetched")
	}
}

// TestUnit: the cache's unit is that of the index, if it has one.
func TestUnit(t *testing.T) {
	for _, c := range []struct {
		sizes []int64
		want  int64
	}{
		{[]int64{8192, 8192, 1}, 8192},
		{[]int64{8192, 8192, 8192}, 8192},
		{[]int64{100}, 4096},
		{[]int64{4096}, 4096},
		{[]int64{4097}, 8192},
		{[]int64{12288, 12288, 5}, 12288},
		{[]int64{8192, 4096, 8192}, 0},
		{[]int64{8192, 8193}, 0},
		{[]int64{5000, 5000}, 0},
		{[]int64{1 << 20, 1 << 20}, 0}, // more than the most
		{[]int64{2048, 2048}, 0},       // less than the least
	} {
		w := integrity.NewChunkIndexBuilder(integrity.None, integrity.SHA256)
		end := int64(0)
		for _, n := range c.sizes {
			if err := w.Add(end, end, make([]byte, 32)); err != nil {
				t.Fatal(err)
			}
			end += n
		}
		raw, err := w.Marshal(end, end)
		if err != nil {
			t.Fatal(err)
		}
		s := serve(raw, nil)
		x := openIndex(t, s, verified.IndexPlace{Len: int64(len(raw)), Digest: digest.FromBytes(raw).String(), DataEnd: end})
		if got := x.Unit(4096, 512<<10); got != c.want {
			t.Errorf("%v: unit %d, want %d", c.sizes, got, c.want)
		}
	}
}

// TestIndexHook: the hook lets right chunks pass, has wrong ones fetched from elsewhere as
// often as there are places, and then says that it is of no use.
func TestIndexHook(t *testing.T) {
	b := verifiable.Make(t, random(5*chunk+100), verifiable.Options{Chunk: chunk})
	s := serve(b.Data, nil)
	s.places = 3
	x := openIndex(t, s, place(b))
	s.taken()
	for off := 0; off < len(b.Plain); off += chunk {
		p := bytes.Clone(b.Plain[off:min(off+chunk, len(b.Plain))])
		if err := x.Verify(t.Context(), p, int64(off)); err != nil {
			t.Errorf("chunk at %d: %v", off, err)
		}
	}
	// The last chunk of a cache goes on with the index.
	if err := x.Verify(t.Context(), b.Data[5*chunk:], 5*chunk); err != nil {
		t.Errorf("last chunk and index: %v", err)
	}
	if err := x.Verify(t.Context(), []byte("behind"), int64(len(b.Plain))); err != nil {
		t.Errorf("behind the image: %v", err)
	}
	for _, p := range []struct{ off, n int }{{1, chunk}, {chunk, chunk - 1}, {0, 10}} {
		if err := x.Verify(t.Context(), b.Plain[p.off:p.off+p.n], int64(p.off)); err == nil {
			t.Errorf("%d bytes at %d pass for a chunk", p.n, p.off)
		}
	}

	wrong := bytes.Clone(b.Plain[chunk : 2*chunk])
	wrong[7] ^= 1
	var w *verified.WrongError
	for try := range 4 {
		err := x.Verify(t.Context(), wrong, chunk)
		if !errors.As(err, &w) || w.Temporary() != (try < 3) {
			t.Fatalf("time %d: %v", try, err)
		}
		if try < 3 {
			if got, err := get(t, x, 0, 3*chunk); err != nil || !bytes.Equal(got, b.Plain[:3*chunk]) {
				t.Errorf("fetched again: %v", err)
			}
		}
	}
	if got := s.taken(); !slices.Equal(got, []request{{1, 0, 3 * chunk}, {2, 0, 3 * chunk}, {0, 0, 3 * chunk}}) {
		t.Errorf("fetched from %v", got)
	}
	// The next reader begins anew, and what is not wrong is not fetched from elsewhere.
	if err := x.Verify(t.Context(), wrong, chunk); !errors.As(err, &w) || !w.Temporary() {
		t.Errorf("the next reader: %v", err)
	}
	if _, err := get(t, x, 2*chunk, chunk); err != nil || s.taken()[0].place != 0 {
		t.Errorf("another chunk: %v", err)
	}
	if err := x.Verify(t.Context(), b.Plain[chunk:2*chunk], chunk); err != nil {
		t.Errorf("right in the end: %v", err)
	}
	if _, err := get(t, x, 0, 3*chunk); err != nil || s.taken()[0].place != 0 {
		t.Errorf("a chunk that is right again: %v", err)
	}
}

// TestIndexIsNotFetchedAgain: what a cache asks for behind the image is in memory.
func TestIndexIsNotFetchedAgain(t *testing.T) {
	b := verifiable.Make(t, random(5*chunk+100), verifiable.Options{Chunk: chunk})
	s := serve(b.Data, nil)
	x := openIndex(t, s, place(b))
	s.taken()
	size, total := int64(len(b.Plain)), int64(len(b.Data))
	for _, c := range []struct {
		off, n int64
		asked  []request
	}{
		{5 * chunk, total - 5*chunk, []request{{0, 5 * chunk, 100}}},
		{5 * chunk, 120, []request{{0, 5 * chunk, 100}}},
		{0, size, []request{{0, 0, size}}},
		{size, total - size, nil},
		{size + 3, 9, nil},
	} {
		got, err := get(t, x, c.off, c.n)
		if err != nil || !bytes.Equal(got, b.Data[c.off:c.off+c.n]) {
			t.Errorf("%d at %d: %d bytes, %v", c.n, c.off, len(got), err)
		}
		if asked := s.taken(); !slices.Equal(asked, c.asked) {
			t.Errorf("%d at %d: fetched %v, want %v", c.n, c.off, asked, c.asked)
		}
	}
	if _, err := get(t, x, size, total-size+1); err == nil {
		t.Error("more than there is")
	}
	// A body that is short does not become one with a hole.
	if _, err := verified.ReadIndex(t.Context(), &short{s}, s, place(b)); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("half an index: %v", err)
	}
}

// short gives half of what it is asked for.
type short struct{ *servers }

func (s *short) Fetch(ctx context.Context, off, n int64) (io.ReadCloser, int64, int64, error) {
	body, start, total, err := s.servers.Fetch(ctx, off, n)
	if err != nil {
		return nil, 0, 0, err
	}
	return io.NopCloser(io.LimitReader(body, n/2)), start, total, nil
}

func (s *short) FetchElsewhere(ctx context.Context, off, n int64, _ error) (io.ReadCloser, int64, int64, error) {
	return s.Fetch(ctx, off, n)
}

// TestStream: a body has verified bytes only, whatever part of chunks is asked for.
func TestStream(t *testing.T) {
	for _, o := range []verifiable.Options{{Chunk: chunk}, {Chunk: chunk, Zstd: true}} {
		b := verifiable.Make(t, random(5*chunk+100), o)
		bounds := b.Frames
		if !o.Zstd {
			bounds = []int{0, chunk, 2 * chunk, 3 * chunk, 4 * chunk, 5 * chunk, 5*chunk + 100}
		}
		size := int64(bounds[6])
		for _, whole := range []bool{false, true} {
			s := serve(b.Data, nil)
			x := openIndex(t, s, place(b))
			s.whole = whole
			s.taken()
			for _, r := range [][2]int64{{0, size}, {0, 1}, {5, 10}, {int64(bounds[1]) - 1, 2}, {int64(bounds[2]) + 3, int64(bounds[4]-bounds[2]) + 5}, {size - 1, 1}} {
				body, start, total, err := x.Stream().Fetch(t.Context(), r[0], r[1])
				if err != nil {
					t.Fatalf("%v: %v", r, err)
				}
				got, err := io.ReadAll(body)
				want := b.Data[r[0] : r[0]+r[1]]
				if whole && start == 0 && r[0] >= int64(bounds[1]) {
					want = b.Data[:size]
				} else if start != r[0] {
					t.Errorf("%v: starts at %d", r, start)
				}
				if err != nil || !bytes.Equal(got, want) || total != size {
					t.Errorf("whole=%v %v: %d bytes of %d, want %d; %v", whole, r, len(got), total, len(want), err)
				}
				if n := len(s.taken()); n != 1 {
					t.Errorf("%v: %d requests", r, n)
				}
			}
			for _, r := range [][2]int64{{-1, 2}, {0, 0}, {0, size + 1}, {size, 1}, {1, 1 << 62}} {
				if _, _, _, err := x.Stream().Fetch(t.Context(), r[0], r[1]); err == nil {
					t.Errorf("%v is taken", r)
				}
			}
		}
	}
}

// TestUnchecked: with nothing to be verified an index still finds chunks.
func TestUnchecked(t *testing.T) {
	b := verifiable.Make(t, random(2*chunk), verifiable.Options{Chunk: chunk, Zstd: true})
	s := serve(b.Data, at(3))
	p := place(b)
	p.Digest, p.Unchecked = "", true
	x := openIndex(t, s, p)
	if x.Verifies() {
		t.Error("it says that it verifies")
	}
	want := bytes.Clone(b.Data[:10])
	want[3] ^= 0x10
	if got, err := get(t, x.Stream(), 0, 10); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%x, %v", got, err)
	}
}

// TestManyPlaces: a chunk is fetched from as many places as there are, by the index, the tree and the stream; and once
// more from the first, which may be right now. Then it is an error.
func TestManyPlaces(t *testing.T) {
	const off = 2*chunk + 5
	plain := verifiable.Make(t, random(5*chunk), verifiable.Options{Chunk: chunk, Verity: true})
	frames := verifiable.Make(t, random(5*chunk), verifiable.Options{Chunk: chunk, Zstd: true})
	for name, how := range map[string]struct {
		data []byte
		at   int64
		open func(t *testing.T, s *servers) *blobcache.Blob
	}{
		"index": {plain.Data, off, func(t *testing.T, s *servers) *blobcache.Blob {
			x := openIndex(t, s, place(plain))
			return cached(t, x, blobcache.OpenOptions{Verify: x.Verify, ChunkSize: chunk}, int64(len(plain.Data)))
		}},
		"tree": {plain.Data, off, func(t *testing.T, s *servers) *blobcache.Blob {
			tree, err := verified.OpenTree(t.Context(), s, root(t, plain))
			if err != nil {
				t.Fatal(err)
			}
			return cached(t, tree, blobcache.OpenOptions{Verify: tree.Verify, ChunkSize: chunk}, int64(len(plain.Data)))
		}},
		"stream": {frames.Data, int64(frames.Frames[2]) + 5, func(t *testing.T, s *servers) *blobcache.Blob {
			return cachedFrames(t, openIndex(t, s, place(frames)))
		}},
	} {
		for _, bad := range []int{1, 4, 9} {
			for _, last := range []bool{true, false} { // is right
				for what, read := range map[string]func(*blobcache.Blob) error{
					"read":     func(b *blobcache.Blob) error { return b.ReadAt(t.Context(), make([]byte, chunk), 2*chunk) },
					"prefetch": func(b *blobcache.Blob) error { return b.Prefetch(t.Context(), 2*chunk, chunk) },
				} {
					s := serve(how.data, nil)
					b := how.open(t, s)
					s.taken()
					s.places = bad
					want := bad + 1
					if last {
						s.places++
					}
					s.flip = func(p int, o int64, _ int) bool { return p < bad && o == how.at }
					if err := read(b); (err == nil) != last || err != nil && !isMismatch(err) {
						t.Errorf("%s, %s, %d wrong places, one that is right: %v: %v", name, what, bad, last, err)
					}
					if asked := s.taken(); len(asked) != want {
						t.Errorf("%s, %s, %d wrong places, one that is right: %v: %d requests, want %d", name, what, bad, last, len(asked), want)
					}
				}
			}
		}
	}
}
