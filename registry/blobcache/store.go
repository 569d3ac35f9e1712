package blobcache

import (
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A store is what the blobs of one digest and origin share: the file, the presence map and the flights.
type store struct {
	cache     *Cache
	key       storeKey
	digest    string
	size      int64
	chunkSize int64
	chunks    int64
	disk      *disk
	refs      int  // guarded by Cache.mu
	beneath   bool // all who have it open are; guarded by Cache.mu
	counters  counters
	// present has the chunks that may be read: they are on disk, were checked, and no other process can punch a hole
	// there, for their region is leased. Bits go up and down under mu and are read without it.
	present    bitmap
	generation atomic.Uint64 // goes up when bits of present go down
	doubts     atomic.Uint64 // goes up when all bits of present go down, for what is in memory may not be on the disk
	used       useTable      // when each region was last read
	buffers    sync.Pool     // *[]byte of chunkSize; a flight that receives holds one
	heard      atomic.Int64  // when the last byte came from the network

	// What watchDisk has to do yet after the disk lost something.
	dropsLeft int       // how often pages are to be dropped
	dropAt    time.Time // when that begins

	mu sync.Mutex // guards what follows, Blob.onComplete, pending.flight, pending.disputed, flight.receiving, Blob.closed going up, and bits going up
	// inflight has every chunk that somebody is to bring; it is never present at the same time.
	inflight map[int64]*pending
	// stream is the flight that reads the whole blob, if there is one, and streamNext the first chunk that it can
	// still take in as it passes.
	stream     *flight
	streamNext int64
	busy       map[int64]int // regions of chunks in flight or being waited for, which stay; how many those are
	pinned     int           // who has all regions stay, see Blob.Pin
	leased     bitmap        // regions whose shared lock is ours
	locks      map[int64]int // chunks whose lock is ours; for how many flights
	// known has the chunks that are on disk as far as we know: another process may have fetched or evicted some.
	known bitmap
	// passed has the known chunks that a hook, a Fetcher that vouches, or an examination of the whole was content with in
	// this process. It is read without the mutex.
	passed bitmap
	exams  map[*exam]struct{} // under way
	// intakes are those of chunks that did not pass by themselves.
	intakes map[int64]intake
	// wrong has the chunks that are to be forgotten, and could not be taken off the disk.
	wrong   map[int64]struct{}
	seed    maphash.Seed // for intakes; does not change
	changed bool         // a chunk was not the same the next time
	stored  useTable     // what the disk has of used
	// fresh has what was fetched ahead, or is about to be, and was not read yet. It is read without the mutex.
	fresh    bitmap
	guesser  guesser
	holds    []*hold            // see HoldReadahead
	troubled bool               // the last flight failed, or was not kept: nothing is fetched ahead until one goes well
	blobs    map[*Blob]struct{} // those that are open
	doubting bool               // nothing is present, see doubt
	whole    bool               // the server sends the whole blob whatever it is asked for: there is nothing to fetch ahead
}

// A pending is one chunk in flight.
type pending struct {
	flight *flight       // that brings it
	ahead  bool          // nobody had asked for it when it was claimed; flight, ahead, wanted and cause are guarded by store.mu
	wanted int           // readers that wait for it
	cause  Cause         // for which it is fetched
	done   chan struct{} // closed when the chunk is there or failed; what follows does not change after that
	// disputed says that the hook refused what the disk has, and that others may read that, or be about to write: it
	// is neither looked at again nor overwritten, and what is fetched goes to those who wait and nowhere else.
	disputed bool
	doubtful bool // it was in flight when doubts ended, see trust
	err      error
	data     []byte // the chunk, where the disk could not keep it
	unkept   error  // why it could not
	failure  error  // why it was given up, which is no affair of those who read it
}

type counters struct {
	fetches, fetchesDemand, fetchesAhead, fetchesPrefetch, bytesFetched, bytesDemand, bytesAhead, bytesPrefetch, bytesServed, hits, misses, unkept, chunksPresent atomic.Int64
}

// Stats counts what the blobs of one digest did since the first of them was opened.
type Stats struct {
	Fetches         int64 // calls of Fetch
	FetchesDemand   int64 // those of them that somebody waited for when they began
	FetchesAhead    int64 // those of them that nobody waited for then, but for the next
	FetchesPrefetch int64 // those of them that Prefetch wanted
	BytesFetched    int64 // read from bodies, dropped ones included
	BytesDemand     int64 // those of them that somebody waited for when they were asked for
	BytesAhead      int64 // those of them that nobody waited for then, but for the next
	BytesPrefetch   int64 // those of them that Prefetch had asked for
	BytesServed     int64 // copied to readers by reads that succeeded
	Hits            int64 // reads that found all they wanted present
	Misses          int64 // reads that had to wait
	Unkept          int64 // chunks that came, and for which there was no room

	ChunksPresent, ChunksTotal int64
}

// newStore opens the file of a blob. The caller has the directory's lock.
func newStore(c *Cache, key storeKey, size int64) (*store, error) {
	d, err := c.openDisk(key.name, size, key.unit)
	if err != nil {
		return nil, err
	}
	cs, chunks := d.unit, d.chunks
	s := &store{
		cache:     c,
		key:       key,
		digest:    d.digest,
		size:      size,
		chunkSize: cs,
		chunks:    chunks,
		disk:      d,
		present:   newBitmap(chunks),
		used:      newUseTable(d.regions),
		busy:      make(map[int64]int),
		leased:    newBitmap(d.regions),
		locks:     make(map[int64]int),
		known:     newBitmap(chunks),
		passed:    newBitmap(chunks),
		exams:     make(map[*exam]struct{}),
		intakes:   make(map[int64]intake),
		wrong:     make(map[int64]struct{}),
		seed:      maphash.MakeSeed(),
		inflight:  make(map[int64]*pending),
		fresh:     newBitmap(chunks),
		blobs:     make(map[*Blob]struct{}),
	}
	s.buffers.New = func() any { b := make([]byte, cs); return &b }
	s.guesser = newGuesser(chunks, max(c.options.Readahead, 0)/cs, s.wasRead)
	if err := s.look(); err != nil {
		return nil, errors.Join(err, d.close())
	}
	_ = s.checkDisk() // watchDisk says what is wrong with that
	return s, nil
}

// look takes in what earlier mounts left. The caller has the directory's lock, or is alone with s.
func (s *store) look() (err error) {
	if err := s.disk.scan(s.learn); err != nil {
		return err
	}
	if s.stored, err = s.disk.lastUses(); err != nil {
		return err
	}
	for r, when := range s.stored.used {
		s.used.set(r, when)
	}
	if err := lock(s.disk.handle, unix.F_WRLCK, lockOpen); err != nil {
		return ignore(err, errLocked)
	}
	err = s.disk.sweep(s.known, s.counters.chunksPresent.Load())
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = nil // a file system without holes has none to give back
	}
	return errors.Join(err, lock(s.disk.handle, unix.F_RDLCK, lockOpen))
}

