package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"sync"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
	"github.com/erofs-oci/erofs-oci/registry/verified"
)

// A remoteBlob is a blob of a registry, which is asked for nothing if that is what the user wants.
type remoteBlob struct {
	*registry.Blob
	offline bool
}

// Fetch is that of registry.Blob.
func (b *remoteBlob) Fetch(ctx context.Context, off, n int64) (body io.ReadCloser, start, total int64, err error) {
	if b.offline {
		return nil, 0, 0, fmt.Errorf("bytes %d+%d of blob %s: %w", off, n, b.Digest(), errOffline)
	}
	return b.Blob.Fetch(ctx, off, n)
}

// FetchElsewhere is that of registry.Blob.
func (b *remoteBlob) FetchElsewhere(ctx context.Context, off, n int64, why error) (body io.ReadCloser, start, total int64, err error) {
	if b.offline {
		return b.Fetch(ctx, off, n)
	}
	return b.Blob.FetchElsewhere(ctx, off, n, why)
}

// A keptPart says what of a blob is to be kept beside the image in it: a chunk index, a dm-verity tree, or all of a blob
// that has to be decompressed as a whole.
type keptPart struct {
	digest    string // under which it is kept
	off, size int64  // where in the blob it is
	unit      int64  // as in blobcache.OpenOptions
	piece     int64  // bytes that are read at once: whole units, and one if zero
	origin    string
	layer     bool // it is a layer, and nothing that a layer is verified by
}

// A throughCache is a blob of which one part is kept in the cache. What is read of that part comes from there; what is
// read of the rest comes from the registry as if there were no throughCache.
//
// Nothing here verifies: who reads the part does that, each time that he reads it. If it is wrong he asks for it
// elsewhere, and then the units that he means, and no others, go from the cache and come anew: from where they came, if
// that is the cache of an earlier mount, and else from elsewhere indeed.
type throughCache struct {
	*remoteBlob
	part  keptPart
	kept  *blobcache.Blob // nil: nothing is to be kept
	found bool            // some of it was kept before: that may be wrong without the registry's fault
	log   *slog.Logger

	mu    sync.Mutex      // guards what follows
	came  map[int64]bool  // units that this process asked the registry for
	wrong map[int64]error // what was wrong with such units, until they are asked for again
}

// throughCache opens what is kept of a part. It is closed with s.
func (o *layerOpener) throughCache(s *layerSource, blob *remoteBlob, part keptPart) (*throughCache, error) {
	part.piece = cmp.Or(part.piece, part.unit)
	t := &throughCache{remoteBlob: blob, part: part, log: o.log, came: make(map[int64]bool), wrong: make(map[int64]error)}
	if part.size <= 0 {
		return t, nil // who reads it says what is wrong with that
	}
	var err error
	// What a layer is verified by is waited for with a slot in hand, and is read where it is needed, not in order.
	t.kept, err = o.cache.Open(part.digest, part.size, partFetcher{t}, blobcache.OpenOptions{
		ChunkSize: part.unit, Origin: part.origin, Beneath: !part.layer, NoReadahead: !part.layer, Keep: o.offline,
	})
	if err != nil {
		return nil, err
	}
	t.found = t.missing() < part.size
	s.beside = append(s.beside, t)
	return t, nil
}

// missing is how many bytes of the part are not kept.
func (t *throughCache) missing() (n int64) {
	for off := int64(0); off < t.part.size; {
		present, end := t.kept.Present(off)
		if !present {
			n += end - off
		}
		off = end
	}
	return n
}

// Places is how often it makes sense to fetch something again that was wrong.
func (t *throughCache) Places() int {
	if t.found {
		return 1 + t.remoteBlob.Places()
	}
	return t.remoteBlob.Places()
}

// holds says whether a range is in the part, and is read from what is kept.
func (t *throughCache) holds(off, n int64) bool {
	return t.kept != nil && off >= t.part.off && n <= t.part.size && off-t.part.off <= t.part.size-n
}

