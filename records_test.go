package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

// useUp takes all names that the file system of dir has left.
func useUp(t *testing.T, dir string) {
	t.Helper()
	for i := 0; ; i++ {
		f, err := os.Create(filepath.Join(dir, fmt.Sprint(i)))
		if errors.Is(err, unix.ENOSPC) {
			return
		}
		must(t, err)
		must(t, f.Close())
	}
}

// TestNoRecords: where what tags lead to cannot be remembered, images are mounted as well, and it is said once. Offline,
// that is an error for a tag, and none for a digest.
func TestNoRecords(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, s *shelf){
		"a file": func(t *testing.T, s *shelf) { must(t, os.WriteFile(recordsDir(s.dir), nil, 0o600)) },
		"open to others": func(t *testing.T, s *shelf) {
			must(t, errors.Join(os.Mkdir(recordsDir(s.dir), 0o755), os.Chmod(recordsDir(s.dir), 0o755)))
		},
		"no inode": func(t *testing.T, s *shelf) {
			require.Has(t, "root")
			top := t.TempDir()
			must(t, unix.Mount("tmpfs", top, "tmpfs", 0, "size=64m,nr_inodes=200,mode=700"))
			t.Cleanup(func() { must(t, unix.Unmount(top, 0)) })
			s.dir = filepath.Join(top, "cache")
			c, err := blobcache.New(s.dir, blobcache.Options{})
			must(t, err)
			must(t, c.Close())
			useUp(t, top)
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newShelf(t, verifiable.Options{Chunk: testChunk})
			must(t, os.Mkdir(s.dir, 0o700))
			spoil(t, s)
			o := s.mustOpen(false)
			if failed := s.readAll(o); failed > 0 {
				t.Errorf("%d reads failed", failed)
			}
			must(t, o.Close())
			if log := s.log.String(); strings.Count(log, "not remembered") != 1 {
				t.Errorf("log: %s", log)
			}
			_, err := s.open(true)
			if err == nil || !strings.Contains(err.Error(), "what tags led to the last time cannot be looked up") {
				t.Errorf("offline: %v", err)
			}
			if name == "no inode" {
				return // nothing is kept, either
			}
			byDigest, err := registry.ParseReference(s.ref)
			must(t, err)
			byDigest.Tag, byDigest.Digest = "", o.image.Digest
			s.ref = byDigest.String()
			if failed := s.readAll(s.mustOpen(true)); failed > 0 {
				t.Errorf("%d reads of the digest failed", failed)
			}
		})
	}
}
