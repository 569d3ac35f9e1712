package e2e

import (
	"bytes"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
)

// TestTwoMountsShare: two servers of one image fetch each byte once between them, and a third, later, fetches none.
func TestTwoMountsShare(t *testing.T) {
	im, s := served(t)
	_, size := s.layer(im.ref)
	im.ResetStats()
	dirs := []string{s.mount(im.ref, "--backend=fuse"), s.mount(im.ref, "--backend=fuse")}
	var wg sync.WaitGroup
	for i, dir := range dirs {
		wg.Go(func() {
			// Each from another end.
			names := []string{bigFile, deepFile}
			sizes := []int{bigSize, deepSize}
			for j := range names {
				k := (i + j) % len(names)
				if got, err := os.ReadFile(filepath.Join(dir, names[k])); err != nil || !bytes.Equal(got, content(names[k], sizes[k])) {
					t.Errorf("%s: %d bytes, %v", names[k], len(got), err)
				}
			}
			if r := s.run("sh", "-c", "cat "+dir+"/small/*/* >/dev/null"); r.code != 0 {
				t.Errorf("%s", r.stderr)
			}
		})
	}
	wg.Wait()
	if got := im.Stats().BlobBytes; got > size {
		t.Errorf("%d bytes were fetched of a layer of %d", got, size)
	}
	for _, dir := range dirs {
		s.must("umount", dir)
	}
	s.must("check", im.ref) // which brings the rest
	im.ResetStats()
	dir := s.mount(im.ref, "--backend=fuse")
	showsAll(t, dir)
	s.must("umount", dir)
	if got := im.Stats().BlobGETs; got != 0 {
		t.Errorf("%d GETs of a layer that is here", got)
	}
	s.nothingLeft(dir)
}

// TestKilledMount: the server of a mount is killed while another one reads the same layer, which goes on, and what the
// dead one had leaves no trace.
func TestKilledMount(t *testing.T) {
	im, s := served(t)
	one, two := s.mount(im.ref, "--backend=fuse"), s.mount(im.ref, "--backend=fuse")
	reading := make(chan error, 1)
	go func() {
		_, err := os.ReadFile(filepath.Join(one, bigFile))
		reading <- err
	}()
	s.signal(one, syscall.SIGKILL)
	showsAll(t, two)
	<-reading // the dead mount's reader has an error, or was quick
	s.must("umount", one)
	s.must("umount", two)
	s.must("cache", "verify")
	s.must("check", im.ref)
	s.nothingLeft(two)
}

func showsAll(t *testing.T, dir string) {
	t.Helper()
	if got, err := os.ReadFile(filepath.Join(dir, bigFile)); err != nil || !bytes.Equal(got, content(bigFile, bigSize)) {
		t.Errorf("%s: %d bytes, %v", bigFile, len(got), err)
	}
}
