package fusefs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"strings"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
)

func TestStatus(t *testing.T) {
	for _, c := range []struct {
		err  error
		want syscall.Errno
	}{
		{nil, 0},
		{&erofsfmt.FormatError{What: "x", Err: erofsfmt.ErrCorrupt}, syscall.EUCLEAN},
		{fmt.Errorf("x: %w", &erofsfmt.FormatError{What: "x", Err: erofsfmt.ErrUnsupported}), syscall.EOPNOTSUPP},
		{&erofsfmt.FormatError{What: "cut off", Err: io.ErrUnexpectedEOF}, syscall.EIO},
		{erofsfmt.ErrNoXattr, syscall.ENODATA},
		{fmt.Errorf("x: %w", fs.ErrNotExist), syscall.ENOENT},
		{fmt.Errorf("x: %w", fs.ErrInvalid), syscall.EINVAL},
		{context.Canceled, syscall.EIO},
		{context.DeadlineExceeded, syscall.EIO},
		{errors.New("the registry answered 503"), syscall.EIO},
	} {
		if got := status(c.err); got != fuse.Status(c.want) {
			t.Errorf("status(%v) = %v, want %v", c.err, got, c.want)
		}
	}
}

// TestErrorLog: what an errno cannot say is logged, a flood is not.
func TestErrorLog(t *testing.T) {
	var out bytes.Buffer
	l := newErrorLog(slog.New(slog.NewTextHandler(&out, nil)))
	for i := range 1000 {
		l.say("read", syscall.EIO, fmt.Errorf("reason %d", i), "nid", 5)
	}
	if n := strings.Count(out.String(), "\n"); n != 1 {
		t.Fatalf("%d lines for a flood:\n%s", n, out.String())
	}
	for _, want := range []string{"reason 0", "op=read", "nid=5", "input/output error"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not in %q", want, out.String())
		}
	}
	l.last = l.last.Add(-2 * errorLogPause)
	l.say("read", syscall.EIO, errors.New("later"), "nid", 5)
	if !strings.Contains(out.String(), "left_out=999") {
		t.Errorf("the dropped lines are not counted: %q", out.String())
	}
}
