package serverlog_test

import (
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/backend/serverlog"
)

// TestRotation: a log file is begun anew between two lines, whoever writes, and nothing is lost at that.
func TestRotation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	f, err := backend.OpenLog(path)
	if err != nil {
		t.Fatal(err)
	}
	l := serverlog.New(f, serverlog.Options{JSON: true, Level: slog.LevelDebug})
	const writers, each = 4, 400 // of some 1,000 bytes: more than one file has, and less than two
	long := strings.Repeat("x", 900)
	var all sync.WaitGroup
	for w := range writers {
		all.Go(func() {
			for i := range each {
				l.Info(long, "n", w*each+i)
			}
		})
	}
	all.Wait()
	l.Close()
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	seen := make(map[int]bool)
	for _, p := range []string{path + ".1", path} {
		b, err := os.ReadFile(p)
		if err != nil || len(b) == 0 {
			t.Fatalf("%s: %d bytes, %v", p, len(b), err)
		}
		for line := range strings.Lines(string(b)) {
			var said struct {
				Msg string
				N   *int
			}
			if err := json.Unmarshal([]byte(line), &said); err != nil || said.Msg != long || said.N == nil || seen[*said.N] {
				t.Fatalf("%s: %v: %.100q", p, err, line)
			}
			seen[*said.N] = true
		}
	}
	if len(seen) != writers*each {
		t.Errorf("%d lines of %d", len(seen), writers*each)
	}
}
