package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/fusefs"
	"github.com/erofs-oci/erofs-oci/nbdserve"
)

func (p *program) mountCommand() *cli.Command {
	return &cli.Command{
		Name:      "mount",
		Usage:     "mount the EROFS layers of an image",
		ArgsUsage: "REF DIR",
		Description: refHelp +
			"The command returns when DIR is usable; a server goes on in the background until\n" +
			"DIR is unmounted, by erofs-oci umount, umount(8) or fusermount3 -u.",
		Flags: append([]cli.Flag{
			&cli.StringFlag{Name: "backend", Value: "auto", EnvVars: []string{"EROFS_OCI_BACKEND"}, Usage: "how to mount: nbd (the kernel's EROFS on a block device), file (the kernel's EROFS on a file), fuse (our own reader; no root), or `auto`: the first of them that can work here"},
			&cli.BoolFlag{Name: "foreground", Aliases: []string{"f"}, Usage: "serve in this process until SIGINT, SIGTERM or SIGHUP, which unmount"},
			&cli.StringSliceFlag{Name: "o", Usage: "mount `OPTIONS` as in mount(8): ro,nosuid,nodev,noexec,noatime,allow_other,..."},
			&cli.StringFlag{Name: "overlay", Usage: "mount writable; keep what is written in `DIR`, for the next mount of the image, too"},
			&cli.BoolFlag{Name: "tmpfs-overlay", Usage: "mount writable; keep what is written in memory, until the mount ends"},
			&cli.IntFlag{Name: "nbd-connections", Value: 1, Usage: "with nbd: `N` sockets to the kernel's device; requests are concurrent on each"},
			recordFlag(),
			&cli.BoolFlag{Name: "supervise", Usage: "with nbd: start another server when this one dies; readers wait meanwhile"},
			metricsFlag(),
		}, append(imageFlags(), prefetchFlags()...)...),
		Action: p.mount,
	}
}

// mountRequest is a parsed mount command.
type mountRequest struct {
	name        string // for /proc/mounts
	dir         string // as RealDir returns it
	backend     string
	reason      string // for the backend, where it was not the user who chose
	mayFallBack bool   // on our own reader: the user named no backend, nor what only nbd has
	overlay     string
	inMemory    bool // the overlay is
	connections int
	supervise   bool
	flags       backend.MountOptions
	source      *sourceOptions
	fuse        fusefs.Backend // for that backend
}

func (p *program) mount(c *cli.Context) error {
	args, err := arguments(c, "REF", "DIR")
	if err != nil {
		return err
	}
	log, err := p.newServerLog(c)
	if err != nil {
		return err
	}
	m, err := parseMount(c)
	if err != nil {
		return err
	}
	if m.source, err = p.readSourceOptions(c, args[0], log.Logger); err != nil {
		return err
	}
	if m.source.metrics, err = metricsOption(c); err != nil {
		return err
	}
	m.name, m.fuse.CacheBytes = m.source.ref.mountName(), m.source.memory
	if m.dir, err = backend.CheckTarget(args[1]); err != nil {
		return err
	}
	if m.reason != "" && p.child == nil {
		if _, err := fmt.Fprintf(p.stdout, "backend %s: %s\n", m.backend, m.reason); err != nil {
			return err
		}
	}
	foreground := c.Bool("foreground") || p.child != nil
	switch {
	case foreground && m.supervise && !p.isWorker():
		return p.superviseMount(c.Context, m, log)
	case foreground:
		return p.serveMount(c.Context, m, log)
	}
	return backend.StartInBackground(c.Context, os.Args[1:], m.source.stdin())
}

func parseMount(c *cli.Context) (m *mountRequest, err error) {
	m = &mountRequest{
		backend: c.String("backend"), connections: c.Int("nbd-connections"), supervise: c.Bool("supervise"),
		overlay: c.String("overlay"), inMemory: c.Bool("tmpfs-overlay"),
	}
	if m.flags, err = backend.ParseMountOptions(c.StringSlice("o")); err != nil {
		return nil, errUsage{err}
	}
	if m.overlay != "" && m.inMemory {
		return nil, usagef("--overlay and --tmpfs-overlay exclude each other")
	}
	if m.overlay, err = absolute(m.overlay); err != nil {
		return nil, err
	}
	switch m.backend {
	case backend.NBD, backend.FILE, backend.FUSE:
	case "auto":
		if m.backend, m.reason, err = backend.Choose(systemProbes()); err != nil {
			return nil, err
		}
	default:
		return nil, usagef("--backend %q is not known; there are nbd, file, fuse and auto", m.backend)
	}
	if m.backend != backend.NBD && (m.supervise || c.IsSet("nbd-connections")) {
		return nil, usagef("--supervise and --nbd-connections go with --backend=nbd, not %s", m.backend)
	}
	m.mayFallBack = m.reason != "" && !m.supervise && !c.IsSet("nbd-connections")
	return m, nil
}

