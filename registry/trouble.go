package registry

import (
	"context"
	"errors"
	"log/slog"
	"time"
)

// lateAfter is how long a host is in trouble, or data late, before that is worth a warning. What mends itself sooner
// is information.
const lateAfter = time.Second

// A line is one for the log; the zero value is none.
type line struct {
	level   slog.Level
	message string
	attrs   []slog.Attr
}

func (l line) write(log *slog.Logger) {
	if l.message != "" {
		log.LogAttrs(context.Background(), l.level, l.message, l.attrs...)
	}
}

// mirrorKey marks the requests for a mirror on a host of its own. They have no lines here: a mirror is left, and
// place.leave says so.
type mirrorKey struct{}

func forMirror(ctx context.Context) context.Context { return context.WithValue(ctx, mirrorKey{}, true) }

func ofMirror(ctx context.Context) bool { return ctx.Value(mirrorKey{}) != nil }

// failed takes note of when the trouble began that a request met with, and gives the line that is due when it has
// lasted, or is known to last: one for all requests of all readers.
func (g *gate) failed(req asked, now time.Time, err error) line {
	if g.trouble == nil {
		g.since, g.said = req.at, false
	}
	var status *StatusError
	pause := time.Duration(0)
	if errors.As(err, &status) {
		pause = status.retryAfter
	}
	if g.said || req.mirror || now.Sub(g.since) < lateAfter && pause < lateAfter {
		return line{}
	}
	g.said = true
	attrs := []slog.Attr{slog.String("host", req.host), slog.Duration("for", now.Sub(g.since))}
	if pause > 0 {
		attrs = append(attrs, slog.Duration("retry_after", pause))
	}
	return line{slog.LevelWarn, "a host is in trouble; it is asked again, and readers wait", append(attrs, slog.Any("err", err))}
}

// wentWell gives the line about the end of a trouble. It takes back what the log said, and so has the same level. With
// an error that no new try would change, whoever asked says what there is to say.
func (g *gate) wentWell(req asked, now time.Time, err error) line {
	if g.trouble == nil || err != nil || req.mirror && !g.said {
		return line{}
	}
	host := slog.String("host", req.host)
	if g.said {
		return line{slog.LevelWarn, "the host answers again", []slog.Attr{host, slog.Duration("for", now.Sub(g.since))}}
	}
	// For how long is not known: it may be that nobody asked.
	return line{slog.LevelInfo, "a host was in trouble for a moment", []slog.Attr{host, slog.Any("err", g.trouble)}}
}
