package blobcache

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/thin"
)

// A lossyDisk has not written what it should have, and says so once to who asks. It goes when pages are dropped.
type lossyDisk struct {
	mu       sync.Mutex // guards what follows
	why      error
	lost     []int64   // chunks
	drops    int       // of pages
	first    time.Time // of them
	dropping func()    // is called when pages are dropped, before any is gone
	wrote    func()    // is called when a chunk and its entry are in memory
}

type lossyFile struct {
	chunkFile
	layout layout
	disk   *lossyDisk
}

func (d *lossyDisk) put(c *Cache) {
	c.wrap = func(f chunkFile, l layout) chunkFile { return lossyFile{f, l, d} }
}

func (f lossyFile) Lost(int64) error {
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	why := f.disk.why
	f.disk.why = nil
	return why
}

func (f lossyFile) WriteAt(p []byte, off int64) (int, error) {
	n, err := f.chunkFile.WriteAt(p, off)
	if err == nil && off >= headerSize && off < f.layout.uses && f.disk.wrote != nil {
		f.disk.wrote()
	}
	return n, err
}

func (f lossyFile) Drop() error {
	if f.disk.dropping != nil {
		f.disk.dropping()
	}
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	if f.disk.drops++; f.disk.drops == 1 {
		f.disk.first = time.Now()
	}
	for _, chunk := range f.disk.lost {
		if _, err := f.chunkFile.WriteAt(make([]byte, f.layout.unit), f.layout.base+chunk*f.layout.unit); err != nil {
			return err
		}
	}
	return nil
}

// loses has the disk not have chunks that are only in memory.
func (d *lossyDisk) loses(why error, chunks ...int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.why, d.lost = why, chunks
}

func (d *lossyDisk) dropped() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.drops
}

// TestLostWrites: where the disk did not keep something, all is read from it, checked and verified before it is used
// again. What it has is not fetched again, what it lost is, and is kept when the disk has had some time.
func TestLostWrites(t *testing.T) {
	for _, why := range []error{unix.EIO, unix.ENOSPC} {
		t.Run(why.Error(), func(t *testing.T) { stage(t, func(t *testing.T) { lostWrites(t, why) }) })
	}
}

func lostWrites(t *testing.T, why error) {
	var disk lossyDisk
	log := new(logbook)
	c := openCache(t, Options{ChunkSize: cs, Readahead: -1, Logger: log.logger()})
	disk.put(c)
	s := newServer(8 * cs)
	j := &judge{truth: s.content}
	b := openWith(t, c, s, OpenOptions{Verify: j.verify})
	readAll := func() {
		t.Helper()
		if err := readNow(ctx, b, s, 0, 8*cs); err != nil {
			t.Fatal(err)
		}
	}
	readAll()
	time.Sleep(10 * time.Second)
	mustHave(t, b, s, chunks(0, 8))
	if disk.dropped() != 0 {
		t.Errorf("pages were dropped %d times, and nothing was lost", disk.dropped())
	}
	disk.loses(why, 2, 3, 4)
	began := time.Now()
	time.Sleep(2 * lookEvery)
	readAll() // from memory, and checked
	if there := residents(t, b, s); len(there) > 0 || len(s.asked()) != 1 {
		t.Errorf("chunks %v are present; asked for %v", there, s.asked())
	}
	if passed, end := b.Passed(0); passed || end != 8*cs {
		t.Errorf("to %d all has passed: %v", end, passed)
	}
	time.Sleep(noticeFor + 2*lookEvery)
	if n := log.lines("did not keep"); n != 1 || disk.dropped() != 2 || disk.first.Before(began.Add(noticeFor)) {
		t.Errorf("it was said %d times, want once; pages were dropped %d times, want 2, the first time after %v: %s", n, disk.dropped(), disk.first.Sub(began), log.text.String())
	}
	readAll()
	mustHave(t, b, s, []int64{0, 1, 5, 6, 7})
	if want := []request{{0, 8 * cs}, {2 * cs, 3 * cs}}; !slices.Equal(s.asked(), want) {
		t.Errorf("asked for %v, want %v", s.asked(), want)
	}
	if want := []int64{0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6, 7, 7, 7}; !slices.Equal(j.sorted(), want) {
		t.Errorf("verified %v, want %v", j.sorted(), want)
	}
	disk.loses(nil)
	time.Sleep(diskRest)
	readAll()
	mustHave(t, b, s, chunks(0, 8))
	if want := []request{{0, 8 * cs}, {2 * cs, 3 * cs}, {2 * cs, 3 * cs}}; !slices.Equal(s.asked(), want) {
		t.Errorf("asked for %v, want %v", s.asked(), want)
	}
	if st := b.Stats(); st.Unkept != 3 {
		t.Errorf("%+v: 3 chunks came while nothing was written", st)
	}
}

