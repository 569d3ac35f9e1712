// Package fetch measures what reading a blob for the first time costs, from a
// registry that is 20 ms away on a link of 200 Mbit/s, and holds the fetch plan
// to the GETs and bytes that it may take for an image as mkfs.erofs makes it.
//
//	go test ./tests/bench/fetch                          the counts
//	go test -bench . -benchtime 1x ./tests/bench/fetch   the times as well
//
// Everything is in one process: no mount, no kernel, and a reader of the image
// that goes from directory to directory as ls -lR does.
package fetch

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/require"
)

const (
	latency   = 20 * time.Millisecond
	bandwidth = 25_000_000
	chunk     = 256 << 10
)

// A line is a registry with one blob.
type line struct {
	registry *fakeregistry.Registry
	desc     ocispec.Descriptor
	ref      registry.Reference
}

func newLine(tb testing.TB, data io.ReaderAt, size int64) *line {
	tb.Helper()
	r, err := fakeregistry.New(fakeregistry.Options{})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := r.Close(); err != nil {
			tb.Error(err)
		}
	})
	l := &line{registry: r, desc: ocispec.Descriptor{Digest: digest.FromString(tb.Name()), Size: size}}
	r.PutBlob("x", l.desc.Digest, data, size)
	if l.ref, err = registry.ParseReference(r.Addr() + "/x:v1"); err != nil {
		tb.Fatal(err)
	}
	return l
}

// slow makes the line what it is called after.
func (l *line) slow() {
	l.registry.SetLatency(latency)
	l.registry.SetBandwidth(bandwidth)
}

// open is a cold cache at the end of a line that is in use already.
func (l *line) open(tb testing.TB, o blobcache.Options) (blob *blobcache.Blob, done func()) {
	tb.Helper()
	return l.openOver(tb, o, nil)
}

// openOver is open with a network of its own between.
func (l *line) openOver(tb testing.TB, o blobcache.Options, network http.RoundTripper) (blob *blobcache.Blob, done func()) {
	tb.Helper()
	client, err := registry.New(registry.Options{PlainHTTP: true, Transport: network})
	if err != nil {
		tb.Fatal(err)
	}
	remote, err := client.Blob(l.ref, l.desc)
	if err != nil {
		tb.Fatal(err)
	}
	cache, err := blobcache.New(tb.TempDir(), o)
	if err != nil {
		tb.Fatal(err)
	}
	if blob, err = cache.Open(l.desc.Digest.String(), l.desc.Size, remote, blobcache.OpenOptions{}); err != nil {
		tb.Fatal(err)
	}
	if err := blob.ReadAt(tb.Context(), make([]byte, 1), 0); err != nil {
		tb.Fatal(err)
	}
	l.registry.ResetStats()
	return blob, func() {
		if err := blob.Close(); err != nil {
			tb.Error(err)
		}
		if err := cache.Close(); err != nil {
			tb.Error(err)
		}
		if err := client.Close(); err != nil {
			tb.Error(err)
		}
	}
}

// noise is a blob without an end.
type noise []byte

func newNoise() noise {
	b := make(noise, 1<<20)
	if _, err := rand.NewChaCha8([32]byte{}).Read(b); err != nil {
		panic(err) // it has none to give
	}
	return b
}

func (b noise) ReadAt(p []byte, off int64) (int, error) {
	for n := 0; n < len(p); {
		n += copy(p[n:], b[(off+int64(n))%int64(len(b)):])
	}
	return len(p), nil
}

// image makes an lz4 image of the Go compiler's sources and a file that cannot be
// compressed: about 1,450 entries, 26 MB. EROFS_OCI_BENCH_IMAGE names another.
func image(tb testing.TB) *os.File {
	tb.Helper()
	name := os.Getenv("EROFS_OCI_BENCH_IMAGE")
	if name == "" {
		name = makeImage(tb)
	}
	f, err := os.Open(name)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { f.Close() })
	return f
}

func makeImage(tb testing.TB) string {
	tb.Helper()
	require.Has(tb, "mkfs.erofs")
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		tb.Fatal(err)
	}
	tree, name := tb.TempDir(), filepath.Join(tb.TempDir(), "image.erofs")
	for _, dir := range []string{"src/cmd/compile", "src/cmd/link", "src/cmd/internal"} {
		if err := os.CopyFS(filepath.Join(tree, dir), os.DirFS(filepath.Join(strings.TrimSpace(string(root)), dir))); err != nil {
			tb.Fatal(err)
		}
	}
	data := make([]byte, 16<<20)
	if _, err := newNoise().ReadAt(data, 0); err != nil {
		tb.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tree, "data"), data, 0o600); err != nil {
		tb.Fatal(err)
	}
	if out, err := exec.Command("mkfs.erofs", "-zlz4", name, tree).CombinedOutput(); err != nil {
		tb.Fatalf("mkfs.erofs: %v: %s", err, out)
	}
	return name
}

