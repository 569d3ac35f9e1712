package blobcache

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// passes lists the chunks that have passed.
func passes(b *Blob) (list []int64) {
	for off := int64(0); off < b.Size(); {
		passed, end := b.Passed(off)
		if passed {
			list = append(list, chunks(off/cs, ceil(end, cs))...)
		}
		off = end
	}
	return list
}

// Two processes judge the same blob differently. Neither reads what the other has let in, and no chunk changes under a
// reader.
func TestNeverOverwritten(t *testing.T) {
	caches := quietCaches(t, t.TempDir(), 2)
	s, other := newServer(4*cs), newServer(4*cs)
	for i := range other.content {
		other.content[i] ^= 0xff
	}
	good := openWith(t, caches[0], s, OpenOptions{Verify: (&judge{truth: s.content}).verify})
	evil := openWith(t, caches[1], other, OpenOptions{Verify: (&judge{truth: other.content}).verify})
	for round := range 3 {
		if err := errors.Join(readNow(ctx, good, s, 0, 2*cs), readNow(ctx, evil, other, 0, 3*cs), readNow(ctx, good, s, 0, 2*cs)); err != nil {
			t.Errorf("round %d: %v", round, err)
		}
	}
	if err := readNow(ctx, good, s, 2*cs, cs); err != nil {
		t.Error(err)
	}
	if got := len(s.asked()); got != 2 {
		t.Errorf("%d requests of who came first, want 2", got)
	}
	// Nobody else reads it any more: it is replaced.
	if err := errors.Join(good.Close(), readNow(ctx, evil, other, 0, 2*cs)); err != nil {
		t.Fatal(err)
	}
	before := len(other.asked())
	if err := readNow(ctx, evil, other, 0, 2*cs); err != nil || len(other.asked()) != before {
		t.Errorf("%v; it was not kept: %v", err, other.asked()[before:])
	}
}

// A hook that fails by itself says nothing about the bytes: the read fails, and what is on disk stays.
func TestHookFails(t *testing.T) {
	dir := t.TempDir()
	s := newServer(4 * cs)
	fillCache(t, dir, Options{ChunkSize: cs, Readahead: -1}, s)
	before := len(s.asked())
	for _, failure := range []error{
		errors.New("no tree"),
		fmt.Errorf("the tree: %w", &url.Error{Op: "Get", URL: "https://r.example/", Err: unix.EHOSTUNREACH}),
		context.DeadlineExceeded,
	} {
		c := openCacheAt(t, dir, Options{ChunkSize: cs, Readahead: -1})
		fails := true
		b := openWith(t, c, s, OpenOptions{Verify: func(context.Context, []byte, int64) error {
			if fails {
				return failure
			}
			return nil
		}})
		if err := readNow(ctx, b, s, 0, 4*cs); !errors.Is(err, failure) {
			t.Errorf("%v, want %v", err, failure)
		}
		if n := kept(t, c); n != 4*cs {
			t.Errorf("%v: %d bytes are kept", failure, n)
		}
		b.flights.Wait() // which asks about the other chunks, too
		fails = false
		if err := readNow(ctx, b, s, 0, 4*cs); err != nil {
			t.Error(err)
		}
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}
	if got := s.asked()[before:]; len(got) > 0 {
		t.Errorf("requests %v", got)
	}
}

// Who fetched the rest of a blob has ended before anybody looked: that all is here is told nevertheless, and told again
// to who asks for it.
func TestCompletedByOthers(t *testing.T) {
	caches := quietCaches(t, t.TempDir(), 2)
	s := newServer(4 * cs)
	calls := 0 // each begins when the one before has ended
	a := openBlob(t, caches[0], s)
	b := openWith(t, caches[1], s, OpenOptions{OnComplete: func() bool { calls++; return calls == 2 }})
	if err := errors.Join(readNow(ctx, b, s, 0, 2*cs), readNow(ctx, a, s, 2*cs, 2*cs), caches[0].Close()); err != nil {
		t.Fatal(err)
	}
	for want := 1; want <= 2; want++ {
		if err := b.store.keepHouse(false); err != nil {
			t.Fatal(err)
		}
		b.flights.Wait()
		if calls != want {
			t.Fatalf("told %d times, want %d; %+v", calls, want, b.Stats())
		}
		rested(b)
	}
	if err := errors.Join(b.store.keepHouse(false), b.Close()); err != nil || calls != 2 {
		t.Errorf("told %d times, %v", calls, err)
	}
	s.checkOnce(t)
}

// rested has b ready to be told again at once.
func rested(b *Blob) {
	b.store.mu.Lock()
	defer b.store.mu.Unlock()
	b.rest = time.Time{}
}