// learn notes that a chunk is on disk.
func (s *store) learn(chunk int64) {
	if !s.known.has(chunk) {
		s.known.set(chunk)
		s.counters.chunksPresent.Add(1)
	}
}

// knownRegions calls f for the regions in which there are known chunks, until it returns false.
func (s *store) knownRegions(f func(region int64) bool) {
	next := int64(0)
	for c := range s.known.ones(0, s.chunks) {
		if c < next {
			continue
		}
		r := c / s.disk.perRegion
		if !f(r) {
			return
		}
		_, next = s.disk.region(r)
	}
}

// unlearn notes that a chunk is not on disk.
func (s *store) unlearn(chunk int64) {
	if s.known.has(chunk) {
		s.known.clear(chunk)
		s.passed.clear(chunk)
		s.counters.chunksPresent.Add(-1)
	}
}

// pin and unpin say that the regions of the chunks [first, end) stay, and need not stay any longer. The caller
// holds s.mu.
func (s *store) pin(first, end int64) {
	for r := first / s.disk.perRegion; r <= (end-1)/s.disk.perRegion; r++ {
		s.busy[r]++
	}
}

func (s *store) unpin(first, end int64) {
	for r := first / s.disk.perRegion; r <= (end-1)/s.disk.perRegion; r++ {
		if s.busy[r]--; s.busy[r] == 0 {
			delete(s.busy, r)
		}
	}
}

// isBusy says whether a region stays. The caller holds s.mu.
func (s *store) isBusy(region int64) bool { return s.pinned > 0 || s.busy[region] > 0 }

// use notes that the regions of the chunks [first, end) are read.
func (s *store) use(first, end int64) {
	now := s.cache.clock.Load()
	for r := first / s.disk.perRegion; r <= (end-1)/s.disk.perRegion; r++ {
		if s.used.at(r) != now {
			s.used.set(r, now)
		}
	}
}

// perFlight is how many chunks one Fetch asks for at most.
func (s *store) perFlight() int64 { return max(s.cache.options.MaxSpan/s.chunkSize, 1) }

