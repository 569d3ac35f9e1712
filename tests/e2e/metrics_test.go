package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/require"
)

// numbers are what metrics --json prints.
type numbers []struct {
	Name, Type, Help string
	Samples          []struct {
		Labels       map[string]string
		Value, Count any // float64, or a string
	}
}

func (s *session) metrics(dir string) numbers {
	s.t.Helper()
	var n numbers
	must(s.t, json.Unmarshal([]byte(s.must("metrics", "--json", dir)), &n))
	return n
}

// sum adds up the samples of a family that have the labels, which are NAME=VALUE.
func (n numbers) sum(t *testing.T, name string, labels ...string) (sum float64) {
	t.Helper()
	for _, f := range n {
		if f.Name != "erofs_oci_"+name {
			continue
		}
		for _, s := range f.Samples {
			missing := func(l string) bool { k, v, _ := strings.Cut(l, "="); return s.Labels[k] != v }
			if !slices.ContainsFunc(labels, missing) {
				v, ok := s.Value.(float64)
				if !ok {
					t.Errorf("%s is %v", name, s.Value)
				}
				sum += v
			}
		}
		return sum
	}
	t.Errorf("there is no %s", name)
	return 0
}

// scrape gets the metrics as Prometheus does.
func scrape(addr string) (string, error) {
	network, at := "tcp", addr
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		network, at = "unix", path
	}
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, at)
	}}
	defer transport.CloseIdleConnections()
	resp, err := (&http.Client{Transport: transport, Timeout: 20 * time.Second}).Get("http://metrics/metrics")
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if kind := resp.Header.Get("Content-Type"); resp.StatusCode != 200 || !strings.HasPrefix(kind, "text/plain") {
		return "", fmt.Errorf("status %d, %s", resp.StatusCode, kind)
	}
	text, err := io.ReadAll(resp.Body)
	return string(text), err
}

// ours are the lines of a text that do not change while nothing is read.
func ours(text string) []string {
	var lines []string
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "erofs_oci_") {
			lines = append(lines, line)
		}
	}
	return lines
}

// freePort is an address that nobody listens at, though somebody may soon.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	return l.Addr().String()
}

// TestMetrics: all of an image is read, and the command and the HTTP server have the numbers
// of the registry. Nothing is left of them after the mount.
func TestMetrics(t *testing.T) {
	for _, kind := range []string{"unix", "tcp"} {
		t.Run(kind, func(t *testing.T) {
			im, s := served(t)
			addr := "unix:" + filepath.Join(s.dir, "metrics")
			if kind == "tcp" {
				addr = freePort(t)
			}
			dir := s.mount(im.ref, "--metrics="+addr)
			if r := s.run("sh", "-c", "cat $(find "+dir+" -type f) | wc -c"); r.code != 0 || r.stderr != "" {
				t.Fatalf("%d, %s", r.code, r.stderr)
			}
			n, began := s.metrics(dir), time.Now()
			// What was fetched ahead is still on its way, and then the whole is checked.
			for n.sum(t, "layer_info", "verified_by=whole-blob") == 0 {
				if time.Since(began) > 30*time.Second {
					t.Fatalf("not all of the image is here and right: %+v", n)
				}
				n = s.metrics(dir)
			}
			text, err := scrape(addr)
			must(t, err)
			stats := im.Stats()
			n = s.metrics(dir)
			for _, c := range []struct {
				what      string
				got, want float64
			}{
				{"requests that were answered", n.sum(t, "registry_requests_total") - n.sum(t, "registry_requests_total", "code=none"), float64(stats.Requests)},
				{"GETs of manifests", n.sum(t, "registry_requests_total", "kind=manifest", "method=GET"), float64(stats.ManifestGETs)},
				{"GETs of blobs", n.sum(t, "registry_requests_total", "kind=blob", "method=GET", "code=2xx"), float64(stats.BlobGETs)},
				{"bytes of blobs", n.sum(t, "registry_received_bytes_total", "kind=blob"), float64(stats.BlobBytes)},
				{"fetches", n.sum(t, "cache_fetches_total") - n.sum(t, "cache_fetches_total", "cause=metadata"), float64(stats.BlobGETs)},
				{"bytes of fetches", n.sum(t, "cache_fetched_bytes_total") - n.sum(t, "cache_fetched_bytes_total", "cause=metadata"), float64(stats.BlobBytes)},
				{"fetches of manifests", n.sum(t, "cache_fetches_total", "cause=metadata"), float64(stats.ManifestGETs)},
				{"bytes of manifests", n.sum(t, "cache_fetched_bytes_total", "cause=metadata"), n.sum(t, "registry_received_bytes_total", "kind=manifest")},
				{"bytes in the cache", n.sum(t, "layer_present_bytes"), float64(stats.BlobBytes)},
				{"bytes verified", n.sum(t, "layer_verified_bytes"), float64(stats.BlobBytes)},
				{"fetches by cause", n.sum(t, "registry_requests_total", "cause=demand") + n.sum(t, "registry_requests_total", "cause=readahead"), float64(stats.BlobGETs)},
				{"fetches for readers", n.sum(t, "cache_fetches_total", "cause=demand"), n.sum(t, "registry_requests_total", "cause=demand")},
				{"retries", n.sum(t, "registry_retries_total"), 0},
			} {
				if c.got != c.want {
					t.Errorf("%s: %v, the registry has %v", c.what, c.got, c.want)
				}
			}
			if served := n.sum(t, "cache_served_bytes_total"); served < bigSize {
				t.Errorf("%v bytes were served", served)
			}
			a, b := ours(text), ours(s.must("metrics", dir))
			only := func(x, y []string) []string {
				return slices.DeleteFunc(slices.Clone(x), func(line string) bool { return slices.Contains(y, line) })
			}
			if !slices.Equal(a, b) || len(a) < 20 {
				t.Errorf("by HTTP only:\n%s\nby the command only:\n%s", only(a, b), only(b, a))
			}
			if out := s.must("list", "--json"); strings.Contains(out, "erofs_oci_") {
				t.Errorf("list shows metrics: %s", out)
			}
			server := s.pidfd(dir)
			s.must("umount", dir)
			awaitEnd(t, server)
			if _, err := scrape(addr); err == nil {
				t.Error("metrics of a mount that has ended")
			}
			if left, _ := filepath.Glob(filepath.Join(s.dir, "metrics")); left != nil {
				t.Errorf("left: %v", left)
			}
			s.nothingLeft(dir)
		})
	}
}

