package blobcache

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Who fetches a chunk holds its lock until the chunk is here, and finds out under it whether another process has fetched
// it meanwhile. What others hold is waited for by a flight of its own, which looks again and again: such a wait can be
// ended by Close, and a lock whose process was killed is free for the next one who tries.
const (
	firstPause = time.Millisecond
	mostPause  = 20 * time.Millisecond
)

// fromDisk publishes those of f's chunks that are on disk: from an earlier mount, or from another process.
func (f *flight) fromDisk() error {
	b, s := f.blob, f.blob.store
	var buffer *[]byte
	for chunk := range s.disk.present(f.first, f.end) {
		pend := f.owing(chunk)
		if pend == nil {
			continue
		}
		if buffer == nil {
			release, err := f.prepare(chunk)
			if err != nil {
				return err
			}
			defer release()
			if err := b.slots().loads.Acquire(b.ctx, 1); err != nil {
				return err
			}
			defer b.slots().loads.Release(1)
			buffer = s.buffers.Get().(*[]byte)
			defer s.buffers.Put(buffer)
		}
		if err := f.load(chunk, pend, (*buffer)[:s.disk.chunkLen(chunk)]); err != nil {
			return err
		}
	}
	return nil
}

// A preparer is a Fetcher that may need the network to verify, and can have what it needs beforehand: with nobody
// waiting in line behind it for a turn at the disk. What it has stays until release is called.
type preparer interface {
	Prepare(ctx context.Context, off, n int64) (release func(), err error)
}

// prepare has the chunks of f from this one on be verified without the network.
func (f *flight) prepare(chunk int64) (release func(), err error) {
	b, s := f.blob, f.blob.store
	p, ok := b.fetcher.(preparer)
	if !ok || b.verify == nil {
		return func() {}, nil
	}
	off := chunk * s.chunkSize
	return p.Prepare(f.context(), off, min(f.end*s.chunkSize, s.size)-off)
}

// owing gives a chunk that f is to bring, or nil.
func (f *flight) owing(chunk int64) *pending {
	s := f.blob.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if pend := s.inflight[chunk]; pend != nil && pend.flight == f {
		return pend
	}
	return nil
}

