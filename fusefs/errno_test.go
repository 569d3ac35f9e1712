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

	"github.com/erofs-oci/erofs-oci/backend/serverlog"
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

// TestFailureLog: what an errno cannot say is in the log, each time where all is asked for; a flood is not, but counted.
func TestFailureLog(t *testing.T) {
	for _, c := range []struct {
		level             slog.Level
		lines, last, said int
	}{{slog.LevelWarn, serverlog.DefaultLines + 1, 1000 - serverlog.DefaultLines, 1}, {slog.LevelDebug, 1000, 0, 0}} {
		var out bytes.Buffer
		log := serverlog.New(&out, serverlog.Options{Level: c.level})
		for i := range 1000 {
			logFailure(log.Logger, "read", syscall.EIO, fmt.Errorf("reason %d.", i), "nid", 5)
		}
		log.Close()
		if n := strings.Count(out.String(), "\n"); n != c.lines {
			t.Errorf("at %v %d lines for a flood:\n%.2000s", c.level, n, out.String())
		}
		if n := strings.Count(out.String(), fmt.Sprintf("left_out=%d\n", c.last)); n != c.said {
			t.Errorf("at %v the lines that are left out are said %d times: %q", c.level, n, out.String())
		}
		first, _, _ := strings.Cut(out.String(), "\n")
		for _, want := range []string{"level=ERROR", `msg="request failed"`, "reason 0.", "op=read", "nid=5", "input/output error"} {
			if !strings.Contains(first, want) {
				t.Errorf("%q is not in %q", want, first)
			}
		}
	}
}
