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

// openWhole fetches a blob that can only be read from front to back, verifies all of it,
// and decompresses it into the cache directory. What is wrong is fetched again, from
// elsewhere if there is another place.
func (o *layerOpener) openWhole(ctx context.Context, s *layerSource, blob *registry.Blob, v registry.Vouched) error {
	o.say("blob %s is compressed, without an index that says where its parts are: all of its %d bytes are fetched first", blob.Digest(), blob.Size())
	file, err := unnamedFile(o.dir)
	if err != nil {
		return err
	}
	f := &wholeFile{File: file}
	s.bytes = f // to be closed, whatever happens
	err = o.fetchWhole(ctx, f, blob, v, nil)
	for try := 0; try < blob.Places() && wrongWhole(err); try++ {
		err = o.fetchWhole(ctx, f, blob, v, err)
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

// wrongWhole says that what came was not what it should be.
func wrongWhole(err error) bool {
	var wrong *wrongError
	return errors.As(err, &wrong) || errors.Is(err, integrity.ErrCorrupt)
}

// fetchWhole makes f what the blob decompresses to. why is what was wrong the last time.
func (o *layerOpener) fetchWhole(ctx context.Context, f *wholeFile, blob *registry.Blob, v registry.Vouched, why error) error {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if err := f.Truncate(0); err != nil {
		return err
	}
	fetch := blob.Fetch
	if why != nil {
		fetch = func(ctx context.Context, off, n int64) (io.ReadCloser, int64, int64, error) {
			return blob.FetchElsewhere(ctx, off, n, why)
		}
	}
	body, start, _, err := fetch(ctx, 0, blob.Size())
	if err != nil {
		return err
	}
	defer body.Close() // what it has was read, or is of no use
	if start != 0 {
		return fmt.Errorf("its body starts at %d", start)
	}
	stored, plain := blob.Digest().Algorithm().Hash(), digest.Canonical
	if v.Uncompressed != "" {
		plain = v.Uncompressed.Algorithm()
	}
	image := plain.Hash()
	raw := io.TeeReader(body, stored)
	if f.size, err = chunked.Decompress(io.MultiWriter(f, image), raw, maxDecompressed); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, raw); err != nil { // what the decompressor had no need of
		return err
	}
	if o.verify == verifyOff {
		return nil
	}
	if got := digest.NewDigest(blob.Digest().Algorithm(), stored); got != blob.Digest() {
		return &wrongError{fmt.Errorf("it was changed: its digest is %s", got)}
	}
	if got := digest.NewDigest(plain, image); v.Uncompressed != "" && got != v.Uncompressed {
		return fmt.Errorf("it decompresses to %s, and the manifest says to %s", got, v.Uncompressed)
	}
	return nil
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
