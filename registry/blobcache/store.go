package blobcache

import (
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
)

// A store is what the blobs of one digest share: the file, the presence map and the flights.
type store struct {
	cache     *Cache
	key       storeKey
	digest    string
	size      int64
	chunkSize int64
	chunks    int64
	file      chunkFile
	present   bitmap
	refs      int // guarded by Cache.mu
	counters  counters
	heard     atomic.Int64 // when the last byte came from the network
	buffers   sync.Pool    // *[]byte of chunkSize; a flight that receives holds one

	mu sync.Mutex // guards what follows, Blob.onComplete, pending.flight, flight.receiving, Blob.closed going up, and bits going up
	// inflight has every chunk that somebody is to bring; it is never present at the same time.
	inflight map[int64]*pending
	// stream is the flight that reads the whole blob, if there is one, and streamNext the first chunk that it can
	// still take in as it passes.
	stream     *flight
	streamNext int64
	// fresh has what was fetched ahead, or is about to be, and was not read yet. It is read without the mutex.
	fresh    bitmap
	guesser  guesser
	troubled bool               // the last flight failed, or was not kept: nothing is fetched ahead until one goes well
	blobs    map[*Blob]struct{} // those that are open
	whole    bool               // the server sends the whole blob whatever it is asked for: there is nothing to fetch ahead
}

// A pending is one chunk in flight.
type pending struct {
	flight *flight       // that brings it
	ahead  bool          // nobody had asked for it when it was claimed; flight and ahead are guarded by store.mu
	done   chan struct{} // closed when the chunk is there or failed; what follows does not change after that
	err    error
	data   []byte // the chunk, where the disk could not keep it
}

type counters struct {
	fetches, fetchesAhead, bytesFetched, bytesAhead, bytesServed, hits, misses, chunksPresent atomic.Int64
}

// Stats counts what the blobs of one digest did since the first of them was opened.
type Stats struct {
	Fetches      int64 // calls of Fetch
	FetchesAhead int64 // those of them that nobody waited for when they began
	BytesFetched int64 // read from bodies, dropped ones included
	BytesAhead   int64 // those of them that nobody waited for when they were asked for
	BytesServed  int64 // copied to readers by reads that succeeded
	Hits         int64 // reads that found all they wanted present
	Misses       int64 // reads that had to wait

	ChunksPresent, ChunksTotal int64
}

func newStore(c *Cache, key storeKey, size int64) (*store, error) {
	file, err := c.create(key.digest, size)
	if err != nil {
		return nil, err
	}
	cs := key.unit
	chunks := (size + cs - 1) / cs
	s := &store{
		cache:     c,
		key:       key,
		digest:    key.digest,
		size:      size,
		chunkSize: cs,
		chunks:    chunks,
		file:      file,
		present:   make(bitmap, (chunks+63)/64),
		inflight:  make(map[int64]*pending),
		fresh:     make(bitmap, (chunks+63)/64),
		blobs:     make(map[*Blob]struct{}),
	}
	s.buffers.New = func() any { b := make([]byte, cs); return &b }
	s.guesser = newGuesser(chunks, max(c.options.Readahead, 0)/cs, s.wasRead)
	return s, nil
}

// perFlight is how many chunks one Fetch asks for at most.
func (s *store) perFlight() int64 { return max(s.cache.options.MaxSpan/s.chunkSize, 1) }

// completed tells those who want to know it once that every chunk is here. The caller holds s.mu.
func (s *store) completed() {
	if s.counters.chunksPresent.Load() < s.chunks {
		return
	}
	for b := range s.blobs {
		if f := b.onComplete; f != nil {
			b.onComplete = nil
			b.flights.Go(f)
		}
	}
}

// span gives the chunks [first, end) that n > 0 bytes from off lie in.
func (s *store) span(off int64, n int) (first, end int64) {
	return off / s.chunkSize, (off+int64(n)-1)/s.chunkSize + 1
}

// chunkLen is the chunk size but for the last chunk, which ends with the blob.
func (s *store) chunkLen(chunk int64) int64 {
	return min(s.chunkSize, s.size-chunk*s.chunkSize)
}

// check refuses what lies outside the blob, without computing off+n, which may overflow.
func (s *store) check(off int64, n int) error {
	if off < 0 || off > s.size || int64(n) > s.size-off {
		return fmt.Errorf("read %d bytes at %d of %s: outside its %d bytes: %w", n, off, s.digest, s.size, io.ErrUnexpectedEOF)
	}
	return nil
}

// readResident fills p if every chunk of it is present. It takes no lock and allocates nothing.
func (s *store) readResident(p []byte, off int64) (bool, error) {
	if len(p) > 0 {
		if !s.present.all(s.span(off, len(p))) {
			return false, nil
		}
		if err := s.pread(p, off); err != nil {
			return false, err
		}
	}
	s.counters.hits.Add(1)
	s.counters.bytesServed.Add(int64(len(p)))
	return true, nil
}

// pread reads chunks that are present, and a present chunk is whole: what cannot be read is the disk's fault.
func (s *store) pread(p []byte, off int64) error {
	n, err := s.file.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("cached file of %s at %d: %w", s.digest, off+int64(n), err)
}

func (s *store) stats() Stats {
	return Stats{
		Fetches:       s.counters.fetches.Load(),
		FetchesAhead:  s.counters.fetchesAhead.Load(),
		BytesFetched:  s.counters.bytesFetched.Load(),
		BytesAhead:    s.counters.bytesAhead.Load(),
		BytesServed:   s.counters.bytesServed.Load(),
		Hits:          s.counters.hits.Load(),
		Misses:        s.counters.misses.Load(),
		ChunksPresent: s.counters.chunksPresent.Load(),
		ChunksTotal:   s.chunks,
	}
}

// A bitmap is read without a lock.
type bitmap []atomic.Uint64

func (m bitmap) has(i int64) bool { return m[i/64].Load()>>(i%64)&1 != 0 }

func (m bitmap) set(i int64) { m[i/64].Or(1 << (i % 64)) }

func (m bitmap) clear(i int64) { m[i/64].And(^(1 << (i % 64))) }

// any says whether a bit of [first, end) is set.
func (m bitmap) any(first, end int64) bool {
	for first < end {
		n := min(64-first%64, end-first)
		if m[first/64].Load()&(^uint64(0)>>(64-n)<<(first%64)) != 0 {
			return true
		}
		first += n
	}
	return false
}

// all says whether every bit of [first, end) is set.
func (m bitmap) all(first, end int64) bool {
	for first < end {
		n := min(64-first%64, end-first)
		want := ^uint64(0) >> (64 - n) << (first % 64)
		if m[first/64].Load()&want != want {
			return false
		}
		first += n
	}
	return true
}

// A chunkFile is where chunks are kept. Tests put failing disks in its place.
type chunkFile interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
}

var _ chunkFile = (*os.File)(nil)
