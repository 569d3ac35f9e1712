package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/require"
)

// TestCutOff: an image that is longer than its file is not left to the kernel,
// whatever the way there.
func TestCutOff(t *testing.T) {
	require.Has(t, "root", "fuse", "kernel-erofs")
	s := newSession(t)
	data := corpus.Get(t, "plain").Data
	must(t, os.WriteFile(filepath.Join(s.dir, "cut.erofs"), data[:len(data)-1], 0o600))
	for _, backend := range []string{"nbd", "file"} {
		r := s.run(binary, "mount", "--backend="+backend, "./cut.erofs", s.target())
		if r.code != 1 || !strings.Contains(r.stderr, "it was cut off") {
			t.Errorf("%s: exit code %d, said %q", backend, r.code, r.stderr)
		}
	}
}
