package erofsfmt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/require"
)

// A sieve is an image of which some ranges are here.
type sieve struct {
	ReaderAt
	have  ranges
	calls [][]Range
}

var errFar = errors.New("this is far away")

func (s *sieve) ReadAt(ctx context.Context, p []byte, off int64) error {
	if !s.have.covers(off, int64(len(p))) {
		return fmt.Errorf("%d bytes at %d: %w", len(p), off, errFar)
	}
	return s.ReaderAt.ReadAt(ctx, p, off)
}

func (s *sieve) fetch(_ context.Context, all []Range) error {
	s.calls = append(s.calls, slices.Clone(all))
	for _, r := range all {
		s.have.add(r)
	}
	return nil
}

func (s *sieve) bytes() (n int64) {
	for _, r := range s.have {
		n += r.Len
	}
	return n
}

// requests is how many ranges were asked for.
func (s *sieve) requests() (n int) {
	for _, c := range s.calls {
		n += len(c)
	}
	return n
}

// load loads the metadata of an image, and nothing else is here then.
func load(t testing.TB, src ReaderAt, o MetadataOptions) (*sieve, MetadataStats) {
	t.Helper()
	s := &sieve{ReaderAt: src}
	stats, err := LoadMetadata(context.Background(), s, o, s.fetch)
	if err != nil {
		t.Fatal(err)
	}
	return s, stats
}

// listed is what listing shows of an image: all but the content of regular files.
func listed(t testing.TB, src ReaderAt) []corpus.Entry {
	t.Helper()
	im, err := Open(context.Background(), src)
	if err != nil {
		t.Fatal(err)
	}
	var got []corpus.Entry
	visit(t, im, func(name string, ino *Inode) {
		shown := *ino
		if ino.Mode&modeType == modeReg {
			shown.Mode = ino.Mode&^modeType | modeFifo // which has no content to describe
		}
		e := describe(t, im, name, &shown)
		if ino.Mode&modeType == modeReg {
			e.Mode, e.Size = ino.Mode, ino.Size
		}
		got = append(got, e)
	})
	return got
}

// The metadata of each image of the corpus is enough to list it with everything that its inodes have.
func TestMetadataOfCorpus(t *testing.T) {
	for _, c := range corpus.Images(t) {
		t.Run(c.Name, func(t *testing.T) {
			s, stats := load(t, memory(c.Data), MetadataOptions{Gap: -1})
			want := c.Listing(t)
			for i := range want {
				want[i].SHA256 = ""
			}
			compare(t, listed(t, s), want)
			if stats.Faults != 0 || stats.Unread != 0 || stats.Stopped || stats.Dirs != 53 {
				t.Errorf("%+v", stats)
			}
			// 376 entries and their inodes; only one of the images has nothing else in it.
			if stats.Bytes != s.bytes() || stats.Bytes > 96<<10 {
				t.Errorf("%d bytes asked for, %d are here, of %d", stats.Bytes, s.bytes(), len(c.Data))
			}
			if stats.Rounds > 4 {
				t.Errorf("%d rounds", stats.Rounds)
			}
		})
	}
}

