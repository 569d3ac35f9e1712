package verified

import (
	"context"
	"io"
	"sync"
)

// A WrongError is what a hook says of bytes that are not what they should be.
type WrongError struct {
	Err  error // a *integrity.MismatchError is in it
	Last bool  // they were fetched as often as makes sense
}

func (e *WrongError) Error() string {
	if e.Last {
		return "fetched again, and wrong again: " + e.Err.Error()
	}
	return e.Err.Error()
}

func (e *WrongError) Unwrap() error { return e.Err }

// Temporary says that it makes sense to fetch the bytes again: that comes from elsewhere.
func (e *WrongError) Temporary() bool { return !e.Last }

// Suspects are the chunks of a blob that came wrong, so that they are fetched from
// elsewhere when they are fetched again. There are few, and usually none.
type suspects struct {
	blob Fetcher

	mu    sync.Mutex // guards what follows
	wrong map[int64]suspect
}

type suspect struct {
	end   int64
	times int
	why   error
}

// judge makes of a verdict on the n bytes at off what a hook says of them.
func (s *suspects) judge(off, n int64, err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !isMismatch(err) {
		delete(s.wrong, off)
		return err
	}
	if s.wrong == nil {
		s.wrong = make(map[int64]suspect)
	}
	is := s.wrong[off]
	is.end, is.why = off+n, err
	is.times++
	if is.times > again(s.blob) {
		// Who reads it the next time begins anew.
		delete(s.wrong, off)
		return &WrongError{Err: err, Last: true}
	}
	s.wrong[off] = is
	return &WrongError{Err: err}
}

// why says what was wrong with some of the bytes from off to end.
func (s *suspects) why(off, end int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for at, is := range s.wrong {
		if at < end && is.end > off {
			return is.why
		}
	}
	return nil
}

// Fetch is the blob's, but for bytes that came wrong.
func (s *suspects) Fetch(ctx context.Context, off, n int64) (body io.ReadCloser, start, total int64, err error) {
	return fetch(ctx, s.blob, off, n, s.why(off, off+n))
}
