package blobcache

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
)

var ctx = context.Background()

func TestContract(t *testing.T) {
	for name, o := range map[string]Options{
		"defaults":     {},
		"small chunks": {ChunkSize: cs, MaxSpan: 3 * cs, MaxFetches: 2},
	} {
		for _, whole := range []bool{false, true} {
			t.Run(name+map[bool]string{false: ", ranges", true: ", whole"}[whole], func(t *testing.T) {
				sourcetest.Run(t, func(t *testing.T, content []byte) sourcetest.Source {
					s := newServer(len(content))
					s.content, s.whole = content, whole
					return openBlob(t, openCache(t, o), s)
				})
			})
		}
	}
}

// Every third answer is a fault of its own kind.
func TestContractOverFaults(t *testing.T) {
	sourcetest.RunFaulty(t, 100, func(t *testing.T, content []byte) sourcetest.Source {
		s := newServer(len(content))
		s.content = content
		s.answer = func(call int, a *answer) {
			switch call % 15 {
			case 2:
				a.err = errServer
			case 5:
				a.end -= (a.end - a.start) / 2
			case 8:
				a.total++
			case 11:
				a.start++
			case 14:
				a.end, a.broken = a.start+cs+1, errServer
			}
		}
		return open(t, s, Options{MaxSpan: 4 * cs, Readahead: ahead})
	})
}

// Every second chunk cannot be written.
func TestContractOverBadDisk(t *testing.T) {
	sourcetest.Run(t, func(t *testing.T, content []byte) sourcetest.Source {
		s := newServer(len(content))
		s.content = content
		c := openCache(t, Options{ChunkSize: cs})
		breakDisk(c, func(off int64) bool { return off/cs%2 == 0 })
		return openBlob(t, c, s)
	})
}

func TestParallelReadersFetchOnce(t *testing.T) {
	const size = 64*cs + 100
	s := newServer(size)
	b := open(t, s, Options{MaxSpan: 4 * cs, MaxFetches: 4})
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(9, uint64(i)))
			for range 20 {
				off := rng.Int64N(size)
				n := rng.Int64N(min(size-off, 10*cs)) + 1
				if err := readNow(ctx, b, s, off, n); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	s.checkOnce(t)
	st := b.Stats()
	if st.Fetches > st.ChunksPresent || st.Fetches != int64(len(s.asked())) {
		t.Errorf("%d fetches counted, %d made, for %d chunks", st.Fetches, len(s.asked()), st.ChunksPresent)
	}
	if st.ChunksTotal != 65 || st.Hits+st.Misses != 50*20 {
		t.Errorf("stats %+v: want 65 chunks, 1000 reads", st)
	}
	if want := int64(len(residents(t, b, s))); st.ChunksPresent != want {
		t.Errorf("stats say %d chunks are present, %d are", st.ChunksPresent, want)
	}
}

func TestMerging(t *testing.T) {
	for _, test := range []struct {
		name        string
		present     []int64
		first, last int64 // chunks; the read begins and ends inside them
		want        []request
	}{
		{"one chunk", nil, 3, 3, []request{{3 * cs, cs}}},
		{"run", nil, 2, 5, []request{{2 * cs, 4 * cs}}},
		{"run longer than a span", nil, 0, 9, []request{{0, 4 * cs}, {4 * cs, 4 * cs}, {8 * cs, 2 * cs}}},
		{"hole filled", []int64{1}, 0, 2, []request{{0, cs}, {2 * cs, cs}}},
		{"ends filled", []int64{0, 3}, 0, 3, []request{{cs, 2 * cs}}},
		{"short last chunk", nil, 9, 10, []request{{9 * cs, cs + 7}}},
		{"all here", []int64{4, 5}, 4, 5, nil},
		{"span starts anew behind a present chunk", []int64{2}, 1, 7, []request{{cs, cs}, {3 * cs, 4 * cs}, {7 * cs, cs}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newServer(10*cs + 7)
			b := open(t, s, Options{MaxSpan: 4*cs + 1, MaxFetches: 1})
			for _, c := range test.present {
				if err := readNow(ctx, b, s, c*cs+1, 1); err != nil {
					t.Fatal(err)
				}
			}
			off := test.first*cs + 1
			end := min((test.last+1)*cs, b.Size()) - 1
			if err := readNow(ctx, b, s, off, end-off); err != nil {
				t.Fatal(err)
			}
			got := s.asked()[len(test.present):]
			slices.SortFunc(got, func(a, b request) int { return int(a.off - b.off) })
			if !slices.Equal(got, test.want) {
				t.Errorf("requests %v, want %v", got, test.want)
			}
			s.checkOnce(t)
		})
	}
}

