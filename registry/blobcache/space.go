package blobcache

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A space says how much may still be written to the directory, by all processes together. Its file has one number,
//
//	0  u64  bytes that are kept, or that some process has been granted
//	8  u64  the same, all bits inverted
//
// which is changed under the directory's lock only. A process is granted some MiB at a time, so that not every chunk
// costs a lock. What a killed process had been granted is lost until somebody counts: whoever finds the cache full
// looks how much the files really take, and adds what the processes that live may have been granted (see reserve): the
// number is so never too low, but for what other processes are just writing.
type space struct {
	c     *Cache
	file  *os.File
	limit int64 // 0: none
	free  int64 // to be left free in the file system

	mu      turn         // goes with the lock of the directory, which is the file's and not a goroutine's
	grant   int64        // how much is granted at a time; guarded by mu, as is what follows
	since   time.Time    // when we got the lock of the directory
	ways    int          // how often we gave way to others
	taking  turn         // guards what follows; who only counts reads the numbers without it
	left    atomic.Int64 // granted, not used yet
	writing atomic.Int64 // used, but may not be in the files yet
	refused time.Time    // until when there is no room
	vain    int          // how often in a row the lock of the directory could not be had
}

// A turn is a mutex for who may wait long while he has it, for another process: a clock of tests goes on meanwhile, as it
// does not while somebody waits for a sync.Mutex.
type turn chan struct{}

func newTurn() turn { return make(turn, 1) }

func (t turn) Lock()   { t <- struct{}{} }
func (t turn) Unlock() { <-t }

// use has n bytes of what is left be written, and unuse says that they are. The one is added to before the other is
// taken from, so that who counts meanwhile finds too much rather than too little.
func (s *space) use(n int64) {
	s.writing.Add(n)
	s.left.Add(-n)
}

func (s *space) unuse(n int64, kept bool) {
	if !kept {
		s.left.Add(n)
	}
	s.writing.Add(-n)
}

const (
	defaultShare   = 10 // per cent of the file system
	defaultMost    = 20 << 30
	defaultMinFree = 1 << 30
	usualGrant     = 4 << 20
	grantShare     = 16 // of the limit is granted at a time, if that is less, and by as many processes less of it
	// workFor is how long the directory's lock is held by who has much to do, and restFor how long it is then left to
	// others, who try each millisecond.
	workFor = 50 * time.Millisecond
	restFor = 5 * time.Millisecond
	// dirPatience is how long somebody may hold the directory's lock: who holds it longer is stopped, or has a disk
	// that does not answer. Readers do not wait so long for what they can do without.
	dirPatience   = 10 * time.Second
	grantPatience = time.Second
	// refusedFor is how long it is believed that there is no room, or that the lock cannot be had; after mostVain tries
	// in vain, each of them as long as many others would have worked and rested, it is longFor.
	refusedFor = time.Second
	longFor    = time.Minute
	mostVain   = 5
	// mostTries is how often room is made for a grant, where others take it away meanwhile.
	mostTries = 3
)

// ErrNoRoom says that what was fetched cannot be kept: the cache or its disk is full of what is in use.
var ErrNoRoom = errors.New("the cache has no room beside what is in use")

var errNobody = errors.New("another process does not let go of the lock of the directory")

// errLost says that who gave way did not get the lock of the directory back.
var errLost = errors.New("lost the lock")

// anyTime is when what may be evicted was used.
const anyTime int64 = math.MaxInt64

func newSpace(c *Cache) (*space, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(c.dir.Fd()), &st); err != nil {
		return nil, fmt.Errorf("statfs %s: %w", c.dir.Name(), err)
	}
	s := &space{c: c, mu: newTurn(), taking: newTurn()}
	s.limit, s.free = c.options.limits(st)
	var err error
	if s.file, err = c.openPrivate("space", unix.O_CREAT); err != nil {
		return nil, err
	}
	if err := s.register(); err != nil {
		return nil, errors.Join(err, s.file.Close())
	}
	return s, nil
}

// limits are how much is kept on a file system, 0 for all, and how much is left free there.
func (o Options) limits(st unix.Statfs_t) (limit, free int64) {
	total := int64(st.Blocks) * st.Frsize
	limit, free = o.MaxBytes, o.MinFree
	if limit == 0 {
		limit = min(total/100*defaultShare, defaultMost)
	}
	if free == 0 {
		free = min(total/20, defaultMinFree)
	}
	return max(limit, 0), free
}