// TestLostBeforeOpen: what earlier mounts wrote may have been lost with nobody asking; then only the disk is believed, by
// those, too, who open the blob before it is.
func TestLostBeforeOpen(t *testing.T) {
	stage(t, func(t *testing.T) {
		dir := t.TempDir()
		o := Options{ChunkSize: cs, Readahead: -1}
		s := newServer(4 * cs)
		fillCache(t, dir, o, s)
		var disk, quiet lossyDisk
		disk.loses(unix.EIO, 1)
		var blobs []*Blob
		for _, d := range []*lossyDisk{&disk, &quiet} {
			c := openCacheAt(t, dir, o)
			d.put(c)
			blobs = append(blobs, openBlob(t, c, s))
		}
		for round, want := range [][]int64{{}, {0, 2, 3}} {
			for i, b := range blobs {
				if err := readNow(ctx, b, s, 0, 4*cs); err != nil {
					t.Fatal(err)
				}
				if got := residents(t, b, s); i == 0 && !slices.Equal(got, want) || i == 1 && round == 0 && len(got) > 0 {
					t.Errorf("round %d, blob %d: chunks %v are present", round, i, got)
				}
			}
			time.Sleep(noticeFor + 2*houseEvery)
		}
		if got := residents(t, blobs[1], s); disk.dropped() != 2 || quiet.dropped() != 0 || !slices.Equal(got, chunks(0, 4)) {
			t.Errorf("pages were dropped %d and %d times, want 2 and none; present are %v to who was not told", disk.dropped(), quiet.dropped(), got)
		}
		if got, want := s.asked()[1:], []request{{cs, cs}, {cs, cs}}; !slices.Equal(got, want) {
			t.Errorf("asked for %v, want %v: once without being kept, and once more by who was not told to rest", got, want)
		}
	})
}

// An ambush has pages dropped, all of which were lost, at a moment of a test's choice.
type ambush struct {
	disk  lossyDisk
	truth judge
	at    atomic.Pointer[string] // "read", "write" or "verify"; nil: never again
	blob  *Blob
}

func (a *ambush) passes(where string) {
	if at := a.at.Load(); at != nil && *at == where && a.at.CompareAndSwap(at, nil) {
		a.lose()
	}
}

func (a *ambush) lose() {
	s := a.blob.store
	s.doubt()
	_ = s.disk.file.Drop() // a lossyFile's error is that of a write, of which the test's reads tell
	s.trust()
}

func (a *ambush) verify(ctx context.Context, p []byte, off int64) error {
	a.passes("verify")
	return a.truth.verify(ctx, p, off)
}

type ambushedFile struct {
	lossyFile
	ambush *ambush
}

func (f ambushedFile) ReadAt(p []byte, off int64) (int, error) {
	if off >= f.layout.base {
		f.ambush.passes("read")
	}
	return f.lossyFile.ReadAt(p, off)
}

