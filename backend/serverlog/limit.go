package serverlog

import (
	"cmp"
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// maxKinds bounds what a limiter remembers. A server's image, or a server, may have something to do with what a line
// is about. Those that find no room are one kind for each level.
const maxKinds = 256

// maxEach bounds the values of a kind's lines that are told apart beyond the kind: see names.each.
const maxEach = 32

// longest is the longest window of a kind that goes on, in first ones.
const longest = 60

// A kind is what lines have in common that are counted together.
type kind struct {
	level   slog.Level
	message string // "" are all that found no room
	names
}

// names are the attributes that say what a line is about.
type names struct {
	subject attr // a blob, host, mirror or device
	errno   attr // what came of it
	// each is the inode or file of a request, and no part of the kind: a registry that is away fails the reads of
	// thousands. But the first line about each of a few gets through: a fault in one is none in another.
	each attr
}

// An attr is one of them, as text. It has no name if there is none.
type attr struct{ name, value string }

// A count is that of one kind from its first line until none came for the length of a window.
type count struct {
	begun   time.Time // the window
	length  time.Duration
	last    time.Time // a line
	lines   int       // within the window
	leftOut int
	each    map[attr]struct{}
}

// pass says whether the next line gets through.
func (c *count) pass(now time.Time, lines int, each attr) bool {
	c.last = now
	c.lines++
	first := false
	if _, said := c.each[each]; each.name != "" && !said && len(c.each) < maxEach {
		if c.each == nil {
			c.each = make(map[attr]struct{})
		}
		c.each[each], first = struct{}{}, true
	}
	if c.lines <= lines || first {
		return true
	}
	c.leftOut++
	return false
}

// A limiter counts for a handler, and all that were made of it by With.
//
// A kind's lines get through in windows: the first few of each. While it goes on, each window is twice as long as the one
// before it, up to a limit, so that a fault of a night does not fill the log. When no line came for as long as the first
// window is, it is over: what comes then is something new, and gets through as the first lines did.
type limiter struct {
	lines  int
	window time.Duration // the first one
	root   slog.Handler  // for lines of its own

	firing sync.WaitGroup // the timer's function; Add under mu
	mu     sync.Mutex     // guards what follows
	kinds  map[kind]*count
	timer  *time.Timer // set while something that was left out is to be said
	due    time.Time   // when it fires
	closed bool
}

// admit says whether a line of this kind gets through.
func (l *limiter) admit(k kind) bool {
	each := k.each
	k.each = attr{}
	l.mu.Lock()
	now := time.Now()
	said := l.expire(k, now)
	if _, there := l.kinds[k]; !there && len(l.kinds) >= maxKinds {
		said = append(said, l.expireAll(now)...)
		if len(l.kinds) >= maxKinds {
			k, each = kind{level: k.level}, attr{}
			said = append(said, l.expire(k, now)...)
		}
	}
	c := l.kinds[k]
	if c == nil {
		c = &count{begun: now, length: l.window}
		l.kinds[k] = c
	}
	pass := c.pass(now, l.lines, each)
	if !pass {
		l.arm(l.end(c), now)
	}
	l.mu.Unlock()
	l.say(said)
	return pass
}

// end is when the window of a kind ends, if no more lines come.
func (l *limiter) end(c *count) time.Time {
	end, quiet := c.begun.Add(c.length), c.last.Add(l.window)
	if quiet.Before(end) {
		return quiet
	}
	return end
}

// expire begins another window of a kind whose window has ended, or forgets it if it is over, and gives the line about
// it if one is due. The caller holds l.mu.
func (l *limiter) expire(k kind, now time.Time) []slog.Record {
	c := l.kinds[k]
	if c == nil || now.Before(l.end(c)) {
		return nil
	}
	n := c.leftOut
	if now.Sub(c.last) >= l.window {
		delete(l.kinds, k)
	} else {
		c.begun, c.length, c.lines, c.leftOut = now, min(2*c.length, longest*l.window), 0, 0
	}
	if n == 0 {
		return nil
	}
	return []slog.Record{k.leftOut(n)}
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
func (k kind) leftOut(n int) slog.Record {
	r := slog.NewRecord(time.Now(), k.level, "more lines like this one were left out", 0)
	if k.message == "" {
		r.Message = "more lines of many kinds were left out"
	} else {
		r.AddAttrs(slog.String("like", k.message))
	}
	for _, a := range []attr{k.subject, k.errno} {
		if a.name != "" {
			r.AddAttrs(slog.String(a.name, a.value))
		}
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

// arm has what is left out said when the first window ends in which something was. The caller holds l.mu.
func (l *limiter) arm(due, now time.Time) {
	if l.closed || l.timer != nil && !due.Before(l.due) {
		return
	}
	if l.timer != nil && l.timer.Stop() {
		l.firing.Done()
	}
	l.firing.Add(1)
	l.due = due
	l.timer = time.AfterFunc(due.Sub(now), l.fire)
}

// fire is the timer's function. One that could not be stopped in time finds nothing that is due.
func (l *limiter) fire() {
	defer l.firing.Done()
	l.mu.Lock()
	now := time.Now()
	said := l.expireAll(now)
	if l.timer != nil && !now.Before(l.due) {
		l.timer = nil
	}
	for _, c := range l.kinds {
		if c.leftOut > 0 {
			l.arm(l.end(c), now)
		}
	}
	l.mu.Unlock()
	l.say(said)
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
	said := l.expireAll(time.Now().Add(longest * l.window))
	l.mu.Unlock()
	l.say(said)
}

// A limitHandler lets through what the limiter admits.
type limitHandler struct {
	next    slog.Handler
	limit   *limiter
	names   names // of all lines, by With
	grouped bool  // attributes are in a group, and say nothing of what lines are about
}

func (h *limitHandler) Enabled(ctx context.Context, level slog.Level) bool {
	return h.next.Enabled(ctx, level)
}

func (h *limitHandler) Handle(ctx context.Context, r slog.Record) error {
	var own names
	if !h.grouped {
		r.Attrs(func(a slog.Attr) bool {
			own.note(a)
			return true
		})
	}
	k := kind{level: r.Level, message: clean(r.Message), names: own.or(h.names)}
	if !h.limit.admit(k) {
		return nil
	}
	return h.next.Handle(ctx, r)
}

// note takes an attribute that says what a line is about. The first of its sort counts.
func (n *names) note(a slog.Attr) {
	var to *attr
	switch a.Key {
	case "blob", "host", "mirror", "device":
		to = &n.subject
	case "errno":
		to = &n.errno
	case "nid", "file":
		to = &n.each
	default:
		return
	}
	*to = cmp.Or(*to, attr{a.Key, clean(a.Value.Resolve().String())})
}

// or fills in what is missing.
func (n names) or(more names) names {
	return names{cmp.Or(n.subject, more.subject), cmp.Or(n.errno, more.errno), cmp.Or(n.each, more.each)}
}

func (h *limitHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	with := *h
	with.next = h.next.WithAttrs(attrs)
	var own names
	for _, a := range attrs {
		if !h.grouped {
			own.note(a)
		}
	}
	with.names = own.or(h.names)
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
