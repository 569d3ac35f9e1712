package main

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
	"github.com/erofs-oci/erofs-oci/registry/profile"
)

const (
	// prefetchPiece is what is asked for at a time: what the cache gets with one request for this.
	prefetchPiece = 4 << 20
	// prefetchAtOnce is how many pieces are asked for at a time. It is as many as the cache fetches: with more, those that
	// come later might be first.
	prefetchAtOnce = 2
	// replayAtOnce is the same for a profile, whose pieces are small, and wanted in their order: a reader that follows it
	// is not to come to a piece that was not asked for.
	replayAtOnce = 6
	// connsForReaders are those of --max-conns-per-host that are left to readers.
	connsForReaders = 2
	// metadataAtOnce is of how many layers the metadata is looked for side by side: it is round trips that cost time there.
	metadataAtOnce = 4
)

// A piece is bytes of a layer's image.
type piece struct {
	layer  *layerSource
	off, n int64
}

// takes says that the next piece can be fetched with one.
func (p piece) takes(next piece) bool {
	return p.layer == next.layer && p.off+p.n == next.off && p.n+next.n <= prefetchPiece
}

// cutPieces cuts a range of a layer that the cache fetches by units: between two of them, so that no unit is in two
// pieces of which each would pay for it.
func cutPieces(pieces []piece, l *layerSource, unit, off, n int64) []piece {
	whole := max(prefetchPiece-prefetchPiece%unit, unit)
	for n > 0 {
		step := min(n, whole-off%unit)
		pieces = append(pieces, piece{l, off, step})
		off, n = off+step, n-step
	}
	return pieces
}

// everything is the plan for all: metadata, which makes names known, then each layer from the front.
func (p *prefetcher) everything(ctx context.Context) error {
	var total int64
	for _, l := range p.layers {
		total += l.size
	}
	if limit := p.cache.Stats().Limit; limit > 0 && total > limit && (p.how.bytes == 0 || p.how.bytes > limit) {
		return stopf("the layers have %d bytes, and the cache may have %d (--cache-size): all of them would not stay", total, limit)
	}
	var pieces []piece
	for _, l := range p.layers {
		pieces = cutPieces(pieces, l, l.cached.Unit(), 0, l.size)
	}
	p.want(pieces)
	if err := p.metadata(ctx); err != nil {
		return err
	}
	if err := p.bring(ctx, pieces); err != nil {
		return err
	}
	return p.checkKept(total)
}

// checkKept finds out whether what came first is still here: a cache that is too small lets it go for what came last, and
// to begin anew would never end.
func (p *prefetcher) checkKept(total int64) error {
	p.mu.Lock()
	aside := p.aside
	p.mu.Unlock()
	var here int64
	for _, l := range p.layers {
		here += l.size - l.absent(0, l.size)
	}
	if aside != nil || here == total {
		return nil
	}
	return stopf("%d of %d bytes are here, and the cache did not keep the others (--cache-size, --cache-min-free)", here, total)
}

// compare says once of which blobs the profile and the image do not both know.
func (p *prefetcher) compare(layers []openedLayer) {
	if p.how.profile == nil {
		return
	}
	known := map[string]bool{}
	for _, l := range layers {
		known[l.blob.digest] = true
		if _, ok := p.how.profile.Blob(l.blob.digest); !ok {
			p.log.Debug("the profile does not know a layer", "file", p.how.mode, "blob", l.blob.digest)
		}
	}
	var others []string
	for _, b := range p.how.profile.Blobs {
		if !known[b.Digest] {
			others = append(others, b.Digest)
		}
	}
	p.foreign = len(others) > 0 && len(others) == len(p.how.profile.Blobs)
	if len(others) > 0 {
		p.log.Warn("the profile has blobs that are not of this image; they are left out", "file", p.how.mode, "blob", strings.Join(others, " "))
	}
}

