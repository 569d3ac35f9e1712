package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Bounds of a probe, for each place: a greeting, so many answers of one byte, and one
// of so many bytes that is left when its time is over. Besides, there are what a
// registry adds by itself: redirects, and requests for a token.
const (
	ProbeAnswers = 5
	ProbeBytes   = 8 << 20
	probeTime    = 10 * time.Second
)

// A Probe is what one place was seen to do with a blob, by single tries: nothing is
// asked for twice, so that what is wrong shows. What Err kept from being seen is zero.
type Probe struct {
	Host   string // of the registry or mirror
	Mirror bool
	Err    error

	Auth  string // "none", "basic", "bearer"
	Realm string // the host that gives bearer tokens
	Proto string // HTTP/1.1 or HTTP/2.0, of the registry

	Ranges  bool   // a range is answered with that range; else the whole blob comes
	Storage string // the host that a GET of a blob is redirected to; "" for none
	Signed  bool   // there is a query in the address of that, which makes it expire

	Latency    time.Duration // from a request to its first byte, on a connection that is open: the median
	Bytes      int64         // that were read at a stretch, by one request
	Throughput float64       // bytes a second of these, after the first
}

// Probe looks at what the places of a repository, the mirrors that the host's
// configuration names and the registry itself, do when the blob of desc is read. The
// error is that there is nothing to look at; what is wrong with a place is its Err.
func (c *Client) Probe(ctx context.Context, ref Reference, desc ocispec.Descriptor) ([]Probe, error) {
	if desc.Size == 0 {
		return nil, fmt.Errorf("probe %s: blob %s has no bytes", ref.Host, desc.Digest)
	}
	b, err := c.Blob(ref, desc)
	if err != nil {
		return nil, err
	}
	var probes []Probe
	for _, p := range b.source.places {
		probe := Probe{Host: p.ref.Host, Mirror: p.mirror}
		probe.Err = probe.look(ctx, b, p)
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		probes = append(probes, probe)
	}
	return probes, nil
}

func (r *Probe) look(ctx context.Context, b *Blob, p *place) error {
	asked, err := r.greet(ctx, p)
	if err != nil {
		return err
	}
	if err := r.time(ctx, b, p); err != nil {
		return err
	}
	// What the greeting did not ask for, the blob may have asked for.
	p.auth.mu.Lock()
	if asked == (challenge{}) {
		asked = p.auth.current
	}
	p.auth.mu.Unlock()
	r.Auth = "none"
	if asked.scheme != "" {
		r.Auth = asked.scheme
	}
	if realm, err := url.Parse(asked.realm); err == nil {
		r.Realm = realm.Host
	}
	if storage := b.storage[p.index].Load(); storage != nil {
		r.Storage, r.Signed = storage.Host, storage.RawQuery != ""
	}
	return r.measure(ctx, b, p)
}

// greet asks for nothing, without credentials: the answer tells what is spoken, and
// what the registry wants.
func (r *Probe) greet(ctx context.Context, p *place) (challenge, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, probeTime, &wireError{errOutOfTime})
	defer cancel()
	origin, err := p.client.origin(ctx, p.ref.apiHost(), p.access.insecure)
	if err != nil {
		return challenge{}, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, origin.JoinPath("v2/").String(), nil)
	if err != nil {
		return challenge{}, err
	}
	resp, err := p.client.wire.RoundTrip(req)
	if err != nil {
		return challenge{}, err
	}
	discard(resp)
	r.Proto = resp.Proto
	asked, _ := pickChallenge(resp.Header.Values("WWW-Authenticate"))
	return asked, nil
}

// time asks for single bytes, from all over the blob. The first answer opens a
// connection and does not count.
func (r *Probe) time(ctx context.Context, b *Blob, p *place) error {
	size := b.desc.Size
	var took []time.Duration
	for i := range int64(ProbeAnswers) {
		off := size - 1 - i*(size/ProbeAnswers)
		begin := time.Now()
		whole, err := firstByte(ctx, b, p, off)
		if err != nil {
			return err
		}
		took = append(took, time.Since(begin))
		r.Ranges = !whole || size == 1
		if !r.Ranges {
			break // each answer is the whole blob, and costs a connection
		}
	}
	if len(took) > 1 {
		took = took[1:]
	}
	slices.Sort(took)
	r.Latency = took[len(took)/2]
	return nil
}

// firstByte reads one byte of an answer.
func firstByte(ctx context.Context, b *Blob, p *place, off int64) (whole bool, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, probeTime, &wireError{errOutOfTime})
	defer cancel()
	a, err := b.ask(ctx, p, off, off+1)
	if err != nil {
		return false, err
	}
	defer a.resp.Body.Close()
	if _, err := io.ReadFull(a.resp.Body, make([]byte, 1)); err != nil {
		return false, shortBody(err)
	}
	if !a.whole {
		err = atEnd(a.resp.Body)
	}
	return a.whole, err
}

// measure reads the first bytes of the blob at a stretch. One that is too slow for
// that has said enough when its time is over.
func (r *Probe) measure(ctx context.Context, b *Blob, p *place) error {
	timed, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	end := min(b.desc.Size, ProbeBytes)
	a, err := b.ask(timed, p, 0, end)
	if err != nil {
		return err
	}
	defer a.resp.Body.Close()
	if _, err := io.ReadFull(a.resp.Body, make([]byte, 1)); err != nil {
		return shortBody(err)
	}
	begin := time.Now()
	n, err := io.Copy(io.Discard, io.LimitReader(a.resp.Body, end-1))
	if err != nil && !errors.Is(timed.Err(), context.DeadlineExceeded) {
		return err
	}
	r.Bytes = n + 1
	if took := time.Since(begin); took > 0 && n > 0 {
		r.Throughput = float64(n) / took.Seconds()
	}
	return nil
}
