package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxRestarts is how often an upload begins again from its first byte. A registry
// that loses uploads in the middle would else be sent the same bytes for ever.
const maxRestarts = 4

// An upload brings one blob into a repository. It belongs to one goroutine, and
// goes in rounds:
//
//	unknown ──HEAD──┬─ there: done
//	                └─ POST ?mount=&from= ──┬─ 201: done
//	                   POST ────────────────┴─ 202: open
//	open ──PATCH…──PUT── 201: done
//	broken ──GET── 204 Range: open, from there
//	          └─ anything else: unknown
//
// A round ends with success or with an error, and the next begins where the
// registry stands. Only bytes that the registry says it has are progress.
type upload struct {
	session *session
	desc    ocispec.Descriptor
	opts    PutOptions
	wait    *patience
	parcels parcels
	limit   *time.Timer // ends the round

	asked    bool     // whether the blob is there
	existed  bool     // it is
	mounts   []string // repositories that were not asked yet
	mounted  bool
	at       *url.URL // of the open upload; nil without one
	minChunk int64    // what the registry wants of a PATCH that is not the last
	from     int64    // bytes that the registry has
	best     int64    // the most that it ever had
	broken   bool     // from is not certain
	resumed  bool     // the open upload was broken once
	restarts int
}

// errLost is a registry that knows nothing of an upload any more.
var errLost = errors.New("the registry has lost the upload")

func (u *upload) result() PutResult {
	return PutResult{Existed: u.existed, Mounted: u.mounted, Sent: u.parcels.sent()}
}

func (u *upload) run(ctx context.Context) error {
	u.wait.begin()
	defer u.wait.end()
	for {
		err := u.tryRound(ctx)
		if err == nil {
			return nil
		}
		if err = u.again(ctx, err); err != nil {
			if u.at != nil {
				u.session.cancel(ctx, u.at)
			}
			return err
		}
	}
}

// again says what to do about a round that failed: nil is another one.
func (u *upload) again(ctx context.Context, err error) error {
	if broken := u.parcels.broken(); broken != nil {
		return broken
	}
	lost := errors.Is(err, errLost)
	if lost {
		if u.at != nil {
			u.session.cancel(ctx, u.at)
		}
		u.drop()
		if u.restarts++; u.restarts > maxRestarts {
			return fmt.Errorf("given up after %d beginnings: %w", u.restarts, err)
		}
	}
	level := slog.LevelDebug
	if u.wait.tries == 0 && worthRetrying(err) {
		level = slog.LevelWarn // the first sign of trouble; what follows repeats it
	}
	u.session.client.log.Log(ctx, level, "upload interrupted", "repository", u.session.ref.name(),
		"digest", u.desc.Digest, "offset", u.from, "try", u.wait.tries+1, "err", err)
	u.broken = u.at != nil
	if lost {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		u.session.client.happened(EventRetry)
		return nil // at once
	}
	u.wait.eager = !u.session.reached.Load()
	return u.wait.again(ctx, err)
}

// drop forgets the open upload, if there is one. What it held has to be sent anew.
func (u *upload) drop() {
	u.at, u.from, u.broken, u.resumed, u.asked = nil, 0, false, false, false
}

// tryRound is a round that ends when patience does. Bytes that leave hold that
// moment off, for as long as they do, but give nothing back.
func (u *upload) tryRound(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	u.wait.end() // what was waited for so far stays waited for
	u.wait.begin()
	u.limit = time.AfterFunc(u.wait.watch(), func() { cancel(&wireError{errOutOfTime}) })
	defer u.limit.Stop()
	u.parcels.allow(u.limit, u.wait.watch())
	defer func() { u.wait.heard(u.parcels.stop()) }()
	return u.round(ctx)
}

func (u *upload) round(ctx context.Context) error {
	if u.broken {
		if err := u.resume(ctx); err != nil {
			return err
		}
	}
	if u.at == nil {
		if err := u.open(ctx); err != nil {
			return err
		}
	}
	if u.existed || u.mounted {
		return nil
	}
	return u.sendAll(ctx)
}

