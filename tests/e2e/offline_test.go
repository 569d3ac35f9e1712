package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/tests/layered"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/tree"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

// offlineKinds are those of verifiableKinds, and layers that are verified as a whole: after, or before they are read.
func offlineKinds() map[string]verifiable.Options {
	kinds := map[string]verifiable.Options{"nothing": {}, "whole": {Zstd: true}}
	for name, kind := range verifiableKinds() {
		kinds[name] = kind.o
	}
	return kinds
}

// TestOfflineMount: when all of an image was read, by whatever it is verified, it is mounted without its registry.
func TestOfflineMount(t *testing.T) {
	require.Has(t, "root", "fuse", "kernel-erofs")
	for name, o := range offlineKinds() {
		im := serveVouched(t, o)
		for _, backend := range []string{"fuse", "file"} {
			t.Run(name+", "+backend, func(t *testing.T) {
				im.Start()
				s := newSession(t)
				helper := s.tellsOfHelper(t, im.Addr())
				mount := func(flags ...string) string {
					t.Helper()
					dir := s.target()
					r := s.run(binary, append(append([]string{"mount", "--backend=" + backend}, flags...), im.ref, dir)...)
					if said := o.Zstd && o.Chunk == 0; r.code != 0 || (r.stderr != "") != said || strings.Contains(r.stderr, "is here") {
						t.Fatalf("exit code %d, %q", r.code, r.stderr)
					}
					return dir
				}
				dir := mount()
				if lies, failed := readFiles(t, dir); lies+failed > 0 {
					t.Errorf("%d pieces are wrong, %d fail", lies, failed)
				}
				s.must("umount", dir)
				if r := s.run(binary, "check", im.ref); r.code != 0 { // which brings what nobody has asked for
					t.Errorf("check: exit code %d, %q", r.code, r.stderr)
				}
				im.Stop()
				helper.forget()
				dir = mount("--offline")
				if lies, failed := readFiles(t, dir); lies+failed > 0 {
					t.Errorf("offline: %d pieces are wrong, %d fail", lies, failed)
				}
				if st := s.status(dir); st.Wrong != "" || st.By == "none" && name != "nothing" {
					t.Errorf("%+v", st)
				}
				if log := s.serverLog(dir); log != "" {
					t.Errorf("the log says %q", log)
				}
				s.must("umount", dir)
				if helper.called() {
					t.Error("a credential helper was asked")
				}
				s.nothingLeft(dir)
			})
		}
	}
}

// helperTale is a credential helper that leaves a trace.
type helperTale struct {
	t     *testing.T
	trace string
}

// tellsOfHelper has the session's user have a credential helper for the host.
func (s *session) tellsOfHelper(t *testing.T, host string) helperTale {
	t.Helper()
	h := helperTale{t, filepath.Join(s.dir, "helper-was-called")}
	bin := filepath.Join(s.dir, "bin")
	must(t, errors.Join(os.Mkdir(bin, 0o700), os.MkdirAll(filepath.Join(s.dir, "home", ".docker"), 0o700)))
	script := fmt.Sprintf("#!/bin/sh\n: >%s\necho '{\"Username\":\"u\",\"Secret\":\"s\"}'\n", h.trace)
	must(t, os.WriteFile(filepath.Join(bin, "docker-credential-tale"), []byte(script), 0o700))
	config, err := json.Marshal(map[string]any{"credHelpers": map[string]string{host: "tale"}})
	must(t, err)
	must(t, os.WriteFile(filepath.Join(s.dir, "home", ".docker", "config.json"), config, 0o600))
	s.env = append(s.env, "PATH="+bin+":"+os.Getenv("PATH"))
	return h
}

func (h helperTale) called() bool {
	_, err := os.Stat(h.trace)
	return err == nil
}

func (h helperTale) forget() {
	if err := os.Remove(h.trace); err != nil && !os.IsNotExist(err) {
		h.t.Error(err)
	}
}