// largeTree is an image like one of a real root: 16,000 files in a tree of 1,000 directories, some with data, links and
// xattrs between them.
func largeTree(t testing.TB, files int) memory {
	t.Helper()
	var image growing
	b, err := mkerofs.New(&image, mkerofs.Options{InlineMax: 2048})
	if err != nil {
		t.Fatal(err)
	}
	add := func(e mkerofs.Entry) {
		t.Helper()
		e.Mtime = time.Unix(1600000000, 0)
		if err := b.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	for i := range files {
		dir := fmt.Sprintf("top%d/%d/dir-%d", i/16%10, i/16%100, i/16)
		name := fmt.Sprintf("%s/a-file-%d", dir, i)
		switch {
		case i%16 == 3:
			add(mkerofs.Entry{Path: name, Mode: mkerofs.ModeSymlink | 0o777, Target: fmt.Sprintf("../../a/target/for/%d", i)})
		default:
			e := mkerofs.Entry{Path: name, Mode: mkerofs.ModeRegular | 0o644, Size: int64(i%7) * 700}
			e.Open = func() (io.ReadCloser, error) {
				return io.NopCloser(bytes.NewReader(pattern(int(e.Size), byte(i)))), nil
			}
			if i%16 == 5 {
				e.Xattrs = map[string][]byte{"user.shared": []byte("by many"), "user.own": fmt.Append(nil, i)}
			}
			add(e)
		}
	}
	if _, err := b.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	return memory(image)
}

// growing is an io.WriterAt.
type growing []byte

func (g *growing) WriteAt(p []byte, off int64) (int, error) {
	if end := int(off) + len(p); end > len(*g) {
		*g = slices.Grow(*g, end-len(*g))[:end]
	}
	return copy((*g)[off:], p), nil
}

// firstData is where the content of files begins that does not lie with their inodes.
func firstData(t testing.TB, src ReaderAt) int64 {
	t.Helper()
	im, err := Open(context.Background(), src)
	if err != nil {
		t.Fatal(err)
	}
	first := src.Size()
	visit(t, im, func(_ string, ino *Inode) {
		if ino.Mode&modeType == modeReg && ino.Size >= im.sb.BlockSize() {
			first = min(first, im.blockOff(ino.startBlk))
		}
	})
	return first
}

// What our builder makes has its metadata together: it takes a request to find out where, and one to have the rest.
func TestMetadataIsFewRequests(t *testing.T) {
	image := largeTree(t, 16000)
	want := listed(t, image)
	metadata := firstData(t, image)
	for _, c := range []struct {
		unit          int64
		rounds, asked int
	}{{256 << 10, 2, 2}, {4 << 10, 4, 4}} {
		s, stats := load(t, image, MetadataOptions{Unit: c.unit})
		t.Logf("unit %d: %+v, %d requests; %d bytes of %d are metadata", c.unit, stats, s.requests(), metadata, len(image))
		if stats.Rounds > c.rounds || s.requests() > c.asked {
			t.Errorf("unit %d: %d rounds, %d requests: %v", c.unit, stats.Rounds, s.requests(), s.calls)
		}
		if most := metadata*6/5 + c.unit; s.bytes() > most {
			t.Errorf("unit %d: %d bytes for %d of metadata", c.unit, s.bytes(), metadata)
		}
		compare(t, listed(t, s), want)
	}
}

// Where nothing of the image is here but what was asked for, each call asks for something new, to the unit, in order and
// apart by more than the gap.
func TestMetadataRanges(t *testing.T) {
	image := largeTree(t, 3000)
	for _, o := range []MetadataOptions{{}, {Unit: 1 << 16}, {Unit: 5000}, {Gap: -1}, {Unit: 1 << 14, Gap: 1 << 16}} {
		s, _ := load(t, image, o)
		unit, gap := (max(o.Unit, 1)+4095)&^4095, o.Gap
		if gap == 0 {
			gap = 256 << 10
		}
		var before ranges
		for _, call := range s.calls {
			last := int64(-1) << 40
			for _, r := range call {
				if r.Off%unit != 0 || r.end()%unit != 0 && r.end() != image.Size() || r.Len <= 0 || r.Off-last <= gap {
					t.Errorf("%+v: %v", o, call)
				}
				if before.covers(r.Off, r.Len) {
					t.Errorf("%+v: %v was asked for before", o, r)
				}
				last = r.end()
				before.add(r)
			}
		}
	}
}

// What is corrupt is counted and left alone; the rest is loaded.
func TestMetadataOfCorruptImage(t *testing.T) {
	im := largeTree(t, 1600)
	whole, err := Open(context.Background(), im)
	if err != nil {
		t.Fatal(err)
	}
	broken := bytes.Clone(im)
	dir := find(t, whole, "top3", "3", "dir-3")
	at := whole.bodyAt(dir, 1).off
	clear(broken[at : at+ondisk.DirentSize]) // no entry can be found in it
	file := find(t, whole, "top4", "4", "dir-4", "a-file-70")
	broken[whole.locate(file.Nid).off] |= 0x0e // no layout
	s, stats := load(t, memory(broken), MetadataOptions{})
	if stats.Faults != 2 || stats.Unread != 0 || stats.Err != nil {
		t.Errorf("%+v", stats)
	}
	bad, err := Open(context.Background(), s)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	visitWhole := func(names ...string) { n += len(readDir(t, bad, find(t, bad, names...))) - 2 }
	for i := range 100 {
		if i != 3 {
			visitWhole(fmt.Sprintf("top%d", i%10), fmt.Sprint(i), fmt.Sprintf("dir-%d", i))
		}
	}
	if n != 99*16 {
		t.Errorf("%d entries are here", n)
	}
}

// What a source does not give is counted, with the first reason; the rest is loaded.
func TestMetadataUnread(t *testing.T) {
	image := largeTree(t, 1600)
	whole, err := Open(context.Background(), image)
	if err != nil {
		t.Fatal(err)
	}
	hole := whole.locate(find(t, whole, "top3", "3", "dir-3", "a-file-50").Nid).off &^ 4095
	s := &sieve{ReaderAt: image}
	calls := 0
	stats, err := LoadMetadata(t.Context(), s, MetadataOptions{}, func(ctx context.Context, all []Range) error {
		calls++
		var some []Range
		for _, r := range all {
			some = ranges{{hole, 4096}}.without(some, r)
		}
		return s.fetch(ctx, some)
	})
	if err != nil || calls != stats.Rounds || stats.Unread == 0 || !errors.Is(stats.Err, errFar) || stats.Faults != 0 {
		t.Errorf("%+v, %v, %d calls", stats, err, calls)
	}
	if stats.Entries < 1600 {
		t.Errorf("%d entries were seen", stats.Entries)
	}
}

// Loading ends with an error of fetch, and with its context.
func TestMetadataEnds(t *testing.T) {
	image := largeTree(t, 1600)
	for after := range 3 {
		s := &sieve{ReaderAt: image}
		full := errors.New("no more")
		fetch := func(ctx context.Context, all []Range) error {
			if len(s.calls) == after {
				return full
			}
			return s.fetch(ctx, all)
		}
		if _, err := LoadMetadata(t.Context(), s, MetadataOptions{Gap: -1}, fetch); !errors.Is(err, full) {
			t.Errorf("after %d: %v", after, err)
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		over := errors.New("it is over")
		s = &sieve{ReaderAt: image}
		_, err := LoadMetadata(ctx, s, MetadataOptions{Gap: -1}, func(ctx context.Context, all []Range) error {
			if len(s.calls) == after {
				cancel(over)
			}
			return s.fetch(ctx, all)
		})
		if !errors.Is(err, over) {
			t.Errorf("after %d: %v", after, err)
		}
	}
	for name, data := range map[string]memory{"nothing": nil, "zeros": make(memory, 1<<20), "cut off": image[:1500]} {
		s := &sieve{ReaderAt: data}
		if _, err := LoadMetadata(t.Context(), s, MetadataOptions{}, s.fetch); !errors.As(err, new(*FormatError)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Directories that lead to each other are looked at once, and one without an end has one.
func TestMetadataOfLoops(t *testing.T) {
	f := newFake(ondisk.LayoutPlain, 1<<40)
	f.inode.Mode = modeDir | 0o755
	f.inode.U = 1
	f.blocks[1] = dirBytes("", ".", fakeFile, "..", fakeRoot, "again", fakeFile, "up", fakeRoot)
	f.blocks[2] = f.blocks[1]
	for i := range 40 {
		f.blocks[3+i] = make([]byte, 4096)
	}
	s, stats := load(t, f.image(t), MetadataOptions{})
	if stats.Dirs != 2 || stats.Stopped || stats.Faults != maxBadBlocks || stats.Entries != 3+4+4 {
		t.Errorf("%+v, %v", stats, s.calls)
	}
}

// One block of a directory that stands for a whole tree of them is not looked at for ever: here 128 bytes of a chunk
// table say that there are 8,000 entries.
func TestMetadataOfAmplifier(t *testing.T) {
	f := newFake(ondisk.LayoutChunk, 32<<12)
	f.super.FeatureIncompat = ondisk.IncompatChunkedFile
	f.inode.Mode = modeDir | 0o755
	f.body = bytes.Repeat([]byte{1, 0, 0, 0}, 32)
	var entries []any
	for i := range 250 {
		entries = append(entries, fmt.Sprintf("%03d", i), fakeFile)
	}
	f.blocks[1] = dirBytes("", entries...)
	image := f.image(t)
	for _, c := range []struct {
		most, dirs, want int64
		stopped          bool
	}{{8003, 10, 8003, false}, {8002, 10, 8003, true}, {5000, 10, 5001, true}, {8003, 1, 3, true}} {
		s := &sieve{ReaderAt: image}
		l := newLoader(s, MetadataOptions{}, s.fetch)
		l.maxEntries, l.maxDirs = c.most, c.dirs
		if err := l.load(t.Context()); err != nil || l.stats.Entries != c.want || l.stats.Stopped != c.stopped || l.stats.Faults != 0 {
			t.Errorf("%+v: %+v, %v", c, l.stats, err)
		}
	}
}

// One entry is looked at for each byte of an image, or a million: a small one that has more has them from a block that a
// chunk table names again and again.
func TestMetadataOfASmallAmplifier(t *testing.T) {
	for size, want := range map[int64]int64{0: 1 << 20, 8 << 10: 1<<20 + 8<<10, 1 << 26: 1 << 26, 1 << 60: 1 << 26} {
		if got := newLoader(unread(size), MetadataOptions{}, nil).maxEntries; got != want {
			t.Errorf("%d entries of %d bytes, want %d", got, size, want)
		}
	}
}

// unread is a source that is not read.
type unread int64

func (s unread) Size() int64                               { return int64(s) }
func (unread) ReadAt(context.Context, []byte, int64) error { return errors.New("read") }

// probeMetadata loads the metadata of what may be hostile: it ends, asks for each byte once, and has no errors but those
// that the package promises.
func probeMetadata(t testing.TB, data []byte) {
	s := &sieve{ReaderAt: memory(data)}
	l := newLoader(s, MetadataOptions{Gap: -1}, func(ctx context.Context, all []Range) error {
		for _, r := range all {
			if r.Off < 0 || r.Len <= 0 || r.Len > int64(len(data))-r.Off || len(s.have.without(nil, r)) != 1 {
				t.Fatalf("%v was asked for, of %d bytes of which %v were", r, len(data), s.have)
			}
		}
		return s.fetch(ctx, all)
	})
	l.maxDirs, l.maxEntries = 1<<10, 1<<15
	err := l.load(context.Background())
	(&prober{t: t}).check(err)
	if l.stats.Unread != 0 || l.stats.Dirs > l.maxDirs+1 || l.stats.Entries > l.maxEntries+1 {
		t.Fatalf("%+v", l.stats)
	}
}

// A file costs no memory.
func TestMetadataMemory(t *testing.T) {
	require.Long(t, "makes an image of 200,000 files")
	const files = 200_000
	var image growing
	b, err := mkerofs.New(&image, mkerofs.Options{MetadataOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	for i := range files {
		err := b.Add(mkerofs.Entry{
			Path: fmt.Sprintf("directory-%03d/%d/file-%06d", i/1000, i/20, i), Mode: mkerofs.ModeRegular | 0o644,
			UID: uint32(i), Mtime: time.Unix(int64(i), 0), Size: 1,
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := b.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	b = nil
	peak := watchMemory(t)
	began := cpuTime(t)
	s := &sieve{ReaderAt: memory(image)}
	stats, err := LoadMetadata(t.Context(), s, MetadataOptions{Unit: 256 << 10}, s.fetch)
	if err != nil || stats.Entries < files {
		t.Fatalf("%+v, %v", stats, err)
	}
	t.Logf("%+v in %v, %d KiB", stats, cpuTime(t)-began, peak()>>10)
	if most := int64(loaderCache + 16<<20); peak() > most {
		t.Errorf("%d bytes more than before for %d files", peak(), files)
	}
}