// by is the backend that was asked for; with an overlay over it if one was, or if the
// kernel reads several layers. image tells the image from others.
func (m *mountRequest) by(image string, layers int) backend.Backend {
	var b backend.Backend
	switch m.backend {
	case backend.NBD:
		b = checked{nbdBackend(m.connections, m.source.client.ErrorWait+nbdserve.TimeoutMargin)}
	case backend.FILE:
		b = fusefs.FileBackend{}
	default:
		b = m.fuse
	}
	each := layers > 1 && m.backend != backend.FUSE
	if m.overlay == "" && !m.inMemory && !each {
		return b
	}
	return backend.Overlay{Inner: b, Each: each, Upper: m.overlay, Tmpfs: m.inMemory, Image: image}
}

// mountVolume mounts what was opened. An image that is of a kind which the kernel does not know is mounted by our own
// reader, unless the user named a backend, or what only nbd has.
func (m *mountRequest) mountVolume(ctx context.Context, src *opened, log *slog.Logger) (backend.Mount, error) {
	mounted, err := m.mountChosen(ctx, src, log)
	if !m.mayFallBack || m.backend == backend.FUSE || !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EOPNOTSUPP) {
		return mounted, err
	}
	log.Warn("the kernel does not read this image; our own reader does, as with --backend=fuse", "backend", m.backend, "err", err)
	m.backend = backend.FUSE
	return m.mountChosen(ctx, src, log)
}

// mountChosen mounts what was opened by m.backend.
func (m *mountRequest) mountChosen(ctx context.Context, src *opened, log *slog.Logger) (_ backend.Mount, err error) {
	v := src.volume()
	b := m.by(src.id, 1+len(v.Below))
	if len(v.Below) > 0 && m.backend != backend.FUSE {
		if v, err = fusefs.ForKernel(ctx, v); err != nil {
			return nil, err
		}
	}
	return b.Mount(ctx, v, m.dir, backend.Options{Name: m.name, Flags: m.flags, Log: log, Failed: m.source.meter.failed})
}

// checked looks at the image before a backend that leaves it to the kernel, whose
// reader takes what lies past the end of a block device for zeros.
type checked struct{ backend.Backend }

func (b checked) Mount(ctx context.Context, v backend.Volume, target string, o backend.Options) (backend.Mount, error) {
	if _, err := fusefs.CheckVolume(ctx, v); err != nil {
		return nil, err
	}
	return b.Backend.Mount(ctx, v, target, o)
}

// nbdBackend has a read fail before the kernel's timeout, also where it had to wait
// for others first.
func nbdBackend(connections int, timeout time.Duration) nbdserve.Backend {
	return nbdserve.Backend{
		Connections: connections,
		Timeout:     timeout,
		Server:      nbdserve.Options{ReadTimeout: timeout - nbdserve.TimeoutMargin/2},
	}
}

// serveMount mounts, reports, serves until the mount ends, and cleans up.
func (p *program) serveMount(ctx context.Context, m *mountRequest, log *serverLog) (err error) {
	signals := serverSignals()
	defer signal.Stop(signals)
	run, err := backend.OpenRunDir(p.getenv)
	if err != nil {
		return err
	}
	claim, err := run.Claim(ctx, m.dir)
	if err != nil {
		return err
	}
	defer func() { err = p.release(claim, err) }()
	if err := run.CheckUpper(m.overlay); err != nil {
		return err
	}
	rec := m.record(log)
	if err := claim.Write(rec); err != nil {
		return err
	}
	metering, err := startMetering(m.source, log.Logger)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, metering.Close()) }()
	src, err := p.open(ctx, m.source, log.Logger)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	src.startPrefetch(m.source.prefetch, log.Logger)
	if err := src.checkDevices(ctx); err != nil {
		return err
	}
	m.fuse.Revocable = src.unsure()
	mounted, err := m.mountVolume(ctx, src, log.Logger)
	if err != nil {
		return src.explain(err)
	}
	rec.Backend = m.backend
	src.remember()
	metering.show(src, mountLabels{rec.Reference, rec.Backend})
	watch := watchMount(claim, src, mounted, metering, log.Logger)
	defer func() { err = errors.Join(err, watch.Close()) }()
	src.record(&rec)
	err = p.describe(mounted, &rec)
	if err == nil {
		err = src.recording.begin()
	}
	if err == nil {
		err = p.announce(claim, log, rec)
	}
	if err != nil {
		return errors.Join(err, mounted.Unmount(), mounted.Wait())
	}
	watch.begin(src)
	return untilUnmounted(signals, mounted, log.Logger)
}

