package fusefs

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/goleak"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
)

// A held source is one whose bytes are far away: while it is held, each read says that it waits, and waits for what it was
// promised.
type held struct {
	sourcetest.Source
	on      atomic.Bool
	waiting chan struct{} // one for each read that waits
	arrived chan struct{} // closed when everything is here
}

func (h *held) ReadAt(ctx context.Context, p []byte, off int64) error {
	if h.on.Load() {
		h.waiting <- struct{}{}
		select {
		case <-h.arrived:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return h.Source.ReadAt(ctx, p, off)
}

// target is that of the link in the image, and more than fits into its inode.
var target = strings.Repeat("t", 4000)

type growing []byte

func (g *growing) WriteAt(p []byte, off int64) (int, error) {
	if end := int(off) + len(p); end > len(*g) {
		*g = append(*g, make([]byte, end-len(*g))...)
	}
	return copy((*g)[off:], p), nil
}

// nothingKept is the size of a cache that no page fits into.
const nothingKept = 1

// newHeld is a file system on a held source, and the node of the only name in its root.
func newHeld(t *testing.T, cacheBytes int64) (f *fileSystem, h *held, link uint64, told *[]syscall.Errno, log *bytes.Buffer) {
	t.Helper()
	var image growing
	b, err := mkerofs.New(&image, mkerofs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Add(mkerofs.Entry{Path: "link", Mode: mkerofs.ModeSymlink | 0o777, Target: target, Xattrs: map[string][]byte{"user.a": []byte("b")}}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	open := func(src sourcetest.Source) *erofsfmt.Image {
		im, err := erofsfmt.OpenWith(t.Context(), src, erofsfmt.Options{CacheBytes: cacheBytes})
		if err != nil {
			t.Fatal(err)
		}
		return im
	}
	known := open(sourcetest.Memory(image))
	root, err := known.Inode(t.Context(), known.Root())
	if err != nil {
		t.Fatal(err)
	}
	nid, err := known.Lookup(t.Context(), &root, "link")
	if err != nil {
		t.Fatal(err)
	}
	h = &held{Source: sourcetest.Memory(image), waiting: make(chan struct{}, 1000), arrived: make(chan struct{})}
	im := open(h)
	log, told = new(bytes.Buffer), new([]syscall.Errno)
	f = newFileSystem(t.Context(), im, slog.New(slog.NewTextHandler(log, nil)))
	f.failed = func(errno syscall.Errno) { *told = append(*told, errno) }
	h.on.Store(true)
	return f, h, f.ids.node(nid), told, log
}

// asked are all the requests that need bytes of the image.
var asked = map[string]func(f *fileSystem, cancel <-chan struct{}, in fuse.InHeader, link uint64) fuse.Status{
	"lookup": func(f *fileSystem, cancel <-chan struct{}, in fuse.InHeader, _ uint64) fuse.Status {
		return f.Lookup(cancel, &in, "link", new(fuse.EntryOut))
	},
	"getattr": func(f *fileSystem, cancel <-chan struct{}, in fuse.InHeader, _ uint64) fuse.Status {
		return f.GetAttr(cancel, &fuse.GetAttrIn{InHeader: in}, new(fuse.AttrOut))
	},
	"readlink": func(f *fileSystem, cancel <-chan struct{}, in fuse.InHeader, link uint64) fuse.Status {
		in.NodeId = link
		_, st := f.Readlink(cancel, &in)
		return st
	},
	"read": func(f *fileSystem, cancel <-chan struct{}, in fuse.InHeader, link uint64) fuse.Status {
		in.NodeId = link
		_, st := f.Read(cancel, &fuse.ReadIn{InHeader: in, Size: 4096}, make([]byte, 4096))
		return st
	},
	"readdir": func(f *fileSystem, cancel <-chan struct{}, in fuse.InHeader, _ uint64) fuse.Status {
		return f.ReadDir(cancel, &fuse.ReadIn{InHeader: in, Size: 4096}, fuse.NewDirEntryList(make([]byte, 4096), 0))
	},
	"readdirplus": func(f *fileSystem, cancel <-chan struct{}, in fuse.InHeader, _ uint64) fuse.Status {
		return f.ReadDirPlus(cancel, &fuse.ReadIn{InHeader: in, Size: 4096}, fuse.NewDirEntryList(make([]byte, 4096), 0))
	},
	"getxattr": func(f *fileSystem, cancel <-chan struct{}, in fuse.InHeader, link uint64) fuse.Status {
		in.NodeId = link
		_, st := f.GetXAttr(cancel, &in, "user.a", make([]byte, 16))
		return st
	},
	"listxattr": func(f *fileSystem, cancel <-chan struct{}, in fuse.InHeader, link uint64) fuse.Status {
		in.NodeId = link
		_, st := f.ListXAttr(cancel, &in, make([]byte, 16))
		return st
	},
}

func header(thread uint32) fuse.InHeader {
	return fuse.InHeader{NodeId: rootNode, Caller: fuse.Caller{Pid: thread}}
}

// TestKilledCallers: whatever is asked for, who is being killed waits no longer, and that is no failure; the first signal
// need not be the one that kills.
func TestKilledCallers(t *testing.T) {
	for op, ask := range asked {
		for _, noises := range []int{0, 1} {
			t.Run(op, func(t *testing.T) {
				defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
				f, h, link, told, log := newHeld(t, nothingKept)
				looks := 0
				f.dying = func(thread uint32) bool {
					looks++
					return thread == 7 && looks > noises
				}
				cancel, done := make(chan struct{}), make(chan fuse.Status, 1)
				go func() { done <- ask(f, cancel, header(7), link) }()
				<-h.waiting
				close(cancel)
				if st := <-done; st != fuse.EINTR {
					t.Errorf("answered with %v", st)
				}
				if looks != noises+1 || len(*told) > 0 || log.Len() > 0 {
					t.Errorf("%d looks, failures %v, the log says %q", looks, *told, log)
				}
			})
		}
	}
}

// TestInterruptIsNoise: who is interrupted and lives gets the answer, however it comes; so does who cannot be seen, of whom
// nothing is asked.
func TestInterruptIsNoise(t *testing.T) {
	for op, ask := range asked {
		for _, thread := range []uint32{7, 0} {
			t.Run(op, func(t *testing.T) {
				defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
				f, h, link, told, _ := newHeld(t, nothingKept)
				looked := make(chan uint32, 100)
				f.dying = func(thread uint32) bool {
					looked <- thread
					return false
				}
				cancel, done := make(chan struct{}), make(chan fuse.Status, 1)
				go func() { done <- ask(f, cancel, header(thread), link) }()
				<-h.waiting
				close(cancel)
				if thread != 0 {
					<-looked
				}
				close(h.arrived)
				if st := <-done; st != fuse.OK && !(op == "read" && st == fuse.EIO) || len(*told) > 0 {
					t.Errorf("answered with %v, failures %v", st, *told)
				}
				if thread == 0 && len(looked) > 0 {
					t.Error("somebody was looked for who cannot be seen")
				}
			})
		}
	}
}

// TestKilledShares: who waits for the same bytes as one who is killed gets them, an interrupt of its own or not.
func TestKilledShares(t *testing.T) {
	f, h, link, told, _ := newHeld(t, nothingKept)
	shares := make(chan struct{}, 100)
	f.dying = func(thread uint32) bool {
		if thread == 8 {
			shares <- struct{}{} // it is looked for while it waits
		}
		return thread == 7
	}
	kill, interrupt := make(chan struct{}), make(chan struct{})
	killed, lives := make(chan fuse.Status, 1), make(chan fuse.Status, 1)
	go func() { killed <- asked["getattr"](f, kill, header(7), link) }()
	<-h.waiting
	close(interrupt)
	go func() { lives <- asked["getattr"](f, interrupt, header(8), link) }()
	<-shares
	if len(h.waiting) > 0 {
		t.Error("both ask for the same bytes")
	}
	close(kill)
	if st := <-killed; st != fuse.EINTR {
		t.Errorf("the killed: %v", st)
	}
	<-h.waiting // for the other, who asks by itself now
	close(h.arrived)
	if st := <-lives; st != fuse.OK || len(*told) > 0 {
		t.Errorf("the other: %v, failures %v", st, *told)
	}
}

// TestAnsweredAtOnce: what is here costs a request no goroutine, and its context no memory.
func TestAnsweredAtOnce(t *testing.T) {
	f, h, _, _, _ := newHeld(t, 0)
	h.on.Store(false)
	cancel := make(chan struct{})
	in, out := &fuse.GetAttrIn{InHeader: header(7)}, new(fuse.AttrOut)
	f.GetAttr(cancel, in, out)
	before := runtime.NumGoroutine()
	if n := testing.AllocsPerRun(1000, func() {
		if st := f.GetAttr(cancel, in, out); st != fuse.OK {
			t.Error(st)
		}
	}); n != 0 {
		t.Errorf("%v allocations a request", n)
	}
	if after := runtime.NumGoroutine(); after > before {
		t.Errorf("%d goroutines, %d before", after, before)
	}
}

// TestKilledStatus: what the kernel writes of a thread, and whether it is about to end.
func TestKilledStatus(t *testing.T) {
	for _, c := range []struct {
		status string
		want   bool
	}{
		{"", false},
		{"Name:\tls\nState:\tD (disk sleep)\nSigPnd:\t0000000000000000\nShdPnd:\t0000000000000000\nSigBlk:\t0000000000000100\n", false},
		{"Name:\tls\nState:\tD (disk sleep)\nSigPnd:\t0000000000000100\nShdPnd:\t0000000000000000\n", true},
		{"Name:\tls\nState:\tD (disk sleep)\nSigPnd:\t0000000000000000\nShdPnd:\t0000000000000100\n", true},
		{"Name:\tgo\nState:\tS (sleeping)\nSigPnd:\t0000000000400000\nShdPnd:\t0000000000000000\n", false}, // SIGURG
		{"Name:\tgo\nState:\tS (sleeping)\nSigPnd:\tffffffffffffffff\nShdPnd:\t0000000000000000\n", true},
		{"Name:\tSigPnd\\n100\nState:\tZ (zombie)\n", true},
		{"Name:\tx\nState:\tS (sleeping)\nSigPnd:\twhat\n", false},
	} {
		if got := killed(c.status); got != c.want {
			t.Errorf("%q: %v", c.status, got)
		}
	}
	if dying(uint32(syscall.Getpid())) {
		t.Error("this process is about to end")
	}
	if dying(1 << 30) {
		t.Error("a process that cannot be is about to end")
	}
}

// TestRequestContext: a request is a context like others.
func TestRequestContext(t *testing.T) {
	life, end := context.WithCancelCause(t.Context())
	f := &fileSystem{ctx: life, dying: dying}
	in := header(uint32(syscall.Getpid()))
	r := f.begin(make(chan struct{}), &in)
	child, stop := context.WithCancel(r)
	defer stop()
	if err := errors.Join(r.Err(), child.Err()); err != nil {
		t.Error(err)
	}
	why := errors.New("the mount ends")
	end(why)
	<-child.Done()
	if context.Cause(child) != why || context.Cause(r) != why || r.Err() != context.Canceled {
		t.Errorf("%v, %v, %v", context.Cause(child), context.Cause(r), r.Err())
	}
	f.finish(r)
}
