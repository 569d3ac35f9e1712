package main

import (
	"math"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/registry"
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
	kept, limit, evictions, evicted      *prometheus.Desc
	flights, waiting, refused, damaged   *prometheus.Desc
	layer, size, here, verified, revoked *prometheus.Desc
	wanted, prefetched, state            *prometheus.Desc
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
		mount:   desc("mount_info", "1, labeled with what is mounted: the reference, what tells its content from others, and the backend (serve: it is exported by NBD and not mounted).", "reference", "id", "backend"),
		reads:   desc("cache_reads_total", "Reads of layers in the cache, those included by which a whole layer is checked or decompressed: a hit was answered at once, a miss had to wait. Reads of chunk indexes, trees and manifests are not in it, nor in the other metrics of reads.", "result"),
		served:  desc("cache_served_bytes_total", "Bytes that were given to those of these reads that succeeded."),
		fetches: desc("cache_fetches_total", "Ranges that the cache asked for, by what the first byte of each is for; of chunk indexes, trees and manifests, metadata.", "cause"),
		fetched: desc("cache_fetched_bytes_total", "Bytes of chunks that the cache read from the bodies of its fetches, by what each chunk was asked for; of chunk indexes, trees and manifests, metadata.", "cause"),

		kept:      desc("cache_directory_bytes", "Bytes that the cache's directory takes, for all mounts and processes together, and up to some MiB too many for each of these. It is missing while nobody knows."),
		limit:     desc("cache_directory_limit_bytes", "Bytes that the cache's directory may take; +Inf if there is no limit."),
		evictions: desc("cache_evictions_total", "Regions that this process evicted from the cache to make room."),
		evicted:   desc("cache_evicted_bytes_total", "Bytes of chunks that were in the regions which this process evicted."),
		flights:   desc("cache_fetches_in_flight", "Fetches that are under way, whatever for."),
		waiting:   desc("cache_reads_waiting", "Reads that wait for what the cache does not have."),
		refused:   desc("cache_refused_chunks_total", "Chunks, fetched or from the disk, that were not what the image's chunk index or tree says."),
		damaged:   desc("cache_damaged_chunks_total", "Times that chunks on the disk were not what had been written there."),

		wanted:     desc("prefetch_wanted_bytes", "Bytes that are to be fetched in the background, as far as that is known. It is missing where nothing is to be."),
		prefetched: desc("prefetch_fetched_bytes", "Bytes of these that are here."),
		state:      desc("prefetch_state", "1 for what the fetching in the background does, 0 for what it does not: running, waiting (there is trouble), done, or stopped (there is more that will not be fetched).", "state"),

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
		c.mount, c.reads, c.served, c.fetches, c.fetched, c.kept, c.limit, c.evictions, c.evicted,
		c.flights, c.waiting, c.refused, c.damaged, c.layer, c.size, c.here, c.verified, c.revoked,
		c.wanted, c.prefetched, c.state,
	} {
		ch <- d
	}
}

// Collect is a prometheus.Collector's.
func (c *sourceCollector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- constant(d, prometheus.GaugeValue, v, labels...)
	}
	gauge(c.mount, 1, c.of.reference, c.src.id, c.of.backend)
	if c.src.cache == nil {
		return // files on this machine
	}
	c.collectCache(ch)
	if st := c.src.prefetch.Status(); st != nil {
		gauge(c.wanted, float64(st.Wanted))
		gauge(c.prefetched, float64(st.Fetched))
		for _, state := range []backend.PrefetchState{backend.PrefetchRunning, backend.PrefetchWaiting, backend.PrefetchDone, backend.PrefetchStopped} {
			gauge(c.state, oneIf(st.State == state), string(state))
		}
	}
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
		gauge(c.revoked, oneIf(l.Wrong != ""), l.Digest)
	}
}

func oneIf(so bool) float64 {
	if so {
		return 1
	}
	return 0
}

// constant is a sample with what was looked up. Labels are UTF-8, which paths of images need not be. What cannot be a
// sample is missing, and the others are not.
func constant(d *prometheus.Desc, kind prometheus.ValueType, v float64, labels ...string) prometheus.Metric {
	for i, l := range labels {
		labels[i] = strings.ToValidUTF8(l, "\uFFFD")
	}
	m, err := prometheus.NewConstMetric(d, kind, v, labels...)
	if err != nil {
		return prometheus.NewInvalidMetric(d, err)
	}
	return m
}

// collectCache sends what the cache counts.
func (c *sourceCollector) collectCache(ch chan<- prometheus.Metric) {
	counter := func(d *prometheus.Desc, n int64, labels ...string) {
		ch <- constant(d, prometheus.CounterValue, float64(n), labels...)
	}
	all := c.src.cache.Stats()
	s := all.Blobs
	counter(c.reads, s.Hits, "hit")
	counter(c.reads, s.Misses, "miss")
	counter(c.served, s.BytesServed)
	for cause, n := range map[string][2]int64{
		string(blobcache.Demand):    {s.FetchesDemand, s.BytesDemand},
		string(blobcache.Readahead): {s.FetchesAhead, s.BytesAhead},
		string(blobcache.Prefetch):  {s.FetchesPrefetch, s.BytesPrefetch},
		registry.CauseMetadata:      {all.Beneath.Fetches, all.Beneath.BytesFetched},
	} {
		counter(c.fetches, n[0], cause)
		counter(c.fetched, n[1], cause)
	}
	counter(c.evictions, all.Evictions)
	counter(c.evicted, all.EvictedBytes)
	counter(c.refused, all.Refused)
	counter(c.damaged, all.Damaged)
	gauge := func(d *prometheus.Desc, v float64) {
		ch <- constant(d, prometheus.GaugeValue, v)
	}
	gauge(c.flights, float64(all.InFlight))
	gauge(c.waiting, float64(all.Waiting))
	if all.Bytes >= 0 {
		gauge(c.kept, float64(all.Bytes))
	}
	limit := float64(all.Limit)
	if all.Limit == 0 {
		limit = math.Inf(1)
	}
	gauge(c.limit, limit)
}
