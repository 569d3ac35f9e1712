package blobcache

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/require"
)

// A peekFile calls peek before each read of the blob's bytes, between a reader's look at the presence map and its pread.
type peekFile struct {
	chunkFile
	base int64
	peek *atomic.Pointer[func()]
}

func (f peekFile) ReadAt(p []byte, off int64) (int, error) {
	if peek := f.peek.Load(); peek != nil && off >= f.base {
		f.peek.Store(nil) // once
		(*peek)()
	}
	return f.chunkFile.ReadAt(p, off)
}

// A hole is punched after a reader saw that its chunk is present, and before it reads: by this process, and by another
// one as soon as this one lets it. No reader gets zeros.
func TestHoleUnderAReader(t *testing.T) {
	for _, test := range []struct {
		name string
		hole func(t *testing.T, b *Blob, other *Cache)
	}{
		{"own", func(t *testing.T, b *Blob, _ *Cache) {
			if freed, err := b.store.evict(0); err != nil || freed != 4*cs {
				t.Errorf("evicted %d, %v", freed, err)
			}
		}},
		{"own, and fetched again", func(t *testing.T, b *Blob, _ *Cache) {
			if freed, err := b.store.evict(0); err != nil || freed != 4*cs {
				t.Errorf("evicted %d, %v", freed, err)
			}
			if err := b.ReadAt(ctx, make([]byte, 1), 2*cs); err != nil {
				t.Error(err)
			}
		}},
		{"another's", func(t *testing.T, b *Blob, other *Cache) {
			evictAll(t, other, 0) // the region is leased
			b.store.mu.Lock()
			err := b.store.letGo(0)
			b.store.mu.Unlock()
			if err != nil {
				t.Error(err)
			}
			evictAll(t, other, 4*cs)
		}},
	} {
		for _, resident := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, resident %v", test.name, resident), func(t *testing.T) {
				s := newServer(4 * cs)
				dir := t.TempDir()
				o := Options{ChunkSize: cs, Readahead: -1}
				c, other := openCacheAt(t, dir, o), openCacheAt(t, dir, o)
				var peek atomic.Pointer[func()]
				c.wrap = func(f chunkFile, l layout) chunkFile { return peekFile{f, l.base, &peek} }
				b := openBlob(t, c, s)
				if err := readNow(ctx, b, s, 0, 4*cs); err != nil {
					t.Fatal(err)
				}
				hole := func() { test.hole(t, b, other) }
				peek.Store(&hole)
				if resident {
					p := make([]byte, 3*cs)
					if b.ReadResident(p, cs) && string(p) != string(s.content[cs:4*cs]) {
						t.Error("resident, and wrong")
					}
				} else if err := readNow(ctx, b, s, cs, 3*cs); err != nil {
					t.Error(err)
				}
				if peek.Load() != nil {
					t.Error("nothing was read")
				}
				if err := readNow(ctx, b, s, 0, 4*cs); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// evictAll has c evict all that it can, which must be want bytes of chunks.
func evictAll(t *testing.T, c *Cache, want int64) {
	t.Helper()
	err := c.space.locked(ctx, func() error {
		freed, err := c.evict(1<<60, false)
		if freed != want {
			t.Errorf("%d bytes evicted, want %d", freed, want)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// What a reader waits for stays until the reader has it.
func TestWaitedForStays(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(4 * cs)
		gate := make(chan struct{})
		s.gates = map[int64]chan struct{}{3 * cs: gate}
		c := openCache(t, Options{ChunkSize: cs, Readahead: -1})
		b := openBlob(t, c, s)
		all := read(ctx, b, s, 0, 4*cs)
		mustWait(t, "reader", all)
		mustHave(t, b, s, chunks(0, 3))
		evictAll(t, c, 0)
		close(gate)
		mustEnd(t, "reader", all, nil)
		s.checkOnce(t)
		evictAll(t, c, 4*cs)
		mustHave(t, b, s, []int64{})
	})
}

// Regions go in the order in which they were last read, whichever blob they are of.
func TestLeastRecentlyUsed(t *testing.T) {
	const region = regionSize / cs // chunks
	c := openCache(t, Options{ChunkSize: cs, Readahead: -1})
	var blobs []*Blob
	s := newServer(3 * regionSize)
	for _, letter := range []string{"a", "b"} {
		b, err := c.Open("sha256:"+strings.Repeat(letter, 64), 3*regionSize, s, OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		blobs = append(blobs, b)
	}
	type place struct {
		blob   int
		region int64
	}
	order := []place{{0, 2}, {1, 0}, {0, 0}, {1, 1}, {0, 1}}
	for _, p := range []place{{0, 0}, {0, 1}, {0, 2}, {1, 0}, {1, 1}} {
		if err := readNow(ctx, blobs[p.blob], s, p.region*regionSize, cs); err != nil {
			t.Fatal(err)
		}
	}
	for i, p := range order { // hits; the clock stands still for them, so it is set
		c.clock.Store(time.Now().UnixMicro() + int64(i))
		if !blobs[p.blob].ReadResident(make([]byte, 10), p.region*regionSize) {
			t.Fatalf("%v is not resident", p)
		}
	}
	for i, p := range order {
		err := c.space.locked(ctx, func() error {
			freed, err := c.evict(1, false)
			if freed != cs {
				t.Errorf("%d bytes evicted, want one chunk", freed)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		for j, q := range order {
			present, _ := blobs[q.blob].Present(q.region * region * cs)
			if present != (j > i) {
				t.Errorf("after the eviction of %v: %v is present: %v", p, q, present)
			}
		}
	}
}

// A pattern is a server whose content is the offset, so that it can be as large as one likes.
type pattern struct {
	size    int64
	fetched atomic.Int64
}

func fill(p []byte, off int64) {
	var b [8]byte
	for len(p) > 0 {
		binary.LittleEndian.PutUint64(b[:], uint64(off/8)*0x9e3779b97f4a7c15+1)
		n := copy(p, b[off%8:])
		p, off = p[n:], off+int64(n)
	}
}

type patternBody struct {
	*pattern
	off, end int64
}

func (p *pattern) Fetch(_ context.Context, off, n int64) (io.ReadCloser, int64, int64, error) {
	return &patternBody{p, off, off + n}, off, p.size, nil
}

func (b *patternBody) Read(p []byte) (int, error) {
	if b.off == b.end {
		return 0, io.EOF
	}
	n := min(int64(len(p)), b.end-b.off)
	fill(p[:n], b.off)
	b.off += n
	b.fetched.Add(n)
	return int(n), nil
}

func (b *patternBody) Close() error { return nil }

// readPattern reads all of b, in pieces, beginning anywhere.
func readPattern(b *Blob, rng *rand.Rand) error {
	const piece = 1 << 20
	p, want := make([]byte, piece), make([]byte, piece)
	first := rng.Int64N(b.Size()) / piece * piece
	for done := int64(0); done < b.Size(); done += piece {
		off := (first + done) % b.Size()
		n := min(piece, b.Size()-off)
		if err := b.ReadAt(ctx, p[:n], off); err != nil {
			return err
		}
		fill(want[:n], off)
		if string(p[:n]) != string(want[:n]) {
			return fmt.Errorf("wrong bytes at %d", off)
		}
	}
	return nil
}

var fullLimit = flag.Bool("limit-full", false, "TestLimit with 1 GiB, not 64 MiB")

// A cache of 1 (64 MiB) under reads of 5 by two processes, and of 2.5 by twenty (open caches are processes to the locks):
// it never takes more than its limit and 16 MiB, and no read fails.
func TestLimit(t *testing.T) {
	limit := int64(64 << 20)
	if *fullLimit {
		limit = 1 << 30
	}
	for _, test := range []struct {
		caches, readers int // of each
		size            int64
	}{
		{2, 5, limit},
		{20, 1, limit / 4},
	} {
		if testing.Short() && test.caches == 2 {
			continue
		}
		t.Run(fmt.Sprintf("%d caches", test.caches), func(t *testing.T) {
			dir := t.TempDir()
			o := Options{MaxBytes: limit, MinFree: -1}
			p := &pattern{size: test.size}
			over := newWatch(dir)
			var wg sync.WaitGroup
			var caches []*Cache
			for i := range test.caches {
				c := openCacheAt(t, dir, o)
				caches = append(caches, c)
				for j := range test.readers {
					b, err := c.Open("sha256:"+strings.Repeat(fmt.Sprint((i+j)%10), 64), p.size, p, OpenOptions{})
					if err != nil {
						t.Fatal(err)
					}
					wg.Go(func() {
						if err := readPattern(b, rand.New(rand.NewPCG(uint64(i), uint64(j)))); err != nil {
							t.Error(err)
						}
					})
				}
			}
			wg.Wait()
			if most := over.stop(t); most > limit+16<<20 || most < limit/2 {
				t.Errorf("the cache took %d MiB, want at most %d and 16", most>>20, limit>>20)
			}
			for _, c := range caches { // what is fetched ahead ends with them
				if err := c.Close(); err != nil {
					t.Error(err)
				}
			}
			checkSound(t, dir)
		})
	}
}

// A watch looks how much a directory takes.
type watch struct {
	dir  string
	end  chan struct{}
	most chan int64
}

func newWatch(dir string) *watch {
	w := &watch{dir, make(chan struct{}), make(chan int64, 1)}
	go func() {
		most := int64(0)
		t := time.NewTicker(time.Millisecond)
		defer t.Stop()
		for {
			select {
			case <-w.end:
				w.most <- most
				return
			case <-t.C:
				most = max(most, taken(w.dir))
			}
		}
	}()
	return w
}

func (w *watch) stop(t *testing.T) int64 {
	t.Helper()
	close(w.end)
	return max(<-w.most, taken(w.dir))
}

// taken is what du says.
func taken(dir string) (sum int64) {
	filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil && !e.IsDir() && unix.Lstat(path, &st) == nil {
			sum += st.Blocks * 512
		}
		return nil
	})
	return sum
}

// What was read long ago goes before what is read again and again.
func TestHotStays(t *testing.T) {
	const limit = 32 << 20
	c := openCache(t, Options{MaxBytes: limit, MinFree: -1, Readahead: -1})
	p := &pattern{size: 8 * limit}
	b, err := c.Open(testDigest, p.size, p, OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 256<<10)
	for off := int64(0); off < p.size; off += 1 << 20 {
		if err := errors.Join(b.ReadAt(ctx, buf, off), b.ReadAt(ctx, buf, 0)); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := p.fetched.Load(), p.size/4; got != want {
		t.Errorf("%d bytes fetched, want %d: each chunk once, and that of byte 0 never again", got, want)
	}
}

// tmpfs mounts a file system of n bytes.
func tmpfs(t *testing.T, n int) string {
	t.Helper()
	require.Has(t, "root")
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d,mode=700", n)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// A file system that is full, or becomes so: no read fails, and it is said once.
func TestFullTmpfs(t *testing.T) {
	const size = 24 << 20
	for _, test := range []struct {
		name    string
		options Options
		before  int // bytes that somebody else has written
		said    int
		kept    bool
	}{
		{"becomes full", Options{MaxBytes: -1, MinFree: -1}, 0, 1, true},
		{"has a little room", Options{MaxBytes: -1, MinFree: -1}, size - 1<<20, 1, true},
		{"is full", Options{}, size, 1, false},
		{"must keep free", Options{MaxBytes: -1, MinFree: 8 << 20, Readahead: 2 << 20}, 0, 0, true},
		// A reader, what is ahead of him, and a fetch that is late may be in three regions of 4 MiB, which stay.
		{"has a limit", Options{MaxBytes: 16 << 20, MinFree: -1, Readahead: 2 << 20}, 0, 0, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			top := tmpfs(t, size)
			dir := filepath.Join(top, "cache")
			log := new(logbook)
			test.options.Logger = log.logger()
			c := openCacheAt(t, dir, test.options)
			if err := fillUp(filepath.Join(top, "others"), test.before); err != nil {
				t.Fatal(err)
			}
			p := &pattern{size: 3*size + 5}
			b, err := c.Open(testDigest, p.size, p, OpenOptions{})
			if err != nil {
				t.Fatal(err)
			}
			rounds := uint64(3)
			if testing.Short() {
				rounds = 1
			}
			for i := range rounds {
				if err := readPattern(b, rand.New(rand.NewPCG(i, 5))); err != nil {
					t.Fatal(err)
				}
			}
			if got := log.lines("cannot keep"); got != test.said {
				t.Errorf("said %d times, want %d: %s", got, test.said, log.text.String())
			}
			if kept := b.Stats().ChunksPresent; (kept > 0) != test.kept {
				t.Errorf("%d chunks are kept", kept)
			}
			if free := test.options.MinFree; free > 0 {
				var st unix.Statfs_t
				if err := unix.Statfs(top, &st); err != nil || int64(st.Bavail)*st.Bsize < free {
					t.Errorf("%d bytes are free, %v", int64(st.Bavail)*st.Bsize, err)
				}
			}
			if err := errors.Join(b.Close(), c.Close()); err != nil {
				t.Error(err)
			}
		})
	}
}

// fillUp writes n bytes, or as many as there is room for.
func fillUp(name string, n int) error {
	err := os.WriteFile(name, make([]byte, n), 0o600)
	if errors.Is(err, unix.ENOSPC) {
		return nil
	}
	return err
}

func TestAdmin(t *testing.T) {
	dir := t.TempDir()
	o := Options{ChunkSize: cs, Readahead: -1}
	c := openCacheAt(t, dir, o)
	s := newServer(10*cs + 5)
	other := "sha256:" + strings.Repeat("e", 64)
	b := openBlob(t, c, s)
	gone, err := c.Open(other, b.Size(), s, OpenOptions{ChunkSize: 2 * cs})
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(readNow(ctx, b, s, 9*cs, cs+5), readNow(ctx, gone, s, 0, cs), gone.Close())
	if err != nil {
		t.Fatal(err)
	}
	list, err := c.List()
	if err != nil || len(list) != 2 {
		t.Fatalf("%+v, %v", list, err)
	}
	for i, want := range []Kept{
		{Digest: testDigest, Size: 10*cs + 5, ChunkSize: cs, Present: cs + 5, InUse: true},
		{Digest: other, Size: 10*cs + 5, ChunkSize: 2 * cs, Present: 2 * cs},
	} {
		got := list[i]
		if got.Occupied < got.Present || got.Complete() || time.Since(got.Used) > time.Minute && i == 1 {
			t.Errorf("%+v", got)
		}
		got.Occupied, got.Used = 0, time.Time{}
		if got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
	}
	if u, err := c.Usage(); err != nil || u.Blobs != 2 || u.Occupied < list[0].Occupied || u.Limit == 0 || u.Free == 0 || u.Directory != dir {
		t.Errorf("%+v, %v", u, err)
	}
	if _, err := c.Remove(testDigest); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("removed what is in use: %v", err)
	}
	if _, err := c.Remove("sha256:" + strings.Repeat("f", 64)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("removed what is not there: %v", err)
	}
	if freed, err := c.Remove(other); err != nil || freed != list[1].Occupied {
		t.Errorf("freed %d, %v; want %d", freed, err, list[1].Occupied)
	}
	reader := openCacheAt(t, dir, o)
	if freed, err := reader.Prune(0); err != nil || freed != 0 {
		t.Errorf("freed %d, %v of what another process reads", freed, err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if freed, err := reader.Prune(0); err != nil || freed < cs {
		t.Errorf("freed %d, %v", freed, err)
	}
	if list, err := c.List(); err != nil || len(list) != 0 {
		t.Errorf("%+v, %v are left", list, err)
	}
}
