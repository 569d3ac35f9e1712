package serverlog

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/slogtest"
	"testing/synctest"
	"time"
)

// A book is what was written, a Write an entry.
type book struct {
	mu     sync.Mutex
	writes []string
}

func (b *book) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.writes = append(b.writes, string(p))
	return len(p), nil
}

// lines gives what was written without times, and forgets it.
func (b *book) lines(t *testing.T) []string {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	var all []string
	for _, w := range b.writes {
		line, ok := strings.CutSuffix(w, "\n")
		_, rest, timed := strings.Cut(line, " level=")
		if !ok || !timed || strings.Contains(line, "\n") {
			t.Fatalf("a write that is not one line: %q", w)
		}
		all = append(all, rest)
	}
	b.writes = nil
	return all
}

func wantLines(t *testing.T, b *book, want ...string) {
	t.Helper()
	got := b.lines(t)
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("the log has\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestHandler: what is put before slog's handlers leaves them what slog says of handlers.
func TestHandler(t *testing.T) {
	for _, lines := range []int{DefaultLines, 1000} {
		var out bytes.Buffer
		slogtest.Run(t, func(*testing.T) slog.Handler {
			out.Reset()
			return New(&out, Options{JSON: true, Lines: lines}).Handler()
		}, func(t *testing.T) map[string]any {
			var m map[string]any
			if err := json.Unmarshal(out.Bytes(), &m); err != nil {
				t.Fatalf("%q: %v", out.String(), err)
			}
			return m
		})
	}
}

// TestLimit: of a kind ten lines a minute get through, the first ones; the others are counted, and the count is said
// when the minute is over, whether more lines come or not.
func TestLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b book
		l := New(&b, Options{Lines: 2})
		defer l.Close()
		for i := range 5 {
			l.Warn("broken", "blob", "a", "i", i)
			l.Warn("broken", "blob", "b", "i", i)
		}
		l.Error("broken", "blob", "a")   // another level is another kind
		l.Warn("also broken", "blob", 1) // another message, too
		wantLines(t, &b, "WARN msg=broken blob=a i=0", "WARN msg=broken blob=b i=0", "WARN msg=broken blob=a i=1", "WARN msg=broken blob=b i=1",
			"ERROR msg=broken blob=a", `WARN msg="also broken" blob=1`)
		time.Sleep(DefaultWindow - time.Nanosecond)
		synctest.Wait()
		wantLines(t, &b)
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		got := b.lines(t)
		if len(got) != 2 || !strings.HasPrefix(got[0], `WARN msg="more lines like this one were left out" like=broken blob=`) ||
			!strings.HasSuffix(got[0], " left_out=3") || !strings.HasSuffix(got[1], " left_out=3") || got[0] == got[1] {
			t.Errorf("after a minute: %q", got)
		}
		// A new window begins with the next line.
		for i := range 3 {
			l.Warn("broken", "blob", "a", "i", i)
		}
		wantLines(t, &b, "WARN msg=broken blob=a i=0", "WARN msg=broken blob=a i=1")
	})
}

// TestLimitNextLine: a line that comes when the window has ended says first what was left out.
func TestLimitNextLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b book
		l := New(&b, Options{Lines: 1, Window: time.Second})
		defer l.Close()
		l.limit.closed = true // no timer
		l.Info("x")
		l.Info("x")
		time.Sleep(time.Second)
		wantLines(t, &b, "INFO msg=x")
		l.Info("x")
		wantLines(t, &b, `INFO msg="more lines like this one were left out" like=x left_out=1`, "INFO msg=x")
	})
}

// TestLimitKinds: a fault does not hide another one: what came of it tells kinds apart, and of a few inodes the first line
// gets through whatever happened to others.
func TestLimitKinds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b book
		l := New(&b, Options{})
		fail := func(nid int, errno string) { l.Error("request failed", "nid", nid, "errno", errno) }
		var want []string
		for nid := range 20 {
			fail(nid, "unclean")
			want = append(want, fmt.Sprintf(`ERROR msg="request failed" nid=%d errno=unclean`, nid))
		}
		fail(100, "io")
		want = append(want, `ERROR msg="request failed" nid=100 errno=io`)
		wantLines(t, &b, want...)
		for range 1000 {
			fail(100, "io")
		}
		if n := len(b.lines(t)); n != DefaultLines-1 {
			t.Errorf("%d more lines of one inode", n)
		}
		fail(101, "io")
		wantLines(t, &b, `ERROR msg="request failed" nid=101 errno=io`)
		// Thousands are one fault.
		for nid := range 5000 {
			fail(1000+nid, "io")
		}
		if n := len(b.lines(t)); n != maxEach-2 {
			t.Errorf("%d lines of thousands of inodes", n)
		}
		l.Close()
		wantLines(t, &b, fmt.Sprintf(`ERROR msg="more lines like this one were left out" like="request failed" errno=io left_out=%d`, 991+5000-(maxEach-2)))
	})
}

