// Package serverlog makes the loggers of the program: log/slog in one of its two formats, with three things added
// that a log needs which a server writes for weeks about machines that are not its own.
//
//	record → limit → level, format → writer
//	           └ ten lines of a kind a minute, fewer while it goes on; the others are counted, and the count is said
//
// A registry that is down under a thousand readers is one fact and not a thousand: see Options.Lines. What servers and
// images say is put on one line, without control characters and at a bounded length, in both formats: a log is read on
// terminals. Durations are text (1m30s) in JSON, too.
//
// It does not decide what is worth a line: docs/logs.md has the rules, the names of attributes and every message.
package serverlog

import (
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"
	"unicode"
)

// Defaults of Options.
const (
	DefaultLines  = 10
	DefaultWindow = time.Minute
)

// Options of a Log. The zero value works: text, from information on, limited.
type Options struct {
	JSON  bool
	Level slog.Level
	// Lines is how many lines of one kind get through within Window, which begins with the first of them. A kind is a
	// level, a message, an errno, and the blob, host, mirror or device that it is about. Beside these, the first line
	// about each of a few inodes or files gets through. While a kind goes on, each window is twice as long as the one
	// before it, up to 60 of the first; it is over when no line came within Window. What is left out is counted: a line
	// says so when the window ends, or when the log is closed. Nothing is left out where Level lets debugging through:
	// who asks for everything is to get it. 0 and 0 are the defaults.
	Lines  int
	Window time.Duration
}

// A Log is a logger. Close is due when it is not needed any longer.
type Log struct {
	*slog.Logger
	limit *limiter // nil without one
}

// New makes a logger that writes each line to w by one Write.
func New(w io.Writer, o Options) *Log {
	options := &slog.HandlerOptions{Level: o.Level, ReplaceAttr: tidy}
	var h slog.Handler = slog.NewTextHandler(w, options)
	if o.JSON {
		h = slog.NewJSONHandler(w, options)
	}
	if o.Level <= slog.LevelDebug {
		return &Log{Logger: slog.New(h)}
	}
	if o.Lines == 0 {
		o.Lines = DefaultLines
	}
	if o.Window == 0 {
		o.Window = DefaultWindow
	}
	limit := &limiter{lines: o.Lines, window: o.Window, root: h, kinds: make(map[kind]*count)}
	return &Log{slog.New(&limitHandler{next: h, limit: limit}), limit}
}

// Close says what was left out and not said yet. Lines that come later get through as before; only what is left out of
// them nobody hears of.
func (l *Log) Close() {
	if l.limit != nil {
		l.limit.close()
	}
}

// ParseLevel reads what a user calls a level.
func ParseLevel(s string) (slog.Level, error) {
	switch s {
	case "debug":
		return slog.LevelDebug, nil
	case "info":
		return slog.LevelInfo, nil
	case "warn":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	}
	return 0, fmt.Errorf("%q is not known; there are debug, info, warn and error", s)
}

// ParseFormat reads what a user calls a format.
func ParseFormat(s string) (json bool, err error) {
	switch s {
	case "text":
		return false, nil
	case "json":
		return true, nil
	}
	return false, fmt.Errorf("%q is not known; there are text and json", s)
}

// maxText bounds one value of a line, and its message.
const maxText = 2 << 10

// tidy makes text fit for a log, wherever it comes from.
func tidy(_ []string, a slog.Attr) slog.Attr {
	switch a.Value.Kind() {
	case slog.KindString:
		a.Value = slog.StringValue(clean(a.Value.String()))
	case slog.KindDuration:
		d := a.Value.Duration()
		if d > time.Second {
			d = d.Round(time.Millisecond)
		}
		a.Value = slog.StringValue(d.String())
	case slog.KindAny:
		switch v := a.Value.Any().(type) {
		case error:
			a.Value = slog.StringValue(brief(clean(v.Error())))
		case slog.Level:
			// The handler knows how to write it.
		case fmt.Stringer:
			a.Value = slog.StringValue(clean(v.String()))
		}
	}
	return a
}

// clean puts s on one line. Errors that were joined stand on a line each.
func clean(s string) string {
	cut := len(s) > maxText
	if cut {
		s = s[:maxText]
	}
	if strings.ContainsFunc(s, unfit) || strings.ContainsRune(s, unicode.ReplacementChar) {
		s = strings.ReplaceAll(strings.TrimSpace(s), "\n", "; ")
		s = strings.Map(func(r rune) rune {
			switch {
			case unicode.IsSpace(r):
				return ' '
			case !unicode.IsPrint(r):
				return unicode.ReplacementChar
			}
			return r
		}, s)
	}
	if cut {
		s += "..."
	}
	return s
}

// brief cuts digests that an error names again: each who passes it on says which blob it was about.
func brief(s string) string {
	const whole, short = 64, 12 // hexadecimal digits
	var out strings.Builder
	for said := make(map[string]bool); s != ""; {
		n := strings.IndexFunc(s, func(r rune) bool { return !isHex(r) })
		if n < 0 {
			n = len(s)
		}
		if run := s[:n]; n >= whole && said[run] {
			out.WriteString(run[:short] + "…")
		} else {
			out.WriteString(run)
			said[run] = true
		}
		s = s[n:]
		next := strings.IndexFunc(s, isHex)
		if next < 0 {
			next = len(s)
		}
		out.WriteString(s[:next])
		s = s[next:]
	}
	return out.String()
}

func isHex(r rune) bool { return '0' <= r && r <= '9' || 'a' <= r && r <= 'f' }

func unfit(r rune) bool { return r != ' ' && !unicode.IsPrint(r) }
