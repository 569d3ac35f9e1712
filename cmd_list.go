package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/backend"
)

func jsonFlag() cli.Flag {
	return &cli.BoolFlag{Name: "json", Usage: "print JSON"}
}

func (p *program) listCommand() *cli.Command {
	return &cli.Command{
		Name:      "list",
		Usage:     "show the running mounts",
		ArgsUsage: " ",
		Flags:     []cli.Flag{jsonFlag()},
		Action: func(c *cli.Context) error {
			if c.NArg() != 0 {
				return usagef("list takes no arguments")
			}
			run, err := backend.OpenRunDir(p.getenv)
			if err != nil {
				return err
			}
			// What can be read is shown, whatever is the matter with the rest.
			entries, err := run.List()
			if c.Bool("json") {
				return errors.Join(err, printJSON(p.stdout, entries))
			}
			return errors.Join(err, printEntries(p.stdout, entries))
		},
	}
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

func printEntries(w io.Writer, entries []backend.Entry) error {
	if len(entries) == 0 {
		return nil
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "REF\tDIGEST\tBACKEND\tDIR\tPID\tSINCE\tSTATE")
	for _, e := range entries {
		state := string(e.State)
		switch e.State {
		case backend.Dead:
			state += ": erofs-oci umount " + printable(e.Dir)
		case backend.Orphaned:
			state += ": erofs-oci reattach " + printable(e.Dir)
		}
		fmt.Fprintf(t, "%s\t%.19s\t%s\t%s\t%d\t%s\t%s\n",
			e.Reference, e.Digest, e.Backend, printable(e.Dir), e.PID, e.Since.Local().Format(time.DateTime), state)
	}
	return t.Flush()
}
