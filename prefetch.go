package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"sync"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
	"github.com/erofs-oci/erofs-oci/registry/profile"
)

// What --prefetch says, but for the path of a profile.
const (
	prefetchNone = "none"
	prefetchMeta = "meta" // all that listing needs
	prefetchAll  = "all"
)

func prefetchFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "prefetch", Value: prefetchNone, Usage: "fetch in the background, behind what is read: `meta` (what listing needs), all, or what the profile in a FILE says (a file with a name of these: ./all); or none"},
		&cli.StringFlag{Name: "prefetch-rate", Usage: "fetch at most `SIZE` a second in the background", DefaultText: "no limit"},
		&cli.StringFlag{Name: "prefetch-budget", Usage: "fetch at most `SIZE` in the background", DefaultText: "no limit"},
	}
}

// prefetchOptions say what is fetched in the background. The zero value fetches nothing.
type prefetchOptions struct {
	mode         string // as it was given, "" for none; of a profile the absolute path
	rate, budget string // as they were given

	conns                 int              // to a host, at most; 0: as many as usual
	bytesPerSecond, bytes int64            // 0: no limit
	profile               *profile.Profile // of a mode that is a path
}

func (o *prefetchOptions) wanted() bool { return o.mode != "" }

// atOnce is how many pieces are fetched at a time. Readers have connections of their own, if there is more than one.
func (o *prefetchOptions) atOnce() int {
	most := prefetchAtOnce
	if o.profile != nil {
		most = replayAtOnce
	}
	conns := o.conns
	if conns == 0 {
		conns = registry.DefaultMaxConns
	}
	return min(most, max(conns-connsForReaders, 1))
}

// readPrefetchOptions checks the flags of a command that has the prefetchFlags. A profile is read now: what is wrong with
// it is said before anything is mounted.
func readPrefetchOptions(c *cli.Context) (o prefetchOptions, err error) {
	o = prefetchOptions{mode: c.String("prefetch"), rate: c.String("prefetch-rate"), budget: c.String("prefetch-budget"), conns: c.Int("max-conns-per-host")}
	switch {
	case c.IsSet("prefetch") && o.mode == "":
		return o, usagef("--prefetch needs none, meta, all or the path of a profile")
	case c.IsSet("prefetch-rate") && o.rate == "", c.IsSet("prefetch-budget") && o.budget == "":
		return o, usagef("--prefetch-rate and --prefetch-budget need a size, as 64MiB")
	case o.mode == prefetchNone:
		o.mode = ""
	}
	if !o.wanted() && (o.rate != "" || o.budget != "") {
		return o, usagef("--prefetch-rate and --prefetch-budget go with --prefetch=meta, all or a profile")
	}
	if o.wanted() && c.Bool("offline") {
		return o, usagef("--offline and --prefetch=%s exclude each other: nothing can be fetched", o.mode)
	}
	if o.isFile() {
		if o.mode, err = absolute(o.mode); err != nil {
			return o, err
		}
	}
	return o, o.resolve()
}

// recordedPrefetch are the options of a mount that is taken over. Without its profile it goes on, too.
func recordedPrefetch(a backend.Access, log *slog.Logger) prefetchOptions {
	o := prefetchOptions{mode: a.Prefetch, rate: a.PrefetchRate, budget: a.PrefetchBudget, conns: a.MaxConnsPerHost}
	if err := o.resolve(); err != nil {
		log.Warn("nothing is fetched in the background", "err", err)
		return prefetchOptions{}
	}
	return o
}

func (o *prefetchOptions) isFile() bool {
	return o.wanted() && o.mode != prefetchMeta && o.mode != prefetchAll
}

// resolve reads what the options name.
func (o *prefetchOptions) resolve() (err error) {
	for _, limit := range []struct {
		flag, given string
		n           *int64
	}{{"prefetch-rate", o.rate, &o.bytesPerSecond}, {"prefetch-budget", o.budget, &o.bytes}} {
		if limit.given == "" {
			continue
		}
		if *limit.n, err = parseSize(limit.flag, limit.given); err != nil {
			return err
		}
		if *limit.n == 0 {
			return usagef("--%s 0: want more, or leave it out for no limit", limit.flag)
		}
	}
	if o.isFile() {
		if o.profile, err = profile.ReadFile(o.mode); err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				err = fmt.Errorf("%w; none, meta and all are the words, anything else is a file", err)
			}
			return fmt.Errorf("--prefetch: %w", err)
		}
	}
	return nil
}

// How long it takes before what could not be fetched is tried again: longer each time, as long as nothing comes.
const (
	firstPrefetchPause = time.Second
	lastPrefetchPause  = 5 * time.Minute
)

// A prefetcher fetches in the background what was asked for, from when the layers are open until Close. Whatever happens
// to it, reads do not notice: what it needs goes behind them, and what it cannot have they will ask for.
//
// It has a plan, which it carries out from the beginning whenever something went wrong on the way: what is here by then
// costs nothing.
type prefetcher struct {
	layers []*layerSource         // those that are read through the cache
	sizes  map[*layerSource]int64 // as profiles have them
	cache  *blobcache.Cache
	how    prefetchOptions
	log    *slog.Logger
	// foreign says that no blob of the profile is of the image.
	foreign bool

	cancel context.CancelFunc
	done   sync.WaitGroup
	warned bool // of trouble; only the goroutine looks

	mu      sync.Mutex             // guards what follows
	status  backend.PrefetchStatus // but for Fetched
	wants   []piece                // what is wanted; it only grows, or is another one
	spent   int64                  // bytes that were not here before, in all
	aside   error                  // why something was left out for the next time
	unlucky bool                   // trouble was logged, and nothing came since
}

