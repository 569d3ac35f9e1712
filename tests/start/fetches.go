package start

import (
	"context"
	"encoding/json"
	"fmt"
)

// Fetches are the GETs of a mount's blobs by who wanted them.
type Fetches struct {
	Demand    int // a reader, who waited
	Readahead int
	Prefetch  int
}

// A family is one of metrics --json.
type family struct {
	Name    string   `json:"name"`
	Samples []sample `json:"samples"`
}

type sample struct {
	Labels map[string]string `json:"labels"`
	Value  float64           `json:"value"`
}

// Fetches asks the server of the mount for its counts.
func (m *Mounted) Fetches(ctx context.Context) (Fetches, error) {
	const name = "erofs_oci_cache_fetches_total"
	text, err := m.site.Output(ctx, "metrics", "--json", m.Dir)
	if err != nil {
		return Fetches{}, err
	}
	var families []family
	if err := json.Unmarshal([]byte(text), &families); err != nil {
		return Fetches{}, fmt.Errorf("metrics --json: %w", err)
	}
	by := map[string]int{}
	for _, f := range families {
		if f.Name != name {
			continue
		}
		for _, s := range f.Samples {
			by[s.Labels["cause"]] += int(s.Value)
		}
	}
	if len(by) == 0 {
		return Fetches{}, fmt.Errorf("metrics --json has no %s by cause: %s", name, text)
	}
	return Fetches{Demand: by["demand"], Readahead: by["readahead"], Prefetch: by["prefetch"]}, nil
}
