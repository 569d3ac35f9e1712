package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/urfave/cli/v2"
	"golang.org/x/sync/errgroup"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/fusefs"
	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
	"github.com/erofs-oci/erofs-oci/registry/lastknown"
)

// sourceFlags say which bytes are meant and how to get at them.
func sourceFlags() []cli.Flag {
	flags := append([]cli.Flag{
		&cli.StringFlag{Name: "platform", Usage: "choose `OS/ARCH[/VARIANT]` from an image index (default: this machine's)"},
		&cli.IntFlag{Name: "layer", Value: -1, Usage: "take layer `N` alone, counted from 0 (default: all EROFS layers)", DefaultText: "all EROFS layers"},
		&cli.StringFlag{Name: "blob", Usage: "take the blob `DIGEST` of the repository, whatever the manifest says"},
		&cli.StringFlag{Name: "cache-dir", Usage: "keep what was fetched below `DIR`"},
		&cli.StringFlag{Name: "verify", Value: verifyAuto, Usage: "verify what is read as `HOW` says: auto (by the image's chunk index or dm-verity tree, else the whole blob once it is here), require (the same, and refuse an image that has neither) or off"},
		offlineFlag(),
	}, keepFlags()...)
	return append(flags, accessFlags()...)
}

// accessFlags say how registries are spoken to.
func accessFlags() []cli.Flag {
	return []cli.Flag{
		&cli.BoolFlag{Name: "plain-http", Usage: "speak plain HTTP to the registry"},
		&cli.StringFlag{Name: "tls-ca", Usage: "trust the certificate authorities in `FILE` (PEM) as well as the system's"},
		&cli.BoolFlag{Name: "tls-verify", Value: true, Usage: "--tls-verify=false takes any certificate of a registry for good"},
		&cli.StringFlag{Name: "username", Aliases: []string{"u"}, Usage: "log in as `NAME`"},
		&cli.BoolFlag{Name: "password-stdin", Usage: "read the password from standard input"},
		&cli.BoolFlag{Name: "creds-stdin", Usage: "read NAME:PASSWORD, in one line, from standard input"},
		&cli.StringFlag{Name: "authfile", Usage: "read credentials from `FILE` (default: those of podman login and docker login)"},
		&cli.StringFlag{Name: "on-error", Value: "wait:60s", Usage: "how long a read waits for a network in trouble before it fails: `wait:DURATION`"},
		&cli.IntFlag{Name: "max-conns-per-host", Value: registry.DefaultMaxConns, Usage: "keep at most `N` connections to a host"},
	}
}

// imageFlags are those of a command that reads images: from a registry, or from
// files.
func imageFlags() []cli.Flag {
	return append(append(logFlags(),
		&cli.StringSliceFlag{Name: "device", Usage: "of an image in a file: the next extra device of its device table is in `FILE`"},
		&cli.StringFlag{Name: "memory", Value: "64MiB", Usage: "let our own reader remember at most `SIZE` of metadata and decoded data"},
	), sourceFlags()...)
}

// sourceOptions are what is to be read: a reference, and the parsed flags.
type sourceOptions struct {
	ref      imageRef
	devices  []string // paths of extra devices, absolute
	offset   int64    // where in its file the image begins
	memory   int64    // as erofsfmt.Options.CacheBytes
	client   registry.Options
	selector registry.Selector
	oneLayer bool // of several layers one is to be named
	cacheDir string
	keep     keepOptions
	onError  string
	tlsCA    string
	verify   string
	prefetch prefetchOptions
	record   string // the file of a profile; "": nothing is recorded
	resume   bool   // goes on with what is in that file
	metrics  string // where they are served; "": nowhere
	meter    *meter // counts; nil where nobody looks
	// creds says that name and password come in one line.
	creds bool
	// offline: the registry is asked for nothing.
	offline bool
}

