package main

import (
	"errors"
	"fmt"
	"text/tabwriter"

	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/registry/profile"
)

func (p *program) profileCommand() *cli.Command {
	return &cli.Command{
		Name:  "profile",
		Usage: "look at profiles of what was read, and join them",
		Description: "A profile is what mount --record=FILE wrote: the bytes that were read of each layer, by\n" +
			"digest, and in which order.",
		HideHelpCommand: true,
		Subcommands: []*cli.Command{
			{
				Name: "show", Usage: "show how much a profile has of each layer", ArgsUsage: "FILE", OnUsageError: usageError,
				Flags: []cli.Flag{jsonFlag()}, Action: p.profileShow,
			},
			{
				Name: "diff", Usage: "compare two profiles", ArgsUsage: "A B", OnUsageError: usageError,
				Description: "Prints what only one of them has of each layer. Exits 1 if they differ, and 2 if it cannot tell.",
				Flags:       []cli.Flag{jsonFlag()}, Action: p.profileDiff,
			},
			{
				Name: "merge", Usage: "make one profile of several", ArgsUsage: "A B...", OnUsageError: usageError,
				Description: "It has what any of them has: all of A in A's order, then what only B has, and so on.",
				Flags:       []cli.Flag{&cli.StringFlag{Name: "o", Usage: "write it to `FILE`, at once", DefaultText: "standard output"}},
				Action:      p.profileMerge,
			},
		},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usagef("unknown command %q; see erofs-oci profile --help", "profile "+c.Args().First())
			}
			return cli.ShowSubcommandHelp(c)
		},
	}
}

// profileArguments are the files of a command.
func profileArguments(c *cli.Context, least, most int, names string) ([]string, error) {
	args := c.Args().Slice()
	if err := noOptions(c, args, "the files"); err != nil {
		return nil, err
	}
	if len(args) < least || most > 0 && len(args) > most {
		return nil, wrongNumber(c, names, len(args))
	}
	return args, nil
}

// shownProfile is the JSON form of show.
type shownProfile struct {
	Blobs []shownBlob `json:"blobs"`
	Size  int64       `json:"size"`  // of all blobs together, as the next two
	Bytes int64       `json:"bytes"` // that were read
	Runs  int         `json:"runs"`  // that they lie in
}

type shownBlob struct {
	Digest string `json:"digest"`
	Size   int64  `json:"size"`
	Bytes  int64  `json:"bytes"`
	Runs   int    `json:"runs"`
}

func (p *program) profileShow(c *cli.Context) error {
	args, err := profileArguments(c, 1, 1, "FILE")
	if err != nil {
		return err
	}
	read, err := profile.ReadFile(args[0])
	if err != nil {
		return err
	}
	shown := shownProfile{Blobs: []shownBlob{}}
	for _, b := range read.Blobs {
		one := shownBlob{b.Digest, b.Size, b.Bytes(), len(b.Reads)}
		shown.Blobs = append(shown.Blobs, one)
		shown.Size, shown.Bytes, shown.Runs = shown.Size+one.Size, shown.Bytes+one.Bytes, shown.Runs+one.Runs
	}
	if c.Bool("json") {
		return printJSON(p.stdout, shown)
	}
	t := tabwriter.NewWriter(p.stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "BYTES\tOF\t\tRUNS\t  DIGEST")
	for _, b := range shown.Blobs {
		fmt.Fprintf(t, "%d\t%d\t%s\t%d\t  %s\n", b.Bytes, b.Size, perCent(b.Bytes, b.Size), b.Runs, b.Digest)
	}
	fmt.Fprintf(t, "%d\t%d\t%s\t%d\t  total\n", shown.Bytes, shown.Size, perCent(shown.Bytes, shown.Size), shown.Runs)
	return t.Flush()
}

// profileDifference is the JSON form of what diff says of a blob.
type profileDifference struct {
	Digest string         `json:"digest"`
	SizeA  *int64         `json:"size_a"` // null where A does not have it
	SizeB  *int64         `json:"size_b"`
	OnlyA  []profileRange `json:"only_a"`
	OnlyB  []profileRange `json:"only_b"`
	Order  bool           `json:"order"` // what both have is in another order
}

