package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
	"github.com/erofs-oci/erofs-oci/registry"
)

func (p *program) diffCommand() *cli.Command {
	flags := []cli.Flag{
		jsonFlag(),
		&cli.StringFlag{Name: "ignore", Usage: "do not compare what is in `LIST`: owner, mode, times, xattrs, links, content"},
		&cli.IntFlag{Name: "max-differences", Value: 1000, Usage: "give up after `N` differences"},
		&cli.StringFlag{Name: "platform", Usage: "choose `OS/ARCH[/VARIANT]` from an image index (default: this machine's)"},
		&cli.BoolFlag{Name: "one-file-system", Aliases: []string{"x"}, Usage: "of a directory: leave out what other file systems have below it"},
		&cli.StringFlag{Name: "tmp", EnvVars: []string{"TMPDIR"}, Usage: "keep fetched layers in `DIR`, uncompressed", DefaultText: "$TMPDIR, or /var/tmp"},
		&cli.StringFlag{Name: "tmp-limit", Usage: "keep at most `SIZE` there", DefaultText: "no limit"},
		&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "say nothing: the exit code tells"},
	}
	return &cli.Command{
		Name:      "diff",
		Usage:     "compare two trees, entry by entry",
		ArgsUsage: "A B",
		Description: strings.ReplaceAll(treeHelp, "SOURCE", "Each of them") +
			"Of an image index the entry that mount would take counts: one with EROFS layers first. The\n" +
			"other one can be named by its digest. Prints a line for each difference, and exits 1 if\n" +
			"there are any, and 2 if it cannot tell.\n",
		Flags: append(flags, append(accessFlags(), logFlags()...)...),
		Action: func(c *cli.Context) error {
			err := p.diff(c)
			switch {
			case err == nil:
			case !errors.Is(err, errDiffer):
				return errTrouble{err}
			case c.Bool("quiet"):
				return errSilent{err}
			}
			return err
		},
	}
}

// diffReport is the JSON form of diff.
type diffReport struct {
	Differences []difference `json:"differences"`
	Stopped     bool         `json:"stopped"` // there may be more differences
	Entries     int64        `json:"entries"` // paths of both trees
	Bytes       int64        `json:"bytes"`   // of files that were compared
}

// errDiffer has the exit code say that trees differ.
var errDiffer = errors.New("the trees differ")

func (p *program) diff(c *cli.Context) (err error) {
	args, err := arguments(c, "A", "B")
	if err != nil {
		return err
	}
	most := c.Int("max-differences")
	if most < 1 {
		return usagef("--max-differences %d: must be at least 1", most)
	}
	if args[0] == "-" && args[1] == "-" {
		return usagef("only one of A and B can be standard input")
	}
	ignored, err := parseIgnore(c.String("ignore"))
	if err != nil {
		return err
	}
	how, err := readScratch(c)
	if err != nil {
		return err
	}
	o, err := p.treeOptions(c, how)
	if err != nil {
		return err
	}
	o.selector.Prefer = registry.PreferErofs
	defer o.steps.close()
	report := &diffReport{Differences: []difference{}}
	d := &treeDiff{ctx: c.Context, ignored: ignored}
	d.report = func(f difference) bool {
		report.Differences = append(report.Differences, f)
		if !c.Bool("json") && !how.quiet {
			o.steps.print(p.stdout, f.String())
		}
		report.Stopped = len(report.Differences) >= most
		return !report.Stopped
	}
	sides, err := parseSides(args)
	if err != nil {
		return err
	}
	if err := p.checkHosts(c, sides[0], sides[1]); err != nil {
		return err
	}
	closeAll, err := d.open(c.Context, sides, o)
	defer func() { err = errors.Join(err, closeAll()) }()
	if err != nil {
		return err
	}
	d.step = o.steps.begin("compare", contentSize(d.sides[0]))
	err = d.run()
	d.step.leave()
	o.steps.close()
	if err != nil {
		return err
	}
	report.Entries, report.Bytes = d.entries, d.bytes
	return p.reportDiff(c, report, how.quiet)
}

func parseIgnore(list string) (map[string]bool, error) {
	ignored := map[string]bool{}
	if list == "" {
		return ignored, nil
	}
	kinds := ignorable()
	for word := range strings.SplitSeq(list, ",") {
		kind, ok := kinds[word]
		if !ok {
			return nil, usagef("--ignore %q: want a list of %s", list, strings.Join(slices.Sorted(maps.Keys(kinds)), ", "))
		}
		ignored[kind] = true
	}
	return ignored, nil
}

func parseSides(names []string) (sides []place, err error) {
	for _, name := range names {
		at, err := parsePlace(name)
		if err != nil {
			return nil, err
		}
		sides = append(sides, at)
	}
	return sides, nil
}

// open reads both trees, of which only the files' data is read later.
func (d *treeDiff) open(ctx context.Context, sides []place, o treeOptions) (closeAll func() error, err error) {
	var closers []io.Closer
	closeAll = func() (err error) {
		for _, c := range slices.Backward(closers) {
			err = errors.Join(err, c.Close())
		}
		return err
	}
	for i, at := range sides {
		of := o
		if at.kind == inPath {
			of.selector = registry.Selector{} // --platform is for the other
		}
		t, err := openTree(ctx, at, of)
		if err != nil {
			return closeAll, err
		}
		closers = append(closers, t)
		b, err := mkerofs.New(nil, mkerofs.Options{TempDir: o.scratch.dir})
		if err != nil {
			return closeAll, err
		}
		layers, err := mkerofs.NewLayers(b, mkerofs.LayerOptions{
			Warn: func(path, what string) { o.steps.warn("%s: %s: not compared: %s", at.typed, printable(path), what) },
		})
		if err != nil {
			return closeAll, err
		}
		closers = append(closers, layers)
		if err := t.fill(ctx, layers); err != nil {
			return closeAll, err
		}
		d.sides[i] = b
	}
	return closeAll, nil
}

func (p *program) reportDiff(c *cli.Context, r *diffReport, quiet bool) error {
	n := len(r.Differences)
	switch {
	case c.Bool("json"):
		if err := printJSON(p.stdout, r); err != nil {
			return err
		}
	case quiet:
	default:
		verdict := fmt.Sprintf("%d differences", n)
		switch {
		case r.Stopped:
			verdict = fmt.Sprintf("gave up after %d differences", n)
		case n == 0:
			verdict = "no differences"
		case n == 1:
			verdict = "1 difference"
		}
		if _, err := fmt.Fprintf(p.stdout, "%s in %d paths with %d bytes compared\n", verdict, r.Entries, r.Bytes); err != nil {
			return err
		}
	}
	if n > 0 {
		return errDiffer
	}
	return nil
}
