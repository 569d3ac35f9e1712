package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Blob is read by ranges. It may be used by many goroutines at once.
type Blob struct {
	source *source
	desc   ocispec.Descriptor
	// storage is where each place last sent us for the blob, often by a URL that is
	// signed and good for minutes. nil: ask the place.
	storage []atomic.Pointer[url.URL]
	last    atomic.Pointer[place] // where the last answer came from
	whole   atomic.Bool           // the log says that a server ignores ranges
}

// Blob returns the blob that desc describes, in the repository of ref. Nothing
// is sent. The size in desc is what every answer will be held against.
func (c *Client) Blob(ref Reference, desc ocispec.Descriptor) (*Blob, error) {
	if err := ref.validate(); err != nil {
		return nil, err
	}
	if err := checkDigest(desc.Digest); err != nil {
		return nil, fmt.Errorf("blob in %s: %w", ref.name(), err)
	}
	if desc.Size < 0 {
		return nil, fmt.Errorf("blob %s in %s: size %d", desc.Digest, ref.name(), desc.Size)
	}
	ref.Tag, ref.Digest = "", desc.Digest
	src, err := c.source(ref)
	if err != nil {
		return nil, err
	}
	return &Blob{source: src, desc: desc, storage: make([]atomic.Pointer[url.URL], len(src.places))}, nil
}

// Size is the blob's length in bytes.
func (b *Blob) Size() int64 { return b.desc.Size }

// Digest names the blob's content.
func (b *Blob) Digest() digest.Digest { return b.desc.Digest }

// Fetch asks for the n bytes from off, by one ranged GET. start says where the
// body really begins: at off, or at 0 where the server sends the whole blob in
// spite of the range; total is the blob's size. The body ends after the last
// byte that was asked for, or after the last byte of the blob.
//
// A body that breaks off goes on by itself with a new GET for the rest. Its Read
// blocks no longer than Options.ErrorWait without a byte, and fails for good
// when the answer does not pass the checks. It must be closed. It is for one
// goroutine; another one that wants to end a Read cancels ctx.
func (b *Blob) Fetch(ctx context.Context, off, n int64) (body io.ReadCloser, start, total int64, err error) {
	size := b.desc.Size
	if off < 0 || n <= 0 || off > size || n > size-off {
		return nil, 0, 0, fmt.Errorf("blob %s: bytes %d+%d are not within its %d", b.desc.Digest, off, n, size)
	}
	s := &stream{ctx: ctx, blob: b, pos: off, end: off + n, wait: b.source.registry().reading(ctx)}
	s.wait.begin()
	err = s.open(true)
	s.first = s.pos
	s.wait.end()
	if err != nil {
		return nil, 0, 0, b.located(err, off, n)
	}
	return s, s.pos, size, nil
}

// Places is how many there are to fetch the blob from: the registry, and its mirrors.
func (b *Blob) Places() int { return len(b.source.places) }

// Origin says where the bytes come from, and how sure it is that they do: the places and, of each, whether plain HTTP
// or any certificate is allowed. It is for who keeps bytes that nothing vouches for, and must not take those of a
// stranger for them. There is no secret in it.
func (b *Blob) Origin() string { return b.source.origin() }

// origin is Blob.Origin.
func (s *source) origin() string {
	var parts []string
	for _, p := range s.places {
		sure := "tls"
		switch {
		case p.access.insecure:
			sure = "insecure"
		case p.client.plainHTTP:
			sure = "http"
		case p.client.anyCertificate:
			sure = "tls, unchecked"
		}
		parts = append(parts, fmt.Sprintf("%s (%s)", p.ref.name(), sure))
	}
	return strings.Join(parts, ", ")
}

// FetchElsewhere is Fetch of bytes that were not what they should be when they came the
// last time, which why says. A mirror that they may have come from is left for a while, and
// asked last.
func (b *Blob) FetchElsewhere(ctx context.Context, off, n int64, why error) (body io.ReadCloser, start, total int64, err error) {
	if p := b.last.Load(); p != nil {
		p.leave(why)
		// It may have sent us to the storage of something else.
		b.storage[p.index].Store(nil)
	}
	at := b.source.registry()
	at.client.happened(EventWrongBytes)
	at.client.log.Warn("bytes of a blob are wrong; they are fetched again", "repository", at.ref.name(),
		"blob", b.desc.Digest, "offset", off, "bytes", n, "err", why)
	return b.Fetch(ctx, off, n)
}

func (b *Blob) located(err error, off, n int64) error {
	return fmt.Errorf("blob %s bytes %d+%d: %w", b.desc.Digest, off, n, err)
}

func (b *Blob) path() string { return "blobs/" + b.desc.Digest.String() }

