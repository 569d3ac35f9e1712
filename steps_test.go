package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
)

// A screen is what somebody sees who looks at a terminal of 100 columns and 30 rows, with all that left it at the top.
type screen struct {
	tty  *os.File // for the program
	ptmx *os.File // the other end
	done sync.WaitGroup

	mu      sync.Mutex // guards what follows
	text    []byte     // everything that was written
	waiting string     // for seen
	seen    chan struct{}
}

// newScreen has seen closed when text has been on the screen.
func newScreen(t *testing.T, text string) *screen {
	t.Helper()
	ptmx, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	must(t, err)
	must(t, unix.IoctlSetPointerInt(int(ptmx.Fd()), unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(int(ptmx.Fd()), unix.TIOCGPTN)
	must(t, err)
	tty, err := os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	must(t, err)
	must(t, unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 30, Col: 100}))
	s := &screen{tty: tty, ptmx: ptmx, waiting: text, seen: make(chan struct{})}
	s.done.Go(s.watch)
	t.Cleanup(func() {
		tty.Close()
		ptmx.Close()
		s.done.Wait()
	})
	return s
}

// hangUp takes the terminal away.
func (s *screen) hangUp() error { return s.ptmx.Close() }

func (s *screen) watch() {
	p := make([]byte, 4096)
	for {
		n, err := s.ptmx.Read(p)
		if err != nil {
			return // the program has closed it, or it is gone
		}
		s.mu.Lock()
		s.text = append(s.text, p[:n]...)
		if s.waiting != "" && strings.Contains(string(s.text), s.waiting) {
			s.waiting = ""
			close(s.seen)
		}
		s.mu.Unlock()
	}
}

// end closes the terminal and gives its rows.
func (s *screen) end(t *testing.T) []string {
	t.Helper()
	must(t, s.tty.Close())
	s.done.Wait()
	return rows(t, string(s.text))
}

// rows are what a terminal shows of what was written to it.
func rows(t *testing.T, text string) []string {
	t.Helper()
	shown, row, column := []string{""}, 0, 0
	for text != "" {
		var n int
		switch {
		case text[0] == '\r':
			column, text = 0, text[1:]
		case text[0] == '\n':
			if row++; row == len(shown) {
				shown = append(shown, "")
			}
			text = text[1:]
		case strings.HasPrefix(text, "\x1b["):
			end := strings.IndexAny(text, "AJK")
			if end < 0 {
				t.Fatalf("not known: %q", text)
			}
			n, _ = strconv.Atoi(text[2:end])
			switch {
			case text[end] == 'A':
				row = max(row-n, 0)
			case text[end] == 'J':
				shown = shown[:row+1]
				fallthrough
			default:
				shown[row] = shown[row][:min(column, len(shown[row]))]
			}
			text = text[end+1:]
		default:
			for len(shown[row]) < column {
				shown[row] += " "
			}
			shown[row] = shown[row][:column] + text[:1] + shown[row][min(column+1, len(shown[row])):]
			column, text = column+1, text[1:]
		}
	}
	if last := len(shown) - 1; shown[last] == "" {
		shown = shown[:last]
	}
	return shown
}

func TestRows(t *testing.T) {
	for text, want := range map[string][]string{
		"":                                  {},
		"a\r\nb\r\n":                        {"a", "b"},
		"abc\rx":                            {"xbc"},
		"abc\rx\x1b[K":                      {"x"},
		"a\r\nbar\r\n\x1b[1A\x1b[Jb\r\n":    {"a", "b"},
		"a\r\nbar\r\nlost\r\n\x1b[2A\x1b[J": {"a"},
	} {
		if got := rows(t, text); !slices.Equal(got, want) {
			t.Errorf("%q shows %q, want %q", text, got, want)
		}
	}
}

