package e2e

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/erofs-oci/erofs-oci/tests/corpus"
)

// TestCheckScripts runs the scripts of check and dump.
func TestCheckScripts(t *testing.T) { runScripts(t, filepath.Join("testdata", "check")) }

// TestCheckCorpus: check finds nothing in any image.
func TestCheckCorpus(t *testing.T) {
	s := newSession(t)
	for _, im := range corpus.Images(t) {
		image, devices := s.writeImage(im)
		said := s.must(append(append([]string{"check"}, devices...), image)...)
		if !strings.HasPrefix(said, "no faults in 2") || strings.Count(said, "\n") != 1 {
			t.Errorf("%s: %q", im.Name, said)
		}
	}
}
