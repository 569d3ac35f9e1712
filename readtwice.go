package main

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"hash/maphash"
	"io"
	"os"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
	"github.com/erofs-oci/erofs-oci/registry/verified"
)

// A readTwice is a blob that is read from front to back twice: to verify it, and to decompress it. It takes the room of
// one: what the cache keeps of it is read from there both times, and the rest goes to a file without a name.
//
//	0         spilled        size
//	| the cache | stored      |
type readTwice struct {
	opener  *layerOpener
	from    *throughCache
	disk    *os.File // a file in the cache's directory, where there must be room
	spilled int64    // the first byte that is in stored
	stored  *os.File // nil: there is none
	release func()   // of what the cache keeps, which stays meanwhile; nil: it does not

	// What was verified is in pieces that the cache may lose, so that they come anew: then they must be the same.
	seed maphash.Seed
	sums []uint64 // of the pieces from the cache
}

// collect has all of the blob here, and verifies it.
func (w *readTwice) collect(ctx context.Context) error {
	t, sum := w.from, w.from.Digest().Algorithm().Hash()
	w.seed = maphash.MakeSeed()
	var piece []byte
	if t.kept != nil {
		w.release = t.kept.Pin()
		_, err := w.opener.checkRoom(w.disk, t.missing())
		if err == nil {
			piece, err = w.collectKept(ctx, sum)
		}
		if err != nil {
			return err
		}
	}
	if t.kept == nil || w.spilled < t.Size() {
		if err := w.spill(ctx, piece, sum, nil); err != nil {
			return err
		}
	}
	return w.verify(sum)
}

// collectKept reads the blob through the cache as far as there is room in it, and gives the piece for which there was
// none. What another process keeps just now comes from there the second time, too.
func (w *readTwice) collectKept(ctx context.Context, sum hash.Hash) (unkept []byte, err error) {
	t, size := w.from, w.from.Size()
	before := t.kept.Stats().Unkept
	buf := make([]byte, min(t.part.piece, size))
	// Where there is no room, nobody needs to ask for the next piece through the cache.
	for w.spilled < size && t.kept.Stats().Unkept == before {
		p := buf[:min(t.part.piece, size-w.spilled)]
		if err := t.kept.ReadAt(ctx, p, w.spilled); err != nil {
			return nil, err
		}
		sum.Write(p) // a hash never fails
		if t.kept.Stats().Unkept > before {
			return p, nil
		}
		w.sums = append(w.sums, maphash.Bytes(w.seed, p))
		w.spilled += int64(len(p))
	}
	return nil, nil
}

// collectAgain is collect when what came before was wrong, which why says: from where it came if that is in doubt, and else
// from elsewhere. Nothing of what is kept is used, and nothing of it goes before the right bytes are here.
func (w *readTwice) collectAgain(ctx context.Context, doubt bool, why error) error {
	w.unpin()
	w.spilled, w.sums = 0, nil
	if doubt {
		why = nil
	}
	sum := w.from.Digest().Algorithm().Hash()
	if err := w.spill(ctx, nil, sum, why); err != nil {
		return err
	}
	return w.verify(sum)
}

// keepAgain has the cache keep the blob that collectAgain got, as far as there is room, in place of what was wrong.
func (w *readTwice) keepAgain(ctx context.Context, why error) {
	t, log := w.from, w.opener.log
	if t.kept == nil {
		return
	}
	log.Warn("what is kept of a layer is wrong, and is removed", "blob", t.Digest(), "err", why)
	err := t.kept.Purge()
	if err == nil {
		err = w.keep(ctx)
	}
	if err != nil {
		log.Warn("a layer that was fetched again is not kept; the next mount fetches it once more", "blob", t.Digest(), "err", err)
	}
}