func TestStats(t *testing.T) {
	s := newServer(3*cs + 5)
	b := open(t, s, Options{})
	for range 2 { // a miss, a hit
		if err := readNow(ctx, b, s, cs-1, 2); err != nil {
			t.Fatal(err)
		}
	}
	if !b.ReadResident(make([]byte, cs), 0) || b.ReadResident(make([]byte, cs+1), cs) {
		t.Error("chunks 0 and 1 are resident, 2 is not")
	}
	if b.ReadResident(make([]byte, 1), -1) || b.ReadResident(make([]byte, 1), 3*cs+5) {
		t.Error("what is outside the blob is resident")
	}
	want := Stats{Fetches: 1, FetchesDemand: 1, BytesFetched: 2 * cs, BytesDemand: 2 * cs, BytesServed: 4 + cs, Hits: 2, Misses: 1, ChunksPresent: 2, ChunksTotal: 4}
	if got := b.Stats(); got != want {
		t.Errorf("stats %+v, want %+v", got, want)
	}
}

func TestHitAllocatesNothing(t *testing.T) {
	s := newServer(8 * cs)
	b := open(t, s, Options{Readahead: ahead})
	p := make([]byte, 3*cs)
	if err := b.ReadAt(ctx, p, 100); err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(100, func() {
		if b.ReadAt(ctx, p, 100) != nil || !b.ReadResident(p, 100) {
			t.Error("not a hit")
		}
	}); n != 0 {
		t.Errorf("%v allocations a hit, want none", n)
	}
}

func TestBitmap(t *testing.T) {
	const n = 200
	m := make(bitmap, (n+63)/64)
	set := map[int64]bool{}
	for _, i := range []int64{0, 1, 62, 63, 64, 65, 127, 128, 129, 130, 191, 199} {
		m.set(i)
		set[i] = true
	}
	for first := int64(0); first < n; first++ {
		if m.has(first) != set[first] {
			t.Errorf("has(%d) = %v", first, m.has(first))
		}
		want := true
		for end := first; end <= n; end++ {
			if end > first {
				want = want && set[end-1]
			}
			if m.all(first, end) != want {
				t.Errorf("all(%d, %d) = %v", first, end, !want)
			}
		}
	}
}

