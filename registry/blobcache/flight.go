package blobcache

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"
)

// A flight is one Fetch and the reading of its body.
type flight struct {
	blob       *Blob
	first, end int64 // the chunks it asks for; end goes up when it turns out to be the stream
	demanded   int64 // the chunks before this one are waited for, those from here on are fetched ahead
	ahead      bool  // it has a slot for what it fetches ahead
	background bool  // it brings what Prefetch wants, see background
	slot       bool  // it has a slot of the background
	favored    bool  // it is one of background.favored
	begun      bool  // of the background, it is about to fetch: readers of its chunks wait for it. Guarded by store.mu
	turn       bool  // it has a slot for what is waited for
	receiving  bool  // its body is being read: a stream does not take its chunks over any more. Guarded by store.mu
	ranged     bool  // the body began where it was asked to
	unkept     error // why the disk did not take a chunk
	fetched    bool  // it has asked for something
	looked     bool  // what of it is on disk was published, and what of it others fetch is left to them
	waits      bool  // it fetches nothing: another process does
	troubled   bool  // it failed, or was not kept
	// locks are the chunks whose lock between processes it has, until it has delivered them. Guarded by store.mu.
	locks map[int64]struct{}
	// since is when who waits for it began to, if that was before it could begin, and nothing came meanwhile; else zero.
	since time.Time
	// heard is when the last byte came or, before the first one, when it began.
	heard  atomic.Int64
	paused atomic.Bool   // it lets others go first, or keeps to a rate
	rested time.Duration // how long it let others go first since its body came
	stream bool          // it is, or was, the blob's stream
	tired  int64         // bytes of a stream that came since it last let others go first for as long as it may
	slept  time.Duration // how long it did not read its body, for that and for the rate
	counts *atomic.Int64 // of whose cause the next bytes are; nil: of none yet
}

func (b *Blob) newFlight(chunk int64) *flight {
	f := &flight{blob: b, first: chunk, end: chunk, demanded: chunk}
	f.heard.Store(time.Now().UnixNano())
	return f
}

func (f *flight) quiet() bool {
	return time.Since(time.Unix(0, f.heard.Load())) > quiet && !f.paused.Load()
}

// want makes sure that every chunk of [first, end) is present or in flight, and gives those in flight; present ones are
// nil. Their regions stay until the caller says that it does not need them any longer. Runs of absent chunks become
// flights, and never does a chunk have two. behind says that flights of the background bring all that is in flight. since is
// when the reader's wait began, if that was before this read.
func (b *Blob) want(first, end int64, since time.Time) (_ []*pending, behind bool, _ error) {
	s := b.store
	wanted := make([]*pending, end-first)
	var begun []*flight
	promote, others := false, false

	s.mu.Lock()
	defer s.mu.Unlock()
	if b.closed.Load() {
		return nil, false, b.closedError()
	}
	news := end     // the first chunk that nobody has asked for before
	var run *flight // to which an absent chunk right behind the last one is added
	for c := first; c < end; c++ {
		pend := s.inflight[c]
		if s.read(c) || pend == nil && !s.present.has(c) {
			news = min(news, c)
		}
		switch {
		case s.present.has(c):
			run = nil
			continue
		case pend != nil && !pend.loose():
			run = nil
			promote = promote || pend.flight.background
		case pend == nil && s.stream != nil && c >= s.streamNext:
			run = nil
			pend = s.claim(c, s.stream)
			promote = promote || s.stream.background
		default:
			if run == nil || c-run.first == s.perFlight() {
				run = b.newFlight(c)
				run.since = since
				begun = append(begun, run)
			}
			run.end, run.demanded = c+1, c+1
			if pend == nil {
				pend = s.claim(c, run)
			}
			pend.flight, pend.ahead, pend.cause = run, false, Demand
		}
		pend.wanted++
		wanted[c-first] = pend
		others = others || !pend.flight.background
	}
	if promote {
		s.cache.background.wake()
	}
	if news < end {
		begun = b.readAhead(news, end, begun)
	}
	s.pin(first, end)
	b.start(begun)
	return wanted, promote && !others, nil
}

// start lets flights go. The caller holds s.mu, and has seen that b is not closed.
func (b *Blob) start(begun []*flight) {
	for _, f := range begun {
		b.flights.Go(f.run)
	}
}

// claim puts an absent chunk in flight. The caller holds s.mu.
func (s *store) claim(chunk int64, f *flight) *pending {
	pend := &pending{flight: f, cause: Demand, done: make(chan struct{})}
	if _, wrong := s.wrong[chunk]; wrong {
		pend.disputed = !s.unkeep(chunk)
	}
	s.inflight[chunk] = pend
	s.pin(chunk, chunk+1)
	return pend
}

