package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
	"github.com/erofs-oci/erofs-oci/registry/lastknown"
)

// maxDocument is more than a manifest, an index or a configuration may have.
const maxDocument = 8 << 20

// A keeper keeps in the cache what is read of a repository beside its layers: documents as blobs of it, and what tags
// led to in records next to it. It is a registry.Documents and a registry.Tags.
type keeper struct {
	cache      *blobcache.Cache
	tags       *lastknown.Store   // nil: what tags lead to is not remembered
	noTags     error              // why
	repository registry.Reference // without tag and digest
	from       string             // as registry.Repository.Origin says
	log        *slog.Logger

	mu   sync.Mutex                        // guards what follows
	held map[digest.Digest]*blobcache.Blob // documents of the image, which stay as long as they are open
	led  *lastknown.Entry                  // what the tag leads to, until that is remembered; nil: nothing new
}

// recordsDir is where what tags led to is kept, below the cache's directory.
func recordsDir(cacheDir string) string { return filepath.Join(cacheDir, "references") }

// openRecords opens the records that are next to the cache in dir.
func openRecords(dir string) (*lastknown.Store, error) {
	if err := backend.PrivateDir(recordsDir(dir)); err != nil {
		return nil, err
	}
	return lastknown.Open(recordsDir(dir), lastknown.Options{})
}

// openCache opens the cache, and the records next to it.
func (p *program) openCache(o *opened, s *sourceOptions, log *slog.Logger) error {
	dir, err := p.cacheDir(s.cacheDir, os.Geteuid())
	if err != nil {
		return err
	}
	keep, err := s.cacheOptions(log)
	if err != nil {
		return err
	}
	o.dir = dir
	if o.cache, err = blobcache.New(dir, keep); err != nil {
		if errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EROFS) {
			err = fmt.Errorf("%w; name a directory that you can write with --cache-dir", err)
		}
		return err
	}
	if o.records, o.noRecords = openRecords(dir); o.noRecords != nil {
		// Only --offline needs them, and not where a digest is mounted.
		log.Warn("what tags lead to is not remembered; --offline will not find it", "err", o.noRecords)
	}
	return nil
}

// cacheOptions are those of the cache that s is read through.
func (s *sourceOptions) cacheOptions(log *slog.Logger) (blobcache.Options, error) {
	keep, err := s.keep.options(log)
	if err != nil {
		return keep, err
	}
	keep.PrefetchRate, keep.MaxPrefetches = s.prefetch.bytesPerSecond, s.prefetch.atOnce()
	keep.OneAtATime = s.client.MaxConnsPerHost == 1
	s.meter.measureCache(&keep)
	if wait := s.client.ErrorWait; wait > 0 {
		keep.Patience = min(blobcache.DefaultPatience, wait) // for another process, in place of the registry
	}
	if s.offline {
		keep.Readahead = -1
		keep.Patience = time.Millisecond // what another process may fetch is not here
	}
	return keep, nil
}

// resolve finds the image that s names: from the registry, as far as it has to be asked, or from what is kept.
func (p *program) resolve(ctx context.Context, o *opened, s *sourceOptions, log *slog.Logger) error {
	if err := p.openCache(o, s, log); err != nil {
		return err
	}
	repository := o.client.Repository(s.ref.registry)
	from, err := repository.Origin()
	if err != nil {
		return fmt.Errorf("%s: %w", s.ref, err)
	}
	o.keeper = newKeeper(o, s.ref.registry, from, log)
	keep := registry.Keep{Documents: o.keeper, Tags: o.keeper}
	if s.offline {
		keep.Offline = errOffline
	}
	o.image, err = registry.ResolveIn(ctx, repository.Keep(keep), "", s.selector)
	if !s.offline && unreachable(err) {
		if _, never := o.keeper.Last(s.ref.registry.Tag); never == nil {
			err = fmt.Errorf("%w; --offline takes what it led to the last time", err)
		}
	}
	return err
}

func newKeeper(o *opened, ref registry.Reference, from string, log *slog.Logger) *keeper {
	return &keeper{
		cache: o.cache, tags: o.records, noTags: o.noRecords, from: from, log: log, held: make(map[digest.Digest]*blobcache.Blob),
		repository: registry.Reference{Host: ref.Host, Repository: ref.Repository},
	}
}

// openRecordedCache opens the cache for layers that come from a record. The documents of their image are not needed, but are
// to stay with them.
func (p *program) openRecordedCache(ctx context.Context, o *opened, ref registry.Reference, s *sourceOptions, log *slog.Logger) error {
	if err := p.openCache(o, s, log); err != nil {
		return err
	}
	from, err := o.client.Repository(ref).Origin()
	if err != nil {
		return fmt.Errorf("%s: %w", ref, err)
	}
	o.keeper = newKeeper(o, ref, from, log)
	o.keeper.hold(ctx, o.image.Digest)
	index := ref.Digest
	if index == "" {
		index, _ = o.keeper.Last(ref.Tag) // where nothing is known of it, there is nothing to hold
	}
	o.keeper.hold(ctx, index)
	return nil
}

// hold has a document stay that is kept.
func (k *keeper) hold(ctx context.Context, d digest.Digest) {
	if d == "" {
		return
	}
	if _, err := k.Get(ctx, d); err != nil && ctx.Err() == nil {
		k.log.Warn("a document of the image is not kept; --offline will not find it", "blob", d, "err", err)
	}
}

// unreachable says that nobody answered.
func unreachable(err error) bool {
	return errors.As(err, new(*registry.UnavailableError)) || errors.As(err, new(*net.OpError))
}

// origin tells the documents of a repository from others with the same digest: what is kept of one registry is not
// said to be in another.
func (k *keeper) origin() string { return origin("document", k.repository.String()) }

