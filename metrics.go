package main

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
)

// metricsPrefix begins the name of each metric that is ours.
const metricsPrefix = "erofs_oci_"

// A meter has the numbers of one server process. docs/metrics.md says what each is.
//
// What nobody else counts it counts itself: it is the Observer of the registry's client,
// and is told of the reads that had to wait. Both cost a network's round trip, beside which
// a counter is nothing. All else it looks up when it is asked, in the counts that the cache
// and the layers keep anyway: a read that is answered from the cache does not know of it.
type meter struct {
	families *prometheus.Registry
	requests *prometheus.CounterVec   // method, kind, cause, code
	received *prometheus.CounterVec   // kind, cause
	headers  *prometheus.HistogramVec // kind
	waits    prometheus.Histogram
	failures *prometheus.CounterVec // errno
	events   map[registry.Event]prometheus.Counter
}

// newMeter is a meter of nothing yet.
func newMeter() (*meter, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: metricsPrefix + name, Help: help})
	}
	// From a registry in the same rack to one that has to be waited for.
	buckets := []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}
	m := &meter{
		families: prometheus.NewRegistry(),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: metricsPrefix + "registry_requests_total",
			Help: "Requests to registries, their mirrors, storages and token services, hops of redirects and tries that failed included, also those whose connection was refused.",
		}, []string{"method", "kind", "cause", "code"}),
		received: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: metricsPrefix + "registry_received_bytes_total",
			Help: "Bytes of the bodies of answers, as they were received.",
		}, []string{"kind", "cause"}),
		headers: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: metricsPrefix + "registry_response_seconds", Buckets: buckets,
			Help: "Time from a request, connecting included where there was no connection, to the end of its answer's header. Requests without an answer are not in it.",
		}, []string{"kind"}),
		waits: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: metricsPrefix + "cache_read_wait_seconds", Buckets: buckets,
			Help: "Time that reads took which the cache could not answer at once, those that failed included.",
		}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: metricsPrefix + "read_errors_total",
			Help: "Requests of readers (reads, lookups, listings and so on) that failed with this errno, whether a line in the log says so or not. That there is no such file or attribute is no failure.",
		}, []string{"errno"}),
		events: map[registry.Event]prometheus.Counter{
			registry.EventRetry:        counter("registry_retries_total", "Tries that failed, those whose connection was refused included, and were made once more."),
			registry.EventResume:       counter("registry_resumes_total", "Retries that went on behind the bytes that had come already."),
			registry.EventThrottled:    counter("registry_throttled_total", "Answers with the status 429, too many requests."),
			registry.EventToken:        counter("registry_tokens_total", "Tokens that were fetched where there was none yet."),
			registry.EventTokenRefresh: counter("registry_token_refreshes_total", "Tokens that were fetched in place of one that had expired or was refused."),
			registry.EventMirrorLeft:   counter("registry_mirrors_left_total", "Times that a mirror failed and was put last for a while."),
			registry.EventWrongBytes:   counter("registry_wrong_bytes_total", "Times that bytes of a blob were not what they should be, and were asked for once more."),
		},
	}
	all := []prometheus.Collector{
		m.requests, m.received, m.headers, m.waits, m.failures, buildInfo(),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	}
	for _, c := range m.events {
		all = append(all, c)
	}
	for errno := range failureErrnos() {
		m.failures.WithLabelValues(errnoLabel(errno)) // 0 is a number, too
	}
	var errs []error
	for _, c := range all {
		errs = append(errs, m.families.Register(c))
	}
	return m, errors.Join(errs...)
}

// buildInfo is 1, and says which program counts.
func buildInfo() prometheus.Collector {
	full := version()
	cut := strings.LastIndexByte(full, ' ')
	g := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: metricsPrefix + "build_info", Help: "1, labeled with the version of erofs-oci and of Go.",
		ConstLabels: prometheus.Labels{"version": full[:max(cut, 0)], "goversion": full[cut+1:]},
	})
	g.Set(1)
	return g
}

// Answered is a registry.Observer's.
func (m *meter) Answered(a registry.Answer) {
	m.requests.WithLabelValues(methodLabel(a.Method), string(a.Kind), causeLabel(a.Cause), codeLabel(a.Status)).Inc()
	if a.Status != 0 {
		m.headers.WithLabelValues(string(a.Kind)).Observe(a.Wait.Seconds())
	}
}

// Received is a registry.Observer's.
func (m *meter) Received(a registry.Answer, n int) {
	m.received.WithLabelValues(string(a.Kind), causeLabel(a.Cause)).Add(float64(n))
}

// Happened is a registry.Observer's.
func (m *meter) Happened(e registry.Event) {
	if c := m.events[e]; c != nil {
		c.Inc()
	}
}

// waited is told of each read that had to wait.
func (m *meter) waited(d time.Duration) { m.waits.Observe(d.Seconds()) }

// failed is told of each request of a reader that failed. m may be nil.
func (m *meter) failed(errno syscall.Errno) {
	if m != nil {
		m.failures.WithLabelValues(errnoLabel(errno)).Inc()
	}
}

// measureCache has the requests of a cache bear their cause and what was waited before, and its
// waits counted. m may be nil: that is not for it alone.
func (m *meter) measureCache(o *blobcache.Options) {
	o.Label = func(ctx context.Context, cause blobcache.Cause) context.Context {
		return registry.WithCause(ctx, string(cause))
	}
	o.Waiting = registry.WithWaiting
	if m != nil {
		o.ObserveWait = m.waited
	}
}

// The values that a label may have are few, whoever gives them.

func methodLabel(method string) string {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodPost:
		return method
	}
	return "other"
}

func causeLabel(cause string) string {
	switch cause {
	case registry.CauseMetadata, string(blobcache.Demand), string(blobcache.Readahead), string(blobcache.Prefetch):
		return cause
	}
	return "other"
}

func codeLabel(status int) string {
	if status < 100 || status > 599 {
		return "none"
	}
	return string([]byte{'0' + byte(status/100), 'x', 'x'})
}

// failureErrnos are those that the backends make of errors, by their names.
func failureErrnos() map[syscall.Errno]string {
	return map[syscall.Errno]string{
		syscall.EIO: "EIO", syscall.EUCLEAN: "EUCLEAN", syscall.EOPNOTSUPP: "EOPNOTSUPP", syscall.EINVAL: "EINVAL",
	}
}

func errnoLabel(errno syscall.Errno) string { return cmp.Or(failureErrnos()[errno], "other") }