// TestLostUnderAReader: pages go after a reader saw that his chunk is present, or after a flight wrote it or checked it.
// Nobody gets what is there then, and it is not present.
func TestLostUnderAReader(t *testing.T) {
	for _, test := range []struct {
		name, at string
		present  bool  // what was read before, chunks 0 to 3
		off, n   int64 // chunks that are read
		resident bool  // if they are present
	}{
		{"resident", "read", true, 0, 4, true},
		{"beside what is absent", "read", true, 0, 6, false},
		{"written", "write", true, 5, 1, false},
		{"checked", "verify", false, 0, 4, false},
		{"while they go", "drop", true, 0, 8, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newServer(8 * cs)
			a := &ambush{truth: judge{truth: s.content}}
			a.disk.lost = chunks(0, 8)
			a.disk.wrote = func() { a.passes("write") }
			c := openCache(t, Options{ChunkSize: cs, Readahead: -1})
			c.wrap = func(f chunkFile, l layout) chunkFile { return ambushedFile{lossyFile{f, l, &a.disk}, a} }
			a.blob = openWith(t, c, s, OpenOptions{Verify: a.verify})
			if err := readNow(ctx, a.blob, s, 0, 4*cs); err != nil {
				t.Fatal(err)
			}
			if !test.present {
				a.blob.store.mu.Lock()
				a.blob.store.present.reset()
				a.blob.store.mu.Unlock()
			}
			a.at.Store(&test.at)
			p := make([]byte, test.n*cs)
			switch {
			case test.resident:
				if a.blob.ReadResident(p, test.off*cs) {
					t.Errorf("resident; right: %v", bytes.Equal(p, s.content[:len(p)]))
				}
			case test.at == "drop":
				a.disk.dropping = func() {
					if err := readNow(ctx, a.blob, s, test.off*cs, test.n*cs); err != nil {
						t.Error(err)
					}
				}
				a.lose()
			default:
				if err := readNow(ctx, a.blob, s, test.off*cs, test.n*cs); err != nil {
					t.Error(err)
				}
			}
			if a.disk.dropped() != 1 {
				t.Fatalf("pages were dropped %d times: the test shows nothing", a.disk.dropped())
			}
			residents(t, a.blob, s)
			if err := readNow(ctx, a.blob, s, 0, 8*cs); err != nil {
				t.Error(err)
			}
		})
	}
}

// A cry closes a channel when a text is in the log.
type cry struct {
	text  string
	heard chan struct{}
	once  sync.Once
}

func (c *cry) Write(p []byte) (int, error) {
	if strings.Contains(string(p), c.text) {
		c.once.Do(func() { close(c.heard) })
	}
	return len(p), nil
}

// TestThinDisk has the kernel write back to a device that has no room, and then need its memory for something else. Two
// have read it all by then, of which one has fetched it.
func TestThinDisk(t *testing.T) {
	const size = 24 << 20
	dir := thin.Disk(t, 64<<20, 8<<20)
	var mounts [2]thinMount
	for i := range mounts {
		m := &mounts[i]
		m.said = &cry{text: "did not keep", heard: make(chan struct{})}
		log := slog.New(slog.NewTextHandler(m.said, nil))
		c := openCacheAt(t, filepath.Join(dir, "cache"), Options{MaxBytes: -1, MinFree: -1, Readahead: -1, Logger: log})
		m.server = &pattern{size: size}
		var err error
		if m.blob, err = c.Open(testDigest, size, m.server, OpenOptions{}); err != nil {
			t.Fatal(err)
		}
		if wrong := m.read(t); wrong > 0 || m.server.fetched.Load() != int64(1-i)*size {
			t.Fatalf("%d pieces are wrong from the start, %d bytes were fetched", wrong, m.server.fetched.Load())
		}
	}
	file, err := os.Open(mounts[0].blob.store.disk.handle.Name()) // whose error is not that of the cache's
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := file.Sync(); !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EIO) {
		t.Fatalf("write back: %v; the test shows nothing", err)
	}
	for i := range mounts {
		select {
		case <-mounts[i].said.heard:
		case <-time.After(time.Minute):
			t.Errorf("mount %d does not say that the disk did not keep what was written", i)
		}
	}
	if err := unix.Fadvise(int(file.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	for i := range mounts {
		m := &mounts[i]
		before := m.server.fetched.Load()
		if wrong := m.read(t); wrong > 0 {
			t.Errorf("mount %d: %d pieces of %d were wrong, with a nil error", i, wrong, size/thinPiece)
		}
		if again := m.server.fetched.Load() - before; again <= 0 || again >= size {
			t.Errorf("mount %d: %d bytes were fetched again: want some, which were lost, and not all", i, again)
		}
	}
}

const thinPiece = 1 << 20

type thinMount struct {
	said   *cry
	server *pattern
	blob   *Blob
}

// read reads all, and says how many pieces were wrong.
func (m *thinMount) read(t *testing.T) (wrong int) {
	t.Helper()
	got, want := make([]byte, thinPiece), make([]byte, thinPiece)
	for off := int64(0); off < m.blob.Size(); off += thinPiece {
		if err := m.blob.ReadAt(ctx, got, off); err != nil {
			t.Error(err)
		}
		if fill(want, off); !bytes.Equal(got, want) {
			wrong++
		}
	}
	return wrong
}
