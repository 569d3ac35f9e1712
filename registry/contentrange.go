package registry

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"
)

// A contentRange is the place that a 206 claims for its body.
type contentRange struct{ first, last, total int64 }

// parseContentRange reads "bytes first-last/total" by RFC 9110, 14.4. Without a
// total ("*") a range cannot be checked against the blob's size, so that form is
// refused.
func parseContentRange(s string) (contentRange, error) {
	var r contentRange
	fail := func() (contentRange, error) {
		return r, fmt.Errorf("Content-Range %q is not of the form bytes FIRST-LAST/TOTAL", clean(s, 80))
	}
	unit, rest, ok := strings.Cut(s, " ")
	if !ok || !strings.EqualFold(unit, "bytes") {
		return fail()
	}
	span, total, ok := strings.Cut(rest, "/")
	if !ok {
		return fail()
	}
	first, last, ok := strings.Cut(span, "-")
	if !ok {
		return fail()
	}
	for _, f := range []struct {
		text string
		to   *int64
	}{{first, &r.first}, {last, &r.last}, {total, &r.total}} {
		n, err := strconv.ParseUint(f.text, 10, 63)
		if err != nil {
			return fail()
		}
		*f.to = int64(n)
	}
	if r.first > r.last || r.last >= r.total {
		return fail()
	}
	return r, nil
}

// checkPartial holds a 206 against the n bytes from off that were asked for, of
// a blob of size bytes.
func checkPartial(resp *http.Response, off, n, size int64) error {
	if err := checkIdentity(resp); err != nil {
		return err
	}
	got, err := parseContentRange(resp.Header.Get("Content-Range"))
	if err != nil {
		return err
	}
	if want := (contentRange{off, off + n - 1, size}); got != want {
		return fmt.Errorf("asked for bytes %d-%d/%d, was given %d-%d/%d", want.first, want.last, want.total, got.first, got.last, got.total)
	}
	if resp.ContentLength >= 0 && resp.ContentLength != n {
		return fmt.Errorf("asked for %d bytes, Content-Length is %d", n, resp.ContentLength)
	}
	return nil
}

// checkWhole holds a 200 against a blob of size bytes.
func checkWhole(resp *http.Response, size int64) error {
	if err := checkIdentity(resp); err != nil {
		return err
	}
	if resp.ContentLength >= 0 && resp.ContentLength != size {
		return fmt.Errorf("the blob has %d bytes, Content-Length is %d", size, resp.ContentLength)
	}
	return nil
}

// checkIdentity refuses an encoded body: its bytes are not the blob's.
func checkIdentity(resp *http.Response) error {
	encodings := resp.Header.Values("Content-Encoding")
	for _, e := range encodings {
		if e != "" && !strings.EqualFold(e, "identity") {
			return fmt.Errorf("body has Content-Encoding %q although identity was asked for", clean(e, 60))
		}
	}
	if resp.Uncompressed {
		return fmt.Errorf("body came compressed although identity was asked for")
	}
	return nil
}
