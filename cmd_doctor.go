package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/mdlayher/genetlink"
	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/backend"
)

func (p *program) doctorCommand() *cli.Command {
	return &cli.Command{
		Name:      "doctor",
		Usage:     "explain which backends can work here, and what the others lack",
		ArgsUsage: " ",
		Description: "Prints a line for each thing that the backends nbd, file and fuse need: whether it is\n" +
			"there (ok, missing, warning), and what to do if not; then which backend mount takes by\n" +
			"itself. The exit code is 1 if none can work. Nothing is mounted.",
		Flags: []cli.Flag{jsonFlag(), &cli.StringFlag{Name: "cache-dir", Usage: "look at the cache below `DIR`"}},
		Action: func(c *cli.Context) error {
			if c.NArg() != 0 {
				return usagef("doctor takes no arguments")
			}
			probes := systemProbes()
			probes.Device = backend.OpenDevice
			left, strayErr := p.strayFindings()
			d, err := backend.Diagnose(probes, append(p.cacheFindings(c.String("cache-dir")), left...)...)
			if err != nil {
				return err
			}
			if c.Bool("json") {
				err = printJSON(p.stdout, d)
			} else {
				err = printDiagnosis(p.stdout, d)
			}
			err = errors.Join(err, strayErr)
			if d.Auto == "" {
				err = errors.Join(err, errors.New(d.Reason))
			}
			return err
		},
	}
}

// systemProbes are how this machine is looked at.
func systemProbes() backend.Probes {
	probes := backend.SystemProbes()
	probes.NBDFamily = nbdFamily
	return probes
}

// nbdFamily asks for the nbd driver's commands, as making a device does.
func nbdFamily() error {
	c, err := genetlink.Dial(nil)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.GetFamily("nbd")
	if errors.Is(err, fs.ErrNotExist) {
		return errors.New("it answers in the first network namespace only")
	}
	return err
}

// cacheFindings are about the directory that a mount would take.
func (p *program) cacheFindings(flag string) []backend.Finding {
	dir, err := p.cacheDir(flag, os.Geteuid())
	if err == nil {
		dir, err = filepath.Abs(dir)
	}
	if err != nil {
		return []backend.Finding{{For: []string{backend.NBD, backend.FILE, backend.FUSE}, Status: backend.Missing, What: err.Error()}}
	}
	return backend.CheckCacheDir(dir)
}

// strayFindings are about what a crash left.
func (p *program) strayFindings() ([]backend.Finding, error) {
	run, err := backend.OpenRunDir(p.getenv)
	if err != nil {
		return nil, err
	}
	all, err := listAll(run)
	var found []backend.Finding
	for _, l := range all {
		if l.State != backend.Stray {
			continue
		}
		found = append(found, backend.Finding{
			For: []string{backend.NBD}, Status: backend.Warning, Do: l.remedy(),
			What: fmt.Sprintf("%s was left connected by a server that died (pid %d)", l.NBDDevice, l.PID),
		})
	}
	return found, err
}

func printDiagnosis(w io.Writer, d *backend.Diagnosis) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, f := range d.Findings {
		line := f.What
		if f.Do != "" {
			line += ": " + f.Do
		}
		fmt.Fprintf(t, "%s\t%s\t%s\n", f.Status, strings.Join(f.For, ","), printable(line))
	}
	if err := t.Flush(); err != nil || d.Auto == "" {
		return err
	}
	_, err := fmt.Fprintf(w, "auto takes %s: %s\n", d.Auto, printable(d.Reason))
	return err
}
