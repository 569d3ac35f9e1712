package blobcache

import (
	"context"
	_ "crypto/sha256" // of digests
	_ "crypto/sha512"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/semaphore"
)

// Fetcher brings bytes of one blob. Its methods may be called in parallel.
type Fetcher interface {
	// Fetch asks for n bytes from off. start says where the body really begins, total how long the blob is.
	// Reads of the body end with an error when ctx ends; a body that broke off ends with an error other than io.EOF.
	// An error that has a method Gap() (off, n int64) is of these bytes alone, which are those that come next: they do
	// not, and the body goes on behind them. It may be Temporary, as one of Verify.
	Fetch(ctx context.Context, off, n int64) (body io.ReadCloser, start, total int64, err error)
}

// Options of a cache. The zero value works.
type Options struct {
	ChunkSize  int64 // a multiple of 4 KiB up to 16 MiB; 256 KiB if zero
	MaxSpan    int64 // the most that one Fetch asks for, in whole chunks and at least one; 8 MiB if zero
	MaxFetches int   // fetches that somebody waits for, under way at a time, all blobs together; 16 if zero
	Readahead  int64 // the most that is fetched ahead of a reader; 16 MiB if zero, nothing if negative
	MaxAhead   int   // fetches that nobody waits for, under way beside the MaxFetches; 4 if zero
	// MaxPrefetches is how many fetches of Prefetch are under way at a time, of all blobs together; 2 if zero.
	MaxPrefetches int
	// OneAtATime says that the Fetcher has room for one fetch only: what Prefetch has under way then does not pause for a
	// reader, who would wait for its end, but ends as soon as it can, at no limit. MaxPrefetches is 1.
	OneAtATime   bool
	PrefetchRate int64 // bytes a second that they bring together; no limit if zero
	// Label gives the context of each Fetch, made of what it would be otherwise, by its cause. nil: as it is.
	Label func(ctx context.Context, cause Cause) context.Context
	// Waiting gives the context of a Fetch for which somebody has waited before, for another process, since when nothing
	// has come. nil: as it is.
	Waiting func(ctx context.Context, since time.Time) context.Context
	// ObserveWait is called after each ReadAt that was not answered from what is present, with how long it took. It
	// may be called in parallel. nil: nobody is told.
	ObserveWait func(time.Duration)
	// MaxBytes is how much of the file system the directory may take, for all processes together as long as all of
	// them say the same. 10 % of the file system, and 20 GiB at most, if zero; no limit if negative.
	MaxBytes int64
	// MinFree is how much of the file system is left free. 1 GiB, and 5 % of the file system at most, if zero; no such
	// limit if negative.
	MinFree int64
	// Existing has New make no directory: where there is none, it fails with fs.ErrNotExist.
	Existing bool
	// Paranoid has every chunk checked at every read, and not at the first one only.
	Paranoid bool
	// Patience is how long a reader waits for what another process fetches, and nothing of it comes, before it is fetched
	// once more, without being kept. 20 s if zero.
	Patience time.Duration
	Logger   *slog.Logger // silent if nil
}

// A unit is a multiple of MinChunkSize, and at most MaxChunkSize.
const (
	MinChunkSize = 4 << 10
	MaxChunkSize = 16 << 20
)

// DefaultPatience is that of Options.
const DefaultPatience = 20 * time.Second