// Fetch is a Fetcher's.
func (t *throughCache) Fetch(ctx context.Context, off, n int64) (body io.ReadCloser, start, total int64, err error) {
	if !t.holds(off, n) {
		return t.remoteBlob.Fetch(ctx, off, n)
	}
	return &keptBody{ctx: ctx, from: t, at: off, end: off + n}, off, t.Size(), nil
}

// FetchElsewhere is that of registry.Blob. What is kept of the range goes.
func (t *throughCache) FetchElsewhere(ctx context.Context, off, n int64, why error) (body io.ReadCloser, start, total int64, err error) {
	if !t.holds(off, n) {
		return t.remoteBlob.FetchElsewhere(ctx, off, n, why)
	}
	if err := t.forget(off-t.part.off, n, why); err != nil {
		return nil, 0, 0, err
	}
	return t.Fetch(ctx, off, n)
}

// forget has a range of the part fetched again, of which why says what is wrong.
func (t *throughCache) forget(off, n int64, why error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	kept := false // by an earlier mount, or another process
	for unit := off / t.part.unit; unit*t.part.unit < off+n; unit++ {
		if t.came[unit] {
			t.wrong[unit] = why
		} else {
			kept = true
		}
	}
	if kept {
		t.log.Warn("what is kept beside a layer is wrong, and is removed", "blob", t.Digest(), "offset", t.part.off+off, "bytes", n, "err", why)
	}
	return t.kept.Forget(off, n)
}

// asked notes that a range of the part is asked for, and says what was wrong with it if it was before.
func (t *throughCache) asked(off, n int64) (why error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for unit := off / t.part.unit; unit*t.part.unit < off+n; unit++ {
		if t.wrong[unit] != nil {
			why = t.wrong[unit]
		}
		delete(t.wrong, unit)
		t.came[unit] = true
	}
	return why
}

// Close ends it. What is a layer by itself was of use until now: it was decompressed when it was opened.
func (t *throughCache) Close() error {
	if t.part.layer {
		t.kept.Touch()
	}
	return t.kept.Close()
}

// A keptBody reads a range of what is kept. It belongs to one goroutine.
type keptBody struct {
	ctx     context.Context
	from    *throughCache
	at, end int64 // in the blob: what was not read from the cache yet
	buf     []byte
	ready   []byte // of buf
}

func (b *keptBody) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if len(b.ready) == 0 {
		if b.at == b.end {
			return 0, io.EOF
		}
		if err := b.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p, b.ready)
	b.ready = b.ready[n:]
	return n, nil
}

// fill reads a piece. What the cache could not keep would be fetched anew for each read of it, so a piece has whole
// units, as far as they are wanted.
func (b *keptBody) fill() error {
	t := b.from
	n := min(b.end-b.at, t.part.piece-(b.at-t.part.off)%t.part.piece)
	if int64(cap(b.buf)) < n {
		b.buf = make([]byte, n)
	}
	if err := t.kept.ReadAt(b.ctx, b.buf[:n], b.at-t.part.off); err != nil {
		return err
	}
	b.at, b.ready = b.at+n, b.buf[:n]
	return nil
}

func (b *keptBody) Close() error { return nil }

// A partFetcher brings what is to be kept.
type partFetcher struct{ of *throughCache }

// Fetch is a blobcache.Fetcher's. A blob that is kept as a whole comes by one request, if nothing of it is here: the
// cache takes the rest as it passes.
func (f partFetcher) Fetch(ctx context.Context, off, n int64) (io.ReadCloser, int64, int64, error) {
	t := f.of
	whole := off == 0 && t.part.size == t.Size() && t.missing() == t.part.size
	if whole {
		n = t.Size()
	}
	body, err := verified.FetchFrom(ctx, t.remoteBlob, t.part.off+off, n, t.asked(off, n))
	if err != nil || whole {
		return body, off, t.part.size, err
	}
	return struct {
		io.Reader
		io.Closer
	}{io.LimitReader(body, n), body}, off, t.part.size, nil
}
