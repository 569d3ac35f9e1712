package faults

import (
	"encoding/json"
	"net/http"
	"time"

	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
)

// A verdict is what must become of every read.
type verdict int

const (
	succeed verdict = iota // the blob's bytes
	fail                   // an error, within the deadline; and the blob's bytes once the fault is over
	unseen                 // the server's bytes: nothing here can tell them from the blob's
)

// A kind is what an error is found to be by errors.As.
type kind int

const (
	refusal     kind = iota // *registry.StatusError, without waiting
	unavailable             // *registry.UnavailableError, when patience ended
	lie                     // neither: an answer that is not used, without waiting
)

// A row is a fault and what it must lead to.
type row struct {
	name     string
	registry fakeregistry.Options
	// plan is made for each way to read, since it counts.
	plan func(b *bed) fakeregistry.Plan
	// at is what happens when each reader has read one place.
	at func(b *bed)
	// onMirror has the fault strike at a mirror; the registry has none.
	onMirror bool
	// slow has connections given up soon that are silent.
	slow bool

	verdict verdict
	err     kind   // of fail
	says    string // what error and log say of fail
	// again is why bytes come twice; "": none does. times bounds how often the blob
	// comes, all in all.
	again string
	times float64
}

const (
	brokenOff  = "what a broken connection had in it is lost"
	wholeAgain = "a server without ranges sends all of the blob to each that asks before the first one's answer is known"
	mirrorToo  = "what the mirror sent before it was left is not believed"
)

const (
	user     = "robot"
	password = "canary-Pa55w0rd!"
)

var (
	basic  = fakeregistry.Options{Auth: fakeregistry.Basic, Username: user, Password: password}
	tokens = fakeregistry.Options{Auth: fakeregistry.Bearer, Username: user, Password: password}
)

// always is a fault of each GET of a blob.
func always(f fakeregistry.Fault) func(*bed) fakeregistry.Plan {
	return func(*bed) fakeregistry.Plan { return fakeregistry.Always(f).OnBlobs() }
}

// every is a fault of each kth GET of a blob.
func every(k int64, f fakeregistry.Fault) func(*bed) fakeregistry.Plan {
	return func(*bed) fakeregistry.Plan { return fakeregistry.Always(f).Every(k).OnBlobs() }
}

// first is a fault of the first n GETs of a blob.
func first(n int64, f fakeregistry.Fault) func(*bed) fakeregistry.Plan {
	return func(*bed) fakeregistry.Plan { return fakeregistry.Always(f).First(n).OnBlobs() }
}

// plan is one that needs nothing of the bed.
func plan(p func() fakeregistry.Plan) func(*bed) fakeregistry.Plan {
	return func(*bed) fakeregistry.Plan { return p().OnBlobs() }
}

// passes has time pass: the life of a token or of a URL.
func passes(d time.Duration) func(*bed) {
	return func(*bed) { time.Sleep(d) }
}

func status(code int, header ...string) fakeregistry.Fault {
	f := fakeregistry.Fault{Status: code, Header: http.Header{}}
	for i := 0; i < len(header); i += 2 {
		f.Header.Set(header[i], header[i+1])
	}
	return f
}

// expired is how Amazon's registry says 401.
var expired = fakeregistry.Fault{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
	w.WriteHeader(http.StatusForbidden)
	_ = json.NewEncoder(w).Encode(map[string]any{"errors": []map[string]string{
		{"code": "DENIED", "message": "Your authorization token has expired. Reauthenticate and try again."}}})
})}

// otherSize says that the blob is a byte longer than the manifest does.
var otherSize = fakeregistry.Fault{Rewrite: func(status int, h http.Header, body []byte) (int, []byte) {
	h.Set("Content-Range", h.Get("Content-Range")+"0")
	return status, body
}}

func signedFor(life time.Duration) fakeregistry.Options {
	o := tokens
	o.SignedURLs = life
	return o
}

func shortTokens(life, claim time.Duration) fakeregistry.Options {
	o := tokens
	o.TokenLife, o.TokenClaim = life, claim
	return o
}

// never is a channel that stays open.
func never() <-chan struct{} { return make(chan struct{}) }

