package e2e

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// jsonLines parses a log in JSON, of which each line is an object with time, level and msg.
func jsonLines(t *testing.T, log string) []map[string]any {
	t.Helper()
	var all []map[string]any
	for l := range strings.Lines(log) {
		line := make(map[string]any)
		if err := json.Unmarshal([]byte(l), &line); err != nil {
			t.Fatalf("a line that is not JSON: %v: %q", err, l)
		}
		at, _ := line["time"].(string)
		if _, err := time.Parse(time.RFC3339Nano, at); err != nil || line["level"] == nil || line["msg"] == nil {
			t.Errorf("time, level or msg of %q: %v", l, err)
		}
		all = append(all, line)
	}
	return all
}

// ofMessage are the lines whose message begins so.
func ofMessage(lines []map[string]any, begin string) (some []map[string]any) {
	for _, l := range lines {
		if m, _ := l["msg"].(string); strings.HasPrefix(m, begin) {
			some = append(some, l)
		}
	}
	return some
}

// TestLogOfDeadRegistry: forty readers of a registry that dies get EIO, and the log is a handful of lines: that it is
// gone, what failed, and that it is back. It is in JSON from the first line on.
func TestLogOfDeadRegistry(t *testing.T) {
	t.Parallel()
	im, s, dir, f := servedAndOpen(t, "--log-format=json", "--log-level=info", "--on-error=wait:2s")
	shows(t, f, 0, "before")
	im.Stop()
	var readers sync.WaitGroup
	for i := range 40 {
		readers.Go(func() {
			if _, err := f.ReadAt(make([]byte, 4096), bigSize/2+int64(i)*chunk); !errors.Is(err, syscall.EIO) {
				t.Errorf("reader %d: %v", i, err)
			}
		})
	}
	readers.Wait()
	must(t, im.Start())
	shows(t, f, bigSize/2, "after")

	log := s.serverLog(dir)
	lines := jsonLines(t, log)
	if len(lines) > 15 {
		t.Errorf("%d lines: %s", len(lines), log)
	}
	if first := lines[0]; first["msg"] != "mounted" || first["level"] != "INFO" || first["dir"] != dir || first["reference"] != im.ref || first["backend"] != "fuse" {
		t.Errorf("the first line is %v", first)
	}
	gone, back := ofMessage(lines, "a host is in trouble"), ofMessage(lines, "the host answers again")
	if len(gone) != 1 || gone[0]["level"] != "WARN" || gone[0]["host"] != im.Addr() || !strings.Contains(gone[0]["err"].(string), "refused") {
		t.Errorf("of the registry that is gone: %v", gone)
	}
	if len(back) != 1 || back[0]["level"] != "WARN" || back[0]["host"] != im.Addr() {
		t.Errorf("of the registry that is back: %v", back)
	} else if d, err := time.ParseDuration(back[0]["for"].(string)); err != nil || d < time.Second || d > time.Minute {
		t.Errorf("it was gone for %v, %v", back[0]["for"], err)
	}
	failed := ofMessage(lines, "request failed")
	if len(failed) == 0 || len(failed) > 10 {
		t.Errorf("%d lines of requests that failed", len(failed))
	}
	for _, l := range failed {
		if l["level"] != "ERROR" || l["op"] != "read" || l["nid"] == nil || l["offset"] == nil || l["errno"] != "input/output error" || !strings.Contains(l["err"].(string), "unavailable") {
			t.Errorf("a request that failed: %v", l)
		}
	}
}

