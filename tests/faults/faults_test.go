package faults

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	chunk    = 32 << 10
	blobSize = 2<<20 + 12345
	flipped  = 777_777 // the byte of the row with a flipped bit

	// patience is how long a reader waits for a fault to pass that does, shortPatience
	// for one that does not. slack is what this machine may add to that, and all that an
	// error may take that no wait mends.
	patience      = 20 * time.Second
	shortPatience = 2 * time.Second
	slack         = 5 * time.Second
	// queue is how long a fetch waits at most for those before it that get nothing.
	queue = 5 * time.Second
)

// blob is what is read.
var blob = func() []byte {
	b := make([]byte, blobSize)
	_, _ = rand.NewChaCha8([32]byte{7}).Read(b) // it has always more
	return b
}()

// hugeSize is the size of a blob that nobody reads all of: blob, again and again.
const hugeSize = 4 << 30

var hugeDigest = digest.FromString("huge")

type endless struct{}

func (endless) ReadAt(p []byte, off int64) (int, error) {
	for n := 0; n < len(p); {
		n += copy(p[n:], blob[(off+int64(n))%blobSize:])
	}
	return len(p), nil
}

// A bed is a registry with one fault, and a cold cache over it.
type bed struct {
	t        *testing.T
	row      row
	registry *fakeregistry.Registry
	mirror   *fakeregistry.Registry // nil but for a row onMirror
	client   *registry.Client
	cached   *blobcache.Blob
	log      *record
	wait     time.Duration // of a read, for a network in trouble
	restart  sync.WaitGroup
	dir      string // for files of TestLog
}