// TestLongFault: what goes on for a night is told ever more seldom, all of it is counted, and when it is over that is said,
// and what comes then is something new.
func TestLongFault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b book
		l := New(&b, Options{})
		defer l.Close()
		const night = 8 * time.Hour
		told, counted, counts := 0, 0, 0
		count := func() {
			for _, line := range b.lines(t) {
				if _, n, ok := strings.Cut(line, " left_out="); ok {
					number, err := strconv.Atoi(n)
					if err != nil {
						t.Fatal(err)
					}
					counted, counts = counted+number, counts+1
				} else {
					told++
				}
			}
		}
		for range int(night / time.Second) {
			l.Error("request failed", "nid", 7, "errno", "io")
			time.Sleep(time.Second)
		}
		count()
		// Windows begin after 0, 1, 3, 7, 15, 31, 63, 123, 183, 243, 303, 363 and 423 minutes.
		if told != 13*DefaultLines || counts != 12 {
			t.Errorf("%d lines in a night, and %d counts", told, counts)
		}
		time.Sleep(DefaultWindow - time.Second)
		synctest.Wait()
		if count(); told+counted != int(night/time.Second) || counts != 13 {
			t.Errorf("a minute after it is over: %d lines told, %d counted, in %d counts", told, counted, counts)
		}
		for i := range 12 {
			l.Error("request failed", "nid", 7, "errno", "io", "again", i)
		}
		if n := len(b.lines(t)); n != DefaultLines {
			t.Errorf("of the next fault %d lines get through", n)
		}
		time.Sleep(DefaultWindow)
		synctest.Wait()
		wantLines(t, &b, `ERROR msg="more lines like this one were left out" like="request failed" errno=io left_out=2`)
	})
}

// TestLimitTimer: what is left out is said when its own window ends, whichever kind's was the first to be waited for.
func TestLimitTimer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b book
		l := New(&b, Options{Lines: 1})
		defer l.Close()
		l.Warn("early") // its window ends first, and nothing of it is left out so far
		time.Sleep(30 * time.Second)
		l.Warn("late")
		l.Warn("late") // due after 90 seconds
		time.Sleep(20 * time.Second)
		l.Warn("early") // due after 60
		wantLines(t, &b, "WARN msg=early", "WARN msg=late")
		time.Sleep(10 * time.Second)
		synctest.Wait()
		wantLines(t, &b, `WARN msg="more lines like this one were left out" like=early left_out=1`)
		time.Sleep(30 * time.Second)
		synctest.Wait()
		wantLines(t, &b, `WARN msg="more lines like this one were left out" like=late left_out=1`)
	})
}

// TestClose: what was left out is said at the end, once, and nothing is left running.
func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b book
		l := New(&b, Options{Lines: 1})
		for range 8 {
			l.Error("lost", "host", "h:1")
		}
		l.Close()
		l.Close()
		for _, w := range b.writes {
			if now := "time=" + time.Now().Format("2006-01-02T15:04:05.000Z07:00") + " "; !strings.HasPrefix(w, now) {
				t.Errorf("%q is not of %s", w, now)
			}
		}
		wantLines(t, &b, "ERROR msg=lost host=h:1", `ERROR msg="more lines like this one were left out" like=lost host=h:1 left_out=7`)
		l.Error("after all", "host", "h:1")
		wantLines(t, &b, `ERROR msg="after all" host=h:1`)
	})
}

// TestWith: what With says the lines are about tells kinds apart, unless it is in a group.
func TestWith(t *testing.T) {
	var b book
	l := New(&b, Options{Lines: 1})
	defer l.Close()
	one, two, grouped := l.With("blob", "a"), l.With("blob", "b"), l.WithGroup("g")
	for range 2 {
		one.Info("m")
		two.Info("m")
		two.Info("m", "blob", "c")
		grouped.Info("m", "blob", "d")
		grouped.Info("m", "blob", "e")
	}
	wantLines(t, &b, "INFO msg=m blob=a", "INFO msg=m blob=b", "INFO msg=m blob=b blob=c", "INFO msg=m g.blob=d")
}