// load publishes a chunk that is on disk, if it is what it should be; else it is fetched again. Where the hook could
// not tell, since it failed itself, who waits gets its error, and the chunk stays. An error is that of an ended flight
// only.
func (f *flight) load(chunk int64, pend *pending, data []byte) error {
	s := f.blob.store
	s.mu.Lock()
	disputed := pend.disputed
	err := s.lease(chunk / s.disk.perRegion)
	s.mu.Unlock()
	if err != nil {
		return ignore(err, errLocked) // it is being evicted
	}
	if disputed {
		return nil
	}
	there, err := s.disk.load(chunk, data)
	if err == nil && !there {
		return nil
	}
	if err != nil {
		f.discard(chunk, pend, err)
		return nil
	}
	switch err := f.verify(chunk, data); {
	case errors.Is(err, errAbandoned):
		return err
	case err != nil && judgement(err) == nil:
		f.refuse(chunk, pend, err)
		return nil
	case err != nil:
		f.dispute(chunk, pend, err)
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.inflight[chunk] != pend {
		return nil
	}
	f.deliver(chunk, pend, data, true, f.blob.verify != nil)
	return nil
}

// discard takes a damaged chunk off the disk, for it to be fetched again, unless another process is about to.
func (f *flight) discard(chunk int64, pend *pending, why error) {
	s := f.blob.store
	s.cache.counters.damaged.Add(1)
	s.cache.options.Logger.Warn("cached chunk discarded; it is fetched again", "blob", s.digest, "offset", chunk*s.chunkSize, "err", why)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.inflight[chunk] != pend {
		return // it was fetched anew, and is there
	}
	s.unlearn(chunk)
	if f.lock(chunk) != nil {
		return
	}
	if err := s.disk.erase(chunk, chunk+1); err != nil {
		s.cache.options.Logger.Warn("a cached chunk that is no good cannot be discarded", "blob", s.digest, "offset", chunk*s.chunkSize, "err", err)
	}
}

// dispute takes a chunk off the disk that the hook refused, for it to be fetched again. Where another process has the
// region leased, it may be content with the chunk, and read it just now: then it stays as it is, and this process does
// without it. While the region is ours alone nobody can begin to read the chunk, and after that its entry is gone.
func (f *flight) dispute(chunk int64, pend *pending, why error) {
	s := f.blob.store
	log := s.cache.options.Logger
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.inflight[chunk] != pend {
		return
	}
	s.unlearn(chunk)
	pend.disputed = true
	region := chunk / s.disk.perRegion
	if f.lock(chunk) != nil || s.disk.lockRegion(unix.F_WRLCK, region) != nil {
		log.Warn("cached chunk refused; it is fetched again, and the cached one left to who reads it", "blob", s.digest, "offset", chunk*s.chunkSize, "err", why)
		return
	}
	log.Warn("cached chunk refused; it is fetched again", "blob", s.digest, "offset", chunk*s.chunkSize, "err", why)
	if err := s.disk.erase(chunk, chunk+1); err != nil {
		log.Warn("a cached chunk that is no good cannot be discarded", "blob", s.digest, "offset", chunk*s.chunkSize, "err", err)
	} else {
		pend.disputed = false
	}
	if err := s.disk.lockRegion(unix.F_RDLCK, region); err != nil {
		log.Warn("a part of the cache cannot be shared again", "blob", s.digest, "offset", region*s.disk.perRegion*s.chunkSize, "err", err)
	}
}

// lock takes the lock of a chunk for f. The caller holds s.mu.
func (f *flight) lock(chunk int64) error {
	s := f.blob.store
	if f.has(chunk) {
		return nil
	}
	if s.locks[chunk] == 0 {
		if err := s.disk.lockChunk(unix.F_WRLCK, chunk); err != nil {
			return err
		}
	}
	f.hold(chunk)
	return nil
}

// hold notes that f has the lock of a chunk, which is ours. The caller holds s.mu.
func (f *flight) hold(chunk int64) {
	f.blob.store.locks[chunk]++
	if f.locks == nil {
		f.locks = make(map[int64]struct{})
	}
	f.locks[chunk] = struct{}{}
}

// unlock lets go of the locks of f, from the first one on: each that is let go among others makes the kernel's list of
// them longer, which it searches. The caller holds s.mu.
func (f *flight) unlock() {
	for _, chunk := range slices.Sorted(maps.Keys(f.locks)) {
		f.blob.store.unlock(chunk)
	}
	f.locks = nil
}

// unlock lets go of one lock of a flight. The caller holds s.mu.
func (s *store) unlock(chunk int64) {
	if s.locks[chunk]--; s.locks[chunk] > 0 {
		return
	}
	delete(s.locks, chunk)
	if err := s.disk.lockChunk(unix.F_UNLCK, chunk); err != nil {
		s.cache.options.Logger.Warn("the lock of a cached chunk cannot be let go; other processes wait for it", "blob", s.digest, "offset", chunk*s.chunkSize, "err", err)
	}
}

// release lets go of the lock of a chunk, if f has it. The caller holds s.mu.
func (f *flight) release(chunk int64) {
	if f.has(chunk) {
		delete(f.locks, chunk)
		f.blob.store.unlock(chunk)
	}
}

// divide takes the locks of what f owes. f keeps the first run of chunks that are absent; other runs become flights of
// their own, and so does the wait for what other processes have the locks of. What was to be fetched ahead and is
// fetched by others is none of ours.
func (f *flight) divide() error {
	s := f.blob.store
	s.mu.Lock()
	var theirs []int64
	for c := f.first; c < f.end; c++ {
		if pend := s.inflight[c]; pend != nil && pend.flight == f && f.lock(c) != nil {
			theirs = append(theirs, c)
		}
	}
	s.mu.Unlock()
	if err := f.fromDisk(); err != nil { // what was fetched before the locks were ours
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.blob.closed.Load() {
		return errAbandoned
	}
	f.leave(theirs)
	runs := f.runs()
	f.looked = true
	if len(runs) == 0 {
		return nil
	}
	for _, run := range runs[1:] {
		f.spinOff(run)
	}
	f.first, f.end = runs[0].first, runs[0].end
	f.demanded = min(max(f.demanded, f.first), f.end)
	f.begun = true
	f.heard.Store(time.Now().UnixNano()) // it may have waited for its turn: that was no silence of the server
	return nil
}

// leave has the chunks waited for that other processes fetch. The caller holds s.mu.
func (f *flight) leave(theirs []int64) {
	s := f.blob.store
	var w *flight
	for _, c := range theirs {
		pend := s.inflight[c]
		if pend == nil || pend.flight != f {
			continue
		}
		if pend.ahead && !f.background {
			s.drop(c, pend, errAbandoned)
			continue
		}
		if w == nil {
			w = f.blob.newFlight(c)
			w.waits, w.background, w.since = true, f.background, f.since
		}
		w.end = c + 1
		if !f.background {
			w.demanded = w.end
		}
		pend.flight = w
	}
	if w != nil {
		f.blob.start([]*flight{w})
	}
}

type chunkRun struct{ first, end int64 }

// runs gives what f owes. The caller holds s.mu.
func (f *flight) runs() []chunkRun {
	s := f.blob.store
	var runs []chunkRun
	for c := f.first; c < f.end; c++ {
		if pend := s.inflight[c]; pend == nil || pend.flight != f {
			continue
		}
		if n := len(runs); n > 0 && runs[n-1].end == c {
			runs[n-1].end++
		} else {
			runs = append(runs, chunkRun{c, c + 1})
		}
	}
	return runs
}

// spinOff makes a run of f's chunks a flight of its own, with the locks of f, and without what nobody has asked for
// where no slot is free for that. One of the background has no locks before it begins: it may wait for its turn for as
// long as somebody reads here, and is not to have other processes wait meanwhile. The caller holds s.mu.
func (f *flight) spinOff(run chunkRun) {
	s := f.blob.store
	g := f.blob.newFlight(run.first)
	g.looked = !f.background // which may leave some of it to readers before it begins
	g.background, g.since = f.background, f.since
	g.end = run.end
	g.demanded = min(max(f.demanded, run.first), run.end)
	if g.demanded < g.end && !g.background {
		g.ahead = s.cache.ahead.TryAcquire(1)
	}
	for c := run.first; c < run.end; c++ {
		pend := s.inflight[c]
		if c >= g.demanded && !g.ahead && !g.background {
			s.drop(c, pend, errAbandoned)
			continue
		}
		pend.flight = g
		if g.background {
			f.release(c)
		} else if s.locks[c] > 0 {
			g.hold(c)
		}
	}
	if !g.ahead && !g.background {
		g.end = g.demanded
	}
	if g.end > g.first {
		f.blob.start([]*flight{g})
	}
}

// await waits for what other processes fetch. What nobody fetches any more, since its process failed or was killed, is
// fetched by a flight of ours; so is what does not come although nothing else has come for long, but that cannot be kept.
func (f *flight) await() error {
	b, s := f.blob, f.blob.store
	seen := make(map[int64]struct{})
	f.othersBrought(seen)
	if f.since.IsZero() && !f.background {
		f.since = time.Now()
	}
	for wait := firstPause; ; wait = min(2*wait, mostPause) {
		if err := pause(b.ctx, wait); err != nil {
			return err
		}
		s.mu.Lock()
		free := false
		for _, run := range f.runs() {
			for c := run.first; c < run.end; c++ {
				free = f.lock(c) == nil || free
			}
		}
		s.mu.Unlock()
		if f.othersBrought(seen) && !f.background {
			f.since = time.Now()
		}
		if err := f.fromDisk(); err != nil {
			return err
		}
		late := !f.background && time.Since(f.since) > s.cache.options.Patience
		if free || late {
			f.takeOver(late)
		}
		if !f.owes() {
			return nil
		}
	}
}

// othersBrought says whether other processes have brought something that seen has not yet, of what f waits for or so near
// that one flight may bring both: whoever has the locks does not stand still.
func (f *flight) othersBrought(seen map[int64]struct{}) (some bool) {
	s := f.blob.store
	span := s.perFlight()
	for c := range s.disk.present(max(f.first-span, 0), min(f.end+span, s.chunks)) {
		if _, ok := seen[c]; ok {
			continue
		}
		seen[c] = struct{}{}
		s.mu.Lock()
		some = some || !s.known.has(c) // else it may be of this process
		s.mu.Unlock()
	}
	return some
}

// takeOver begins flights for the chunks whose locks are f's now, or for all.
func (f *flight) takeOver(all bool) {
	s := f.blob.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.blob.closed.Load() {
		return
	}
	for _, run := range f.runs() {
		for c := run.first; c < run.end; {
			end := c + 1
			mine := s.locks[c] > 0
			for end < run.end && (s.locks[end] > 0) == mine && end-c < s.perFlight() {
				end++
			}
			if mine || all {
				f.spinOff(chunkRun{c, end})
			}
			c = end
		}
	}
	f.unlock()
}

// keep writes a chunk to the disk, if nobody else does or did: what is there may be read by others, and is never
// written over.
func (f *flight) keep(chunk int64, pend *pending, data []byte) error {
	s := f.blob.store
	if s.disk.nowhere {
		return ErrNoRoom
	}
	if s.cache.rests() {
		return fmt.Errorf("%w: %w", ErrNoRoom, errNotKept)
	}
	s.mu.Lock()
	before := anyTime
	if f.background && pend.wanted == 0 {
		before = s.cache.background.began()
	}
	err := s.lease(chunk / s.disk.perRegion)
	if err == nil && pend.disputed {
		err = errLocked
	}
	if err == nil {
		err = f.lock(chunk)
	}
	if err == nil {
		for range s.disk.present(chunk, chunk+1) {
			err = errLocked // it was fetched by another process: who reads it next checks it
		}
	}
	s.mu.Unlock()
	if err != nil {
		return err
	}
	n := int64(len(data))
	if err := s.cache.space.take(n, before); err != nil {
		return err
	}
	err = s.disk.put(chunk, data)
	if err != nil {
		err = errors.Join(err, s.giveBack(chunk))
	}
	s.cache.space.wrote(n, err == nil)
	return err
}

// giveBack frees what a write that failed has taken, unless another process may read there.
func (s *store) giveBack(chunk int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	region := chunk / s.disk.perRegion
	if err := s.disk.lockRegion(unix.F_WRLCK, region); err != nil {
		return ignore(err, errLocked)
	}
	return errors.Join(s.disk.punch(chunk, chunk+1), s.disk.lockRegion(unix.F_RDLCK, region))
}

// has says whether f has the lock of the chunk. The caller holds s.mu.
func (f *flight) has(chunk int64) bool {
	_, ok := f.locks[chunk]
	return ok
}
