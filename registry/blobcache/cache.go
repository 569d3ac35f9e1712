// Package blobcache keeps the parts of blobs that were read on disk, and fetches each part once, however many
// readers want it.
//
// A blob is cut into chunks of 256 KiB. A chunk is absent, in flight or present:
//
//	ReadAt ── all present ──────────────────────────────── pread ──► p
//	   │                                                     ▲
//	   └─ some absent ─► claim them, join those in flight ─► wait, a chunk at a time
//	                       │
//	                       └─► flights: one Fetch for each run of adjacent absent chunks
//	                             body ─► chunk whole ─► pwrite ─► presence bit ─► its waiters leave
//
// A flight belongs to the Blob that began it and a wait to the reader: a reader leaves when its own chunks are there
// or its context ends, and the flight goes on for the others until Close. What a flight could not bring is absent
// again, and the readers who waited for it get its error: nothing is ever filled in.
//
// A server that answers the whole blob to a request for a range is read to its end, since to ask again would bring
// the whole again. Such a flight is the blob's stream: it publishes every chunk that passes, readers of chunks that
// are still to come wait for it, and it takes over what other flights have asked for but not begun to receive.
//
// Before anybody waits for them, chunks are fetched that will probably be read next: a window in front of whoever goes
// forward through the blob, and the rest of a region of which half was read (see guesser). What is guessed from is the
// first read of each chunk, whether it was absent or fetched ahead; all other reads pay for a look at one bitmap. A
// guess goes behind the flight that is just to begin, or is a flight of its own. It has no claim on the limit for what
// somebody waits for, has a limit of its own, and where that is reached it is dropped, not queued. A reader of a chunk
// that is fetched ahead waits for it as for any other; if that fails, the reader fetches it, and nothing is guessed
// until something goes well again.
//
// On disk a blob is one sparse file with byte i of the blob at byte i, and holes where chunks are absent; which
// chunks are present is kept apart from it, one bit each:
//
//	file    | chunk 0 |  hole   | chunk 2 | chunk 3 |  hole  … | last, may be short |
//	bitmap       1         0         1         1         0               1
//
// The map is in memory and the file has no name, so that neither a killed process nor a crash leaves anything behind
// or is believed by the next one. A disk that is full does not fail a read: the chunk is handed to those who wait for
// it and is absent afterwards.
//
// The package does not retry, bound how long a fetch may take, or verify: the Fetcher does the first two. It knows
// nothing of HTTP or registries, nor of what is in a blob.
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

	"golang.org/x/sync/semaphore"
)

// Fetcher brings bytes of one blob. Its methods may be called in parallel.
type Fetcher interface {
	// Fetch asks for n bytes from off. start says where the body really begins, total how long the blob is.
	// Reads of the body end with an error when ctx ends; a body that broke off ends with an error other than io.EOF.
	Fetch(ctx context.Context, off, n int64) (body io.ReadCloser, start, total int64, err error)
}

// Options of a cache. The zero value works.
type Options struct {
	ChunkSize  int64        // a power of two from 4 KiB to 16 MiB; 256 KiB if zero
	MaxSpan    int64        // the most that one Fetch asks for, in whole chunks and at least one; 8 MiB if zero
	MaxFetches int          // fetches that somebody waits for, under way at a time, all blobs together; 16 if zero
	Readahead  int64        // the most that is fetched ahead of a reader; 16 MiB if zero, nothing if negative
	MaxAhead   int          // fetches under way beside those that nobody waits for; 4 if zero
	Logger     *slog.Logger // silent if nil
}

const (
	defaultChunkSize  = 256 << 10
	defaultMaxSpan    = 8 << 20
	defaultMaxFetches = 16
	defaultReadahead  = 16 << 20
	defaultMaxAhead   = 4
	minChunkSize      = 4 << 10
	maxChunkSize      = 16 << 20
	// maxBlobSize bounds the presence map that a hostile descriptor can make us allocate: 512 MiB at the smallest
	// chunks, 8 MiB at the usual ones. It is also what one ext4 file can hold.
	maxBlobSize = 16 << 40
)

