package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
	"github.com/erofs-oci/erofs-oci/tests/require"
)

// canary is the password that nothing may show.
const canary = "canary-Pa55w0rd!"

// A leak looks for the secrets of a registry wherever a process leaves traces.
type leak struct {
	t        *testing.T
	registry *fakeregistry.Registry
}

// in fails the test if a secret, or the query of a signed URL, is in what.
func (l *leak) in(what string, text []byte) {
	l.t.Helper()
	for _, secret := range append(l.registry.Secrets(), "signature=") {
		if bytes.Contains(text, []byte(secret)) {
			l.t.Errorf("a secret (%.12s...) is in %s", secret, what)
		}
	}
}

// below looks into every file of a directory: state, logs, cache.
func (l *leak) below(dir string) {
	l.t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err == nil && d.IsDir() && strings.HasPrefix(d.Name(), "mnt-"):
			return fs.SkipDir // an image is mounted there
		case err != nil || !d.Type().IsRegular():
			return ignoreGone(err)
		}
		text, err := os.ReadFile(path)
		l.in(path, text)
		return ignoreGone(err)
	})
	if err != nil {
		l.t.Error(err)
	}
}

func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// processes looks at the arguments and the environment of all processes that run our
// program, and at the files that they hold open without a name, until ctx ends. It
// gives how many it has seen.
func (l *leak) processes(ctx context.Context) (seen int) {
	for ctx.Err() == nil {
		list, _ := filepath.Glob("/proc/[0-9]*/exe")
		for _, exe := range list {
			if to, err := os.Readlink(exe); err != nil || to != binary {
				continue
			}
			pid := filepath.Dir(exe)
			if _, err := strconv.Atoi(filepath.Base(pid)); err != nil {
				continue
			}
			for _, name := range []string{"cmdline", "environ"} {
				// A process that has ended meanwhile shows nothing.
				if text, err := os.ReadFile(filepath.Join(pid, name)); err == nil && len(text) > 0 {
					l.in(pid+"/"+name, text)
					seen++
				}
			}
		}
		select {
		case <-time.After(2 * time.Millisecond): // there is no event for a new process
		case <-ctx.Done():
		}
	}
	return seen
}

// secretCommands are all commands that read from a registry; REF and DIR stand for
// what they take.
func secretCommands() [][]string {
	return [][]string{
		{"inspect", "REF"}, {"inspect", "--json", "--probe", "REF"}, {"ls", "-l", "-R", "REF"}, {"cat", "REF", "/no such file"},
		{"stat", "REF", "/"}, {"extract", "REF", "DIR"}, {"check", "REF"}, {"dump", "REF"},
		{"mount", "--backend=fuse", "REF", "DIR"}, {"mount", "--foreground", "--backend=fuse", "REF", "/nonexistent"},
		{"serve", "--nbd=unix:/nonexistent/socket", "REF"}, {"inspect", "--platform=no/such", "REF"},
	}
}

// secretFaults are what a registry may do to have a secret said.
func secretFaults() map[string]func(*fakeregistry.Registry) {
	echo := func(status int) func(r *fakeregistry.Registry) {
		return func(r *fakeregistry.Registry) { r.SetFault(fakeregistry.Echo(status).Authorized().OnBlobs()) }
	}
	return map[string]func(*fakeregistry.Registry){
		"none":     func(*fakeregistry.Registry) {},
		"echo 401": echo(401), "echo 403": echo(403), "echo 404": echo(404), "echo 500": echo(500),
		"token service echoes":      func(r *fakeregistry.Registry) { r.SetFault(fakeregistry.Echo(403).OnTokens()) },
		"manifests echo":            func(r *fakeregistry.Registry) { r.SetFault(fakeregistry.Echo(404).Authorized().OnManifests()) },
		"storage echoes":            func(r *fakeregistry.Registry) { r.Storage().SetFault(fakeregistry.Echo(404)) },
		"storage echoes in trouble": func(r *fakeregistry.Registry) { r.Storage().SetFault(fakeregistry.Echo(503)) },
		"storage breaks off": func(r *fakeregistry.Registry) {
			r.Storage().SetFault(fakeregistry.Always(fakeregistry.Fault{Break: true}))
		},
		"storage dead": func(r *fakeregistry.Registry) { r.Storage().Stop() },
	}
}

// TestSecrets runs every command against every fault, with a password and tokens that
// must show nowhere: not in arguments, not in the environment, not in what is printed,
// nor in any file that is left.
func TestSecrets(t *testing.T) {
	t.Parallel()
	require.Has(t, "root", "fuse")
	for name, fault := range secretFaults() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, err := fakeregistry.New(fakeregistry.Options{
				Auth: fakeregistry.Bearer, Username: "robot", Password: canary, SignedURLs: time.Minute,
			})
			must(t, err)
			t.Cleanup(func() { r.Close() })
			layer := ocipush.Bytes(registry.MediaTypeErofs, corpus.Get(t, "plain").Data)
			_, err = ocipush.Push(t.Context(), r.URL(), "x:v1", []ocipush.Layer{layer}, ocipush.Options{Authorization: "Bearer " + r.IssueToken()})
			must(t, err)
			fault(r)
			l := &leak{t, r}
			ctx, cancel := context.WithCancel(t.Context())
			var watch sync.WaitGroup
			watch.Go(func() {
				if l.processes(ctx) == 0 {
					t.Error("no process of ours was seen")
				}
			})
			for _, command := range secretCommands() {
				l.run(command, r.Addr()+"/x:v1")
			}
			cancel()
			watch.Wait()
		})
	}
}

// run runs a command in an environment of its own, with the credentials on its
// standard input.
func (l *leak) run(command []string, ref string) {
	l.t.Helper()
	s := newSession(l.t)
	dir := s.target()
	args := slices.Concat(command[:1], []string{"--creds-stdin", "--on-error=wait:300ms"}, command[1:])
	for i, a := range args {
		args[i] = strings.NewReplacer("REF", ref, "DIR", dir).Replace(a)
	}
	ctx, cancel := context.WithTimeout(l.t.Context(), time.Minute)
	defer cancel()
	cmd := s.command(ctx, binary, args...)
	cmd.Stdin = strings.NewReader("robot:" + canary + "\n")
	said, err := cmd.CombinedOutput()
	what := fmt.Sprintf("the output of %v", command)
	l.in(what, said)
	if err != nil && len(said) == 0 {
		l.t.Errorf("%v failed without a word: %v", command, err)
	}
	if mounted(l.t, dir) {
		_, _ = os.ReadDir(dir) // what becomes of it is not the question
		l.in("list --json", []byte(s.must("list", "--json")))
		l.below(s.dir)
		s.must("umount", dir)
	}
	l.below(s.dir)
}
