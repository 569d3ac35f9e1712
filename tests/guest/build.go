package guest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
)

// InitPackage is the program that a Job's Init is built of.
const InitPackage = "github.com/erofs-oci/erofs-oci/tests/guest/init"

// Build has the go command make a static program for a guest: args are such as
// "build" or "test", "-c", the last one is a package of this module.
func Build(ctx context.Context, out string, args ...string) error {
	last := len(args) - 1
	args = slices.Concat(args[:last], []string{"-trimpath", "-ldflags=-s -w", "-o", out}, args[last:])
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if said, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w: %s", cmd.Args, err, said)
	}
	return nil
}
