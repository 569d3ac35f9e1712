package blobcache

import (
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// glance is how old the answer may be to the question whether readers of other processes wait: nobody tells of it.
const glance = 10 * time.Millisecond

// An outside lets the background of one process be behind the readers of the others. As long as flights are under way
// that somebody waits for, a process has a lock that others see: one that it waits for of another process, and what it
// brings in the background itself, are none of them, so nobody is ever held up by whom he holds up.
//
// Where a lock cannot be had or seen, the others are not waited for, which no reader notices.
type outside struct {
	file *os.File

	mu      sync.Mutex // guards what follows
	flights int
	looked  time.Time
	waits   bool
}

// enter says that a flight begins that somebody waits for, and leave that it waits no more for what it brings.
func (o *outside) enter() { o.count(1, 1, unix.F_RDLCK) }

func (o *outside) leave() { o.count(-1, 0, unix.F_UNLCK) }

// count locks, or unlocks, when as many are left.
func (o *outside) count(more, left int, kind int16) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.flights += more; o.flights == left {
		_ = lock(o.file, kind, lockWaiting) // see outside
	}
}

// waiting says whether readers of other processes wait.
func (o *outside) waiting() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if now := time.Now(); now.Sub(o.looked) >= glance {
		n, err := othersHold(o.file, lockWaiting, 1)
		o.looked, o.waits = now, err == nil && n > 0
	}
	return o.waits
}
