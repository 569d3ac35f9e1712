package main

import (
	"context"
	"fmt"
	"slices"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/registry"
)

// inspectedPlace is what --probe prints of a registry or a mirror of it.
type inspectedPlace struct {
	Host   string `json:"host"`
	Mirror bool   `json:"mirror"`
	// Problem is why what follows is not complete.
	Problem    string  `json:"problem,omitempty"`
	Auth       string  `json:"auth,omitempty"`  // none, basic, bearer
	Realm      string  `json:"realm,omitempty"` // the host that gives bearer tokens
	Proto      string  `json:"proto,omitempty"`
	Ranges     string  `json:"ranges,omitempty"`  // 206, or 200 where the whole blob comes
	Storage    string  `json:"storage,omitempty"` // the host that blobs are redirected to
	Signed     bool    `json:"signed,omitempty"`
	LatencyMs  float64 `json:"latencyMs,omitempty"`
	Bytes      int64   `json:"bytes,omitempty"`
	Throughput int64   `json:"bytesPerSecond,omitempty"`
}

// probe looks at what the places do that the image can come from. What it reads is
// the blob that mount would take, or else the largest that the manifest names.
func (p *program) probe(ctx context.Context, o *opened, s *sourceOptions) ([]inspectedPlace, error) {
	probes, err := o.client.Probe(ctx, s.ref.registry, o.probed())
	if err != nil {
		return nil, err
	}
	var places []inspectedPlace
	for _, r := range probes {
		place := inspectedPlace{
			Host: r.Host, Mirror: r.Mirror, Auth: r.Auth, Realm: r.Realm, Proto: r.Proto,
			Storage: r.Storage, Signed: r.Signed,
			LatencyMs: float64(r.Latency.Microseconds()) / 1e3, Bytes: r.Bytes, Throughput: int64(r.Throughput),
		}
		switch {
		case r.Err != nil:
			place.Problem = r.Err.Error()
		case r.Ranges:
			place.Ranges = "206"
		default:
			place.Ranges = "200"
		}
		places = append(places, place)
	}
	return places, nil
}

func (o *opened) probed() ocispec.Descriptor {
	if len(o.layers) > 0 {
		return o.layers[0].Descriptor
	}
	largest := o.image.Config
	for _, l := range o.image.Layers {
		if l.Size > largest.Size {
			largest = l.Descriptor
		}
	}
	return largest
}

// lines are name and value, for people.
func (r *inspectedPlace) lines() [][2]string {
	kind := "registry:"
	if r.Mirror {
		kind = "mirror:"
	}
	lines := [][2]string{{kind, printable(r.Host)}}
	add := func(name, format string, args ...any) {
		lines = append(lines, [2]string{"  " + name + ":", fmt.Sprintf(format, args...)})
	}
	switch {
	case r.Realm != "":
		add("auth", "%s, tokens of %s", r.Auth, printable(r.Realm))
	case r.Auth != "":
		add("auth", "%s", r.Auth)
	}
	if r.Proto != "" {
		add("speaks", "%s", printable(r.Proto))
	}
	switch r.Ranges {
	case "206":
		add("ranges", "206, as asked")
	case "200":
		add("ranges", "200, the whole blob")
	}
	switch {
	case r.Signed:
		add("storage", "%s, by signed URLs", printable(r.Storage))
	case r.Storage != "":
		add("storage", "%s", printable(r.Storage))
	}
	if r.LatencyMs > 0 {
		add("latency", "%.1f ms until the first byte, the median of %d", r.LatencyMs, registry.ProbeAnswers-1)
	}
	if r.Throughput > 0 {
		add("throughput", "%.1f MB/s by one connection, over %.1f MB", float64(r.Throughput)/1e6, float64(r.Bytes)/1e6)
	}
	if r.Problem != "" {
		add("problem", "%s", r.Problem)
	}
	return lines
}

// lookAndProbe is look with what --probe adds. Where nothing can be read from any
// place, that is said at once.
func (p *program) lookAndProbe(ctx context.Context, o *opened, s *sourceOptions) (*inspection, error) {
	if s.ref.local() {
		return nil, usagef("--probe is for images of registries, and %s is a file", s.ref.path)
	}
	found, err := p.lookAtRegistry(ctx, o, s)
	if err != nil {
		return nil, s.ref.hint(err)
	}
	if found.Places, err = p.probe(ctx, o, s); err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(found.Places, func(r inspectedPlace) bool { return r.Problem == "" }) {
		return found, fmt.Errorf("%s: no blob can be read: %s", s.ref, found.Places[len(found.Places)-1].Problem)
	}
	_, err = p.lookInside(ctx, o, s, found)
	return found, err // what the places do is not less worth knowing for it
}
