package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strings"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/backend"
)

func (p *program) metricsCommand() *cli.Command {
	return &cli.Command{
		Name:      "metrics",
		Usage:     "show what the server of a mount has counted",
		ArgsUsage: "DIR",
		Description: "Prints the text format of Prometheus: requests, bytes, hits, waits, retries, verification.\n" +
			"mount --metrics serves the same by HTTP.",
		Flags: []cli.Flag{jsonFlag()},
		Action: func(c *cli.Context) error {
			args, err := arguments(c, "DIR")
			if err != nil {
				return err
			}
			text, err := p.metricsOf(c, args[0])
			if err != nil {
				return err
			}
			if !c.Bool("json") {
				_, err := io.WriteString(p.stdout, text)
				return err
			}
			families, err := readMetrics(text)
			if err != nil {
				return fmt.Errorf("the metrics of %s: %w", args[0], err)
			}
			return printJSON(p.stdout, families)
		},
	}
}

// metricsOf asks the server of the mount on dir.
func (p *program) metricsOf(c *cli.Context, dir string) (string, error) {
	run, err := backend.OpenRunDir(p.getenv)
	if err != nil {
		return "", err
	}
	real, err := backend.RealDir(dir)
	if err != nil {
		return "", err
	}
	e, ok, err := run.Find(real)
	switch {
	case err != nil:
		return "", err
	case !ok:
		return "", fmt.Errorf("%s is not mounted by erofs-oci; erofs-oci list shows what is", dir)
	case e.State == backend.Starting:
		return "", fmt.Errorf("%s is being mounted: there is nothing to count yet", dir)
	case e.Remedy() != "":
		return "", fmt.Errorf("%s is %s: its server is gone, and its counts with it; see erofs-oci %s", dir, e.State, e.Remedy())
	}
	status, ok, err := run.StatusAndMetrics(c.Context, real)
	switch {
	case errors.Is(err, backend.ErrNoAnswer), err == nil && !ok:
		return "", noAnswer(dir, e.PID)
	case err != nil:
		return "", err
	}
	return status.Metrics, nil
}

// noAnswer is the error where the server of a mount is there and says nothing.
func noAnswer(dir string, pid int) error {
	return fmt.Errorf("the server of the mount on %s (pid %d) does not answer", dir, pid)
}

// A metricFamily is what the JSON output has of all samples of one name.
type metricFamily struct {
	Name    string         `json:"name"`
	Type    string         `json:"type"` // counter, gauge, histogram, summary, untyped
	Help    string         `json:"help"`
	Samples []metricSample `json:"samples"`
}

// A metricSample has a value; or, of a histogram, a count, a sum and buckets; or, of a
// summary, a count, a sum and quantiles.
type metricSample struct {
	Labels    map[string]string `json:"labels"`
	Value     *number           `json:"value,omitempty"`
	Count     *number           `json:"count,omitempty"`
	Sum       *number           `json:"sum,omitempty"`
	Buckets   []metricBucket    `json:"buckets,omitempty"`
	Quantiles []metricQuantile  `json:"quantiles,omitempty"`
}

// A metricBucket counts what was no more than LE: with it, what is in the buckets before.
type metricBucket struct {
	LE    number `json:"le"`
	Count number `json:"count"`
}

type metricQuantile struct {
	Quantile number `json:"quantile"`
	Value    number `json:"value"`
}

// A number is one in JSON, too, but for those that JSON does not have: they are the strings
// "NaN", "+Inf" and "-Inf", as Prometheus writes them.
type number float64

func (n number) MarshalJSON() ([]byte, error) {
	switch v := float64(n); {
	case math.IsNaN(v):
		return []byte(`"NaN"`), nil
	case math.IsInf(v, 1):
		return []byte(`"+Inf"`), nil
	case math.IsInf(v, -1):
		return []byte(`"-Inf"`), nil
	default:
		return json.Marshal(v)
	}
}

// readMetrics reads the text format of Prometheus. Families are in the order of their names,
// samples in the order of the text.
func readMetrics(text string) ([]metricFamily, error) {
	parser := expfmt.NewTextParser(model.LegacyValidation)
	byName, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		return nil, err
	}
	var families []metricFamily
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		f := byName[name]
		is := metricFamily{Name: name, Type: strings.ToLower(f.GetType().String()), Help: f.GetHelp(), Samples: []metricSample{}}
		for _, m := range f.Metric {
			is.Samples = append(is.Samples, readSample(m))
		}
		families = append(families, is)
	}
	return families, nil
}

func readSample(m *dto.Metric) metricSample {
	s := metricSample{Labels: make(map[string]string)}
	for _, l := range m.Label {
		s.Labels[l.GetName()] = l.GetValue()
	}
	num := func(v float64) *number { return new(number(v)) }
	switch {
	case m.Histogram != nil:
		h := m.Histogram
		s.Count, s.Sum = num(float64(h.GetSampleCount())), num(h.GetSampleSum())
		for _, b := range h.Bucket {
			s.Buckets = append(s.Buckets, metricBucket{number(b.GetUpperBound()), number(b.GetCumulativeCount())})
		}
		slices.SortFunc(s.Buckets, func(a, b metricBucket) int { return cmp.Compare(a.LE, b.LE) })
	case m.Summary != nil:
		s.Count, s.Sum = num(float64(m.Summary.GetSampleCount())), num(m.Summary.GetSampleSum())
		for _, q := range m.Summary.Quantile {
			s.Quantiles = append(s.Quantiles, metricQuantile{number(q.GetQuantile()), number(q.GetValue())})
		}
	case m.Counter != nil:
		s.Value = num(m.Counter.GetValue())
	case m.Gauge != nil:
		s.Value = num(m.Gauge.GetValue())
	default:
		s.Value = num(m.Untyped.GetValue())
	}
	return s
}
