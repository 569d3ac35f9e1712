package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
)

// sourceFlags say which bytes are meant and how to get at them.
func sourceFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "platform", Usage: "choose `OS/ARCH[/VARIANT]` from an image index (default: this machine's)"},
		&cli.IntFlag{Name: "layer", Value: -1, Usage: "take layer `N`, counted from 0 (default: the only EROFS layer)", DefaultText: "the only EROFS layer"},
		&cli.StringFlag{Name: "blob", Usage: "take the blob `DIGEST` of the repository, whatever the manifest says"},
		&cli.BoolFlag{Name: "plain-http", Usage: "speak plain HTTP to the registry"},
		&cli.StringFlag{Name: "username", Aliases: []string{"u"}, Usage: "log in as `NAME`"},
		&cli.BoolFlag{Name: "password-stdin", Usage: "read the password from standard input"},
		&cli.StringFlag{Name: "authfile", Usage: "read credentials from `FILE` (default: those of podman login and docker login)"},
		&cli.StringFlag{Name: "on-error", Value: "wait:60s", Usage: "how long a read waits for a network in trouble before it fails: `wait:DURATION`"},
		&cli.StringFlag{Name: "cache-dir", Usage: "keep what was fetched below `DIR`"},
	}
}

// passwordLimit bounds what is read as a password.
const passwordLimit = 64 << 10

// sourceOptions are the parsed source flags.
type sourceOptions struct {
	client   registry.Options
	selector registry.Selector
	cacheDir string
	onError  string
}

// access is what of the options another process needs to reach the same blob; the
// password is not among it.
func (s *sourceOptions) access() backend.Access {
	return backend.Access{
		PlainHTTP: s.client.PlainHTTP, Username: s.client.Username, AuthFile: s.client.AuthFile,
		OnError: s.onError, CacheDir: s.cacheDir,
	}
}

// readSourceOptions checks the source flags. The password is read by the process
// that will use it.
func (p *program) readSourceOptions(c *cli.Context, log *slog.Logger) (*sourceOptions, error) {
	wait, err := parseOnError(c.String("on-error"))
	if err != nil {
		return nil, err
	}
	authFile := c.String("authfile")
	if authFile != "" {
		// A server in the background has another working directory.
		if authFile, err = filepath.Abs(authFile); err != nil {
			return nil, err
		}
	}
	cacheDir := c.String("cache-dir")
	if cacheDir != "" {
		if cacheDir, err = filepath.Abs(cacheDir); err != nil {
			return nil, err
		}
	}
	s := &sourceOptions{
		onError: c.String("on-error"),
		client: registry.Options{
			PlainHTTP: c.Bool("plain-http"),
			Username:  c.String("username"),
			AuthFile:  authFile,
			ErrorWait: wait,
			Logger:    log,
		},
		selector: registry.Selector{Platform: c.String("platform")},
		cacheDir: cacheDir,
	}
	if err := p.passwordOption(c, s); err != nil {
		return nil, err
	}
	return s, selectLayer(c, s)
}

func selectLayer(c *cli.Context, s *sourceOptions) error {
	if c.IsSet("layer") {
		n := c.Int("layer")
		if n < 0 {
			return usagef("--layer %d: layers are counted from 0", n)
		}
		s.selector.Layer = &n
	}
	if !c.IsSet("blob") {
		return nil
	}
	if c.IsSet("layer") {
		return usagef("--layer and --blob exclude each other")
	}
	d, err := digest.Parse(c.String("blob"))
	if err != nil {
		return usagef("--blob %q: %w; want sha256:HEX", c.String("blob"), err)
	}
	s.selector.Blob = d
	return nil
}

func (p *program) passwordOption(c *cli.Context, s *sourceOptions) error {
	switch {
	case c.Bool("password-stdin") && s.client.Username == "":
		return usagef("--password-stdin needs --username")
	case s.client.Username != "" && !c.Bool("password-stdin"):
		return usagef("--username needs --password-stdin (a password on the command line would show in ps)")
	case !c.Bool("password-stdin"):
		return nil
	}
	password, err := readPassword(c.Context, p.stdin)
	s.client.Password = password
	return err
}

// readPassword reads all of r; a signal ends the wait for somebody who types.
func readPassword(ctx context.Context, r io.Reader) (string, error) {
	type answer struct {
		b   []byte
		err error
	}
	read := make(chan answer, 1)
	go func() {
		b, err := io.ReadAll(io.LimitReader(r, passwordLimit+int64(len("\r\n"))+1))
		read <- answer{b, err}
	}()
	var a answer
	select {
	case a = <-read:
	case <-ctx.Done():
		return "", ctx.Err()
	}
	if a.err != nil {
		return "", fmt.Errorf("read the password: %w", a.err)
	}
	password := strings.TrimRight(string(a.b), "\r\n")
	if len(password) > passwordLimit {
		return "", fmt.Errorf("read the password: more than %d bytes on standard input", passwordLimit)
	}
	if password == "" {
		return "", errors.New("read the password: nothing on standard input")
	}
	return password, nil
}

