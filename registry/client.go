package registry

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"runtime/debug"
	"sync"
	"time"
)

// Defaults of Options.
const (
	DefaultErrorWait   = 60 * time.Second
	DefaultResolveWait = 10 * time.Second
	DefaultNoProgress  = 30 * time.Second
	DefaultMaxConns    = 8

	// NoWait as a wait means: one try, no retry.
	NoWait time.Duration = -1
)

// Options of a Client. The zero value works.
type Options struct {
	// PlainHTTP speaks HTTP without TLS to every registry and allows credentials
	// to be sent that way.
	PlainHTTP bool

	// Username and Password go before the environment and the login files.
	Username, Password string
	// AuthFile is the login file to read in place of the usual ones; empty means
	// REGISTRY_AUTH_FILE, else the usual ones.
	AuthFile string

	// ErrorWait is how long a Fetch or a Read of its body goes without a byte
	// before it fails; ResolveWait is the same while an image is resolved. 0 is
	// the default, NoWait gives up on the first error.
	ErrorWait, ResolveWait time.Duration
	// NoProgress is how long a connection may be silent before it is given up
	// and the request is tried anew. It must be shorter than ErrorWait. 0 is the
	// default or half of ErrorWait, whichever is less.
	NoProgress time.Duration

	// MaxConnsPerHost bounds the connections to one host.
	MaxConnsPerHost int
	// RootCAs replaces the system's certificate authorities.
	RootCAs *x509.CertPool
	// CertDirs are looked through for certificates for a host: see
	// DefaultCertDirs. nil: none.
	CertDirs []string
	// SkipTLSVerify takes any certificate for good. Nothing then says who answers:
	// the bytes of a range are whatever is sent.
	SkipTLSVerify bool
	// RegistriesConf and its directory FILE.d are read in place of the host's
	// containers-registries.conf(5),
	// which names mirrors, and registries that are insecure or blocked.
	RegistriesConf string
	// Transport replaces the HTTP transport; RootCAs, CertDirs, SkipTLSVerify and
	// MaxConnsPerHost are then its own concern.
	Transport http.RoundTripper

	// UserAgent is sent with every request; empty means erofs-oci/VERSION.
	UserAgent string
	// Logger gets a line for what went wrong and was mended. nil: nothing.
	Logger *slog.Logger
	// Observer is told of each request. nil: nobody, which costs nothing.
	Observer Observer
}

// A Client talks to registries. It may be used by many goroutines at once, and
// keeps connections and tokens between calls. Use a Client for each set of
// credentials: those in Options go to every registry that is asked.
type Client struct {
	keyring   keyring
	plainHTTP bool
	// anyCertificate: no certificate is checked.
	anyCertificate bool
	errorWait      time.Duration
	resolveWait    time.Duration
	log            *slog.Logger
	observer       Observer // may be nil

	registriesConf string

	wire   http.RoundTripper // with a gate before each host
	follow http.RoundTripper // wire, following redirects
	// recovery is closed when a host that was in trouble answers again.
	recovery func() <-chan struct{}
	idle     func() // closes idle connections
	// trustAny has any certificate of a host taken for good.
	trustAny func(host string)
	tasks    tasks
	conns    conns

	mu       sync.Mutex
	sessions map[sessionKey]*session
	origins  map[string]*url.URL // by API host, once it is known
}