const (
	defaultChunkSize  = 256 << 10
	defaultMaxSpan    = 8 << 20
	defaultMaxFetches = 16
	defaultReadahead  = 16 << 20
	defaultMaxAhead   = 4
	defaultPrefetches = 2
	maxLoads          = 16
	// maxBlobSize is what one ext4 file can hold.
	maxBlobSize = 16 << 40
	// maxChunks and maxOpenChunks bound what hostile descriptors can make us allocate, for one blob and for all that are
	// open: a few bits for each chunk, read or not. They are 16 and 32 TiB at the usual chunks, and 256 and 512 GiB at the
	// smallest ones; 32 and 64 MiB of memory, of which what is not read is not touched.
	maxChunks     = 1 << 26
	maxOpenChunks = 2 * maxChunks
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
	if o.MaxBytes > 0 {
		o.Readahead = min(o.Readahead, o.MaxBytes/4) // what is fetched ahead cannot be evicted until it is there
	}
	if o.MaxAhead == 0 {
		o.MaxAhead = defaultMaxAhead
	}
	if o.MaxPrefetches == 0 {
		o.MaxPrefetches = defaultPrefetches
	}
	if o.OneAtATime {
		o.MaxPrefetches = 1
	}
	if o.MaxPrefetches < 0 || o.PrefetchRate < 0 {
		return o, fmt.Errorf("%d prefetches, %d bytes a second: must not be negative", o.MaxPrefetches, o.PrefetchRate)
	}
	if o.MaxSpan < 0 || o.MaxFetches < 0 || o.MaxAhead < 0 {
		return o, fmt.Errorf("span of %d bytes, %d fetches, %d ahead: must not be negative", o.MaxSpan, o.MaxFetches, o.MaxAhead)
	}
	if o.Patience == 0 {
		o.Patience = DefaultPatience
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o, nil
}

// checkSize refuses a blob that is too large to be kept in chunks of a unit.
func checkSize(size, unit int64) error {
	if err := checkUnit(unit); err != nil {
		return err
	}
	if size < 0 || size > maxBlobSize {
		return fmt.Errorf("size %d is outside 0 to %d", size, int64(maxBlobSize))
	}
	if n := ceil(size, unit); n > maxChunks {
		return fmt.Errorf("%d bytes in chunks of %d are %d chunks, and a blob may have %d at most", size, unit, n, maxChunks)
	}
	return nil
}

func checkUnit(n int64) error {
	if n < MinChunkSize || n > MaxChunkSize || n%MinChunkSize != 0 {
		return fmt.Errorf("chunk size %d: must be a multiple of %d up to %d", n, MinChunkSize, MaxChunkSize)
	}
	return nil
}

// OpenOptions of one blob. The zero value works.
type OpenOptions struct {
	// Verify is called with the bytes of a chunk, from off in the blob, before anybody reads them and once for each
	// time that this process takes the chunk in, be it from the Fetcher or from the disk. A chunk for which it returns
	// an error is not published. If the error has a method Temporary (and no Timeout), the bytes are wrong: a chunk of
	// the disk is fetched again, and one that was fetched is, as long as Temporary says true. Any
	// other error says nothing about the bytes, and what is on disk stays. Those who wait for the chunk get the error.
	// It may be called in parallel, must not keep p, and must not read the blob through this cache. nil: nothing is
	// verified.
	Verify func(ctx context.Context, p []byte, off int64) error
	// Vouched says that f verifies what it brings: it has passed, see Passed.
	Vouched bool
	// ChunkSize is the unit of this blob, a multiple of 4 KiB up to 16 MiB, where its own index says one; that of the
	// cache if zero.
	ChunkSize int64
	// Origin is what let the bytes in: what vouches for them or, where nothing does, where they come from. Blobs share
	// chunks only with the same digest, size, unit and origin, since under one digest a manifest may vouch for other
	// bytes than another, or a registry send what nobody has checked yet.
	Origin string
	// OnComplete is called, in a goroutine that Close waits for, when every chunk is here. If it returns false, it is
	// called again when every chunk is here and some have not passed: after some seconds, or as long as lets the calls
	// take a tenth of the time.
	OnComplete func() bool
	// Beneath says that other blobs are verified by this one: a flight of theirs may wait for a read of it while it has a
	// slot, so its own flights have others. They have no Label. What is here of it counts as used as long as it is open.
	Beneath bool
	// Keep has what is here of the blob when it is opened, and what is read of it, stay for as long as it is open, whether
	// anybody reads it or not: other processes do not evict it, nor prune it. It is for who could not fetch it again.
	Keep bool
	// NoReadahead has nothing fetched ahead of those who read through this Blob.
	NoReadahead bool
}

// A storeKey tells stores apart: blobs share one only if they agree on the unit and on whether chunks are verified.
type storeKey struct {
	name     string // see nameOf
	unit     int64
	verified bool
}

// Slots bound what is done at a time.
type slots struct {
	fetches *semaphore.Weighted // that somebody waits for
	loads   *semaphore.Weighted // reads of whole chunks from the disk
}

// Cache is a directory of blobs. Its methods may be called in parallel.
type Cache struct {
	options Options
	dir     *os.File                              // of this version, inside the cache's directory
	wrap    func(f chunkFile, l layout) chunkFile // gives f; or what a test puts in its place
	space   *space
	clock   atomic.Int64 // the time, in microseconds, when somebody last looked
	took    atomic.Int64 // the time, in microseconds, when a chunk was last written, or believed
	rest    atomic.Int64 // until when, in microseconds, nothing is written: see rests
	keeping sync.WaitGroup

	ctx     context.Context
	cancel  context.CancelFunc
	fetches *semaphore.Weighted // MaxFetches
	ahead   *semaphore.Weighted // MaxAhead
	loads   *semaphore.Weighted // reads of whole chunks from the disk
	beneath slots               // of the blobs that others are verified by
	unkept  sync.Once           // the log line about a disk that cannot keep what was fetched

	background *background
	outside    *outside
	counters   cacheCounters

	mu     sync.Mutex // guards what follows, and store.refs
	stores map[storeKey]*store
	chunks int64       // of the blobs that are open, see maxOpenChunks
	past   storeCounts // of the stores that are gone
	// orphans are open, and their files were purged or removed: nobody who opens a blob gets one of them any more.
	orphans map[*store]struct{}
	blobs   map[*Blob]struct{} // open ones
	closed  bool
}

// New opens the cache directory dir and makes it, with mode 0700, where it does not exist (see Options.Existing). It refuses a directory
// that somebody else owns or can write to, and a symbolic link.
func New(dir string, o Options) (*Cache, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("blob cache: %w", err)
	}
	root, err := openDir(dir, o.Existing)
	if err != nil {
		return nil, fmt.Errorf("blob cache: %w", err)
	}
	c := &Cache{
		options: o,
		dir:     root,
		wrap:    func(f chunkFile, _ layout) chunkFile { return f },
		fetches: semaphore.NewWeighted(int64(o.MaxFetches)),
		ahead:   semaphore.NewWeighted(int64(o.MaxAhead)),
		loads:   semaphore.NewWeighted(maxLoads),
		beneath: slots{semaphore.NewWeighted(int64(o.MaxFetches)), semaphore.NewWeighted(maxLoads)},

		background: newBackground(o),
		stores:     make(map[storeKey]*store),
		orphans:    make(map[*store]struct{}),
		blobs:      make(map[*Blob]struct{}),
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.tick()
	c.took.Store(c.clock.Load())
	if c.space, err = newSpace(c); err != nil {
		c.cancel()
		return nil, errors.Join(fmt.Errorf("blob cache: %w", err), root.Close())
	}
	c.outside = &outside{file: c.space.file}
	c.keeping.Go(c.keepHouse)
	c.keeping.Go(c.watchDisk)
	return c, nil
}

// Open gives the blob with this digest and size, whose absent parts f brings. Blobs of one digest, size, unit
// and origin share what they fetched; each begins flights through its own f only, and none after its Close.
func (c *Cache) Open(digest string, size int64, f Fetcher, o OpenOptions) (*Blob, error) {
	if err := checkDigest(digest); err != nil {
		return nil, fmt.Errorf("open blob: %w", err)
	}
	if o.ChunkSize == 0 {
		o.ChunkSize = c.options.ChunkSize
	}
	if err := checkSize(size, o.ChunkSize); err != nil {
		return nil, fmt.Errorf("open blob %s: %w", digest, err)
	}
	var b *Blob
	err := c.space.locked(c.ctx, func() (err error) {
		b, err = c.open(digest, size, f, o)
		return err
	})
	if c.ctx.Err() != nil {
		err = os.ErrClosed
	}
	if err != nil {
		return nil, fmt.Errorf("open blob %s: %w", digest, err)
	}
	return b, nil
}

// open is Open for who has the directory's lock.
func (c *Cache) open(digest string, size int64, f Fetcher, o OpenOptions) (*Blob, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, os.ErrClosed
	}
	key := storeKey{nameOf(digest, size, o.Origin), o.ChunkSize, o.Verify != nil}
	s := c.stores[key]
	if s != nil && s.disk.removed() {
		c.disown(s)
		s = nil
	}
	if s == nil {
		n := ceil(size, o.ChunkSize)
		if n > maxOpenChunks-c.chunks {
			return nil, fmt.Errorf("%d bytes in chunks of %d are %d chunks; the blobs that are open have %d, and may have %d at most", size, o.ChunkSize, n, c.chunks, maxOpenChunks)
		}
		var err error
		if s, err = newStore(c, key, size); err != nil {
			return nil, err
		}
		c.chunks += n
		c.stores[key] = s
		s.beneath = o.Beneath
	}
	s.beneath = s.beneath && o.Beneath
	s.refs++
	b := &Blob{store: s, fetcher: f, verify: o.Verify, vouched: o.Vouched, onComplete: o.OnComplete, noReadahead: o.NoReadahead, beneath: o.Beneath, keep: o.Keep}
	b.ctx, b.cancel = context.WithCancel(c.ctx)
	c.blobs[b] = struct{}{}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.blobs[b] = struct{}{}
	s.completed()
	if err := s.remain(); err != nil {
		c.options.Logger.Warn("what is to stay in the cache cannot be kept from other processes", "blob", s.digest, "err", err)
	}
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
	c.keeping.Wait()
	return errors.Join(append(errs, c.space.close(), c.dir.Close())...)
}

