package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// progressPause is how often a terminal is told how far a command has come.
const progressPause = 200 * time.Millisecond

// progress shows on a terminal how far a walk of an image has come. A nil
// progress, as for a pipe, shows nothing.
type progress struct {
	w           io.Writer
	files       atomic.Int64
	done        atomic.Int64 // bytes
	total       uint64       // inodes, as the image says
	stop, ended chan struct{}
	once        sync.Once
}

func (p *program) startProgress(inodes uint64) *progress {
	if !isTerminal(p.stderr) {
		return nil
	}
	b := &progress{w: p.stderr, total: inodes, stop: make(chan struct{}), ended: make(chan struct{})}
	go b.show()
	return b
}

func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

func (b *progress) show() {
	defer close(b.ended)
	tick := time.NewTicker(progressPause)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			b.line()
		case <-b.stop:
			b.line()
			fmt.Fprintln(b.w)
			return
		}
	}
}

// line writes over the line before.
func (b *progress) line() {
	fmt.Fprintf(b.w, "\r%d of %d files, %.1f MiB\x1b[K", b.files.Load(), b.total, float64(b.done.Load())/(1<<20))
}

func (b *progress) file() {
	if b != nil {
		b.files.Add(1)
	}
}

func (b *progress) bytes(n int) {
	if b != nil {
		b.done.Add(int64(n))
	}
}

// reached says how far the walk is as a whole.
func (b *progress) reached(files, bytes int64) {
	if b != nil {
		b.files.Store(files)
		b.done.Store(bytes)
	}
}

// clear makes room for a line of something else.
func (b *progress) clear() {
	if b != nil {
		fmt.Fprint(b.w, "\r\x1b[K")
	}
}

// end writes the last line.
func (b *progress) end() {
	if b != nil {
		b.once.Do(func() { close(b.stop) })
		<-b.ended
	}
}
