package blobcache

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
)

// The test binary is run again as another process that reads through the same directory. It is told what to do in an
// environment variable.
const childEnv = "EROFS_OCI_BLOBCACHE_CHILD"

// An errand is what a child does: Readers goroutines read Reads pieces each, or read until they are killed.
type errand struct {
	Dir, URL string
	Size     int
	Options  errandOptions
	Readers  int
	Reads    int // 0: no end
	Most     int // the longest read
	Seed     uint64
	Prefetch bool // all of it, beside the readers
}

// errandOptions are what of a cache's options another process can be told.
type errandOptions struct{ ChunkSize, MaxSpan, MaxBytes, Readahead, PrefetchRate int64 }

func (o errandOptions) options() Options {
	return Options{ChunkSize: o.ChunkSize, MaxSpan: o.MaxSpan, MaxBytes: o.MaxBytes, Readahead: o.Readahead, PrefetchRate: o.PrefetchRate}
}

// runChild does the errand, once a line comes in, and says "reading" when it begins.
func runChild(encoded string) error {
	var e errand
	if err := json.Unmarshal([]byte(encoded), &e); err != nil {
		return err
	}
	c, err := New(e.Dir, e.Options.options())
	if err != nil {
		return err
	}
	content := sourcetest.Content(e.Size)
	b, err := c.Open(testDigest, int64(e.Size), &remote{e.URL, int64(e.Size)}, OpenOptions{})
	if err != nil {
		return err
	}
	fmt.Println("ready")
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		return err
	}
	fmt.Println("reading")
	errs := make(chan error, e.Readers+1)
	go func() {
		if !e.Prefetch {
			errs <- nil
			return
		}
		errs <- b.Prefetch(ctx, 0, b.Size())
	}()
	for i := range e.Readers {
		go func() { errs <- e.read(b, content, uint64(i)) }()
	}
	for range e.Readers + 1 {
		err = errors.Join(err, <-errs)
	}
	return errors.Join(err, b.Close(), c.Close())
}

func (e *errand) read(b *Blob, content []byte, reader uint64) error {
	rng := rand.New(rand.NewPCG(e.Seed, reader))
	p := make([]byte, e.Most)
	for i := 0; i < e.Reads || e.Reads == 0; i++ {
		off := rng.IntN(len(content))
		part := p[:1+rng.IntN(min(e.Most, len(content)-off))]
		if err := b.ReadAt(ctx, part, int64(off)); err != nil {
			return err
		}
		if string(part) != string(content[off:off+len(part)]) {
			return fmt.Errorf("wrong bytes: %d at %d", len(part), off)
		}
	}
	return nil
}

// remote is the child's end of a server that serve gives to other processes.
type remote struct {
	url  string
	size int64
}

func (r *remote) Fetch(ctx context.Context, off, n int64) (io.ReadCloser, int64, int64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("%s/%d/%d", r.url, off, n), nil)
	if err != nil {
		return nil, 0, 0, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, 0, 0, err
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		return nil, 0, 0, errors.New(resp.Status)
	}
	return resp.Body, off, r.size, nil
}

// serve lets other processes fetch from s.
func serve(t testing.TB, s *server) (url string) {
	h := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		var off, n int64
		if _, err := fmt.Sscanf(req.URL.Path, "/%d/%d", &off, &n); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		body, _, _, err := s.Fetch(req.Context(), off, n)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer body.Close()
		w.Header().Set("Content-Length", fmt.Sprint(n))
		io.Copy(w, body) // the reader sees it where that fails
	}))
	t.Cleanup(h.Close)
	return h.URL
}

// A child is another process.
type child struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *bufio.Reader
	stderr strings.Builder
}

// spawn starts a child and waits until it is ready.
func spawn(t *testing.T, e errand) *child {
	t.Helper()
	encoded, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	c := &child{cmd: exec.Command(os.Args[0])}
	c.cmd.Env = append(os.Environ(), childEnv+"="+string(encoded))
	c.cmd.Stderr = &c.stderr
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.out = bufio.NewReader(out)
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if c.cmd.ProcessState == nil {
			c.kill()
		}
	})
	c.expect(t, "ready")
	return c
}

func (c *child) expect(t *testing.T, want string) {
	t.Helper()
	if line, err := c.out.ReadString('\n'); err != nil || strings.TrimSpace(line) != want {
		c.kill()
		t.Fatalf("child said %q, %v; want %s; stderr: %s", line, err, want, c.stderr.String())
	}
}

// start lets it read.
func (c *child) start(t *testing.T) {
	t.Helper()
	if _, err := io.WriteString(c.in, "\n"); err != nil {
		t.Fatal(err)
	}
	c.expect(t, "reading")
}

func (c *child) kill() {
	c.cmd.Process.Kill()
	c.cmd.Wait() // says that it was killed
}

// finish waits for it to end by itself.
func (c *child) finish(t *testing.T) {
	t.Helper()
	if err := c.cmd.Wait(); err != nil {
		t.Errorf("child: %v; stderr: %s", err, c.stderr.String())
	}
}

