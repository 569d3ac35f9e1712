package debian

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/require"
)

// Root returns the directory of a Debian root file system, of the release that
// this machine runs. It is shared: copy it to change it.
func Root(t testing.TB) string {
	t.Helper()
	require.Has(t, "debian")
	dir, err := FetchRoot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// FetchRoot is Root for programs that are no tests.
func FetchRoot(ctx context.Context) (string, error) {
	return keep(ctx, "root", func(ctx context.Context, dir string) error {
		return bootstrap(ctx, dir, "--foreign")
	})
}

// bootstrap makes dir the root of the smallest Debian, of the release that this machine runs.
func bootstrap(ctx context.Context, dir string, options ...string) error {
	suite, err := codename()
	if err != nil {
		return err
	}
	mirror, err := Mirror(ctx)
	if err != nil {
		return err
	}
	args := append(options, "--variant=minbase", suite, dir, mirror)
	_, err = output(exec.CommandContext(ctx, "debootstrap", args...))
	return err
}

// Python returns the directory of a Debian root file system in which python3 runs,
// configured as an installation is. It is shared, as that of Root.
func Python(t testing.TB) string {
	t.Helper()
	require.Has(t, "debian")
	dir, err := FetchPython(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// FetchPython is Python for programs that are no tests.
func FetchPython(ctx context.Context) (string, error) {
	return keep(ctx, "python", func(ctx context.Context, dir string) error {
		if err := bootstrap(ctx, dir, "--include=python3"); err != nil {
			return err
		}
		return forgetPackages(dir)
	})
}

// forgetPackages removes what no container image carries: packages that are
// installed, and lists of those that are not.
func forgetPackages(root string) error {
	for _, pattern := range []string{"var/cache/apt/archives/*.deb", "var/cache/apt/*.bin", "var/lib/apt/lists/*"} {
		names, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			return err
		}
		for _, name := range names {
			if err := os.RemoveAll(name); err != nil {
				return err
			}
		}
	}
	return nil
}

// A Utils is an unpacked erofs-utils with all that it needs to run.
type Utils struct{ dir string }

// Mkfs returns the erofs-utils of Debian unstable.
func Mkfs(t testing.TB) *Utils {
	t.Helper()
	require.Has(t, "debian")
	u, err := FetchUtils(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// FetchUtils is Mkfs for programs that are no tests.
func FetchUtils(ctx context.Context) (*Utils, error) {
	dir, err := keep(ctx, "erofs-utils", func(ctx context.Context, dir string) error {
		return unpackUtils(ctx, dir, "sid")
	})
	return &Utils{dir: dir}, err
}

// unpackUtils unpacks erofs-utils and every package that it depends on.
func unpackUtils(ctx context.Context, dir, suite string) error {
	work, err := os.MkdirTemp(filepath.Dir(dir), "apt-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	apt, err := NewApt(ctx, work, suite)
	if err != nil {
		return err
	}
	debs, err := apt.Download(ctx, "erofs-utils", "erofsfuse")
	if err != nil {
		return err
	}
	for _, deb := range debs {
		if _, err := output(exec.CommandContext(ctx, "dpkg-deb", "--extract", deb, dir)); err != nil {
			return err
		}
	}
	return nil
}

// Command is one of the utilities, such as "mkfs.erofs", to be run with args.
func (u *Utils) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	lib := filepath.Join(u.dir, "usr/lib/x86_64-linux-gnu")
	args = append([]string{"--library-path", lib, filepath.Join(u.dir, "usr/bin", name)}, args...)
	return exec.CommandContext(ctx, filepath.Join(lib, "ld-linux-x86-64.so.2"), args...)
}

// Run runs mkfs.erofs and fails the test if that does.
func (u *Utils) Run(t testing.TB, args ...string) {
	t.Helper()
	if said, err := u.Command(t.Context(), "mkfs.erofs", args...).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.erofs %q: %v\n%s", args, err, said)
	}
}

// keep returns the directory called name in the cache. Where there is none, fill
// makes it.
func keep(ctx context.Context, name string, fill func(ctx context.Context, dir string) error) (dir string, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("debian: %s: %w", name, err)
		}
	}()
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	cache = filepath.Join(cache, "erofs-oci-debian")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	dir = filepath.Join(cache, name)
	unlock, err := lock(dir + ".lock")
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return dir, err
	}
	work, err := os.MkdirTemp(cache, "new-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(work)
	next := filepath.Join(work, name)
	if err := os.Mkdir(next, 0o755); err != nil {
		return "", err
	}
	if err := fill(ctx, next); err != nil {
		return "", err
	}
	return dir, os.Rename(next, dir)
}

// lock waits for other processes that fill the same directory.
func lock(name string) (unlock func() error, err error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	for err = unix.EINTR; errors.Is(err, unix.EINTR); {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", name, errors.Join(err, f.Close()))
	}
	return f.Close, nil
}
