package debian

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// An Apt has sources, lists and caches of its own, and for it no package is
// installed.
type Apt struct {
	dir     string
	options []string
}

// NewApt makes one in dir, with the packages of a suite such as "sid" on the
// mirror of this machine.
func NewApt(ctx context.Context, dir, suite string) (*Apt, error) {
	mirror, err := Mirror(ctx)
	if err != nil {
		return nil, err
	}
	const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
	signed := ""
	if _, err := os.Stat(keyring); err == nil {
		signed = " signed-by=" + keyring
	}
	sources, status := filepath.Join(dir, "sources.list"), filepath.Join(dir, "status")
	line := fmt.Sprintf("deb [arch=amd64%s] %s %s main\n", signed, mirror, suite)
	if err := errors.Join(os.WriteFile(sources, []byte(line), 0o600), os.WriteFile(status, nil, 0o600)); err != nil {
		return nil, err
	}
	for _, d := range []string{"state/lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	a := &Apt{dir: dir, options: []string{
		"-o", "Dir::Etc::SourceList=" + sources, "-o", "Dir::Etc::SourceParts=/dev/null",
		"-o", "Dir::State=" + filepath.Join(dir, "state"), "-o", "Dir::State::status=" + status,
		"-o", "Dir::Cache=" + filepath.Join(dir, "cache"), "-o", "APT::Architecture=amd64",
		"-o", "APT::Sandbox::User=root", "-o", "Acquire::Languages=none",
	}}
	_, err = a.Run(ctx, "apt-get", "-qq", "update")
	return a, err
}

// Run runs a program of apt's and returns what it prints.
func (a *Apt) Run(ctx context.Context, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, append(slices.Clone(a.options), args...)...)
	cmd.Dir = a.dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	return output(cmd)
}

// Download brings packages and all that they depend on; it returns the files.
func (a *Apt) Download(ctx context.Context, packages ...string) ([]string, error) {
	args := append([]string{"-qq", "--yes", "--no-install-recommends", "--download-only", "install"}, packages...)
	if _, err := a.Run(ctx, "apt-get", args...); err != nil {
		return nil, err
	}
	return filepath.Glob(filepath.Join(a.dir, "cache/archives/*.deb"))
}

// Mirror is the address from which this machine gets its own release of Debian.
func Mirror(ctx context.Context) (string, error) {
	suite, err := codename()
	if err != nil {
		return "", err
	}
	out, err := output(exec.CommandContext(ctx, "apt-get", "update", "--print-uris"))
	if err != nil {
		return "", err
	}
	found := regexp.MustCompile(`(?m)^'([^']+)/dists/` + regexp.QuoteMeta(suite) + `/InRelease' `).FindSubmatch(out)
	if found == nil {
		return "", fmt.Errorf("apt has no source for %s", suite)
	}
	return string(found[1]), nil
}

// codename names the release of Debian that this machine runs.
func codename() (string, error) {
	release, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "", err
	}
	found := regexp.MustCompile(`(?m)^VERSION_CODENAME="?([^"\n]+)`).FindSubmatch(release)
	if found == nil {
		return "", errors.New("/etc/os-release names no VERSION_CODENAME: this machine is no Debian")
	}
	return string(found[1]), nil
}

// output is cmd.Output with what the command complained of in the error.
func output(cmd *exec.Cmd) ([]byte, error) {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return out, nil
}