// open gets a place to upload to, or finds that there is nothing to be uploaded.
func (u *upload) open(ctx context.Context) (err error) {
	if !u.asked {
		if u.existed, err = u.session.hasBlob(ctx, u.desc); err != nil {
			return err
		}
		u.asked = true
	}
	if u.existed {
		return nil
	}
	for len(u.mounts) > 0 && !u.mounted {
		if err := u.mount(ctx, u.mounts[0]); err != nil {
			return err
		}
		u.mounts = u.mounts[1:]
	}
	if u.at != nil || u.mounted {
		return nil
	}
	resp, err := u.post(ctx, nil)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusAccepted {
		return statusError(resp, u.session.auth.hide)
	}
	return u.opened(ctx, resp)
}

// mount asks for the blob of another repository. A registry that cannot or will
// not do it is no failure: the blob is then sent.
func (u *upload) mount(ctx context.Context, from string) error {
	resp, err := u.post(ctx, url.Values{"mount": {u.desc.Digest.String()}, "from": {from}})
	var refusal *StatusError
	switch {
	case errors.As(err, &refusal) && !refusal.temporary():
		return nil // not allowed to read there, most often
	case err != nil:
		return err
	case resp.StatusCode == http.StatusAccepted:
		return u.opened(ctx, resp)
	case resp.StatusCode != http.StatusCreated:
		if refusal := statusError(resp, u.session.auth.hide); refusal.temporary() {
			return refusal
		}
		return nil
	}
	if err := u.session.stored(resp, u.desc.Digest); err != nil {
		return err
	}
	u.mounted = true
	if u.at != nil {
		u.session.cancel(ctx, u.at)
		u.at = nil
	}
	return nil
}

func (u *upload) post(ctx context.Context, query url.Values) (*http.Response, error) {
	at, err := u.session.url(ctx, "blobs/uploads/", query)
	if err != nil {
		return nil, err
	}
	return u.session.send(ctx, outgoing{method: http.MethodPost, url: at})
}

// opened takes note of an upload that the registry has begun.
func (u *upload) opened(ctx context.Context, resp *http.Response) error {
	discard(resp)
	if resp.Header.Get("Location") == "" {
		return fmt.Errorf("POST %s: the registry began an upload, but its answer has no Location", redact(resp.Request.URL))
	}
	at, err := u.session.location(resp)
	if err != nil {
		return err
	}
	if u.at != nil {
		u.session.cancel(ctx, u.at) // of a mount before this one
	}
	u.at = at
	// A number that cannot be read is no wish that can be heeded.
	u.minChunk, _ = strconv.ParseInt(resp.Header.Get("OCI-Chunk-Min-Length"), 10, 64)
	return nil
}

// sendAll sends what the registry does not have yet, and closes the upload.
func (u *upload) sendAll(ctx context.Context) error {
	chunk := u.opts.ChunkSize
	if chunk > 0 {
		chunk = max(chunk, u.minChunk)
	}
	// What is left of a single PUT goes in one PATCH: that says where it belongs.
	if chunk == 0 && u.from > 0 {
		chunk = u.desc.Size
	}
	if chunk > 0 && (u.from > 0 || u.desc.Size > chunk) {
		for u.from < u.desc.Size {
			if err := u.patch(ctx, min(chunk, u.desc.Size-u.from)); err != nil {
				return err
			}
		}
	}
	return u.put(ctx)
}

// patch sends the next n bytes.
func (u *upload) patch(ctx context.Context, n int64) error {
	end := u.from + n
	resp, err := u.send(ctx, http.MethodPatch, u.at, end, http.Header{"Content-Range": {fmt.Sprintf("%d-%d", u.from, end-1)}})
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusAccepted && !done(resp.StatusCode) {
		return u.refused(resp)
	}
	discard(resp)
	if err := u.moved(resp); err != nil {
		return err
	}
	has := end
	if r := resp.Header.Get("Range"); r != "" && r != fmt.Sprintf("0-%d", end-1) {
		if has, err = uploadRange(r); err != nil || has <= u.from || has > end {
			return fmt.Errorf("%w: it has %q after bytes %d to %d", errLost, clean(r, 60), u.from, end-1)
		}
	}
	u.reached(has)
	return nil
}

