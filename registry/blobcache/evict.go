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

// A tenant is a blob of the directory: open in this process, or for this eviction only.
type tenant struct {
	name  string
	store *store // nil: not open in this process
	disk  *disk
}

// evict gives back at least want bytes if that can be done, regions that were not read for longest first, and says how
// many it were. Regions that somebody reads, or fetches into, stay, and so do those that another process may read. With
// files, the files of blobs of which nothing is here go, too. The caller has the directory's lock.
func (c *Cache) evict(want int64, files bool) (freed int64, err error) {
	return c.evictUsed(want, files, anyTime)
}

// evictUsed is evict for regions that were last read before a time.
func (c *Cache) evictUsed(want int64, files bool, before int64) (freed int64, err error) {
	tenants, err := c.tenants()
	defer func() {
		for _, t := range tenants {
			err = errors.Join(err, c.leave(t))
		}
	}()
	var victims []victim
	for _, t := range tenants {
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
	for _, v := range victims {
		if freed >= want || v.used >= before {
			break
		}
		gone, evictErr := v.of.evict(v.region)
		if gone > 0 {
			c.counters.evictions.Add(1)
			c.counters.evictedBytes.Add(gone)
		}
		freed, err = freed+gone, errors.Join(err, evictErr)
	}
	if files || freed < want {
		gone, fileErr := c.removeEmpty(tenants)
		freed, err = freed+gone, errors.Join(err, fileErr)
	}
	return freed, err
}

// tenants opens every blob of the directory.
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
			tenants = append(tenants, &tenant{store: s, disk: s.disk})
			continue
		}
		name := fileName(s.disk.name, s.chunkSize)
		mine[name] = append(mine[name], s)
	}
	for _, name := range names {
		for _, s := range mine[name] {
			tenants = append(tenants, &tenant{name: name, store: s, disk: s.disk})
		}
		if len(mine[name]) > 0 {
			delete(mine, name)
			continue
		}
		d, err := c.openFound(name)
		if err != nil {
			errs = append(errs, c.removeBroken(name, err))
			continue
		}
		tenants = append(tenants, &tenant{name: name, disk: d})
	}
	for _, stores := range mine { // they are kept nowhere
		for _, s := range stores {
			errs = append(errs, c.release(s))
		}
	}
	return tenants, errors.Join(errs...)
}

// removeBroken removes what is no blob's file though it has the name of one, unless somebody uses it.
func (c *Cache) removeBroken(name string, why error) error {
	if errors.Is(why, errLocked) || errors.Is(why, fs.ErrNotExist) {
		return nil
	}
	f, err := c.openPrivate(name, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := c.unlink(f, name); err != nil && !errors.Is(err, errLocked) {
		return err
	}
	return nil
}

// leave lets go of a tenant.
func (c *Cache) leave(t *tenant) error {
	if t.store != nil {
		return c.release(t.store)
	}
	return t.disk.close()
}

// victims lists the regions of a blob in which there are chunks.
func (t *tenant) victims() ([]victim, error) {
	d := t.disk
	uses, err := d.lastUses()
	if err != nil {
		return nil, err
	}
	var list []victim
	err = d.scan(func(chunk int64) {
		r := chunk / d.perRegion
		if len(list) == 0 || list[len(list)-1].region != r {
			used := uses[r]
			if t.store != nil {
				used = t.store.used[r].Load()
			}
			list = append(list, victim{of: t, region: r, used: used})
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
	if err := t.disk.lockRegion(unix.F_WRLCK, region); err != nil {
		return 0, ignore(err, errLocked)
	}
	freed, err = t.disk.empty(region)
	return freed, errors.Join(err, t.disk.lockRegion(unix.F_UNLCK, region))
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
		left := 0
		if scanErr := t.disk.scan(func(int64) { left++ }); scanErr != nil || left > 0 {
			err = errors.Join(err, scanErr)
			continue
		}
		size, statErr := t.disk.occupied()
		switch removeErr := c.unlink(t.disk.handle, t.name); {
		case removeErr == nil:
			freed += size
		default:
			err = errors.Join(err, statErr, ignore(removeErr, errLocked))
		}
	}
	return freed, err
}

// evict gives back a region of an open blob. Readers of chunks that are present hold no lock: the generation that goes
// up before the hole is made tells them that what they read may be the hole.
func (s *store) evict(region int64) (freed int64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.busy[region] > 0 {
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
	if s.busy[region] > 0 {
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
