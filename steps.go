package main

import (
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// Steps tell a user how far a long command is: on a terminal by a bar for each step that is under way, in a pipe by a
// line for each that is done. Several steps may be under way at a time.
type steps struct {
	w     io.Writer
	bars  *mpb.Progress // nil where there is no terminal
	quiet bool
	mu    sync.Mutex // guards w, where there are no bars

	// Bars and the lines above them are drawn when refresh says so: by itself mpb leaves undrawn what was written since
	// the last time.
	refresh           chan any
	stop, ended, down chan any
	once              sync.Once
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
	note  string
}

func (p *program) newSteps(quiet bool) *steps {
	s := &steps{w: p.stderr, quiet: quiet}
	if !quiet && isTerminal(p.stderr) {
		s.refresh, s.stop, s.ended, s.down = make(chan any), make(chan any), make(chan any), make(chan any)
		s.bars = mpb.New(mpb.WithOutput(p.stderr), mpb.WithManualRefresh(s.refresh), mpb.WithShutdownNotifier(s.down))
		go s.show()
	}
	return s
}

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
	t := &step{of: s, what: what, begun: time.Now(), total: total}
	if s.bars != nil {
		style := mpb.BarStyle()
		if total == 0 {
			style = style.Filler(" ").Tip("")
		}
		t.bar = s.bars.New(total, style, mpb.BarRemoveOnComplete(),
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
	if t == nil {
		return
	}
	t.mu.Lock()
	t.done, t.note = done, note
	t.mu.Unlock()
	if t.bar != nil {
		t.bar.SetCurrent(min(done, max(t.total-1, 0))) // the end of a step says when it is complete
	}
}

func (t *step) add(n int) {
	if t == nil {
		return
	}
	t.mu.Lock()
	done, note := t.done+int64(n), t.note
	t.mu.Unlock()
	t.set(done, note)
}

// Write counts what passes by.
func (t *step) Write(p []byte) (int, error) { t.add(len(p)); return len(p), nil }

// end ends a step; what failed the command's error says.
func (t *step) end(err error) {
	if t == nil {
		return
	}
	if t.bar != nil {
		t.bar.Abort(true)
	}
	if err != nil || t.of.quiet {
		return
	}
	t.mu.Lock()
	line := fmt.Sprintf("%s: %s in %.1f s%s", t.what, sizeText(t.done), time.Since(t.begun).Seconds(), t.note)
	t.mu.Unlock()
	t.of.say("%s", line)
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
func (s *steps) line(line string) {
	if s.bars != nil {
		if _, err := s.bars.Write([]byte(line)); err == nil {
			return
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	fmt.Fprint(s.w, line)
}

// print prints a line of the command's output, above the bars if the terminal shows both.
func (s *steps) print(w io.Writer, line string) {
	if s.bars != nil && isTerminal(w) {
		s.line(line + "\n")
		return
	}
	fmt.Fprintln(w, line)
}

// warn prints a line that also the quiet are to see.
func (s *steps) warn(format string, args ...any) {
	s.line("erofs-oci: " + fmt.Sprintf(format, args...) + "\n")
}

// close takes the bars away.
func (s *steps) close() {
	if s.bars != nil {
		s.once.Do(func() { close(s.stop) })
		<-s.ended
		s.bars.Shutdown()
	}
}
