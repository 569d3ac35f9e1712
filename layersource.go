package main

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

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
	"github.com/erofs-oci/erofs-oci/registry/chunked"
	"github.com/erofs-oci/erofs-oci/registry/integrity"
	"github.com/erofs-oci/erofs-oci/registry/profile"
	"github.com/erofs-oci/erofs-oci/registry/verified"
)

// What --verify says.
const (
	verifyAuto    = "auto"    // verify what there is something to verify by
	verifyRequire = "require" // and refuse all else
	verifyOff     = "off"
)

// What the bytes of a layer are verified by, as list shows it.
const (
	byIndex   = "chunk-index"
	byTree    = "dm-verity"
	byBlob    = "whole-blob" // its digest, once every byte was here
	byNothing = "none"
)

// A wrongError is found when it is too late: bytes were read that are not the blob's.
type wrongError struct{ err error }

const wrongPrefix = "what was read is not what the manifest says: "

func (e *wrongError) Error() string { return wrongPrefix + e.err.Error() }

func (e *wrongError) Unwrap() error { return e.err }

// errUnverifiable: there is nothing to verify a layer by, and --verify=require.
var errUnverifiable = errors.New("it has no chunk index and no dm-verity tree that could be used, so parts of it cannot be verified; --verify=auto would mount it unverified")

// errChanged: the whole is right, but was not when parts of it were read.
var errChanged = errors.New("parts of it were other bytes when they were fetched first")

// layerBytes are those of a layer's image: in the cache, or in a file.
type layerBytes interface {
	backend.Source
	ReadResident(p []byte, off int64) bool
	Present(off int64) (present bool, end int64)
	// Passed says of which bytes that are present it was looked, in this process, whether they are right.
	Passed(off int64) (passed bool, end int64)
	Close() error
}

// A layerSource is the image that is in a layer: read through the cache, decompressed if
// need be, and verified as far as the manifest has something to verify it by.
type layerSource struct {
	digest string // of the layer's blob
	bytes  layerBytes
	cached *blobcache.Blob                 // the same, where it is in the cache
	again  func() (*blobcache.Blob, error) // opens it once more, for who guesses nothing and is told nothing
	size   int64                           // of what may be read: nothing vouches for what is behind it
	treeAt int64                           // where in the image a dm-verity tree begins; 0 without one
	by     string
	log    *slog.Logger
	image  *chunked.Image  // nil: as it is in the blob
	beside []*throughCache // what else of the blob is kept

	touches *profile.Touches // nil: what is read is not recorded

	// Where nothing verifies parts, the whole is verified when it is here.
	open    chan struct{} // closed when bytes is set
	check   string        // the digest; "" if it is not to be checked
	life    context.Context
	end     context.CancelFunc
	checked chan struct{} // closed when that has ended, the first time where it had to be begun anew
	ended   sync.Once     // closes checked
	right   atomic.Bool   // it has the digest
	wrong   atomic.Pointer[wrongError]
	onWrong func(error) // called once

	changed chan struct{} // closed when the blob was found to have changed
}

// A layerOpener opens the layers of one image.
type layerOpener struct {
	client *registry.Client
	ref    registry.Reference
	image  *registry.Image
	cache  *blobcache.Cache
	dir    string // the cache's
	verify string
	// offline: nothing is fetched.
	offline bool
	log     *slog.Logger
	say     func(format string, args ...any) // to the user
	// onWrong is told when the bytes of a layer turn out to be wrong.
	onWrong func(error)
	room    func(*os.File) (int64, error) // roomOf, if nil
}

// blob is a blob of the image's repository.
func (o *layerOpener) blob(desc ocispec.Descriptor) (*remoteBlob, error) {
	b, err := o.client.Blob(o.ref, desc)
	return &remoteBlob{b, o.offline}, err
}

