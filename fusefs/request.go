package fusefs

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// errKilled is why a request ends before its time. The one who would get the errno never sees it.
var errKilled = fmt.Errorf("whoever asked is being killed: %w", context.Canceled)

// lookAgain is how often it is looked after the caller of a request that was interrupted: the kernel tells of the first
// signal only (fs/fuse/dev.c request_wait_answer), which need not be the one that kills.
const lookAgain = 500 * time.Millisecond

// A request is the context of one FUSE request. It ends with the mount, and when the thread that waits for the answer is
// being killed: the kernel lets it go no sooner than that is there.
//
//	answered from what is here   nobody asks for Done: no goroutine, and the next request has the same memory
//	waits                        Done begins to watch: an interrupt ─► does the caller die? ─► no: look again, and again
//	                                                                                        └► yes: errKilled
type request struct {
	life        context.Context // the mount's
	interrupted <-chan struct{}
	thread      uint32            // the caller; 0 if it is of a PID namespace that we do not see into
	dying       func(uint32) bool // of a thread

	mu       sync.Mutex      // guards wait
	wait     context.Context // nil until somebody waits
	stop     context.CancelCauseFunc
	watching sync.WaitGroup
}

// begin is the context of a request, to be handed to finish before it is answered. cancel is what go-fuse closes when it is
// interrupted.
func (f *fileSystem) begin(cancel <-chan struct{}, header *fuse.InHeader) *request {
	r, _ := f.requests.Get().(*request)
	if r == nil {
		r = new(request)
	}
	r.life, r.interrupted, r.thread, r.dying = f.ctx, cancel, header.Pid, f.dying
	return r
}

// finish ends what a request has begun. One that nobody waited with is nobody's any more, and is used again. Whoever had a
// part in the answer has ended.
func (f *fileSystem) finish(r *request) {
	if r.wait == nil {
		f.requests.Put(r)
		return
	}
	r.stop(nil)
	r.watching.Wait()
}

// Done is a context's. Who calls it is about to wait.
func (r *request) Done() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.wait == nil {
		r.wait, r.stop = context.WithCancelCause(r.life)
		if r.thread != 0 {
			wait := r.wait
			r.watching.Go(func() { r.watch(wait) })
		}
	}
	return r.wait.Done()
}

// watch ends a request that waits when its caller dies.
func (r *request) watch(wait context.Context) {
	select {
	case <-r.interrupted:
	case <-wait.Done():
		return
	}
	again := time.NewTicker(lookAgain)
	defer again.Stop()
	for !r.dying(r.thread) {
		select {
		case <-again.C:
		case <-wait.Done():
			return
		}
	}
	r.stop(errKilled)
}

func (r *request) current() context.Context {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.wait == nil {
		return r.life
	}
	return r.wait
}

// Err is a context's.
func (r *request) Err() error { return r.current().Err() }

// Deadline is a context's.
func (r *request) Deadline() (time.Time, bool) { return r.life.Deadline() }

// Value is a context's.
func (r *request) Value(key any) any { return r.current().Value(key) }

// dying says whether a thread is about to end. It is not where that cannot be seen.
func dying(thread uint32) bool {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", thread))
	return err == nil && killed(string(status))
}

// killed looks for SIGKILL among the pending signals in a /proc/PID/status. The kernel puts it there, for each thread of a
// process, whatever it is that ends the process, unless that leaves a core (kernel/signal.c complete_signal).
func killed(status string) bool {
	const sigkill = 1 << (9 - 1)
	for line := range strings.Lines(status) {
		name, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch name {
		case "State":
			if strings.HasPrefix(value, "Z") || strings.HasPrefix(value, "X") {
				return true // it has ended
			}
		case "SigPnd", "ShdPnd":
			if set, err := strconv.ParseUint(value, 16, 64); err == nil && set&sigkill != 0 {
				return true
			}
		}
	}
	return false
}
