package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/nbdserve"
	"github.com/erofs-oci/erofs-oci/registry"
)

func (p *program) reattachCommand() *cli.Command {
	return &cli.Command{
		Name:      "reattach",
		Usage:     "give orphaned nbd mounts a server again",
		ArgsUsage: "[DIR]",
		Description: "A mount of --backend=nbd whose server was killed, or is to be replaced by a new version,\n" +
			"keeps its readers waiting. This starts another server for it; they go on without an error.",
		Flags: append(logFlags(),
			&cli.BoolFlag{Name: "all", Usage: "every orphaned mount"},
			&cli.BoolFlag{Name: "foreground", Aliases: []string{"f"}, Usage: "serve in this process"},
			&cli.BoolFlag{Name: "password-stdin", Usage: "read the password of the recorded user name from standard input"},
		),
		Action: p.reattach,
	}
}

func (p *program) reattach(c *cli.Context) error {
	run, err := backend.OpenRunDir(p.getenv)
	if err != nil {
		return err
	}
	log, err := readLogOptions(c)
	if err != nil {
		return err
	}
	if c.Bool("all") {
		if c.NArg() != 0 || c.Bool("foreground") {
			return usagef("reattach --all takes no DIR, and serves in the background")
		}
		return p.reattachAll(c.Context, run, log)
	}
	args, err := arguments(c, "DIR")
	if err != nil {
		return err
	}
	dir, err := backend.RealDir(args[0])
	if err != nil {
		return err
	}
	password := ""
	if c.Bool("password-stdin") {
		if password, err = readPassword(c.Context, p.stdin); err != nil {
			return err
		}
	}
	if c.Bool("foreground") || p.child != nil {
		return p.serveReattached(c.Context, run, dir, password, log)
	}
	return backend.StartInBackground(c.Context, os.Args[1:], (&sourceOptions{client: registry.Options{Password: password}}).stdin())
}

// reattachAll starts a server for each orphan; one that fails does not keep the
// others waiting.
func (p *program) reattachAll(ctx context.Context, run *backend.RunDir, log logOptions) error {
	entries, err := run.List()
	errs := []error{err}
	for _, e := range entries {
		if e.State != backend.Orphaned {
			continue
		}
		if err := backend.StartInBackground(ctx, append(append([]string{"reattach"}, log.flags()...), e.Dir), nil); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", e.Dir, err))
		}
	}
	return errors.Join(errs...)
}

// serveReattached takes the mount on dir over and serves it to its end.
func (p *program) serveReattached(ctx context.Context, run *backend.RunDir, dir, password string, given logOptions) (err error) {
	signals := serverSignals()
	defer signal.Stop(signals)
	claim, rec, err := run.Adopt(dir)
	if err != nil {
		return err
	}
	adopted := false
	defer func() {
		if adopted {
			err = p.release(claim, err)
		} else {
			// Somebody else may be luckier: the record stays.
			err = errors.Join(err, claim.Abandon())
		}
	}()
	log, err := p.newLog(given.or(recordedLog(rec.Access)))
	if err != nil {
		return err
	}
	log.options.note(&rec.Access)
	metering, err := resumeMetering(rec.Access, log.Logger)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, metering.Close()) }()
	src, devices, err := p.openRecorded(ctx, rec, password, metering, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	if rec.Wrong != "" {
		src.foundWrong(rec.Wrong)
	}
	mounted, err := takeOver(ctx, rec, devices, src, backend.Options{Log: log.Logger, Failed: metering.failed})
	if err != nil {
		return err
	}
	metering.show(src, mountLabels{rec.Reference, rec.Backend})
	watch := watchMount(claim, src, mounted, metering, log.Logger)
	defer func() { err = errors.Join(err, watch.Close()) }()
	adopted = true
	rec.PID = os.Getpid()
	if err := p.announce(claim, log, rec); err != nil {
		// The mount is served; only who asked does not hear of it.
		log.Error("the mount is served again, and who asked for that could not be told", "err", err)
	}
	src.recording.start()
	watch.begin(src)
	return untilUnmounted(signals, mounted, log.Logger)
}

// takeOver serves the recorded devices from now on.
func takeOver(ctx context.Context, rec backend.Record, devices []nbdserve.Attachment, src *opened, o backend.Options) (backend.Mount, error) {
	layers, err := attachedTo(rec, devices, src.volume())
	if err != nil {
		return nil, err
	}
	var mounts []backend.Mount
	abandon := func() (err error) {
		for _, m := range mounts {
			err = errors.Join(err, m.(*nbdserve.Mount).Abandon())
		}
		return err
	}
	for _, l := range layers {
		d := l.devices[0]
		m, err := nbdBackend(d.Connections, d.Timeout).Reattach(ctx, l.volume, l.devices, rec.Dir, o)
		if err != nil {
			return nil, errors.Join(err, abandon())
		}
		mounts = append(mounts, m)
	}
	if rec.Overlay == "" && !rec.TmpfsOverlay && len(rec.Layers) == 0 {
		return mounts[0], nil
	}
	over := backend.Overlay{Upper: rec.Overlay, Tmpfs: rec.TmpfsOverlay, Image: src.id}
	m, err := over.Resume(mounts, rec.Dir, rec.Device, o.Log)
	if err != nil {
		return nil, errors.Join(err, abandon())
	}
	return m, nil
}

