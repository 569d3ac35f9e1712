package fusefs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"syscall"
	"testing"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
)

// TestFailuresAreTold: each failure is told with its errno, also those for which there is no line in the log any more; and
// nothing else is.
func TestFailuresAreTold(t *testing.T) {
	im, err := erofsfmt.OpenWith(t.Context(), sourcetest.Memory(corpus.Get(t, "plain").Data), erofsfmt.Options{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, end := context.WithCancel(t.Context())
	f := newFileSystem(ctx, im, nil)
	var told []syscall.Errno
	f.failed = func(errno syscall.Errno) { told = append(told, errno) }
	for _, err := range []error{
		errors.New("the registry answered 503"), errors.New("and again"),
		&erofsfmt.FormatError{What: "x", Err: erofsfmt.ErrCorrupt},
		fmt.Errorf("x: %w", fs.ErrNotExist), erofsfmt.ErrNoXattr,
		context.Canceled,
	} {
		f.fail(ctx, "read", rootNode, err)
	}
	end()
	f.fail(ctx, "read", rootNode, context.Canceled) // the mount has ended
	if want := []syscall.Errno{syscall.EIO, syscall.EIO, syscall.EUCLEAN, syscall.EIO}; !slices.Equal(told, want) {
		t.Errorf("told %v, want %v", told, want)
	}
}
