package blobcache

import (
	"bytes"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// What is written lies in the kernel's memory first, and gets to the disk when the kernel finds the time. Should the disk
// not take it then (a thin volume, a loop device on a full file system, a bad sector), neither write(2) nor read(2) ever
// says so: the page is as good as written, is read from as long as it stays in memory, and is zeros, or what was there
// before, when the kernel has used its memory for something else. Only who asks is told, once for each open file, and
// not of what. So somebody asks: see lost.
//
// What such a file has in memory proves nothing, not even where a checksum is right. So it is dropped, and all is read from
// the disk, checked and verified before its next use:
//
//	the kernel says it ──► doubt: no chunk is present. What is read is checked, and goes to who waits for it as a copy
//	  10 s later ────────► the pages are dropped: by now all processes have asked, and none reads what is no page any more
//	  at the next look ──► once more, for a page that somebody just reads cannot be dropped
//	                       and the doubt ends
//
// Who opens the file meanwhile is told nothing by the kernel, which has told somebody. So who doubts holds a lock, and
// others doubt as long as somebody holds it.

const (
	// lookEvery is how often the kernel is asked, as long as there is something that it may not have written.
	lookEvery = time.Second
	// dirtyFor is for how long that is: what is dirty is written after 30 s, unless somebody has told the kernel
	// otherwise. After that it is asked as often as the house is kept.
	dirtyFor = time.Minute
	// noticeFor is how long it takes all processes to have asked, and as long again.
	noticeFor = 2 * houseEvery
	// dropTimes is how often pages are dropped.
	dropTimes = 2
	// diskRest is for how long nothing is written to a disk that did not keep what it was given.
	diskRest = time.Minute
)

var errNotKept = errors.New("the disk did not keep what was written lately")

// Lost gives the error of a write-back that failed since the file was opened, or since somebody asked the last time: to
// wait for what is being written behind a place where nothing ever is takes no time, and the error is the whole file's.
// See sync_file_range(2) and, in the kernel, file_check_and_advance_wb_err.
func (f osFile) Lost(behind int64) error {
	return unix.SyncFileRange(int(f.Fd()), behind, 1, unix.SYNC_FILE_RANGE_WAIT_BEFORE)
}

// Drop has the kernel forget the pages that are as they should be on the disk.
func (f osFile) Drop() error { return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) }

// lost says that the disk did not keep something of the file, or that this cannot be known.
func (d *disk) lost() (why, err error) {
	err = d.file.Lost((ceil(d.end, baseAlign) + 1) * baseAlign) // no page, however large, reaches there
	switch {
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EPERM), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return nil, fmt.Errorf("ask whether the disk keeps what was written to %s: %w", d.handle.Name(), err)
	case err != nil:
		return fmt.Errorf("write back %s: %w", d.handle.Name(), err), nil
	}
	return nil, nil
}

// watchDisk asks until the cache is closed. It is not done with the rest of the house: a disk that hangs may keep it.
func (c *Cache) watchDisk() {
	said := ""
	for pause(c.ctx, c.nextLook()) == nil {
		var err error
		for _, s := range c.hold() {
			err = errors.Join(err, s.checkDisk(), c.release(s))
		}
		if err != nil && err.Error() != said {
			said = err.Error()
			c.options.Logger.Warn("it cannot be found out whether the disk keeps what the cache writes; --paranoid compares at each read", "cache", c.dir.Name(), "err", err)
		}
	}
}

// nextLook is when to ask again.
func (c *Cache) nextLook() time.Duration {
	if time.Since(time.UnixMicro(c.took.Load())) < dirtyFor {
		return lookEvery
	}
	return houseEvery
}

// rests says whether nothing is to be written since the disk would not keep it.
func (c *Cache) rests() bool { return time.Now().UnixMicro() < c.rest.Load() }

// checkDisk believes nothing any more of a file of which the disk did not keep something, until it was dropped. Only
// newStore and, after that, watchDisk call it.
func (s *store) checkDisk() error {
	why, err := s.disk.lost()
	if err != nil {
		return err
	}
	others, err := othersHold(s.disk.handle, lockDoubt, 1)
	if why != nil {
		s.cache.rest.Store(time.Now().Add(diskRest).UnixMicro())
		s.dropsLeft, s.dropAt = dropTimes, time.Now().Add(noticeFor)
		err = errors.Join(err, lock(s.disk.handle, unix.F_RDLCK, lockDoubt))
		s.cache.options.Logger.Warn("the disk did not keep what the cache wrote; all of it is checked again and, where it is wrong, fetched again; nothing is written for a minute", "blob", s.digest, "err", why)
	}
	if why != nil || others > 0 {
		s.doubt()
	}
	if s.dropsLeft > 0 && !time.Now().Before(s.dropAt) {
		err = errors.Join(err, s.disk.file.Drop())
		if s.dropsLeft--; s.dropsLeft == 0 {
			err = errors.Join(err, lock(s.disk.handle, unix.F_UNLCK, lockDoubt))
		}
	}
	if s.dropsLeft == 0 && others == 0 {
		s.trust()
	}
	if err != nil {
		return fmt.Errorf("doubt %s: %w", s.disk.handle.Name(), err)
	}
	return nil
}

// doubt has no chunk present from now on.
func (s *store) doubt() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.doubting {
		return
	}
	s.doubting = true
	s.present.reset()
	s.passed.reset()
	s.fresh.reset()
	s.generation.Add(1)
	s.doubts.Add(1)
}

// trust ends the doubt. What is in flight may have been read, or written, before pages were dropped.
func (s *store) trust() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.doubting {
		return
	}
	s.doubting = false
	for _, pend := range s.inflight {
		pend.doubtful = true
	}
}

// isDoubtful says whether a chunk that was written or read is not to be present, since what of it was in memory then may
// not be on the disk. It goes to who waits for it. The caller holds s.mu.
func (s *store) isDoubtful(chunk int64, pend *pending, data []byte) bool {
	if !s.doubting && !pend.doubtful {
		return false
	}
	pend.data, pend.unkept = bytes.Clone(data), fmt.Errorf("%w: %w", ErrNoRoom, errNotKept)
	s.fresh.clear(chunk)
	return true
}