// record is what is known of the mount before it is there.
func (m *mountRequest) record(log *serverLog) backend.Record {
	rec := backend.Record{
		Reference: m.source.ref.String(), Backend: m.backend, Dir: m.dir, PID: os.Getpid(),
		Since: time.Now().UTC().Truncate(time.Second), Access: m.source.access(),
		Overlay: m.overlay, TmpfsOverlay: m.inMemory,
	}
	log.options.note(&rec.Access)
	return rec
}

// serverSignals are the signals that end a server. Who reads what it says may go
// away, but the mount must not die of that.
func serverSignals() chan os.Signal {
	signal.Ignore(syscall.SIGPIPE)
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, endSignals()...)
	return signals
}

// describe adds to the record what is known once the mount is there.
func (p *program) describe(mounted backend.Mount, rec *backend.Record) error {
	rec.Device = mounted.Device()
	layers := []backend.Mount{mounted}
	if over, ok := mounted.(interface{ Inner() []backend.Mount }); ok {
		layers = over.Inner()
	}
	var all []nbdserve.Attachment
	for _, l := range layers {
		onNBD, ok := l.(*nbdserve.Mount)
		if !ok {
			return nil
		}
		attachments := onNBD.Attachments()
		if attachments == nil {
			return nil // the devices end with this process
		}
		all = append(all, attachments...)
	}
	var err error
	rec.NBD, err = json.Marshal(all)
	return err
}

// announce makes the mount known: to list, and to whoever waits for it.
func (p *program) announce(claim *backend.Claim, log *serverLog, rec backend.Record) error {
	if p.child == nil {
		logMounted(log.Logger, rec)
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
	logMounted(log.Logger, rec)
	return nil
}

// release is the last that the server of a mount does; err is what it could not do before. Nobody watches a server in
// the background: its last words are in the log before that goes, and in the record, for who unmounts.
func (p *program) release(claim *backend.Claim, err error) error {
	if err == nil || !p.reported {
		return errors.Join(err, claim.Release())
	}
	p.sayEnded(err)
	left := claim.End(undone(err))
	if left != nil {
		p.sayEnded(left)
	}
	return errSilent{errors.Join(err, left)}
}

// sayEnded is for who may read standard error, which is the log now, and has its format.
func (p *program) sayEnded(err error) { p.log.Error("the server has ended", "err", err) }

// undone is the text of an error, but for wrong bytes: those are recorded when they come to light.
func undone(err error) string {
	several, ok := err.(interface{ Unwrap() []error })
	if !ok || err.Error() != errors.Join(several.Unwrap()...).Error() { // it says more than its parts
		if _, wrong := err.(*wrongError); wrong {
			return ""
		}
		return oneLine(err)
	}
	var texts []string
	for _, e := range several.Unwrap() {
		if text := undone(e); text != "" {
			texts = append(texts, text)
		}
	}
	return strings.Join(texts, "; ")
}

func logMounted(log *slog.Logger, rec backend.Record) {
	log.Info("mounted", "dir", rec.Dir, "reference", rec.Reference, "backend", rec.Backend, "pid", rec.PID)
}

// untilUnmounted waits for the mount to end. The first signal unmounts; a second
// one ends the process, and with it what still waits for an answer.
func untilUnmounted(signals <-chan os.Signal, mounted backend.Mount, log *slog.Logger) error {
	ended := make(chan error, 1)
	go func() { ended <- mounted.Wait() }()
	select {
	case err := <-ended:
		log.Info("the mount has ended")
		return err
	case s := <-signals:
		log.Info("told to end; the mount is taken away", "signal", s)
	}
	if err := mounted.Unmount(); err != nil {
		log.Error("the mount cannot be taken away; it is served on, until a second signal", "err", err)
	}
	select {
	case err := <-ended:
		return err
	case s := <-signals:
		return fmt.Errorf("ended by a second signal (%v) while the file system was in use", s)
	}
}
