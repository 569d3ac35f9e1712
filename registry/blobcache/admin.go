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
	Present   int64     `json:"present"`  // bytes of the blob that are here
	Occupied  int64     `json:"occupied"` // bytes of the file system that they take
	Used      time.Time `json:"used"`     // the last time that it was read, if it was; some seconds may be missing
	InUse     bool      `json:"in_use"`   // a process has it open
}

// Complete says whether all of the blob is here.
func (k Kept) Complete() bool { return k.Present == k.Size }

// A Usage is what the directory takes of its file system.
type Usage struct {
	Directory string `json:"directory"`
	Blobs     int    `json:"blobs"`
	Occupied  int64  `json:"occupied"`
	Limit     int64  `json:"limit"`    // 0: none
	Free      int64  `json:"free"`     // of the file system, for us
	MinFree   int64  `json:"min_free"` // to be left free; 0: nothing
}

// eachFile opens the blobs of the directory, one after the other, which nobody removes meanwhile. What is no blob's
// file is skipped, and is an error in the end.
func (c *Cache) eachFile(f func(name string, d *disk) error) error {
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
			return err
		})
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed since
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, f(name, d), d.close())
	}
	return errors.Join(errs...)
}

// List says what is in the cache, by digest. A blob that came from several origins, or in several units, is there as
// often.
func (c *Cache) List() ([]Kept, error) {
	list := []Kept{}
	err := c.eachFile(func(_ string, d *disk) error {
		k, err := d.kept()
		list = append(list, k)
		return err
	})
	return list, err
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
	if len(uses) > 0 && slices.Max(uses) > 0 {
		k.Used = time.UnixMicro(slices.Max(uses)).UTC().Truncate(time.Second)
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
			if of, _, _ := parseFileName(name); of == digest || strings.HasPrefix(of, digest+"+") {
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
	f, err := c.openPrivate(name, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	size, err := occupied(f)
	if err != nil {
		return 0, err
	}
	err = c.unlink(f, name)
	if errors.Is(err, errLocked) {
		return 0, fmt.Errorf("blob %s is in use; unmount it first", name)
	}
	if err != nil {
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
}

// Verify reads every chunk that is kept and compares it with its checksum, and makes absent what is damaged. It tells
// each blob's result to report. That a chunk has its checksum says that it is what was fetched, and not whether that
// was what the registry has: that is for OpenOptions.Verify.
func (c *Cache) Verify(ctx context.Context, report func(Check) error) error {
	return c.eachFile(func(_ string, d *disk) error {
		check := Check{Digest: d.digest, ChunkSize: d.unit}
		for r := range d.regions {
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
	})
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