// startPrefetch begins to fetch what how says. Close of o ends it.
func (o *opened) startPrefetch(how prefetchOptions, log *slog.Logger) {
	if !how.wanted() || len(o.layers) == 0 {
		return
	}
	p := &prefetcher{cache: o.cache, how: how, log: log, sizes: map[*layerSource]int64{}}
	seen := map[string]bool{} // a layer may be there twice
	for i := range o.layers {
		l := &o.layers[i]
		if l.blob.cached != nil && l.blob.size > 0 && !seen[l.blob.digest] { // else it was fetched whole
			seen[l.blob.digest] = true
			p.layers, p.sizes[l.blob] = append(p.layers, l.blob), l.profileSize()
		}
	}
	p.compare(o.layers)
	p.status = backend.PrefetchStatus{Mode: how.mode, State: backend.PrefetchRunning}
	var ctx context.Context
	ctx, p.cancel = context.WithCancel(context.Background())
	o.prefetch = p
	p.done.Go(func() { p.run(ctx) })
}

// Close ends the fetching and waits for its end.
func (p *prefetcher) Close() {
	if p != nil {
		p.cancel()
		p.done.Wait()
	}
}

// Status is what list shows.
func (p *prefetcher) Status() *backend.PrefetchStatus {
	if p == nil {
		return nil
	}
	p.mu.Lock()
	st, wants := p.status, p.wants
	p.mu.Unlock()
	for _, w := range wants {
		st.Fetched += w.n - w.layer.absent(w.off, w.n)
	}
	if wrong := p.wrong(); wrong != nil {
		st.State, st.Error = backend.PrefetchStopped, oneLine(wrong)
	}
	return &st
}

// wrong says what is wrong with a layer of which no byte is read any more. That may come to light after all was fetched.
func (p *prefetcher) wrong() error {
	for _, l := range p.layers {
		if wrong := l.wrong.Load(); wrong != nil {
			return wrong
		}
	}
	return nil
}

// A stopError ends the fetching for good.
type stopError struct{ err error }

func (e *stopError) Error() string { return e.err.Error() }
func (e *stopError) Unwrap() error { return e.err }

func stopf(format string, args ...any) error { return &stopError{fmt.Errorf(format, args...)} }

// run carries the plan out until nothing is left of it.
func (p *prefetcher) run(ctx context.Context) {
	pause := firstPrefetchPause
	for {
		p.begin()
		err := p.planAndCheck(ctx)
		var stop *stopError
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			p.finish(ctx, nil, p.warned)
			return
		case errors.As(err, &stop), errors.Is(err, blobcache.ErrNoRoom):
			p.finish(ctx, err, !errors.Is(err, errBudget))
			return
		}
		if p.trouble(err) {
			pause = firstPrefetchPause
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
		pause = min(2*pause, lastPrefetchPause)
	}
}

// planAndCheck is plan, with the word of those who look at a layer as a whole when all of it is here.
func (p *prefetcher) planAndCheck(ctx context.Context) error {
	err := p.plan(ctx)
	if err == nil {
		for _, l := range p.layers {
			l.settle(ctx)
		}
	}
	if wrong := p.wrong(); wrong != nil {
		return &stopError{wrong}
	}
	return err
}

// finish says that no more is fetched: all is here, or err is why it is not. That it is a warning says that somebody should
// know: of what ended badly, or of what went well after a warning.
func (p *prefetcher) finish(ctx context.Context, err error, warning bool) {
	level := slog.LevelInfo
	if warning {
		level = slog.LevelWarn
	}
	if err == nil {
		p.log.Log(ctx, level, "what was to be fetched in the background is here")
		p.end(backend.PrefetchDone, nil)
		return
	}
	p.log.Log(ctx, level, "no more is fetched in the background", "err", err)
	p.end(backend.PrefetchStopped, err)
}

// begin counts from nothing.
func (p *prefetcher) begin() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.status.State, p.status.Error, p.status.Wanted = backend.PrefetchRunning, "", 0
	p.wants, p.aside = nil, nil
}

func (p *prefetcher) end(state backend.PrefetchState, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.status.State, p.status.Error = state, ""
	if err != nil {
		p.status.Error = oneLine(err)
	}
}

// trouble says why the plan waits, in the log once until something comes again. It says whether something came.
func (p *prefetcher) trouble(err error) (came bool) {
	p.end(backend.PrefetchWaiting, err)
	p.mu.Lock()
	came = !p.unlucky
	p.unlucky = true
	p.mu.Unlock()
	if came {
		p.warned = true
		p.log.Warn("what could not be fetched in the background is tried again later", "err", err)
	}
	return came
}

// want counts what is to be fetched.
func (p *prefetcher) want(pieces []piece) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, next := range pieces {
		p.status.Wanted += next.n
	}
	p.wants = append(p.wants, pieces...)
}

// plan is what is to be fetched. It goes on past what turned out to be wrong, and says so at the end.
func (p *prefetcher) plan(ctx context.Context) (err error) {
	switch {
	case p.how.profile != nil:
		err = p.replay(ctx)
	case p.how.mode == prefetchMeta:
		err = p.metadata(ctx)
	default:
		err = p.everything(ctx)
	}
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.aside
}