// TestOfflineCommands: the commands that read an image do so offline, too.
func TestOfflineCommands(t *testing.T) {
	im := serveVouched(t, verifiable.Options{Chunk: 256 << 10, Verity: true})
	s := newSession(t)
	commands := [][]string{
		{"ls", "-l"}, {"stat"}, {"check"}, {"dump"}, {"inspect"}, {"cat"}, {"extract"},
		{"ls", "--platform=linux/amd64"}, // which the configuration says
	}
	args := func(command []string, offline bool) []string {
		all := append([]string{}, command...)
		if offline {
			all = append(all, "--offline")
		}
		all = append(all, im.ref)
		switch command[0] {
		case "stat", "cat":
			all = append(all, "victim")
		case "extract":
			out, err := os.MkdirTemp(s.dir, "extracted-")
			must(t, err)
			all = append([]string{"extract", "--keep=times"}, append(all[1:], out)...)
		}
		return all
	}
	online := map[string]string{}
	for _, c := range commands {
		online[strings.Join(c, " ")] = s.must(args(c, false)...)
	}
	im.Stop()
	im.ResetStats()
	for _, c := range commands {
		if got := s.must(args(c, true)...); got != online[strings.Join(c, " ")] {
			t.Errorf("%q: offline %q, online %q", c, got, online[strings.Join(c, " ")])
		}
		if r := s.run(binary, args(c, false)...); r.code != 1 {
			t.Errorf("%s without --offline: exit code %d, %q", c[0], r.code, r.stderr)
		}
	}
	for _, c := range [][]string{{"inspect", "--offline", "--probe", im.ref}, {"ls", "--offline", binary}} {
		if r := s.run(binary, c...); r.code != 2 || !strings.Contains(r.stderr, "--") {
			t.Errorf("%q: exit code %d, %q", c, r.code, r.stderr)
		}
	}
	r := s.run(binary, "ls", "--offline", im.Addr()+"/never:v1")
	if r.code != 1 || strings.Count(r.stderr, "\n") != 1 || !strings.Contains(r.stderr, im.Addr()+"/never:v1: --offline: this reference was not mounted before") {
		t.Errorf("never mounted: exit code %d, %q", r.code, r.stderr)
	}
	if n := im.Stats().Requests; n != 0 {
		t.Errorf("%d requests", n)
	}
}

// TestOfflineServe: what was copied once by an NBD client can be copied again.
func TestOfflineServe(t *testing.T) {
	require.Has(t, "nbdcopy")
	im := serveVouched(t, verifiable.Options{Verity: true})
	s := newSession(t)
	for i, flags := range [][]string{nil, {"--offline"}} {
		v := s.serve(append(append([]string{"--nbd", "unix:" + filepath.Join(s.dir, fmt.Sprintf("socket%d", i))}, flags...), im.ref)...)
		out := filepath.Join(s.dir, fmt.Sprintf("copied%d", i))
		s.quiet("nbdcopy", v.uri, out)
		if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got[:im.HashOffset], im.Plain[:im.HashOffset]) {
			t.Errorf("%q: %d bytes, %v", flags, len(got), err)
		}
		must(t, v.cmd.Process.Signal(syscall.SIGTERM))
		must(t, v.cmd.Wait())
		im.Stop()
	}
}

// TestOfflineIncomplete: what is missing is said, is EIO at once, and is a line in the log.
func TestOfflineIncomplete(t *testing.T) {
	require.Has(t, "root", "fuse", "kernel-erofs")
	for _, backend := range []string{"fuse", "file"} {
		t.Run(backend, func(t *testing.T) {
			im, s := served(t)
			dir := s.mount(im.ref, "--backend="+backend)
			if got, err := os.ReadFile(filepath.Join(dir, deepFile)); err != nil || len(got) != deepSize {
				t.Fatalf("%d bytes, %v", len(got), err)
			}
			s.must("umount", dir)
			im.Stop()
			dir = s.target()
			r := s.run(binary, "mount", "--offline", "--backend="+backend, im.ref, dir)
			if r.code != 0 || strings.Count(r.stderr, "\n") != 1 || !strings.Contains(r.stderr, "layer 0: ") || !strings.Contains(r.stderr, "% of it is here; reads of the rest fail") {
				t.Fatalf("exit code %d, %q", r.code, r.stderr)
			}
			if got, err := os.ReadFile(filepath.Join(dir, deepFile)); err != nil || string(got) != string(content(deepFile, deepSize)) {
				t.Errorf("what is here: %d bytes, %v", len(got), err)
			}
			began := time.Now()
			f, err := os.Open(filepath.Join(dir, bigFile))
			must(t, err)
			if _, err := f.ReadAt(make([]byte, 4096), bigSize/2); !errors.Is(err, syscall.EIO) {
				t.Errorf("what is not here: %v", err)
			}
			must(t, f.Close())
			if d := time.Since(began); d > 20*time.Second { // --on-error waits for 60
				t.Errorf("it took %v to fail", d)
			}
			if log := s.serverLog(dir); !strings.Contains(log, "--offline forbids to fetch it") {
				t.Errorf("the log says %q", log)
			}
			s.must("umount", dir)
			s.nothingLeft(dir)
		})
	}
}

// TestOfflineLayers: the same of several layers that lie over each other.
func TestOfflineLayers(t *testing.T) {
	require.Has(t, "root", "fuse", "kernel-erofs", "loop", "overlay")
	stack := layered.Cases()["opaque"]
	want := mountSquashed(t, stack)
	for _, backend := range []string{"fuse", "file"} {
		t.Run(backend, func(t *testing.T) {
			r := layeredRegistry(t)
			ref := pushLayers(t, r, "offline", stack)
			s := newSession(t)
			dir := s.mount(ref, "--backend="+backend)
			sameTree(t, want, dir, tree.Ino, tree.DirNlink)
			s.endsWith(dir, "umount", dir)
			r.Stop()
			dir = s.mount(ref, "--backend="+backend, "--offline")
			sameTree(t, want, dir, tree.Ino, tree.DirNlink)
			s.endsWith(dir, "umount", dir)
		})
	}
}
