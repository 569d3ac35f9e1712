package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
)

// keepFlags say how much of what was fetched is kept, and how far it is trusted.
func keepFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "cache-size", Usage: "keep at most `SIZE` of what was fetched, of all mounts together, or unlimited", DefaultText: "10% of the file system, at most 20GiB"},
		&cli.StringFlag{Name: "cache-min-free", Usage: "leave at least `SIZE` of the cache's file system free", DefaultText: "5% of the file system, at most 1GiB"},
		&cli.BoolFlag{Name: "paranoid", Usage: "compare what is kept with its checksums at every read, not at the first of this mount only"},
	}
}

// keepOptions are those flags as they were given: a server that takes over a mount gets
// them again.
type keepOptions struct {
	size, minFree string
	paranoid      bool
}

func readKeepOptions(c *cli.Context) (keepOptions, error) {
	k := keepOptions{size: c.String("cache-size"), minFree: c.String("cache-min-free"), paranoid: c.Bool("paranoid")}
	if err := notEmpty(c, "cache-size", "a size, as 20GiB, or unlimited"); err != nil {
		return k, err
	}
	if err := notEmpty(c, "cache-min-free", "a size, as 1GiB, or 0"); err != nil {
		return k, err
	}
	return k, k.check()
}

// leastCacheSize is what readers have a use for: less than a few chunks is a unit that was forgotten.
const leastCacheSize = 1 << 20

// check says what is wrong with flags that were given.
func (k keepOptions) check() error {
	o, err := k.options(nil)
	if err == nil && k.size != "" && o.MaxBytes >= 0 && o.MaxBytes < leastCacheSize {
		err = usagef("--cache-size %s: want 1MiB or more, or unlimited", k.size)
	}
	return err
}

// keptOptions are those of a recorded mount.
func keptOptions(a backend.Access) keepOptions {
	return keepOptions{size: a.CacheSize, minFree: a.CacheMinFree, paranoid: a.Paranoid}
}

// options are what the cache takes.
func (k keepOptions) options(log *slog.Logger) (blobcache.Options, error) {
	o := blobcache.Options{Paranoid: k.paranoid, Logger: log}
	var err error
	switch k.size {
	case "":
	case "unlimited":
		o.MaxBytes = -1
	default:
		o.MaxBytes, err = parseSize("cache-size", k.size)
	}
	if err != nil || k.minFree == "" {
		return o, err
	}
	if o.MinFree, err = parseSize("cache-min-free", k.minFree); o.MinFree == 0 {
		o.MinFree = -1
	}
	return o, err
}

func (p *program) cacheCommand() *cli.Command {
	dir := func() cli.Flag {
		return &cli.StringFlag{Name: "cache-dir", Usage: "the cache below `DIR` (default: that of mount)"}
	}
	command := func(name, args, usage string, action func(*cli.Context, cacheLook) error, flags ...cli.Flag) *cli.Command {
		return &cli.Command{
			Name: name, Usage: usage, ArgsUsage: args, OnUsageError: usageError,
			Flags:  append(append(flags, logFlags()...), dir(), jsonFlag()),
			Action: func(c *cli.Context) error { return p.withCache(c, action) },
		}
	}
	return &cli.Command{
		Name:  "cache",
		Usage: "look at what was fetched and is kept, and make room",
		Description: "The cache holds the chunks of layers that were read, with the manifests, chunk indexes and\n" +
			"dm-verity trees that belong to them, for every mount of this user. What was not read for\n" +
			"longest goes by itself where it would take more than --cache-size of mount.",
		HideHelpCommand: true,
		Subcommands: []*cli.Command{
			command("ls", " ", "show what is kept of each layer, and of what belongs to layers", p.cacheList),
			command("du", " ", "show how much is kept in all, and the limits", p.cacheUsage, keepFlags()[:2]...),
			command("prune", " ", "remove all that is not in use: of what is mounted, what was read in the last 20 s stays, and with --offline all", p.cachePrune,
				&cli.StringFlag{Name: "keep", Usage: "remove what was not read for longest, until at most `SIZE` is left", Value: "0"}),
			command("verify", " ", "compare everything with its checksums; what is damaged will be fetched again", p.cacheVerify),
			command("rm", "DIGEST...", "remove layers that are not in use", p.cacheRemove),
		},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usagef("unknown command %q; see erofs-oci cache --help", "cache "+c.Args().First())
			}
			return cli.ShowSubcommandHelp(c)
		},
	}
}

// withCache opens the cache for a command. None of them makes one.
func (p *program) withCache(c *cli.Context, action func(*cli.Context, cacheLook) error) (err error) {
	if c.Command.Name != "rm" && c.NArg() != 0 {
		return usagef("cache %s takes no arguments", c.Command.Name)
	}
	keep, err := readKeepOptions(c)
	if err != nil {
		return err
	}
	log, err := p.newServerLog(c)
	if err != nil {
		return err
	}
	o, err := keep.options(log.Logger)
	if err != nil {
		return err
	}
	dir, err := p.existingCacheDir(c.String("cache-dir"), os.Geteuid())
	if err != nil {
		return err
	}
	cache, err := lookAtCache(dir, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cache.close()) }()
	return action(c, cache)
}

