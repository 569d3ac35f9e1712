package fusefs

import (
	"os"
	"slices"
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// surplusRead is the largest request that is taken for a random read. One of a
// stream is larger, or will be soon, and the kernel asks for the rest itself.
const surplusRead = 32 << 10

// surplusExtent is the least extent of which surplus is given away. That of a
// smaller one does not make up for the call: it is decoded as quickly again.
const surplusExtent = 32 << 10

// surplusStores is how many goroutines give surplus away at once. What there is
// beyond that is left to the image's own cache.
const surplusStores = 4

// A file that is read at random a lot, a page at a time, is read in windows: a
// request costs more than to decode the rest of its window and store that, too. It
// is a lot when there were so many reads that a quarter of the windows has had one.
const (
	window     = 64 << 10
	windowRead = 4 << 10 // the largest request that is one of those
	denseReads = 16      // fewer never are a lot
	denseShare = 4
	denseFiles = 16 // as many are watched
)

// A surplus gives to the kernel's page cache what had to be decoded for a small
// read beside what was asked for. Else random reads of a file in large pclusters
// would have each decoded again and again.
//
//	extent   |··· stored ···|█ asked for █|····· stored ·····|
//	pages  |      |      |      |      |      |      |      |
//
// It is done beside the answer, and never to the pages that were asked for:
// the kernel has them locked until they are answered, and storing waits for locks.
type surplus struct {
	// store is fuse.Server.InodeNotifyStoreCache.
	store func(node uint64, off int64, data []byte) fuse.Status
	// windows are buffers of one.
	windows sync.Pool

	mu    sync.Mutex // guards what follows
	busy  int
	ended bool
	files [denseFiles]struct {
		node  uint64
		reads int64
	}
	last int // the entry of files that was taken last
	wg   sync.WaitGroup
}

// A run is a part of a file.
type run struct {
	off  int64
	data []byte
}

// around is the window that is to be read for a read of n bytes at off, or nothing.
func (s *surplus) around(node uint64, size, off, n int64) (begin, end int64) {
	begin = off &^ (window - 1)
	if n > windowRead || off+n > begin+window || !s.dense(node, size) {
		return 0, 0
	}
	return begin, min(begin+window, size)
}

// dense counts a random read and says whether there were a lot.
func (s *surplus) dense(node uint64, size int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.files[:], func(f struct {
		node  uint64
		reads int64
	}) bool {
		return f.node == node
	})
	if i < 0 {
		s.last = (s.last + 1) % denseFiles
		i = s.last
		s.files[i].node, s.files[i].reads = node, 0
	}
	reads := &s.files[i].reads
	*reads++
	return *reads >= denseReads && *reads >= size/window/denseShare
}

// give has the pages of r stored, but for those from off to end, and releases it.
func (s *surplus) give(node uint64, size, off, end int64, r run, release func()) {
	var runs []run
	if len(r.data) >= surplusExtent {
		runs = beside(r, off, end, size, int64(os.Getpagesize()))
	}
	if len(runs) == 0 || !s.begin() {
		release()
		return
	}
	go func() {
		defer s.done()
		defer release()
		for _, r := range runs {
			// A kernel that cannot take it asks for it.
			s.store(node, r.off, r.data)
		}
	}()
}

// beside cuts from r, of a file of size bytes, the whole pages that are not touched
// by the bytes from off to end. The last page of a file is whole where the file
// ends.
func beside(r run, off, end, size, page int64) []run {
	begin, stop := (r.off+page-1)&^(page-1), r.off+int64(len(r.data))
	if stop < size {
		stop &^= page - 1
	}
	var runs []run
	for _, part := range [...][2]int64{{begin, min(stop, off&^(page-1))}, {max(begin, (end+page-1)&^(page-1)), stop}} {
		if part[0] < part[1] {
			runs = append(runs, run{part[0], r.data[part[0]-r.off : part[1]-r.off]})
		}
	}
	return runs
}

func (s *surplus) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended || s.busy == surplusStores {
		return false
	}
	s.busy++
	s.wg.Add(1)
	return true
}

func (s *surplus) done() {
	s.mu.Lock()
	s.busy--
	s.mu.Unlock()
	s.wg.Done()
}

// wait returns when nothing is being given any more, and nothing will be. The
// connection is to be ended before.
func (s *surplus) wait() {
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	s.wg.Wait()
}