// TestManyKinds: memory is bounded, whatever the lines are about; and those who find no room are counted, too.
func TestManyKinds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b book
		l := New(&b, Options{Lines: 1})
		for i := range 10 * maxKinds {
			l.Warn("m", "blob", i)
		}
		if n := len(l.limit.kinds); n != maxKinds+1 {
			t.Errorf("%d kinds are remembered", n)
		}
		if n := len(b.lines(t)); n != maxKinds+1 {
			t.Errorf("%d lines", n)
		}
		l.Close()
		wantLines(t, &b, fmt.Sprintf(`WARN msg="more lines of many kinds were left out" left_out=%d`, 9*maxKinds-1))
	})
}

// TestNoLimit: who asks for everything gets it.
func TestNoLimit(t *testing.T) {
	var b book
	l := New(&b, Options{Level: slog.LevelDebug})
	defer l.Close()
	for range 1000 {
		l.Debug("m")
	}
	if n := len(b.lines(t)); n != 1000 {
		t.Errorf("%d lines of 1000", n)
	}
}

// TestLevel: what is below the level is not counted, either.
func TestLevel(t *testing.T) {
	var b book
	l := New(&b, Options{Level: slog.LevelWarn, Lines: 1})
	for range 5 {
		l.Info("m")
	}
	l.Warn("m")
	l.Close()
	wantLines(t, &b, "WARN msg=m")
}

// TestParallel: of many at once exactly ten get through, and the rest is counted.
func TestParallel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b book
		l := New(&b, Options{})
		var all sync.WaitGroup
		for range 40 {
			all.Go(func() {
				for range 25 {
					l.With("x", 1).Error("dead", "host", "h")
				}
			})
		}
		all.Wait()
		l.Close()
		got := b.lines(t)
		if len(got) != 11 || got[10] != `ERROR msg="more lines like this one were left out" like=dead host=h left_out=990` {
			t.Errorf("%d lines, the last is %q", len(got), got[len(got)-1])
		}
	})
}

// TestTidy: text of others is one line of printable characters and bounded, in both formats.
func TestTidy(t *testing.T) {
	digest, other := strings.Repeat("0123456789abcdef", 4), strings.Repeat("0123456789abcdee", 4)
	hostile := "a\x1b[31m\u009b2J\u202eb\r\nc\x00" + string([]byte{0xff})
	for _, c := range []struct {
		value any
		want  string
	}{
		{"plain", "plain"},
		{"ümlaut – “x”", "ümlaut – “x”"},
		{hostile, "a\ufffd[31m\ufffd2J\ufffdb ; c\ufffd\ufffd"},
		{errors.Join(errors.New("one"), errors.New("two")), "one; two"},
		{errors.New(hostile), "a\ufffd[31m\ufffd2J\ufffdb ; c\ufffd\ufffd"},
		{strings.Repeat("x", maxText+1), strings.Repeat("x", maxText) + "..."},
		{fmt.Errorf("read %s: blob sha256:%s bytes 1+2: abc %s", digest, digest, other), fmt.Sprintf("read %s: blob sha256:%s… bytes 1+2: abc %s", digest, digest[:12], other)},
		{90 * time.Second, "1m30s"},
		{1234567891 * time.Nanosecond, "1.235s"},
		{1500 * time.Microsecond, "1.5ms"},
	} {
		var out bytes.Buffer
		New(&out, Options{JSON: true}).Info("m", "v", c.value)
		var line struct{ V string }
		if err := json.Unmarshal(out.Bytes(), &line); err != nil || line.V != c.want {
			t.Errorf("JSON of %q: %q, %v; want %q", c.value, line.V, err, c.want)
		}
		out.Reset()
		New(&out, Options{}).Info("m", "v", c.value)
		for _, r := range strings.TrimSuffix(out.String(), "\n") {
			if unfit(r) {
				t.Errorf("text of %q has %q", c.value, r)
			}
		}
	}
	var out bytes.Buffer
	New(&out, Options{JSON: true}).Info("a\nb\x1b", "n", 7, "t", true)
	if !strings.HasSuffix(out.String(), `"level":"INFO","msg":"a; b`+"\ufffd"+`","n":7,"t":true}`+"\n") {
		t.Errorf("%s", out.String())
	}
}

func TestParse(t *testing.T) {
	for s, want := range map[string]slog.Level{"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError} {
		if got, err := ParseLevel(s); got != want || err != nil {
			t.Errorf("%s: %v, %v", s, got, err)
		}
	}
	for s, want := range map[string]bool{"text": false, "json": true} {
		if got, err := ParseFormat(s); got != want || err != nil {
			t.Errorf("%s: %v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "WARN", "warning", "2", "trace", "JSON", "xml"} {
		_, level := ParseLevel(s)
		_, format := ParseFormat(s)
		if level == nil || format == nil {
			t.Errorf("%q: %v, %v", s, level, format)
		}
	}
}