// Get is that of a registry.Documents.
func (k *keeper) Get(ctx context.Context, d digest.Digest) ([]byte, error) {
	sizes, err := k.cache.Sizes(d.String(), k.origin())
	errs := []error{err}
	for _, size := range sizes {
		if size <= 0 || size > maxDocument {
			continue
		}
		raw, err := k.read(ctx, d, size, nothing{})
		if err == nil {
			return raw, nil
		}
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return nil, fs.ErrNotExist
}

// Put is that of a registry.Documents.
func (k *keeper) Put(ctx context.Context, d digest.Digest, raw []byte) {
	if len(raw) == 0 || len(raw) > maxDocument {
		return
	}
	if _, err := k.read(ctx, d, int64(len(raw)), inMemory(raw)); err != nil && ctx.Err() == nil {
		k.log.Warn("a document of the image is not kept; --offline will not find it", "blob", d, "err", err)
	}
}

// read reads a document through the cache, which keeps it if it comes from f, and has it stay.
func (k *keeper) read(ctx context.Context, d digest.Digest, size int64, f blobcache.Fetcher) (raw []byte, err error) {
	b, err := k.cache.Open(d.String(), size, f, blobcache.OpenOptions{
		ChunkSize: oneUnit(size), Origin: k.origin(), Beneath: true, NoReadahead: true,
		Verify: func(_ context.Context, p []byte, _ int64) error {
			if got := d.Algorithm().FromBytes(p); got != d {
				return wrongDocument{got}
			}
			return nil
		},
	})
	if err != nil {
		return nil, err
	}
	raw = make([]byte, size)
	if err := b.ReadAt(ctx, raw, 0); err != nil {
		return nil, errors.Join(err, b.Close())
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.held[d] != nil {
		return raw, b.Close()
	}
	k.held[d] = b
	return raw, nil
}

// oneUnit is the unit of the cache in which something small is one chunk, so that it is fetched by one request and
// verified as one.
func oneUnit(size int64) int64 { return min((size+minUnit-1)/minUnit*minUnit, maxUnit) }

// A wrongDocument is what the cache had under a digest that is not its own.
type wrongDocument struct{ got digest.Digest }

func (e wrongDocument) Error() string { return fmt.Sprintf("what is kept has %s", e.got) }

// Temporary says that it makes sense to fetch it again.
func (e wrongDocument) Temporary() bool { return true }

// Last is that of a registry.Tags.
func (k *keeper) Last(tag string) (digest.Digest, error) {
	if k.tags == nil {
		return "", fmt.Errorf("--offline: what tags led to the last time cannot be looked up: %w", k.noTags)
	}
	e, err := k.tags.Get(k.reference(tag), k.from)
	switch {
	case errors.Is(err, lastknown.ErrDamaged):
		err = fmt.Errorf("what it led to the last time: %w: %w", lastknown.ErrDamaged, errOffline)
	case errors.Is(err, fs.ErrNotExist):
		err = errNeverMounted
	}
	return digest.Digest(e.Digest), err
}

// Led is that of a registry.Tags. It is remembered by remember only: what was known before may be here as a whole, and of
// what the tag leads to now nothing yet.
func (k *keeper) Led(tag string, d digest.Digest) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.led = &lastknown.Entry{Reference: k.reference(tag), Origin: k.from, Digest: d.String()}
}

// remember has --offline find the image that the tag led to: it was mounted, or is read.
func (o *opened) remember() {
	if o.keeper != nil {
		o.keeper.remember()
	}
}

// rememberRead is remember for who cannot tell whether anybody reads the image: if something of each layer is here.
func (o *opened) rememberRead() {
	for _, l := range o.layers {
		if here, _ := l.blob.here(); here == 0 {
			return
		}
	}
	o.remember()
}

func (k *keeper) remember() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.led == nil || k.tags == nil {
		return // that there are no records was said
	}
	if err := k.tags.Put(*k.led); err != nil {
		k.log.Warn("what the tag led to is not remembered; --offline will not find it", "err", err)
	} else if err := k.tags.Trim(); err != nil {
		k.log.Warn("old records of what tags led to cannot be removed", "err", err)
	}
	k.led = nil
}

func (k *keeper) reference(tag string) string {
	ref := k.repository
	ref.Tag = tag
	return ref.String()
}

// Close lets go of the documents: without them an image that is all here could not be mounted offline.
func (k *keeper) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	var errs []error
	for _, b := range k.held {
		errs = append(errs, b.Close())
	}
	clear(k.held)
	return errors.Join(errs...)
}

// nothing is a blobcache.Fetcher of what is not to be fetched.
type nothing struct{}

func (nothing) Fetch(context.Context, int64, int64) (io.ReadCloser, int64, int64, error) {
	return nil, 0, 0, fs.ErrNotExist
}

// An inMemory is a blobcache.Fetcher of what is in memory.
type inMemory []byte

func (d inMemory) Fetch(_ context.Context, off, n int64) (io.ReadCloser, int64, int64, error) {
	return io.NopCloser(bytes.NewReader(d[off : off+n])), off, int64(len(d)), nil
}

// forgetRecords removes the records of tags that led to what is not kept any more. A mount keeps a manifest before it
// writes the record: so what is kept is looked at after the record was read.
func forgetRecords(cache *blobcache.Cache) (err error) {
	usage, err := cache.Usage()
	if err != nil {
		return err
	}
	if _, err := os.Lstat(recordsDir(usage.Directory)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	records, err := openRecords(usage.Directory)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, records.Close()) }()
	_, err = records.Remove(func(e lastknown.Entry) (bool, error) {
		if digest.Digest(e.Digest).Validate() != nil {
			return true, nil
		}
		kept, err := cache.Has(e.Digest)
		return !kept, err
	})
	return err
}
