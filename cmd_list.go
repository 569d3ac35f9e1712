package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sync/errgroup"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/nbdserve"
)

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
			err = errors.Join(err, askAll(c.Context, run, all))
			if c.Bool("json") {
				return errors.Join(err, printJSON(p.stdout, all), wrongOnes(all))
			}
			return errors.Join(err, printListed(p.stdout, all), wrongOnes(all))
		},
	}
}

// A listed is a mount, or an nbd device that is none.
type listed struct {
	backend.Entry
	NBDDevice string `json:"nbd_device,omitempty"` // of a stray
	// Status is what the server says, where there is one to ask.
	Status *backend.MountStatus `json:"status,omitempty"`
}

// askAll asks all servers at once: those that do not answer are waited for together.
func askAll(ctx context.Context, run *backend.RunDir, all []listed) error {
	errs := make([]error, len(all))
	var asking errgroup.Group
	asking.SetLimit(listAtOnce)
	for i := range all {
		asking.Go(func() error {
			errs[i] = all[i].ask(ctx, run)
			return nil
		})
	}
	_ = asking.Wait() // the errors are in their order
	return errors.Join(errs...)
}

// listAtOnce bounds the descriptors that list needs.
const listAtOnce = 64

// ask asks the server of the mount.
func (l *listed) ask(ctx context.Context, run *backend.RunDir) error {
	if l.State != backend.Running && l.State != backend.Detached {
		return nil
	}
	status, ok, err := run.Status(ctx, l.Dir)
	if ok {
		l.Status = &status
	}
	if errors.Is(err, backend.ErrNoAnswer) {
		return noAnswer(printable(l.Dir), l.PID)
	}
	return err
}

// wrong says that the bytes of the mount turned out not to be those of its image.
func (l *listed) wrong() bool {
	found := l.Wrong != ""
	for _, s := range l.layers() {
		found = found || s.Wrong != ""
	}
	return found
}

func (l *listed) layers() []backend.LayerStatus {
	if l.Status == nil {
		return nil
	}
	return l.Status.Layers
}

// wrongOnes is an error that names the mounts which are wrong, for the exit code.
func wrongOnes(all []listed) error {
	var dirs []string
	for _, l := range all {
		if l.wrong() {
			dirs = append(dirs, printable(l.Dir))
		}
	}
	if len(dirs) == 0 {
		return nil
	}
	return &wrongError{fmt.Errorf("unmount %s", strings.Join(dirs, ", "))}
}

// verification is how the mount is verified, how much of it is here, and how much of it
// was verified. Where there is nobody to ask, it is not known.
func (l *listed) verification() (by, fetched, verified string) {
	if len(l.layers()) == 0 {
		return "-", "-", "-"
	}
	var kinds []string
	var size, here, right int64
	for _, s := range l.layers() {
		if !slices.Contains(kinds, s.By) {
			kinds = append(kinds, s.By)
		}
		size, here, right = size+s.Size, here+s.Fetched, right+s.Verified
	}
	return strings.Join(kinds, "+"), perCent(here, size), perCent(right, size)
}

// perCent is 100 % only for all of it.
func perCent(part, of int64) string {
	if of <= 0 {
		return "-"
	}
	n := int64(100 * float64(part) / float64(of)) // which does not overflow, but rounds
	if part < of {
		n = min(n, 99)
	}
	return fmt.Sprintf("%d%%", n)
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
	case r == "" && l.wrong():
		return "what was read is not what the manifest says; erofs-oci umount " + printable(l.Dir)
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
	fmt.Fprintln(t, "REF\tDIGEST\tBACKEND\tDIR\tPID\tSINCE\tBY\tFETCHED\tVERIFIED\tSTATE")
	for _, l := range all {
		state := string(l.State)
		if remedy := l.remedy(); remedy != "" {
			state += ": " + remedy
		}
		reference, digest, since := l.Reference, l.Digest, l.Since.Local().Format(time.DateTime)
		if l.State == backend.Stray {
			reference, digest, since = l.NBDDevice, "-", "-"
		}
		by, fetched, verified := l.verification()
		fmt.Fprintf(t, "%s\t%.19s\t%s\t%s\t%d\t%s\t%s\t%s\t%s\t%s\n",
			reference, digest, l.Backend, printable(cmp.Or(l.Dir, "-")), l.PID, since, by, fetched, verified, state)
	}
	return t.Flush()
}