func (p *program) cacheList(c *cli.Context, cache cacheLook) error {
	list, err := cache.list()
	if c.Bool("json") {
		return errors.Join(err, printJSON(p.stdout, list))
	}
	if len(list) == 0 {
		return err
	}
	t := tabwriter.NewWriter(p.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "DIGEST\tSIZE\tKEPT\tCHUNK\tUSED\tSTATE")
	for _, k := range list {
		used, state := "-", "idle"
		if !k.Used.IsZero() {
			used = k.Used.Local().Format(time.DateTime)
		}
		if k.InUse {
			state = "in use"
		}
		size := strconv.FormatInt(k.Size, 10)
		if k.Damaged {
			size, state = "-", state+"; the file is damaged: cache verify removes it"
		}
		fmt.Fprintf(t, "%s\t%s\t%d\t%d\t%s\t%s\n", k.Digest, size, k.Present, k.ChunkSize, used, state)
	}
	return errors.Join(err, t.Flush())
}

func (p *program) cacheUsage(c *cli.Context, cache cacheLook) error {
	u, err := cache.usage()
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(p.stdout, u)
	}
	limit := "unlimited"
	if u.Limit > 0 {
		limit = strconv.FormatInt(u.Limit, 10)
	}
	t := tabwriter.NewWriter(p.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "directory\t%s\nblobs\t%d\nkept\t%d bytes\nlimit\t%s\nfree\t%d bytes\nleft free\t%d bytes\n",
		printable(u.Directory), u.Blobs, u.Occupied, limit, u.Free, u.MinFree)
	return t.Flush()
}

func (p *program) cachePrune(c *cli.Context, cache cacheLook) error {
	keep, err := parseSize("keep", c.String("keep"))
	if err != nil {
		return err
	}
	freed, err := cache.prune(keep)
	return errors.Join(err, p.printFreed(c, freed))
}

func (p *program) cacheRemove(c *cli.Context, cache cacheLook) error {
	if c.NArg() == 0 {
		return usagef("cache rm takes the digests that cache ls shows")
	}
	if err := noOptions(c, c.Args().Slice(), "DIGEST"); err != nil {
		return err
	}
	for _, arg := range c.Args().Slice() { // before anything is removed
		if _, err := digest.Parse(arg); err != nil {
			return usagef("%q: %w; want sha256:HEX", arg, err)
		}
	}
	freed, err := cache.remove(c.Args().Slice())
	return errors.Join(err, p.printFreed(c, freed))
}

// freedBytes is the JSON form of what was given back.
type freedBytes struct {
	Freed int64 `json:"freed"`
}

func (p *program) printFreed(c *cli.Context, freed int64) error {
	if c.Bool("json") {
		return printJSON(p.stdout, freedBytes{freed})
	}
	_, err := fmt.Fprintf(p.stdout, "%d bytes freed\n", freed)
	return err
}

func (p *program) cacheVerify(c *cli.Context, cache cacheLook) error {
	checks, err := cache.verify(c.Context)
	if c.Bool("json") {
		err = errors.Join(err, printJSON(p.stdout, checks))
	} else {
		err = errors.Join(err, printChecks(p.stdout, checks))
	}
	return errors.Join(err, damage(checks))
}

// damage is an error that says what was found.
func damage(checks []blobcache.Check) error {
	var chunks, files, used int64
	for _, check := range checks {
		chunks += check.Damaged
		switch {
		case check.Broken && check.InUse:
			used++
		case check.Broken:
			files++
		}
	}
	var errs []error
	for _, found := range []struct {
		n    int64
		what string
	}{
		{chunks, "chunks were damaged; they are removed, and will be fetched again when they are read"},
		{files, "files were damaged as a whole; they are removed, and will be fetched again when they are read"},
		{used, "files are damaged as a whole and in use; unmount what reads them, then verify again"},
	} {
		if found.n > 0 {
			errs = append(errs, fmt.Errorf("%d %s", found.n, found.what))
		}
	}
	return errors.Join(errs...)
}

func printChecks(w io.Writer, checks []blobcache.Check) error {
	if len(checks) == 0 {
		return nil
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "DIGEST\tCHUNKS\tDAMAGED")
	for _, check := range checks {
		if check.Broken {
			fmt.Fprintf(t, "%s\t-\tall\n", check.Digest)
			continue
		}
		fmt.Fprintf(t, "%s\t%d\t%d\n", check.Digest, check.Chunks, check.Damaged)
	}
	return t.Flush()
}