// put closes the upload, with what is left of it.
func (u *upload) put(ctx context.Context) error {
	at := *u.at
	// The rest of the query is kept as it is: it may be signed.
	if at.RawQuery != "" {
		at.RawQuery += "&"
	}
	at.RawQuery += "digest=" + url.QueryEscape(u.desc.Digest.String())
	resp, err := u.send(ctx, http.MethodPut, &at, u.desc.Size, nil)
	if err != nil {
		return err
	}
	if !done(resp.StatusCode) {
		return u.refused(resp)
	}
	u.at = nil // it is no longer open, whatever was made of it
	return u.session.stored(resp, u.desc.Digest)
}

// send sends the bytes up to end.
func (u *upload) send(ctx context.Context, method string, at *url.URL, end int64, header http.Header) (*http.Response, error) {
	from := u.from
	h := http.Header{"Content-Type": {octetStream}}
	for name, values := range header {
		h[name] = values
	}
	return u.session.send(ctx, outgoing{
		method: method, url: at, header: h, length: end - from,
		body: func() (io.ReadCloser, error) { return u.parcels.next(from, end), nil },
	})
}

// refused tells an upload that is gone from one that will never do. After a break
// the registry may stand elsewhere than it says, and then refuses what it would
// take of a new upload.
func (u *upload) refused(resp *http.Response) error {
	refusal := statusError(resp, u.session.auth.hide)
	switch refusal.Code {
	case http.StatusNotFound, http.StatusRequestedRangeNotSatisfiable:
		return fmt.Errorf("%w: %w", errLost, refusal)
	case http.StatusBadRequest, http.StatusConflict:
		if u.resumed {
			return fmt.Errorf("%w: %w", errLost, refusal)
		}
	}
	return refusal
}

// moved follows an upload to its next Location, where the answer names one.
func (u *upload) moved(resp *http.Response) error {
	if resp.Header.Get("Location") == "" {
		return nil
	}
	at, err := u.session.location(resp)
	if err == nil {
		u.at = at
	}
	return err
}

// reached takes note of what the registry has.
func (u *upload) reached(n int64) {
	u.from = n
	if n > u.best {
		u.best = n
		u.wait.progress()
		u.parcels.allow(u.limit, u.wait.watch())
	}
}

// resume asks the registry how far a broken upload has got. Where it does not say,
// the upload begins anew, unless the blob is there: the break may have swallowed
// nothing but the last answer.
func (u *upload) resume(ctx context.Context) error {
	resp, err := u.session.send(ctx, outgoing{method: http.MethodGet, url: u.at})
	if err != nil {
		return err
	}
	if resp.StatusCode >= 300 {
		if refusal := statusError(resp, u.session.auth.hide); refusal.temporary() {
			return refusal
		}
		return u.restart(ctx)
	}
	discard(resp)
	has, err := uploadRange(resp.Header.Get("Range"))
	if err != nil || has > u.desc.Size {
		return u.restart(ctx)
	}
	if err := u.moved(resp); err != nil {
		return err
	}
	u.broken, u.resumed = false, true
	u.reached(has)
	return nil
}

func (u *upload) restart(ctx context.Context) error {
	u.session.cancel(ctx, u.at)
	u.drop()
	if u.restarts++; u.restarts > maxRestarts {
		return fmt.Errorf("given up after %d beginnings, none of which the registry could go on with", u.restarts)
	}
	return nil
}

// uploadRange reads the Range header of an upload, and returns how many bytes the
// registry has. "0-0" says nothing or one byte; by taking it for nothing a byte may
// be refused, by taking it for one a byte might be left out.
func uploadRange(s string) (int64, error) {
	s = strings.TrimPrefix(strings.TrimSpace(s), "bytes=")
	last, ok := strings.CutPrefix(s, "0-")
	n, err := strconv.ParseInt(last, 10, 64)
	if !ok || err != nil || n < 0 || n == 1<<63-1 {
		return 0, fmt.Errorf("range %q of an upload is not 0-LAST", clean(s, 60))
	}
	if n == 0 {
		return 0, nil
	}
	return n + 1, nil
}
