package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/backend/kmount"
	"github.com/erofs-oci/erofs-oci/nbdserve"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// A check is a test that runs in the guest.
type check struct {
	name string
	test func(t *testing.T, kernel version)
}

// A group is what one guest runs.
type group struct {
	processors int
	tests      []check
}

// inside are the groups: what reads much, and what might go wrong between two
// processors; images of several layers by themselves, since they take their time.
var inside = map[string]group{
	"life": {2, []check{
		{"LargeTree", testLargeTree},
		{"FailedRead", testFailedRead},
		{"HangingRead", testHangingRead},
		{"Refused", testRefused},
		{"Cancelled", testCancelled},
		{"Cycles", testCycles},
		{"KilledServer", testKilledServer},
		{"HalfReply", testHalfReply},
		{"StoppedServer", testStoppedServer},
		{"ReattachRefused", testReattachRefused},
		{"OrphanUnmounted", testOrphanUnmounted},
		{"OrphanDisconnected", testOrphanDisconnected},
		{"WithoutNetlink", testWithoutNetlink},
		{"Program", testProgram},
		{"Supervised", testSupervised},
		{"OverlayReattached", testOverlayReattached},
		{"RecordReattached", testRecordReattached},
		{"LocalReattached", testLocalReattached},
		{"Verified", testVerified},
		{"PoisonedReattached", testPoisonedReattached},
		{"Background", testBackground},
	}},
	"layers": {2, []check{
		{"Layers", testLayers},
		{"LayersReattached", testLayersReattached},
	}},
	"reading": {1, []check{
		{"Corpus", testCorpus},
		{"File", testFile},
		{"Auto", testAuto},
		{"Debian", testDebian},
		{"Converted", testConverted},
	}},
}

func runInside(t *testing.T, tests []check) {
	kernel := runningKernel(t)
	for _, c := range tests {
		t.Run(c.name, func(t *testing.T) {
			c.test(t, kernel)
			nothingLeft(t)
		})
	}
}

// A version is major and minor number of a kernel.
type version [2]int

func (v version) before(w version) bool { return v[0] < w[0] || v[0] == w[0] && v[1] < w[1] }

func runningKernel(t *testing.T) version {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	var v version
	if _, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &v[0], &v[1]); err != nil {
		t.Fatal(err)
	}
	return v
}

// nothingLeft fails the test for every connected nbd device, mounted EROFS and
// process that it leaves.
func nothingLeft(t *testing.T) {
	t.Helper()
	// Not only those with our identifier.
	pids, err := filepath.Glob("/sys/block/nbd*/pid")
	if err != nil || len(pids) > 0 {
		t.Errorf("left connected: %v, %v", pids, err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || strings.Contains(string(mounts), " erofs ") {
		t.Errorf("left mounted: %v\n%s", err, mounts)
	}
	loops, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil || len(loops) > 0 {
		t.Errorf("left attached: %v, %v", loops, err)
	}
	for _, p := range programs(t) {
		if p != "/init" && p != "/bin/guest.test" {
			t.Errorf("left running: %s", p)
		}
	}
	if n := strings.Count(strings.Join(programs(t), "\n"), "/bin/guest.test"); n != 1 {
		t.Errorf("%d processes of this program are left", n)
	}
}

// programs are the executables of all processes, but for the kernel's own.
func programs(t *testing.T) []string {
	t.Helper()
	names, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, n := range names {
		if exe, err := os.Readlink(n); err == nil {
			all = append(all, exe)
		}
	}
	return all
}

// memory is a source that needs no file.
type memory []byte

func (m memory) Size() int64 { return int64(len(m)) }
func (m memory) ReadAt(_ context.Context, p []byte, off int64) error {
	if off < 0 || off > int64(len(m)) || int64(len(p)) > int64(len(m))-off {
		return io.ErrUnexpectedEOF
	}
	copy(p, m[off:])
	return nil
}

func logger(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelError}))
}

// mountHere mounts v in this process.
func mountHere(t *testing.T, b nbdserve.Backend, v backend.Volume, dir string) (backend.Mount, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	return b.Mount(ctx, v, dir, backend.Options{Log: logger(t)})
}

// unmountHere unmounts by umount(2), as umount(8) does, and expects the server to
// end by itself.
func unmountHere(t *testing.T, m backend.Mount, dir string) {
	t.Helper()
	if err := unix.Unmount(dir, 0); err != nil {
		t.Error(err)
		if err := m.Unmount(); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Wait(); err != nil {
		t.Errorf("the server: %v", err)
	}
}

func same(t *testing.T, want []corpus.Entry, dir string, except ...tree.Field) {
	t.Helper()
	got, err := tree.Walk(dir)
	if err != nil {
		t.Error(err)
	}
	for _, d := range tree.Diff(want, got, except...) {
		t.Error(d)
	}
}

func dropCaches(t *testing.T) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		t.Fatal(err)
	}
}