// replay is the plan for a profile: its reads, in order.
func (p *prefetcher) replay(ctx context.Context) error {
	if p.foreign {
		return stopf("the profile %s is of another image: it has none of the layers", p.how.mode)
	}
	layers := map[string]*layerSource{}
	for _, l := range p.layers {
		layers[l.digest] = l
		if recorded, ok := p.how.profile.Blob(l.digest); ok && recorded.Size != p.sizes[l] {
			return stopf("the profile %s says that %s has %d bytes, and it has %d", p.how.mode, l.digest, recorded.Size, p.sizes[l])
		}
	}
	unit := func(digest string) int64 {
		if l := layers[digest]; l != nil {
			return l.cached.Unit()
		}
		return 0
	}
	reads := p.how.profile.Reads(p.how.bytes, unit)
	var pieces []piece
	for _, r := range reads {
		l := layers[r.Digest]
		next := piece{l, r.Off, min(r.Len, l.size-r.Off)} // the blob may have something behind that
		if last := len(pieces) - 1; last >= 0 && pieces[last].takes(next) {
			pieces[last].n += next.n
		} else {
			pieces = cutPieces(pieces, l, l.cached.Unit(), next.off, next.n)
		}
	}
	p.want(pieces)
	if p.how.bytesPerSecond == 0 { // else it may take long, and readers want other things meanwhile
		for _, l := range p.layers {
			defer l.cached.HoldReadahead(rangesOf(pieces, l))()
		}
	}
	if err := p.bring(ctx, pieces); err != nil {
		return err
	}
	if all := p.how.profile.Reads(0, unit); bytesOf(all) > bytesOf(reads) {
		return p.overBudget()
	}
	return nil
}

// rangesOf are what pieces have of a layer.
func rangesOf(pieces []piece, l *layerSource) iter.Seq2[int64, int64] {
	return func(yield func(off, n int64) bool) {
		for _, p := range pieces {
			if p.layer == l && !yield(p.off, p.n) {
				return
			}
		}
	}
}

// bytesOf are those of reads.
func bytesOf(reads []profile.Range) (n int64) {
	for _, r := range reads {
		n += r.Len
	}
	return n
}

// metadata is the plan for the metadata of each layer.
func (p *prefetcher) metadata(ctx context.Context) error {
	var all errgroup.Group
	all.SetLimit(metadataAtOnce)
	for _, l := range p.layers {
		all.Go(func() error { return p.metadataOf(ctx, l) })
	}
	return all.Wait()
}

// metadataOf fetches the metadata of a layer. What cannot be made sense of as an image is left to the mount.
func (p *prefetcher) metadataOf(ctx context.Context, l *layerSource) (err error) {
	// What the walk reads is no hint of what will be read next.
	quiet, err := l.again()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, quiet.Close()) }()
	src := &walkedLayer{layer: l, blob: quiet}
	stats, err := erofsfmt.LoadMetadata(ctx, src, erofsfmt.MetadataOptions{Unit: l.cached.Unit()},
		func(ctx context.Context, ranges []erofsfmt.Range) error {
			var pieces []piece
			for _, r := range ranges {
				pieces = cutPieces(pieces, l, l.cached.Unit(), r.Off, r.Len)
			}
			if p.how.mode != prefetchAll { // which wants more than that already
				p.want(pieces)
			}
			return p.bringAll(ctx, pieces, func(bad piece) { src.bad = append(src.bad, bad) })
		})
	if why := errors.Join(err, stats.Err); why != nil {
		p.log.Debug("not all metadata of a layer was fetched", "blob", l.digest, "bytes", stats.Bytes, "err", why)
	} else {
		p.log.Debug("the metadata of a layer was fetched", "blob", l.digest, "bytes", stats.Bytes)
	}
	var format *erofsfmt.FormatError
	switch {
	case errors.As(err, &format):
		return nil
	case err != nil:
		return err
	case stats.Err != nil:
		p.setAside(stats.Err)
	}
	return nil
}

// A walkedLayer is a layer for who looks for its metadata: reads of it are not a user's.
type walkedLayer struct {
	layer *layerSource
	blob  *blobcache.Blob
	bad   []piece // what could not be had
}

var errSetAside = errors.New("what was fetched of it is wrong")

// Size is an erofsfmt.ReaderAt's.
func (w *walkedLayer) Size() int64 { return w.layer.size }

// ReadAt is an erofsfmt.ReaderAt's. What is read was fetched.
func (w *walkedLayer) ReadAt(ctx context.Context, p []byte, off int64) error {
	if slices.ContainsFunc(w.bad, func(b piece) bool { return off < b.off+b.n && b.off < off+int64(len(p)) }) {
		return fmt.Errorf("%d bytes at %d: %w", len(p), off, errSetAside)
	}
	if wrong := w.layer.wrong.Load(); wrong != nil {
		return wrong
	}
	if w.blob.ReadResident(p, off) {
		return nil
	}
	// It is on disk, and was not looked at yet; or it has gone since.
	if err := w.blob.Prefetch(ctx, off, int64(len(p))); err != nil {
		return err
	}
	return w.blob.ReadAt(ctx, p, off)
}

