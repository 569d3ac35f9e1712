package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	stdlog "log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/common/expfmt"
	"github.com/urfave/cli/v2"
	"golang.org/x/net/netutil"

	"github.com/erofs-oci/erofs-oci/backend"
)

func metricsFlag() cli.Flag {
	return &cli.StringFlag{Name: "metrics", Usage: "serve Prometheus metrics by HTTP, at /metrics, on `[HOST]:PORT|unix:PATH`; without HOST everybody who reaches this machine can read them"}
}

// metricsOption reads --metrics: it is where metrics are served, by any working directory,
// and "" for nowhere.
func metricsOption(c *cli.Context) (string, error) {
	addr := c.String("metrics")
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		if path == "" {
			return "", usagef("--metrics unix: needs the path of a socket")
		}
		path, err := filepath.Abs(path)
		return "unix:" + path, err
	}
	if addr == "" {
		if c.IsSet("metrics") {
			return "", usagef("--metrics needs an address: [HOST]:PORT or unix:PATH")
		}
		return "", nil
	}
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return "", usagef("--metrics %q: want [HOST]:PORT or unix:PATH", addr)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return "", usagef("--metrics %q: want a port from 1 to 65535", addr)
	}
	return addr, nil
}

// listenForMetrics takes the address. A socket whose server is gone is in nobody's way; its
// successor is for this user alone.
func listenForMetrics(addr string) (net.Listener, error) {
	path, onPath := strings.CutPrefix(addr, "unix:")
	var l net.Listener
	var err error
	if onPath {
		l, err = nbdAddress{path: path}.listen()
	} else {
		l, err = net.Listen("tcp", addr)
	}
	if !errors.Is(err, syscall.EADDRINUSE) {
		if err != nil {
			err = fmt.Errorf("--metrics %s: %w", addr, err)
		}
		return l, err
	}
	if st, statErr := os.Lstat(path); onPath && statErr == nil && st.Mode().Type() != os.ModeSocket {
		return nil, fmt.Errorf("--metrics %s: there is a file that is not a socket", addr)
	}
	return nil, fmt.Errorf("--metrics %s: %w by another program or mount", addr, syscall.EADDRINUSE)
}

// A metering is the meter of one server, and who shows it.
type metering struct {
	*meter
	log      *slog.Logger
	listener net.Listener // nil: nobody asked for one
	http     *http.Server
	serving  sync.WaitGroup
	closing  sync.Once
	err      error // of closing

	answering sync.RWMutex // read while a request is answered; guards closed
	closed    bool
}

// newMetering is a meter, and has the address at which it is to be shown.
func newMetering(addr string, log *slog.Logger) (*metering, error) {
	counts, err := newMeter()
	if err != nil {
		return nil, err
	}
	m := &metering{meter: counts, log: log}
	if addr != "" {
		m.listener, err = listenForMetrics(addr)
	}
	return m, err
}

// startMetering counts what is done with s, and takes the address of --metrics: that it
// cannot be had is known before anything is mounted.
func startMetering(s *sourceOptions, log *slog.Logger) (*metering, error) {
	m, err := newMetering(s.metrics, log)
	if err != nil {
		return nil, err
	}
	m.measure(s)
	return m, nil
}

// resumeMetering is for another server of a mount. Readers wait for it: that the address
// cannot be had is no reason not to serve them.
func resumeMetering(a backend.Access, log *slog.Logger) (*metering, error) {
	m, err := newMetering(a.Metrics, log)
	if err == nil || a.Metrics == "" {
		return m, err
	}
	log.Error("the mount goes on without its metrics being served", "err", err)
	return newMetering("", log)
}

// measure has the meter told of what is done with s.
func (m *metering) measure(s *sourceOptions) { s.meter, s.client.Observer = m.meter, m.meter }

// text is everything in the text format of Prometheus. What could not be had is missing in
// it, and the log says why.
func (m *metering) text() string {
	families, err := m.families.Gather()
	if err != nil {
		m.log.Error("some metrics are missing", "err", err)
	}
	var b bytes.Buffer
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(&b, f); err != nil {
			m.log.Error("some metrics are missing", "err", fmt.Errorf("%s: %w", f.GetName(), err))
		}
	}
	return b.String()
}

// Bounds for who reads metrics, and does not read on.
const (
	metricsClients  = 16 // at a time: more would take descriptors from those who read the image
	metricsRequest  = 5 * time.Second
	metricsAnswer   = 30 * time.Second
	metricsHeader   = 16 << 10
	metricsFarewell = time.Second
)

// show has the counts of src among the others, and shows them to who asks, until Close.
func (m *metering) show(src *opened, of mountLabels) {
	if err := m.families.Register(newSourceCollector(src, of)); err != nil {
		m.log.Error("some metrics are missing", "err", err)
	}
	if m.listener == nil {
		return
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", m.whileOpen(promhttp.HandlerFor(m.families, promhttp.HandlerOpts{
		ErrorLog: gatherLog{m.log}, ErrorHandling: promhttp.ContinueOnError,
	})))
	m.http = &http.Server{
		Handler: mux, ReadHeaderTimeout: metricsRequest, ReadTimeout: metricsRequest, WriteTimeout: metricsAnswer,
		MaxHeaderBytes: metricsHeader,
		ErrorLog:       stdlog.New(clientLog{m.log}, "", 0),
	}
	// There are few places: nobody keeps one until the next time.
	m.http.SetKeepAlivesEnabled(false)
	few := netutil.LimitListener(m.listener, metricsClients)
	m.serving.Go(func() {
		if err := m.http.Serve(few); !errors.Is(err, http.ErrServerClosed) {
			m.log.Error("metrics are not served any more", "err", err)
		}
	})
}

// gatherLog is a promhttp.Logger. What varies is no part of the message: the log tells by it what it has said before.
type gatherLog struct{ log *slog.Logger }

func (l gatherLog) Println(v ...any) {
	l.log.Error("some metrics are missing", "err", strings.TrimSpace(fmt.Sprintln(v...)))
}

// clientLog is written to by the HTTP server, a line at a time: most of them are about what clients do wrong.
type clientLog struct{ log *slog.Logger }

func (l clientLog) Write(line []byte) (int, error) {
	l.log.Debug("serving metrics", "err", string(bytes.TrimSpace(line)))
	return len(line), nil
}

// whileOpen answers as long as there is something to count.
func (m *metering) whileOpen(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		m.answering.RLock()
		defer m.answering.RUnlock()
		if m.closed {
			http.Error(w, "the server is ending", http.StatusServiceUnavailable)
			return
		}
		h.ServeHTTP(w, r)
	})
}

// Close ends the showing: what is being answered has a moment to leave. Nobody looks at what
// was opened any more when it returns. It may be called again.
func (m *metering) Close() error {
	m.closing.Do(func() {
		if m.http == nil {
			if m.listener != nil {
				m.err = m.listener.Close()
			}
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), metricsFarewell)
		defer cancel()
		if err := m.http.Shutdown(ctx); err != nil {
			m.err = m.http.Close() // who does not read on is cut off
		}
		m.serving.Wait()
		m.answering.Lock() // waits for those who still answer
		m.closed = true
		m.answering.Unlock()
	})
	return m.err
}
