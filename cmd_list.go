package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/nbdserve"
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
			all, err := listAll(run)
			if c.Bool("json") {
				return errors.Join(err, printJSON(p.stdout, all))
			}
			return errors.Join(err, printListed(p.stdout, all))
		},
	}
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// A listed is a mount, or an nbd device that is none.
type listed struct {
	backend.Entry
	NBDDevice string `json:"nbd_device,omitempty"` // of a stray
}

// listAll returns what is recorded and what is stray.
func listAll(run *backend.RunDir) ([]listed, error) {
	entries, err := run.List()
	all := []listed{}
	for _, e := range entries {
		all = append(all, listed{Entry: e})
	}
	if err != nil {
		return all, err // a device that seems stray could be that of the unread record
	}
	strays, err := strays(entries)
	return append(all, strays...), err
}

// strays are the nbd devices that none of the entries is about, and where they are
// mounted. Root alone has any.
func strays(entries []backend.Entry) ([]listed, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	var known []string
	for _, e := range entries {
		if e.NBD == nil {
			continue
		}
		var devices []nbdserve.Attachment
		if err := json.Unmarshal(e.NBD, &devices); err != nil {
			return nil, fmt.Errorf("the record of %s: %w", e.Dir, err)
		}
		for _, d := range devices {
			known = append(known, d.Identifier)
		}
	}
	states, err := nbdserve.Strays(known)
	var found []listed
	for _, s := range states {
		l := listed{NBDDevice: s.Path()}
		l.State, l.Backend, l.Device, l.PID = backend.Stray, backend.NBD, backend.Device(s.Number), s.PID
		dirs, mountsErr := backend.MountsOf(l.Device)
		if len(dirs) > 0 {
			l.Dir = dirs[0]
		}
		err = errors.Join(err, mountsErr)
		found = append(found, l)
	}
	return found, err
}

// remedy is the command that mends the state, "" if none is needed.
func (l listed) remedy() string {
	switch r := l.Remedy(); {
	case l.State == backend.Stray && l.Dir != "":
		// Nobody serves it; the device ends with the mount, or is shown again.
		return "umount " + printable(l.Dir)
	case l.State == backend.Stray:
		return "erofs-oci disconnect " + l.NBDDevice
	case r != "":
		return "erofs-oci " + r + " " + printable(l.Dir)
	}
	return ""
}

func printListed(w io.Writer, all []listed) error {
	if len(all) == 0 {
		return nil
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "REF\tDIGEST\tBACKEND\tDIR\tPID\tSINCE\tSTATE")
	for _, l := range all {
		state := string(l.State)
		if remedy := l.remedy(); remedy != "" {
			state += ": " + remedy
		}
		reference, digest, since := l.Reference, l.Digest, l.Since.Local().Format(time.DateTime)
		if l.State == backend.Stray {
			reference, digest, since = l.NBDDevice, "-", "-"
		}
		fmt.Fprintf(t, "%s\t%.19s\t%s\t%s\t%d\t%s\t%s\n",
			reference, digest, l.Backend, printable(cmp.Or(l.Dir, "-")), l.PID, since, state)
	}
	return t.Flush()
}
