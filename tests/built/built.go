// Package built builds the programs of this module for tests that run them.
package built

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// The packages of programs, as Main wants them.
const (
	ErofsOCI = "github.com/erofs-oci/erofs-oci"
	Demo     = ErofsOCI + "/tests/demo"
)

// Main is for TestMain: it builds programs, static, from the packages that it is given, sets the variables to their paths,
// runs the tests, and gives what to exit with. Every user may run what it has built.
func Main(m *testing.M, packages map[*string]string) (code int) {
	dir, err := os.MkdirTemp("", "erofs-oci-test-")
	if err == nil {
		defer os.RemoveAll(dir)
		err = os.Chmod(dir, 0o755)
	}
	for path, pkg := range packages {
		if err == nil {
			*path = filepath.Join(dir, filepath.Base(pkg))
			err = build(*path, pkg)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

func build(path, pkg string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-o", path, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if said, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", pkg, err, said)
	}
	return nil
}