func (o Options) withDefaults() (Options, error) {
	if o.ChunkSize == 0 {
		o.ChunkSize = defaultChunkSize
	}
	if err := checkUnit(o.ChunkSize); err != nil {
		return o, err
	}
	if o.MaxSpan == 0 {
		o.MaxSpan = defaultMaxSpan
	}
	if o.MaxFetches == 0 {
		o.MaxFetches = defaultMaxFetches
	}
	if o.Readahead == 0 {
		o.Readahead = defaultReadahead
	}
	if o.MaxAhead == 0 {
		o.MaxAhead = defaultMaxAhead
	}
	if o.MaxSpan < 0 || o.MaxFetches < 0 || o.MaxAhead < 0 {
		return o, fmt.Errorf("span of %d bytes, %d fetches, %d ahead: must not be negative", o.MaxSpan, o.MaxFetches, o.MaxAhead)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o, nil
}

func checkUnit(n int64) error {
	if n < minChunkSize || n > maxChunkSize || n%minChunkSize != 0 {
		return fmt.Errorf("chunk size %d: must be a multiple of %d up to %d", n, minChunkSize, maxChunkSize)
	}
	return nil
}

// OpenOptions of one blob. The zero value works.
type OpenOptions struct {
	// Verify is called with the bytes of a chunk, from off in the blob, before anybody reads them and once for each
	// time that this process takes the chunk in, be it from the Fetcher or from the disk. A chunk for which it returns
	// an error is not published. If the error has a method Temporary that says true, the chunk is fetched again, a few
	// times for each read; else those who wait for the chunk get the error. It may be called in parallel, must not
	// keep p, and must not read the blob through this cache. nil: nothing is verified.
	Verify func(ctx context.Context, p []byte, off int64) error
	// ChunkSize is the unit of this blob, a multiple of 4 KiB up to 16 MiB, where its own index says one; that of the
	// cache if zero.
	ChunkSize int64
	// OnComplete is called once, in a goroutine that Close waits for, when every chunk is here.
	OnComplete func()
}

// A storeKey tells stores apart: blobs share one only if they agree on the unit and on whether chunks are verified.
type storeKey struct {
	digest   string
	unit     int64
	verified bool
}

// Cache is a directory of blobs. Its methods may be called in parallel.
type Cache struct {
	options Options
	root    *os.Root
	create  func(name string, size int64) (chunkFile, error) // createPrivate, or what a test puts in its place

	ctx     context.Context
	cancel  context.CancelFunc
	fetches *semaphore.Weighted // MaxFetches
	ahead   *semaphore.Weighted // MaxAhead
	unkept  sync.Once           // the log line about a disk that cannot keep what was fetched

	mu     sync.Mutex // guards what follows, and store.refs
	stores map[storeKey]*store
	blobs  map[*Blob]struct{} // open ones
	closed bool
}

// New opens the cache directory dir and makes it, with mode 0700, where it does not exist. It refuses a directory
// that somebody else owns or can write to, and a symbolic link.
func New(dir string, o Options) (*Cache, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("blob cache: %w", err)
	}
	root, err := openDir(dir)
	if err != nil {
		return nil, fmt.Errorf("blob cache: %w", err)
	}
	c := &Cache{
		options: o,
		root:    root,
		fetches: semaphore.NewWeighted(int64(o.MaxFetches)),
		ahead:   semaphore.NewWeighted(int64(o.MaxAhead)),
		stores:  make(map[storeKey]*store),
		blobs:   make(map[*Blob]struct{}),
	}
	c.create = c.createPrivate
	c.ctx, c.cancel = context.WithCancel(context.Background())
	return c, nil
}

// Open gives the blob with this digest and size, whose absent parts f brings. Blobs of one digest share what they
// fetched; each begins flights through its own f only, and none after its Close.
func (c *Cache) Open(digest string, size int64, f Fetcher, o OpenOptions) (*Blob, error) {
	if err := checkDigest(digest); err != nil {
		return nil, fmt.Errorf("open blob: %w", err)
	}
	if size < 0 || size > maxBlobSize {
		return nil, fmt.Errorf("open blob %s: size %d is outside 0 to %d", digest, size, int64(maxBlobSize))
	}
	if o.ChunkSize == 0 {
		o.ChunkSize = c.options.ChunkSize
	}
	if err := checkUnit(o.ChunkSize); err != nil {
		return nil, fmt.Errorf("open blob %s: %w", digest, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, fmt.Errorf("open blob %s: cache: %w", digest, os.ErrClosed)
	}
	key := storeKey{digest, o.ChunkSize, o.Verify != nil}
	s := c.stores[key]
	if s == nil {
		var err error
		if s, err = newStore(c, key, size); err != nil {
			return nil, fmt.Errorf("open blob %s: %w", digest, err)
		}
		c.stores[key] = s
	}
	if s.size != size {
		return nil, fmt.Errorf("open blob %s: size %d, but it is open with size %d", digest, size, s.size)
	}
	s.refs++
	b := &Blob{store: s, fetcher: f, verify: o.Verify, onComplete: o.OnComplete}
	b.ctx, b.cancel = context.WithCancel(c.ctx)
	c.blobs[b] = struct{}{}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.blobs[b] = struct{}{}
	s.completed()
	return b, nil
}

// Close closes the blobs that are still open, waits for their flights, and closes the directory.
func (c *Cache) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	open := make([]*Blob, 0, len(c.blobs))
	for b := range c.blobs {
		open = append(open, b)
	}
	c.mu.Unlock()

	c.cancel()
	var errs []error
	for _, b := range open {
		errs = append(errs, b.Close())
	}
	return errors.Join(append(errs, c.root.Close())...)
}

// forget takes b off the books, and its store with the last blob of that digest.
func (c *Cache) forget(b *Blob) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.blobs, b)
	s := b.store
	if s.refs--; s.refs > 0 {
		return nil
	}
	delete(c.stores, s.key)
	if err := s.file.Close(); err != nil {
		return fmt.Errorf("close blob %s: %w", s.digest, err)
	}
	return nil
}

// checkDigest allows what an OCI digest may be. A file name is made from it, and it may come from a server.
func checkDigest(digest string) error {
	algorithm, hex, _ := strings.Cut(digest, ":")
	lengths := map[string]int{"sha256": 64, "sha384": 96, "sha512": 128}
	want, ok := lengths[algorithm]
	if !ok {
		return fmt.Errorf("digest %.80q: must be one of sha256, sha384 or sha512", digest)
	}
	if len(hex) != want || strings.Trim(hex, "0123456789abcdef") != "" {
		return fmt.Errorf("digest %.160q: %s must be followed by %d lower-case hex digits", digest, algorithm, want)
	}
	return nil
}