// TestMetricsAddress: an address is one mount's, whoever is in the way is left alone, and a
// server that was killed is in nobody's way.
func TestMetricsAddress(t *testing.T) {
	im, s := served(t)
	socket, port := "unix:"+filepath.Join(s.dir, "metrics"), freePort(t)
	for _, addr := range []string{socket, port} {
		dir, other := s.mount(im.ref, "--metrics="+addr), s.target()
		wantLine(t, s.run(binary, "mount", "--metrics="+addr, im.ref, other), "--metrics "+addr+": address already in use by another program or mount")
		if mounted(t, other) {
			t.Error("mounted in spite of it")
		}
		if _, err := scrape(addr); err != nil {
			t.Errorf("the first one is gone: %v", err)
		}
		s.end(dir, syscall.SIGKILL)
		wantLine(t, s.run(binary, "metrics", dir), "is dead", "erofs-oci umount")
		again := s.mount(im.ref, "--metrics="+addr)
		if _, err := scrape(addr); err != nil {
			t.Errorf("after a server that was killed: %v", err)
		}
		s.must("umount", again)
		s.must("umount", dir)
	}
	file := filepath.Join(s.dir, "file")
	must(t, os.WriteFile(file, []byte("mine"), 0o600))
	dir := s.target()
	wantLine(t, s.run(binary, "mount", "--metrics=unix:"+file, im.ref, dir), "--metrics unix:"+file+": there is a file that is not a socket")
	if got, err := os.ReadFile(file); err != nil || string(got) != "mine" {
		t.Errorf("the file is %q, %v", got, err)
	}
	wantLine(t, s.run(binary, "mount", "--metrics=unix:no/such", im.ref, dir), "--metrics unix:"+s.dir+"/no/such: ", "no such file or directory")
	if r := s.run(binary, "mount", "--metrics=9100", im.ref, dir); r.code != 2 || !strings.Contains(r.stderr, "want [HOST]:PORT or unix:PATH") {
		t.Errorf("%+v", r)
	}
	wantLine(t, s.run(binary, "metrics", dir), "is not mounted by erofs-oci", "erofs-oci list")
	s.nothingLeft(dir)
}

// TestMetricsOfFile: of an image in a file there is little to count, and that is shown.
func TestMetricsOfFile(t *testing.T) {
	require.Has(t, "root", "fuse")
	s := newSession(t)
	image, _ := s.writeImage(corpus.Get(t, "zstd"))
	addr := "unix:" + filepath.Join(s.dir, "metrics")
	dir := s.mount(image, "--metrics="+addr)
	n := s.metrics(dir)
	if n.sum(t, "mount_info", "reference=file:"+image, "backend=fuse") != 1 || n.sum(t, "build_info") != 1 || n.sum(t, "registry_retries_total") != 0 {
		t.Errorf("%+v", n)
	}
	text, err := scrape(addr)
	if err != nil || !slices.Equal(ours(text), ours(s.must("metrics", dir))) || strings.Contains(text, "erofs_oci_layer_") {
		t.Errorf("%v, %s", err, text)
	}
}

