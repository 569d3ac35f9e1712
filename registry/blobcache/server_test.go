package blobcache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"

	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
)

func TestMain(m *testing.M) {
	if errand := os.Getenv(childEnv); errand != "" {
		if err := runChild(errand); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// cs is the chunk size of the tests that choose it.
const cs = MinChunkSize

// testDigest is well formed; nothing here looks at what it stands for.
var testDigest = "sha256:" + strings.Repeat("0123456789abcdef", 4)

var errServer = errors.New("injected server fault")

type request struct{ off, n int64 }

// A server is a scripted Fetcher that counts. Its script is set before it is used.
type server struct {
	content []byte
	whole   bool                      // answers the whole blob, as a server does that cannot range
	answer  func(call int, a *answer) // changes the call'th answer, from 0
	hold    chan struct{}             // every Fetch waits for it
	gates   map[int64]chan struct{}   // byte positions where every body waits

	open     atomic.Int64 // bodies
	mu       sync.Mutex   // guards what follows
	requests []request
	read     []int64 // bytes that bodies gave away, a chunk of size cs each
}

// An answer is what one Fetch gives.
type answer struct {
	start, end, total int64 // the body is content[start:end], and filler past its end
	err               error // of Fetch
	broken            error // of the body, in place of io.EOF
	missing           []missing
}

// missing bytes are a gap in a body.
type missing struct {
	request
	error
}

func (m missing) Gap() (off, n int64) { return m.off, m.n }

func (m missing) Unwrap() error { return m.error }

func newServer(size int) *server {
	return &server{content: sourcetest.Content(size), read: make([]int64, size/cs+1)}
}

func (s *server) Fetch(ctx context.Context, off, n int64) (io.ReadCloser, int64, int64, error) {
	s.mu.Lock()
	call := len(s.requests)
	s.requests = append(s.requests, request{off, n})
	s.mu.Unlock()
	if s.hold != nil {
		<-s.hold
	}
	size := int64(len(s.content))
	a := answer{start: off, end: off + n, total: size, broken: io.EOF}
	if s.whole {
		a.start, a.end = 0, size
	}
	if s.answer != nil {
		s.answer(call, &a)
	}
	if a.err != nil {
		return nil, 0, 0, a.err
	}
	s.open.Add(1)
	return &body{ctx: ctx, server: s, call: call, answer: a, pos: a.start}, a.start, a.total, nil
}

// asked gives the requests so far.
func (s *server) asked() []request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]request(nil), s.requests...)
}

// checkOnce fails unless no byte left the server twice.
func (s *server) checkOnce(t *testing.T) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for chunk, n := range s.read {
		if want := min(cs, int64(len(s.content))-int64(chunk)*cs); n > want {
			t.Errorf("chunk %d of %d bytes: %d bytes were fetched", chunk, want, n)
		}
	}
}

type body struct {
	answer
	ctx    context.Context
	server *server
	call   int
	pos    int64
	closed bool
}

// Read stops at each chunk's end and at each gate, so that a script can stop a body anywhere.
func (b *body) Read(p []byte) (int, error) {
	if b.closed {
		return 0, errors.New("read of a closed body")
	}
	if err := b.wait(); err != nil {
		return 0, err
	}
	if b.pos >= b.end {
		return 0, b.broken
	}
	n := min(int64(len(p)), b.end-b.pos, cs-b.pos%cs)
	for gate := range b.server.gates {
		if gate > b.pos {
			n = min(n, gate-b.pos)
		}
	}
	for i, m := range b.missing {
		if m.off >= b.pos {
			n = min(n, m.off-b.pos)
		}
		if n == 0 {
			b.pos += m.n
			b.missing = b.missing[i+1:]
			return 0, fmt.Errorf("body: %w", m)
		}
	}
	if past := int64(len(b.server.content)); b.pos >= past {
		clear(p[:n])
	} else {
		n = int64(copy(p[:n], b.server.content[b.pos:]))
		b.server.mu.Lock()
		b.server.read[b.pos/cs] += n
		b.server.mu.Unlock()
	}
	b.pos += n
	return int(n), nil
}

func (b *body) wait() error {
	gate := b.server.gates[b.pos]
	if gate == nil {
		return b.ctx.Err()
	}
	select {
	case <-gate:
		return nil
	case <-b.ctx.Done():
		return b.ctx.Err()
	}
}

func (b *body) Close() error {
	b.closed = true
	b.server.open.Add(-1)
	return nil
}

// openCache makes a cache of its own for this test.
func openCache(t testing.TB, o Options) *Cache {
	t.Helper()
	return openCacheAt(t, t.TempDir()+"/cache", o)
}

func openCacheAt(t testing.TB, dir string, o Options) *Cache {
	t.Helper()
	c, err := New(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func openBlob(t testing.TB, c *Cache, s *server) *Blob {
	t.Helper()
	return openWith(t, c, s, OpenOptions{})
}

func openWith(t testing.TB, c *Cache, s *server, o OpenOptions) *Blob {
	t.Helper()
	b, err := c.Open(testDigest, int64(len(s.content)), s, o)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// open is a blob in a cache of its own with chunks of cs, where nothing is fetched ahead unless the options say so.
func open(t testing.TB, s *server, o Options) *Blob {
	t.Helper()
	o.ChunkSize = cs
	if o.Readahead == 0 {
		o.Readahead = -1
	}
	return openBlob(t, openCache(t, o), s)
}

// A reading is a read that runs beside the test.
type reading struct{ done chan error }

func read(ctx context.Context, b *Blob, s *server, off, n int64) *reading {
	r := &reading{done: make(chan error, 1)}
	go func() { r.done <- readNow(ctx, b, s, off, n) }()
	return r
}

// ended gives the result, and false while the read waits.
func (r *reading) ended() (error, bool) {
	select {
	case err := <-r.done:
		return err, true
	default:
		return nil, false
	}
}

func readNow(ctx context.Context, b *Blob, s *server, off, n int64) error {
	p := make([]byte, n)
	if err := b.ReadAt(ctx, p, off); err != nil {
		return err
	}
	if string(p) != string(s.content[off:off+n]) {
		return fmt.Errorf("read of %d at %d: nil error, wrong bytes", n, off)
	}
	return nil
}

// residents lists the chunks that are present, and checks what is in them.
func residents(t testing.TB, b *Blob, s *server) []int64 {
	t.Helper()
	chunks := []int64{}
	for c := int64(0); c*cs < b.Size(); c++ {
		p := make([]byte, min(cs, b.Size()-c*cs))
		if !b.ReadResident(p, c*cs) {
			continue
		}
		if string(p) != string(s.content[c*cs:c*cs+int64(len(p))]) {
			t.Errorf("chunk %d is present and wrong", c)
		}
		chunks = append(chunks, c)
	}
	return chunks
}

func chunks(from, to int64) []int64 {
	list := []int64{}
	for ; from < to; from++ {
		list = append(list, from)
	}
	return list
}

// A logbook is a handler's output.
type logbook struct {
	mu   sync.Mutex // guards text
	text strings.Builder
}

func (l *logbook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logbook) lines(with string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), with)
}

func (l *logbook) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}
