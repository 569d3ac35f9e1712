package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

// metered is a meter, and a layer that it follows.
func metered(t *testing.T, addr string) (*metering, *reader, []byte) {
	t.Helper()
	b := verifiable.Make(t, imageBytes(imageSize), verifiable.Options{Chunk: testChunk})
	m, r := meteredBlob(t, addr, push(t, b, false))
	return m, r, b.Plain
}

func meteredBlob(t *testing.T, addr string, p *pushed) (*metering, *reader) {
	t.Helper()
	m, err := newMetering(addr, slog.New(slog.DiscardHandler))
	must(t, err)
	t.Cleanup(func() { must(t, m.Close()) })
	var cache blobcache.Options
	m.measureCache(&cache)
	r, err := p.openBy(t, t.TempDir(), verifyAuto, registry.Options{Observer: m.meter}, cache)
	must(t, err)
	o := &opened{cache: r.cache, layers: []openedLayer{{blob: r.layerSource}, {blob: r.layerSource}}, id: "sha256:00"}
	o.prefetch = &prefetcher{status: backend.PrefetchStatus{State: backend.PrefetchWaiting, Wanted: 100}, wants: []piece{{r.layerSource, 0, 30}, {r.layerSource, 1000, 10}}}
	m.show(o, mountLabels{"r.example/x:v1", "fuse"})
	return m, r
}

// everything has each family have a sample.
func (m *meter) everything() {
	m.Answered(registry.Answer{Method: "GET", Kind: registry.KindBlob, Cause: "demand", Status: 206, Wait: time.Millisecond})
	m.Received(registry.Answer{Kind: registry.KindBlob, Cause: "demand"}, 1)
}

// TestMetricsDocumented: the table of docs/metrics.md is what there is, with the same words;
// and the linter of Prometheus has nothing to say.
func TestMetricsDocumented(t *testing.T) {
	m, _, _ := metered(t, "")
	m.everything()
	families, err := m.families.Gather()
	must(t, err)
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	must(t, err)
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	var rows []string
	gathered := make(map[string]bool)
	for _, f := range families {
		if !strings.HasPrefix(f.GetName(), metricsPrefix) {
			continue // those of the library
		}
		gathered[f.GetName()] = true
		labels := []string{}
		for _, l := range f.Metric[0].Label {
			labels = append(labels, l.GetName())
		}
		rows = append(rows, fmt.Sprintf("| `%s` | %s | %s | %s |", f.GetName(), strings.ToLower(f.GetType().String()), strings.Join(labels, ", "), f.GetHelp()))
	}
	if said := described(m.families); !maps.Equal(said, gathered) {
		t.Errorf("described are %v\nsamples have %v", said, gathered)
	}
	doc, err := os.ReadFile("docs/metrics.md")
	must(t, err)
	found := regexp.MustCompile("(?m)^\\| `"+metricsPrefix+".*$").FindAllString(string(doc), -1)
	if !slices.Equal(found, rows) {
		t.Errorf("docs/metrics.md should have\n%s", strings.Join(rows, "\n"))
	}
}

// described are the names of ours that a registry knows of.
func described(r *prometheus.Registry) map[string]bool {
	ch := make(chan *prometheus.Desc)
	go func() { r.Describe(ch); close(ch) }()
	names := make(map[string]bool)
	name := regexp.MustCompile(`fqName: "(` + metricsPrefix + `[a-z_]+)"`)
	for d := range ch {
		if found := name.FindStringSubmatch(d.String()); found != nil {
			names[found[1]] = true
		}
	}
	return names
}

// values are the samples of a text, by their name and labels.
func values(t *testing.T, text string) map[string]float64 {
	t.Helper()
	families, err := readMetrics(text)
	must(t, err)
	all := make(map[string]float64)
	for _, f := range families {
		for _, s := range f.Samples {
			key := f.Name
			for _, l := range slices.Sorted(maps.Keys(s.Labels)) {
				key += " " + l + "=" + s.Labels[l]
			}
			switch {
			case s.Value != nil:
				all[key] = float64(*s.Value)
			case s.Count != nil:
				all[key+" count"] = float64(*s.Count)
			}
		}
	}
	return all
}

