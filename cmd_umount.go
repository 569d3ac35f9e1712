package main

import (
	"errors"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/backend"
)

// umountPatience is how long umount waits for the server of a mount that is
// gone. A server ends at once unless a read of it still waits for the network.
const umountPatience = 90 * time.Second

func (p *program) umountCommand() *cli.Command {
	return &cli.Command{
		Name:      "umount",
		Aliases:   []string{"unmount"},
		Usage:     "end a mount and its server",
		ArgsUsage: "DIR",
		Description: "umount(8) and fusermount3 -u do the same for a mount whose server runs.\n" +
			"A mount whose server died is cleared.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "lazy", Aliases: []string{"l"}, Usage: "detach a mount in use; it ends with its last user"},
		},
		Action: func(c *cli.Context) error {
			args, err := arguments(c, "DIR")
			if err != nil {
				return err
			}
			run, err := backend.OpenRunDir(p.getenv)
			if err != nil {
				return err
			}
			wrong := recordedWrong(run, args[0])
			return errors.Join(run.Unmount(c.Context, args[0], c.Bool("lazy"), umountPatience), wrong)
		},
	}
}
