package main

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/erofs-oci/erofs-oci/registry/blobcache"
)

// A sourceCollector reads the counts of what a server has open, when it is asked for them.
//
// A number that grows with use is one for all layers together: a layer tells how much of it
// is here and was verified. There are as many layers as the image has, at most 500.
type sourceCollector struct {
	src *opened
	of  mountLabels

	mount                                *prometheus.Desc
	reads, served                        *prometheus.Desc
	fetches, fetched                     *prometheus.Desc
	layer, size, here, verified, revoked *prometheus.Desc
}

// mountLabels tell one server from others.
type mountLabels struct {
	reference string
	backend   string // as list shows it; serveLabel for an export
}

const serveLabel = "serve"

func newSourceCollector(src *opened, of mountLabels) *sourceCollector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(metricsPrefix+name, help, labels, nil)
	}
	return &sourceCollector{
		src: src, of: of,
		mount:    desc("mount_info", "1, labeled with what is mounted: the reference, what tells its content from others, and the backend (serve: it is exported by NBD and not mounted).", "reference", "id", "backend"),
		reads:    desc("cache_reads_total", "Reads of images: a hit was answered at once, a miss had to wait.", "result"),
		served:   desc("cache_served_bytes_total", "Bytes that were given to reads which succeeded."),
		fetches:  desc("cache_fetches_total", "Ranges that the cache asked for.", "cause"),
		fetched:  desc("cache_fetched_bytes_total", "Bytes that the cache read from the bodies of its fetches, those included that it had no use for."),
		layer:    desc("layer_info", "1, labeled with what the bytes of the layer are verified by.", "layer", "verified_by"),
		size:     desc("layer_size_bytes", "Bytes of the layer's image that can be read.", "layer"),
		here:     desc("layer_present_bytes", "Bytes of the layer's image that are in the cache.", "layer"),
		verified: desc("layer_verified_bytes", "Bytes of the layer's image that are in the cache and that this process has verified.", "layer"),
		revoked:  desc("layer_wrong", "1 if it turned out that what was read of the layer was wrong, so that every read fails; else 0.", "layer"),
	}
}

// Describe is a prometheus.Collector's.
func (c *sourceCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		c.mount, c.reads, c.served, c.fetches, c.fetched, c.layer, c.size, c.here, c.verified, c.revoked,
	} {
		ch <- d
	}
}

// Collect is a prometheus.Collector's.
func (c *sourceCollector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	gauge(c.mount, 1, c.of.reference, c.src.id, c.of.backend)
	if c.src.cache == nil {
		return // files on this machine
	}
	c.collectCache(ch)
	seen := make(map[string]bool)
	for _, l := range c.src.status().Layers {
		if seen[l.Digest] {
			continue // an image may have the same layer twice; it is one blob
		}
		seen[l.Digest] = true
		gauge(c.layer, 1, l.Digest, l.By)
		gauge(c.size, float64(l.Size), l.Digest)
		gauge(c.here, float64(l.Fetched), l.Digest)
		gauge(c.verified, float64(l.Verified), l.Digest)
		wrong := 0.0
		if l.Wrong != "" {
			wrong = 1
		}
		gauge(c.revoked, wrong, l.Digest)
	}
}

// collectCache sends what the cache counts.
func (c *sourceCollector) collectCache(ch chan<- prometheus.Metric) {
	counter := func(d *prometheus.Desc, n int64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n), labels...)
	}
	s := c.src.stats()
	counter(c.reads, s.Hits, "hit")
	counter(c.reads, s.Misses, "miss")
	counter(c.served, s.BytesServed)
	counter(c.fetches, s.Fetches-s.FetchesAhead, "demand")
	counter(c.fetches, s.FetchesAhead, "readahead")
	counter(c.fetched, s.BytesFetched)
}

// stats are those of all blobs together.
func (o *opened) stats() (sum blobcache.Stats) {
	seen := make(map[string]bool)
	for _, l := range o.layers {
		if l.blob.cached == nil || seen[l.blob.digest] {
			continue // not in the cache; or the same blob, whose counts are the same
		}
		seen[l.blob.digest] = true
		s := l.blob.cached.Stats()
		sum.Fetches += s.Fetches
		sum.FetchesAhead += s.FetchesAhead
		sum.BytesFetched += s.BytesFetched
		sum.BytesAhead += s.BytesAhead
		sum.BytesServed += s.BytesServed
		sum.Hits += s.Hits
		sum.Misses += s.Misses
	}
	return sum
}