// run is the flight's goroutine; the blob that began it waits for it in Close.
func (f *flight) run() {
	b := f.blob
	err := f.fly()
	f.troubled = err != nil || f.unkept != nil
	switch {
	case err == nil:
		err = io.ErrUnexpectedEOF // nothing is left undone without an error; should it be, no reader takes a hole for data
	case b.ctx.Err() != nil:
		err, f.troubled = errAbandoned, false
	default:
		// Whoever waits for it gets the error, and says so; what nobody waits for will be fetched when somebody does.
		b.store.cache.options.Logger.Debug("fetch failed", "blob", b.store.digest, "offset", f.first*b.store.chunkSize, "err", err)
	}
	f.land(err)
	b.store.cache.background.favor(f, false)
	if f.slot {
		b.store.cache.background.end()
	}
}

// land returns to absent what f was to bring and did not, and tells those who wait. Who came upon a chunk that was
// fetched ahead has it fetched again, unless the wait was about as long as it would be then.
func (f *flight) land(err error) {
	s := f.blob.store
	shared := f.quiet()
	s.mu.Lock()
	defer s.mu.Unlock()
	defer f.unlock()
	if s.stream == f {
		s.stream = nil
	}
	if (f.fetched || f.troubled) && !f.background {
		s.troubled = f.troubled
	}
	for c, pend := range s.inflight {
		switch {
		case pend.flight != f:
		case pend.ahead && !shared:
			pend.failure = err
			s.drop(c, pend, errAbandoned)
		default:
			s.drop(c, pend, err)
		}
	}
}

// drop makes a chunk in flight absent. The caller holds s.mu.
func (s *store) drop(chunk int64, pend *pending, err error) {
	s.landed(chunk)
	pend.flight.release(chunk)
	s.fresh.clear(chunk)
	pend.err = err
	close(pend.done)
}

// landed says that a chunk is in flight no more. The caller holds s.mu.
func (s *store) landed(chunk int64) {
	delete(s.inflight, chunk)
	s.unpin(chunk, chunk+1)
}

// fly fetches and publishes. Chunks that f owes when it returns were not brought.
func (f *flight) fly() error {
	s := f.blob.store
	if f.ahead {
		defer s.cache.ahead.Release(1)
	}
	if f.waits {
		return f.await()
	}
	if !f.looked {
		if err := f.fromDisk(); err != nil || !f.owes() {
			return err
		}
	}
	if f.demanded > f.first {
		if err := f.takeTurn(); err != nil {
			return err
		}
		defer f.endTurn()
	}
	if f.background {
		if err := f.mayBegin(); err != nil {
			return err
		}
	}
	if !f.looked {
		if err := f.divide(); err != nil {
			return err
		}
	}
	if !f.owes() {
		return nil // others bring all of it: a stream took it over while f waited for its turn, or another process does
	}
	return f.fetch()
}

// fetch asks for the chunks of f, and receives them.
func (f *flight) fetch() error {
	b, s := f.blob, f.blob.store
	off := f.first * s.chunkSize
	n := min(f.end*s.chunkSize, s.size) - off
	f.fetched = true
	s.cache.counters.inFlight.Add(1)
	defer s.cache.counters.inFlight.Add(-1)
	body, start, total, err := b.fetcher.Fetch(f.label(), off, n)
	if err != nil {
		return err // it says of which bytes, as who waits for some of them does
	}
	defer body.Close()
	if total != s.size {
		return fmt.Errorf("fetch %d bytes at %d: the server has %d bytes, the blob is said to have %d", n, off, total, s.size)
	}
	if start < 0 || start > off {
		return fmt.Errorf("fetch %d bytes at %d: the body starts at %d", n, off, start)
	}
	began, end := time.Now(), f.end
	if err := f.receive(body, start); err != nil {
		return fmt.Errorf("fetch %d bytes at %d: body from %d: %w", n, off, start, err)
	}
	if start == off && f.end == end {
		s.cache.background.took(n, time.Since(began)-f.slept)
	}
	return nil
}

// takeTurn waits for one of the slots of what is waited for. They come free only as long as bytes come: whoever has
// waited for quiet, and the blob had no byte for as long, goes without a slot. Those who have one wait for a network
// in trouble, and to wait for them and then as long as they did would be several times as long as a reader may wait.
func (f *flight) takeTurn() error {
	s := f.blob.store
	ctx, cancel := context.WithCancel(f.blob.ctx)
	defer cancel()
	var check *time.Timer
	ready := make(chan struct{}) // check is set
	check = time.AfterFunc(quiet, func() {
		<-ready
		if s.silent() {
			cancel()
		} else {
			check.Reset(quiet)
		}
	})
	close(ready)
	defer check.Stop()
	if f.turn = f.blob.slots().fetches.Acquire(ctx, 1) == nil; f.turn {
		if !f.blob.beneath { // for whom it is read has said so, or is of the background
			s.cache.outside.enter()
		}
		return nil
	}
	return f.blob.ctx.Err()
}

