package fusefs_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
	"github.com/erofs-oci/erofs-oci/tests/require"
)

// TestMemory: a server that has been asked for every one of many files is no
// larger than its caches: nothing is kept for a file. Half a kilobyte for each
// would be 100 MB.
func TestMemory(t *testing.T) {
	require.Has(t, "root", "fuse")
	if testing.Short() {
		return // the race detector, which is run with -short, needs more memory than the server
	}
	const (
		files   = 200_000
		limitMB = 80
	)
	var entries []mkerofs.Entry
	for i := range files {
		entries = append(entries, mkerofs.Entry{
			Path: fmt.Sprintf("directory-%03d/file-%06d", i/1000, i), Mode: mkerofs.ModeRegular | 0o644,
			UID: uint32(i), Mtime: time.Unix(int64(i), 0), // inodes of 64 bytes
		})
	}
	s := startServer(t, "fuse", buildImage(t, entries))
	t.Cleanup(func() { s.end(t) })
	seen := 0
	err := filepath.WalkDir(s.dir, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			seen++
			_, err = d.Info()
		}
		return err
	})
	if err != nil || seen != files {
		t.Fatalf("%d files, %v", seen, err)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, line, _ := strings.Cut(string(status), "VmHWM:")
	kib, err := strconv.Atoi(strings.Fields(line)[0])
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("largest resident set: %d KiB", kib)
	if kib > limitMB<<10 {
		t.Errorf("the server has had %d KiB, at most %d MiB", kib, limitMB)
	}
}
