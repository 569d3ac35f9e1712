package main

import (
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// progressPause is how often a terminal is told how far a command has come.
const progressPause = 200 * time.Millisecond

// Steps tell a user how far a long command is: on a terminal by a bar for each step that is under way, in a pipe by a
// line for each that is done. Several steps may be under way at a time.
type steps struct {
	w     io.Writer
	quiet bool
	mu    sync.Mutex    // guards w and bars, so that no line is lost between the last drawing and the end of the bars
	bars  *mpb.Progress // nil where there is no terminal, and after close

	// Bars and the lines above them are drawn when refresh says so: by itself mpb leaves undrawn what was written since
	// the last time.
	refresh           chan any
	stop, ended, down chan any
}

// A step is one of them. A nil step is one that nobody watches.
type step struct {
	of    *steps
	what  string
	begun time.Time
	bar   *mpb.Bar
	total int64
	mu    sync.Mutex // guards what follows
	done  int64
	files int64
	note  string
}

func (p *program) newSteps(quiet bool) *steps {
	s := &steps{w: p.stderr, quiet: quiet}
	if !quiet && isTerminal(p.stderr) {
		s.refresh, s.stop, s.ended, s.down = make(chan any), make(chan any), make(chan any), make(chan any)
		s.bars = mpb.New(mpb.WithOutput(p.stderr), mpb.WithManualRefresh(s.refresh), mpb.WithShutdownNotifier(s.down))
		go s.show()
		if p.log != nil {
			p.log.redirect(s)
		}
	}
	return s
}

// newWalk is newSteps for a command that walks an image, and says nothing of that in a pipe.
func (p *program) newWalk() *steps { return p.newSteps(!isTerminal(p.stderr)) }

// show has the bars drawn now and then, and once more in the end.
func (s *steps) show() {
	defer close(s.ended)
	tick := time.NewTicker(progressPause)
	defer tick.Stop()
	for more := true; more; {
		select {
		case <-tick.C:
		case <-s.stop:
			more = false
		}
		select {
		case s.refresh <- time.Now():
		case <-s.down: // the terminal is gone
			return
		}
	}
}

// begin begins a step of so many bytes, 0 if that is not known.
func (s *steps) begin(what string, total int64) *step {
	if s.quiet {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	t := &step{of: s, what: what, begun: time.Now(), total: total}
	if s.bars != nil {
		var style mpb.BarFillerBuilder = mpb.BarStyle()
		if total == 0 {
			style = mpb.NopStyle() // what stands behind it is all that is known
		}
		// It fails where the terminal is gone: then there is no bar.
		t.bar, _ = s.bars.Add(total, style.Build(), mpb.BarRemoveOnComplete(),
			mpb.PrependDecorators(decor.Name(what, decor.WCSyncSpaceR)),
			mpb.AppendDecorators(decor.Any(func(decor.Statistics) string { return t.state() })))
	}
	return t
}

// state is what stands behind a bar.
func (t *step) state() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	text := " " + sizeText(t.done)
	if t.total > 0 {
		text += " of " + sizeText(t.total)
	}
	if d := time.Since(t.begun); d > time.Second {
		text += fmt.Sprintf(", %s/s", sizeText(int64(float64(t.done)/d.Seconds())))
	}
	return text + t.note
}

// set says that so many bytes are done, and what else there is to say.
func (t *step) set(done int64, note string) {
	t.change(func() { t.done, t.note = done, note })
}

// add says that so many bytes more are done.
func (t *step) add(n int) {
	t.change(func() { t.done += int64(n) })
}

// file says that one file more is done, of as many as an image says that it has.
func (t *step) file(of uint64) {
	t.change(func() {
		t.files++
		t.note = fmt.Sprintf(", %d of %d files", t.files, of)
	})
}

func (t *step) change(f func()) {
	if t == nil {
		return
	}
	t.mu.Lock()
	f()
	done := t.done
	t.mu.Unlock() // who draws the bar, and is waited for below, takes it
	if t.bar != nil && t.total > 0 {
		t.bar.SetCurrent(min(done, t.total-1)) // the end of a step says when it is complete
	}
}

// Write counts what passes by.
func (t *step) Write(p []byte) (int, error) { t.add(len(p)); return len(p), nil }

// end ends a step; what failed the command's error says.
func (t *step) end(err error) {
	t.leave()
	if t == nil || err != nil {
		return
	}
	t.mu.Lock()
	line := fmt.Sprintf("%s: %s in %.1f s%s", t.what, sizeText(t.done), time.Since(t.begun).Seconds(), t.note)
	t.mu.Unlock()
	t.of.say("%s", line)
}

// leave ends a step of which others say what came of it.
func (t *step) leave() {
	if t != nil && t.bar != nil {
		t.bar.Abort(true)
	}
}

// say prints a line.
func (s *steps) say(format string, args ...any) {
	if s.quiet {
		return
	}
	line := fmt.Sprintf(format, args...) + "\n"
	s.line(line)
}

// line prints a line above the bars, if there are any yet.
func (s *steps) line(line string) { s.lineTo(s.w, line) }

// lineTo prints a line to w, which shows the bars, too, if there are any yet.
func (s *steps) lineTo(w io.Writer, line string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bars != nil {
		if _, err := s.bars.Write([]byte(line)); err == nil {
			return
		}
	}
	fmt.Fprint(w, line)
}

// print prints a line of the command's output, above the bars if the terminal shows both.
func (s *steps) print(w io.Writer, line string) {
	if isTerminal(w) {
		s.lineTo(w, line+"\n")
		return
	}
	fmt.Fprintln(w, line)
}

// Write has the lines of the log stand above the bars.
func (s *steps) Write(p []byte) (int, error) { s.line(string(p)); return len(p), nil }

// warn prints a line that also the quiet are to see.
func (s *steps) warn(format string, args ...any) {
	s.line("erofs-oci: " + fmt.Sprintf(format, args...) + "\n")
}

// close takes the bars away.
func (s *steps) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bars == nil {
		return
	}
	close(s.stop)
	<-s.ended
	s.bars.Shutdown()
	s.bars = nil
}
