package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
)

// chunk is what the cache fetches at a time.
const chunk = 256 << 10

// content is what the files of testImage hold: offset and path decide.
func content(path string, size int) []byte {
	b := make([]byte, size)
	rand.NewChaCha8([32]byte([]byte(fmt.Sprintf("%-32s", path)))).Read(b)
	return b
}

const (
	deepFile = "a/b/c/deep"
	deepSize = 4096
	bigFile  = "big"
	bigSize  = 32 << 20
)

// xattrs is what the deep file has beside its content.
var xattrs = map[string]map[string][]byte{deepFile: {"trusted.note": []byte("t"), "user.note": []byte("u")}}

// servedImage is an image of about 64 MB with a big file, 2,000 small ones and
// one small one three directories down, in a registry of its own.
type servedImage struct {
	*fakeregistry.Registry
	ref string
}

func serveImage(t *testing.T) servedImage {
	t.Helper()
	var image memory
	b, err := mkerofs.New(&image, mkerofs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	add := func(path string, size int) {
		t.Helper()
		err := b.Add(mkerofs.Entry{
			Path: path, Mode: mkerofs.ModeRegular | 0o644, Mtime: time.Unix(1600000000, 0), Size: int64(size),
			Xattrs: xattrs[path],
			Open:   func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content(path, size))), nil },
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for i := range 2000 {
		add(fmt.Sprintf("small/%d/%d", i%20, i), 16<<10)
	}
	add(deepFile, deepSize)
	add(bigFile, bigSize)
	if _, err := b.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	r, err := fakeregistry.New(fakeregistry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	layer := ocipush.Bytes(registry.MediaTypeErofs, image)
	if _, err := ocipush.Push(context.Background(), r.URL(), "net/image:v1", []ocipush.Layer{layer}, ocipush.Options{}); err != nil {
		t.Fatal(err)
	}
	r.ResetStats()
	return servedImage{r, r.Addr() + "/net/image:v1"}
}

// memory is an io.WriterAt that grows.
type memory []byte

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	if end := int(off) + len(p); end > len(*m) {
		*m = append(*m, make([]byte, end-len(*m))...)
	}
	return copy((*m)[off:], p), nil
}

// TestOneFile: what mounting and one small file deep in the tree cost.
func TestOneFile(t *testing.T) {
	im, s, dir := servedAndMounted(t)
	got, err := os.ReadFile(filepath.Join(dir, deepFile))
	if err != nil || !bytes.Equal(got, content(deepFile, deepSize)) {
		t.Fatalf("read %d bytes, %v", len(got), err)
	}
	stats := im.Stats()
	t.Logf("mount and one file: %d GETs of the blob, %d bytes", stats.BlobGETs, stats.BlobBytes)
	if stats.BlobGETs > 6 || stats.BlobBytes >= 2<<20 {
		t.Errorf("%d GETs and %d bytes; at most 6 and less than 2 MiB are allowed", stats.BlobGETs, stats.BlobBytes)
	}
	// Another process, and one that the kernel's page cache cannot help.
	im.ResetStats()
	for _, flag := range []string{"iflag=fullblock", "iflag=direct"} {
		if r := s.run("dd", "if="+filepath.Join(dir, deepFile), "of=/dev/null", "bs=4096", flag); r.code != 0 {
			t.Errorf("dd %s: %s", flag, r.stderr)
		}
	}
	if stats := im.Stats(); stats.BlobGETs != 0 {
		t.Errorf("a second process caused %d GETs", stats.BlobGETs)
	}
}

// TestParallelReaders: ten processes read one cold file; no byte travels twice.
func TestParallelReaders(t *testing.T) {
	im, _, dir := servedAndMounted(t)
	want := content(bigFile, bigSize)
	var readers sync.WaitGroup
	for range 10 {
		readers.Go(func() {
			got, err := os.ReadFile(filepath.Join(dir, bigFile))
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("read %d bytes, %v", len(got), err)
			}
		})
	}
	readers.Wait()
	fetched := make(map[int64]int)
	for _, r := range im.Requests() {
		if !strings.Contains(r.Path, "/blobs/") || r.Range == "" {
			continue
		}
		var first, last int64
		if _, err := fmt.Sscanf(r.Range, "bytes=%d-%d", &first, &last); err != nil {
			t.Fatalf("range %q: %v", r.Range, err)
		}
		for c := first / chunk; c <= last/chunk; c++ {
			fetched[c]++
		}
	}
	for c, n := range fetched {
		if n > 1 {
			t.Errorf("chunk %d was fetched %d times", c, n)
		}
	}
	if len(fetched) < bigSize/chunk {
		t.Errorf("only %d chunks were fetched", len(fetched))
	}
	t.Logf("%d chunks in %d GETs", len(fetched), im.Stats().BlobGETs)
}

// TestRegistryDies: the reader of a dead registry gets EIO in time, never zeros,
// and goes on reading the same open file when the registry is back.
func TestRegistryDies(t *testing.T) {
	const wait = 2 * time.Second
	im, s, dir, f := servedAndOpen(t, "--on-error=wait:"+wait.String())
	shows(t, f, 0, "before")
	im.Stop()
	begin := time.Now()
	n, err := f.ReadAt(make([]byte, 4096), bigSize/2)
	took := time.Since(begin)
	if n != 0 || !errors.Is(err, syscall.EIO) {
		t.Fatalf("from a dead registry: %d bytes, %v; want EIO", n, err)
	}
	if took < wait/2 || took > wait+3*time.Second {
		t.Errorf("EIO after %v; reads were to wait %v", took, wait)
	}
	// What is here is read without a registry.
	shows(t, f, 8192, "cached bytes while the registry is dead")
	if log := s.serverLog(dir); !strings.Contains(log, "input/output error") || !strings.Contains(log, "refused") {
		t.Errorf("the log does not say why: %q", log)
	}
	must(t, im.Start())
	shows(t, f, bigSize/2, "after")
}

// TestRegistryReturns: a registry that is back within the wait costs the reader
// time, and nothing else.
func TestRegistryReturns(t *testing.T) {
	t.Parallel()
	im, _, _, f := servedAndOpen(t)
	im.Stop()
	done := make(chan struct{})
	go func() {
		defer close(done)
		shows(t, f, bigSize/2, "after")
	}()
	select {
	case <-done:
		t.Fatal("the read did not wait")
	case <-time.After(500 * time.Millisecond):
	}
	must(t, im.Start())
	<-done
}

// stall is a fault that keeps every answer back until the test ends, and says
// when the first was asked for.
func stall(t *testing.T) (fault func(*http.Request) *fakeregistry.Fault, asked <-chan struct{}) {
	released, first := make(chan struct{}), make(chan struct{})
	var once sync.Once
	t.Cleanup(func() { close(released) })
	return func(*http.Request) *fakeregistry.Fault {
		once.Do(func() { close(first) })
		return &fakeregistry.Fault{After: -1, Stall: released}
	}, first
}
