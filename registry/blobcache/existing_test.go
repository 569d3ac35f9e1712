package blobcache

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// TestExisting: who wants a cache that exists gets that one, and makes none.
func TestExisting(t *testing.T) {
	o := Options{Existing: true, MaxBytes: 3 << 20, MinFree: 2 << 20}
	top := t.TempDir()
	dir := filepath.Join(top, "a", "b")
	for range 2 { // a directory that is not there, then one that is empty
		if _, err := New(dir, o); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%v", err)
		}
		left, err := os.ReadDir(dir)
		if len(left) > 0 || err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("there is %v; %v", left, err)
		}
		u, err := UsageOfNone(dir, o)
		if err != nil || u.Free <= 0 || u.Directory != dir || u.Blobs != 0 || u.Occupied != 0 || u.Limit != 3<<20 || u.MinFree != 2<<20 {
			t.Errorf("%+v, %v", u, err)
		}
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	var usages [2]Usage
	for i, o := range []Options{{}, {Existing: true}} {
		c := openCacheAt(t, dir, o)
		u, err := c.Usage()
		if err != nil {
			t.Fatal(err)
		}
		usages[i] = u
	}
	none, err := UsageOfNone(filepath.Join(top, "none"), Options{})
	if err != nil || none.Limit != usages[0].Limit || none.MinFree != usages[1].MinFree {
		t.Errorf("%+v, %v of one that is not there; %+v", none, err, usages)
	}
}