// An answer is that of one ranged GET.
type answer struct {
	resp  *http.Response
	whole bool   // the body is the blob from its first byte on
	from  *place // whom to blame if the body is not what it should be
}

// answer asks for the bytes from off to end, at one place after the other.
func (b *Blob) answer(ctx context.Context, off, end int64) (a answer, err error) {
	err = b.source.try(ctx, func(p *place) error {
		a, err = b.ask(ctx, p, off, end)
		return err
	})
	return a, err
}

func (b *Blob) ask(ctx context.Context, p *place, off, end int64) (answer, error) {
	resp, err := b.send(ctx, p, rangeHeader(off, end))
	if err != nil {
		return answer{}, err
	}
	switch resp.StatusCode {
	case http.StatusPartialContent:
		err = checkPartial(resp, off, end-off, b.desc.Size)
	case http.StatusOK:
		err = checkWhole(resp, b.desc.Size)
	default:
		return answer{}, statusError(resp, p.auth.hide)
	}
	if err != nil {
		b.storage[p.index].Store(nil)
		refused(resp)
		_ = resp.Body.Close() // the answer is of no use
		return answer{}, fmt.Errorf("GET %s: %w", redact(resp.Request.URL), err)
	}
	b.last.Store(p)
	if resp.StatusCode == http.StatusOK && end-off < b.desc.Size && !b.whole.Swap(true) {
		level := slog.LevelWarn
		if p.mirror {
			level = slog.LevelInfo // pull-through caches do so as long as they do not have the blob themselves
		}
		p.client.log.Log(ctx, level, "the server ignores ranges; it sends the blob from its first byte on", "repository", p.ref.name(),
			"blob", b.desc.Digest, "bytes", b.desc.Size)
	}
	return answer{resp: resp, whole: resp.StatusCode == http.StatusOK, from: p}, nil
}

// send asks the storage, where one is known, else the registry. Whatever the
// storage answers but the bytes makes the registry the one to ask: a signed URL
// has expired, say, and the registry has a new one.
func (b *Blob) send(ctx context.Context, p *place, header http.Header) (*http.Response, error) {
	known := &b.storage[p.index]
	if storage := known.Load(); storage != nil {
		resp, err := p.storage(ctx, storage, header)
		if err == nil && resp.StatusCode < 300 {
			return resp, nil
		}
		known.CompareAndSwap(storage, nil)
		if err != nil {
			return nil, err
		}
		if refusal := statusError(resp, p.auth.hide); refusal.temporary() {
			return nil, refusal
		}
	}
	elsewhere := func(resp *http.Response) bool { return resp.Request.URL.Host != p.ref.apiHost() }
	resp, err := p.do(ctx, http.MethodGet, b.path(), header)
	if err == nil && elsewhere(resp) && saysStale(resp.StatusCode) {
		// It was signed a moment ago, but may have waited on its way: once more.
		discard(resp)
		resp, err = p.do(ctx, http.MethodGet, b.path(), header)
	}
	if err == nil && resp.StatusCode < 300 && elsewhere(resp) {
		known.Store(resp.Request.URL)
	}
	return resp, err
}

// saysStale reports how storages refuse a URL that is not good any more.
func saysStale(status int) bool {
	switch status {
	case http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden, http.StatusGone:
		return true
	}
	return false
}

func rangeHeader(off, end int64) http.Header {
	return http.Header{
		"Range":           {fmt.Sprintf("bytes=%d-%d", off, end-1)},
		"Accept-Encoding": {"identity"},
	}
}

// A stream is the body of a Fetch: one answer after the other, as far as they
// last. It belongs to one goroutine.
type stream struct {
	ctx  context.Context
	blob *Blob
	wait *patience

	pos, end int64 // the next byte to deliver, and where to stop
	first    int64 // the first byte to deliver
	part     *part // nil between two answers
	err      error // the last word
}

// A part is one answer's body: the bytes of the blob up to left more, and then,
// if the answer was to end there, nothing.
type part struct {
	from   *place
	body   io.ReadCloser
	left   int64
	exact  bool
	cancel context.CancelCauseFunc
	limit  *time.Timer // cancels when patience ends
}

func (s *stream) Read(p []byte) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	if len(p) == 0 {
		return 0, nil
	}
	s.wait.begin()
	defer s.wait.end()
	n, err := s.read(p)
	if err != nil {
		if err != io.EOF {
			err = s.blob.located(err, s.pos, s.end-s.pos)
		}
		s.err = err
		s.drop()
	}
	return n, err
}

