package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"syscall"

	"github.com/opencontainers/go-digest"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/chunked"
	"github.com/erofs-oci/erofs-oci/registry/integrity"
)

// maxDecompressed bounds what a layer may decompress to that has no index to say so.
const maxDecompressed = 1 << 40

// A wholeFile is an image that was decompressed as a whole. It has no name, and ends with
// the process.
type wholeFile struct {
	*os.File
	size int64
}

// Size is a backend.Source's.
func (f *wholeFile) Size() int64 { return f.size }

// ReadAt is a backend.Source's.
func (f *wholeFile) ReadAt(_ context.Context, p []byte, off int64) error {
	n, err := f.File.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("decompressed image at %d: %w", off+int64(n), err)
}

// ReadResident is that of a blobcache.Blob.
func (f *wholeFile) ReadResident(p []byte, off int64) bool {
	return f.ReadAt(context.Background(), p, off) == nil
}

// Present is that of a blobcache.Blob.
func (f *wholeFile) Present(int64) (present bool, end int64) { return true, f.size }

// Passed is that of a blobcache.Blob: it was verified before it was decompressed.
func (f *wholeFile) Passed(int64) (passed bool, end int64) { return true, f.size }

// openWhole fetches a blob that can only be read from front to back, verifies all of it, and
// only then decompresses it into the cache directory. What is wrong is fetched again, from
// elsewhere if there is another place.
func (o *layerOpener) openWhole(ctx context.Context, s *layerSource, blob *remoteBlob, v registry.Vouched) error {
	from, err := o.wholeHolder(s, blob)
	if err == nil {
		err = from.wholeIsHere()
	}
	if err != nil {
		return fmt.Errorf("blob %s: %w", blob.Digest(), err)
	}
	how := "fetched"
	if from.kept != nil && from.missing() == 0 {
		how = "decompressed"
	}
	o.say("blob %s is compressed, without an index that says where its parts are: all of its %d bytes are %s first", blob.Digest(), blob.Size(), how)
	file, err := unnamedFile(o.dir)
	if err != nil {
		return err
	}
	f := &wholeFile{File: file}
	s.bytes = f // to be closed, whatever happens
	w := &readTwice{opener: o, from: from, disk: file}
	err = errors.Join(o.decompressRight(ctx, f, w, v), w.close())
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EIO) {
		err = fmt.Errorf("%w; choose a directory with more room by --cache-dir", err)
	}
	if err != nil {
		return fmt.Errorf("blob %s: %w", blob.Digest(), err)
	}
	s.size = f.size
	if o.verify != verifyOff {
		s.by = byBlob
	}
	return nil
}

// decompressRight makes f what the blob decompresses to, which is fetched again where it was wrong. It comes from
// elsewhere then, unless an earlier mount may have kept what was wrong.
func (o *layerOpener) decompressRight(ctx context.Context, f *wholeFile, w *readTwice, v registry.Vouched) error {
	err := w.collect(ctx)
	if err == nil {
		err = o.decompressWhole(ctx, f, w, v)
	}
	doubt, tries := w.from.found, w.from.remoteBlob.Places()
	if doubt {
		tries++
	}
	for ; tries > 0 && o.wrongWhole(err); tries-- {
		why := err
		if err = w.collectAgain(ctx, doubt, why); err == nil {
			err = o.decompressWhole(ctx, f, w, v)
		}
		if err == nil {
			w.keepAgain(ctx, why)
		}
		doubt = false
	}
	return err
}

// wholeHolder is the blob, all of which is kept as it is, unless nothing is kept yet and it would take more than half of
// what the cache may take: so much else is not to go for one layer that is read once for each mount.
func (o *layerOpener) wholeHolder(s *layerSource, blob *remoteBlob) (*throughCache, error) {
	const unit, piece = 256 << 10, 8 << 20
	part := keptPart{digest: blob.Digest().String(), size: blob.Size(), unit: unit, piece: piece, origin: origin("whole"), layer: true}
	if o.verify == verifyOff {
		part.origin = origin("whole", plain(blob))
	}
	if limit := o.cache.Stats().Limit; limit > 0 && blob.Size() > limit/2 {
		sizes, err := o.cache.Sizes(part.digest, part.origin)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(sizes, part.size) {
			part.size = 0
		}
	}
	return o.throughCache(s, blob, part)
}

// wrongWhole says that what came was not what it should be. Frames that cannot be
// decompressed are the image's fault where they have its digest.
func (o *layerOpener) wrongWhole(err error) bool {
	var wrong *wrongError
	return errors.As(err, &wrong) || o.verify == verifyOff && errors.Is(err, integrity.ErrCorrupt)
}

// decompressWhole makes f what the frames of w hold, as long as there is room: no annotation says how much that is.
func (o *layerOpener) decompressWhole(ctx context.Context, f *wholeFile, w *readTwice, v registry.Vouched) error {
	if err := restart(f.File); err != nil {
		return err
	}
	plain := digest.Canonical
	if v.Uncompressed != "" {
		plain = v.Uncompressed.Algorithm()
	}
	image := plain.Hash()
	to := &roomWriter{ctx: ctx, opener: o, file: f.File}
	var err error
	f.size, err = chunked.Decompress(io.MultiWriter(to, image), w.reader(ctx), maxDecompressed)
	if lost := w.lost(); lost != nil {
		return lost
	}
	if err != nil {
		return err
	}
	if got := digest.NewDigest(plain, image); o.verify != verifyOff && v.Uncompressed != "" && got != v.Uncompressed {
		return fmt.Errorf("it decompresses to %s, and the manifest says to %s", got, v.Uncompressed)
	}
	// Nothing compares what is read of it with anything from now on: so the disk is to have it, and say so. What the kernel
	// cannot write back later is zeros for who reads it then, without an error.
	if err := f.Sync(); err != nil {
		return fmt.Errorf("what it decompresses to cannot be kept: %w", err)
	}
	return nil
}
