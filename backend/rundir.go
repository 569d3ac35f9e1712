package backend

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// RunDir is the directory in which running mounts are recorded.
type RunDir struct{ path string }

// OpenRunDir opens the run directory of this user, and makes it where needed.
// getenv is os.Getenv, or a test's.
func OpenRunDir(getenv func(string) string) (*RunDir, error) {
	var refused []error
	for _, dir := range runDirs(getenv) {
		if err := PrivateDir(dir); err != nil {
			refused = append(refused, err)
			continue
		}
		return &RunDir{dir}, nil
	}
	return nil, fmt.Errorf("no directory for the state of mounts; set EROFS_OCI_RUN_DIR to a directory of your own: %w", errors.Join(refused...))
}

// runDirs lists where the run directory may be, the best first. Root's does not
// depend on how root logged in; root inside a user namespace may not write to
// /run, hence the others for root, too.
func runDirs(getenv func(string) string) []string {
	if d := getenv("EROFS_OCI_RUN_DIR"); filepath.IsAbs(d) {
		return []string{d}
	}
	var dirs []string
	if os.Geteuid() == 0 {
		dirs = append(dirs, "/run/erofs-oci")
	}
	if d := getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(d) {
		dirs = append(dirs, filepath.Join(d, "erofs-oci"))
	}
	return append(dirs, TempDir())
}

// TempDir is the directory under the system's temporary one that stands in
// where a user has no other; it is the same in each process of the user.
func TempDir() string {
	return filepath.Join(os.TempDir(), "erofs-oci-"+strconv.Itoa(outerUID()))
}

// outerUID is the effective user id as the parent user namespace knows it: in
// `unshare -Ur` everybody is 0, and the directories of root are not theirs.
func outerUID() int {
	uid := os.Geteuid()
	b, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return uid
	}
	for line := range strings.Lines(string(b)) {
		var inner, outer, n int
		if _, err := fmt.Sscan(line, &inner, &outer, &n); err == nil && inner <= uid && uid-inner < n {
			return outer + uid - inner
		}
	}
	return uid
}

// PrivateDir makes dir with mode 0700 unless it is there, and refuses one that
// is a link, somebody else's, or open to others: what lies in such a directory
// could be another user's.
func PrivateDir(dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return &fs.PathError{Op: "lstat", Path: dir, Err: err}
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return fmt.Errorf("%s is not a directory", dir)
	case int(st.Uid) != os.Geteuid():
		return fmt.Errorf("%s belongs to uid %d, not to you (uid %d)", dir, st.Uid, os.Geteuid())
	case st.Mode&0o077 != 0:
		return fmt.Errorf("%s is open to others (mode %#o); chmod 700 it", dir, st.Mode&0o777)
	}
	return unix.Access(dir, unix.W_OK)
}