func parseOnError(v string) (time.Duration, error) {
	d, ok := strings.CutPrefix(v, "wait:")
	wait, err := time.ParseDuration(d)
	if !ok || err != nil || wait <= 0 {
		return 0, usagef("--on-error %q: want wait:DURATION with a positive duration, as wait:60s", v)
	}
	return wait, nil
}

// opened is a chosen layer, ready to be read through the cache.
type opened struct {
	client *registry.Client
	image  *registry.Image
	layer  registry.Layer
	cache  *blobcache.Cache
	blob   *blobcache.Blob
}

// open resolves ref and opens the layer that the options choose.
func (p *program) open(ctx context.Context, ref registry.Reference, s *sourceOptions, log *slog.Logger) (_ *opened, err error) {
	o := &opened{}
	defer func() {
		if err != nil {
			err = errors.Join(err, o.Close())
		}
	}()
	if o.client, err = registry.New(s.client); err != nil {
		return nil, err
	}
	if o.image, err = o.client.Resolve(ctx, ref, s.selector); err != nil {
		return nil, err
	}
	if o.layer, err = o.client.ErofsLayer(ctx, o.image, s.selector); err != nil {
		return nil, err
	}
	return o, p.openBlob(o, ref, s, log)
}

// openBlob opens o.layer, which may come from a manifest or from a record.
func (p *program) openBlob(o *opened, ref registry.Reference, s *sourceOptions, log *slog.Logger) error {
	blob, err := o.client.Blob(ref, o.layer.Descriptor)
	if err != nil {
		return err
	}
	dir, err := p.cacheDir(s.cacheDir, os.Geteuid())
	if err != nil {
		return err
	}
	if o.cache, err = blobcache.New(dir, blobcache.Options{Logger: log}); err != nil {
		return err
	}
	o.blob, err = o.cache.Open(o.layer.Digest.String(), blob.Size(), blob)
	return err
}

// explain adds to an error of the layer's bytes which layer was looked at.
func (o *opened) explain(err error) error {
	if !errors.Is(err, erofsfmt.ErrNotErofs) {
		return err
	}
	what := "blob " + o.layer.Digest.String()
	if o.layer.Index >= 0 {
		what = fmt.Sprintf("layer %d", o.layer.Index)
	}
	if o.layer.MediaType != "" {
		what += " is " + o.layer.MediaType + " and"
	}
	return fmt.Errorf("%s: %s cannot be mounted: %w", o.image.Reference, what, err)
}

// Close ends everything that open began, in the order of use.
func (o *opened) Close() error {
	var errs []error
	if o.blob != nil {
		errs = append(errs, o.blob.Close())
	}
	if o.cache != nil {
		errs = append(errs, o.cache.Close())
	}
	if o.client != nil {
		errs = append(errs, o.client.Close())
	}
	return errors.Join(errs...)
}

// cacheDir chooses where fetched bytes are kept: where the user says, else where
// the user's caches are. A process without such a place (root of a user
// namespace, a service without HOME) uses a private directory and says so.
func (p *program) cacheDir(flag string, euid int) (string, error) {
	if flag != "" {
		return flag, nil
	}
	var dir string
	switch xdg, home := p.getenv("XDG_CACHE_HOME"), p.getenv("HOME"); {
	case filepath.IsAbs(xdg):
		dir = filepath.Join(xdg, "erofs-oci")
	case euid == 0:
		dir = "/var/cache/erofs-oci"
	case filepath.IsAbs(home):
		dir = filepath.Join(home, ".cache", "erofs-oci")
	}
	if dir != "" {
		err := backend.PrivateDir(dir)
		if err == nil {
			return dir, nil
		}
		if !errors.Is(err, os.ErrPermission) && !errors.Is(err, syscall.EROFS) {
			return "", fmt.Errorf("cache directory: %w; choose another with --cache-dir", err)
		}
	}
	instead := filepath.Join(backend.TempDir(), "cache")
	if err := errors.Join(backend.PrivateDir(backend.TempDir()), backend.PrivateDir(instead)); err != nil {
		return "", fmt.Errorf("cache directory: %w; choose one with --cache-dir", err)
	}
	fmt.Fprintf(p.stderr, "erofs-oci: no cache directory of yours can be written; using %s (--cache-dir chooses another)\n", instead)
	return instead, nil
}