func size(tb testing.TB, f *os.File) int64 {
	tb.Helper()
	st, err := f.Stat()
	if err != nil {
		tb.Fatal(err)
	}
	return st.Size()
}

// list does what ls -lR does, and reads the files if it is told to.
func list(ctx context.Context, src erofsfmt.ReaderAt, read bool) (entries int, err error) {
	im, err := erofsfmt.Open(ctx, src)
	if err != nil {
		return 0, err
	}
	fsys := im.FS()
	err = fs.WalkDir(fsys, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		entries++
		info, err := d.Info()
		if err != nil || !read || !info.Mode().IsRegular() {
			return err
		}
		f, err := fsys.Open(path)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, f)
		f.Close()
		return err
	})
	return entries, err
}

// TestImage holds listing and reading an image to what they may fetch. It takes
// the slow line, since what is fetched ahead depends on what is under way.
func TestImage(t *testing.T) {
	f := image(t)
	l := newLine(t, f, size(t, f))
	l.slow()
	for _, test := range []struct {
		name  string
		read  bool
		gets  int
		bytes int64
	}{
		// Half of the chunks at least that a listing fetches hold what it needs, or
		// it would not have gone on; a window may lie behind them.
		{"ls -lR", false, 30, 2*l.needed(t) + 8<<20},
		{"everything", true, 60, l.desc.Size},
	} {
		blob, done := l.open(t, blobcache.Options{})
		entries, err := list(t.Context(), blob, test.read)
		if err != nil {
			t.Fatal(err)
		}
		s, st := l.registry.Stats(), blob.Stats()
		t.Logf("%s of %d entries, %d bytes: %d GETs (%d ahead), %d bytes", test.name, entries, l.desc.Size, s.BlobGETs, st.FetchesAhead, s.BlobBytes)
		if s.BlobGETs > test.gets || s.BlobBytes > test.bytes {
			t.Errorf("%s: %d GETs, %d bytes; want %d and %d at most", test.name, s.BlobGETs, s.BlobBytes, test.gets, test.bytes)
		}
		if st.BytesFetched > st.ChunksTotal*chunk {
			t.Errorf("%s: %d bytes were fetched, the blob has %d", test.name, st.BytesFetched, l.desc.Size)
		}
		done()
	}
}

// needed is how many bytes the chunks have that a listing reads.
func (l *line) needed(t *testing.T) int64 {
	blob, done := l.open(t, blobcache.Options{Readahead: -1})
	defer done()
	if _, err := list(t.Context(), blob, false); err != nil {
		t.Fatal(err)
	}
	return blob.Stats().ChunksPresent * chunk
}

func download(tb testing.TB, l *line) time.Duration {
	tb.Helper()
	began := time.Now()
	resp, err := http.Get(l.registry.URL() + "/v2/x/blobs/" + l.desc.Digest.String())
	if err != nil {
		tb.Fatal(err)
	}
	defer resp.Body.Close()
	if n, err := io.Copy(io.Discard, resp.Body); err != nil || n != l.desc.Size {
		tb.Fatal(n, err)
	}
	return time.Since(began)
}

func report(b *testing.B, name string, l *line, took time.Duration, blob *blobcache.Blob) {
	s, st := l.registry.Stats(), blob.Stats()
	b.Logf("%-28s %6.3f s %5d GETs (%d ahead) %7.2f MB, %.2f MB read, %.1f MB/s", name, took.Seconds(), s.BlobGETs, st.FetchesAhead,
		float64(s.BlobBytes)/1e6, float64(st.BytesServed)/1e6, float64(st.BytesServed)/1e6/took.Seconds())
}

func BenchmarkImage(b *testing.B) {
	f := image(b)
	l := newLine(b, f, size(b, f))
	l.slow()
	b.Logf("bare download: %.3f s of %.1f MB", download(b, l).Seconds(), float64(l.desc.Size)/1e6)
	for _, ahead := range []int64{-1, 0} {
		for _, read := range []bool{false, true} {
			blob, done := l.open(b, blobcache.Options{Readahead: ahead})
			began := time.Now()
			if _, err := list(b.Context(), blob, read); err != nil {
				b.Fatal(err)
			}
			report(b, fmt.Sprintf("ahead %v, everything %v", ahead == 0, read), l, time.Since(began), blob)
			done()
		}
	}
}

