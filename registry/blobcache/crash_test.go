package blobcache

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

const sector = 512

// A tornFile remembers what each sector of a file was after each write. A power failure leaves of each sector any of
// these: writes that were not synced are lost, or reach the disk in any order.
type tornFile struct {
	chunkFile
	mu      sync.Mutex // guards history, and keeps writes apart
	history map[int64][][]byte
}

func (f *tornFile) WriteAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.chunkFile.WriteAt(p, off)
	return n, errors.Join(err, f.note(off, int64(n)))
}

func (f *tornFile) Punch(off, n int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return errors.Join(f.chunkFile.Punch(off, n), f.note(off, n))
}

func (f *tornFile) note(off, n int64) error {
	for at := off / sector * sector; at < off+n; at += sector {
		p := make([]byte, sector)
		if _, err := f.chunkFile.ReadAt(p, at); err != nil && err != io.EOF { // the last sector is not full
			return err
		}
		f.history[at] = append(f.history[at], p)
	}
	return nil
}

// crash writes what is left to a file, whose parts that were never written are holes. Of the header, without which
// nothing is believed, the newest version is left in three of four cases.
func (f *tornFile) crash(name string, size int64, rng *rand.Rand) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	out, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	if err := out.Truncate(size); err != nil {
		return err
	}
	luck := rng.IntN(10) // of this crash: how many of ten sectors are as they were last
	header := rng.IntN(4) > 0
	for at, versions := range f.history {
		i := rng.IntN(len(versions) + 1)
		if rng.IntN(10) < luck || at < headerSize && header {
			i = len(versions)
		}
		if i == 0 {
			continue
		}
		v := versions[i-1]
		if _, err := out.WriteAt(v[:min(sector, size-at)], at); err != nil {
			return err
		}
	}
	return nil
}

