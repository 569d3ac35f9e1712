package main

import (
	"bufio"
	"context"
	"errors"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
)

func (p *program) extractCommand() *cli.Command {
	return &cli.Command{
		Name:      "extract",
		Usage:     "copy files of an image to a directory, or to a tar archive",
		ArgsUsage: "REF DIR [PATH...], or --tar REF [PATH...]",
		Description: refHelp + "Each PATH of the image, or all of it, comes to be below DIR with the directories on the\n" +
			"way to it. DIR is made if only its parent is there. Nothing outside DIR is written, whatever\n" +
			"the image says, and no symbolic link below DIR is followed. Modes are kept; set-id bits only\n" +
			"with owners. A plain user cannot make device nodes: they are left out, which is an error at\n" +
			"the end. Runs of zeros become holes.\n" +
			"With --tar a PAX archive is written to standard output, with all that the image says. It is\n" +
			"the same at each time. Sockets, for which tar has no form, are left out and said.",
		Flags: append([]cli.Flag{
			&cli.BoolFlag{Name: "tar", Usage: "write a tar archive to standard output"},
			&cli.StringFlag{Name: "keep", Usage: "keep what is in `LIST` of owner,xattrs,times, or none",
				DefaultText: "all of them for root; xattrs of the user namespace, and times, for others"},
			&cli.BoolFlag{Name: "overwrite", Usage: "replace what is there already, but not a directory by something else"},
		}, imageFlags()...),
		Action: func(c *cli.Context) error {
			if c.Bool("tar") {
				return p.extractTar(c)
			}
			return p.extractFiles(c)
		},
	}
}

func (p *program) extractTar(c *cli.Context) error {
	if c.IsSet("keep") || c.IsSet("overwrite") {
		return usagef("--keep and --overwrite are for files, not for --tar")
	}
	args, err := argumentsAtLeast(c, 1, "REF", "[PATH...]")
	if err != nil {
		return err
	}
	if isTerminal(p.stdout) {
		return usagef("--tar writes an archive to standard output, which is a terminal; redirect it")
	}
	return p.withImage(c, args[0], func(ctx context.Context, im *erofsfmt.Image) error {
		steps := p.newWalk()
		defer steps.close()
		step := steps.begin("extract", 0)
		w := bufio.NewWriterSize(p.stdout, streamChunk)
		a := newArchiver(ctx, im, w, step)
		err := walkPaths(ctx, im, args[1:], a.add)
		if err == nil {
			err = a.tar.Close()
		}
		err = errors.Join(err, w.Flush())
		step.end(err)
		if a.sockets > 0 {
			steps.warn("%d sockets were left out: tar has no form for them", a.sockets)
		}
		return err
	})
}

func (p *program) extractFiles(c *cli.Context) error {
	args, err := argumentsAtLeast(c, 2, "REF", "DIR", "[PATH...]")
	if err != nil {
		return err
	}
	keep, err := parseKeep(c.String("keep"), c.IsSet("keep"), os.Geteuid() == 0)
	if err != nil {
		return err
	}
	return p.withImage(c, args[0], func(ctx context.Context, im *erofsfmt.Image) error {
		steps := p.newWalk()
		defer steps.close()
		step := steps.begin("extract", 0)
		err := extract(ctx, im, args[1], args[2:], extractOptions{keep: keep, overwrite: c.Bool("overwrite"), step: step})
		step.end(err)
		return err
	})
}

// keep is what of a file's attributes is kept beside its mode.
type keep struct {
	owner, xattrs, times bool
	// userXattrs: of the attributes those that a plain user may set.
	userXattrs bool
}

func parseKeep(list string, given, root bool) (keep, error) {
	var k keep
	switch {
	case !given && root:
		return keep{owner: true, xattrs: true, times: true}, nil
	case !given:
		return keep{xattrs: true, userXattrs: true, times: true}, nil
	case list == "none":
		return k, nil
	}
	for word := range strings.SplitSeq(list, ",") {
		switch word {
		case "owner":
			k.owner = true
		case "xattrs":
			k.xattrs = true
		case "times":
			k.times = true
		default:
			return k, usagef("--keep %q: want a list of owner, xattrs and times, or none", list)
		}
	}
	return k, nil
}