// MinFree is how many bytes of the directory's file system are left free; negative if there is no such limit.
func (c *Cache) MinFree() int64 { return c.space.free }

// register makes this process one of those that live. The first one counts.
func (s *space) register() error {
	return s.locked(context.Background(), func() error {
		for {
			err := lock(s.file, unix.F_WRLCK, lockProcess+rand.Int64N(1<<20))
			if errors.Is(err, errLocked) {
				continue // a process has this number
			}
			if err != nil {
				return err
			}
			break
		}
		others, err := s.others()
		s.grant = s.share(others + 1)
		if err != nil || others > 0 {
			return err
		}
		if err := s.count(); !full(err) {
			return err
		}
		return nil // who wants to write will find out
	})
}

// share is how much a process is granted at a time when so many have the cache open: so little that all together do not
// have what a small cache should keep.
func (s *space) share(processes int64) int64 {
	if s.limit == 0 {
		return usualGrant
	}
	return min(usualGrant, max(s.limit/grantShare/processes, MinChunkSize))
}

// reserve is the most that so many other processes have been granted and not used. Each got its last grant when those
// lived that live now and had come before it, and perhaps more of them: so the one that came first has a grant for one
// process at most, the second one for two, and so on. Of nobody more is left than a grant.
func (s *space) reserve(others int64) (sum int64) {
	for i := range others {
		sum += s.share(i + 1)
	}
	return sum
}

// full says that an error is a full disk's.
func full(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// others is how many processes have the cache open beside this one.
func (s *space) others() (int64, error) { return othersHold(s.file, lockProcess, 1<<20) }

// locked calls f with the lock of the directory.
func (s *space) locked(ctx context.Context, f func() error) error {
	return s.lockedWithin(ctx, dirPatience, f)
}

func (s *space) lockedWithin(ctx context.Context, limit time.Duration, f func() error) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := lockWithin(ctx, s.file, unix.F_WRLCK, lockDir, limit); err != nil {
		return fmt.Errorf("directory %s: %w", s.c.dir.Name(), err)
	}
	defer func() { err = errors.Join(err, lock(s.file, unix.F_UNLCK, lockDir)) }()
	s.since = time.Now()
	return f()
}

// giveWay lets others have the lock of the directory for a moment, if we have had it for a while: whoever has more to do
// calls it between two steps. What the lock guards may be another then. With an error, which is errLost, the lock is no
// longer ours, and nothing that it guards may be touched.
func (s *space) giveWay() error {
	if time.Since(s.since) < workFor {
		return nil
	}
	err := lock(s.file, unix.F_UNLCK, lockDir)
	s.mu.Unlock()
	if err == nil {
		err = pause(s.c.ctx, restFor)
	}
	s.mu.Lock()
	if err == nil {
		err = lockWithin(s.c.ctx, s.file, unix.F_WRLCK, lockDir, dirPatience)
	}
	if err != nil {
		return fmt.Errorf("directory %s: %w: %w", s.c.dir.Name(), errLost, err)
	}
	s.since = time.Now()
	s.ways++
	return nil
}

// take makes n bytes ours to write, or says why there is no room for them. Only what was last used before a time, by
// the cache's clock, is evicted for that.
func (s *space) take(n, before int64) error {
	s.taking.Lock()
	defer s.taking.Unlock()
	if s.left.Load() >= n {
		s.use(n)
		return nil
	}
	if time.Now().Before(s.refused) {
		return ErrNoRoom
	}
	err := s.lockedWithin(s.c.ctx, grantPatience, func() error {
		more := max(n, s.grant)
		if err := s.refill(more, before); err != nil {
			return err
		}
		s.left.Add(more)
		return nil
	})
	if errors.Is(err, errLocked) {
		return s.unanswered()
	}
	s.vain = 0
	if err != nil {
		if before == anyTime { // else there may be room for others
			s.refused = time.Now().Add(refusedFor)
		}
		return err
	}
	s.use(n)
	return nil
}