// An attached layer is a volume and the devices that it was served as.
type attached struct {
	volume  backend.Volume
	devices []nbdserve.Attachment
}

// attachedTo finds the devices of each layer. Low ones that nothing is to be seen of
// have none.
func attachedTo(rec backend.Record, devices []nbdserve.Attachment, v backend.Volume) ([]attached, error) {
	if len(rec.Layers) == 0 {
		return []attached{{v, devices}}, nil
	}
	layers := v.Layers()
	if len(devices) > len(layers) {
		return nil, fmt.Errorf("the record of %s: %d devices for %d layers", rec.Dir, len(devices), len(layers))
	}
	var all []attached
	for i := range devices {
		all = append(all, attached{layers[i], devices[i : i+1]})
	}
	return all, nil
}

// openRecorded opens the blobs of a record: by digest, whatever the reference
// leads to now, or the files, if they are what they were.
func (p *program) openRecorded(ctx context.Context, rec backend.Record, password string, metering *metering, log *serverLog) (_ *opened, devices []nbdserve.Attachment, err error) {
	if err := json.Unmarshal(rec.NBD, &devices); err != nil {
		return nil, nil, fmt.Errorf("the record of %s: %w", rec.Dir, err)
	}
	if len(devices) == 0 {
		return nil, nil, fmt.Errorf("the record of %s: no device", rec.Dir)
	}
	if len(rec.Files) > 0 {
		o, err := reopenFiles(ctx, rec)
		return o, devices, err
	}
	ref, err := registry.ParseReference(rec.Reference)
	if err != nil {
		return nil, nil, fmt.Errorf("the record of %s: %w", rec.Dir, err)
	}
	wait, err := parseOnError(rec.Access.OnError)
	if err != nil {
		return nil, nil, fmt.Errorf("the record of %s: %w", rec.Dir, err)
	}
	s := &sourceOptions{cacheDir: rec.Access.CacheDir, verify: cmp.Or(rec.Access.Verify, verifyAuto), client: registry.Options{
		PlainHTTP: rec.Access.PlainHTTP, AuthFile: rec.Access.AuthFile, ErrorWait: wait, Logger: log.Logger,
		Username: rec.Access.Username, Password: password,
		MaxConnsPerHost: rec.Access.MaxConnsPerHost,
	}}
	s.keep = keptOptions(rec.Access)
	s.prefetch = recordedPrefetch(rec.Access, log.Logger)
	s.record, s.resume = rec.Access.Record, true
	metering.measure(s)
	if err := s.secure(rec.Access.TLSCA, !rec.Access.SkipTLSVerify); err != nil {
		return nil, nil, err
	}
	if rec.Access.Offline {
		s.goOffline()
	}
	if s.client.Username != "" && password == "" && !s.offline {
		return nil, nil, fmt.Errorf("%s was mounted as user %s: give the password with reattach --password-stdin", rec.Dir, rec.Access.Username)
	}
	o := &opened{}
	o.image, o.layers = recordedLayers(rec)
	if o.client, err = registry.New(s.client); err != nil {
		return nil, nil, err
	}
	if err := p.openBlobs(ctx, o, ref, s, log.Logger); err != nil {
		return nil, nil, errors.Join(err, o.Close())
	}
	o.startPrefetch(s.prefetch, log.Logger)
	return o, devices, nil
}

func (p *program) disconnectCommand() *cli.Command {
	return &cli.Command{
		Name:      "disconnect",
		Usage:     "force the end of an nbd device of ours",
		ArgsUsage: "/dev/nbdN",
		Description: "Reads of the device fail from now on. What is mounted on it stays mounted, and is to be\n" +
			"unmounted. Use it where umount cannot end a mount whose registry will not come back.",
		Action: func(c *cli.Context) error {
			args, err := arguments(c, "/dev/nbdN")
			if err != nil {
				return err
			}
			number, ok := strings.CutPrefix(filepath.Clean(args[0]), "/dev/nbd")
			index, err := strconv.Atoi(number)
			if !ok || err != nil || index < 0 {
				return usagef("%q is not an nbd device; want /dev/nbdN", args[0])
			}
			ours, err := nbdserve.Devices()
			if err != nil {
				return err
			}
			for _, d := range ours {
				if d.Index == index {
					return nbdserve.Disconnect(c.Context, index)
				}
			}
			return fmt.Errorf("/dev/nbd%d is not a connected device of erofs-oci; nbd-client -d disconnects others", index)
		},
	}
}