func volume(im corpus.Image) backend.Volume {
	v := backend.Volume{Primary: memory(im.Data)}
	if im.Blob != nil {
		v.Devices = append(v.Devices, memory(im.Blob))
	}
	return v
}

// since is the first kernel for images that older ones cannot read.
var since = map[string]version{
	"xattr-prefix": {6, 4}, "xattr-plain-prefix": {6, 4}, "fingerprint": {6, 4}, // long prefixes of names
	"deflate": {6, 6}, "deflate-64k": {6, 6},
	"blk1024-lz4": {6, 8}, // compressed blocks smaller than a page; mounts before
	"zstd":        {6, 10}, "zstd-64k": {6, 10}, "zstd-all": {6, 10}, "zstd-maxext": {6, 10}, "legacy-zstd": {6, 10}, "multi-algo": {6, 10},
	"lzma": {6, 12}, "lzma-all": {6, 12}, "lzma-lc": {6, 12}, // 5.16, but Debian's 6.1 is built without it
	"48bit": {6, 15}, "48bit-lz4-frag": {6, 15}, "48bit-zstd": {6, 15}, "dot-omitted": {6, 15},
	"metabox": {6, 17}, "metabox-zstd": {6, 17},
	"part-deflate": {6, 6}, "part-zstd": {6, 10}, "part-lzma": {6, 12},
}

// testCorpus mounts each image of the corpus and compares. Those that are too new
// for the kernel must fail, so that the list of them does not grow too long.
func testCorpus(t *testing.T, kernel version) {
	for _, im := range corpus.Images(t) {
		t.Run(im.Name, func(t *testing.T) {
			dir := t.TempDir()
			defer nothingLeft(t)
			tooNew := kernel.before(since[im.Name])
			m, err := mountHere(t, nbdserve.Backend{}, volume(im), dir)
			if err != nil {
				if !tooNew || !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EOPNOTSUPP) {
					t.Error(err)
				}
				return
			}
			defer unmountHere(t, m, dir)
			if !tooNew {
				same(t, im.Listing(t), dir)
			} else if _, err := tree.Walk(dir); !errors.Is(err, unix.EOPNOTSUPP) {
				t.Errorf("this kernel reads it after all: %v", err)
			}
		})
	}
}

