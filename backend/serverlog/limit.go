package serverlog

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// maxKinds bounds what a limiter remembers. A server's image, or a server, may have something to do with what a line
// is about. Those that find no room are one kind for each level.
const maxKinds = 256

// A kind is what lines have in common that are counted together.
type kind struct {
	level   slog.Level
	message string // "" are all that found no room
	subject subject
}

// A subject is an attribute that says what a line is about.
type subject struct{ name, value string }

// A count is that of one kind within its window.
type count struct {
	begun   time.Time
	lines   int
	leftOut int
}

// A limiter counts for a handler, and all that were made of it by With.
type limiter struct {
	lines  int
	window time.Duration
	root   slog.Handler // for lines of its own

	firing sync.WaitGroup // the timer's function; Add under mu
	mu     sync.Mutex     // guards what follows
	kinds  map[kind]*count
	timer  *time.Timer // set while something that was left out is to be said
	closed bool
}

// admit says whether a line of this kind gets through.
func (l *limiter) admit(k kind) bool {
	l.mu.Lock()
	now := time.Now()
	said := l.expire(k, now)
	if _, there := l.kinds[k]; !there && len(l.kinds) >= maxKinds {
		said = append(said, l.expireAll(now)...)
		if len(l.kinds) >= maxKinds {
			k = kind{level: k.level}
			said = append(said, l.expire(k, now)...)
		}
	}
	c := l.kinds[k]
	if c == nil {
		c = &count{begun: now}
		l.kinds[k] = c
	}
	c.lines++
	pass := c.lines <= l.lines
	if !pass {
		c.leftOut++
		l.arm(c.begun.Add(l.window).Sub(now))
	}
	l.mu.Unlock()
	l.say(said)
	return pass
}

// expire forgets a kind whose window has ended, and gives the line about it if one is due. The caller holds l.mu.
func (l *limiter) expire(k kind, now time.Time) []slog.Record {
	c := l.kinds[k]
	if c == nil || now.Sub(c.begun) < l.window {
		return nil
	}
	delete(l.kinds, k)
	if c.leftOut == 0 {
		return nil
	}
	return []slog.Record{k.leftOut(now, c.leftOut)}
}

// expireAll is expire for every kind. The caller holds l.mu.
func (l *limiter) expireAll(now time.Time) (said []slog.Record) {
	for k := range l.kinds {
		said = append(said, l.expire(k, now)...)
	}
	slices.SortFunc(said, func(a, b slog.Record) int { return int(a.Level - b.Level) })
	return said
}

// leftOut is the line that says how many lines of this kind there are not.
func (k kind) leftOut(now time.Time, n int) slog.Record {
	r := slog.NewRecord(now, k.level, "more lines like this one were left out", 0)
	if k.message == "" {
		r.Message = "more lines of many kinds were left out"
	} else {
		r.AddAttrs(slog.String("like", k.message))
	}
	if k.subject.name != "" {
		r.AddAttrs(slog.String(k.subject.name, k.subject.value))
	}
	r.AddAttrs(slog.Int("left_out", n))
	return r
}

// say writes lines of the limiter's own. The caller does not hold l.mu: a writer may be slow.
func (l *limiter) say(lines []slog.Record) {
	for _, r := range lines {
		_ = l.root.Handle(context.Background(), r) // nobody could be told: slog.Logger heeds no error, either
	}
}

// arm has what is left out said when its window ends. The caller holds l.mu.
func (l *limiter) arm(in time.Duration) {
	if l.timer != nil || l.closed {
		return
	}
	l.firing.Add(1)
	l.timer = time.AfterFunc(in, func() {
		defer l.firing.Done()
		l.mu.Lock()
		now := time.Now()
		l.timer = nil
		said := l.expireAll(now)
		next := time.Duration(-1)
		for _, c := range l.kinds {
			if left := c.begun.Add(l.window).Sub(now); c.leftOut > 0 && (next < 0 || left < next) {
				next = left
			}
		}
		if next >= 0 {
			l.arm(next)
		}
		l.mu.Unlock()
		l.say(said)
	})
}

func (l *limiter) close() {
	l.mu.Lock()
	l.closed = true
	if l.timer != nil && l.timer.Stop() {
		l.firing.Done()
	}
	l.timer = nil
	l.mu.Unlock()
	l.firing.Wait()
	l.mu.Lock()
	said := l.expireAll(time.Now().Add(l.window))
	l.mu.Unlock()
	l.say(said)
}

// A limitHandler lets through what the limiter admits.
type limitHandler struct {
	next    slog.Handler
	limit   *limiter
	subject subject // what all lines are about, by With
	grouped bool    // attributes are in a group, and are no subjects
}

func (h *limitHandler) Enabled(ctx context.Context, level slog.Level) bool {
	return h.next.Enabled(ctx, level)
}

func (h *limitHandler) Handle(ctx context.Context, r slog.Record) error {
	k := kind{level: r.Level, message: clean(r.Message), subject: h.subject}
	if !h.grouped {
		r.Attrs(func(a slog.Attr) bool {
			found, ok := subjectOf(a)
			if ok {
				k.subject = found
			}
			return !ok
		})
	}
	if !h.limit.admit(k) {
		return nil
	}
	return h.next.Handle(ctx, r)
}

// subjectOf says whether lines with this attribute are counted apart from those with another value of it.
func subjectOf(a slog.Attr) (subject, bool) {
	switch a.Key {
	case "blob", "host", "mirror", "device":
		return subject{a.Key, clean(a.Value.Resolve().String())}, true
	}
	return subject{}, false
}

func (h *limitHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	with := *h
	with.next = h.next.WithAttrs(attrs)
	for _, a := range attrs {
		if found, ok := subjectOf(a); ok && !h.grouped {
			with.subject = found
		}
	}
	return &with
}

func (h *limitHandler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	with := *h
	with.next, with.grouped = h.next.WithGroup(name), true
	return &with
}