// read returns at least one byte, or the end, or why there is none.
func (s *stream) read(p []byte) (int, error) {
	for {
		if s.pos == s.end {
			return 0, io.EOF
		}
		err := s.open(false)
		if err != nil {
			return 0, err
		}
		n, err := s.part.read(p, s.wait)
		switch {
		case n > 0:
			s.pos += int64(n)
			s.wait.progress()
			return n, nil
		case err == nil:
			continue // io.Reader allows it
		}
		s.blame(s.part.from, err)
		s.drop()
		level := slog.LevelInfo // it goes on with the next request, as a rule
		if s.wait.waited() >= lateAfter {
			level = slog.LevelWarn
		}
		if err := s.again(err, level); err != nil {
			return 0, err
		}
		if s.pos > s.first {
			s.blob.source.registry().client.happened(EventResume)
		}
	}
}

// open sees to it that there is a part which goes on at pos. Only the first
// answer may move pos and end, to those of a whole blob.
func (s *stream) open(first bool) error {
	for s.part == nil {
		err := s.tryOpen(first)
		if err == nil {
			return nil
		}
		// What is wrong with a host its gate says, and the last word is the reader's.
		if err := s.again(err, slog.LevelDebug); err != nil {
			return err
		}
	}
	return nil
}

// again says what to do about a try that failed, for the log at this level if another one may mend it: nil is that
// other one.
func (s *stream) again(err error, level slog.Level) error {
	if s.ctx.Err() != nil || !worthRetrying(err) {
		level = slog.LevelDebug // who reads says so
	}
	at := s.blob.source.registry()
	log := at.client.log.With("repository", at.ref.name(), "blob", s.blob.desc.Digest, "offset", s.pos, "try", s.wait.tries+1, "err", err)
	if level == slog.LevelDebug {
		log.Debug("a try to read a blob failed")
	} else {
		log.Log(s.ctx, level, "blob read interrupted; it goes on where it was")
	}
	return s.wait.again(s.ctx, err)
}

func (s *stream) tryOpen(first bool) error {
	ctx, cancel := context.WithCancelCause(s.ctx)
	pt := &part{cancel: cancel, limit: time.AfterFunc(s.wait.watch(), func() { cancel(&wireError{errOutOfTime}) })}
	a, err := s.blob.answer(ctx, s.pos, s.end)
	if err != nil {
		pt.limit.Stop()
		cancel(nil)
		return err
	}
	if a.whole && first {
		s.pos, s.end = 0, s.blob.desc.Size
	}
	pt.from, pt.body = a.from, a.resp.Body
	pt.left, pt.exact = s.end-s.pos, !a.whole || s.end == s.blob.desc.Size
	if a.whole {
		// A server that does not know ranges starts over; what was delivered
		// before is passed over.
		_, err = io.CopyN(io.Discard, a.resp.Body, s.pos)
	}
	pt.limit.Stop()
	if err != nil {
		s.blame(a.from, err)
		pt.close()
		return shortBody(err)
	}
	s.part = pt
	return nil
}

// blame leaves a mirror whose body failed, unless it was the reader who left.
func (s *stream) blame(p *place, err error) {
	if s.ctx.Err() == nil {
		p.leave(err)
	}
}

// read delivers bytes, or says why not. The last ones leave only when the body
// has been seen to end where it should.
func (pt *part) read(p []byte, wait *patience) (int, error) {
	pt.limit.Reset(wait.watch())
	defer pt.limit.Stop()
	n, err := pt.body.Read(p[:min(int64(len(p)), pt.left)])
	pt.left -= int64(n)
	switch {
	case pt.left == 0 && pt.exact && err != io.EOF:
		if err := atEnd(pt.body); err != nil {
			return 0, err
		}
		return n, nil
	case n > 0 || err == nil:
		return n, nil
	}
	return 0, shortBody(err)
}

// shortBody makes the end of a body that should have been longer a broken
// connection, which it is more often than not.
func shortBody(err error) error {
	if err == io.EOF {
		return &wireError{errors.New("body broke off")}
	}
	return err
}

// atEnd reads on after the last byte.
func atEnd(body io.Reader) error {
	var one [1]byte
	_, err := io.ReadFull(body, one[:])
	switch err {
	case io.EOF:
		return nil
	case nil:
		return errors.New("body goes on after the range that was asked for")
	}
	return err
}

func (pt *part) close() {
	pt.limit.Stop()
	_ = pt.body.Close() // nothing was written, nothing can be lost
	pt.cancel(nil)
}

func (s *stream) drop() {
	if s.part != nil {
		s.part.close()
		s.part = nil
	}
}

// Close ends the stream. A connection whose answer was read to its end can be
// used again; any other is closed.
func (s *stream) Close() error {
	s.drop()
	if s.err == nil {
		s.err = errors.New("body is closed")
	}
	return nil
}