// TestMeterAgrees: after all was read, twice, the numbers are those of the registry and of
// the readers.
func TestMeterAgrees(t *testing.T) {
	m, r, want := metered(t, "")
	for range 2 {
		if failed := r.readAll(want, 10_000); failed > 0 {
			t.Fatalf("%d reads failed", failed)
		}
	}
	sum := sums(t, m)
	for began := time.Now(); sum("cache_fetches_in_flight") > 0; sum = sums(t, m) {
		if time.Since(began) > 20*time.Second {
			t.Fatal("a fetch does not end")
		}
	}
	size, reads := float64(len(want)), math.Ceil(float64(len(want))/10_000)
	for _, c := range []struct {
		what      string
		got, want float64
	}{
		{"reads", sum("cache_reads_total"), 2 * reads},
		{"bytes served", sum("cache_served_bytes_total"), 2 * size},
		{"size", sum("layer_size_bytes"), size},
		{"present", sum("layer_present_bytes"), size},
		{"verified", sum("layer_verified_bytes"), size},
		{"by the index", sum("layer_info", "verified_by="+byIndex), 1},
		{"wrong", sum("layer_wrong"), 0},
		{"bytes of chunks", sum("cache_fetched_bytes_total") - sum("cache_fetched_bytes_total", "cause=metadata"), float64(r.cached.Size())},
		{"bytes of the index", sum("cache_fetched_bytes_total", "cause=metadata"), sum("registry_received_bytes_total", "cause=metadata", "kind=blob")},
		{"fetches of the index", sum("cache_fetches_total", "cause=metadata"), 1},
		{"reads that were timed", sum("cache_read_wait_seconds"), sum("cache_reads_total", "result=miss")},
		{"fetches by cause", sum("cache_fetches_total", "cause=demand"), sum("registry_requests_total", "cause=demand")},
		{"fetches ahead", sum("cache_fetches_total", "cause=readahead"), sum("registry_requests_total", "cause=readahead")},
		{"to be prefetched", sum("prefetch_wanted_bytes"), 100},
		{"prefetched", sum("prefetch_fetched_bytes"), 40},
		{"prefetching waits", sum("prefetch_state", "state=waiting"), 1},
		{"states", sum("prefetch_state"), 1},
		{"reads that wait", sum("cache_reads_waiting"), 0},
		{"chunks refused", sum("cache_refused_chunks_total"), 0},
		{"mounts", sum("mount_info", "reference=r.example/x:v1", "id=sha256:00", "backend=fuse"), 1},
		{"fetches, with the index", sum("cache_fetches_total"), sum("registry_requests_total", "kind=blob", "method=GET", "code=2xx")},
		{"manifests", sum("registry_requests_total", "kind=manifest"), 1},
	} {
		if c.got != c.want {
			t.Errorf("%s: %v, want %v", c.what, c.got, c.want)
		}
	}
	if hits := sum("cache_reads_total", "result=hit"); hits < reads {
		t.Errorf("%v hits, although all was here the second time", hits)
	}
	if got := sum("registry_received_bytes_total", "kind=blob"); got < size {
		t.Errorf("%v bytes were received of an image of %v", got, size)
	}
}

// TestMeterPrefetch: what is fetched in the background is told apart, at the cache and at the
// registry.
func TestMeterPrefetch(t *testing.T) {
	m, r, want := metered(t, "")
	must(t, r.cached.Prefetch(t.Context(), 0, int64(len(want))))
	sum := sums(t, m)
	if n := sum("cache_fetched_bytes_total", "cause=prefetch"); n != float64(len(want)) && n != float64(r.cached.Size()) {
		t.Errorf("%v bytes were prefetched of %d", n, len(want))
	}
	if n := sum("registry_received_bytes_total", "cause=prefetch"); n < float64(len(want)) {
		t.Errorf("%v bytes were received for it", n)
	}
	if n := sum("cache_fetches_total", "cause=prefetch"); n == 0 || n != sum("registry_requests_total", "cause=prefetch") || n+1 != sum("cache_fetches_total") || sum("cache_fetches_total", "cause=metadata") != 1 {
		t.Errorf("%v fetches, and that of the index: %s", n, m.text())
	}
	if n := sum("cache_reads_total") + sum("cache_read_wait_seconds"); n != 0 {
		t.Errorf("%v reads", n)
	}
}

// sums adds up the samples of a name that have the labels, as they are now.
func sums(t *testing.T, m *metering) func(name string, labels ...string) float64 {
	t.Helper()
	got := values(t, m.text())
	return func(name string, labels ...string) (n float64) {
		t.Helper()
		known := false
		for key, v := range got {
			words := strings.Fields(key)
			if words[0] != metricsPrefix+name {
				continue
			}
			known = true
			if !slices.ContainsFunc(labels, func(l string) bool { return !slices.Contains(words, l) }) {
				n += v
			}
		}
		if !known {
			t.Errorf("there is no %s", name)
		}
		return n
	}
}

