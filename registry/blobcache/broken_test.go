package blobcache

import (
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// breakages are what makes a blob's file none of a blob's.
var breakages = map[string]func(name string) error{
	"header overwritten": func(name string) error {
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteAt([]byte("0123456789abcdef"), 0)
		return errors.Join(err, f.Close())
	},
	"cut in its header":     func(name string) error { return os.Truncate(name, 100) },
	"cut behind its header": func(name string) error { return os.Truncate(name, headerSize) },
	"cut in the blob":       func(name string) error { return os.Truncate(name, baseAlign+3*cs) },
	"too long":              func(name string) error { return os.Truncate(name, baseAlign+11*cs) },
	"empty":                 func(name string) error { return os.Truncate(name, 0) },
}

var brokenOptions = Options{ChunkSize: cs, Readahead: -1, MinFree: -1}

// breakOne makes a directory of two blobs, of 10 chunks each, and breaks the file of testDigest, which it names.
func breakOne(t *testing.T, breakIt func(string) error) (dir, name string, s *server) {
	t.Helper()
	dir = t.TempDir()
	s = newServer(10 * cs)
	fillCache(t, dir, brokenOptions, s)
	c := openCacheAt(t, dir, brokenOptions)
	b, err := c.Open(goodDigest, 10*cs, s, OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(readNow(ctx, b, s, 0, 10*cs), b.Close()); err != nil {
		t.Fatal(err)
	}
	name = fileOf(dir, 10*cs, cs)
	if err := breakIt(name); err != nil {
		t.Fatal(err)
	}
	return dir, name, s
}

var goodDigest = "sha256:" + strings.Repeat("e", 64)

func verify(t *testing.T, c *Cache) (checks []Check) {
	t.Helper()
	if err := c.Verify(ctx, func(check Check) error {
		checks = append(checks, check)
		return nil
	}); err != nil {
		t.Errorf("verify: %v", err)
	}
	return checks
}

// gone says whether there is no file of this name.
func gone(name string) bool {
	_, err := os.Lstat(name)
	return errors.Is(err, fs.ErrNotExist)
}

// TestBrokenFile: what is none of a blob's files any more is listed as that, and removed by whoever looks for damage or
// makes room. The rest goes on.
func TestBrokenFile(t *testing.T) {
	for what, breakIt := range breakages {
		t.Run(what, func(t *testing.T) {
			dir, name, _ := breakOne(t, breakIt)
			c := openCacheAt(t, dir, brokenOptions)
			list, err := c.List()
			if err != nil || len(list) != 2 || list[0].Complete() || !list[1].Complete() {
				t.Errorf("list: %+v, %v", list, err)
			} else if list[0].Occupied, list[0].Used = 0, (time.Time{}); list[0] != (Kept{Digest: testDigest, ChunkSize: cs, Damaged: true}) {
				t.Errorf("listed as %+v", list[0])
			}
			want := []Check{{Digest: goodDigest, ChunkSize: cs, Chunks: 10}, {Digest: testDigest, ChunkSize: cs, Broken: true}}
			if checks := verify(t, c); !slices.Equal(checks, want) || !gone(name) {
				t.Errorf("verify: %+v, want %+v; removed: %v", checks, want, gone(name))
			}
			if checks := verify(t, c); !slices.Equal(checks, want[:1]) {
				t.Errorf("verify again: %+v, want %+v", checks, want[:1])
			}
		})
		t.Run(what+", prune", func(t *testing.T) {
			dir, name, _ := breakOne(t, breakIt)
			c := openCacheAt(t, dir, brokenOptions)
			if _, err := c.Prune(1 << 30); err != nil || !gone(name) {
				t.Errorf("%v; removed: %v", err, gone(name))
			}
			if list, err := c.List(); err != nil || len(list) != 1 || !list[0].Complete() {
				t.Errorf("%+v, %v are left of the other blob", list, err)
			}
		})
		t.Run(what+", in use", func(t *testing.T) {
			dir, name, s := breakOne(t, func(string) error { return nil })
			b := openBlob(t, openCacheAt(t, dir, brokenOptions), s)
			if err := breakIt(name); err != nil {
				t.Fatal(err)
			}
			c := openCacheAt(t, dir, brokenOptions)
			if list, err := c.List(); err != nil || len(list) != 2 || !list[0].InUse || !list[0].Damaged {
				t.Errorf("list: %+v, %v", list, err)
			}
			want := Check{Digest: testDigest, ChunkSize: cs, Broken: true, InUse: true}
			if checks := verify(t, c); len(checks) != 2 || checks[1] != want {
				t.Errorf("verify: %+v, want %+v", checks, want)
			}
			if _, err := c.Prune(0); err != nil || gone(name) {
				t.Errorf("%v; what is in use is removed: %v", err, gone(name))
			}
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
			want.InUse = false
			if checks := verify(t, c); len(checks) != 1 || checks[0] != want || !gone(name) {
				t.Errorf("verify: %+v, want %+v; removed: %v", checks, want, gone(name))
			}
		})
	}
}

// TestBrokenFileMakesRoom: a broken file goes before anything that can be used, and what it took is room at once.
func TestBrokenFileMakesRoom(t *testing.T) {
	dir := t.TempDir()
	s := newServer(2 << 20)
	o := Options{ChunkSize: 16 * cs, Readahead: -1, MinFree: -1}
	fillCache(t, dir, o, s)
	name := fileOf(dir, 2<<20, 16*cs)
	if err := breakages["header overwritten"](name); err != nil {
		t.Fatal(err)
	}
	o.MaxBytes = 3 << 20
	log := new(logbook)
	o.Logger = log.logger()
	c := openCacheAt(t, dir, o)
	b, err := c.Open(goodDigest, 2<<20, s, OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := readNow(ctx, b, s, 0, 2<<20); err != nil {
		t.Fatal(err)
	}
	if st := b.Stats(); st.Unkept != 0 || st.ChunksPresent != 32 || !gone(name) {
		t.Errorf("%d of 32 chunks kept, %d not; removed: %v", st.ChunksPresent, st.Unkept, gone(name))
	}
	if log.lines("level=") != 0 {
		t.Errorf("log: %s", log.text.String())
	}
}
