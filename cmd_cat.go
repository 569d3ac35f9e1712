package main

import (
	"context"
	"errors"
	"io"
	"strings"
	"syscall"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
)

func (p *program) catCommand() *cli.Command {
	return &cli.Command{
		Name:        "cat",
		Usage:       "print files of an image",
		ArgsUsage:   "REF PATH...",
		Description: refHelp + "Symbolic links are followed, inside the image.",
		Flags:       imageFlags(),
		Action: func(c *cli.Context) error {
			args, err := argumentsAtLeast(c, 2, "REF", "PATH...")
			if err != nil {
				return err
			}
			return p.withImage(c, args[0], func(ctx context.Context, im *erofsfmt.Image) error {
				for _, name := range args[1:] {
					if err := catFile(ctx, im, name, p.stdout); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
}

func catFile(ctx context.Context, im *erofsfmt.Image, name string, w io.Writer) error {
	ino, err := findPath(ctx, im, name, true)
	if err != nil {
		return err
	}
	switch fileType(&ino) {
	case unix.S_IFREG:
	case unix.S_IFDIR:
		return notThere(name, syscall.EISDIR)
	default:
		return notThere(name, errors.New("not a regular file"))
	}
	return notThere(name, stream(ctx, im, &ino, func(p []byte, _ int64) error {
		_, err := w.Write(p)
		return err
	}))
}

// withImage opens the image that ref names for the time of do. Several layers are one
// image.
func (p *program) withImage(c *cli.Context, ref string, do func(context.Context, *erofsfmt.Image) error) error {
	return p.withOpened(c, ref, false, do)
}

// withOneLayer is withImage for who looks at how one layer is stored.
func (p *program) withOneLayer(c *cli.Context, ref string, do func(context.Context, *erofsfmt.Image) error) error {
	return p.withOpened(c, ref, true, do)
}

func (p *program) withOpened(c *cli.Context, ref string, oneLayer bool, do func(context.Context, *erofsfmt.Image) error) (err error) {
	log, err := p.newCommandLog(c)
	if err != nil {
		return err
	}
	o, err := p.openImage(c, ref, oneLayer, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, o.Close()) }()
	if err := do(c.Context, o.Image); err != nil {
		return o.explain(err)
	}
	return nil
}

// argumentsAtLeast returns the arguments of a command that takes at least n; names
// are theirs, the last of which may be repeated.
func argumentsAtLeast(c *cli.Context, n int, names ...string) ([]string, error) {
	args := c.Args().Slice()
	if err := noOptions(c, args, names[0]); err != nil {
		return nil, err
	}
	if len(args) < n {
		return nil, usagef("%s takes %s, not %d arguments; see erofs-oci %s --help", c.Command.Name, strings.Join(names, " "), len(args), c.Command.Name)
	}
	return args, nil
}
