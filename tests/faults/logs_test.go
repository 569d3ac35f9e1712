package faults

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/erofs-oci/erofs-oci/backend/serverlog"
	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
)

// A said line is one of a log in JSON. rest are the attributes.
type said struct {
	level, message string
	rest           map[string]any
}

// says parses a log, of which each line has to be an object with time, level and msg.
func says(t *testing.T, log string) []said {
	t.Helper()
	var all []said
	for l := range strings.Lines(log) {
		rest := make(map[string]any)
		if err := json.Unmarshal([]byte(l), &rest); err != nil {
			t.Fatalf("%v: %q", err, l)
		}
		at, _ := rest["time"].(string)
		if _, err := time.Parse(time.RFC3339Nano, at); err != nil {
			t.Errorf("time of %q: %v", l, err)
		}
		level, _ := rest["level"].(string)
		message, _ := rest["msg"].(string)
		for _, name := range []string{"time", "level", "msg"} {
			delete(rest, name)
		}
		all = append(all, said{level, message, rest})
	}
	return all
}

// A logRow is a fault, and all that the log at level info has to say of it.
type logRow struct {
	name     string
	registry fakeregistry.Options
	login    bool // the credentials are in a file
	onMirror bool
	plan     fakeregistry.Plan
	// at happens between the first read and the others; during, while those wait.
	at, during func(b *bed, log *watched)
	fails      bool // the reads
	readers    int  // 1, if zero
	places     []span
	want       []wanted
}

// A wanted line is a level, a message, and the names of its attributes in order. times is
// how often it may come; 0 is once.
type wanted struct {
	level, message, names string
	times                 int
}

var (
	inTrouble = "a host is in trouble; it is asked again, and readers wait"
	answers   = "the host answers again"
	moment    = "a host was in trouble for a moment"
	broken    = "blob read interrupted; it goes on where it was"
	ranges    = "the server ignores ranges; it sends the blob from its first byte on"
	left      = "mirror left; others are asked first, and it once a minute"
	refused   = "a token was refused before its time; another one is used"
	changed   = "the credentials have changed; the new ones are used"
)

func logTable() []logRow {
	far := []span{{20 * chunk, 100}, {40 * chunk, 100}}
	return []logRow{
		{name: "none"},
		{name: "dead for a while, 40 readers", readers: 40, places: []span{{blobSize / 2, 5 * chunk}, {blobSize - 10, 10}},
			at: func(b *bed, _ *watched) { b.registry.Stop() },
			during: func(b *bed, log *watched) {
				log.await(b.t, inTrouble)
				b.start()
			},
			want: []wanted{{level: "WARN", message: inTrouble, names: "err for host"}, {level: "WARN", message: answers, names: "for host"}}},
		{name: "503 once", plan: first(1, status(503))(nil).OnBlobs(),
			want: []wanted{{level: "INFO", message: moment, names: "err host"}}},
		{name: "429 and Retry-After", plan: first(1, status(429, "Retry-After", "1"))(nil).OnBlobs(),
			want: []wanted{{level: "WARN", message: inTrouble, names: "err for host retry_after"}, {level: "WARN", message: answers, names: "for host"}}},
		{name: "404: it is the reader's error", plan: always(status(404))(nil), fails: true},
		{name: "credentials refused: the reader's, too", registry: basic, plan: always(status(401, "WWW-Authenticate", `Basic realm="x"`))(nil), fails: true},
		{name: "another range: the reader's, too", plan: fakeregistry.OtherRange(1, 1).OnBlobs(), fails: true},
		{name: "200 for a range", plan: fakeregistry.NoRanges().OnBlobs(), readers: 20, places: far,
			want: []wanted{{level: "WARN", message: ranges, names: "blob bytes repository"}}},
		{name: "bodies break", plan: first(2, fakeregistry.Fault{After: 10_000, Break: true})(nil), places: far,
			want: []wanted{{level: "INFO", message: broken, names: "blob err offset repository try", times: 2}}},
		{name: "mirror dead", onMirror: true, plan: always(fakeregistry.Fault{After: -1, Break: true})(nil), places: far,
			want: []wanted{{level: "WARN", message: left, names: "err mirror"}}},
		{name: "mirror left and taken again", onMirror: true, plan: first(1, status(404))(nil), places: far[:1],
			at:   func(b *bed, _ *watched) { b.registry.Stop() },
			want: []wanted{{level: "WARN", message: left, names: "err mirror"}, {level: "INFO", message: "the mirror answers again", names: "for mirror"}}},
		{name: "tokens expire", registry: shortTokens(time.Second, 0), at: func(*bed, *watched) { time.Sleep(time.Second) }, places: far},
		{name: "tokens revoked", registry: tokens, at: func(b *bed, _ *watched) { b.registry.RevokeTokens() }, readers: 10, places: far,
			want: []wanted{{level: "INFO", message: refused, names: "repository"}}},
		{name: "the password changes", registry: tokens, login: true, at: func(b *bed, _ *watched) {
			writeLogin(b.t, b.login(), b.registry.Addr(), password+"2")
			b.registry.SetCredentials(user, password+"2")
			b.registry.RevokeTokens()
		}, places: far, want: []wanted{{level: "INFO", message: changed, names: "repository source"}, {level: "INFO", message: refused, names: "repository"}}},
	}
}

