package registry

import (
	"context"
	"net/http"
	"strings"
	"time"
)

// An Observer is told what a Client does, as it does it. Its methods are called by many
// goroutines at once, and what they tell of waits for them: they should count, and return.
type Observer interface {
	// Answered is called once for each request that was sent: each hop of a redirect, each
	// try, each greeting and each request for a token is one. (What net/http sends once
	// more by itself, because an idle connection turned out to be closed, is not another.)
	Answered(Answer)
	// Received is called for each n > 0 bytes of the body of an answer, as they come.
	Received(a Answer, n int)
	// Happened is called for what a request alone does not tell.
	Happened(Event)
}

// An Answer is what became of a request.
type Answer struct {
	Method string
	Kind   Kind
	Cause  string // see WithCause
	Status int    // of HTTP; 0 where no answer came
	// Wait is the time from when the request was given to net/http, which may have to connect
	// first, to the end of the answer's header.
	Wait time.Duration
}

// A Kind is what a request is for.
type Kind string

const (
	KindManifest Kind = "manifest" // a manifest or an index of such
	KindBlob     Kind = "blob"     // bytes of a blob, or whether there is one
	KindToken    Kind = "token"    // of a token service
	KindUpload   Kind = "upload"   // a step of an upload
	KindOther    Kind = "other"    // does anybody answer, and how; referrers
)

// An Event is something that a Client met with.
type Event string

const (
	// EventRetry: a try failed that was sent, and another one is made.
	EventRetry Event = "retry"
	// EventResume: one of these retries goes on behind the bytes that had come already.
	EventResume Event = "resume"
	// EventThrottled: an answer was 429, too many requests.
	EventThrottled Event = "throttled"
	// EventToken: a token was fetched for what had none yet.
	EventToken Event = "token"
	// EventTokenRefresh: a token was fetched in place of one that had expired or was refused.
	EventTokenRefresh Event = "token refresh"
	// EventMirrorLeft: a mirror failed and comes last for a while.
	EventMirrorLeft Event = "mirror left"
	// EventWrongBytes: bytes of a blob were not what they should be, and are fetched again.
	EventWrongBytes Event = "wrong bytes"
)

// CauseMetadata is the cause of what has no other.
const CauseMetadata = "metadata"

type causeKey struct{}

// WithCause says what the requests are made for that are made with the context: it is the
// Cause of their answers. Tokens are for all that come after, and always CauseMetadata.
func WithCause(ctx context.Context, cause string) context.Context {
	return context.WithValue(ctx, causeKey{}, cause)
}

func causeOf(ctx context.Context) string {
	if cause, ok := ctx.Value(causeKey{}).(string); ok {
		return cause
	}
	return CauseMetadata
}

type kindKey struct{}

// withKind says what a request is for, to the stages that it passes.
func withKind(ctx context.Context, k Kind) context.Context {
	return context.WithValue(ctx, kindKey{}, k)
}

func kindOf(ctx context.Context) Kind {
	if k, ok := ctx.Value(kindKey{}).(Kind); ok {
		return k
	}
	return KindOther
}

// kindAt is what is at a path below a repository.
func kindAt(path string) Kind {
	switch {
	case strings.HasPrefix(path, "manifests/"):
		return KindManifest
	case strings.HasPrefix(path, "blobs/uploads/"):
		return KindUpload
	case strings.HasPrefix(path, "blobs/"):
		return KindBlob
	}
	return KindOther
}

// happened tells the observer, if there is one.
func (c *Client) happened(e Event) {
	if c.observer != nil {
		c.observer.Happened(e)
	}
}

// answered tells the observer what came of a request, and gives what its body is of.
func (t *wireTransport) answered(req *http.Request, status int, wait time.Duration) Answer {
	a := Answer{Method: req.Method, Kind: kindOf(req.Context()), Cause: causeOf(req.Context()), Status: status, Wait: wait}
	t.observer.Answered(a)
	if status == http.StatusTooManyRequests {
		t.observer.Happened(EventThrottled)
	}
	return a
}
