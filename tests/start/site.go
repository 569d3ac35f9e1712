package start

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
)

// The link between the registry and this machine.
const (
	Latency   = 20 * time.Millisecond
	Bandwidth = 25_000_000 // bytes a second
	// room is a connection's part of the 500,000 bytes that are on their way, of eight.
	room = 64 << 10
)

// repository is that of all images of a site.
const repository = "debian/python"

// Options of a site.
type Options struct {
	Dir    string // for everything; the caller removes it
	Binary string // erofs-oci
	// OneCore has servers run on one core.
	OneCore bool
}

// A Site is a registry at the end of the link, and a user with directories of its own.
type Site struct {
	*fakeregistry.Registry
	options Options
	env     []string
}

// NewSite starts an empty registry.
func NewSite(o Options) (*Site, error) {
	for _, d := range []string{"run", "home", "registry", "tmp"} {
		if err := os.Mkdir(filepath.Join(o.Dir, d), 0o700); err != nil {
			return nil, err
		}
	}
	r, err := fakeregistry.New(fakeregistry.Options{Dir: filepath.Join(o.Dir, "registry")})
	if err != nil {
		return nil, err
	}
	env := append(os.Environ(), "EROFS_OCI_RUN_DIR="+filepath.Join(o.Dir, "run"), "HOME="+filepath.Join(o.Dir, "home"),
		"TMPDIR="+filepath.Join(o.Dir, "tmp"))
	return &Site{Registry: r, options: o, env: env}, nil
}

// Ref is the reference of the image with that tag.
func (s *Site) Ref(tag string) string { return s.Addr() + "/" + repository + ":" + tag }

// Build makes an EROFS image of the root file system at root, as layout flags of
// erofs-oci build say, and pushes it with all that it can be verified by.
func (s *Site) Build(ctx context.Context, root, tag string, layout ...string) error {
	image := filepath.Join(s.options.Dir, "tmp", tag+".erofs")
	defer os.Remove(image)
	build := append(append([]string{"build", "--quiet", "-o", image}, layout...), root)
	if err := s.Run(ctx, build...); err != nil {
		return err
	}
	return s.Run(ctx, "push", "--quiet", image, s.Ref(tag))
}

// SlowDown puts the link between the registry and its users.
func (s *Site) SlowDown() {
	s.SetLatency(Latency)
	s.SetBandwidth(Bandwidth)
	s.SetRoom(room)
}

// Run runs erofs-oci to its end.
func (s *Site) Run(ctx context.Context, args ...string) error {
	_, err := s.Output(ctx, args...)
	return err
}

// Output is Run; it returns what erofs-oci prints.
func (s *Site) Output(ctx context.Context, args ...string) (string, error) {
	var stdout, stderr strings.Builder
	cmd := exec.CommandContext(ctx, s.options.Binary, args...)
	cmd.Env, cmd.Dir = s.env, s.options.Dir
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := s.Command(cmd); err != nil {
		return "", fmt.Errorf("%w: %s", err, stderr.String())
	}
	return stdout.String(), nil
}

// Command runs any command to its end, where servers of the site run.
func (s *Site) Command(cmd *exec.Cmd) error {
	start := (*exec.Cmd).Start
	if s.options.OneCore {
		start = startOnOneCore
	}
	err := start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return fmt.Errorf("%s: %w", strings.Join(cmd.Args, " "), err)
	}
	return nil
}
