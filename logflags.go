package main

import (
	"cmp"
	"io"
	"log/slog"
	"sync/atomic"

	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/backend/serverlog"
)

// The environment's words for the flags.
const (
	envLogFormat = "EROFS_OCI_LOG_FORMAT"
	envLogLevel  = "EROFS_OCI_LOG_LEVEL"
)

// logFlags say how a command writes its log, and how much. They go with images in files, too.
func logFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "log-format", EnvVars: []string{envLogFormat}, Usage: "write the log as `FORMAT`: text or json", DefaultText: "text"},
		&cli.StringFlag{Name: "log-level", EnvVars: []string{envLogLevel}, Usage: "log what is of `LEVEL` or worse: debug, info, warn or error", DefaultText: "warn; error where the command itself says what went wrong"},
	}
}

// logOptions are the words of the flags; those that nobody gave are empty.
type logOptions struct{ format, level string }

// readLogOptions checks the words.
func readLogOptions(c *cli.Context) (logOptions, error) {
	o := logOptions{c.String("log-format"), c.String("log-level")}
	_, err := o.parse()
	return o, err
}

// or fills in what is missing.
func (o logOptions) or(more logOptions) logOptions {
	return logOptions{cmp.Or(o.format, more.format), cmp.Or(o.level, more.level)}
}

// parse takes text and warnings for what is missing.
func (o logOptions) parse() (parsed serverlog.Options, err error) {
	o = o.or(logOptions{"text", "warn"})
	if parsed.JSON, err = serverlog.ParseFormat(o.format); err != nil {
		return parsed, usagef("--log-format %w", err)
	}
	if parsed.Level, err = serverlog.ParseLevel(o.level); err != nil {
		return parsed, usagef("--log-level %w", err)
	}
	return parsed, nil
}

// flags are the flags for another process. Flags are stronger than the environment.
func (o logOptions) flags() (flags []string) {
	if o.format != "" {
		flags = append(flags, "--log-format="+o.format)
	}
	if o.level != "" {
		flags = append(flags, "--log-level="+o.level)
	}
	return flags
}

// recordedLog is what a record says of the log of its server.
func recordedLog(a backend.Access) logOptions { return logOptions{a.LogFormat, a.LogLevel} }

// note has another server of the mount log in the same way.
func (o logOptions) note(a *backend.Access) { a.LogFormat, a.LogLevel = o.format, o.level }

// A serverLog is a logger whose lines go to the terminal while a user watches, and to a file afterwards.
type serverLog struct {
	*serverlog.Log
	out     *switchWriter
	options logOptions
}

type switchWriter struct{ w atomic.Pointer[io.Writer] }

func (s *switchWriter) Write(p []byte) (int, error) { return (*s.w.Load()).Write(p) }

func (l *serverLog) redirect(w io.Writer) { l.out.w.Store(&w) }

// newServerLog is the log of a command that goes on for as long as it is let.
func (p *program) newServerLog(c *cli.Context) (*serverLog, error) {
	o, err := readLogOptions(c)
	if err != nil {
		return nil, err
	}
	return p.newLog(o)
}

// newCommandLog is the log of a command whose error says what there is to say.
func (p *program) newCommandLog(c *cli.Context) (*slog.Logger, error) {
	o, err := readLogOptions(c)
	if err != nil {
		return nil, err
	}
	l, err := p.newLog(o.or(logOptions{level: "error"}))
	if err != nil {
		return nil, err
	}
	return l.Logger, nil
}

// newLog makes the log of this process, which run closes.
func (p *program) newLog(o logOptions) (*serverLog, error) {
	parsed, err := o.parse()
	if err != nil {
		return nil, err
	}
	out := &switchWriter{}
	out.w.Store(&p.stderr)
	p.log = &serverLog{serverlog.New(out, parsed), out, o}
	return p.log, nil
}

// closeLog says what the log has yet to say.
func (p *program) closeLog() {
	if p.log != nil {
		p.log.Close()
	}
}
