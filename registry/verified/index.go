package verified

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sort"

	"github.com/erofs-oci/erofs-oci/registry/integrity"
)

// An IndexPlace says where a chunk index is, and what it is. All of it comes from the
// manifest.
type IndexPlace struct {
	Off, Len int64  // in the blob that holds it
	Framed   bool   // it is in a skippable frame, of which Off and Len are
	Digest   string // of the index itself
	DataEnd  int64  // where the chunks end, in the blob that they are in
	// Unchecked has nothing be verified, neither the index nor the chunks.
	Unchecked bool
}

// An Index verifies the chunks of a blob. Together with its hook Verify it is the Fetcher
// of a cache: chunks that Verify found wrong it fetches from elsewhere.
type Index struct {
	*integrity.ChunkIndex
	suspects
	raw       []byte // the index, where it is the blob's end; nil where it is not
	unchecked bool
	doubt     error // what is wrong with it, if it is unchecked
}

// ReadIndex reads the chunk index that holder has at p, and verifies it before anything
// in it is looked at. blob has the chunks; it is the holder or another one. An index that
// uses what is not known here is integrity.ErrUnsupported.
func ReadIndex(ctx context.Context, holder, blob Fetcher, p IndexPlace) (*Index, error) {
	want, doubt := parseDigest(p.Digest)
	named := doubt == nil
	if !named && !p.Unchecked {
		return nil, fmt.Errorf("chunk index: %w", doubt)
	}
	if p.Off < 0 || p.Len <= 0 || p.Len > integrity.MaxChunkIndex {
		return nil, fmt.Errorf("chunk index: %d bytes at %d: at most %d are taken: %w", p.Len, p.Off, int64(integrity.MaxChunkIndex), integrity.ErrCorrupt)
	}
	stored := make([]byte, p.Len)
	var raw []byte
	check := func() error {
		raw = stored
		if p.Framed {
			var err error
			if raw, err = integrity.UnwrapFrame(stored); err != nil {
				return err
			}
		}
		if named {
			doubt = checkDigest("the chunk index", want, want.Algorithm().FromBytes(raw))
		}
		if p.Unchecked {
			return nil
		}
		return doubt
	}
	if err := mend(ctx, holder, stored, p.Off, check, nil); err != nil {
		return nil, fmt.Errorf("chunk index: %w", err)
	}
	x, err := integrity.ParseChunkIndex(raw, p.DataEnd, integrity.ChunkLimits{})
	if err != nil {
		return nil, err
	}
	index := &Index{ChunkIndex: x, suspects: suspects{blob: blob, total: p.Off + p.Len}, unchecked: p.Unchecked, doubt: doubt}
	if holder == blob && !p.Framed && x.Size() == p.Off {
		index.raw = stored
	}
	return index, nil
}

// Verifies says whether chunks can be verified, and are to be.
func (x *Index) Verifies() bool {
	_, ok := x.Checksums()
	return ok && !x.unchecked
}

// Doubt is what is wrong with an index that was not to be checked, if it has not its digest. Who read it from where it
// lay for long may want to fetch it.
func (x *Index) Doubt() error { return x.doubt }

// Unit is the size of all chunks but the last one, which may be shorter, if they have one
// and it is a multiple of min up to max; else it is 0.
func (x *Index) Unit(min, max int64) int64 {
	if x.Len() == 0 {
		return 0
	}
	unit := x.Chunk(0).Len
	if x.Len() == 1 {
		// Any unit that has room for it will do.
		unit = (unit + min - 1) / min * min
	}
	if unit > max || unit%min != 0 {
		return 0
	}
	for i := range x.Len() {
		if c := x.Chunk(i); c.Off != int64(i)*unit || c.Len > unit {
			return 0
		}
	}
	return unit
}

// Verify is the hook of a cache in the unit of the index, for chunks that are stored as
// they are. p is the cache's chunk at off. What of it is behind the image (the index
// itself, say) is not verified, and not to be given to anybody: see Size.
func (x *Index) Verify(_ context.Context, p []byte, off int64) error {
	if off >= x.Size() {
		return nil
	}
	i := x.Find(off)
	if i < 0 || x.Chunk(i).Off != off || x.Chunk(i).Len > int64(len(p)) {
		return fmt.Errorf("%d bytes at %d are not a chunk of the index", len(p), off)
	}
	return x.judge(off, int64(len(p)), x.ChunkIndex.Verify(i, p[:x.Chunk(i).Len]))
}

// Fetch is a Fetcher's. It does not fetch the index again, which is here.
func (x *Index) Fetch(ctx context.Context, off, n int64) (body io.ReadCloser, start, total int64, err error) {
	return x.fetchBefore(ctx, off, n, x.Size(), x.Size()+int64(len(x.raw)), func(at, n int64) io.Reader {
		at -= x.Size()
		return bytes.NewReader(x.raw[at : at+n])
	})
}