// absent is how much of a range is not on disk.
func (s *layerSource) absent(off, n int64) (absent int64) {
	for end := off + n; off < end; {
		present, next := s.Present(off)
		next = min(next, end)
		if !present {
			absent += next - off
		}
		off = next
	}
	return absent
}

// cost is how much has to be fetched for a range: whole units, as far as the image goes.
func (s *layerSource) cost(off, n int64) (cost int64) {
	unit := s.cached.Unit()
	for end := off + n; off < end; {
		present, next := s.Present(off)
		if !present {
			cost += min(next, roundUp(end, unit, s.size)) - (off - off%unit)
		}
		off = next
	}
	return cost
}

// roundUp gives the end of the unit that ends at n or behind it, in what has so many bytes.
func roundUp(n, unit, size int64) int64 { return n + min((unit-n%unit)%unit, size-n) }

// bring has pieces fetched, in order, several at a time.
func (p *prefetcher) bring(ctx context.Context, pieces []piece) error {
	return p.bringAll(ctx, pieces, func(piece) {})
}

// bringAll is bring for who wants to know what turned out to be wrong, or is another process's just now. That is left
// out, for the next time; any other error ends it, when what has begun has ended.
func (p *prefetcher) bringAll(ctx context.Context, pieces []piece, bad func(piece)) error {
	var group errgroup.Group
	slots := make(chan struct{}, p.how.atOnce())
	var failed atomic.Bool
	for _, next := range pieces {
		slots <- struct{}{}
		if failed.Load() {
			break
		}
		// One after the other: what is over the budget is what comes last.
		fits, cost := p.spend(next)
		group.Go(func() error {
			defer func() { <-slots }()
			err := p.bringFitting(ctx, next, fits, cost)
			if blobcache.OfOneChunk(err) {
				err = p.bringSingly(ctx, next, bad)
			}
			if err != nil {
				failed.Store(true)
			}
			return err
		})
		if fits.n < next.n {
			break
		}
	}
	return group.Wait()
}

// bringSingly has the chunks of a piece fetched one by one: some cannot be had, and the others are not to go without.
func (p *prefetcher) bringSingly(ctx context.Context, all piece, bad func(piece)) error {
	unit, end := all.layer.cached.Unit(), all.off+all.n
	for off := all.off; off < end; {
		next := min(off-off%unit+unit, end)
		one := piece{all.layer, off, next - off}
		off = next
		err := p.bringPiece(ctx, one)
		if err != nil && !blobcache.OfOneChunk(err) {
			return err
		}
		if err != nil {
			p.setAside(err)
			p.mu.Lock()
			bad(one)
			p.mu.Unlock()
		}
	}
	return nil
}

// bringPiece has a piece fetched, as far as the budget goes.
func (p *prefetcher) bringPiece(ctx context.Context, next piece) error {
	fits, cost := p.spend(next)
	return p.bringFitting(ctx, next, fits, cost)
}

// bringFitting is bringPiece where the budget was asked, as spend is.
func (p *prefetcher) bringFitting(ctx context.Context, next, fits piece, cost int64) error {
	if wrong := next.layer.wrong.Load(); wrong != nil {
		return &stopError{wrong}
	}
	if fits.n > 0 {
		if err := next.layer.cached.Prefetch(ctx, fits.off, fits.n); err != nil {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.spent -= min(cost, next.layer.cost(fits.off, fits.n)) // what came is paid for
			return err
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if cost > 0 {
		p.unlucky = false
	}
	if fits.n < next.n {
		return p.overBudget()
	}
	return nil
}

// errBudget is what was wanted so.
var errBudget = errors.New("the budget is used up (--prefetch-budget)")

// overBudget is why no more is fetched.
func (p *prefetcher) overBudget() error { return stopf("%d bytes: %w", p.how.bytes, errBudget) }

// spend takes from the budget what is to be fetched of a piece, and says how much of the piece that is for. The budget of
// a profile is for its reads, whether they are here or not.
func (p *prefetcher) spend(next piece) (fits piece, cost int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	left := p.how.bytes - p.spent
	if p.how.bytes == 0 || p.how.profile != nil {
		left = next.n
	}
	fits = next
	unit := next.layer.cached.Unit()
	for end := roundUp(next.off+next.n, unit, next.layer.size); ; {
		cost = next.layer.cost(next.off, fits.n)
		if cost <= left {
			break
		}
		// What it is over was at the end, or more than that was.
		end -= cost - left
		end -= end % unit
		fits.n = max(end-next.off, 0)
	}
	p.spent += cost
	return fits, cost
}

// setAside notes that something was left out, and why.
func (p *prefetcher) setAside(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.aside == nil {
		p.aside = err
	}
}