// access is what of the options another process needs to reach the same blob; the
// password is not among it.
func (s *sourceOptions) access() backend.Access {
	return backend.Access{
		CacheSize: s.keep.size, CacheMinFree: s.keep.minFree, Paranoid: s.keep.paranoid,
		PlainHTTP: s.client.PlainHTTP, Username: s.client.Username, AuthFile: s.client.AuthFile,
		OnError: s.onError, CacheDir: s.cacheDir, TLSCA: s.tlsCA, SkipTLSVerify: s.client.SkipTLSVerify,
		MaxConnsPerHost: s.client.MaxConnsPerHost, Verify: s.verify, Offline: s.offline,
		Record: s.record, Metrics: s.metrics,
		Prefetch: s.prefetch.mode, PrefetchRate: s.prefetch.rate, PrefetchBudget: s.prefetch.budget,
	}
}

// secure has the registry's certificates checked as the user wants it: against
// those of the host (certs.d), and those in the file ca.
func (s *sourceOptions) secure(ca string, verify bool) (err error) {
	s.client.CertDirs, s.client.SkipTLSVerify = registry.DefaultCertDirs(), !verify
	if s.tlsCA, err = absolute(ca); err != nil || ca == "" {
		return err
	}
	s.client.RootCAs, err = registry.LoadCAs(s.tlsCA)
	return err
}

// readSourceOptions reads a reference and checks the flags of the command, which
// has the sourceFlags or the imageFlags. The password is read by the process that
// will use it.
func (p *program) readSourceOptions(c *cli.Context, name string, log *slog.Logger) (*sourceOptions, error) {
	ref, err := parseRef(name)
	if err != nil {
		return nil, err
	}
	s := &sourceOptions{ref: ref}
	if c.IsSet("memory") {
		if s.memory, err = parseMemory(c.String("memory")); err != nil {
			return nil, err
		}
	}
	if s.ref.local() {
		return s, s.localOptions(c)
	}
	if c.IsSet("device") {
		return nil, usagef("--device goes with an image in a file, and %s is of a registry", name)
	}
	return s, p.registryOptions(c, s, log)
}

// registryOptions checks the flags that say how a registry is spoken to.
func (p *program) registryOptions(c *cli.Context, s *sourceOptions, log *slog.Logger) error {
	wait, err := parseOnError(c.String("on-error"))
	if err != nil {
		return err
	}
	conns := c.Int("max-conns-per-host")
	if conns < 1 {
		return usagef("--max-conns-per-host %d: want 1 or more", conns)
	}
	if err := notEmpty(c, "verify", "auto, require or off"); err != nil {
		return err
	}
	switch s.verify = c.String("verify"); s.verify {
	case verifyAuto, verifyRequire, verifyOff:
	case "":
		s.verify = verifyAuto // a command without the flag
	default:
		return usagef("--verify %q is not known; there are auto, require and off", s.verify)
	}
	authFile, err := absolute(c.String("authfile"))
	if err != nil {
		return err
	}
	cacheDir, err := absolute(c.String("cache-dir"))
	if err != nil {
		return err
	}
	s.onError = c.String("on-error")
	s.client = registry.Options{
		PlainHTTP: c.Bool("plain-http"),
		Username:  c.String("username"),
		AuthFile:  authFile,
		ErrorWait: wait,
		Logger:    log,

		MaxConnsPerHost: conns,
	}
	s.selector = registry.Selector{Platform: c.String("platform")}
	s.cacheDir = cacheDir
	if s.keep, err = readKeepOptions(c); err != nil {
		return err
	}
	if s.prefetch, err = readPrefetchOptions(c); err != nil {
		return err
	}
	if s.record, err = recordOption(c); err != nil {
		return err
	}
	if err := s.secure(c.String("tls-ca"), c.Bool("tls-verify")); err != nil {
		return err
	}
	if err := s.offlineOption(c); err != nil {
		return err
	}
	if !s.offline { // nobody would ask for them
		if err := p.credentialsOption(c, s); err != nil {
			return err
		}
	}
	return selectLayer(c, s)
}

func selectLayer(c *cli.Context, s *sourceOptions) error {
	if c.IsSet("layer") {
		n := c.Int("layer")
		if n < 0 {
			return usagef("--layer %d: layers are counted from 0", n)
		}
		s.selector.Layer = &n
	}
	if !c.IsSet("blob") {
		return nil
	}
	if c.IsSet("layer") {
		return usagef("--layer and --blob exclude each other")
	}
	d, err := digest.Parse(c.String("blob"))
	if err != nil {
		return usagef("--blob %q: %w; want sha256:HEX", c.String("blob"), err)
	}
	s.selector.Blob = d
	return nil
}