// TestTerminalLines: lines of all kinds, of several goroutines, come out whole above a bar that is drawn all the time, and
// the bar is gone in the end.
func TestTerminalLines(t *testing.T) {
	s := newScreen(t, "work")
	p := &program{stdout: s.tty, stderr: s.tty}
	log, err := p.newLog(logOptions{})
	must(t, err)
	steps := p.newSteps(false)
	step := steps.begin("work", 0)
	<-s.seen
	var want []string
	for i := range 50 {
		want = append(want, fmt.Sprintf("line %d", i), fmt.Sprintf("erofs-oci: warning %d", i), fmt.Sprintf("said %d", i), fmt.Sprintf("logged %d", i))
	}
	var writers sync.WaitGroup
	each := func(f func(i int)) {
		writers.Go(func() {
			for i := range 50 {
				f(i)
				steps.refresh <- time.Now()
			}
		})
	}
	each(func(i int) { steps.print(p.stdout, fmt.Sprintf("line %d", i)) })
	each(func(i int) { steps.warn("warning %d", i) })
	each(func(i int) { steps.say("said %d", i) })
	each(func(i int) { log.Warn(fmt.Sprintf("logged %d", i), "nr", i) })
	each(func(int) { step.add(1) })
	each(func(int) { step.file(100) })
	each(func(int) { step.file(100) })
	writers.Wait()
	if step.done != 50 || step.files != 100 || step.note != ", 100 of 100 files" {
		t.Errorf("%d bytes, %d files, %q", step.done, step.files, step.note)
	}
	step.leave()
	steps.close()
	steps.close()
	log.Error("logged at last")
	p.closeLog()
	steps.print(p.stdout, "at last")
	got := s.end(t)
	for i, line := range got {
		if _, rest, ok := strings.Cut(line, `msg="`); ok { // of the log
			got[i], _, _ = strings.Cut(rest, `"`)
		}
	}
	if n := len(got) - 2; n < 0 || !slices.Equal(got[n:], []string{"logged at last", "at last"}) {
		t.Fatalf("%q", got)
	}
	got = slices.Sorted(slices.Values(got[:len(got)-2]))
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("the terminal shows\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestTerminalGone: a command goes on when its terminal is gone, whatever it has to say then.
func TestTerminalGone(t *testing.T) {
	s := newScreen(t, "before")
	p := &program{stdout: s.tty, stderr: s.tty}
	steps := p.newSteps(false)
	before := steps.begin("before", 0)
	<-s.seen
	must(t, s.hangUp())
	<-steps.down
	during := steps.begin("during", 10)
	before.add(1)
	during.add(1)
	steps.say("said to nobody")
	before.end(nil)
	during.end(nil)
	steps.close()
	if before.done != 1 || during.done != 1 {
		t.Errorf("%d and %d bytes, want 1 and 1", before.done, during.done)
	}
}

// TestNobodyWatches: in a pipe a walk says nothing, and counts nothing.
func TestNobodyWatches(t *testing.T) {
	var said strings.Builder
	p := &program{stdout: io.Discard, stderr: &said}
	s := p.newWalk()
	step := s.begin("extract", 0)
	if step != nil {
		t.Error("a step that nobody watches counts")
	}
	step.file(2)
	step.add(5)
	step.set(7, "")
	step.end(nil)
	s.close()
	if said.Len() != 0 {
		t.Errorf("%q in a pipe", said.String())
	}
}

// A watched is an image that can be read once somebody sees how far the check is.
type watched struct {
	memorySource
	seen <-chan struct{}
}

func (w watched) ReadAt(ctx context.Context, p []byte, off int64) error {
	select {
	case <-w.seen:
	case <-ctx.Done():
		return ctx.Err()
	}
	return w.memorySource.ReadAt(ctx, p, off)
}

// TestCheckOnTerminal: each fault has a whole line on a terminal that shows how far the check is, too, and of that nothing
// stays.
func TestCheckOnTerminal(t *testing.T) {
	src := memorySource(corpus.Get(t, "plain").Data[:1200000])
	var want strings.Builder
	stats, err := erofsfmt.Check(t.Context(), src, erofsfmt.CheckOptions{}, func(f erofsfmt.Fault) { fmt.Fprintln(&want, f) })
	must(t, err)
	must(t, printCheck(&want, stats))
	if stats.Faults != 17 {
		t.Errorf("%d faults, want 17", stats.Faults)
	}
	s := newScreen(t, "check")
	p := &program{stdout: s.tty, stderr: s.tty}
	c := cli.NewContext(p.app(), flag.NewFlagSet("check", flag.ContinueOnError), nil)
	c.Context = t.Context()
	_, err = p.checkVolume(c, watched{src, s.seen}, erofsfmt.CheckOptions{})
	must(t, err)
	if got := strings.Join(s.end(t), "\n") + "\n"; got != want.String() {
		t.Errorf("the terminal shows\n%swant\n%s", got, want.String())
	}
}