// Power fails at some moment under readers who have chunks fetched, evicted and fetched again. Whatever of the writes
// is left then, no wrong byte is served.
func TestPowerFailure(t *testing.T) {
	const size = 2*regionSize + 3*cs + 77
	discarded, kept := 0, int64(0)
	seeds := uint64(8)
	if testing.Short() {
		seeds = 4
	}
	enough := func() bool { return discarded >= 20 && kept >= 200 }
	// How much is there when the power fails is up to the scheduler: some more, where it was little.
	for seed := uint64(0); seed < seeds || seed < 4*seeds && !enough(); seed++ {
		rng := rand.New(rand.NewPCG(seed, 1))
		s := newServer(size)
		torn := &tornFile{history: map[int64][][]byte{}}
		c := openCache(t, Options{ChunkSize: 4 * cs, MaxBytes: 3 * regionSize / 2, Readahead: -1})
		c.wrap = func(f chunkFile, _ layout) chunkFile { torn.chunkFile = f; return torn }
		b := openBlob(t, c, s)
		if _, err := b.store.disk.file.WriteAt(b.store.disk.header(), 0); err != nil { // was written before f was wrapped
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for i := range uint64(4) {
			wg.Go(func() {
				mine := rand.New(rand.NewPCG(seed, i+10))
				for range 60 {
					off := mine.Int64N(size)
					if err := readNow(ctx, b, s, off, min(1+mine.Int64N(30*cs), size-off)); err != nil {
						t.Error(err)
					}
				}
			})
		}
		dir := t.TempDir()
		if seed%2 == 0 {
			wg.Wait()
		}
		name := fileOf(dir, size, 4*cs)
		err := errors.Join(os.Mkdir(filepath.Dir(name), 0o700), torn.crash(name, b.store.disk.end, rng))
		if err != nil {
			t.Fatal(err)
		}
		wg.Wait()

		log := new(logbook)
		after := openBlob(t, openCacheAt(t, dir, Options{ChunkSize: 4 * cs, Readahead: -1, Logger: log.logger()}), s)
		before := len(s.asked())
		kept += after.Stats().ChunksPresent
		for off := int64(0); off < size; off += 20 * cs {
			if err := readNow(ctx, after, s, off, min(20*cs, size-off)); err != nil {
				t.Errorf("seed %d: %v", seed, err)
			}
		}
		discarded += log.lines("discarded")
		if len(s.asked()) == before {
			t.Errorf("seed %d: nothing was lost", seed)
		}
	}
	if !enough() {
		t.Errorf("%d chunks were left, %d of them damaged: the test shows nothing", kept, discarded)
	}
}

// An orderFile looks, when the entry of a chunk is written, whether the chunk is in the file.
type orderFile struct {
	chunkFile
	layout
	t       *testing.T
	content []byte
	entries *atomic.Int64
}

func (f orderFile) WriteAt(p []byte, off int64) (int, error) {
	if off >= headerSize && off < f.uses && len(p) == entrySize && string(p) != string(make([]byte, entrySize)) {
		chunk := (off - headerSize) / entrySize
		data := make([]byte, f.chunkLen(chunk))
		_, err := f.chunkFile.ReadAt(data, f.base+chunk*f.unit)
		if err != nil || string(data) != string(f.content[chunk*f.unit:chunk*f.unit+int64(len(data))]) {
			f.t.Errorf("the entry of chunk %d is written before its data (%v)", chunk, err)
		}
		f.entries.Add(1)
	}
	return f.chunkFile.WriteAt(p, off)
}

// A killed process leaves no entry of a chunk that it had not written.
func TestDataBeforeEntry(t *testing.T) {
	s := newServer(9*cs + 7)
	c := openCache(t, Options{ChunkSize: cs, Readahead: -1})
	var entries atomic.Int64
	c.wrap = func(f chunkFile, l layout) chunkFile { return orderFile{f, l, t, s.content, &entries} }
	b := openBlob(t, c, s)
	if err := readNow(ctx, b, s, 0, b.Size()); err != nil {
		t.Error(err)
	}
	if entries.Load() != 10 {
		t.Errorf("%d entries were written", entries.Load())
	}
}

// Flipped bits, anywhere in the file, while nobody has it open.
func TestFlippedBits(t *testing.T) {
	const n = 20
	for _, test := range []struct {
		name    string
		place   func(l layout) int64
		bit     int
		refetch []int64 // chunks
	}{
		{"first byte of a chunk", func(l layout) int64 { return l.base + 7*cs }, 0, []int64{7}},
		{"last byte of a chunk", func(l layout) int64 { return l.base + 8*cs - 1 }, 7, []int64{7}},
		{"last byte of the blob", func(l layout) int64 { return l.end - 1 }, 3, []int64{n}},
		{"checksum of a chunk", func(l layout) int64 { return l.entryAt(3) + 1 }, 2, []int64{3}},
		{"checksum of an entry", func(l layout) int64 { return l.entryAt(4) + 6 }, 5, []int64{4}},
		{"magic", func(layout) int64 { return 3 }, 1, chunks(0, n+1)},
		{"size", func(layout) int64 { return 17 }, 1, chunks(0, n+1)},
		{"digest", func(layout) int64 { return 60 }, 1, chunks(0, n+1)},
		{"checksum of the header", func(layout) int64 { return headerSize - 1 }, 1, chunks(0, n+1)},
		{"time of use", func(l layout) int64 { return l.uses + 7 }, 7, nil},
	} {
		for _, down := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, registry down %v", test.name, down), func(t *testing.T) {
				s := newServer(n*cs + 100)
				dir := t.TempDir()
				o := Options{ChunkSize: cs, Readahead: -1, MaxSpan: cs}
				l := fillCache(t, dir, o, s)
				flip(t, fileOf(dir, n*cs+100, cs), test.place(l), test.bit)
				if down {
					s.answer = func(_ int, a *answer) { a.err = errServer }
				}
				before := len(s.asked())
				b := openBlob(t, openCacheAt(t, dir, o), s)
				for chunk := range int64(n + 1) {
					err := readNow(ctx, b, s, chunk*cs, min(cs, b.Size()-chunk*cs))
					lost := down && slices.Contains(test.refetch, chunk)
					if lost != (err != nil) || lost && !errors.Is(err, errServer) {
						t.Errorf("chunk %d: %v", chunk, err)
					}
				}
				var again []int64
				for _, r := range s.asked()[before:] {
					again = append(again, r.off/cs)
				}
				if slices.Sort(again); !slices.Equal(again, test.refetch) {
					t.Errorf("chunks %v were fetched again, want %v", again, test.refetch)
				}
			})
		}
	}
}