// completed tells those who want to know it that every chunk is here. The caller holds s.mu.
func (s *store) completed() {
	if s.counters.chunksPresent.Load() < s.chunks {
		return
	}
	for b := range s.blobs {
		if b.completed && (s.passed.all(0, s.chunks) || time.Now().Before(b.rest)) {
			continue
		}
		if f := b.onComplete; f != nil {
			b.onComplete, b.completed = nil, true
			b.flights.Go(func() { b.complete(f) })
		}
	}
}

// complete tells that every chunk is here, and remembers who wants to hear it again.
func (b *Blob) complete(f func() bool) {
	began := time.Now()
	if f() {
		return
	}
	b.store.mu.Lock()
	defer b.store.mu.Unlock()
	b.onComplete = f
	b.rest = time.Now().Add(min(restShare*time.Since(began), mostRest))
}

// What a whole blob is asked for, as a rule, takes a second for each GiB.
const (
	restShare = 10
	mostRest  = 10 * time.Minute
)

// span gives the chunks [first, end) that n > 0 bytes from off lie in.
func (s *store) span(off int64, n int) (first, end int64) {
	return off / s.chunkSize, (off+int64(n)-1)/s.chunkSize + 1
}

// check refuses what lies outside the blob, without computing off+n, which may overflow.
func (s *store) check(off int64, n int) error {
	if off < 0 || off > s.size || int64(n) > s.size-off {
		return fmt.Errorf("read %d bytes at %d of %s: outside its %d bytes: %w", n, off, s.digest, s.size, io.ErrUnexpectedEOF)
	}
	return nil
}

// readResident fills p if every chunk of it is present. It takes no lock and allocates nothing; should a chunk have been
// evicted meanwhile, it was not present. Where the disk fails, the chunks are absent, too.
func (s *store) readResident(p []byte, off int64) bool {
	if len(p) > 0 {
		first, end := s.span(off, len(p))
		generation := s.generation.Load()
		if !s.present.all(first, end) {
			return false
		}
		err := s.pread(p, off)
		if s.generation.Load() != generation {
			return false // they may have been evicted, and been holes
		}
		if err != nil {
			s.spoil(first, end, err)
			return false
		}
		s.use(first, end)
	}
	s.counters.hits.Add(1)
	s.counters.bytesServed.Add(int64(len(p)))
	return true
}

// spoil makes chunks absent that cannot be read back.
func (s *store) spoil(first, end int64, why error) {
	if errors.Is(why, errDamaged) {
		s.cache.counters.damaged.Add(1)
	}
	s.cache.options.Logger.Warn("cached chunks cannot be read; they are fetched again", "blob", s.digest, "offset", first*s.chunkSize, "err", why)
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := first; c < end; c++ {
		s.present.clear(c)
	}
	s.generation.Add(1)
}

// pread reads chunks that are present, and a present chunk is whole: what cannot be read is the disk's fault.
func (s *store) pread(p []byte, off int64) error {
	if s.cache.options.Paranoid {
		return s.readChecked(p, off)
	}
	n, err := s.disk.file.ReadAt(p, s.disk.base+off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("cached file of %s at %d: %w", s.digest, off+int64(n), err)
}

// readChecked is pread for who does not trust the disk from one read to the next.
func (s *store) readChecked(p []byte, off int64) error {
	buffer := s.buffers.Get().(*[]byte)
	defer s.buffers.Put(buffer)
	for len(p) > 0 {
		chunk := off / s.chunkSize
		data := (*buffer)[:s.disk.chunkLen(chunk)]
		there, err := s.disk.load(chunk, data)
		if err == nil && !there {
			err = errDamaged
		}
		if err != nil {
			return fmt.Errorf("cached file of %s, chunk %d: %w", s.digest, chunk, err)
		}
		n := copy(p, data[off-chunk*s.chunkSize:])
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func (s *store) stats() Stats {
	return Stats{
		Fetches:         s.counters.fetches.Load(),
		FetchesDemand:   s.counters.fetchesDemand.Load(),
		FetchesAhead:    s.counters.fetchesAhead.Load(),
		FetchesPrefetch: s.counters.fetchesPrefetch.Load(),
		BytesFetched:    s.counters.bytesFetched.Load(),
		BytesDemand:     s.counters.bytesDemand.Load(),
		BytesPrefetch:   s.counters.bytesPrefetch.Load(),
		BytesAhead:      s.counters.bytesAhead.Load(),
		BytesServed:     s.counters.bytesServed.Load(),
		Hits:            s.counters.hits.Load(),
		Misses:          s.counters.misses.Load(),
		Unkept:          s.counters.unkept.Load(),
		ChunksPresent:   s.counters.chunksPresent.Load(),
		ChunksTotal:     s.chunks,
	}
}
