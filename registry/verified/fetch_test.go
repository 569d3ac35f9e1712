package verified_test

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/erofs-oci/erofs-oci/registry/verified"
)

// A strange server sends what it has from where it wants.
type strange struct {
	body   string
	start  int64
	closed int
}

func (s *strange) Fetch(context.Context, int64, int64) (io.ReadCloser, int64, int64, error) {
	return struct {
		io.Reader
		io.Closer
	}{strings.NewReader(s.body), closer(func() { s.closed++ })}, s.start, 10, nil
}

type closer func()

func (c closer) Close() error { c(); return nil }

// TestFetchFrom: a body begins with the byte that was asked for, or there is none, and none is left open.
func TestFetchFrom(t *testing.T) {
	for _, c := range []struct {
		name  string
		start int64
		body  string
		want  string // all of the body; "" for an error
		err   string
	}{
		{"the range", 4, "456", "456", ""},
		{"and more", 4, "456789", "456789", ""},
		{"from the first byte", 0, "0123456789", "456789", ""},
		{"from before it", 3, "3456", "456", ""},
		{"from behind it", 5, "56789", "", "the body starts at 5, and 3 bytes at 4 were asked for"},
		{"from nowhere", -1, "x0123456", "", "the body starts at -1"},
		{"ends before it", 0, "012", "", "broke off at 4: unexpected EOF"},
	} {
		s := &strange{body: c.body, start: c.start}
		body, err := verified.FetchFrom(t.Context(), s, 4, 3, nil)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) || s.closed != 1 {
				t.Errorf("%s: %v, closed %d times; want %q", c.name, err, s.closed, c.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		got, err := io.ReadAll(body)
		if err = errors.Join(err, body.Close()); err != nil || string(got) != c.want || s.closed != 1 {
			t.Errorf("%s: %q, %v, closed %d times; want %q", c.name, got, err, s.closed, c.want)
		}
	}
}

// TestFetchFromElsewhere: what was wrong does not come from where it was wrong.
func TestFetchFromElsewhere(t *testing.T) {
	s := serve(random(100), nil)
	s.places = 2
	for _, why := range []error{nil, errors.New("wrong"), nil} {
		body, err := verified.FetchFrom(t.Context(), s, 10, 20, why)
		if err != nil {
			t.Fatal(err)
		}
		if err := body.Close(); err != nil {
			t.Error(err)
		}
	}
	if got, want := s.taken(), []request{{0, 10, 20}, {1, 10, 20}, {1, 10, 20}}; !slices.Equal(got, want) {
		t.Errorf("requests %v, want %v", got, want)
	}
}
