package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/nbdserve"
)

const (
	defaultNBDHost = "127.0.0.1"
	defaultNBDPort = "10809"
)

func (p *program) serveCommand() *cli.Command {
	return &cli.Command{
		Name:      "serve",
		Usage:     "export an EROFS layer of an image as a network block device",
		ArgsUsage: "REF",
		Description: "Serves the layer, read-only, to any NBD client until SIGINT or SIGTERM, and prints its\n" +
			"URI when it is ready. REF is as in erofs-oci mount. A client on another machine can\n" +
			"read all of the image: an address that is not this machine's own is served only with\n" +
			"--tls-client-ca or --public. A socket at PATH can be used by its owner only.",
		Flags: append(append(logFlags(),
			&cli.StringFlag{Name: "nbd", Usage: "serve NBD on `[ADDR|unix:PATH]`, where ADDR is HOST, HOST:PORT or :PORT",
				DefaultText: defaultNBDHost + ":" + defaultNBDPort},
			&cli.StringFlag{Name: "tls-cert", Usage: "make clients use TLS, with the certificate in `FILE` (PEM)"},
			&cli.StringFlag{Name: "tls-key", Usage: "the certificate's key in `FILE` (PEM)"},
			&cli.StringFlag{Name: "tls-client-ca", Usage: "serve only clients with a certificate by an authority in `FILE` (PEM)"},
			recordFlag(),
			&cli.BoolFlag{Name: "public", Usage: "let everybody who reaches the address read the image"},
			metricsFlag(),
		), append(sourceFlags(), prefetchFlags()...)...),
		Action: p.serve,
	}
}

// serveRequest is a parsed serve command.
type serveRequest struct {
	address nbdAddress
	tls     *tls.Config
	source  *sourceOptions
}

func (p *program) serve(c *cli.Context) error {
	ref, addr := "", c.String("nbd")
	if c.IsSet("nbd") && !c.Args().Present() {
		// --nbd REF: its address was left out.
		ref, addr = addr, ""
	} else {
		args, err := arguments(c, "REF")
		if err != nil {
			return err
		}
		ref = args[0]
	}
	log, err := p.newServerLog(c)
	if err != nil {
		return err
	}
	s := &serveRequest{}
	if s.address, err = parseNBDAddress(addr); err != nil {
		return err
	}
	if s.tls, err = serverTLS(c.String("tls-cert"), c.String("tls-key"), c.String("tls-client-ca")); err != nil {
		return err
	}
	authenticated := s.tls != nil && s.tls.ClientCAs != nil
	if !s.address.private() && !authenticated && !c.Bool("public") {
		return usagef("--nbd %s: everybody who reaches this address could read the image; demand certificates with --tls-client-ca, or say --public", addr)
	}
	if s.source, err = p.readSourceOptions(c, ref, log.Logger); err != nil {
		return err
	}
	if s.source.metrics, err = metricsOption(c); err != nil {
		return err
	}
	s.source.oneLayer = true
	return p.serveNBD(c.Context, s, log)
}

// serveNBD serves until ctx ends.
func (p *program) serveNBD(ctx context.Context, s *serveRequest, log *serverLog) (err error) {
	metering, err := startMetering(s.source, log.Logger)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, metering.Close()) }()
	// That it cannot be had is known before anything is fetched. Clients wait until there is something to serve.
	l, err := s.address.listen()
	if err != nil {
		return fmt.Errorf("--nbd %s: %w", s.address, err)
	}
	served := false
	defer func() {
		if !served {
			err = errors.Join(err, l.Close())
		}
	}()
	src, err := p.open(ctx, s.source, log.Logger)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	src.startPrefetch(s.source.prefetch, log.Logger)
	server, err := nbdserve.NewServer(
		nbdserve.Export{Description: fmt.Sprintf("%s %s", src.ref, src.id), Source: src.volume().Primary},
		nbdserve.Options{TLS: s.tls, Log: log.Logger, Failed: metering.failed})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, server.Close()) }()
	metering.show(src, mountLabels{src.ref.String(), serveLabel})
	defer func() { err = errors.Join(err, metering.Close()) }() // before src
	if err := src.recording.begin(); err != nil {
		return err
	}
	if _, err := fmt.Fprintln(p.stdout, nbdURI(l.Addr(), s.tls != nil)); err != nil {
		return err
	}
	served = true
	defer src.rememberRead()
	src.rememberRead()
	return server.Serve(ctx, l)
}

// nbdAddress is where NBD is served: at an address of TCP, or a path.
type nbdAddress struct {
	tcp  *net.TCPAddr
	path string
}

func parseNBDAddress(s string) (a nbdAddress, err error) {
	if path, ok := strings.CutPrefix(s, "unix:"); ok {
		if path == "" {
			return a, usagef("--nbd unix: needs the path of a socket")
		}
		a.path, err = filepath.Abs(path)
		return a, err
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		host, port = strings.Trim(s, "[]"), defaultNBDPort
		if host == "" {
			host = defaultNBDHost
		}
	}
	if a.tcp, err = net.ResolveTCPAddr("tcp", net.JoinHostPort(host, port)); err != nil {
		return a, usagef("--nbd %q: %w; want HOST, HOST:PORT, :PORT or unix:PATH", s, err)
	}
	return a, nil
}

// private says whether only this machine can reach the address.
func (a nbdAddress) private() bool { return a.tcp == nil || a.tcp.IP.IsLoopback() }

func (a nbdAddress) listen() (net.Listener, error) {
	if a.tcp != nil {
		return net.ListenTCP("tcp", a.tcp)
	}
	return listenAt(a.path)
}

func (a nbdAddress) String() string {
	if a.tcp != nil {
		return a.tcp.String()
	}
	return "unix:" + a.path
}

// nbdURI is what clients call the export.
func nbdURI(addr net.Addr, secure bool) string {
	scheme := "nbd"
	if secure {
		scheme = "nbds"
	}
	if addr.Network() == "unix" {
		path := strings.NewReplacer("+", "%20", "%2F", "/").Replace(url.QueryEscape(addr.String()))
		return scheme + "+unix:///?socket=" + path
	}
	return scheme + "://" + addr.String()
}

// serverTLS is nil where no certificate is given.
func serverTLS(cert, key, clientCA string) (*tls.Config, error) {
	switch {
	case cert == "" && key == "" && clientCA == "":
		return nil, nil
	case cert == "" || key == "":
		return nil, usagef("TLS needs both --tls-cert and --tls-key")
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("--tls-cert %s, --tls-key %s: %w", cert, key, err)
	}
	config := &tls.Config{Certificates: []tls.Certificate{pair}}
	if clientCA == "" {
		return config, nil
	}
	pem, err := os.ReadFile(clientCA)
	if err != nil {
		return nil, fmt.Errorf("--tls-client-ca: %w", err)
	}
	config.ClientCAs, config.ClientAuth = x509.NewCertPool(), tls.RequireAndVerifyClientCert
	if !config.ClientCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("--tls-client-ca %s: no certificate in it", clientCA)
	}
	return config, nil
}
