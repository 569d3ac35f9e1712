package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/fusefs"
	"github.com/erofs-oci/erofs-oci/registry"
)

func (p *program) mountCommand() *cli.Command {
	return &cli.Command{
		Name:      "mount",
		Usage:     "mount an EROFS layer of an image",
		ArgsUsage: "REF DIR",
		Description: "REF is [docker://]HOST/REPOSITORY[:TAG][@DIGEST]; without HOST it is docker.io's.\n" +
			"The command returns when DIR is usable; a server goes on in the background until\n" +
			"DIR is unmounted, by erofs-oci umount, umount(8) or fusermount3 -u.",
		Flags: append([]cli.Flag{
			&cli.StringFlag{Name: "backend", Value: "fuse", Usage: "how to mount: `fuse`"},
			&cli.BoolFlag{Name: "foreground", Aliases: []string{"f"}, Usage: "serve in this process until SIGINT or SIGTERM, which unmount"},
			&cli.StringSliceFlag{Name: "o", Usage: "mount `OPTIONS` as in mount(8): ro,nosuid,nodev,noexec,noatime,allow_other,..."},
		}, sourceFlags()...),
		Action: p.mount,
	}
}

// mountRequest is a parsed mount command.
type mountRequest struct {
	ref     registry.Reference
	dir     string // as RealDir returns it
	backend string
	flags   backend.MountOptions
	source  *sourceOptions
}

func (p *program) mount(c *cli.Context) error {
	args, err := arguments(c, "REF", "DIR")
	if err != nil {
		return err
	}
	log := newServerLog(p.stderr)
	m := &mountRequest{backend: c.String("backend")}
	if m.backend != "fuse" {
		return usagef("--backend %q is not known; there is fuse", m.backend)
	}
	if m.flags, err = backend.ParseMountOptions(c.StringSlice("o")); err != nil {
		return errUsage{err}
	}
	if m.ref, err = registry.ParseReference(args[0]); err != nil {
		return err
	}
	if m.dir, err = backend.CheckTarget(args[1]); err != nil {
		return err
	}
	if m.source, err = p.readSourceOptions(c, log.Logger); err != nil {
		return err
	}
	if c.Bool("foreground") || p.child != nil {
		return p.serveMount(c.Context, m, log)
	}
	var stdin io.Reader
	if m.source.client.Password != "" {
		stdin = strings.NewReader(m.source.client.Password)
	}
	return backend.StartInBackground(c.Context, stdin)
}

// serveMount mounts, reports, serves until the mount ends, and cleans up.
func (p *program) serveMount(ctx context.Context, m *mountRequest, log *serverLog) (err error) {
	// Who reads what we say may go away; the mount must not die of that.
	signal.Ignore(syscall.SIGPIPE)
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, endSignals()...)
	defer signal.Stop(signals)

	run, err := backend.OpenRunDir(p.getenv)
	if err != nil {
		return err
	}
	claim, err := run.Claim(ctx, m.dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, claim.Release()) }()
	rec := backend.Record{
		Reference: m.ref.String(), Backend: m.backend, Dir: m.dir, PID: os.Getpid(), Since: time.Now().UTC().Truncate(time.Second),
	}
	if err := claim.Write(rec); err != nil {
		return err
	}
	src, err := p.open(ctx, m.ref, m.source, log.Logger)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	mounted, err := fusefs.Backend{}.Mount(ctx, backend.Volume{Primary: src.blob}, m.dir,
		backend.Options{Name: m.ref.String(), Flags: m.flags, Log: log.Logger})
	if err != nil {
		return src.explain(err)
	}
	rec.Manifest, rec.Digest, rec.Device = src.image.Digest.String(), src.layer.Digest.String(), mounted.Device()
	if err := p.announce(claim, log, rec); err != nil {
		return errors.Join(err, mounted.Unmount(), mounted.Wait())
	}
	return untilUnmounted(signals, mounted, log.Logger)
}

// announce makes the mount known: to list, and to whoever waits for it.
func (p *program) announce(claim *backend.Claim, log *serverLog, rec backend.Record) error {
	if p.child == nil {
		return claim.Write(rec)
	}
	rec.Log = claim.LogPath()
	file, err := backend.OpenLog(rec.Log)
	if err != nil {
		return err
	}
	if err := claim.Write(rec); err != nil {
		return err
	}
	if err := p.child.Ready(file); err != nil {
		return err
	}
	p.reported = true
	log.redirect(file)
	return nil
}

// untilUnmounted waits for the mount to end. The first signal unmounts; a second
// one ends the process, and with it what still waits for an answer.
func untilUnmounted(signals <-chan os.Signal, mounted backend.Mount, log *slog.Logger) error {
	ended := make(chan error, 1)
	go func() { ended <- mounted.Wait() }()
	select {
	case err := <-ended:
		return err
	case <-signals:
	}
	if err := mounted.Unmount(); err != nil {
		log.Error("unmount", "err", err)
	}
	select {
	case err := <-ended:
		return err
	case s := <-signals:
		return fmt.Errorf("ended by a second signal (%v) while the file system was in use", s)
	}
}

// serverLog is a logger whose lines go to the terminal while a user watches, and
// to a file afterwards.
type serverLog struct {
	*slog.Logger
	out *switchWriter
}

type switchWriter struct{ w atomic.Pointer[io.Writer] }

func (s *switchWriter) Write(p []byte) (int, error) { return (*s.w.Load()).Write(p) }

func newServerLog(w io.Writer) *serverLog {
	out := &switchWriter{}
	out.w.Store(&w)
	return &serverLog{slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: slog.LevelWarn})), out}
}

func (l *serverLog) redirect(w io.Writer) { l.out.w.Store(&w) }
