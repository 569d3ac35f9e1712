package verified

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/erofs-oci/erofs-oci/registry/integrity"
)

// A Fetcher brings bytes of one blob. Its methods may be called in parallel.
type Fetcher interface {
	// Fetch asks for n bytes from off. start says where the body really begins: at off, or
	// before it, with all of the blob. total is how long the blob is.
	Fetch(ctx context.Context, off, n int64) (body io.ReadCloser, start, total int64, err error)
}

// elsewhere is what a Fetcher can do, too, that knows several places.
type elsewhere interface {
	// Places is how many there are.
	Places() int
	// FetchElsewhere is Fetch of bytes that came wrong before, which why says.
	FetchElsewhere(ctx context.Context, off, n int64, why error) (body io.ReadCloser, start, total int64, err error)
}

// again is how often something is fetched again that came wrong.
func again(f Fetcher) int {
	if e, ok := f.(elsewhere); ok {
		return max(1, e.Places())
	}
	return 1
}

// fetch is Fetch, and not from where something was wrong if why is not nil.
func fetch(ctx context.Context, f Fetcher, off, n int64, why error) (body io.ReadCloser, start, total int64, err error) {
	if e, ok := f.(elsewhere); ok && why != nil {
		return e.FetchElsewhere(ctx, off, n, why)
	}
	return f.Fetch(ctx, off, n)
}

// FetchFrom fetches n bytes from off, and not from where something was wrong if why is not
// nil and f knows several places. The body begins at off, whatever the server sends, and may
// go on behind what was asked for.
func FetchFrom(ctx context.Context, f Fetcher, off, n int64, why error) (io.ReadCloser, error) {
	body, start, _, err := fetch(ctx, f, off, n, why)
	if err != nil {
		return nil, err
	}
	if start < 0 || start > off {
		err = fmt.Errorf("the body starts at %d, and %d bytes at %d were asked for", start, n, off)
	} else if _, err = io.CopyN(io.Discard, body, off-start); err != nil {
		err = broken(err, off)
	}
	if err != nil {
		return nil, errors.Join(err, body.Close())
	}
	return body, nil
}

// fill fills all of p from off.
func fill(ctx context.Context, f Fetcher, p []byte, off int64, why error) error {
	if len(p) == 0 {
		return nil
	}
	body, err := FetchFrom(ctx, f, off, int64(len(p)), why)
	if err != nil {
		return fmt.Errorf("fetch %d bytes at %d: %w", len(p), off, err)
	}
	defer body.Close() // what was read of it is what was asked for
	if n, err := io.ReadFull(body, p); err != nil {
		return broken(err, off+int64(n))
	}
	return nil
}

func broken(err error, at int64) error {
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("broke off at %d: %w", at, err)
}

// mend fetches p from off again until check says that it is right. why is what check
// said of it before; nil, if p was not fetched yet.
func mend(ctx context.Context, f Fetcher, p []byte, off int64, check func() error, why error) error {
	tries := again(f)
	if why == nil {
		tries++
	}
	for range tries {
		if err := fill(ctx, f, p, off, why); err != nil {
			return errors.Join(why, err)
		}
		if why = check(); why == nil {
			return nil
		}
	}
	return fmt.Errorf("fetched again, and wrong again: %w", why)
}

func isMismatch(err error) bool {
	if err == nil {
		return false // which is nearly always, and costs nothing
	}
	var m *integrity.MismatchError
	return errors.As(err, &m)
}