// silent says whether no byte of the blob has come for a while.
func (s *store) silent() bool { return time.Since(time.Unix(0, s.heard.Load())) >= quiet }

// endTurn lets another demand begin, when no more of f's is outstanding.
func (f *flight) endTurn() {
	if f.turn {
		f.turn = false
		f.blob.slots().fetches.Release(1)
		if !f.blob.beneath {
			f.blob.store.cache.outside.leave()
		}
	}
}

// receive publishes the chunks of the body as each becomes whole.
func (f *flight) receive(body io.Reader, start int64) error {
	s := f.blob.store
	if !f.begin(start) {
		return nil
	}
	buffer := s.buffers.Get().(*[]byte)
	defer s.buffers.Put(buffer)
	r := bufio.NewReader(flightReader{body, f})

	chunk := (start + s.chunkSize - 1) / s.chunkSize
	if n, err := r.Discard(int(chunk*s.chunkSize - start)); err != nil {
		if chunk, err = f.passOver(r, start+int64(n), err); err != nil {
			return err
		}
	}
	for {
		if chunk >= f.end {
			if more, err := f.goesOn(r); !more {
				return err
			}
		}
		if f.ahead && chunk >= f.demanded {
			f.endTurn()
		}
		pend, more := f.take(chunk)
		if !more {
			return nil
		}
		data := (*buffer)[:s.disk.chunkLen(chunk)]
		n, err := io.ReadFull(r, data)
		f.counts.Add(int64(n))
		if err != nil {
			if chunk, err = f.passOver(r, chunk*s.chunkSize+int64(n), err); err != nil {
				return err
			}
			continue
		}
		if pend != nil {
			f.publish(chunk, pend, data)
		}
		chunk++
	}
}

func broken(err error, at int64) error {
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("broke off at %d: %w", at, err)
}

// begin says that the body is there, and whether anybody still wants it. A body that starts before what was asked
// for is the whole blob.
func (f *flight) begin(start int64) bool {
	s := f.blob.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.owed(f) {
		return false
	}
	f.receiving = true
	f.ranged = start == f.first*s.chunkSize
	if !f.ranged && s.stream == nil {
		s.makeStream(f, (start+s.chunkSize-1)/s.chunkSize)
	}
	return true
}

