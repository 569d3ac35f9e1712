package blobcache

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A Kept is what the directory has of one blob.
type Kept struct {
	Digest    string    `json:"digest"`
	Size      int64     `json:"size"`
	ChunkSize int64     `json:"chunk_size"`
	Present   int64     `json:"present"`       // bytes of the blob that are here
	Occupied  int64     `json:"occupied"`      // bytes of the file system that they take
	Used      time.Time `json:"used,omitzero"` // the last time that it was read, if it was; some seconds may be missing
	InUse     bool      `json:"in_use"`        // a process has it open
	// Damaged says that the file has the name of the blob's, and is none: nothing of it is used, nor is its size known.
	Damaged bool `json:"damaged"`
}

// Complete says whether all of the blob is here.
func (k Kept) Complete() bool { return k.Present == k.Size && !k.Damaged }

// A Usage is what the directory takes of its file system.
type Usage struct {
	Directory string `json:"directory"`
	Blobs     int    `json:"blobs"`
	Occupied  int64  `json:"occupied"`
	Limit     int64  `json:"limit"`    // 0: none
	Free      int64  `json:"free"`     // of the file system, for us
	MinFree   int64  `json:"min_free"` // to be left free; 0: nothing
}

// eachFile opens the blobs of the directory, one after the other, which nobody removes meanwhile. It calls broken for
// what has the name of a blob's file and is none, with the directory's lock. What cannot be opened is skipped, and is an
// error in the end.
func (c *Cache) eachFile(f func(d *disk) error, broken func(name string) error) error {
	var names []string
	err := c.space.locked(c.ctx, func() (err error) {
		names, err = c.names()
		return err
	})
	slices.Sort(names)
	errs := []error{err}
	for _, name := range names {
		var d *disk
		err := c.space.locked(c.ctx, func() (err error) {
			d, err = c.openFound(name)
			if errors.As(err, new(*headerError)) {
				err = broken(name)
			}
			return err
		})
		if err != nil {
			errs = append(errs, ignore(err, fs.ErrNotExist)) // removed since
		}
		if d != nil {
			errs = append(errs, f(d), d.close())
		}
	}
	return errors.Join(errs...)
}

// List says what is in the cache, by digest. A blob that came from several origins, or in several units, is there as
// often.
func (c *Cache) List() ([]Kept, error) {
	list := []Kept{}
	add := func(k Kept, err error) error {
		list = append(list, k)
		return err
	}
	err := c.eachFile(
		func(d *disk) error { return add(d.kept()) },
		func(name string) error { return add(c.keptBroken(name)) },
	)
	return list, err
}

// keptBroken is what can be said of a file that is none of a blob's.
func (c *Cache) keptBroken(name string) (Kept, error) {
	l := namedLayout(name)
	k := Kept{Digest: l.digest, ChunkSize: l.unit, Damaged: true}
	f, err := c.openPrivate(name, 0)
	if err != nil {
		return k, err
	}
	defer f.Close()
	if k.Occupied, err = occupied(f); err != nil {
		return k, err
	}
	others, err := othersHold(f, lockOpen, 1)
	k.InUse = others > 0
	return k, err
}

// namedLayout is what the name of a blob's file says of it.
func namedLayout(file string) layout {
	name, unit, _ := parseFileName(file)
	digest, _, _ := strings.Cut(name, "+")
	return layout{name: name, digest: digest, unit: unit}
}

func (d *disk) kept() (k Kept, err error) {
	k = Kept{Digest: d.digest, Size: d.size, ChunkSize: d.unit}
	if k.Occupied, err = d.occupied(); err != nil {
		return k, err
	}
	if err := d.scan(func(chunk int64) { k.Present += d.chunkLen(chunk) }); err != nil {
		return k, err
	}
	uses, err := d.lastUses()
	if err != nil {
		return k, err
	}
	if latest := uses.latest(); latest > 0 {
		k.Used = time.UnixMicro(latest).UTC().Truncate(time.Second)
	}
	others, err := othersHold(d.handle, lockOpen, 1)
	k.InUse = others > 0
	return k, err
}

// Usage says how full the cache is.
func (c *Cache) Usage() (Usage, error) {
	u := Usage{Directory: filepath.Dir(c.dir.Name()), Limit: c.space.limit, MinFree: max(c.space.free, 0)}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(c.dir.Fd()), &st); err != nil {
		return u, fmt.Errorf("statfs %s: %w", c.dir.Name(), err)
	}
	u.Free = int64(st.Bavail) * st.Frsize
	return u, c.space.locked(c.ctx, func() error {
		names, err := c.names()
		if err != nil {
			return err
		}
		u.Blobs = len(names)
		u.Occupied, err = c.occupied()
		return err
	})
}

// UsageOfNone is the Usage of a directory that is not there yet: a cache in it would keep to these limits.
func UsageOfNone(dir string, o Options) (Usage, error) {
	u := Usage{Directory: dir}
	var st unix.Statfs_t
	at := filepath.Clean(dir)
	err := unix.Statfs(at, &st)
	for errors.Is(err, fs.ErrNotExist) && at != filepath.Dir(at) {
		at = filepath.Dir(at)
		err = unix.Statfs(at, &st)
	}
	if err != nil {
		return u, fmt.Errorf("statfs %s: %w", at, err)
	}
	u.Limit, u.MinFree = o.limits(st)
	u.MinFree, u.Free = max(u.MinFree, 0), int64(st.Bavail)*st.Frsize
	return u, nil
}