// Two caches of one digest in one process share what they fetched.
func TestSharedStore(t *testing.T) {
	s, other := newServer(4*cs), newServer(4*cs)
	c := openCache(t, Options{ChunkSize: cs, Readahead: -1})
	a, b := openBlob(t, c, s), openBlob(t, c, other)
	if err := readNow(ctx, a, s, 0, cs); err != nil {
		t.Fatal(err)
	}
	if err := readNow(ctx, b, s, 0, 2*cs); err != nil {
		t.Fatal(err)
	}
	if got := len(s.asked()); got != 1 {
		t.Errorf("first fetcher: %d requests, want 1", got)
	}
	if got, want := other.asked(), []request{{cs, cs}}; !slices.Equal(got, want) {
		t.Errorf("second fetcher: requests %v, want %v", got, want)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if err := readNow(ctx, a, s, 0, 1); !errors.Is(err, os.ErrClosed) {
		t.Errorf("read through a closed blob: %v", err)
	}
	if a.ReadResident(make([]byte, 1), 0) {
		t.Error("a closed blob has residents")
	}
	if err := readNow(ctx, b, s, 0, 2*cs); err != nil {
		t.Errorf("read through the blob that is still open: %v", err)
	}
	if err := errors.Join(b.Close(), b.Close()); err != nil {
		t.Fatal(err)
	}
	third := newServer(4 * cs)
	again := openBlob(t, c, third)
	if err := readNow(ctx, again, s, 0, 4*cs); err != nil {
		t.Error(err)
	}
	if got, want := third.asked(), []request{{2 * cs, 2 * cs}}; !slices.Equal(got, want) {
		t.Errorf("a later blob: requests %v, want %v", got, want)
	}
}

func TestOpenRefuses(t *testing.T) {
	c := openCache(t, Options{})
	hex := strings.Repeat("a", 64)
	for _, digest := range []string{
		"", ":", "sha256", "sha256:", "sha256:" + hex[1:], "sha256:" + hex + "a", "sha256:" + strings.ToUpper(hex),
		"sha256:" + hex[2:] + "/.", "../x:" + hex, "md5:" + hex[:32], "sha512:" + hex, "sha256:" + hex[1:] + "\x00", "SHA256:" + hex,
		"sha256:" + strings.Repeat(hex, 100), "x:" + strings.Repeat(hex, 100),
	} {
		if _, err := c.Open(digest, 1, newServer(1), OpenOptions{}); err == nil || len(err.Error()) > 200 {
			t.Errorf("digest %q: %v", digest, err)
		}
	}
	for _, size := range []int64{-1, maxBlobSize + 1, 1 << 62} {
		if _, err := c.Open("sha256:"+hex, size, newServer(1), OpenOptions{}); err == nil {
			t.Errorf("size %d was accepted", size)
		}
	}
	for _, ok := range []string{"sha256:" + hex, "sha384:" + hex + hex[:32], "sha512:" + hex + hex} {
		if _, err := c.Open(ok, 0, newServer(0), OpenOptions{}); err != nil {
			t.Errorf("digest %q: %v", ok, err)
		}
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Open("sha256:"+hex, 1, newServer(1), OpenOptions{}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("open in a closed cache: %v", err)
	}
}

func TestNew(t *testing.T) {
	for _, o := range []Options{
		{ChunkSize: -1}, {ChunkSize: 1}, {ChunkSize: 2048}, {ChunkSize: 5000}, {ChunkSize: 32 << 20}, {MaxSpan: -1}, {MaxFetches: -1}, {MaxAhead: -1},
	} {
		if _, err := New(t.TempDir(), o); err == nil {
			t.Errorf("options %+v were accepted", o)
		}
	}
	dir := t.TempDir()
	real := filepath.Join(dir, "a", "b")
	c, err := New(real, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	info, err := os.Stat(real)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("new directory: %v, %v; want mode 0700", info.Mode(), err)
	}
	if _, err := c.Open(testDigest, 10, newServer(10), OpenOptions{}); err != nil {
		t.Fatal(err)
	}
	checkPrivate(t, real)

	public := filepath.Join(dir, "public", version)
	if err := os.MkdirAll(public, 0o755); err != nil {
		t.Fatal(err)
	}
	link, file := filepath.Join(dir, "link"), filepath.Join(dir, "file")
	open := filepath.Join(dir, "open")
	err = errors.Join(os.Symlink(real, link), os.WriteFile(file, nil, 0o600), os.Mkdir(open, 0o700), os.Chmod(open, 0o770))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		link: "symbolic link", link + "/": "symbolic link", file: "not a directory", open: "mode 0770", filepath.Join(file, "x"): "not a directory",
		filepath.Dir(public): "mode 0755",
	} {
		if _, err := New(name, Options{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("New(%s): error %v, want one with %q", name, err, want)
		}
	}
}

// checkPrivate fails unless all below dir is its owner's alone, and named after nothing but digests.
func checkPrivate(t *testing.T, dir string) {
	t.Helper()
	files := 0
	err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		want := os.FileMode(0o600)
		if e.IsDir() {
			want = 0o700
		} else {
			files++
			if _, _, ok := parseFileName(e.Name()); !ok && e.Name() != "space" {
				t.Errorf("a file %s", path)
			}
		}
		if info.Mode().Perm() != want {
			t.Errorf("%s has mode %v, want %v", path, info.Mode().Perm(), want)
		}
		return nil
	})
	if err != nil || files < 2 {
		t.Errorf("%d files, %v", files, err)
	}
}

