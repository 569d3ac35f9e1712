package backend

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
)

func openFile(t *testing.T, content []byte) (*File, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "blob")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := OpenFile(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f, path
}

func TestFile(t *testing.T) {
	sourcetest.Run(t, func(t *testing.T, content []byte) sourcetest.Source {
		f, _ := openFile(t, content)
		return f
	})
}

// TestFileCutShort: bytes that are not there any more are not made up.
func TestFileCutShort(t *testing.T) {
	f, path := openFile(t, make([]byte, 8192))
	if err := os.Truncate(path, 4096); err != nil {
		t.Fatal(err)
	}
	if err := f.ReadAt(t.Context(), make([]byte, 4096), 2048); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("got %v", err)
	}
}

// TestFileChanged: bytes that were written later are not those that were opened.
func TestFileChanged(t *testing.T) {
	for what, change := range map[string]func(path string) error{
		"cut and grown again": func(path string) error { return errors.Join(os.Truncate(path, 0), os.Truncate(path, 8192)) },
		"grown":               func(path string) error { return os.Truncate(path, 8193) },
		"written to":          func(path string) error { return os.WriteFile(path, make([]byte, 8192), 0o600) },
	} {
		f, path := openFile(t, bytes.Repeat([]byte("x"), 8192))
		p := make([]byte, 4096)
		if err := f.ReadAt(t.Context(), p, 0); err != nil {
			t.Fatal(err)
		}
		// The clock of the file system may be coarse.
		old := time.Unix(0, f.State().MtimeNs).Add(time.Second)
		if err := errors.Join(change(path), os.Chtimes(path, time.Time{}, old)); err != nil {
			t.Fatal(err)
		}
		if err := f.ReadAt(t.Context(), p, 0); err == nil {
			t.Errorf("%s: read all the same", what)
		}
	}
}

// TestOpenFileRefuses: what is no file of bytes is refused, and not waited for.
func TestOpenFileRefuses(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{t.TempDir(), pipe, os.DevNull, filepath.Join(t.TempDir(), "nosuch")} {
		if _, err := OpenFile(path); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
	}
}