// Prune evicts what was not read for longest until no more than keep bytes are kept, and says how many it gave back.
// What is in use stays. Others go on meanwhile, and what they fetch comes on top.
func (c *Cache) Prune(keep int64) (freed int64, err error) {
	err = c.space.locked(c.ctx, func() error {
		before, err := c.occupied()
		if err != nil {
			return err
		}
		if freed, err = c.evict(before-keep, true); err != nil {
			return err
		}
		return c.space.count()
	})
	return freed, err
}

// Remove removes all of a blob, whatever let its bytes in, unless somebody has it open.
func (c *Cache) Remove(digest string) (freed int64, err error) {
	if err := checkDigest(digest); err != nil {
		return 0, err
	}
	found := false
	err = c.space.locked(c.ctx, func() error {
		names, err := c.names()
		errs := []error{err}
		for _, name := range names {
			if of, _, _ := parseFileName(name); strings.HasPrefix(of, digest+"+") {
				found = true
				n, err := c.removeFile(name)
				freed, errs = freed+n, append(errs, err)
			}
		}
		return errors.Join(append(errs, c.space.less(freed))...)
	})
	if err == nil && !found {
		err = fmt.Errorf("blob %s is not in the cache: %w", digest, fs.ErrNotExist)
	}
	return freed, err
}

func (c *Cache) removeFile(name string) (freed int64, err error) {
	freed, err = c.removeUnused(name)
	if errors.Is(err, errLocked) {
		err = fmt.Errorf("blob %s is in use; unmount it first", name)
	}
	return freed, err
}

// removeUnused removes a file, or says errLocked if somebody has it open. The caller has the directory's lock.
func (c *Cache) removeUnused(name string) (freed int64, err error) {
	f, err := c.openPrivate(name, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	size, err := occupied(f)
	if err != nil {
		return 0, err
	}
	if err := c.unlink(f, name); err != nil {
		return 0, err
	}
	return size, nil
}

// A Check is what Verify found of one blob.
type Check struct {
	Digest    string `json:"digest"`
	ChunkSize int64  `json:"chunk_size"`
	Chunks    int64  `json:"chunks"`  // that were checked
	Damaged   int64  `json:"damaged"` // of them; they are absent now
	Skipped   int64  `json:"skipped"` // regions that were being evicted
	// Broken says that the file has the name of the blob's, and is none: all of it is damage. It is removed now, unless
	// it is InUse.
	Broken bool `json:"broken"`
	InUse  bool `json:"in_use"`
}

// Verify reads every chunk that is kept and compares it with its checksum, and makes absent what is damaged; what is no
// blob's file any more it removes. It tells each blob's result to report. That a chunk has its checksum says that it is what was fetched, and not whether that
// was what the registry has: that is for OpenOptions.Verify.
func (c *Cache) Verify(ctx context.Context, report func(Check) error) error {
	var broken []Check
	err := c.eachFile(func(d *disk) error {
		check := Check{Digest: d.digest, ChunkSize: d.unit}
		filled, err := d.filled()
		if err != nil {
			return err
		}
		for _, r := range filled {
			if err := ctx.Err(); err != nil {
				return err
			}
			err := d.checkRegion(r, &check)
			if errors.Is(err, errLocked) {
				check.Skipped++
			} else if err != nil {
				return err
			}
		}
		return report(check)
	}, func(name string) error {
		check, err := c.clear(name)
		broken = append(broken, check)
		return err
	})
	errs := []error{err}
	for _, check := range broken {
		errs = append(errs, report(check))
	}
	return errors.Join(errs...)
}

// clear removes what is no blob's file though it has the name of one, unless somebody uses it. The caller has the
// directory's lock.
func (c *Cache) clear(name string) (Check, error) {
	l := namedLayout(name)
	check := Check{Digest: l.digest, ChunkSize: l.unit, Broken: true}
	freed, err := c.removeUnused(name)
	check.InUse = errors.Is(err, errLocked)
	return check, errors.Join(ignore(err, errLocked), c.space.less(freed))
}

// checkRegion checks the chunks of a region.
func (d *disk) checkRegion(region int64, check *Check) (err error) {
	if err := d.lockRegion(unix.F_RDLCK, region); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.lockRegion(unix.F_UNLCK, region)) }()
	p := make([]byte, d.unit)
	first, end := d.region(region)
	for chunk := range d.present(first, end) {
		there, err := d.load(chunk, p[:d.chunkLen(chunk)])
		if err == nil && there {
			check.Chunks++
		}
		if err == nil {
			continue
		}
		check.Chunks++
		check.Damaged++
		if err := d.condemn(chunk, p[:d.chunkLen(chunk)]); err != nil {
			return err
		}
	}
	return nil
}

// condemn makes a chunk absent that is damaged, if no other process is seeing to it. Its space is given back when the
// file is opened the next time.
func (d *disk) condemn(chunk int64, p []byte) error {
	if err := d.lockChunk(unix.F_WRLCK, chunk); err != nil {
		return ignore(err, errLocked)
	}
	var err error
	if _, loadErr := d.load(chunk, p); loadErr != nil {
		err = d.erase(chunk, chunk+1)
	}
	return errors.Join(err, d.lockChunk(unix.F_UNLCK, chunk))
}
