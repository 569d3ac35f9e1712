package backend

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// The names of the backends.
const (
	NBD  = "nbd"
	FILE = "file"
	FUSE = "fuse"
)

// byPreference is the order in which Choose tries: where the kernel reads the
// image it is read fastest, and what is mounted on nbd survives its server.
func byPreference() []string { return []string{NBD, FILE, FUSE} }

// Status says how a thing is that a backend needs.
type Status string

const (
	OK      Status = "ok"
	Missing Status = "missing" // the backend cannot work
	Warning Status = "warning" // it works, but not in each case or not well
)

// A Finding is one thing that backends need, how it is, and what to do about it.
type Finding struct {
	For    []string `json:"for"` // names of backends
	Status Status   `json:"status"`
	What   string   `json:"what"`
	Do     string   `json:"do,omitempty"`
}

// A Verdict says whether a backend can work here, and else why not.
type Verdict struct {
	Backend string `json:"backend"`
	Works   bool   `json:"works"`
	Why     string `json:"why,omitempty"`
}

// A Diagnosis is all that can be said of a machine.
type Diagnosis struct {
	Findings []Finding `json:"findings"`
	Verdicts []Verdict `json:"backends"`
	// Auto is the backend that Choose takes, or "", and Reason why.
	Auto   string `json:"auto"`
	Reason string `json:"reason"`
}

// Choose takes the best of the backends that can work here, and says why in half a
// line. The error is that none can.
func Choose(p Probes) (name, reason string, err error) {
	h, err := p.host()
	if err != nil {
		return "", "", err
	}
	if name, reason, err = choose(verdicts(h.needs())); err != nil {
		err = fmt.Errorf("%w (erofs-oci doctor says what to do)", err)
	}
	return name, reason, err
}

// Diagnose looks at everything that backends need, and what they could use. More
// are findings that the caller knows of.
func Diagnose(p Probes, more ...Finding) (*Diagnosis, error) {
	h, err := p.host()
	if err != nil {
		return nil, err
	}
	d := &Diagnosis{Findings: slices.Concat(h.needs(), h.extras(), more)}
	d.Verdicts = verdicts(d.Findings)
	if d.Auto, d.Reason, err = choose(d.Verdicts); err != nil {
		d.Reason = err.Error()
	}
	return d, nil
}

// verdicts are those of all backends, by preference: a backend works unless
// something of it is missing.
func verdicts(findings []Finding) []Verdict {
	var all []Verdict
	for _, name := range byPreference() {
		v := Verdict{Backend: name, Works: true}
		for _, f := range findings {
			if f.Status == Missing && v.Works && slices.Contains(f.For, name) {
				v.Works, v.Why = false, f.What
			}
		}
		all = append(all, v)
	}
	return all
}

func choose(all []Verdict) (name, reason string, err error) {
	chosen := slices.IndexFunc(all, func(v Verdict) bool { return v.Works })
	switch {
	case chosen < 0:
		return "", "", errors.New("no backend can work here: " + whyNot(all))
	case chosen == 0:
		return all[0].Backend, "all that it needs is here", nil
	}
	return all[chosen].Backend, whyNot(all[:chosen]), nil
}

// whyNot joins the reasons of several backends, each said once.
func whyNot(all []Verdict) string {
	var reasons []string
	for len(all) > 0 {
		why := all[0].Why
		var names []string
		all = slices.DeleteFunc(slices.Clone(all), func(v Verdict) bool {
			if v.Why == why {
				names = append(names, v.Backend)
			}
			return v.Why == why
		})
		reasons = append(reasons, "not "+strings.Join(names, " or ")+": "+why)
	}
	return strings.Join(reasons, "; ")
}
