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

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

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
	tags       *lastknown.Store
	repository registry.Reference // without tag and digest
	from       string             // as registry.Repository.Origin says
	log        *slog.Logger

	mu   sync.Mutex               // guards what follows
	used map[digest.Digest][]byte // documents of the image
}

// recordsDir is where what tags led to is kept, below the cache's directory.
func recordsDir(cacheDir string) string { return filepath.Join(cacheDir, "references") }

// openRecords opens the records that are next to the cache in dir.
func openRecords(dir string) (*lastknown.Store, error) {
	if err := backend.PrivateDir(recordsDir(dir)); err != nil {
		return nil, fmt.Errorf("cache directory: %w", err)
	}
	return lastknown.Open(recordsDir(dir), lastknown.Options{})
}

// openCache opens the cache, and the records next to it.
func (p *program) openCache(o *opened, s *sourceOptions, log *slog.Logger) error {
	dir, err := p.cacheDir(s.cacheDir, os.Geteuid())
	if err != nil {
		return err
	}
	keep, err := s.keep.options(log)
	if err != nil {
		return err
	}
	keep.PrefetchRate, keep.MaxPrefetches = s.prefetch.bytesPerSecond, s.prefetch.atOnce()
	keep.OneAtATime = s.client.MaxConnsPerHost == 1
	s.meter.measureCache(&keep)
	if s.offline {
		keep.Readahead = -1
	}
	o.dir = dir
	if o.cache, err = blobcache.New(dir, keep); err != nil {
		return err
	}
	o.records, err = openRecords(dir)
	return err
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
	o.keeper = &keeper{cache: o.cache, tags: o.records, from: from, log: log, used: make(map[digest.Digest][]byte)}
	o.keeper.repository = registry.Reference{Host: s.ref.registry.Host, Repository: s.ref.registry.Repository}
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

// read reads a document through the cache, which keeps it if it comes from f.
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
	defer func() { err = errors.Join(err, b.Close()) }()
	raw = make([]byte, size)
	if err := b.ReadAt(ctx, raw, 0); err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.used[d] = raw
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
	e, err := k.tags.Get(k.reference(tag), k.from)
	if errors.Is(err, fs.ErrNotExist) {
		err = errNeverMounted
	}
	return digest.Digest(e.Digest), err
}

// Led is that of a registry.Tags.
func (k *keeper) Led(tag string, desc ocispec.Descriptor) {
	err := k.tags.Put(lastknown.Entry{
		Reference: k.reference(tag), Origin: k.from, Digest: desc.Digest.String(), Size: desc.Size, MediaType: desc.MediaType,
	})
	if err != nil {
		k.log.Warn("what the tag led to is not remembered; --offline will not find it", "err", err)
	}
}

func (k *keeper) reference(tag string) string {
	ref := k.repository
	ref.Tag = tag
	return ref.String()
}

// Close notes that the documents were of use until now: without them an image that is all here cannot be mounted
// offline. Those that went meanwhile are kept once more.
func (k *keeper) Close() {
	k.mu.Lock()
	used := k.used
	k.used = make(map[digest.Digest][]byte)
	k.mu.Unlock()
	for d, raw := range used {
		k.Put(context.Background(), d, raw)
	}
}

// nothing is a blobcache.Fetcher of what is not to be fetched.
type nothing struct{}

func (nothing) Fetch(context.Context, int64, int64) (io.ReadCloser, int64, int64, error) {
	return nil, 0, 0, errors.New("it is not kept any more")
}

// An inMemory is a blobcache.Fetcher of what is in memory.
type inMemory []byte

func (d inMemory) Fetch(_ context.Context, off, n int64) (io.ReadCloser, int64, int64, error) {
	return io.NopCloser(bytes.NewReader(d[off : off+n])), off, int64(len(d)), nil
}

// forgetRecords removes the records of tags that led to what is not kept any more.
func forgetRecords(cache *blobcache.Cache) (err error) {
	list, err := cache.List()
	if err != nil {
		return err
	}
	usage, err := cache.Usage()
	if err != nil {
		return err
	}
	kept := make(map[string]bool)
	for _, k := range list {
		kept[k.Digest] = k.Present > 0 || kept[k.Digest]
	}
	records, err := openRecords(usage.Directory)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, records.Close()) }()
	_, err = records.Remove(func(e lastknown.Entry) bool { return !kept[e.Digest] })
	return err
}