// TestMeterWrongBytes: a mirror that lies is counted, and so is a layer whose bytes turn out
// to be wrong when it is too late.
func TestMeterWrongBytes(t *testing.T) {
	b := verifiable.Make(t, imageBytes(imageSize), verifiable.Options{Chunk: testChunk})
	p := push(t, b, true)
	p.mirror.SetFault(flips(b, 1_000_000, true).OnBlobs())
	m, r := meteredBlob(t, "", p)
	if failed := r.readAll(b.Plain, 30_000); failed > 0 {
		t.Errorf("%d reads failed", failed)
	}
	sum := sums(t, m)
	if sum("registry_wrong_bytes_total") != 1 || sum("registry_mirrors_left_total") != 1 || sum("cache_refused_chunks_total") != 1 || sum("layer_wrong") != 0 || sum("layer_verified_bytes") != float64(len(b.Plain)) {
		t.Errorf("of a mirror that lies:\n%s", m.text())
	}

	b = verifiable.Make(t, imageBytes(imageSize), verifiable.Options{})
	p = push(t, b, false)
	p.registry.SetFault(flips(b, 1_000_000, true).OnBlobs())
	m, r = meteredBlob(t, "", p)
	for off := int64(0); off < imageSize; off += 100_000 {
		// It is right where it was not flipped, until all of it is here.
		_ = r.ReadAt(t.Context(), make([]byte, min(100_000, imageSize-off)), off)
	}
	select {
	case <-r.told:
	case <-time.After(20 * time.Second):
		t.Fatal("nobody noticed")
	}
	sum = sums(t, m)
	if sum("layer_wrong") != 1 || sum("layer_verified_bytes") != 0 || sum("layer_info", "verified_by="+byNothing) != 1 {
		t.Errorf("of a layer that is wrong:\n%s", m.text())
	}
}

// TestMetricsOfAnyPath: an image on this machine may have a path that is no UTF-8; and what cannot be a metric takes no
// other with it.
func TestMetricsOfAnyPath(t *testing.T) {
	m, err := newMetering("", slog.New(slog.DiscardHandler))
	must(t, err)
	m.show(&opened{id: "size:1"}, mountLabels{"/images/\xff\xfe.erofs", "file"})
	if n := sums(t, m)("mount_info", "reference=/images/\uFFFD.erofs", "id=size:1", "backend=file"); n != 1 {
		t.Errorf("%v mounts: %s", n, m.text())
	}
	d := prometheus.NewDesc(metricsPrefix+"x", "X.", []string{"a"}, nil)
	if err := constant(d, prometheus.GaugeValue, 1, "a", "b").Write(nil); err == nil {
		t.Error("a label too many is written")
	}
}

// TestMeterFailures: each errno that a reader may see is there before anybody does; and where nothing counts, nothing is
// counted.
func TestMeterFailures(t *testing.T) {
	m, err := newMetering("", slog.New(slog.DiscardHandler))
	must(t, err)
	m.failed(syscall.EIO)
	m.failed(syscall.EIO)
	m.failed(syscall.EUCLEAN)
	(*meter)(nil).failed(syscall.EIO)
	sum := sums(t, m)
	for errno, want := range map[string]float64{"EIO": 2, "EUCLEAN": 1, "EOPNOTSUPP": 0, "EINVAL": 0} {
		if got := sum("read_errors_total", "errno="+errno); got != want {
			t.Errorf("%s: %v, want %v", errno, got, want)
		}
	}
}

// TestMetricLabels: what somebody else chooses cannot make samples without end.
func TestMetricLabels(t *testing.T) {
	m, err := newMeter()
	must(t, err)
	for i := range 1000 {
		a := registry.Answer{Method: fmt.Sprint("M", i), Kind: registry.KindBlob, Cause: fmt.Sprint("c", i), Status: i}
		m.Answered(a)
		m.Received(a, 1)
		m.Happened(registry.Event(fmt.Sprint(i)))
		m.failed(syscall.Errno(i))
	}
	families, err := m.families.Gather()
	must(t, err)
	for _, f := range families {
		if n := len(f.Metric); strings.HasPrefix(f.GetName(), metricsPrefix) && n > 6 {
			t.Errorf("%s has %d samples", f.GetName(), n)
		}
	}
}

