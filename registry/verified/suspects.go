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
	blob  Fetcher
	total int64 // how long it is

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

// fetchBefore is Fetch of a blob whose bytes from size to total are at hand: tail gives n of
// them from off. A range that goes on behind total is fetched as it is.
func (s *suspects) fetchBefore(ctx context.Context, off, n, size, total int64, tail func(off, n int64) io.Reader) (body io.ReadCloser, start, blob int64, err error) {
	if off < 0 || n <= 0 || off > total || n > total-off || off+n <= size {
		return s.Fetch(ctx, off, n)
	}
	if off >= size {
		return io.NopCloser(tail(off, n)), off, s.total, nil
	}
	body, start, blob, err = s.Fetch(ctx, off, size-off)
	if err != nil || start != off {
		return body, start, blob, err
	}
	return &joined{&exactly{body, size - off}, body, tail(size, off+n-size)}, start, blob, nil
}

// exactly is the first left bytes of a body, and an error if there are fewer.
type exactly struct {
	body io.Reader
	left int64
}

func (e *exactly) Read(p []byte) (int, error) {
	if e.left == 0 {
		return 0, io.EOF
	}
	n, err := e.body.Read(p[:min(int64(len(p)), e.left)])
	e.left -= int64(n)
	switch {
	case err == io.EOF && e.left > 0:
		err = io.ErrUnexpectedEOF
	case err == io.EOF:
		err = nil
	}
	return n, err
}

// joined is a body, and what follows it. To read that may need a connection, and the body
// has one: it is closed before.
type joined struct {
	front *exactly
	body  io.Closer // nil: closed
	tail  io.Reader
}

func (j *joined) Read(p []byte) (int, error) {
	if j.body != nil {
		if n, err := j.front.Read(p); err != io.EOF {
			return n, err
		}
		j.Close() // what is wanted of it was read
	}
	return j.tail.Read(p)
}

func (j *joined) Close() error {
	if j.body == nil {
		return nil
	}
	body := j.body
	j.body = nil
	return body.Close()
}