// TestLogOfABurst: reads that fail at once are ten lines, and those that are left out are counted at the latest when the
// server ends, a moment later; a failed read of another file is not hidden by them. At level debug all of them are there.
func TestLogOfABurst(t *testing.T) {
	im, s := served(t)
	dir := s.mount(im.ref)
	digest, _ := s.layer(im.ref)
	names := []string{bigFile, "small/0/1000"}
	for _, name := range names {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	s.must("umount", dir)
	im.Stop()
	fails := func(f *os.File, off int64) {
		if _, err := f.ReadAt(make([]byte, 4096), off); !errors.Is(err, syscall.EIO) {
			t.Errorf("%s at %d: %v", f.Name(), off, err)
		}
	}
	const burst = 16
	for _, c := range []struct {
		level string
		lines int // least
		most  int
	}{{"warn", 11, 11}, {"debug", burst + 1, 100}} {
		r := s.serveHere(im.ref, dir, "--offline", "--backend=fuse", "--log-format=json", "--log-level="+c.level)
		for i, name := range names {
			f, err := os.Open(filepath.Join(dir, name))
			must(t, err)
			if i > 0 {
				fails(f, 0)
			} else {
				for i := range int64(burst) {
					fails(f, bigSize/2+i*chunk)
				}
			}
			must(t, f.Close())
		}
		must(t, r.Process.Signal(syscall.SIGINT))
		if err := r.Wait(); err != nil {
			t.Errorf("%v: %s", err, r.stderr.String())
		}
		_, log, _ := strings.Cut(r.stderr.String(), "\n") // what the mount says of itself
		lines := jsonLines(t, log)
		failed := ofMessage(lines, "request failed")
		if len(failed) < c.lines || len(failed) > c.most {
			t.Errorf("level %s: %d requests failed: %s", c.level, len(failed), log)
		}
		for _, l := range failed {
			if said := l["err"].(string); strings.Count(said, digest) != 1 || strings.Contains(said, "fetch 262144 bytes") {
				t.Errorf("level %s: said twice: %s", c.level, said)
			}
		}
		if first, last := failed[0]["nid"], failed[len(failed)-1]["nid"]; first == last {
			t.Errorf("level %s: nothing of the other file: %s", c.level, log)
		}
		switch more := ofMessage(lines, "more lines like this one"); {
		case c.level == "debug" && len(more) == 0:
		case len(more) == 1 && more[0]["like"] == "request failed" && more[0]["left_out"].(float64) >= burst-10:
		default:
			t.Errorf("level %s: of what is left out: %v", c.level, more)
		}
	}
}

// TestLogLevel: the flag is stronger than the environment, a word that is not known is a mistake of the command line,
// and a record keeps both for another server.
func TestLogLevel(t *testing.T) {
	im, s := served(t)
	s.env = append(s.env, "EROFS_OCI_LOG_FORMAT=json", "EROFS_OCI_LOG_LEVEL=error")
	quiet := s.mount(im.ref)
	loud := s.mount(im.ref, "--log-level=info", "--log-format=text")
	if log := s.serverLog(quiet); log != "" {
		t.Errorf("at level error: %q", log)
	}
	if log := s.serverLog(loud); !strings.Contains(log, "level=INFO msg=mounted dir="+loud) || strings.Count(log, "\n") != 1 {
		t.Errorf("at level info: %q", log)
	}
	for dir, want := range map[string][2]string{quiet: {"json", "error"}, loud: {"text", "info"}} {
		if got := recordedAccess(t, s, dir); got != want {
			t.Errorf("%s: recorded %q, want %q", dir, got, want)
		}
	}
	for _, flag := range []string{"--log-level=loud", "--log-format=xml"} {
		for _, args := range [][]string{{"mount", flag, im.ref, s.target()}, {"ls", flag, im.ref}, {"serve", flag, im.ref}, {"reattach", flag, "/nowhere"}, {"push", flag, "a", "b"}, {"cache", "du", flag}} {
			r := s.run(binary, args...)
			if name, _, _ := strings.Cut(flag, "="); r.code != 2 || !strings.Contains(r.stderr, name) || strings.Count(r.stderr, "\n") != 1 {
				t.Errorf("%q: %+v", args, r)
			}
		}
	}
}

// recordedAccess is what the record of a mount says of the log.
func recordedAccess(t *testing.T, s *session, dir string) [2]string {
	t.Helper()
	b, err := os.ReadFile(strings.TrimSuffix(s.entry(dir).Log, ".log") + ".json")
	must(t, err)
	var rec struct {
		Access struct {
			Format string `json:"log_format"`
			Level  string `json:"log_level"`
		}
	}
	must(t, json.Unmarshal(b, &rec))
	return [2]string{rec.Access.Format, rec.Access.Level}
}

// TestLogOfTheEnd: what the server of a mount in the background ends with is a line of its log, in its format.
func TestLogOfTheEnd(t *testing.T) {
	im, s := served(t)
	dir := s.mount(im.ref, "--log-format=json", "--log-level=info")
	log, server := s.entry(dir).Log, s.pidfd(dir)
	// The connection is aborted: the mount is dead, and its server says so.
	abort(t, dir)
	awaitEnd(t, server)
	b, err := os.ReadFile(log)
	must(t, err)
	lines := jsonLines(t, string(b))
	last := lines[len(lines)-1]
	if said, _ := last["err"].(string); last["level"] != "ERROR" || last["msg"] != "the server has ended" || !strings.Contains(said, filepath.Base(dir)+" is still mounted") {
		t.Errorf("the last line is %v", last)
	}
	s.must("umount", dir)
}
