package backend

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

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
