package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"github.com/opencontainers/go-digest"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
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
	stored, err := unnamedFile(o.dir)
	if err != nil {
		return err
	}
	defer stored.Close() // it has no name, and is of no use any more
	err = o.fetchAndDecompress(ctx, f, stored, from, v, nil)
	for try := 0; try < from.Places() && o.wrongWhole(err); try++ {
		err = o.fetchAndDecompress(ctx, f, stored, from, v, err)
	}
	if errors.Is(err, syscall.ENOSPC) {
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

// wholeHolder is the blob, all of which is kept as it is, unless it would take so much of the cache that it might push
// out what of itself was not read yet.
func (o *layerOpener) wholeHolder(s *layerSource, blob *remoteBlob) (*throughCache, error) {
	const unit, piece = 256 << 10, 8 << 20
	u, err := o.cache.Usage()
	if err != nil {
		return nil, err
	}
	part := keptPart{digest: blob.Digest().String(), size: blob.Size(), unit: unit, piece: piece, origin: origin("whole"), layer: true}
	if o.verify == verifyOff {
		part.origin = origin("whole", plain(blob))
	}
	if u.Limit > 0 && blob.Size() > u.Limit/2 {
		part.size = 0
	}
	return o.throughCache(s, blob, part)
}

// wrongWhole says that what came was not what it should be. Frames that cannot be
// decompressed are the image's fault where they have its digest.
func (o *layerOpener) wrongWhole(err error) bool {
	var wrong *wrongError
	return errors.As(err, &wrong) || o.verify == verifyOff && errors.Is(err, integrity.ErrCorrupt)
}

// fetchAndDecompress makes stored the blob, and f what it decompresses to. why is what was
// wrong the last time.
func (o *layerOpener) fetchAndDecompress(ctx context.Context, f *wholeFile, stored *os.File, blob *throughCache, v registry.Vouched, why error) error {
	for _, file := range []*os.File{stored, f.File} {
		if err := rewind(file); err != nil {
			return err
		}
		if err := file.Truncate(0); err != nil {
			return err
		}
	}
	if err := o.fetchWhole(ctx, stored, blob, why); err != nil {
		return err
	}
	if err := rewind(stored); err != nil {
		return err
	}
	return o.decompressWhole(ctx, f, stored, v)
}

func rewind(f *os.File) error {
	_, err := f.Seek(0, io.SeekStart)
	return err
}

// fetchWhole makes stored the blob, which has its digest then.
func (o *layerOpener) fetchWhole(ctx context.Context, stored *os.File, blob *throughCache, why error) error {
	if err := o.checkRoom(stored, blob.Size()); err != nil {
		return err
	}
	fetch := blob.Fetch
	if why != nil {
		fetch = func(ctx context.Context, off, n int64) (io.ReadCloser, int64, int64, error) {
			return blob.FetchElsewhere(ctx, off, n, why)
		}
	}
	// It is no metadata: the mount waits for its data.
	body, start, _, err := fetch(registry.WithCause(ctx, string(blobcache.Demand)), 0, blob.Size())
	if err != nil {
		return err
	}
	defer body.Close() // what it has was read, or is of no use
	if start != 0 {
		return fmt.Errorf("its body starts at %d", start)
	}
	sum := blob.Digest().Algorithm().Hash()
	// One byte more than there may be: a longer body is noticed, and is not kept.
	n, err := io.Copy(io.MultiWriter(stored, sum), io.LimitReader(body, blob.Size()+1))
	if err != nil {
		return err
	}
	if n != blob.Size() {
		return &wrongError{fmt.Errorf("its body has %d bytes or more, and it has %d", n, blob.Size())}
	}
	if o.verify == verifyOff {
		return nil
	}
	if got := digest.NewDigest(blob.Digest().Algorithm(), sum); got != blob.Digest() {
		return &wrongError{fmt.Errorf("it was changed: its digest is %s", got)}
	}
	return nil
}

// decompressWhole makes f what the frames in stored hold, as long as there is room: no
// annotation says how much that is.
func (o *layerOpener) decompressWhole(ctx context.Context, f *wholeFile, stored io.Reader, v registry.Vouched) (err error) {
	plain := digest.Canonical
	if v.Uncompressed != "" {
		plain = v.Uncompressed.Algorithm()
	}
	image := plain.Hash()
	to := &roomWriter{ctx: ctx, opener: o, file: f.File}
	if f.size, err = chunked.Decompress(io.MultiWriter(to, image), stored, maxDecompressed); err != nil {
		return err
	}
	if got := digest.NewDigest(plain, image); o.verify != verifyOff && v.Uncompressed != "" && got != v.Uncompressed {
		return fmt.Errorf("it decompresses to %s, and the manifest says to %s", got, v.Uncompressed)
	}
	return nil
}

// roomStep is how much is decompressed before somebody looks how much room there is.
const roomStep = 64 << 20

// A roomWriter writes to a file as long as its file system has room.
type roomWriter struct {
	ctx    context.Context
	opener *layerOpener
	file   *os.File
	left   int64 // of a step
}

func (w *roomWriter) Write(p []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	if w.left < int64(len(p)) {
		if err := w.opener.checkRoom(w.file, int64(len(p))); err != nil {
			return 0, err
		}
		w.left = max(roomStep, int64(len(p)))
	}
	n, err := w.file.Write(p)
	w.left -= int64(n)
	return n, err
}

// checkRoom is an error if the file system of f had less than --cache-min-free left after n
// more bytes.
func (o *layerOpener) checkRoom(f *os.File, n int64) error {
	keep := max(o.cache.MinFree(), 0)
	room := o.room
	if room == nil {
		room = roomOf
	}
	free, err := room(f)
	if err != nil {
		return err
	}
	if free >= keep && n <= free-keep {
		return nil
	}
	return fmt.Errorf("%s has %d bytes free, of which %d are to stay free (--cache-min-free), and %d more are needed at least: %w", o.dir, free, keep, n, syscall.ENOSPC)
}

// roomOf is how much can be written where f is.
func roomOf(f *os.File) (int64, error) {
	var st syscall.Statfs_t
	if err := syscall.Fstatfs(int(f.Fd()), &st); err != nil {
		return 0, fmt.Errorf("statfs %s: %w", f.Name(), err)
	}
	return int64(st.Bavail) * int64(st.Frsize), nil
}

// unnamedFile is a file in dir that nobody else can open.
func unnamedFile(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "decompressed."+rand.Text()), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