// Who was content with the whole is told again when some of it was taken in anew and is not the same, and not otherwise.
func TestCompleteAnew(t *testing.T) {
	s := newServer(4 * cs)
	c := openCache(t, Options{ChunkSize: cs, Readahead: -1})
	calls := 0
	var b *Blob
	b = openWith(t, c, s, OpenOptions{OnComplete: func() bool {
		calls++
		return b.Examine(func(readAt func(context.Context, []byte, int64) error) error {
			return readAt(ctx, make([]byte, 4*cs), 0)
		}) != nil
	}})
	for want := 1; want <= 3; want++ {
		s.content[2*cs+1]++
		if err := readNow(ctx, b, s, 0, 4*cs); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := b.store.keepHouse(false); err != nil {
				t.Fatal(err)
			}
			b.flights.Wait()
			rested(b)
		}
		if calls != want || !slices.Equal(passes(b), chunks(0, 4)) || b.Changed() != (want > 1) {
			t.Errorf("told %d times, want %d; %v have passed; changed: %v", calls, want, passes(b), b.Changed())
		}
		evictAll(t, c, 4*cs)
		if err := readNow(ctx, b, s, 0, 4*cs); err != nil || !slices.Equal(passes(b), chunks(0, 4)) {
			t.Errorf("evicted, and the same again: %v have passed, %v", passes(b), err)
		}
		evictAll(t, c, 4*cs)
	}
}

// What has passed is what was looked at in this process, by whatever verifies the blob.
func TestPassed(t *testing.T) {
	content := newServer(6 * cs)
	accept := func(context.Context, []byte, int64) error { return nil }
	for _, test := range []struct {
		name string
		o    OpenOptions
		disk []int64 // have passed of the three chunks that an earlier mount left, when they are read
		net  []int64 // and of the three that are fetched
	}{
		{"hook", OpenOptions{Verify: accept}, chunks(0, 3), chunks(3, 6)},
		{"fetcher", OpenOptions{Vouched: true}, nil, chunks(3, 6)},
		{"nothing", OpenOptions{}, nil, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			first := openWith(t, quietCaches(t, dir, 1)[0], content, test.o)
			if err := errors.Join(readNow(ctx, first, content, 0, 3*cs), first.Close()); err != nil {
				t.Fatal(err)
			}
			c := quietCaches(t, dir, 1)[0]
			b := openWith(t, c, content, test.o)
			if got := passes(b); len(got) > 0 {
				t.Errorf("before any read %v have passed", got)
			}
			if err := readNow(ctx, b, content, 0, 6*cs); err != nil {
				t.Fatal(err)
			}
			if got, want := passes(b), slices.Concat(test.disk, test.net); !slices.Equal(got, want) {
				t.Errorf("%v have passed, want %v", got, want)
			}
			evictAll(t, c, 6*cs)
			if got := passes(b); len(got) > 0 {
				t.Errorf("%v have passed and are gone", got)
			}
		})
	}
}

// An examination lets pass what it was given, and not what came as something else since.
func TestExamine(t *testing.T) {
	s := newServer(8*cs + 5)
	c := openCache(t, Options{ChunkSize: cs, Readahead: -1})
	b := openBlob(t, c, s)
	examine := func(meanwhile func(), piece int64) error {
		var read strings.Builder
		return b.Examine(func(readAt func(context.Context, []byte, int64) error) error {
			for off := int64(0); off < b.Size(); off += piece {
				p := make([]byte, min(piece, b.Size()-off))
				if err := readAt(ctx, p, off); err != nil {
					return err
				}
				read.Write(p)
			}
			if read.String() != string(s.content) {
				t.Error("the examination was given other bytes")
			}
			meanwhile()
			return nil
		})
	}
	for _, piece := range []int64{cs, 3 * cs, 1000, 5000} {
		if len(passes(b)) > 0 {
			evictAll(t, c, b.Size())
		}
		if err := examine(func() {}, piece); err != nil || !slices.Equal(passes(b), chunks(0, 9)) {
			t.Errorf("pieces of %d: %v have passed, %v", piece, passes(b), err)
		}
	}
	err := examine(func() {
		evictAll(t, c, b.Size())
		s.content[3*cs+7]++
		if err := readNow(ctx, b, s, 2*cs, 3*cs); err != nil {
			t.Error(err)
		}
	}, 2*cs)
	if err != nil || !slices.Equal(passes(b), []int64{2, 4}) || !b.Changed() {
		t.Errorf("%v have passed after they were fetched anew, changed: %v, %v", passes(b), b.Changed(), err)
	}
	if err := examine(func() {}, cs); err != nil {
		t.Error(err)
	}
	want := errors.New("not content")
	b = openBlob(t, openCache(t, Options{ChunkSize: cs, Readahead: -1}), s)
	if err := b.Examine(func(func(context.Context, []byte, int64) error) error { return want }); err != want || len(passes(b)) > 0 {
		t.Errorf("%v; %v have passed", err, passes(b))
	}
}
