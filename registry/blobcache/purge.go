package blobcache

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Purge is for a blob that turned out to be wrong. It ends the blob's flights, as Close does but without waiting, and
// has every read of it fail from then on. The file loses its name, so that nobody who opens the blob later finds any of
// it: what others who have it open still read, or are just writing, goes with the last of them. What nobody reads is
// given back at once.
func (b *Blob) Purge() error {
	s := b.store
	s.mu.Lock()
	b.closed.Store(true)
	delete(s.blobs, b)
	s.mu.Unlock()
	b.cancel()
	err := s.cache.space.locked(s.cache.ctx, func() error {
		errs := []error{s.cache.unname(s.disk)}
		s.cache.mu.Lock()
		s.cache.disown(s)
		s.cache.mu.Unlock()
		filled, err := s.disk.filled()
		errs = append(errs, err)
		for _, r := range filled {
			if lost := s.cache.space.giveWay(); lost != nil {
				return errors.Join(append(errs, lost)...)
			}
			_, err := s.evict(r)
			errs = append(errs, err)
		}
		return errors.Join(append(errs, s.cache.space.count())...)
	})
	if err != nil {
		return fmt.Errorf("purge blob %s: %w", s.digest, err)
	}
	return nil
}

// unname removes the name of an open file, unless that is another file's by now. The caller has the directory's lock.
func (c *Cache) unname(d *disk) error {
	if d.nowhere {
		return nil
	}
	name := fileName(d.name, d.unit)
	var open, named unix.Stat_t
	if err := unix.Fstat(int(d.handle.Fd()), &open); err != nil {
		return &fs.PathError{Op: "stat", Path: d.handle.Name(), Err: err}
	}
	err := unix.Fstatat(int(c.dir.Fd()), name, &named, unix.AT_SYMLINK_NOFOLLOW)
	if err == nil && named.Dev == open.Dev && named.Ino == open.Ino {
		err = unix.Unlinkat(int(c.dir.Fd()), name, 0)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return &fs.PathError{Op: "remove", Path: filepath.Join(c.dir.Name(), name), Err: err}
	}
	return nil
}

// orphaned is how much the blobs take that are open here and have no name any more.
func (c *Cache) orphaned() (sum int64, err error) {
	for _, s := range c.hold() {
		if s.disk.removed() {
			n, statErr := s.disk.occupied()
			sum, err = sum+n, errors.Join(err, statErr)
		}
		err = errors.Join(err, c.release(s))
	}
	return sum, err
}