// ask gets the metrics from an address.
func ask(addr, path string) (string, error) {
	network, at := "tcp", addr
	if socket, ok := strings.CutPrefix(addr, "unix:"); ok {
		network, at = "unix", socket
	}
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, at)
	}}
	defer transport.CloseIdleConnections()
	resp, err := (&http.Client{Transport: transport}).Get("http://metrics" + path)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d: %s", resp.StatusCode, text)
	}
	return string(text), err
}

// TestScrapesAtOnce: many ask by each way while all that is counted goes on.
func TestScrapesAtOnce(t *testing.T) {
	addr := "unix:" + filepath.Join(t.TempDir(), "metrics")
	m, r, want := metered(t, addr)
	var all sync.WaitGroup
	for range metricsClients + 4 {
		all.Go(func() {
			for range 2 {
				text, err := ask(addr, "/metrics")
				if err != nil || !strings.Contains(text, metricsPrefix+"layer_info{") {
					t.Errorf("%d bytes, %v", len(text), err)
				}
				values(t, m.text())
				m.everything()
			}
		})
	}
	all.Go(func() { r.readAll(want, 5000) })
	all.Wait()
	if _, err := ask(addr, "/else"); err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("another path: %v", err)
	}
}

// TestMetricsEnd: clients that say nothing, or do not listen, neither keep others from being
// answered for ever nor the server from ending; and the socket goes with it.
func TestMetricsEnd(t *testing.T) {
	path := filepath.Join(t.TempDir(), "metrics")
	m, _, _ := metered(t, "unix:"+path)
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the socket: %v, %v", st, err)
	}
	for range 3 * metricsClients {
		conn, err := net.Dial("unix", path)
		must(t, err)
		defer conn.Close()
		if _, err := io.WriteString(conn, "GET /metrics HT"); err != nil {
			t.Fatal(err)
		}
	}
	began := time.Now()
	must(t, m.Close())
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("the end took %v", took)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}
	if m.text() == "" {
		t.Error("who holds the meter cannot read it any more")
	}
}

// TestMetricsSlots: a connection more than there may be is served when one ends.
func TestMetricsSlots(t *testing.T) {
	addr := "unix:" + filepath.Join(t.TempDir(), "metrics")
	metered(t, addr)
	var conns []net.Conn
	for range metricsClients {
		conn, err := net.Dial("unix", strings.TrimPrefix(addr, "unix:"))
		must(t, err)
		defer conn.Close()
		conns = append(conns, conn)
	}
	answered := make(chan error, 1)
	go func() {
		_, err := ask(addr, "/metrics")
		answered <- err
	}()
	conns[0].Close()
	select {
	case err := <-answered:
		must(t, err)
	case <-time.After(20 * time.Second):
		t.Fatal("not served")
	}
}

// TestMetricsIdle: those who were answered and stay connected are in nobody's way.
func TestMetricsIdle(t *testing.T) {
	addr := "unix:" + filepath.Join(t.TempDir(), "metrics")
	metered(t, addr)
	for range metricsClients {
		conn, err := net.Dial("unix", strings.TrimPrefix(addr, "unix:"))
		must(t, err)
		defer conn.Close()
		_, err = io.WriteString(conn, "GET /metrics HTTP/1.1\r\nHost: metrics\r\n\r\n")
		must(t, err)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		must(t, err)
		if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("status %d, %v", resp.StatusCode, err)
		}
	}
	answered := make(chan error, 1)
	go func() {
		_, err := ask(addr, "/metrics")
		answered <- err
	}()
	select {
	case err := <-answered:
		must(t, err)
	case <-time.After(20 * time.Second):
		t.Error("who comes next is not answered")
	}
}

// TestMetricsLogs: the lines of the libraries are ours, with a message that does not vary.
func TestMetricsLogs(t *testing.T) {
	var said strings.Builder
	log := slog.New(slog.NewJSONHandler(&said, &slog.HandlerOptions{Level: slog.LevelDebug}))
	m, err := newMetering("unix:"+filepath.Join(t.TempDir(), "metrics"), log)
	must(t, err)
	d := prometheus.NewDesc(metricsPrefix+"x", "X.", nil, nil)
	must(t, m.families.Register(badCollector{d}))
	m.show(&opened{}, mountLabels{})
	if text, err := ask("unix:"+m.listener.Addr().String(), "/metrics"); err != nil || !strings.Contains(text, metricsPrefix+"build_info") {
		t.Errorf("%s, %v", text, err)
	}
	m.http.ErrorLog.Printf("http: TLS handshake error from %s", "somebody")
	must(t, m.Close())
	for _, want := range []string{
		`"level":"ERROR","msg":"some metrics are missing","err":"error gathering metrics:`,
		`"level":"DEBUG","msg":"serving metrics","err":"http: TLS handshake error from somebody"}`,
	} {
		if !strings.Contains(said.String(), want) {
			t.Errorf("no %s in %s", want, said.String())
		}
	}
}