// open opens a layer of the image. It costs no request where parts cannot be verified, and
// one where they can, unless what they are verified by is kept.
func (o *layerOpener) open(ctx context.Context, l registry.Layer) (_ *layerSource, err error) {
	blob, err := o.blob(l.Descriptor)
	if err != nil {
		return nil, err
	}
	v, err := o.image.Vouched(l)
	if err != nil && o.verify != verifyOff {
		return nil, fmt.Errorf("%w; --verify=off would not look at it", err)
	}
	s := &layerSource{digest: l.Digest.String(), by: byNothing, log: o.log, open: make(chan struct{}), checked: make(chan struct{}), changed: make(chan struct{}), onWrong: o.onWrong}
	if v.Verity != nil {
		s.treeAt = v.Verity.Off
	}
	// The check of the whole ends with the source.
	s.life, s.end = context.WithCancel(context.Background())
	if v.Compressed {
		err = o.openCompressed(ctx, s, blob, v)
	} else {
		err = o.openRaw(ctx, s, blob, v)
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	close(s.open)
	return s, nil
}

// index reads the layer's chunk index. It is nil where there is none, or none of a kind
// that is known here.
func (o *layerOpener) index(ctx context.Context, s *layerSource, blob *remoteBlob, v registry.Vouched) (*verified.Index, error) {
	if v.Unknown != "" {
		o.log.Warn("the chunk index is of no use", "blob", blob.Digest(), "err", v.Unknown)
	}
	if v.Index == nil {
		return nil, nil
	}
	holder, err := o.indexHolder(s, blob, *v.Index)
	if err != nil {
		return nil, err
	}
	if holder.lacks(0, v.Index.Len) {
		return nil, fmt.Errorf("blob %s: its chunk index: %w", blob.Digest(), errOffline)
	}
	var chunks verified.Fetcher = blob
	if v.Index.Holder.Digest == blob.Digest() {
		chunks = holder
	}
	place := verified.IndexPlace{
		Off: v.Index.Off, Len: v.Index.Len, Framed: v.Index.Framed, Digest: v.Index.Digest.String(), DataEnd: v.Index.DataEnd,
		Unchecked: o.verify == verifyOff,
	}
	x, err := verified.ReadIndex(ctx, holder, chunks, place)
	if why := doubtful(x, err); why != nil && o.verify == verifyOff && holder.found && !o.offline {
		// Nobody verified it when it came, or since: a wrong one would be believed for ever.
		if err = holder.forget(0, v.Index.Len, why); err == nil {
			x, err = verified.ReadIndex(ctx, holder, chunks, place)
		}
	}
	holder.found = false // the index is here: what else is fetched again is not what was kept of it
	if errors.Is(err, integrity.ErrUnsupported) {
		o.log.Warn("the chunk index is of no use", "blob", blob.Digest(), "err", err)
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", blob.Digest(), err)
	}
	want := integrity.None
	if v.Compressed {
		want = integrity.Zstd
	}
	if x.Compression() != want {
		return nil, fmt.Errorf("blob %s: its chunk index has compression %d, and its media type %d: %w", blob.Digest(), x.Compression(), want, integrity.ErrCorrupt)
	}
	return x, nil
}

// doubtful says what is wrong with an index that was not verified.
func doubtful(x *verified.Index, err error) error {
	if err != nil {
		return err
	}
	return x.Doubt()
}

// indexHolder is the blob that has the index, which is kept: by its own digest, whichever blob it is in.
func (o *layerOpener) indexHolder(s *layerSource, blob *remoteBlob, v registry.VouchedIndex) (*throughCache, error) {
	if v.Holder.Digest != blob.Digest() {
		var err error
		if blob, err = o.blob(v.Holder); err != nil {
			return nil, err
		}
	}
	part := keptPart{digest: v.Digest.String(), off: v.Off, size: v.Len, unit: oneUnit(v.Len), origin: origin("chunk index", v.Framed)}
	if o.verify == verifyOff {
		part.origin = origin("chunk index", v.Framed, plain(blob)) // nobody verifies it when it comes
	}
	return o.throughCache(s, blob, part)
}

// verityRoot is what the manifest says of the tree in a blob.
func verityRoot(blob *remoteBlob, v registry.VouchedVerity) integrity.VerityRoot {
	return integrity.VerityRoot{HashOffset: v.Off, BlockSize: v.BlockSize, Size: blob.Size(), Digest: v.Root}
}

// treeHolder is the blob, of which the tree is kept, in the parts in which it is fetched.
func (o *layerOpener) treeHolder(s *layerSource, blob *remoteBlob, root integrity.VerityRoot) (*throughCache, error) {
	n, err := verified.TreeSize(root)
	if err != nil {
		n = 0 // who reads it says so
	}
	return o.throughCache(s, blob, keptPart{
		digest: blob.Digest().String(), off: root.HashOffset, size: n, unit: verified.TreePart,
		origin: origin("parts of a tree", fmt.Sprintf("%x", root.Digest), root.HashOffset, root.BlockSize),
	})
}

// openRaw opens an image that is not compressed: by its index, else by its tree, else as
// it comes.
func (o *layerOpener) openRaw(ctx context.Context, s *layerSource, blob *remoteBlob, v registry.Vouched) error {
	if o.verify == verifyOff {
		return o.keep(s, blob, blob.Size(), blobcache.OpenOptions{Origin: plain(blob)})
	}
	x, err := o.index(ctx, s, blob, v)
	if err != nil {
		return err
	}
	if x != nil && x.Verifies() {
		s.by = byIndex
		if unit := x.Unit(blobcache.MinChunkSize, blobcache.MaxChunkSize); unit > 0 {
			return o.keepPart(s, x.Size(), x, blob.Size(), blobcache.OpenOptions{Verify: x.Verify, ChunkSize: unit, Origin: origin("index", v.Index.Digest)})
		}
		return o.keep(s, x.Stream(), x.Size(), blobcache.OpenOptions{Vouched: true, Origin: origin("chunks of the index", v.Index.Digest)})
	}
	if v.Verity != nil {
		root := verityRoot(blob, *v.Verity)
		holder, err := o.treeHolder(s, blob, root)
		if err != nil {
			return err
		}
		if holder.lacks(0, 1) {
			return fmt.Errorf("blob %s: the beginning of its dm-verity tree: %w", blob.Digest(), errOffline)
		}
		t, err := verified.OpenTree(ctx, holder, root)
		if err != nil {
			return fmt.Errorf("blob %s: %w", blob.Digest(), err)
		}
		s.by = byTree
		return o.keepPart(s, t.Size(), t, blob.Size(), blobcache.OpenOptions{
			Verify: t.Verify, Origin: origin("tree", fmt.Sprintf("%x", root.Digest), root.HashOffset, root.BlockSize),
		})
	}
	if o.verify == verifyRequire {
		return fmt.Errorf("blob %s: %w", blob.Digest(), errUnverifiable)
	}
	s.check = s.digest
	return o.keep(s, blob, blob.Size(), blobcache.OpenOptions{OnComplete: s.checkWhole, Origin: plain(blob)})
}

// openCompressed opens an image in zstd frames: chunk by chunk where there is an index.
func (o *layerOpener) openCompressed(ctx context.Context, s *layerSource, blob *remoteBlob, v registry.Vouched) error {
	x, err := o.index(ctx, s, blob, v)
	if err != nil {
		return err
	}
	if x == nil || !x.Verifies() && o.verify != verifyOff {
		return o.openWhole(ctx, s, blob, v)
	}
	if s.image, err = chunked.New(x.ChunkIndex, x.Stream()); err != nil {
		return fmt.Errorf("blob %s: %w", blob.Digest(), err)
	}
	options := blobcache.OpenOptions{ChunkSize: x.Unit(blobcache.MinChunkSize, blobcache.MaxChunkSize), Origin: origin("zstd", v.Index.Digest)}
	if o.verify == verifyOff {
		options.Origin = origin("zstd", v.Index.Digest, plain(blob))
	} else {
		s.by, options.Vouched = byIndex, true
	}
	return o.keep(s, s.image, x.Size(), options)
}

// origin is the cache's word for what lets the bytes of a blob in. What another manifest vouches for under the same
// digest, or another registry sends, may be other bytes.
func origin(parts ...any) string {
	var b strings.Builder
	for _, p := range parts {
		fmt.Fprintf(&b, "%q\n", fmt.Sprint(p)) // quoted, so that no part looks like two; a Builder never fails
	}
	return b.String()
}

// plain is the origin of bytes that nothing vouches for when they come: where they come from, and how sure that is.
func plain(blob interface{ Origin() string }) string { return origin("plain", blob.Origin()) }

// keep opens bytes in the cache, all of which may be read.
func (o *layerOpener) keep(s *layerSource, f blobcache.Fetcher, size int64, options blobcache.OpenOptions) error {
	options.Keep = o.offline // what goes could not be had again
	b, err := o.cache.Open(s.digest, size, f, options)
	if err != nil {
		return err
	}
	s.bytes, s.cached, s.size = b, b, size
	s.again = func() (*blobcache.Blob, error) {
		options.NoReadahead, options.OnComplete = true, nil
		return o.cache.Open(s.digest, size, f, options)
	}
	return nil
}

// keepPart is keep for a blob of which the first size bytes may be read.
func (o *layerOpener) keepPart(s *layerSource, size int64, f blobcache.Fetcher, total int64, options blobcache.OpenOptions) error {
	err := o.keep(s, f, total, options)
	s.size = size
	return err
}

// A readFunc is what the cache has the whole examined by.
type readFunc func(ctx context.Context, p []byte, off int64) error

func (f readFunc) ReadAt(ctx context.Context, p []byte, off int64) error { return f(ctx, p, off) }

// checkWhole is called when every byte is here. It says whether that needs no repetition: where bytes went meanwhile,
// and could not be had again, the next time may be better; and where they went after it, they may come back as others.
func (s *layerSource) checkWhole() (done bool) {
	defer s.ended.Do(func() { close(s.checked) })
	select {
	case <-s.open:
	case <-s.life.Done():
		return true
	}
	err := s.cached.Examine(func(readAt func(context.Context, []byte, int64) error) error {
		return verified.CheckWhole(s.life, readFunc(readAt), s.size, s.check)
	})
	var changed *verified.DigestError
	switch {
	case err == nil && s.cached.Changed():
		s.poison(fmt.Errorf("blob %s: %w", s.digest, errChanged))
	case err == nil:
		s.right.Store(true)
		return false
	case errors.As(err, &changed):
		s.poison(fmt.Errorf("blob %s: %w", s.digest, err))
	case s.life.Err() == nil:
		s.log.Warn("the blob is here and was not verified; that is tried again", "blob", s.digest, "err", err)
		return false
	}
	return true
}

// poison has every read fail from now on.
func (s *layerSource) poison(err error) {
	if wrong := (&wrongError{err}); s.wrong.CompareAndSwap(nil, wrong) {
		s.right.Store(false)
		s.revoke(wrong)
	}
}

// revoke does what is to be done once, when every read fails.
func (s *layerSource) revoke(wrong *wrongError) {
	s.log.Error("the bytes of a blob are wrong; every read fails from now on", "blob", s.digest, "err", wrong)
	// The next mount is not to find it.
	if err := s.cached.Purge(); err != nil {
		s.log.Error("the cache may keep a blob that is wrong; erofs-oci cache rm removes it when nothing mounts it any more", "blob", s.digest, "err", err)
	}
	s.onWrong(wrong)
}

// settle waits, where every byte is here, until it is known whether they are right.
func (s *layerSource) settle(ctx context.Context) {
	if s.check == "" {
		return
	}
	for off := int64(0); off < s.size; {
		present, end := s.bytes.Present(off)
		if !present {
			return
		}
		off = end
	}
	if s.size == 0 {
		return
	}
	select {
	case <-s.checked:
	case <-ctx.Done():
	}
}

// Size is a backend.Source's.
func (s *layerSource) Size() int64 { return s.size }

// ReadAt is a backend.Source's.
func (s *layerSource) ReadAt(ctx context.Context, p []byte, off int64) error {
	if wrong := s.wrong.Load(); wrong != nil {
		return wrong
	}
	if off < 0 || off > s.size || int64(len(p)) > s.size-off {
		return fmt.Errorf("%d bytes at %d lie outside the image's %d bytes: %w", len(p), off, s.size, io.ErrUnexpectedEOF)
	}
	s.touches.Touch(off, len(p))
	err := s.bytes.ReadAt(ctx, p, off)
	if wrong := s.wrong.Load(); err != nil && wrong != nil {
		return wrong // it came to light meanwhile, and ended the read
	}
	return err
}

// ReadResident is that of a blobcache.Blob.
func (s *layerSource) ReadResident(p []byte, off int64) bool {
	if s.wrong.Load() != nil || off < 0 || off > s.size || int64(len(p)) > s.size-off {
		return false
	}
	s.touches.Touch(off, len(p))
	return s.bytes.ReadResident(p, off)
}

// Present is that of a blobcache.Blob.
func (s *layerSource) Present(off int64) (present bool, end int64) {
	present, end = s.bytes.Present(off)
	return present, min(end, s.size)
}

// status is what list shows.
func (s *layerSource) status() backend.LayerStatus {
	st := backend.LayerStatus{Digest: s.digest, By: s.by, Size: s.size}
	for off := int64(0); off < s.size; {
		present, end := s.Present(off)
		if present {
			st.Fetched += end - off
		}
		off = end
	}
	if s.right.Load() && s.wrong.Load() == nil {
		st.By = byBlob
	}
	for off := int64(0); off < s.size; {
		passed, end := s.bytes.Passed(off)
		end = min(end, s.size)
		if passed {
			st.Verified += end - off
		}
		off = end
	}
	if wrong := s.wrong.Load(); wrong != nil {
		st.Wrong, st.Verified = wrong.Error(), 0
	}
	return st
}

// unsure says that it may turn out later that what was read is wrong.
func (s *layerSource) unsure() bool { return s.check != "" }

// Close ends the source. The error says so if its bytes were wrong.
func (s *layerSource) Close() error {
	var errs []error
	s.end()
	if s.bytes != nil {
		errs = append(errs, s.bytes.Close())
	}
	if s.image != nil {
		errs = append(errs, s.image.Close())
	}
	for _, t := range s.beside {
		errs = append(errs, t.Close())
	}
	if wrong := s.wrong.Load(); wrong != nil {
		errs = append(errs, wrong)
	}
	return errors.Join(errs...)
}