// goesOn looks for bytes behind the last chunk of f.end, which all are here. To a request from byte 0 the whole blob
// is an answer that is only noticed now; anywhere else such bytes are none of ours.
func (f *flight) goesOn(r *bufio.Reader) (bool, error) {
	s := f.blob.store
	if !f.ranged && f.end < s.chunks {
		return false, nil // the whole blob once more, while another flight is the stream
	}
	if _, err := r.Peek(1); err == io.EOF {
		return false, nil // read to its end, for only then can the connection serve again
	} else if err != nil {
		return false, broken(err, f.end*s.chunkSize)
	}
	if f.first > 0 || f.end == s.chunks {
		return false, errors.New("is longer than it should be")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stream != nil {
		return false, nil
	}
	s.makeStream(f, f.end)
	return true, nil
}

// makeStream lets f read to the end of the blob, next being the first chunk to come, and gives it those of the later
// chunks for which no other flight has begun to receive. The caller holds s.mu.
func (s *store) makeStream(f *flight, next int64) {
	s.whole = true
	s.stream, s.streamNext = f, next
	f.end, f.stream = s.chunks, true
	if f.background {
		f.unlock() // it may be long before it comes to what it was to bring
	}
	for c, pend := range s.inflight {
		if c >= next && !pend.flight.receiving {
			pend.flight, pend.ahead = f, false
		}
	}
	s.cache.background.wake() // if readers wait for what it takes over
}

// take decides about the chunk that comes next: whom it is for, or nil if it is to be dropped, since it is here
// already or another flight is bringing it. It answers false if the rest of the body is of no use: where the disk
// keeps nothing, a flight goes on only as long as somebody waits for what it will bring, and one that was quiet only
// as long as readers have left something to it.
func (f *flight) take(chunk int64) (*pending, bool) {
	s := f.blob.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.unkept != nil {
		s.forgo(f)
	}
	if (f.unkept != nil || (f.ahead || f.background) && s.stream != f) && !s.owed(f) {
		if s.stream == f {
			s.stream = nil
		}
		return nil, false
	}
	if s.stream == f {
		s.streamNext = chunk + 1
	}
	cause := f.cause(chunk)
	pend := s.inflight[chunk]
	switch {
	case pend != nil && pend.flight == f:
		cause = pend.cause
	case pend != nil || s.present.has(chunk) || s.known.has(chunk) || f.unkept != nil:
		pend = nil
	default:
		pend = s.claim(chunk, f)
		pend.cause = cause
	}
	f.counts = s.counters.bytesOf(cause)
	return pend, true
}

// publish makes a whole chunk present and lets those who wait for it go. The bit is set after the chunk and its entry
// are in the file; where the disk does not take it, or another process has its lock, those who wait get a copy and the
// chunk is absent again.
func (f *flight) publish(chunk int64, pend *pending, data []byte) {
	s := f.blob.store
	if err := f.verify(chunk, data); err != nil {
		f.refuse(chunk, pend, err)
		return
	}
	if !f.pin(chunk, pend) {
		return // a reader had it fetched anew while f was quiet, and has it by now
	}
	err := f.keep(chunk, pend, data)
	if err != nil && !errors.Is(err, errLocked) {
		f.unkept = noRoom(err)
		s.counters.unkept.Add(1) // before who waits for it has it
		if !f.background {       // who prefetches is told
			s.cache.cannotKeep(err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unpin(chunk, chunk+1)
	if s.inflight[chunk] != pend {
		f.release(chunk)
		return // the same, just now
	}
	if err != nil {
		pend.data, pend.unkept = bytes.Clone(data), noRoom(err)
		s.fresh.clear(chunk)
	}
	f.deliver(chunk, pend, data, err == nil, f.blob.verify != nil || f.blob.vouched)
}

// pin keeps the region of a chunk that somebody still waits for from being evicted while it is written.
func (f *flight) pin(chunk int64, pend *pending) bool {
	s := f.blob.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.inflight[chunk] != pend {
		f.release(chunk)
		return false
	}
	s.pin(chunk, chunk+1)
	return true
}

// deliver lets those go who wait for a chunk, which is data, on disk or in pend, and notes whether it has passed. The
// caller holds s.mu.
func (f *flight) deliver(chunk int64, pend *pending, data []byte, onDisk, passed bool) {
	s := f.blob.store
	onDisk = onDisk && !s.isDoubtful(chunk, pend, data)
	s.takeIn(chunk, data, passed, onDisk)
	if onDisk {
		s.present.set(chunk)
		s.cache.took.Store(time.Now().UnixMicro())
		s.learn(chunk)
		s.use(chunk, chunk+1)
	}
	s.landed(chunk)
	f.release(chunk)
	pend.flight.release(chunk)
	close(pend.done)
	if onDisk {
		s.completed()
	}
}

// refuse ends the wait for a chunk that is not what it should be.
func (f *flight) refuse(chunk int64, pend *pending, err error) {
	s := f.blob.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.inflight[chunk] == pend {
		s.drop(chunk, pend, err)
	}
}

// cannotKeep says once why what is fetched is not kept.
func (c *Cache) cannotKeep(why error) {
	c.unkept.Do(func() {
		c.options.Logger.Warn("the cache cannot keep what was fetched; reads go on without it",
			"cache", c.dir.Name(), "err", why)
	})
}

// verify asks the blob's hook about a whole chunk.
func (f *flight) verify(chunk int64, data []byte) error {
	b := f.blob
	if b.verify == nil {
		return nil
	}
	off := chunk * b.store.chunkSize
	err := b.verify(b.ctx, data, off)
	switch {
	case err == nil:
		return nil
	case b.ctx.Err() != nil:
		return errAbandoned
	}
	return f.refused(chunk, err)
}

// refused counts a chunk that is not what it should be, and says so to who waits for it.
func (f *flight) refused(chunk int64, why error) error {
	s := f.blob.store
	s.cache.counters.refused.Add(1)
	err := &refusedError{chunk * s.chunkSize, why}
	// Who fetches it again says so, and who gets it wrong again, too.
	s.cache.options.Logger.Debug("chunk refused", "blob", s.digest, "offset", err.off, "err", err)
	return err
}

func (f *flight) owes() bool {
	f.blob.store.mu.Lock()
	defer f.blob.store.mu.Unlock()
	return f.blob.store.owed(f)
}

// owed says whether f is to bring anything. The caller holds s.mu.
func (s *store) owed(f *flight) bool {
	for _, pend := range s.inflight {
		if pend.flight == f {
			return true
		}
	}
	return false
}

// A flightReader counts what comes, and when.
type flightReader struct {
	io.Reader
	flight *flight
}

func (r flightReader) Read(p []byte) (int, error) {
	if r.flight.background {
		return r.readBehind(p)
	}
	return r.read(p)
}

func (r flightReader) read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if n > 0 {
		now := time.Now().UnixNano()
		r.flight.heard.Store(now)
		r.flight.blob.store.heard.Store(now)
		r.flight.blob.store.counters.bytesFetched.Add(int64(n))
	}
	return n, err
}