func parseOnError(v string) (time.Duration, error) {
	d, ok := strings.CutPrefix(v, "wait:")
	wait, err := time.ParseDuration(d)
	if !ok || err != nil || wait <= 0 {
		return 0, usagef("--on-error %q: want wait:DURATION with a positive duration, as wait:60s", v)
	}
	return wait, nil
}

// opened is a volume, ready to be read: layers of a registry's image through the
// cache, or files.
type opened struct {
	ref imageRef
	id  string // tells the image from others: a digest

	client *registry.Client
	image  *registry.Image
	layers []openedLayer // the lowest first
	cache  *blobcache.Cache
	dir    string // the cache's
	// records and keeper have what is kept beside layers.
	records   *lastknown.Store // nil, with the reason, where there can be none
	noRecords error
	keeper    *keeper
	// wrong is sent why when the bytes of a layer turn out to be wrong. There is room for
	// one of each layer.
	wrong    chan error
	prefetch *prefetcher // nil: nothing is fetched in the background
	// recording is nil where nothing is recorded.
	recording *recording

	files   []*backend.File      // the image and its devices
	primary backend.Source       // the image in the first of them
	super   *erofsfmt.Superblock // set by openErofs
}

// An openedLayer is a layer, from a manifest or from a record. It has its blob when it
// is open.
type openedLayer struct {
	registry.Layer
	blob *layerSource
}

// name is what errors call the layer.
func (l *openedLayer) name() string {
	if l.Index >= 0 {
		return fmt.Sprintf("layer %d", l.Index)
	}
	return "blob " + l.Digest.String()
}

// open opens what s names.
func (p *program) open(ctx context.Context, s *sourceOptions, log *slog.Logger) (_ *opened, err error) {
	o := &opened{ref: s.ref}
	defer func() {
		if err != nil {
			err = errors.Join(s.ref.hint(err), o.Close())
		}
	}()
	if s.ref.local() {
		return o, o.openFiles(ctx, append([]string{s.ref.path}, s.devices...), s.offset)
	}
	if o.client, err = registry.New(s.client); err != nil {
		return nil, err
	}
	if err = p.resolve(ctx, o, s, log); err != nil {
		return nil, err
	}
	if err = o.chooseLayers(ctx, s); err != nil {
		return nil, err
	}
	return o, p.openBlobs(ctx, o, s.ref.registry, s, log)
}

// chooseLayers sets the layers of the resolved image that s means.
func (o *opened) chooseLayers(ctx context.Context, s *sourceOptions) error {
	choose := func() ([]registry.Layer, error) { return o.client.ErofsLayers(ctx, o.image, s.selector) }
	if s.offline {
		choose = func() ([]registry.Layer, error) { return o.chooseOffline(s) }
	}
	chosen, err := choose()
	if err == nil && s.oneLayer {
		_, err = o.image.OneLayer(chosen)
	}
	if err != nil {
		return err
	}
	for _, l := range chosen {
		o.layers = append(o.layers, openedLayer{Layer: l})
	}
	return nil
}

