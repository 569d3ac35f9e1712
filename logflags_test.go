package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/backend/serverlog"
	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

// TestLogOptions: what is given is stronger than what is recorded, and both than what is usual.
func TestLogOptions(t *testing.T) {
	for _, c := range []struct {
		given, recorded logOptions
		json            bool
		level           slog.Level
		err             string
	}{
		{level: slog.LevelWarn},
		{recorded: logOptions{"json", "debug"}, json: true, level: slog.LevelDebug},
		{given: logOptions{"text", ""}, recorded: logOptions{"json", "debug"}, level: slog.LevelDebug},
		{given: logOptions{"", "info"}, recorded: logOptions{"json", "error"}, json: true, level: slog.LevelInfo},
		{given: logOptions{"", "loud"}, err: `--log-level "loud" is not known; there are debug, info, warn and error`},
		{given: logOptions{"xml", ""}, err: `--log-format "xml" is not known; there are text and json`},
	} {
		// As a record keeps it.
		var access, again backend.Access
		c.recorded.note(&access)
		b, err := json.Marshal(access)
		must(t, err)
		must(t, json.Unmarshal(b, &again))
		if recordedLog(again) != c.recorded {
			t.Errorf("%+v is recorded as %s", c.recorded, b)
		}
		got, err := c.given.or(recordedLog(again)).parse()
		switch {
		case c.err != "":
			if err == nil || err.Error() != c.err || exitCode(err) != exitUsage {
				t.Errorf("%+v: %v", c, err)
			}
		case err != nil || got.JSON != c.json || got.Level != c.level:
			t.Errorf("%+v: %+v, %v", c, got, err)
		}
	}
	if got := (logOptions{"json", "info"}).flags(); !slices.Equal(got, []string{"--log-format=json", "--log-level=info"}) {
		t.Errorf("flags %q", got)
	}
	if got := (logOptions{}).flags(); len(got) != 0 {
		t.Errorf("flags %q where nothing was said", got)
	}
}

// TestFuseLogLevel: the levels of erofsfuse.
func TestFuseLogLevel(t *testing.T) {
	for in, want := range map[string]string{"": "", "--dbglevel=0": "error", "--dbglevel=2": "warn", "--dbglevel=3": "info", "--dbglevel=9": "debug", "-d": "debug", "-odebug": ""} {
		args := append(strings.Fields(in), "i.erofs", "/mnt")
		c, err := parseFuseCall(args)
		if err != nil || c.level != want {
			t.Errorf("%q: level %q, %v", args, c.level, err)
		}
	}
}

// A book is a log in parts.
type book struct {
	mu    sync.Mutex
	lines []string
}

func (b *book) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lines = append(b.lines, string(p))
	return len(p), nil
}

// TestLogOfWrongBytes: wrong bytes that are mended are one line; those that stay wrong are the reader's error, and no more
// lines than tries to mend them; those that nothing vouched for are one line that says that the blob is no good any more.
func TestLogOfWrongBytes(t *testing.T) {
	const (
		again  = `level=WARN msg="bytes of a blob are wrong; they are fetched again" repository=\S+/x blob=%s offset=\d+ bytes=\d+ err=".+"`
		poison = `level=ERROR msg="the bytes of a blob are wrong; every read fails from now on" blob=%s err=".+"`
	)
	for _, c := range []struct {
		name   string
		kind   verifiable.Options
		always bool
		want   string
		most   int
	}{
		{"chunk index, once", verifiable.Options{Chunk: testChunk}, false, again, 1},
		{"dm-verity, once", verifiable.Options{Verity: true}, false, again, 1},
		{"chunk index, always", verifiable.Options{Chunk: testChunk}, true, again, 10},
		{"nothing", verifiable.Options{}, true, poison, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := verifiable.Make(t, imageBytes(imageSize), c.kind)
			p := push(t, b, false)
			p.registry.SetFault(flips(b, 1_000_000, c.always).OnBlobs())
			var said book
			log := serverlog.New(&said, serverlog.Options{})
			r, err := p.openIn(t, t.TempDir(), verifyAuto, registry.Options{Logger: log.Logger})
			must(t, err)
			failed := 0
			for off := int64(0); off < r.Size(); off += 50_000 {
				if r.ReadAt(t.Context(), make([]byte, min(50_000, r.Size()-off)), off) != nil {
					failed++
				}
			}
			if c.want == poison {
				<-r.told
			} else if failed > 0 != c.always {
				t.Errorf("%d reads failed", failed)
			}
			if err := r.Close(); err != nil && !errors.As(err, new(*wrongError)) {
				t.Error(err)
			}
			want := regexp.MustCompile(fmt.Sprintf(c.want, r.digest))
			said.mu.Lock()
			defer said.mu.Unlock()
			if len(said.lines) == 0 || len(said.lines) > c.most {
				t.Errorf("%d lines, want 1 to %d", len(said.lines), c.most)
			}
			for _, l := range said.lines {
				if !want.MatchString(l) {
					t.Errorf("%q is not %s", l, want)
				}
			}
		})
	}
}
