package blobcache

import "sync/atomic"

// A useTable has a time for each region, by the cache's clock; 0 if it was never used. It has memory for regions that
// were used, and some beside them, and not for all that a manifest says a blob has. It is read without a lock.
type useTable []atomic.Pointer[useBlock]

type useBlock [512]atomic.Int64

func newUseTable(regions int64) useTable {
	return make(useTable, ceil(regions, int64(len(useBlock{}))))
}

func (t useTable) at(region int64) int64 {
	b := t[region/int64(len(useBlock{}))].Load()
	if b == nil {
		return 0
	}
	return b[region%int64(len(useBlock{}))].Load()
}

func (t useTable) set(region, when int64) {
	at := &t[region/int64(len(useBlock{}))]
	if at.Load() == nil {
		at.CompareAndSwap(nil, new(useBlock))
	}
	at.Load()[region%int64(len(useBlock{}))].Store(when)
}

// used calls f for the regions that were, in order, until it returns false.
func (t useTable) used(f func(region, when int64) bool) {
	for i := range t {
		b := t[i].Load()
		if b == nil {
			continue
		}
		for j := range b {
			if when := b[j].Load(); when != 0 && !f(int64(i*len(b)+j), when) {
				return
			}
		}
	}
}

// latest is when one of the regions was used the last time.
func (t useTable) latest() (latest int64) {
	for _, when := range t.used {
		latest = max(latest, when)
	}
	return latest
}