// checkSound fails unless every chunk that is kept in dir has its checksum.
func checkSound(t *testing.T, dir string) (chunks int64) {
	t.Helper()
	c, err := New(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	err = c.Verify(ctx, func(check Check) error {
		chunks += check.Chunks
		if check.Damaged > 0 || check.Skipped > 0 {
			t.Errorf("%+v", check)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	return chunks
}

// Two processes, one blob, 50 readers each, nothing there: no byte leaves the server twice, and all of both are right; also
// where both prefetch all of it, which is here then.
func TestProcessesFetchOnce(t *testing.T) {
	const chunks, size = 901, 900*cs + 100
	for _, c := range []struct {
		name     string
		ahead    int64
		most     int // bytes of a read
		prefetch bool
		kept     int64 // chunks, at least
	}{
		{"demand", -1, 9 * cs, false, 800},
		{"readahead", 64 * cs, 9 * cs, false, 800},
		{"prefetch", -1, 3 * cs, true, chunks},
		{"prefetch and readahead", 64 * cs, 3 * cs, true, chunks},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newServer(size)
			dir := t.TempDir()
			e := errand{Dir: dir, URL: serve(t, s), Size: size, Readers: 50, Reads: 20, Most: c.most, Prefetch: c.prefetch,
				Options: errandOptions{ChunkSize: cs, MaxSpan: 8 * cs, Readahead: c.ahead}}
			a := spawn(t, e)
			e.Seed = 1
			b := spawn(t, e)
			a.start(t)
			b.start(t)
			a.finish(t)
			b.finish(t)
			s.checkOnce(t)
			if got := checkSound(t, dir); got < c.kept || got > chunks {
				t.Errorf("%d chunks are kept, want %d to %d", got, c.kept, chunks)
			}
			if len(s.asked()) < 50 {
				t.Errorf("%d requests: the test shows nothing", len(s.asked()))
			}
		})
	}
}

var kills = flag.Int("kills", 100, "how often TestKilledProcess kills")

// A process is killed at random moments while another one reads; both fetch, evict and publish all the time.
func TestKilledProcess(t *testing.T) {
	const size = 2500*cs + 100
	n := *kills
	if testing.Short() {
		n = min(n, 10)
	}
	s := newServer(size)
	dir := t.TempDir()
	e := errand{Dir: dir, URL: serve(t, s), Size: size, Readers: 6, Most: 9 * cs,
		Options: errandOptions{ChunkSize: cs, MaxSpan: 8 * cs, MaxBytes: 2 * regionSize, Readahead: 64 * cs}}
	survivor := spawn(t, e)
	survivor.start(t)
	rng := rand.New(rand.NewPCG(3, 4))
	for i := range n {
		e.Seed = uint64(i) + 1
		c := spawn(t, e)
		c.start(t)
		// When it is killed is what the test is about: there is no event to wait for.
		time.Sleep(time.Duration(rng.IntN(30000)) * time.Microsecond)
		c.kill()
		if c.stderr.Len() > 0 {
			t.Errorf("killed child: %s", c.stderr.String())
		}
		if i%20 == 0 {
			checkSound(t, dir)
		}
	}
	survivor.kill()
	if survivor.stderr.Len() > 0 {
		t.Errorf("survivor: %s", survivor.stderr.String())
	}
	checkSound(t, dir)
	b := openBlob(t, openCacheAt(t, dir, e.Options.options()), s)
	for off := int64(0); off < size; off += 50 * cs {
		if err := readNow(ctx, b, s, off, min(50*cs, size-off)); err != nil {
			t.Error(err)
		}
	}
}

// Who waits for what a killed process fetches takes it over.
func TestTakeOver(t *testing.T) {
	const size = 20 * cs
	s := newServer(size)
	gate := make(chan struct{})
	var stuck sync.WaitGroup
	stuck.Add(1)
	var first sync.Once
	s.answer = func(int, *answer) {
		waits := false
		first.Do(func() { waits = true })
		if waits {
			stuck.Done()
			<-gate
		}
	}
	dir := t.TempDir()
	e := errand{Dir: dir, URL: serve(t, s), Size: size, Readers: 1, Most: 1, Options: errandOptions{ChunkSize: cs, Readahead: -1}}
	c := spawn(t, e)
	c.start(t)
	stuck.Wait() // its first chunk is being fetched, and will be for ever
	b := openBlob(t, openCacheAt(t, dir, e.Options.options()), s)
	all := read(ctx, b, s, 0, size)
	chunk := s.asked()[0].off / cs
	for { // all but that chunk are fetched
		if have := residents(t, b, s); len(have) == int(size/cs)-1 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if err, ended := all.ended(); ended {
		t.Errorf("ended without chunk %d: %v", chunk, err)
	}
	for _, r := range s.asked()[1:] {
		if r.off <= chunk*cs && chunk*cs < r.off+r.n {
			t.Errorf("request %v for chunk %d, which the other process fetches", r, chunk)
		}
	}
	c.kill()
	if err := <-all.done; err != nil {
		t.Error(err)
	}
	close(gate)
	if got := residents(t, b, s); len(got) != int(size/cs) {
		t.Errorf("%d chunks are present", len(got))
	}
}

// What another process does not bring in time is fetched once more, and not kept.
func TestPatience(t *testing.T) {
	const size = 4 * cs
	s, slow := newServer(size), newServer(size)
	hold := make(chan struct{})
	slow.hold = hold
	dir := t.TempDir()
	o := Options{ChunkSize: cs, Readahead: -1, Patience: 30 * time.Millisecond}
	other := openBlob(t, openCacheAt(t, dir, o), slow) // another open file is another process to the locks
	waits := read(ctx, other, s, cs, cs)
	for len(slow.asked()) == 0 {
		time.Sleep(time.Millisecond)
	}
	b := openBlob(t, openCacheAt(t, dir, o), s)
	if err := readNow(ctx, b, s, 0, size); err != nil {
		t.Error(err)
	}
	s.checkOnce(t)
	if got := residents(t, b, s); len(got) != 3 {
		t.Errorf("chunks %v are present; want not the one that is another's", got)
	}
	close(hold)
	if err := <-waits.done; err != nil {
		t.Error(err)
	}
	if err := readNow(ctx, b, s, cs, cs); err != nil {
		t.Error(err)
	}
	s.checkOnce(t)
}