func BenchmarkSequential(b *testing.B) {
	const total = 300 << 20
	l := newLine(b, newNoise(), total)
	l.slow()
	b.Logf("bare download: %.3f s", download(b, l).Seconds())
	for _, n := range []int64{128 << 10, 4 << 10} {
		blob, done := l.open(b, blobcache.Options{})
		p := make([]byte, n)
		began := time.Now()
		for off := int64(0); off < total; off += n {
			if err := blob.ReadAt(b.Context(), p, off); err != nil {
				b.Fatal(err)
			}
		}
		report(b, fmt.Sprintf("reads of %d KiB", n>>10), l, time.Since(began), blob)
		done()
	}
}

// BenchmarkConnections is a link of which one connection gets a third: how much of
// it does a sequential reader get, by how many fetches may be under way ahead of it.
func BenchmarkConnections(b *testing.B) {
	const total = 100 << 20
	l := newLine(b, newNoise(), total)
	l.slow()
	for _, ahead := range []int{1, 2, 3, 4, 6} {
		transport := &http.Transport{MaxConnsPerHost: registry.DefaultMaxConns}
		blob, done := l.openOver(b, blobcache.Options{MaxAhead: ahead}, throttle{transport, bandwidth / 3})
		p := make([]byte, 128<<10)
		began := time.Now()
		for off := int64(0); off < total; off += int64(len(p)) {
			if err := blob.ReadAt(b.Context(), p, off); err != nil {
				b.Fatal(err)
			}
		}
		report(b, fmt.Sprintf("%d ahead", ahead), l, time.Since(began), blob)
		done()
		transport.CloseIdleConnections()
	}
}

// A throttle bounds the bytes a second of each answer.
type throttle struct {
	http.RoundTripper
	rate float64
}

func (t throttle) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := t.RoundTripper.RoundTrip(req)
	if err == nil {
		resp.Body = &throttled{ReadCloser: resp.Body, rate: t.rate, began: time.Now()}
	}
	return resp, err
}

type throttled struct {
	io.ReadCloser
	rate  float64
	began time.Time
	n     int
}

func (b *throttled) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p[:min(len(p), 32<<10)])
	b.n += n
	time.Sleep(time.Until(b.began.Add(time.Duration(float64(b.n) / b.rate * float64(time.Second)))))
	return n, err
}

// BenchmarkCold4KiB is one chunk from a place where nobody has read. The bound is
// a round trip and the chunk's time on the link, and a fifth more.
func BenchmarkCold4KiB(b *testing.B) {
	l := newLine(b, newNoise(), 4<<30)
	l.slow()
	blob, done := l.open(b, blobcache.Options{})
	defer done()
	p := make([]byte, 4<<10)
	rng := rand.New(rand.NewPCG(1, 1))
	for b.Loop() {
		if err := blob.ReadAt(b.Context(), p, rng.Int64N(4<<30-4096)); err != nil {
			b.Fatal(err)
		}
	}
	bound := latency + time.Duration(float64(chunk)/bandwidth*1e9)
	b.ReportMetric(1.2*bound.Seconds()*1e3, "ms-bound")
}

// TestSequential holds a sequential reader to one fetch of each byte, and to few: the
// window doubles up to spans of 4 MiB.
func TestSequential(t *testing.T) {
	const total = 64 << 20
	l := newLine(t, newNoise(), total)
	blob, done := l.open(t, blobcache.Options{})
	defer done()
	p := make([]byte, 128<<10)
	for off := int64(0); off < total; off += int64(len(p)) {
		if err := blob.ReadAt(t.Context(), p, off); err != nil {
			t.Fatal(err)
		}
	}
	// The first chunk was read when the blob was opened.
	s := l.registry.Stats()
	if s.BlobBytes != total-chunk || s.BlobGETs > 32 {
		t.Errorf("%d GETs and %d bytes for %d", s.BlobGETs, s.BlobBytes, total-chunk)
	}
}

// TestCold holds a reader that jumps about to one GET of one chunk a place.
func TestCold(t *testing.T) {
	const places = 50
	l := newLine(t, newNoise(), 4<<30)
	blob, done := l.open(t, blobcache.Options{})
	defer done()
	for i := range int64(places) {
		off := (i*7 + 1) % places * (64 << 20)
		if err := blob.ReadAt(t.Context(), make([]byte, 4<<10), off+4096); err != nil {
			t.Fatal(err)
		}
	}
	// One of them is the first chunk, which is here.
	if s := l.registry.Stats(); s.BlobGETs != places-1 || s.BlobBytes != (places-1)*chunk {
		t.Errorf("%d GETs and %d bytes for %d places", s.BlobGETs, s.BlobBytes, places)
	}
}
