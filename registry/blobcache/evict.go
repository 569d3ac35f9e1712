package blobcache

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// occupied is how much of the file system the blobs take, those included that have no name any more and that this
// process has open. The caller has the directory's lock.
func (c *Cache) occupied() (int64, error) {
	names, err := c.names()
	if err != nil {
		return 0, err
	}
	var sum int64
	for _, name := range names {
		var st unix.Stat_t
		err := unix.Fstatat(int(c.dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, &fs.PathError{Op: "stat", Path: filepath.Join(c.dir.Name(), name), Err: err}
		}
		sum += st.Blocks * 512
	}
	orphans, err := c.orphaned()
	return sum + orphans, err
}

// A victim is a region that may be evicted.
type victim struct {
	of     *tenant
	region int64
	used   int64
	bytes  int64
}

// A tenant is a blob of the directory. There may be more of them than files may be open at a time.
type tenant struct {
	cache *Cache
	name  string
	store *store // nil: not open in this process
}

// evict gives back at least want bytes if that can be done, regions that were not read for longest first, and says how
// many it were. Regions that somebody reads, or fetches into, stay, and so do those that another process may read. With
// files, the files of blobs of which nothing is here go, too. The caller has the directory's lock, and others may have it
// meanwhile: "space" says at each step what was given back. With errLost, the caller does not have it any more.
func (c *Cache) evict(want int64, files bool) (freed int64, err error) {
	return c.evictUsed(want, files, anyTime, func() bool { return false })
}

// evictUsed is evict for regions that were last read before a time. Where others had the lock meanwhile, who may have made
// room, too, enough says whether there is no need for more.
func (c *Cache) evictUsed(want int64, files bool, before int64, enough func() bool) (freed int64, err error) {
	tenants, err := c.tenants()
	defer func() {
		for _, t := range tenants {
			if t.store != nil {
				err = errors.Join(err, c.release(t.store))
			}
		}
	}()
	victims, scanErr := c.victims(tenants)
	if err = errors.Join(err, scanErr); errors.Is(err, errLost) {
		return 0, err
	}
	ways := c.space.ways
	for _, v := range victims {
		if freed >= want || v.used >= before {
			break
		}
		if lost := c.space.giveWay(); lost != nil {
			return freed, errors.Join(err, lost)
		}
		if ways != c.space.ways && enough() {
			return freed, err
		}
		ways = c.space.ways
		gone, evictErr := v.evict()
		if gone > 0 {
			c.counters.evictions.Add(1)
			c.counters.evictedBytes.Add(gone)
		}
		freed, err = freed+gone, errors.Join(err, evictErr, c.space.less(gone))
	}
	if files || freed < want {
		gone, fileErr := c.removeEmpty(tenants)
		freed, err = freed+gone, errors.Join(err, fileErr)
	}
	return freed, err
}

// victims are the regions of the blobs in which there are chunks, those first that were not read for longest.
func (c *Cache) victims(tenants []*tenant) (victims []victim, err error) {
	for _, t := range tenants {
		if lost := c.space.giveWay(); lost != nil {
			return nil, errors.Join(err, lost)
		}
		of, scanErr := t.victims()
		victims, err = append(victims, of...), errors.Join(err, scanErr)
	}
	slices.SortStableFunc(victims, func(a, b victim) int {
		switch {
		case a.used < b.used:
			return -1
		case a.used > b.used:
			return 1
		}
		return 0
	})
	return victims, err
}

// evict gives back the region, unless it was read since it was found.
func (v *victim) evict() (freed int64, err error) {
	if s := v.of.store; s != nil && s.used.at(v.region) > v.used {
		return 0, nil
	}
	return v.of.evict(v.region)
}

// tenants are all blobs of the directory, and those that are open here and have no name any more.
func (c *Cache) tenants() ([]*tenant, error) {
	names, err := c.names()
	if err != nil {
		return nil, err
	}
	mine := map[string][]*store{}
	var tenants []*tenant
	var errs []error
	for _, s := range c.hold() {
		if s.disk.removed() {
			tenants = append(tenants, &tenant{cache: c, store: s})
			continue
		}
		name := fileName(s.disk.name, s.chunkSize)
		mine[name] = append(mine[name], s)
	}
	for _, name := range names {
		for _, s := range mine[name] {
			tenants = append(tenants, &tenant{c, name, s})
		}
		if len(mine[name]) == 0 {
			tenants = append(tenants, &tenant{cache: c, name: name})
		}
		delete(mine, name)
	}
	for _, stores := range mine { // they are kept nowhere
		for _, s := range stores {
			errs = append(errs, c.release(s))
		}
	}
	return tenants, errors.Join(errs...)
}

// open calls f with the file of a blob that is not open in this process, unless that is gone, or about to go.
func (t *tenant) open(f func(d *disk) error) error {
	d, err := t.cache.openFound(t.name)
	if errors.Is(err, errLocked) || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(f(d), d.close())
}

// victims lists the regions of a blob in which there are chunks.
func (t *tenant) victims() (list []victim, err error) {
	if t.store != nil {
		return t.regions(t.store.disk, t.store.lastUse())
	}
	err = t.open(func(d *disk) error {
		uses, err := d.lastUses()
		if err == nil {
			list, err = t.regions(d, uses.at)
		}
		return err
	})
	if errors.As(err, new(*headerError)) {
		err = nil // see removeEmpty
	}
	return list, err
}

func (t *tenant) regions(d *disk, used func(region int64) int64) (list []victim, err error) {
	err = d.scan(func(chunk int64) {
		r := chunk / d.perRegion
		if len(list) == 0 || list[len(list)-1].region != r {
			list = append(list, victim{of: t, region: r, used: used(r)})
		}
		list[len(list)-1].bytes += d.chunkLen(chunk)
	})
	return list, err
}

// evict gives back a region, unless somebody has a use for it.
func (t *tenant) evict(region int64) (freed int64, err error) {
	if t.store != nil {
		return t.store.evict(region)
	}
	err = t.open(func(d *disk) error {
		if err := d.lockRegion(unix.F_WRLCK, region); err != nil {
			return ignore(err, errLocked)
		}
		freed, err = d.empty(region)
		return errors.Join(err, d.lockRegion(unix.F_UNLCK, region))
	})
	return freed, err
}

func ignore(err, harmless error) error {
	if errors.Is(err, harmless) {
		return nil
	}
	return err
}

// empty drops the chunks of a region, and says how many bytes they were. The caller has the region's exclusive lock.
func (d *disk) empty(region int64) (freed int64, err error) {
	first, end := d.region(region)
	for chunk := range d.present(first, end) {
		freed += d.chunkLen(chunk)
	}
	if err := d.erase(first, end); err != nil {
		return 0, err
	}
	if err := d.punch(first, end); err != nil {
		return 0, err
	}
	return freed, nil
}

// removeEmpty removes the files of blobs of which nothing is here and which nobody has open.
func (c *Cache) removeEmpty(tenants []*tenant) (freed int64, err error) {
	for _, t := range tenants {
		if t.store != nil {
			continue
		}
		if lost := c.space.giveWay(); lost != nil {
			return freed, errors.Join(err, lost)
		}
		gone, emptyErr := t.removeEmpty()
		if errors.As(emptyErr, new(*headerError)) {
			gone, emptyErr = c.removeUnused(t.name) // nothing of it is used
			emptyErr = ignore(ignore(emptyErr, errLocked), fs.ErrNotExist)
		}
		freed, err = freed+gone, errors.Join(err, emptyErr, c.space.less(gone))
	}
	return freed, err
}

func (t *tenant) removeEmpty() (freed int64, err error) {
	err = t.open(func(d *disk) error {
		left := 0
		if err := d.scan(func(int64) { left++ }); err != nil || left > 0 {
			return err
		}
		size, err := d.occupied()
		if err == nil {
			err = t.cache.unlink(d.handle, t.name)
		}
		if err == nil {
			freed = size
		}
		return ignore(err, errLocked)
	})
	return freed, err
}

// evict gives back a region of an open blob. Readers of chunks that are present hold no lock: the generation that goes
// up before the hole is made tells them that what they read may be the hole.
func (s *store) evict(region int64) (freed int64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.isBusy(region) {
		return 0, nil
	}
	if err := s.disk.lockRegion(unix.F_WRLCK, region); err != nil {
		return 0, ignore(err, errLocked)
	}
	s.forgetRegion(region)
	first, end := s.disk.region(region)
	for c := first; c < end; c++ {
		s.unlearn(c)
	}
	freed, err = s.disk.empty(region)
	return freed, errors.Join(err, s.disk.lockRegion(unix.F_UNLCK, region))
}

// letGo lets others evict a region that nobody has read for a while. The caller holds s.mu.
func (s *store) letGo(region int64) error {
	if s.isBusy(region) {
		return nil
	}
	s.forgetRegion(region)
	return s.disk.lockRegion(unix.F_UNLCK, region)
}

// forgetRegion makes no chunk of the region present: whoever wants one looks at the disk again. The caller holds s.mu,
// and nobody waits for a chunk of the region.
func (s *store) forgetRegion(region int64) {
	first, end := s.disk.region(region)
	for c := first; c < end; c++ {
		s.present.clear(c)
		s.fresh.clear(c)
	}
	s.leased.clear(region)
	s.generation.Add(1)
}

// lease makes sure that no other process punches holes in the region. The caller holds s.mu and has made it busy.
func (s *store) lease(region int64) error {
	if s.leased.has(region) {
		return nil
	}
	if err := s.disk.lockRegion(unix.F_RDLCK, region); err != nil {
		return fmt.Errorf("region %d: %w", region, err)
	}
	s.leased.set(region)
	return nil
}