// A directory of somebody else is refused. Only root can make one.
func TestCheckDirOwner(t *testing.T) {
	info, err := os.Stat("/")
	if err != nil {
		t.Fatal(err)
	}
	if err := checkDir(info, 0o022); (err == nil) != (os.Geteuid() == 0) {
		t.Errorf("uid %d, directory of root: %v", os.Geteuid(), err)
	}
	dir := t.TempDir()
	if os.Geteuid() == 0 {
		if err := os.Chown(dir, 12345, 12345); err != nil {
			t.Fatal(err)
		}
		if _, err := New(dir, Options{}); err == nil || !strings.Contains(err.Error(), "uid 12345") {
			t.Errorf("directory of uid 12345: %v", err)
		}
	}
}

// A badDisk fails some writes, halfway, as a disk does that becomes full.
type badDisk struct {
	chunkFile
	base int64
	bad  func(off int64) bool // an offset in the blob
}

var errDisk = errors.New("no space left on the test's disk")

func (d badDisk) WriteAt(p []byte, off int64) (int, error) {
	if off < d.base || !d.bad(off-d.base) {
		return d.chunkFile.WriteAt(p, off)
	}
	n, err := d.chunkFile.WriteAt(p[:len(p)/2], off)
	return n, errors.Join(err, errDisk)
}

func breakDisk(c *Cache, bad func(off int64) bool) {
	c.wrap = func(f chunkFile, l layout) chunkFile { return badDisk{f, l.base, bad} }
}

func TestFullDisk(t *testing.T) {
	var full atomic.Bool
	full.Store(true)
	log := new(logbook)
	s := newServer(8 * cs)
	c := openCache(t, Options{ChunkSize: cs, Logger: log.logger()})
	breakDisk(c, func(int64) bool { return full.Load() })
	b := openBlob(t, c, s)

	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if err := readNow(ctx, b, s, 10, 5*cs); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := residents(t, b, s); len(got) != 0 {
		t.Errorf("chunks %v are present on a full disk", got)
	}
	if got := log.lines("cannot keep"); got != 1 {
		t.Errorf("a full disk was said %d times, want once", got)
	}
	full.Store(false)
	if err := readNow(ctx, b, s, 0, 8*cs); err != nil {
		t.Error(err)
	}
	if got := residents(t, b, s); !slices.Equal(got, chunks(0, 8)) {
		t.Errorf("chunks %v are present after the disk had room again, want all", got)
	}
}

// What cannot be read back is fetched again, and never something else's bytes.
func TestUnreadableDisk(t *testing.T) {
	s := newServer(2 * cs)
	c := openCache(t, Options{ChunkSize: cs, Readahead: -1})
	b := openBlob(t, c, s)
	for round := range 3 {
		if err := readNow(ctx, b, s, 0, 2*cs); err != nil {
			t.Fatal(err)
		}
		if round == 2 {
			break
		}
		d := b.store.disk
		if err := d.handle.Truncate(d.base + cs + 1); err != nil {
			t.Fatal(err)
		}
		if b.ReadResident(make([]byte, 2*cs), 0) {
			t.Error("file cut short: resident")
		}
	}
	if got, want := s.asked(), []request{{0, 2 * cs}, {cs, cs}, {cs, cs}}; !slices.Equal(got, want) {
		t.Errorf("requests %v, want %v", got, want)
	}
}

func TestPresent(t *testing.T) {
	s := newServer(5*cs + 100)
	b := open(t, s, Options{})
	for _, off := range []int64{cs, 2 * cs, 5 * cs} {
		if err := b.ReadAt(ctx, make([]byte, 10), off); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		off     int64
		present bool
		end     int64
	}{
		{0, false, cs}, {cs - 1, false, cs}, {cs, true, 3 * cs}, {2*cs + 5, true, 3 * cs}, {3 * cs, false, 5 * cs}, {5*cs + 99, true, 5*cs + 100},
	} {
		if present, end := b.Present(c.off); present != c.present || end != c.end {
			t.Errorf("at %d: %v to %d, want %v to %d", c.off, present, end, c.present, c.end)
		}
	}
}