func (w *readTwice) keep(ctx context.Context) (err error) {
	part := w.from.part
	b, err := w.opener.cache.Open(part.digest, part.size, storedFetcher{w.stored}, blobcache.OpenOptions{
		ChunkSize: part.unit, Origin: part.origin, NoReadahead: true,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	buf := make([]byte, min(part.piece, part.size))
	for off := int64(0); off < part.size && b.Stats().Unkept == 0; off += part.piece {
		if err := b.ReadAt(ctx, buf[:min(part.piece, part.size-off)], off); err != nil {
			return err
		}
	}
	return nil
}

// A storedFetcher is a blobcache.Fetcher of all of a blob, which is in a file.
type storedFetcher struct{ *os.File }

func (f storedFetcher) Fetch(_ context.Context, off, n int64) (io.ReadCloser, int64, int64, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, 0, 0, err
	}
	return io.NopCloser(io.NewSectionReader(f, off, n)), off, st.Size(), nil
}

// spill has the blob go to a file from w.spilled on, by one request: from elsewhere, if why says what was wrong. Of that,
// piece came already, and is in sum.
func (w *readTwice) spill(ctx context.Context, piece []byte, sum hash.Hash, why error) (err error) {
	if w.stored == nil {
		if w.stored, err = unnamedFile(w.opener.dir); err != nil {
			return err
		}
	}
	if err := restart(w.stored); err != nil {
		return err
	}
	size := w.from.Size()
	if _, err := w.opener.checkRoom(w.stored, size-w.spilled); err != nil {
		return err
	}
	if _, err := w.stored.Write(piece); err != nil {
		return err
	}
	at := w.spilled + int64(len(piece))
	if at == size && at > 0 {
		return nil
	}
	// It is no metadata: the mount waits for its data.
	body, err := verified.FetchFrom(registry.WithCause(ctx, string(blobcache.Demand)), w.from.remoteBlob, at, size-at, why)
	if err != nil {
		return err
	}
	defer body.Close() // what it has was read, or is of no use
	// One byte more than there may be: a longer body is noticed, and is not kept.
	n, err := io.Copy(io.MultiWriter(w.stored, sum), io.LimitReader(body, size-at+1))
	if err != nil {
		return err
	}
	if n != size-at {
		return &wrongError{fmt.Errorf("from %d on its body has %d bytes or more, and it has %d", at, n, size-at)}
	}
	return nil
}

// lost says that the disk did not keep a part of stored, which may have been read as zeros: the kernel tells nobody who
// does not ask. To wait for what is being written where nothing ever is takes no time, see sync_file_range(2).
func (w *readTwice) lost() error {
	if w.stored == nil {
		return nil
	}
	err := unix.SyncFileRange(int(w.stored.Fd()), w.from.Size()+roomStep, 1, unix.SYNC_FILE_RANGE_WAIT_BEFORE)
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) {
		err = w.stored.Sync()
	}
	if err != nil {
		return fmt.Errorf("what was fetched of it was not kept: %w", err)
	}
	return nil
}

// verify compares the sum of all bytes with the blob's digest.
func (w *readTwice) verify(sum hash.Hash) error {
	if w.opener.verify == verifyOff {
		return nil
	}
	want := w.from.Digest()
	if got := digest.NewDigest(want.Algorithm(), sum); got != want {
		return &wrongError{fmt.Errorf("it was changed: its digest is %s", got)}
	}
	return nil
}

// reader reads what was collected.
func (w *readTwice) reader(ctx context.Context) io.Reader {
	front := &keptPieces{ctx: ctx, of: w}
	if w.stored == nil {
		return front
	}
	return io.MultiReader(front, io.NewSectionReader(w.stored, 0, w.from.Size()-w.spilled))
}

func (w *readTwice) unpin() {
	if w.release != nil {
		w.release()
	}
}

// close gives back what is not needed when the blob was decompressed.
func (w *readTwice) close() error {
	w.unpin()
	if w.stored == nil {
		return nil
	}
	return w.stored.Close() // it has no name
}

// keptPieces reads what the cache keeps of a readTwice: the same bytes as the first time, or an error.
type keptPieces struct {
	ctx   context.Context
	of    *readTwice
	next  int // piece
	buf   []byte
	ready []byte // of buf
}

func (r *keptPieces) Read(p []byte) (int, error) {
	w := r.of
	if len(r.ready) == 0 {
		if r.next == len(w.sums) {
			return 0, io.EOF
		}
		unit := w.from.part.piece
		at := int64(r.next) * unit
		if r.buf == nil {
			r.buf = make([]byte, min(unit, w.spilled))
		}
		r.ready = r.buf[:min(unit, w.spilled-at)]
		if err := w.from.kept.ReadAt(r.ctx, r.ready, at); err != nil {
			return 0, err
		}
		if w.opener.verify != verifyOff && maphash.Bytes(w.seed, r.ready) != w.sums[r.next] {
			return 0, &wrongError{errChanged}
		}
		r.next++
	}
	n := copy(p, r.ready)
	r.ready = r.ready[n:]
	return n, nil
}