// newBed is ready for readers; nothing was read.
func newBed(t *testing.T, r row) *bed {
	t.Helper()
	b := &bed{t: t, row: r, registry: newRegistry(t, r.registry), log: &record{}}
	if r.onMirror {
		b.mirror = newRegistry(t, fakeregistry.Options{})
	}
	o := registry.Options{
		PlainHTTP: !r.registry.TLS, RootCAs: b.registry.RootCAs(), Logger: slog.New(slog.NewTextHandler(b.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		ErrorWait: patience, NoProgress: patience / 2, RegistriesConf: b.registriesConf(),
	}
	if r.registry.Username != "" {
		o.Username, o.Password = user, password
	}
	if r.verdict == fail && r.err == unavailable {
		o.ErrorWait, o.NoProgress = shortPatience, 3*shortPatience/4
	}
	if r.slow {
		o.NoProgress = shortPatience // long enough not to be met by a machine that is busy
	}
	if r.slow && r.verdict == fail {
		o.ErrorWait = 3 * shortPatience // room for a second try
	}
	b.wait = o.ErrorWait
	b.open(o, digest.FromBytes(blob), blobSize)
	if r.plan != nil {
		b.struck().SetFault(r.plan(b))
	}
	return b
}

func newRegistry(t *testing.T, o fakeregistry.Options) *fakeregistry.Registry {
	t.Helper()
	r, err := fakeregistry.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	r.PutBlob("team/x", digest.FromBytes(blob), bytes.NewReader(blob), blobSize)
	r.PutBlob("team/x", hugeDigest, endless{}, hugeSize)
	return r
}

// struck is the registry with the fault.
func (b *bed) struck() *fakeregistry.Registry {
	if b.mirror != nil {
		return b.mirror
	}
	return b.registry
}

// registriesConf names the mirror; without one it keeps this machine's file out.
func (b *bed) registriesConf() string {
	path, text := filepath.Join(b.t.TempDir(), "registries.conf"), ""
	if b.mirror != nil {
		text = fmt.Sprintf("[[registry]]\nlocation = %q\n[[registry.mirror]]\nlocation = %q\n", b.registry.Addr(), b.mirror.Addr())
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		b.t.Fatal(err)
	}
	return path
}

// open puts client and cache together. When the test is over, nothing of them may be
// left: no goroutine (TestMain sees to that), and no connection.
func (b *bed) open(o registry.Options, d digest.Digest, size int64) {
	b.t.Helper()
	var err error
	if b.client, err = registry.New(o); err != nil {
		b.t.Fatal(err)
	}
	ref, err := registry.ParseReference(b.registry.Addr() + "/team/x:v1")
	if err != nil {
		b.t.Fatal(err)
	}
	remote, err := b.client.Blob(ref, ocispec.Descriptor{Digest: d, Size: size})
	if err != nil {
		b.t.Fatal(err)
	}
	cache, err := blobcache.New(filepath.Join(b.t.TempDir(), "cache"), blobcache.Options{ChunkSize: chunk, MaxSpan: 8 * chunk, Readahead: 32 * chunk, Logger: o.Logger})
	if err != nil {
		b.t.Fatal(err)
	}
	if b.cached, err = cache.Open(d.String(), size, remote, blobcache.OpenOptions{}); err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() {
		b.restart.Wait()
		if err := errors.Join(b.cached.Close(), cache.Close(), b.client.Close()); err != nil {
			b.t.Error(err)
		}
		b.noConnections()
	})
}

// noConnections waits for the servers to notice that their client is gone.
func (b *bed) noConnections() {
	b.t.Helper()
	for _, r := range []*fakeregistry.Registry{b.registry, b.mirror, b.registry.Storage()} {
		if r == nil {
			continue
		}
		deadline := time.Now().Add(10 * time.Second)
		for {
			open, most := r.Connections()
			// A server notices late that a connection was given up, and counts it still.
			if b.row.name == "none" && most > registry.DefaultMaxConns {
				b.t.Errorf("%d connections to %s at a time", most, r.Addr())
			}
			if open == 0 {
				break
			}
			if time.Now().After(deadline) {
				b.t.Errorf("%d connections to %s are left", open, r.Addr())
				break
			}
			time.Sleep(time.Millisecond) // there is no event for what a server has not noticed
		}
	}
}

// start brings the registry back.
func (b *bed) start() {
	if err := b.registry.Start(); err != nil {
		b.t.Error(err)
	}
}

// A way is a way to read: so many readers, each with its places in an order.
type way struct {
	name    string
	readers int
	places  func(reader int) []span
}

type span struct{ off, n int64 }

func ways() []way {
	return []way{
		{"one reader", 1, func(int) []span {
			return []span{{0, 4096}, {flipped - 100, 200}, {blobSize - 10, 10}, {3*chunk - 5, 10}, {blobSize / 2, 5 * chunk}}
		}},
		{"50 parallel readers", 50, func(reader int) []span {
			// Each begins elsewhere and reads all of it, round the end.
			return rotated(forward(4*chunk), reader)
		}},
		{"sequential", 1, func(int) []span { return forward(16 << 10) }},
		{"random", 1, func(int) []span {
			rng := rand.New(rand.NewPCG(3, 4))
			all := []span{{flipped, 1}}
			for range 40 {
				all = append(all, span{rng.Int64N(blobSize - 4096), 4096})
			}
			return all
		}},
	}
}

// forward is the blob from its first byte to its last.
func forward(n int64) []span {
	var all []span
	for off := int64(0); off < blobSize; off += n {
		all = append(all, span{off, min(n, blobSize-off)})
	}
	return all
}

func rotated(all []span, by int) []span {
	by %= len(all)
	return append(slices.Clone(all[by:]), all[:by]...)
}

func TestFaults(t *testing.T) {
	aloneHere(t)
	// The rows mostly wait, so many of them may be under way at a time; with the race
	// detector, which goes with -short, they mostly do not: then, half of the ways.
	slots := make(chan struct{}, 16)
	if testing.Short() {
		slots = make(chan struct{}, 4)
	}
	var all sync.WaitGroup
	for _, r := range table() {
		for i, w := range ways() {
			if testing.Short() && i%2 == 0 {
				continue
			}
			slots <- struct{}{}
			all.Go(func() {
				defer func() { <-slots }()
				t.Run(r.name+"/"+w.name, func(t *testing.T) { newBed(t, r).prove(w) })
			})
		}
	}
	all.Wait()
}

// aloneHere keeps the login files and the environment of this machine out.
func aloneHere(t *testing.T) {
	home := t.TempDir()
	for _, name := range []string{"HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "DOCKER_CONFIG"} {
		t.Setenv(name, home)
	}
	for _, name := range []string{"REGISTRY_AUTH_FILE", "EROFS_OCI_USERNAME", "EROFS_OCI_PASSWORD", "HTTP_PROXY", "HTTPS_PROXY"} {
		t.Setenv(name, "")
	}
}

// prove reads in this way and holds what comes of it to the row.
func (b *bed) prove(w way) {
	b.each(w, func(places []span) { b.read(places[0]) })
	if b.row.at != nil {
		b.row.at(b)
	}
	b.each(w, func(places []span) {
		for i, place := range places[1:] {
			if b.row.verdict == fail && i == 1 {
				break // the patience of two reads is enough to see it
			}
			if !b.read(place) {
				break
			}
		}
	})
	b.checkAgain()
	if b.leaks(b.log.all()) {
		b.t.Error("a secret is in the log")
	}
	if b.row.verdict == fail {
		b.recovers()
	}
}

// each has all readers do something with their places at the same time.
func (b *bed) each(w way, do func(places []span)) {
	var readers sync.WaitGroup
	for reader := range w.readers {
		readers.Go(func() { do(w.places(reader)) })
	}
	readers.Wait()
}

// read reads one place, and says whether it went as it should.
func (b *bed) read(at span) bool {
	begin := time.Now()
	p := make([]byte, at.n)
	err := b.cached.ReadAt(context.Background(), p, at.off)
	took := time.Since(begin)
	want := make([]byte, at.n)
	_, _ = endless{}.ReadAt(want, at.off) // it has always more
	if b.row.verdict == unseen && at.off <= flipped && flipped < at.off+at.n {
		want[flipped-at.off] ^= 1 << (flipped % 8)
	}
	switch {
	case b.row.verdict == fail && err == nil:
		b.t.Errorf("%+v: read, in spite of the fault", at)
	case b.row.verdict == fail:
		return b.checkError(err, took)
	case err != nil:
		b.t.Errorf("%+v: after %v: %v", at, took, err)
	case !bytes.Equal(p, want):
		b.t.Errorf("%+v: not the blob's bytes", at)
	default:
		return true
	}
	return false
}

// checkError holds an error to its kind, its deadline and its words.
func (b *bed) checkError(err error, took time.Duration) bool {
	var refused *registry.StatusError
	var gone *registry.UnavailableError
	got := lie
	switch {
	case errors.As(err, &gone):
		got = unavailable
	case errors.As(err, &refused):
		got = refusal
	}
	deadline := slack
	if b.row.err == unavailable {
		deadline += b.wait + queue
	}
	switch {
	case got != b.row.err:
		b.t.Errorf("the error is of kind %d, want %d: %v", got, b.row.err, err)
	case took > deadline:
		b.t.Errorf("the error took %v: %v", took, err)
	case !strings.Contains(err.Error(), b.row.says):
		b.t.Errorf("the error does not say %q: %v", b.row.says, err)
	case !strings.Contains(b.log.all(), strings.ReplaceAll(b.row.says, `"`, `\"`)):
		// For debugging. Otherwise it is one line where the error becomes an errno, and so not here.
		b.t.Errorf("the log does not say %q: %s", b.row.says, b.log.all())
	case b.leaks(err.Error()):
		b.t.Error("a secret is in the error")
	default:
		return true
	}
	return false
}

// leaks says whether there is a secret in text.
func (b *bed) leaks(text string) bool {
	in := func(secret string) bool { return strings.Contains(text, secret) }
	return slices.ContainsFunc(append(b.registry.Secrets(), "signature="), in)
}

// recovers reads on when the fault is over: a failed read leaves nothing behind.
func (b *bed) recovers() {
	b.registry.SetFault(nil)
	for _, r := range []*fakeregistry.Registry{b.registry, b.registry.Storage()} {
		if r != nil {
			r.Stop() // whether it is dead or not
			if err := r.Start(); err != nil {
				b.t.Error(err)
			}
		}
	}
	b.row.verdict = succeed
	// What is refused for good is asked for anew; what is silent or dead, when its
	// gate lets somebody through.
	deadline := time.Now().Add(patience)
	for p := make([]byte, 4096); ; {
		err := b.cached.ReadAt(context.Background(), p, chunk+1)
		if err == nil && !bytes.Equal(p, blob[chunk+1:][:4096]) {
			b.t.Error("not the blob's bytes, after the fault")
		}
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			b.t.Errorf("still, after the fault: %v", err)
			return
		}
	}
}

