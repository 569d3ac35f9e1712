package fusefs_test

import (
	"bytes"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
)

// TestRandomReads: small reads at random by several threads, for which more is put
// into the page cache than was asked for, and then all of each file.
func TestRandomReads(t *testing.T) {
	for _, name := range []string{"zstd-64k", "deflate-64k", "lzma", "lz4hc-64k", "lz4-frag"} {
		dir := mountImage(t, writeImage(t, name))
		im, err := erofsfmt.Open(t.Context(), sourcetest.Memory(corpus.Get(t, name).Data))
		if err != nil {
			t.Fatal(err)
		}
		files := 0
		for _, e := range corpus.Get(t, name).Listing(t) {
			if e.Mode&unix.S_IFMT != unix.S_IFREG || e.Size < 20_000 {
				continue
			}
			files++
			want, err := fs.ReadFile(im.FS(), e.Path)
			if err != nil {
				t.Fatal(err)
			}
			f, err := os.Open(filepath.Join(dir, e.Path))
			if err != nil {
				t.Fatal(err)
			}
			// Without it the kernel would read ahead.
			if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
				t.Fatal(err)
			}
			var readers sync.WaitGroup
			for range 4 {
				readers.Go(func() {
					buf := make([]byte, 4096)
					for range 50 {
						off := rand.Int64N(e.Size)
						n, err := f.ReadAt(buf, off)
						if err != nil && err != io.EOF || !bytes.Equal(buf[:n], want[off:off+int64(n)]) || n < min(len(buf), int(e.Size-off)) {
							t.Errorf("%s: %s: %d bytes at %d: %v", name, e.Path, n, off, err)
						}
					}
				})
			}
			readers.Wait()
			if got, err := io.ReadAll(f); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: %s: all of it: %d of %d bytes, %v", name, e.Path, len(got), len(want), err)
			}
			f.Close()
		}
		if files == 0 {
			t.Errorf("%s has no large file", name)
		}
	}
}