// fillCache fetches all of s into a cache that is closed then.
func fillCache(t testing.TB, dir string, o Options, s *server) layout {
	t.Helper()
	c, err := New(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	b := openBlob(t, c, s)
	l := b.store.disk.layout
	if err := errors.Join(readNow(ctx, b, s, 0, b.Size()), c.Close()); err != nil {
		t.Fatal(err)
	}
	return l
}

func flip(t *testing.T, name string, at int64, bit int) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1 << bit
	if _, err := f.WriteAt(b[:], at); err != nil {
		t.Fatal(err)
	}
}

// A bit flips while the blob is being read: who is paranoid notices at the next read.
func TestParanoid(t *testing.T) {
	s := newServer(4 * cs)
	dir := t.TempDir()
	b := openBlob(t, openCacheAt(t, dir, Options{ChunkSize: cs, Readahead: -1, Paranoid: true}), s)
	for range 3 {
		if err := readNow(ctx, b, s, 5, 3*cs); err != nil {
			t.Error(err)
		}
	}
	s.checkOnce(t)
	flip(t, fileOf(dir, 4*cs, cs), b.store.disk.base+2*cs+9, 4)
	if b.ReadResident(make([]byte, 3*cs), 0) {
		t.Error("resident")
	}
	if err := readNow(ctx, b, s, 0, 4*cs); err != nil {
		t.Error(err)
	}
	if got, want := s.asked(), []request{{0, 4 * cs}, {2 * cs, cs}}; !slices.Equal(got, want) {
		t.Errorf("requests %v, want %v", got, want)
	}
}

// What a mount without a hook has kept is verified when one with a hook takes it in.
func TestKeptIsVerified(t *testing.T) {
	s := newServer(5 * cs)
	j := &judge{truth: slices.Clone(s.content)}
	s.content[2*cs+7] ^= 1
	dir := t.TempDir()
	o := Options{ChunkSize: cs, Readahead: -1}
	fillCache(t, dir, o, s)
	copy(s.content, j.truth)
	b := openWith(t, openCacheAt(t, dir, o), s, OpenOptions{Verify: j.verify})
	for range 2 {
		if err := readNow(ctx, b, s, 0, 5*cs); err != nil {
			t.Error(err)
		}
	}
	if got, want := s.asked()[1:], []request{{2 * cs, cs}}; !slices.Equal(got, want) {
		t.Errorf("requests %v, want %v", got, want)
	}
	if got, want := j.sorted(), []int64{0, 1, 2, 2, 3, 4}; !slices.Equal(got, want) {
		t.Errorf("verified %v, want %v", got, want)
	}
}

// A blob in chunks of another unit is another file.
func TestOtherUnit(t *testing.T) {
	s := newServer(9*cs + 1)
	dir := t.TempDir()
	fillCache(t, dir, Options{ChunkSize: cs, Readahead: -1}, s)
	b := openBlob(t, openCacheAt(t, dir, Options{ChunkSize: 3 * cs, Readahead: -1}), s)
	if err := readNow(ctx, b, s, 0, b.Size()); err != nil {
		t.Error(err)
	}
	if got := len(s.asked()); got != 2 {
		t.Errorf("%d requests, want 2", got)
	}
}