// checkAgain counts what came twice.
func (b *bed) checkAgain() {
	var sound []span
	total := int64(0)
	for _, r := range []*fakeregistry.Registry{b.registry, b.mirror, b.registry.Storage()} {
		if r == nil {
			continue
		}
		for _, q := range r.Requests() {
			if q.Status != 200 && q.Status != 206 || !strings.Contains(q.Path, "/blobs/") {
				continue
			}
			total += q.Bytes
			var from, to int64
			if _, err := fmt.Sscanf(q.Range, "bytes=%d-%d", &from, &to); err != nil {
				b.t.Errorf("a blob was asked for by the range %q", q.Range)
			}
			if !q.Faulty || b.row.again == "" {
				sound = append(sound, span{from, q.Bytes})
			}
		}
	}
	if most := max(b.row.times, 1) * blobSize; b.row.verdict == succeed && float64(total) > most {
		b.t.Errorf("%d bytes of a blob of %d, want %.0f at most", total, blobSize, most)
	}
	if b.row.verdict == fail || b.row.at != nil && b.row.again != "" {
		return // what failed may be asked for again; what died was under way
	}
	slices.SortFunc(sound, func(x, y span) int { return int(x.off - y.off) })
	for i := range len(sound) - 1 {
		if end := sound[i].off + sound[i].n; end > sound[i+1].off {
			b.t.Errorf("bytes %d to %d came twice, for no reason", sound[i+1].off, end)
		}
	}
}

// A record is what was logged.
type record struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (r *record) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.Write(p)
}

func (r *record) all() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.String()
}