// TestMetricsOfServe: an export is counted, too, and its socket goes with it.
func TestMetricsOfServe(t *testing.T) {
	require.Has(t, "nbdcopy")
	im := serveImage(t)
	s := newSession(t)
	addr := "unix:" + filepath.Join(s.dir, "metrics")
	v := s.serve("--nbd", "127.0.0.1:0", "--metrics", addr, im.ref)
	if r := s.run("nbdcopy", v.uri, "null:"); r.code != 0 {
		t.Fatal(r.stderr)
	}
	text, err := scrape(addr)
	must(t, err)
	for _, want := range []string{
		`erofs_oci_registry_received_bytes_total{cause="metadata",kind="manifest"} `,
		`erofs_oci_mount_info{backend="serve",id=`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s in\n%s", want, text)
		}
	}
	wantLine(t, s.run(binary, "serve", "--nbd", "127.0.0.1:0", "--metrics", addr, im.ref), "already in use")
	v.stop(os.Interrupt)
	if _, err := os.Lstat(filepath.Join(s.dir, "metrics")); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}
	s.cacheIdle()
}

// TestStoppedServers: servers that are there and do not answer are named, with what to look for, and waited for together.
func TestStoppedServers(t *testing.T) {
	t.Parallel()
	require.Has(t, "root", "fuse")
	s := newSession(t)
	image, _ := s.writeImage(corpus.Get(t, "zstd"))
	dirs := []string{s.mount(image), s.mount(image), s.mount(image), s.mount(image)}
	var pids []int
	var want []string
	for _, dir := range dirs {
		pid := s.entry(dir).PID
		pids, want = append(pids, pid), append(want, fmt.Sprintf("the server of the mount on %s (pid %d) does not answer", dir, pid))
	}
	all := func(sig syscall.Signal) {
		for _, pid := range pids {
			must(t, syscall.Kill(pid, sig))
		}
	}
	all(syscall.SIGSTOP)
	began := time.Now()
	r := s.run(binary, "list")
	took := time.Since(began)
	asked := s.run(binary, "metrics", dirs[0])
	all(syscall.SIGCONT)
	for i, line := range want {
		if r.code != 1 || !strings.Contains(r.stderr, line) || !strings.Contains(r.stdout, dirs[i]) {
			t.Errorf("list: %+v, want %s", r, line)
		}
	}
	if took > 9*time.Second { // 12 s one after the other, 3 s together
		t.Errorf("list took %v", took)
	}
	wantLine(t, asked, want[0])
	for _, dir := range dirs {
		s.must("umount", dir)
	}
	s.nothingLeft(dirs[0])
}

// TestMetricsOfFailures: each read that fails is counted, with the errno that the reader of our own file system sees; the
// kernel's EROFS sees EIO.
func TestMetricsOfFailures(t *testing.T) {
	require.Has(t, "root", "fuse", "kernel-erofs")
	for _, kind := range []string{"fuse", "file"} {
		t.Run(kind, func(t *testing.T) {
			im, s := served(t)
			dir := s.mount(im.ref, "--backend="+kind, "--prefetch=meta")
			st := s.prefetched(dir, backend.PrefetchDone)
			n := s.metrics(dir)
			if n.sum(t, "prefetch_state", "state=done") != 1 || n.sum(t, "prefetch_state") != 1 ||
				n.sum(t, "prefetch_wanted_bytes") != float64(st.Wanted) || n.sum(t, "prefetch_fetched_bytes") != float64(st.Fetched) || st.Fetched == 0 {
				t.Errorf("list says %+v, metrics %+v", st, n)
			}
			if n.sum(t, "read_errors_total") != 0 {
				t.Errorf("before anything failed: %+v", n)
			}
			s.must("umount", dir)
			im.Stop()
			dir = s.target()
			if r := s.run(binary, "mount", "--backend="+kind, "--offline", im.ref, dir); r.code != 0 {
				t.Fatalf("%+v", r) // it says what is not here
			}
			f, err := os.Open(filepath.Join(dir, bigFile))
			must(t, err)
			const reads = 5
			for i := range int64(reads) {
				if _, err := f.ReadAt(make([]byte, 4096), bigSize/2+i*2*chunk); !errors.Is(err, syscall.EIO) {
					t.Errorf("what is not here: %v", err)
				}
			}
			must(t, f.Close())
			n = s.metrics(dir)
			if failed := n.sum(t, "read_errors_total", "errno=EIO"); failed < reads || n.sum(t, "read_errors_total") != failed {
				t.Errorf("%v were counted of %d: %+v", failed, reads, n)
			}
			s.must("umount", dir)
			s.nothingLeft(dir)
		})
	}
}