// table is every fault that a registry is known for.
func table() []row {
	all := slowTable()
	for _, list := range [][]row{authTable(), rangeTable(), statusTable(), wireTable(), mirrorTable()} {
		all = append(all, list...)
	}
	return all
}

func authTable() []row {
	return []row{
		{name: "none"},
		{name: "Basic", registry: basic},
		{name: "HTTP/2 and tokens", registry: func() fakeregistry.Options { o := tokens; o.TLS = true; return o }()},
		{name: "tokens expire", registry: shortTokens(time.Second, 0), at: passes(time.Second)},
		{name: "tokens live shorter than is said", registry: shortTokens(time.Second, time.Hour), at: passes(time.Second)},
		{name: "tokens revoked", registry: tokens, at: func(b *bed) { b.registry.RevokeTokens() }},
		{name: "403 that says expired", registry: tokens, plan: plan(func() fakeregistry.Plan {
			return fakeregistry.Always(expired).First(1).Authorized() // what it says to strangers is 401
		})},
		{name: "403 that says expired to Basic", registry: basic, plan: always(expired),
			// There are no other credentials to answer it with.
			verdict: fail, err: refusal, says: ": 403 "},
		{name: "token service down for a while", registry: tokens, at: func(b *bed) { b.registry.RevokeTokens() }, plan: func(*bed) fakeregistry.Plan {
			return fakeregistry.Always(status(503)).Every(2).OnTokens()
		}},
		{name: "credentials refused", registry: basic, plan: always(status(401, "WWW-Authenticate", `Basic realm="x"`)),
			verdict: fail, err: refusal, says: "were refused"},
		{name: "echo", registry: tokens, plan: plan(func() fakeregistry.Plan { return fakeregistry.Echo(404).Authorized() }),
			verdict: fail, err: refusal, says: ": 404 "},
		{name: "storage echoes", registry: signedFor(time.Minute), at: func(b *bed) {
			b.registry.Storage().SetFault(fakeregistry.Echo(500).Every(2))
		}},
		{name: "signed URLs", registry: signedFor(time.Minute)},
		{name: "signed URLs expire", registry: signedFor(time.Second), at: passes(time.Second)},
		{name: "signed URLs revoked", registry: signedFor(time.Minute), at: func(b *bed) { b.registry.RevokeURLs() }},
		{name: "storage refuses each third", registry: signedFor(time.Minute), at: func(b *bed) {
			b.registry.Storage().SetFault(fakeregistry.Always(status(503)).Every(3))
		}},
		{name: "storage gone", registry: signedFor(time.Minute), plan: func(b *bed) fakeregistry.Plan {
			b.registry.Storage().Stop()
			return nil
		}, verdict: fail, err: unavailable, says: "connection refused"},
	}
}

func rangeTable() []row {
	return []row{
		{name: "200 for a range", plan: plan(fakeregistry.NoRanges), again: wholeAgain, times: 20},
		{name: "416", plan: always(status(416)), verdict: fail, err: refusal, says: ": 416 "},
		{name: "400", plan: always(status(400)), verdict: fail, err: refusal, says: ": 400 "},
		{name: "range too short", plan: plan(func() fakeregistry.Plan { return fakeregistry.OtherRange(0, -1) }),
			verdict: fail, err: lie, says: "was given"},
		{name: "range too long", plan: plan(func() fakeregistry.Plan { return fakeregistry.OtherRange(-1, 1) }),
			verdict: fail, err: lie, says: "was given"},
		{name: "range of another place", plan: plan(func() fakeregistry.Plan { return fakeregistry.OtherRange(1, 1) }),
			verdict: fail, err: lie, says: "was given"},
		{name: "body too short", plan: always(fakeregistry.ShortBody(1)), verdict: fail, err: lie, says: "Content-Length is"},
		{name: "body too long", plan: always(fakeregistry.LongBody(1)), verdict: fail, err: lie, says: "Content-Length is"},
		{name: "blob of another size", plan: always(otherSize), verdict: fail, err: lie, says: "was given"},
		{name: "gzip", plan: always(fakeregistry.Gzip()), verdict: fail, err: lie, says: `Content-Encoding "gzip"`},
		{name: "no Docker-Content-Digest", plan: always(fakeregistry.Without("Docker-Content-Digest"))},
		{name: "a flipped bit", plan: always(fakeregistry.FlipBit(flipped)), verdict: unseen},
	}
}