// unanswered has nobody ask for room for some time, since the lock of the directory could not be had: each of those who
// ask waits for it. Who works lets go of it again and again; but one may be stopped.
func (s *space) unanswered() error {
	s.vain++
	wait := refusedFor
	if s.vain >= mostVain {
		wait = longFor
	}
	s.refused = time.Now().Add(wait)
	return fmt.Errorf("%w: %w", ErrNoRoom, errNobody)
}

// wrote says that n bytes that were taken are in a file now, or were not written after all.
func (s *space) wrote(n int64, kept bool) {
	s.taking.Lock()
	defer s.taking.Unlock()
	s.unuse(n, kept)
}

// refill grants n bytes, and makes room for them where there is none. The caller has the directory's lock.
func (s *space) refill(n, before int64) error {
	used, ok := s.read()
	if !ok || s.limit > 0 && used+n > s.limit {
		if err := s.count(); err != nil {
			return err
		}
		used, _ = s.read()
	}
	short, err := s.short(used, n)
	for tries := 1; err == nil && short > 0; tries++ {
		alone, lost := s.makeRoom(short, n, before)
		if lost != nil {
			return lost
		}
		used, _ = s.read()
		short, err = s.short(used, n)
		if alone || tries == mostTries {
			break
		}
	}
	if err != nil {
		return err
	}
	if short > 0 {
		return ErrNoRoom
	}
	return s.write(used + n)
}

// makeRoom evicts what is short for n bytes, and some more, so that this is not done for each grant. It says whether nobody
// else had the lock of the directory meanwhile; the error is errLost.
func (s *space) makeRoom(short, n, before int64) (alone bool, err error) {
	ways := s.ways
	_, err = s.c.evictUsed(short+s.limit/64, false, before, func() bool {
		used, _ := s.read()
		short, err := s.short(used, n)
		return err == nil && short <= 0
	})
	if errors.Is(err, errLost) {
		return false, err
	}
	if err != nil {
		s.c.options.Logger.Warn("the cache cannot evict; it may keep more than it should", "cache", s.c.dir.Name(), "err", err)
	}
	return s.ways == ways, nil
}

// short is how much is to be evicted before n bytes can be granted.
func (s *space) short(used, n int64) (int64, error) {
	var short int64
	if s.limit > 0 {
		short = used + n - s.limit
	}
	if s.free > 0 {
		var st unix.Statfs_t
		if err := unix.Fstatfs(int(s.c.dir.Fd()), &st); err != nil {
			return 0, fmt.Errorf("statfs %s: %w", s.c.dir.Name(), err)
		}
		short = max(short, s.free+n-int64(st.Bavail)*st.Frsize)
	}
	return short, nil
}

// count looks how much the files take. The caller has the directory's lock.
func (s *space) count() error {
	mine := s.left.Load() + s.writing.Load() // before the files are looked at: what gets there meanwhile counts twice
	sum, err := s.c.occupied()
	if err != nil {
		return err
	}
	others, err := s.others()
	if err != nil {
		return err
	}
	s.grant = s.share(others + 1)
	return s.write(sum + s.reserve(others) + mine)
}

func (s *space) read() (used int64, ok bool) {
	var b [16]byte
	if _, err := s.file.ReadAt(b[:], 0); err != nil {
		return 0, false
	}
	n, inverted := binary.LittleEndian.Uint64(b[:]), binary.LittleEndian.Uint64(b[8:])
	return int64(n), n == ^inverted && n < 1<<62
}

func (s *space) write(used int64) error {
	var b [16]byte
	binary.LittleEndian.PutUint64(b[:], uint64(used))
	binary.LittleEndian.PutUint64(b[8:], ^uint64(used))
	_, err := s.file.WriteAt(b[:], 0)
	return err
}

// less says that bytes were given back by who has the directory's lock.
func (s *space) less(freed int64) error {
	used, ok := s.read()
	if !ok || freed == 0 {
		return nil // the next one counts
	}
	return s.write(max(used-freed, 0))
}

// close gives back what was granted and not used.
func (s *space) close() error {
	s.taking.Lock()
	left := s.left.Swap(0)
	s.taking.Unlock()
	var err error
	if left > 0 {
		err = s.locked(context.Background(), func() error { return s.less(left) })
		if errors.Is(err, errLocked) || full(err) {
			err = nil // it is found by the next one who counts
		}
	}
	return errors.Join(err, s.file.Close())
}
