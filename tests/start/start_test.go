package start

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/tests/built"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/debian"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/tree"
)

// binary is erofs-oci, static, built once.
var binary string

func TestMain(m *testing.M) { os.Exit(built.Main(m, map[*string]string{&binary: built.ErofsOCI})) }

// layouts are the images that the tests start from, by their tags.
var layouts = map[string][]string{
	"lz4":  nil,
	"zstd": {"--compress=zstd", "--cluster-size=64KiB"},
}

// newSite serves images over the link; what is mounted there runs on one core. root is
// what they were made of.
func newSite(t *testing.T, tags ...string) (s *Site, root string) {
	t.Helper()
	require.Has(t, "root", "fuse", "debian")
	root = debian.Python(t)
	dir, err := os.MkdirTemp("", "erofs-oci-start-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if s, err = NewSite(Options{Dir: dir, Binary: binary, OneCore: true}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	for _, tag := range tags {
		if err := s.Build(t.Context(), root, tag, layouts[tag]...); err != nil {
			t.Fatal(err)
		}
	}
	s.SlowDown()
	return s, root
}

// eachBackend runs f with those that this machine has.
func eachBackend(t *testing.T, f func(t *testing.T, backend string)) {
	needs := map[string][]string{"fuse": nil, "file": {"kernel-erofs"}}
	for _, backend := range []string{"fuse", "file"} {
		t.Run(backend, func(t *testing.T) {
			require.Has(t, needs[backend]...)
			f(t, backend)
		})
	}
}

// mount mounts for as long as the test runs, unless the test unmounts.
func mount(t *testing.T, s *Site, tag string, o MountOptions) *Mounted {
	t.Helper()
	m, err := s.Mount(t.Context(), tag, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := os.Stat(m.Dir); err == nil {
			// The test's context has ended.
			if err := m.Unmount(context.Background()); err != nil {
				t.Error(err)
			}
		}
	})
	return m
}

// A startup is what a start of Python took.
type startup struct {
	took    time.Duration // with the mount
	fetches Fetches
	gets    int // of blobs, as the registry counts them
	bytes   int64
}

// startUp mounts, runs Python, and unmounts.
func startUp(t *testing.T, s *Site, tag string, o MountOptions) startup {
	t.Helper()
	s.ResetStats()
	begin := time.Now()
	m := mount(t, s, tag, o)
	if _, err := PythonOnOneCore(t.Context(), m.Dir); err != nil {
		t.Fatal(err)
	}
	took, stats := time.Since(begin), s.Stats()
	fetches, err := m.Fetches(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Unmount(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Logf("%s over %s, %q: %.2f s, %d GETs (%+v), %.1f MB", tag, o.Backend, o.Flags, took.Seconds(), stats.BlobGETs, fetches, float64(stats.BlobBytes)/1e6)
	return startup{took, fetches, stats.BlobGETs, stats.BlobBytes}
}

// TestProfile: two recordings of the same run on one core are the same bytes, and with
// them a cold start waits for at most a tenth of the GETs that it waited for without. It
// fetches no more than without, and a warm one waits for nothing.
func TestProfile(t *testing.T) {
	s, _ := newSite(t, "lz4", "zstd")
	eachBackend(t, func(t *testing.T, backend string) {
		t.Run("lz4", func(t *testing.T) { testProfile(t, s, "lz4", backend) })
	})
	t.Run("fuse/zstd", func(t *testing.T) { testProfile(t, s, "zstd", "fuse") })
}

func testProfile(t *testing.T, s *Site, tag, backend string) {
	dir := t.TempDir()
	options := func(cache string, flags ...string) MountOptions {
		return MountOptions{Backend: backend, Cache: filepath.Join(dir, cache), Flags: flags}
	}
	var profiles [2][]byte
	var first startup
	for i := range profiles {
		name := filepath.Join(dir, fmt.Sprintf("profile-%d", i))
		first = startUp(t, s, tag, options(fmt.Sprint("cold-", i), "--record="+name))
		var err error
		if profiles[i], err = os.ReadFile(name); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(profiles[0], profiles[1]) {
		t.Errorf("two recordings of one run differ:\n%s\n%s", profiles[0], profiles[1])
	}
	if first.fetches.Demand < 20 {
		t.Fatalf("the first start waits for %d GETs only: there is nothing to compare", first.fetches.Demand)
	}
	second := startUp(t, s, tag, options("replay", "--prefetch="+filepath.Join(dir, "profile-1")))
	if second.fetches.Demand > first.fetches.Demand/10 {
		t.Errorf("with a profile a start waits for %d GETs, without for %d", second.fetches.Demand, first.fetches.Demand)
	}
	if second.fetches.Prefetch == 0 || second.bytes > first.bytes {
		t.Errorf("with a profile %d GETs and %d bytes are fetched, %d ahead; without %d bytes",
			second.gets, second.bytes, second.fetches.Prefetch, first.bytes)
	}
	// What is guessed is guessed by each mount anew.
	if warm := startUp(t, s, tag, options("replay")); warm.fetches.Demand != 0 {
		t.Errorf("a warm start waits for %d GETs", warm.fetches.Demand)
	}
}

// TestOffline: when all is here the registry is not needed any more.
func TestOffline(t *testing.T) {
	s, root := newSite(t, "lz4")
	want, err := tree.Walk(root)
	if err != nil {
		t.Fatal(err)
	}
	eachBackend(t, func(t *testing.T, backend string) {
		cache := filepath.Join(t.TempDir(), "cache")
		m := mount(t, s, "lz4", MountOptions{Backend: backend, Cache: cache, Flags: []string{"--prefetch=all"}})
		if err := m.Fetched(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := m.Unmount(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.Stop()
		defer func() {
			if err := s.Start(); err != nil {
				t.Error(err)
			}
		}()
		m = mount(t, s, "lz4", MountOptions{Backend: backend, Cache: cache, Flags: []string{"--offline"}})
		if _, err := PythonOnOneCore(t.Context(), m.Dir); err != nil {
			t.Error(err)
		}
		same(t, want, m.Dir)
		if err := m.Unmount(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// same compares a mount with the tree that its image was made of.
func same(t *testing.T, want []corpus.Entry, dir string) {
	t.Helper()
	got, err := tree.Walk(dir)
	if err != nil {
		t.Fatal(err)
	}
	for i, d := range tree.Diff(want, got, tree.Ino, tree.DirNlink) {
		if i == 10 {
			t.Error("and more")
			break
		}
		t.Error(d)
	}
}