func statusTable() []row {
	all := []row{
		{name: "429 and Retry-After", plan: first(1, status(429, "Retry-After", "1"))},
		{name: "429 to everything", plan: always(status(429)), verdict: fail, err: unavailable, says: ": 429 "},
		{name: "503 to everything", plan: always(status(503)), verdict: fail, err: unavailable, says: ": 503 "},
		{name: "503 to each third", plan: every(3, status(503))},
		{name: "404", plan: always(status(404)), verdict: fail, err: refusal, says: ": 404 "},
		{name: "410", plan: always(status(410)), verdict: fail, err: refusal, says: ": 410 "},
		{name: "501", plan: always(status(501)), verdict: fail, err: refusal, says: ": 501 "},
	}
	for _, code := range []int{408, 425, 500, 502, 504} {
		all = append(all, row{name: "twice " + http.StatusText(code), plan: first(2, status(code))})
	}
	return all
}

func wireTable() []row {
	dead := func(b *bed) { b.registry.Stop() }
	return []row{
		{name: "breaks before the header", plan: every(3, fakeregistry.Fault{After: -1, Break: true})},
		{name: "breaks in the body", plan: every(2, fakeregistry.Fault{After: 10_000, Break: true}), again: brokenOff, times: 2},
		{name: "each body breaks", plan: always(fakeregistry.Fault{After: 100_000, Break: true}), again: brokenOff, times: 2},
		{name: "each body breaks at once", plan: always(fakeregistry.Fault{After: 0, Break: true}),
			verdict: fail, err: unavailable, says: "EOF"},
		{name: "reset before the header", plan: every(3, fakeregistry.Fault{After: -1, Reset: true})},
		{name: "reset in the body", plan: every(2, fakeregistry.Fault{After: 10_000, Reset: true}), again: brokenOff, times: 2},
		{name: "dead", plan: func(b *bed) fakeregistry.Plan { dead(b); return nil },
			verdict: fail, err: unavailable, says: "connection refused"},
		{name: "dies and comes back", at: func(b *bed) {
			dead(b)
			b.restart.Go(func() {
				time.Sleep(300 * time.Millisecond)
				b.start()
			})
		}, again: brokenOff, times: 2},
	}
}

// slowTable has the rows that wait for silence to be noticed; they begin first.
func slowTable() []row {
	return []row{
		{name: "stalls in the body", slow: true, plan: first(2, fakeregistry.Fault{After: 10_000, Stall: never()}), again: brokenOff, times: 2},
		{name: "stalls before the header", slow: true, plan: first(2, fakeregistry.Fault{After: -1, Stall: never()})},
		{name: "stalls always", slow: true, plan: always(fakeregistry.Fault{After: -1, Stall: never()}),
			verdict: fail, err: unavailable, says: "no byte from"},
		{name: "a long way", at: func(b *bed) {
			b.registry.SetLatency(20 * time.Millisecond)
			b.registry.SetBandwidth(4_000_000)
		}},
	}
}

func mirrorTable() []row {
	all := []row{
		{name: "mirror dead", plan: func(b *bed) fakeregistry.Plan { b.mirror.Stop(); return nil }},
		{name: "mirror 503", plan: always(status(503))},
		{name: "mirror 404", plan: always(status(404))},
		{name: "mirror without the credentials", plan: always(status(401, "WWW-Authenticate", `Basic realm="x"`))},
		{name: "mirror with another range", plan: plan(func() fakeregistry.Plan { return fakeregistry.OtherRange(1, 1) }), again: mirrorToo, times: 2.5},
		{name: "mirror with another size", plan: always(otherSize), again: mirrorToo, times: 2.5},
		{name: "mirror that compresses", plan: always(fakeregistry.Gzip()), again: mirrorToo, times: 2.5},
		{name: "mirror breaks", plan: every(2, fakeregistry.Fault{After: 10_000, Break: true}), again: brokenOff, times: 2},
		{name: "mirror stalls", slow: true, plan: every(2, fakeregistry.Fault{After: 10_000, Stall: never()}), again: brokenOff, times: 2},
	}
	for i := range all {
		all[i].onMirror = true
	}
	return all
}
