package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
)

func (p *program) checkCommand() *cli.Command {
	return &cli.Command{
		Name:      "check",
		Usage:     "look for faults in an image: walk everything, read and decode all data",
		ArgsUsage: "REF",
		Description: refHelp + "\n" +
			"Prints a line for each fault, with the byte of the image and the nid, and exits 1 if there are any.\n" +
			"All of the image is read, and so fetched.",
		Flags: append([]cli.Flag{
			jsonFlag(),
			&cli.IntFlag{Name: "max-faults", Value: 1000, Usage: "give up after `N` faults"},
		}, imageFlags()...),
		Action: p.check,
	}
}

// checkReport is the JSON form of check.
type checkReport struct {
	Faults   []checkFault `json:"faults"`
	Stopped  bool         `json:"stopped"` // there may be more faults
	Checksum bool         `json:"checksum"`
	Inodes   int64        `json:"inodes"`
	Bytes    int64        `json:"bytes"`
}

type checkFault struct {
	Offset *int64        `json:"offset,omitempty"` // absent: it is not known
	In     string        `json:"in,omitempty"`     // what Offset is a byte of, if it is not the image
	Nid    *erofsfmt.Nid `json:"nid,omitempty"`    // absent: it is the image's
	Path   string        `json:"path,omitempty"`
	What   string        `json:"what"`
}

func (p *program) check(c *cli.Context) (err error) {
	args, err := arguments(c, "REF")
	if err != nil {
		return err
	}
	most := c.Int("max-faults")
	if most < 1 {
		return usagef("--max-faults %d: must be at least 1", most)
	}
	log, err := p.newCommandLog(c)
	if err != nil {
		return err
	}
	s, err := p.readSourceOptions(c, args[0], log)
	if err != nil {
		return err
	}
	s.oneLayer = true
	// Not openImage: what it refuses is what is looked for here.
	o, err := p.open(c.Context, s, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, o.Close()) }()
	if err := o.checkDevices(c.Context); err != nil {
		return err
	}
	v := o.volume()
	options := erofsfmt.CheckOptions{MaxFaults: most, Options: erofsfmt.Options{CacheBytes: s.memory}}
	for _, d := range v.Devices {
		options.Devices = append(options.Devices, d)
	}
	stats, err := p.checkVolume(c, v.Primary, options)
	if err != nil {
		return o.explain(err)
	}
	o.remember()
	if stats.Faults > 0 {
		return fmt.Errorf("%s: the image has faults", args[0])
	}
	return nil
}

// checkVolume checks an image and prints what is found.
func (p *program) checkVolume(c *cli.Context, src erofsfmt.ReaderAt, options erofsfmt.CheckOptions) (erofsfmt.CheckStats, error) {
	steps := p.newWalk()
	defer steps.close()
	step := steps.begin("check", 0)
	options.Progress = func(s erofsfmt.CheckStats) {
		step.set(s.Bytes, fmt.Sprintf(", %d of %d files", s.Inodes, s.Announced))
	}
	report := &checkReport{Faults: []checkFault{}}
	found := report.add
	if !c.Bool("json") {
		found = func(f erofsfmt.Fault) { steps.print(p.stdout, f.String()) }
	}
	stats, err := erofsfmt.Check(c.Context, src, options, found)
	step.leave()
	steps.close()
	if err != nil {
		return stats, err
	}
	if c.Bool("json") {
		report.Stopped, report.Checksum, report.Inodes, report.Bytes = stats.Stopped, stats.Checksum, stats.Inodes, stats.Bytes
		return stats, printJSON(p.stdout, report)
	}
	return stats, printCheck(p.stdout, stats)
}

func (r *checkReport) add(f erofsfmt.Fault) {
	j := checkFault{In: f.In, Path: f.Path, What: f.What}
	if f.Off >= 0 {
		j.Offset = &f.Off
	}
	if f.Path != "" {
		j.Nid = &f.Nid
	}
	r.Faults = append(r.Faults, j)
}

// printCheck writes the last line.
func printCheck(w io.Writer, s erofsfmt.CheckStats) error {
	verdict := "no faults"
	switch {
	case s.Stopped:
		verdict = fmt.Sprintf("gave up after %d faults", s.Faults)
	case s.Faults == 1:
		verdict = "1 fault"
	case s.Faults > 0:
		verdict = fmt.Sprintf("%d faults", s.Faults)
	}
	sum := "there is no superblock checksum"
	if s.Checksum {
		sum = "there is a superblock checksum"
	}
	inodes := fmt.Sprintf("%d inodes", s.Inodes)
	if s.Announced > s.Inodes {
		inodes = fmt.Sprintf("%d of %d inodes", s.Inodes, s.Announced)
	}
	_, err := fmt.Fprintf(w, "%s in %s with %d bytes of data; %s\n", verdict, inodes, s.Bytes, sum)
	return err
}