// badCollector has a metric that is none.
type badCollector struct{ d *prometheus.Desc }

func (c badCollector) Describe(ch chan<- *prometheus.Desc) { ch <- c.d }
func (c badCollector) Collect(ch chan<- prometheus.Metric) {
	ch <- prometheus.NewInvalidMetric(c.d, errors.New("broken by the test"))
}

// TestMetricsOption: what is an address.
func TestMetricsOption(t *testing.T) {
	cwd, err := os.Getwd()
	must(t, err)
	for in, want := range map[string]string{
		"127.0.0.1:9100": "127.0.0.1:9100", ":9100": ":9100", "[::1]:9100": "[::1]:9100", "localhost:9100": "localhost:9100",
		"unix:/run/x": "unix:/run/x", "unix:x": "unix:" + cwd + "/x",
		"": "", "unix:": "", "9100": "", "127.0.0.1": "", ":0": "", ":http": "", ":65536": "", "::1:9100": "", "/run/x": "",
	} {
		var got string
		app := &cli.App{Flags: []cli.Flag{metricsFlag()}, Action: func(c *cli.Context) (err error) {
			got, err = metricsOption(c)
			return err
		}}
		err := app.Run([]string{"x", "--metrics=" + in})
		if got != want || (err == nil) != (want != "") || err != nil && exitCode(err) != exitUsage {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
}

// TestResumedMetering: another server of a mount serves it also where the address is taken.
func TestResumedMetering(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	s := &sourceOptions{metrics: l.Addr().String()}
	if s.access().Metrics != s.metrics {
		t.Errorf("recorded is %q", s.access().Metrics)
	}
	if _, err := startMetering(s, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "--metrics "+s.metrics+": address already in use by another program or mount") {
		t.Errorf("a mount: %v", err)
	}
	var said strings.Builder
	m, err := resumeMetering(s.access(), slog.New(slog.NewTextHandler(&said, nil)))
	if err != nil || !strings.Contains(said.String(), "goes on without its metrics") {
		t.Errorf("another server of it: %v, %q", err, said.String())
	}
	must(t, m.Close())
}

// TestReadMetrics: each kind of family, with values that JSON does not have.
func TestReadMetrics(t *testing.T) {
	families, err := readMetrics(`# HELP b_seconds of b
# TYPE b_seconds histogram
b_seconds_bucket{l="1",le="0.5"} 1
b_seconds_bucket{l="1",le="+Inf"} 3
b_seconds_sum{l="1"} 7.5
b_seconds_count{l="1"} 3
# HELP a of a
# TYPE a gauge
a NaN
# TYPE c_total counter
c_total{x="y"} 2
# TYPE d summary
d{quantile="0.5"} -Inf
d_sum 1
d_count 2
`)
	must(t, err)
	got, err := json.Marshal(families)
	must(t, err)
	const want = `[{"name":"a","type":"gauge","help":"of a","samples":[{"labels":{},"value":"NaN"}]},` +
		`{"name":"b_seconds","type":"histogram","help":"of b","samples":[{"labels":{"l":"1"},"count":3,"sum":7.5,"buckets":[{"le":0.5,"count":1},{"le":"+Inf","count":3}]}]},` +
		`{"name":"c_total","type":"counter","help":"","samples":[{"labels":{"x":"y"},"value":2}]},` +
		`{"name":"d","type":"summary","help":"","samples":[{"labels":{},"count":2,"sum":1,"quantiles":[{"quantile":0.5,"value":"-Inf"}]}]}]`
	if string(got) != want {
		t.Errorf("%s\nwant %s", got, want)
	}
	if _, err := readMetrics("a{"); err == nil {
		t.Error("what is no text format is read")
	}
}

// BenchmarkMeter is what a GET and a Read of its body cost more, beside a round trip.
func BenchmarkMeter(b *testing.B) {
	m, err := newMeter()
	if err != nil {
		b.Fatal(err)
	}
	a := registry.Answer{Method: "GET", Kind: registry.KindBlob, Cause: string(blobcache.Demand), Status: 206, Wait: time.Millisecond}
	b.Run("answer", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			m.Answered(a)
		}
	})
	b.Run("read of a body", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			m.Received(a, 32<<10)
		}
	})
	b.Run("read that waited", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			m.waited(time.Millisecond)
		}
	})
}
