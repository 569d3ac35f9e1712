package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	octetStream  = "application/octet-stream"
	digestHeader = "Docker-Content-Digest"
)

// PutBlob implements Sink. A blob that the repository has is not sent; one that
// another repository has is mounted where the registry does that; any other is
// uploaded. An upload that breaks off goes on where the registry says that it
// stands, or begins anew.
//
// PutBlob waits for a registry in trouble as Fetch does: for Options.ErrorWait
// without a byte. What it leaves unfinished it cancels.
func (r *Repository) PutBlob(ctx context.Context, desc ocispec.Descriptor, content io.ReaderAt, o PutOptions) (PutResult, error) {
	u, err := r.newUpload(desc, content, o)
	if err == nil {
		err = u.run(ctx)
	}
	if err != nil {
		return PutResult{}, fmt.Errorf("push blob %s to %s: %w", desc.Digest, r.ref.name(), err)
	}
	return u.result(), nil
}

func (r *Repository) newUpload(desc ocispec.Descriptor, content io.ReaderAt, o PutOptions) (*upload, error) {
	if err := checkBlob(desc); err != nil {
		return nil, err
	}
	if o.ChunkSize < 0 {
		return nil, fmt.Errorf("chunk size %d", o.ChunkSize)
	}
	s, err := r.own()
	if err != nil {
		return nil, err
	}
	u := &upload{session: s, desc: desc, opts: o, wait: s.writing(), parcels: parcels{content: content, progress: o.Progress}}
	for _, from := range o.MountFrom {
		if err := (Reference{Host: r.ref.Host, Repository: from, Tag: "latest"}).validate(); err != nil {
			return nil, fmt.Errorf("mount from %q: %w", clean(from, 100), err)
		}
		if from != s.ref.Repository && !slices.Contains(u.mounts, from) {
			u.mounts = append(u.mounts, from)
		}
	}
	return u, nil
}

// own is the session with the registry itself: a mirror is not written to, and does
// not know what is not in the registry.
func (r *Repository) own() (*session, error) {
	ref, err := r.at("")
	if err != nil {
		return nil, err
	}
	src, err := r.client.source(ref)
	if err != nil {
		return nil, err
	}
	return src.registry().session, nil
}

// writing is the patience for what is pushed.
func (s *session) writing() *patience {
	return &patience{limit: s.client.errorWait, host: s.ref.Host, eager: !s.reached.Load(), recovery: s.client.recovery, happened: s.client.happened}
}

// url is where path of the repository is.
func (s *session) url(ctx context.Context, path string, query url.Values) (*url.URL, error) {
	origin, err := s.client.origin(ctx, s.ref.apiHost(), s.access.insecure)
	if err != nil {
		return nil, err
	}
	u := origin.JoinPath("v2", s.ref.Repository, path)
	u.RawQuery = query.Encode()
	return u, nil
}

// hasBlob asks whether the repository has the blob. A registry that does not want to
// be asked is told of the upload: who may push to a repository that does not exist
// yet may not read it, with some.
func (s *session) hasBlob(ctx context.Context, desc ocispec.Descriptor) (bool, error) {
	resp, err := s.do(ctx, http.MethodHead, "blobs/"+desc.Digest.String(), http.Header{"Accept-Encoding": {"identity"}})
	var refusal *StatusError
	if errors.As(err, &refusal) && (refusal.Code == http.StatusUnauthorized || refusal.Code == http.StatusForbidden) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	_ = resp.Body.Close() // a HEAD has none
	switch resp.StatusCode {
	case http.StatusOK:
		if n := resp.ContentLength; n >= 0 && n != desc.Size && checkIdentity(resp) == nil {
			return false, fmt.Errorf("the registry has it with %d bytes, not %d", n, desc.Size)
		}
		return true, nil
	case http.StatusNotFound, http.StatusForbidden, http.StatusMethodNotAllowed, http.StatusNotImplemented:
		return false, nil // the upload will tell what else is wrong
	}
	return false, statusError(resp, s.auth.hide)
}

// PutManifest implements Sink. What the registry says it has stored is held
// against what was sent.
func (r *Repository) PutManifest(ctx context.Context, target, mediaType string, raw []byte) (ocispec.Descriptor, error) {
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	if target == "" {
		target = desc.Digest.String()
	}
	ref, err := r.at(target)
	if err == nil {
		desc.Digest, err = checkManifest(ref, mediaType, raw)
	}
	var s *session
	if err == nil {
		s, err = r.own()
	}
	if err == nil {
		err = retry(ctx, s.writing(), func(ctx context.Context) error { return s.putManifest(ctx, target, desc, raw) })
	}
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("push manifest %s to %s: %w", clean(target, 200), r.ref.name(), err)
	}
	return desc, nil
}

// checkManifest returns the digest that raw is stored under.
func checkManifest(ref Reference, mediaType string, raw []byte) (digest.Digest, error) {
	if len(raw) > maxManifest {
		return "", fmt.Errorf("%d bytes; registries take %d", len(raw), maxManifest)
	}
	if mediaType == "" {
		return "", errors.New("it has no media type")
	}
	return verifyManifest(raw, ref.Digest, "")
}

func (s *session) putManifest(ctx context.Context, target string, desc ocispec.Descriptor, raw []byte) error {
	at, err := s.url(ctx, "manifests/"+target, nil)
	if err != nil {
		return err
	}
	resp, err := s.send(ctx, outgoing{
		method: http.MethodPut, url: at, header: http.Header{"Content-Type": {desc.MediaType}},
		length: desc.Size,
		body:   func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw)), nil },
	})
	if err != nil {
		return err
	}
	return s.stored(resp, desc.Digest)
}

// stored takes the answer to the last request of a push: a 201 for this digest.
func (s *session) stored(resp *http.Response, d digest.Digest) error {
	if !done(resp.StatusCode) {
		return statusError(resp, s.auth.hide)
	}
	discard(resp)
	if got := resp.Header.Get(digestHeader); got != "" && got != d.String() {
		return fmt.Errorf("%s %s: the registry says that it has stored %s, not %s", resp.Request.Method, redact(resp.Request.URL), clean(got, 160), d)
	}
	return nil
}

// done reports success: the specification has 201, older registries say 204.
func done(status int) bool { return status == http.StatusCreated || status == http.StatusNoContent }

// cancelTimeout bounds the good manners towards a registry that may be gone.
const cancelTimeout = 5 * time.Second

// cancel has the registry forget an upload. It would do so by itself after a while
// (a week, with some), so that a failure is only noted.
func (s *session) cancel(ctx context.Context, at *url.URL) {
	ctx, stop := context.WithTimeoutCause(context.WithoutCancel(ctx), cancelTimeout, &wireError{errOutOfTime})
	defer stop()
	resp, err := s.send(ctx, outgoing{method: http.MethodDelete, url: at})
	if err == nil {
		if resp.StatusCode < 300 || resp.StatusCode == http.StatusNotFound {
			discard(resp)
			return
		}
		err = statusError(resp, s.auth.hide)
	}
	s.client.log.Debug("upload not cancelled", "repository", s.ref.name(), "err", err)
}