// Stream is a Fetcher of the stored chunks, whose bodies have only bytes that were
// verified: as they are in the blob, before they are decompressed. In the place of a chunk
// that is wrong a body has an *integrity.GapError, and goes on behind it. A *WrongError is
// in that, which says by being Temporary that the chunk should be asked for again: then it
// is fetched from elsewhere.
func (x *Index) Stream() *Stream { return &Stream{x} }

// A Stream is a Fetcher of what the chunks of an index are stored in. It begins and ends
// with chunks; what there is in the blob beside them is not in it.
type Stream struct{ index *Index }

// storedEnd is where the chunks end in the blob.
func (x *Index) storedEnd() int64 {
	if x.Len() == 0 {
		return 0
	}
	c := x.Chunk(x.Len() - 1)
	return c.BlobOff + c.BlobLen
}

// stored is the chunk that the byte at off of the blob is of.
func (x *Index) stored(off int64) int {
	return sort.Search(x.Len(), func(i int) bool { c := x.Chunk(i); return c.BlobOff+c.BlobLen > off })
}

// Fetch is a Fetcher's. total is where the chunks end. To verify the bytes, the whole
// chunks that they are of are fetched.
func (s *Stream) Fetch(ctx context.Context, off, n int64) (body io.ReadCloser, start, total int64, err error) {
	x := s.index
	total = x.storedEnd()
	if off < 0 || n <= 0 || off > total || n > total-off || x.stored(off) == x.Len() || off < x.Chunk(x.stored(off)).BlobOff {
		return nil, 0, 0, fmt.Errorf("%d bytes at %d are not of chunks", n, off)
	}
	first, last := x.stored(off), x.stored(off+n-1)
	from, to := x.Chunk(first).BlobOff, x.Chunk(last).BlobOff+x.Chunk(last).BlobLen
	below, start, _, err := x.suspects.Fetch(ctx, from, to-from)
	if err != nil {
		return nil, 0, 0, err
	}
	v := &verifying{index: x, body: below, next: first, end: last + 1, skip: off - from, left: n}
	switch {
	case start < 0 || start > from:
		return nil, 0, 0, errors.Join(fmt.Errorf("%d bytes at %d: the body starts at %d", to-from, from, start), below.Close())
	case start < from && x.Chunk(0).BlobOff == 0 && start == 0:
		// All of the blob comes: whoever wants it can have it.
		v.next, v.end, v.skip, v.left = 0, x.Len(), 0, total
		return v, 0, total, nil
	case start < from:
		v.pass = from - start
	}
	return v, off, total, nil
}

// A verifying is a body. It belongs to one goroutine. It fetches nothing: it has a
// connection, and there may be no other one.
type verifying struct {
	index     *Index
	body      io.ReadCloser
	pass      int64  // bytes of the body before the next chunk
	next, end int    // chunks
	skip      int64  // bytes of the next chunk that are not wanted
	left      int64  // bytes that are wanted
	buf       []byte // for a chunk
	ready     []byte // of buf: verified, and not read
	err       error
}

func (v *verifying) Read(p []byte) (int, error) {
	if v.left == 0 && v.err == nil {
		v.err = io.EOF
	}
	for v.err == nil && len(v.ready) == 0 {
		if gap, err := v.chunk(); gap != nil {
			return 0, gap
		} else if err != nil {
			v.err = err
		}
	}
	if v.err != nil {
		return 0, v.err
	}
	n := copy(p, v.ready)
	v.ready = v.ready[n:]
	v.left -= int64(n)
	return n, nil
}

// chunk reads the next one, and verifies it. A gap is what is wanted of a wrong one; any
// other error is the end.
func (v *verifying) chunk() (gap, err error) {
	x := v.index
	c := x.Chunk(v.next)
	if v.pass > 0 {
		if _, err := io.CopyN(io.Discard, v.body, v.pass); err != nil {
			return nil, broken(err, c.BlobOff)
		}
		v.pass = 0
	}
	if int64(cap(v.buf)) < c.BlobLen {
		v.buf = make([]byte, c.BlobLen) // bounded by integrity.ChunkLimits
	}
	p := v.buf[:c.BlobLen]
	if n, err := io.ReadFull(v.body, p); err != nil {
		return nil, broken(err, c.BlobOff+int64(n))
	}
	if x.Verifies() {
		err = x.judge(c.BlobOff, c.BlobLen, x.ChunkIndex.Verify(v.next, p))
	}
	if err != nil && !isMismatch(err) {
		return nil, err
	}
	wanted := p[v.skip:min(c.BlobLen, v.skip+v.left)]
	if err != nil {
		gap = &integrity.GapError{Off: c.BlobOff + v.skip, Len: int64(len(wanted)), Err: err}
		v.left -= int64(len(wanted))
	} else {
		v.ready = wanted
	}
	v.next++
	v.skip = 0
	return gap, nil
}

func (v *verifying) Close() error {
	if v.err == nil {
		v.err = errors.New("body is closed")
	}
	return v.body.Close()
}