type profileRange struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
}

// errProfilesDiffer has the exit code say so; the lines before say how.
var errProfilesDiffer = errors.New("the profiles differ")

func (p *program) profileDiff(c *cli.Context) error {
	err := p.compareProfiles(c)
	if err != nil && !errors.Is(err, errProfilesDiffer) {
		return errTrouble{err}
	}
	return err
}

func (p *program) compareProfiles(c *cli.Context) error {
	args, err := profileArguments(c, 2, 2, "A and B")
	if err != nil {
		return err
	}
	a, errA := profile.ReadFile(args[0])
	b, errB := profile.ReadFile(args[1])
	if err := errors.Join(errA, errB); err != nil {
		return err
	}
	differences := profile.Diff(a, b)
	if c.Bool("json") {
		err = printJSON(p.stdout, profileDifferences(differences))
	} else {
		err = p.printProfileDifferences(differences)
	}
	if err == nil && len(differences) > 0 {
		err = errProfilesDiffer
	}
	return err
}

func profileDifferences(differences []profile.Difference) []profileDifference {
	all := []profileDifference{}
	size := func(n int64) *int64 {
		if n < 0 {
			return nil
		}
		return &n
	}
	for _, d := range differences {
		all = append(all, profileDifference{d.Digest, size(d.SizeA), size(d.SizeB), profileRanges(d.OnlyA), profileRanges(d.OnlyB), d.Order})
	}
	return all
}

func profileRanges(ranges []profile.Range) []profileRange {
	all := []profileRange{}
	for _, r := range ranges {
		all = append(all, profileRange{r.Off, r.Len})
	}
	return all
}

func (p *program) printProfileDifferences(differences []profile.Difference) error {
	if len(differences) == 0 {
		_, err := fmt.Fprintln(p.stdout, "no differences")
		return err
	}
	var errs []error
	line := func(digest, format string, args ...any) {
		_, err := fmt.Fprintf(p.stdout, "%s: %s\n", digest, fmt.Sprintf(format, args...))
		errs = append(errs, err)
	}
	for _, d := range differences {
		switch {
		case d.SizeB < 0:
			line(d.Digest, "A has it, B does not")
		case d.SizeA < 0:
			line(d.Digest, "B has it, A does not")
		case d.SizeA != d.SizeB:
			line(d.Digest, "it has %d bytes in A, and %d in B", d.SizeA, d.SizeB)
		}
		for _, side := range []struct {
			name   string
			ranges []profile.Range
		}{{"A", d.OnlyA}, {"B", d.OnlyB}} {
			if len(side.ranges) > 0 {
				line(d.Digest, "only in %s: %s", side.name, rangesText(side.ranges))
			}
		}
		if d.Order {
			line(d.Digest, "what both have is in another order")
		}
	}
	return errors.Join(errs...)
}

// mostRanges is how many ranges a line names, as OFFSET+LENGTH.
const mostRanges = 4

func rangesText(ranges []profile.Range) string {
	var sum int64
	places := ""
	for i, r := range ranges {
		sum += r.Len
		switch {
		case i < mostRanges:
			places += fmt.Sprintf(" %d+%d", r.Off, r.Len)
		case i == mostRanges:
			places += " …"
		}
	}
	return fmt.Sprintf("%d bytes,%s", sum, places)
}

func (p *program) profileMerge(c *cli.Context) error {
	args, err := profileArguments(c, 1, 0, "A B...")
	if err != nil {
		return err
	}
	if c.IsSet("o") && c.String("o") == "" {
		return usagef("-o needs the name of a file")
	}
	merged := &profile.Profile{}
	for _, name := range args {
		one, err := profile.ReadFile(name)
		if err != nil {
			return err
		}
		if merged, err = profile.Merge(merged, one); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if name := c.String("o"); name != "" {
		return profile.WriteFile(name, merged)
	}
	raw, err := merged.Encode()
	if err != nil {
		return err
	}
	_, err = p.stdout.Write(raw)
	return err
}
