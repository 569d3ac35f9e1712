package blobcache

import (
	"errors"
	"time"
)

const (
	// houseEvery is how often the cache is looked after: times of use reach the disk, and what was not read lately is
	// let go of.
	houseEvery = 5 * time.Second
	// idle is how long a region is not read before another process may evict it.
	idle = 20 * time.Second
)

// tick sets the clock by which the use of regions is noted. Reads of what is present do not set it: they cost less
// than asking for the time would.
func (c *Cache) tick() { c.clock.Store(time.Now().UnixMicro()) }

// keepHouse runs until the cache is closed.
func (c *Cache) keepHouse() {
	t := time.NewTicker(houseEvery)
	defer t.Stop()
	said := ""
	for {
		select {
		case <-c.ctx.Done():
			return
		case <-t.C:
		}
		c.tick()
		others, err := c.space.others()
		for _, s := range c.hold() {
			err = errors.Join(err, s.keepHouse(others > 0), c.release(s))
		}
		if err != nil && err.Error() != said {
			said = err.Error()
			c.options.Logger.Warn("the cache cannot be looked after; it may keep more than it should, and other things than were used last", "cache", c.dir.Name(), "err", err)
		}
	}
}

// keepHouse writes down when regions were used and, where there are other processes, lets go of those that were not
// used lately. What others have evicted or completed it looks in any case: they may have come and gone meanwhile.
func (s *store) keepHouse(shared bool) error {
	s.mu.Lock()
	err := s.remain()
	s.mu.Unlock()
	err = errors.Join(err, s.storeUses())
	s.mu.Lock()
	defer s.mu.Unlock()
	shared = shared && !s.keeps()
	before := s.cache.clock.Load() - idle.Microseconds()
	for r := range s.leased.ones(0, s.disk.regions) {
		if shared && s.used.at(r) < before {
			err = errors.Join(err, s.letGo(r))
		}
	}
	return errors.Join(err, s.recount())
}

// awaitsTheEnd says whether somebody wants to know when all of the blob is here. The caller holds s.mu.
func (s *store) awaitsTheEnd() bool {
	for b := range s.blobs {
		if b.onComplete != nil {
			return true
		}
	}
	return false
}

// recount looks which chunks are on disk, where others fetch and evict, too. What they have fetched is found when it is
// read, unless somebody waits for the end. The caller holds s.mu.
func (s *store) recount() error {
	toEnd := s.awaitsTheEnd()
	next := int64(0) // what is in front of it was looked at
	gone := func(end int64) {
		for c := range s.known.ones(next, end) {
			s.unlearn(c)
		}
	}
	err := s.disk.scan(func(chunk int64) {
		gone(chunk)
		if toEnd {
			s.learn(chunk)
		}
		next = chunk + 1
	})
	if err != nil {
		return err
	}
	gone(s.chunks)
	if toEnd {
		s.completed()
	}
	return nil
}

// storeUses writes down when regions were used, where that is news and the disk has room for it.
func (s *store) storeUses() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.disk.nowhere {
		return nil
	}
	for r, when := range s.used.used {
		if when == s.stored.at(r) {
			continue
		}
		if err := s.disk.putUse(r, when); err != nil {
			if full(err) {
				return nil // the order of eviction suffers, and nothing else
			}
			return err
		}
		s.stored.set(r, when)
	}
	return nil
}