func openTree(t *testing.T) *backend.File {
	t.Helper()
	f, err := backend.OpenFile(treeFile)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// testLargeTree reads some thousand files, also by several readers over several
// connections.
func testLargeTree(t *testing.T, _ version) {
	want := largeListing(t)
	for _, connections := range []int{1, 4} {
		t.Run(fmt.Sprint(connections), func(t *testing.T) {
			dropCaches(t)
			dir := t.TempDir()
			m, err := mountHere(t, nbdserve.Backend{Connections: connections}, backend.Volume{Primary: openTree(t)}, dir)
			if err != nil {
				t.Fatal(err)
			}
			var readers sync.WaitGroup
			for range connections {
				readers.Go(func() { same(t, want, dir, tree.Ino, tree.DirNlink) })
			}
			readers.Wait()
			unmountHere(t, m, dir)
		})
	}
}

// testFile mounts a file without nbd: directly since Linux 6.12, else by loop. The
// kernel takes files of a ramfs, but not of a tmpfs.
func testFile(t *testing.T, kernel version) {
	for _, name := range []string{"lz4", "multidev"} {
		im := corpus.Get(t, name)
		dir, files := t.TempDir(), t.TempDir()
		if err := unix.Mount("ramfs", files, "ramfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		image := filepath.Join(files, "image")
		if err := os.WriteFile(image, im.Data, 0o644); err != nil {
			t.Fatal(err)
		}
		var o kmount.Options
		if im.Blob != nil {
			o.Devices = []string{filepath.Join(files, "blob")}
			if err := os.WriteFile(o.Devices[0], im.Blob, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		device, err := kmount.MountFile(image, dir, o)
		if err != nil {
			t.Fatal(err)
		}
		if viaLoop := device != ""; viaLoop != kernel.before(version{6, 12}) {
			t.Errorf("%s: mounted through %q", name, device)
		}
		same(t, im.Listing(t), dir)
		for _, mounted := range []string{dir, files} {
			if err := unix.Unmount(mounted, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// errHang breaks a source so that it does not answer.
var errHang = errors.New("hanging")

// A breakable source fails while it is broken.
type breakable struct {
	backend.Source
	mu     sync.Mutex // guards what follows
	broken error
}

func (b *breakable) set(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.broken = err
}

func (b *breakable) ReadAt(ctx context.Context, p []byte, off int64) error {
	b.mu.Lock()
	err := b.broken
	b.mu.Unlock()
	if errors.Is(err, errHang) {
		<-ctx.Done()
		return ctx.Err()
	}
	if err != nil {
		return err
	}
	return b.Source.ReadAt(ctx, p, off)
}

// testFailedRead: a source that fails is EIO for the reader, at once, and nothing
// else: the device lives, and the same read succeeds when the source does.
func testFailedRead(t *testing.T, _ version) {
	im := corpus.Get(t, "lz4")
	source := &breakable{Source: memory(im.Data)}
	dir := t.TempDir()
	m, err := mountHere(t, nbdserve.Backend{}, backend.Volume{Primary: source}, dir)
	if err != nil {
		t.Fatal(err)
	}
	file := largeFile(t, im, dir)
	for range 3 {
		dropCaches(t)
		source.set(errors.New("broken by the test"))
		begin := time.Now()
		_, err := os.ReadFile(file)
		if !errors.Is(err, unix.EIO) {
			t.Errorf("with a broken source: %v", err)
		}
		if took := time.Since(begin); took > 10*time.Second {
			t.Errorf("the error took %v", took)
		}
		source.set(nil)
		if _, err := os.ReadFile(file); err != nil {
			t.Errorf("after it was mended: %v", err)
		}
	}
	dropCaches(t)
	same(t, im.Listing(t), dir)
	unmountHere(t, m, dir)
}

// testHangingRead: a source that does not answer is EIO, too, before the kernel
// loses its patience; it keeps the connection.
func testHangingRead(t *testing.T, _ version) {
	const timeout = 4 * time.Second
	im := corpus.Get(t, "lz4")
	source := &breakable{Source: memory(im.Data)}
	dir := t.TempDir()
	var log strings.Builder
	m, err := nbdserve.Backend{Timeout: timeout}.Mount(t.Context(), backend.Volume{Primary: source}, dir,
		backend.Options{Log: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	file := largeFile(t, im, dir)
	dropCaches(t)
	source.set(errHang)
	if _, err := os.ReadFile(file); !errors.Is(err, unix.EIO) {
		t.Errorf("with a hanging source: %v", err)
	}
	source.set(nil)
	same(t, im.Listing(t), dir)
	unmountHere(t, m, dir)
	if strings.Contains(log.String(), "gave up a connection") {
		t.Errorf("the server's log: %s", log.String())
	}
}

// largeFile is the path of a file that is neither inlined nor small.
func largeFile(t *testing.T, im corpus.Image, dir string) string {
	t.Helper()
	for _, e := range im.Listing(t) {
		if e.Mode&unix.S_IFMT == unix.S_IFREG && e.Size > 100<<10 {
			return filepath.Join(dir, e.Path)
		}
	}
	t.Fatalf("%s has no large file", im.Name)
	return ""
}

// testRefused: what cannot be mounted leaves nothing.
func testRefused(t *testing.T, _ version) {
	dir := t.TempDir()
	im, multi := corpus.Get(t, "plain"), corpus.Get(t, "multidev")
	for name, c := range map[string]struct {
		v      backend.Volume
		target string
		want   error
	}{
		"garbage":      {backend.Volume{Primary: memory(make([]byte, 64<<10))}, dir, unix.EINVAL},
		"nothing":      {backend.Volume{Primary: memory(nil)}, dir, nil},
		"no directory": {volume(im), filepath.Join(dir, "no"), unix.ENOENT},
		"broken":       {backend.Volume{Primary: &breakable{Source: memory(im.Data), broken: errors.New("broken by the test")}}, dir, nil},
		"too many":     {backend.Volume{Primary: memory(multi.Data), Devices: []backend.Source{memory(multi.Blob), memory(multi.Blob)}}, dir, unix.EINVAL},
	} {
		_, err := mountHere(t, nbdserve.Backend{}, c.v, c.target)
		if err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		nothingLeft(t)
	}
}

// A hanging source answers no read before its ctx ends, and says when one has come.
type hanging struct {
	memory
	asked chan struct{}
	once  sync.Once
}

func (h *hanging) ReadAt(ctx context.Context, _ []byte, _ int64) error {
	h.once.Do(func() { close(h.asked) })
	<-ctx.Done()
	return ctx.Err()
}

// testCancelled: mount(2) waits for a source that does not answer; the caller need
// not.
func testCancelled(t *testing.T, _ version) {
	source := &hanging{memory: memory(corpus.Get(t, "plain").Data), asked: make(chan struct{})}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		<-source.asked
		cancel()
	}()
	begin := time.Now()
	_, err := nbdserve.Backend{}.Mount(ctx, backend.Volume{Primary: source}, t.TempDir(), backend.Options{Log: logger(t)})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if took := time.Since(begin); took > 20*time.Second {
		t.Errorf("it took %v", took)
	}
}

// testCycles mounts and unmounts two hundred times.
func testCycles(t *testing.T, _ version) {
	im := corpus.Get(t, "plain")
	dir := t.TempDir()
	cycle := func() {
		m, err := mountHere(t, nbdserve.Backend{}, volume(im), dir)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.ReadDir(dir); err != nil {
			t.Error(err)
		}
		unmountHere(t, m, dir)
	}
	cycle()
	before := openFiles(t)
	for range 199 {
		cycle()
	}
	if after := openFiles(t); after > before {
		t.Errorf("%d descriptors are open, and %d were", after, before)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}