func (b *bed) login() string { return filepath.Join(b.dir, "auth.json") }

// TestLog: each fault has its lines, and no others, however many readers meet with it.
func TestLog(t *testing.T) {
	aloneHere(t)
	for _, r := range logTable() {
		t.Run(r.name, func(t *testing.T) { r.prove(t) })
	}
}

func (r logRow) prove(t *testing.T) {
	var out watched
	out.more = sync.NewCond(&out.mu)
	log := serverlog.New(&out, serverlog.Options{JSON: true})
	b := &bed{t: t, row: row{name: r.name}, registry: newRegistry(t, r.registry), log: &record{}, dir: t.TempDir()}
	if r.onMirror {
		b.mirror = newRegistry(t, fakeregistry.Options{})
	}
	o := registry.Options{PlainHTTP: true, Logger: log.Logger, ErrorWait: patience, NoProgress: patience / 2, RegistriesConf: b.registriesConf()}
	switch {
	case r.login:
		writeLogin(t, b.login(), b.registry.Addr(), password)
		o.AuthFile = b.login()
	case r.registry.Username != "":
		o.Username, o.Password = user, password
	}
	b.open(o, digest.FromBytes(blob), blobSize)
	b.struck().SetFault(r.plan)
	r.read(b, span{0, 100})
	if r.at != nil {
		r.at(b, &out)
	}
	var readers sync.WaitGroup
	for range max(r.readers, 1) {
		readers.Go(func() {
			for _, at := range r.places {
				r.read(b, at)
			}
		})
	}
	if r.during != nil {
		r.during(b, &out)
	}
	readers.Wait()
	b.registry.SetFault(nil)
	if b.leaks(out.text()) {
		t.Error("a secret is in the log")
	}
	r.compare(t, says(t, out.text()))
}

func (r logRow) read(b *bed, at span) {
	p := make([]byte, at.n)
	err := b.cached.ReadAt(b.t.Context(), p, at.off)
	switch {
	case r.fails && err == nil:
		b.t.Error("read, in spite of the fault")
	case !r.fails && (err != nil || !bytes.Equal(p, blob[at.off:at.off+at.n])):
		b.t.Errorf("%+v: not read as it should be: %v", at, err)
	}
}

// compare holds a log to the row: these lines in this order, and no others.
func (r logRow) compare(t *testing.T, got []said) {
	t.Helper()
	var lines, want []string
	for _, l := range got {
		lines = append(lines, fmt.Sprintf("%s %s: %s", l.level, l.message, strings.Join(slices.Sorted(maps.Keys(l.rest)), " ")))
	}
	for _, w := range r.want {
		for range max(w.times, 1) {
			want = append(want, fmt.Sprintf("%s %s: %s", w.level, w.message, w.names))
		}
	}
	if !slices.Equal(lines, want) {
		t.Errorf("the log says\n%s\nwant\n%s\nin full: %v", strings.Join(lines, "\n"), strings.Join(want, "\n"), got)
	}
}

// watched is a log that can be waited for.
type watched struct {
	mu   sync.Mutex
	more *sync.Cond
	buf  bytes.Buffer
}

func (w *watched) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	defer w.more.Broadcast()
	return w.buf.Write(p)
}

func (w *watched) text() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.buf.String()
}

// await returns when the log has this text, or after half of what readers wait.
func (w *watched) await(t *testing.T, text string) {
	late := false
	stop := time.AfterFunc(patience/2, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		late = true
		w.more.Broadcast()
	})
	defer stop.Stop()
	w.mu.Lock()
	defer w.mu.Unlock()
	for !late && !strings.Contains(w.buf.String(), text) {
		w.more.Wait()
	}
	if late {
		t.Errorf("the log does not say %q: %s", text, w.buf.String())
	}
}