// New makes a Client. Nothing is sent yet. It fails for options that contradict
// each other and for an auth file that is not there.
func New(o Options) (*Client, error) {
	keys, err := newKeyring(o)
	if err != nil {
		return nil, err
	}
	errorWait, resolveWait := wait(o.ErrorWait, DefaultErrorWait), wait(o.ResolveWait, DefaultResolveWait)
	noProgress := o.NoProgress
	switch {
	case noProgress < 0, errorWait > 0 && noProgress >= errorWait:
		return nil, fmt.Errorf("no-progress timeout %v: must be positive and shorter than the error wait of %v", noProgress, errorWait)
	case noProgress == 0 && errorWait > 0:
		noProgress = min(DefaultNoProgress, errorWait/2)
	case noProgress == 0:
		noProgress = DefaultNoProgress
	}
	c := &Client{
		keyring: keys, plainHTTP: o.PlainHTTP, anyCertificate: o.SkipTLSVerify,
		errorWait: errorWait, resolveWait: resolveWait,
		log: o.Logger, observer: o.Observer,
		idle: func() {}, trustAny: func(string) {},
		registriesConf: o.RegistriesConf,
		sessions:       map[sessionKey]*session{}, origins: map[string]*url.URL{},
	}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	c.tasks.init()
	wire := &wireTransport{next: o.Transport, noProgress: noProgress, base: c.tasks.ctx, userAgent: o.UserAgent, observer: o.Observer}
	if wire.userAgent == "" {
		wire.userAgent = defaultUserAgent()
	}
	if wire.next == nil {
		t := &hostTransport{base: newTransport(o, noProgress, &c.conns), dirs: o.CertDirs, hosts: map[string]*http.Transport{}, insecure: map[string]bool{}}
		wire.next, wire.queues, c.idle, c.trustAny = t, true, t.closeIdle, t.trustAny
	}
	gates := newGateTransport(wire, maxConns(o))
	c.wire, c.recovery = gates, gates.recovery
	c.follow = &redirectTransport{next: gates, plainHTTP: o.PlainHTTP}
	return c, nil
}

// Close ends every request that is still under way, waits for what the Client
// itself has started and releases its connections. Bodies that Fetch returned
// fail from then on; their readers still have to close them.
func (c *Client) Close() error {
	err := c.tasks.close()
	c.idle()
	c.conns.close()
	return err
}

func wait(d, byDefault time.Duration) time.Duration {
	switch {
	case d == 0:
		return byDefault
	case d < 0:
		return 0
	}
	return d
}

func maxConns(o Options) int {
	if o.MaxConnsPerHost <= 0 {
		return DefaultMaxConns
	}
	return o.MaxConnsPerHost
}

func newTransport(o Options, noProgress time.Duration, all *conns) *http.Transport {
	most := maxConns(o)
	dialer := &net.Dialer{Timeout: noProgress, Control: boundUnsent}
	return &http.Transport{
		Proxy: proxyFromEnvironment,
		// A range must come as it was asked for, never encoded.
		DisableCompression:  true,
		ForceAttemptHTTP2:   true,
		TLSClientConfig:     tlsConfig(o),
		DialContext:         all.over(dialer.DialContext),
		TLSHandshakeTimeout: min(noProgress, 10*time.Second),
		MaxConnsPerHost:     most,
		MaxIdleConnsPerHost: most,
		IdleConnTimeout:     90 * time.Second,
		// How long a large upload waits for leave: see session.send.
		ExpectContinueTimeout:  time.Second,
		MaxResponseHeaderBytes: 256 << 10,
		// A dead HTTP/2 connection would otherwise get every new request until
		// TCP gives it up.
		HTTP2: &http.HTTP2Config{SendPingTimeout: noProgress / 2, PingTimeout: noProgress / 2},
	}
}

// proxyFromEnvironment keeps the password of a malformed proxy address out of
// the error.
func proxyFromEnvironment(req *http.Request) (*url.URL, error) {
	u, err := http.ProxyFromEnvironment(req)
	if err != nil {
		return nil, errors.New("proxy address in HTTPS_PROXY or HTTP_PROXY is not valid")
	}
	return u, nil
}

func defaultUserAgent() string {
	version := "devel"
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
		version = info.Main.Version
	}
	return "erofs-oci/" + version
}

// tasks counts what a Client runs on its own account.
type tasks struct {
	ctx    context.Context // ends with close
	cancel context.CancelFunc

	mu     sync.Mutex // guards closed, and that no Add follows Wait
	closed bool
	wg     sync.WaitGroup
}

func (t *tasks) init() { t.ctx, t.cancel = context.WithCancel(context.Background()) }

// enter reports whether a task may start; leave ends it.
func (t *tasks) enter() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return false
	}
	t.wg.Add(1)
	return true
}

func (t *tasks) leave() { t.wg.Done() }

// closeTimeout bounds the wait for a credential helper that waits for somebody
// to type: it is a process that nobody can interrupt from here, and an unmount
// should not hang on it.
const closeTimeout = 5 * time.Second

func (t *tasks) close() error {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.cancel()
	done := make(chan struct{})
	go func() { t.wg.Wait(); close(done) }()
	timeout := time.NewTimer(closeTimeout)
	defer timeout.Stop()
	select {
	case <-done:
		return nil
	case <-timeout.C:
		return errors.New("closing the registry client: a credential helper does not end")
	}
}
