package main

import (
	"context"
	"errors"
	"io"
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