// A file that is not what it should be is made anew, unless another process has it open, and what is no file of ours
// is refused.
func TestStrangeFiles(t *testing.T) {
	s := newServer(3 * cs)
	o := Options{ChunkSize: cs, Readahead: -1}
	for _, test := range []struct {
		name   string
		do     func(name string) error
		refuse string
	}{
		{"empty", func(n string) error { return os.Truncate(n, 0) }, ""},
		{"short", func(n string) error { return os.Truncate(n, headerSize+7) }, ""},
		{"long", func(n string) error { return os.Truncate(n, 1<<30) }, ""},
		{"of another size", func(n string) error { return put(n, newLayout(nameOf(testDigest, 4*cs, ""), 4*cs, cs)) }, ""},
		{"of another digest", func(n string) error { return put(n, newLayout(nameOf(anotherDigest, 3*cs, ""), 3*cs, cs)) }, ""},
		{"link", func(n string) error { return errors.Join(os.Rename(n, n+"x"), os.Symlink(n+"x", n)) }, "too many levels"},
		{"directory", func(n string) error { return errors.Join(os.Remove(n), os.Mkdir(n, 0o700)) }, "is a directory"},
		{"pipe", func(n string) error { return errors.Join(os.Remove(n), unix.Mkfifo(n, 0o600)) }, "is not a file"},
		{"open to others", func(n string) error { return os.Chmod(n, 0o640) }, "mode 0640"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			fillCache(t, dir, o, s)
			if err := test.do(fileOf(dir, 3*cs, cs)); err != nil {
				t.Fatal(err)
			}
			b, err := openCacheAt(t, dir, o).Open(testDigest, 3*cs, s, OpenOptions{})
			if test.refuse != "" {
				if err == nil || !strings.Contains(err.Error(), test.refuse) {
					t.Errorf("error %v, want %q", err, test.refuse)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := readNow(ctx, b, s, 0, 3*cs); err != nil {
				t.Error(err)
			}
		})
	}
	dir := t.TempDir()
	openBlob(t, openCacheAt(t, dir, o), s)
	if err := put(fileOf(dir, 3*cs, cs), newLayout(nameOf(testDigest, 4*cs, ""), 4*cs, cs)); err != nil {
		t.Fatal(err)
	}
	if _, err := openCacheAt(t, dir, o).Open(testDigest, 3*cs, s, OpenOptions{}); err == nil || !strings.Contains(err.Error(), "another process uses it") {
		t.Errorf("a blob in use, of another size: %v", err)
	}
}

// fileOf is the file of the test's blob.
func fileOf(dir string, size, unit int64) string {
	return filepath.Join(dir, version, fileName(nameOf(testDigest, size, ""), unit))
}

// put writes the header of l over that of a file.
func put(name string, l layout) error {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(l.header(), 0)
	return errors.Join(err, f.Close())
}

// What was being written when a process was killed is given back.
func TestSweep(t *testing.T) {
	const size = 40 << 20
	dir := t.TempDir()
	o := Options{Readahead: -1}
	p := &pattern{size: size}
	c := openCacheAt(t, dir, o)
	b, err := c.Open(testDigest, size, p, OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.ReadAt(ctx, make([]byte, 1<<20), 8<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := b.store.disk.file.WriteAt(make([]byte, 20<<20), b.store.disk.base+20<<20); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	before := taken(dir)
	if b, err = openCacheAt(t, dir, o).Open(testDigest, size, p, OpenOptions{}); err != nil {
		t.Fatal(err)
	}
	if after := taken(dir); before < 20<<20 || after > 2<<20 {
		t.Errorf("%d bytes are taken, %d before", after, before)
	}
	if err := readPattern(b, rand.New(rand.NewPCG(1, 2))); err != nil || p.fetched.Load() != size {
		t.Errorf("%d bytes fetched, %v", p.fetched.Load(), err)
	}
}

// Whatever the first bytes of a file are, what is read is right.
func FuzzPresence(f *testing.F) {
	const size = 3*cs + 5
	s := newServer(size)
	l := newLayout(nameOf(testDigest, size, ""), size, cs)
	good := l.header()
	entries := make([]byte, 4*entrySize)
	for c := range int64(4) {
		l.putEntry(entries[c*entrySize:], c, l.sum(c, s.content[c*cs:min((c+1)*cs, size)]))
	}
	f.Add(good, entries)
	f.Add([]byte{}, entries)
	f.Add(good, []byte{1})
	f.Add(good[:100], []byte{})
	f.Fuzz(func(t *testing.T, header, entries []byte) {
		if l, err := parseHeader(header); err == nil && string(l.header()) != string(header) {
			t.Error("a header that is not written so was accepted")
		}
		dir := t.TempDir()
		c := openCacheAt(t, dir, Options{ChunkSize: cs, Readahead: -1})
		name := fileOf(dir, size, cs)
		file, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		for off, part := range map[int64][]byte{
			0:          header[:min(len(header), headerSize)],
			headerSize: entries[:min(len(entries), 64<<10)],
			l.base:     s.content[:size-cs], // the last chunk is not there, whatever its entry says
			l.end - 1:  {0},
		} {
			if _, err := file.WriteAt(part, off); err != nil {
				t.Fatal(err)
			}
		}
		if list, err := c.List(); err == nil && len(list) != 1 {
			t.Errorf("%+v", list)
		}
		b := openBlob(t, c, s)
		for range 2 {
			if err := readNow(ctx, b, s, 0, size); err != nil {
				t.Error(err)
			}
		}
	})
}