// openBlobs opens the blobs of o.layers, which may come from a manifest or from a record.
// What is to be fetched for that is fetched at the same time for all of them.
func (p *program) openBlobs(ctx context.Context, o *opened, ref registry.Reference, s *sourceOptions, log *slog.Logger) error {
	if o.cache == nil { // the layers are those of a record
		if err := p.openRecordedCache(ctx, o, ref, s, log); err != nil {
			return err
		}
	}
	say := func(format string, args ...any) { fmt.Fprintf(p.stderr, "erofs-oci: "+format+"\n", args...) }
	o.wrong = make(chan error, len(o.layers))
	opener := &layerOpener{
		client: o.client, ref: ref, image: o.image, cache: o.cache, dir: o.dir, verify: s.verify, offline: s.offline, log: log, say: say,
		onWrong: func(err error) { o.wrong <- err },
	}
	var digests []digest.Digest
	var all errgroup.Group
	for i := range o.layers {
		l := &o.layers[i]
		digests = append(digests, l.Digest)
		all.Go(func() (err error) {
			if l.blob, err = opener.open(ctx, l.Layer); errors.Is(err, errOffline) && l.Index >= 0 {
				err = fmt.Errorf("%s: %w", l.name(), err) // who is offline cannot look up the digest
			}
			return err
		})
	}
	o.id = identity.ChainID(digests).String()
	if err := all.Wait(); err != nil {
		return err
	}
	if s.offline {
		o.sayMissing(say)
	}
	if s.record == "" {
		return nil
	}
	var err error
	if s.resume {
		o.recording, err = resumeRecording(s.record, o.layers, log)
	} else if o.recording, err = newRecording(s.record, s.recordFrom(), o.layers, log); err != nil {
		err = fmt.Errorf("--record: %s: %w", s.record, err)
	}
	return err
}

// volume is what was opened, for a backend.
func (o *opened) volume() backend.Volume {
	if len(o.layers) > 0 {
		top := len(o.layers) - 1
		v := o.layers[top].volume()
		for i := range top {
			v.Below = append(v.Below, o.layers[top-1-i].volume())
		}
		return v
	}
	v := backend.Volume{Primary: o.primary}
	for _, f := range o.files[1:] {
		v.Devices = append(v.Devices, f)
	}
	return v
}

func (l *openedLayer) volume() backend.Volume { return backend.Volume{Primary: l.blob, Name: l.name()} }

// record notes what another server needs to open the same.
func (o *opened) record(rec *backend.Record) {
	if len(o.layers) > 0 {
		rec.Manifest, rec.Digest = o.image.Digest.String(), o.id
		for _, l := range o.layers {
			rec.Integrity = append(rec.Integrity, recordedIntegrity(o.image, l.Layer))
		}
	}
	if len(o.layers) > 1 {
		for _, l := range o.layers {
			rec.Layers = append(rec.Layers, backend.LayerState{Digest: l.Digest.String(), Size: l.Size})
		}
		return
	}
	if rec.Size = o.volume().Primary.Size(); len(o.layers) == 1 {
		rec.Size = o.layers[0].Size // of the blob, of which not all may be read
	}
	for _, f := range o.files {
		rec.Files = append(rec.Files, f.State())
	}
}

// openErofs opens the image in what was opened.
func (o *opened) openErofs(ctx context.Context, memory int64) (*erofsfmt.Image, error) {
	im, err := fusefs.OpenImage(ctx, o.volume(), erofsfmt.Options{CacheBytes: memory})
	if err != nil {
		return nil, err
	}
	super := im.Super()
	o.super = &super
	return im, nil
}

// explain adds to an error of the image's bytes what was looked at.
func (o *opened) explain(err error) error {
	if o.ref.local() {
		return o.explainLocal(err)
	}
	if !errors.Is(err, erofsfmt.ErrNotErofs) {
		return err
	}
	if len(o.layers) > 1 {
		return fmt.Errorf("%s: the image cannot be mounted: %w", o.image.Reference, err)
	}
	what := o.layers[0].name()
	if o.layers[0].MediaType != "" {
		what += " is " + o.layers[0].MediaType + " and"
	}
	return fmt.Errorf("%s: %s cannot be mounted: %w", o.image.Reference, what, err)
}

// Close ends everything that open began, in the order of use.
func (o *opened) Close() error {
	o.prefetch.Close()
	errs := []error{o.recording.Close()}
	for _, l := range o.layers {
		if l.blob != nil {
			errs = append(errs, l.blob.Close())
		}
	}
	if o.keeper != nil {
		errs = append(errs, o.keeper.Close())
	}
	if o.records != nil {
		errs = append(errs, o.records.Close())
	}
	if o.cache != nil {
		errs = append(errs, o.cache.Close())
	}
	if o.client != nil {
		errs = append(errs, o.client.Close())
	}
	for _, f := range o.files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}