// forget takes b off the books, and its store with the last blob of that digest.
func (c *Cache) forget(b *Blob) error {
	c.mu.Lock()
	delete(c.blobs, b)
	c.mu.Unlock()
	return c.release(b.store)
}

// hold gives all stores, which stay until they are released.
func (c *Cache) hold() []*store {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []*store
	for _, s := range c.stores {
		s.refs++
		all = append(all, s)
	}
	for s := range c.orphans {
		s.refs++
		all = append(all, s)
	}
	return all
}

// disown leaves a store whose file has no name any more to those who have it open. The caller holds c.mu.
func (c *Cache) disown(s *store) {
	if c.stores[s.key] == s {
		delete(c.stores, s.key)
		c.orphans[s] = struct{}{}
	}
}

func (c *Cache) release(s *store) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.refs--; s.refs > 0 {
		return nil
	}
	c.past.add(s)
	c.chunks -= s.chunks
	delete(c.orphans, s)
	if c.stores[s.key] == s {
		delete(c.stores, s.key)
	}
	if err := errors.Join(s.storeUses(), s.disk.close()); err != nil {
		return fmt.Errorf("close blob %s: %w", s.digest, err)
	}
	return nil
}

// checkDigest allows what an OCI digest may be. A file name is made from it, and it may come from a server.
func checkDigest(s string) error {
	if err := digest.Digest(s).Validate(); err != nil {
		return fmt.Errorf("digest %.80q: %w", s, err)
	}
	return nil
}
