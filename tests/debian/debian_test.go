package debian

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

func TestRoot(t *testing.T) {
	root := Root(t)
	if b, err := os.ReadFile(filepath.Join(root, "usr/lib/os-release")); err != nil || !strings.Contains(string(b), "ID=debian") {
		t.Errorf("%q, %v", b, err)
	}
	if link, err := os.Readlink(filepath.Join(root, "bin")); err != nil || link != "usr/bin" {
		t.Errorf("bin: %q, %v", link, err)
	}
}

// The root with Python is installed to the end: modules are compiled, and no package is left.
func TestPython(t *testing.T) {
	root := Python(t)
	compiled, err := filepath.Glob(filepath.Join(root, "usr/lib/python3*/__pycache__/ssl.*.pyc"))
	if err != nil || len(compiled) != 1 {
		t.Errorf("compiled ssl module: %q, %v", compiled, err)
	}
	packages, err := filepath.Glob(filepath.Join(root, "var/cache/apt/archives/*.deb"))
	if err != nil || len(packages) != 0 {
		t.Errorf("packages: %q, %v", packages, err)
	}
}

// The utilities write an image of every algorithm.
func TestMkfs(t *testing.T) {
	mkfs := Mkfs(t)
	src := t.TempDir()
	if err := os.WriteFile(filepath.Join(src, "f"), make([]byte, 100_000), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, alg := range []string{"lz4", "lzma", "deflate", "zstd"} {
		image := filepath.Join(t.TempDir(), "image")
		mkfs.Run(t, "--quiet", "-z"+alg, image, src)
		if said, err := mkfs.Command(t.Context(), "fsck.erofs", image).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", alg, err, said)
		}
	}
}

// A directory is filled once, and a failure leaves nothing.
func TestKeep(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	broken := errors.New("broken")
	_, err := keep(t.Context(), "x", func(_ context.Context, dir string) error {
		return errors.Join(broken, os.WriteFile(filepath.Join(dir, "half"), nil, 0o600))
	})
	if !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
	var wg sync.WaitGroup
	filled := 0 // only under the lock
	for range 4 {
		wg.Go(func() {
			dir, err := keep(t.Context(), "x", func(_ context.Context, dir string) error {
				filled++
				return os.WriteFile(filepath.Join(dir, "whole"), nil, 0o600)
			})
			if err != nil {
				t.Error(err)
			}
			if list, err := os.ReadDir(dir); err != nil || len(list) != 1 || list[0].Name() != "whole" {
				t.Errorf("%v, %v", list, err)
			}
		})
	}
	wg.Wait()
	if filled != 1 {
		t.Errorf("filled %d times", filled)
	}
}
