package backend

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/backend/kmount"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/require"
)

// TestDetachOfOurs mounts two images on one directory.
func TestDetachOfOurs(t *testing.T) {
	require.Has(t, "root", "kernel-erofs", "loop")
	file := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(file, corpus.Get(t, "plain").Data, 0o600); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	var devices [2]Device
	for i := range devices {
		l, err := kmount.AttachLoop(file, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := kmount.Mount(l.Path(), dir, kmount.Options{}); err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil {
			t.Fatal(err)
		}
		devices[i] = Device(fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := Detach(dir, devices[0], false); err == nil || !strings.Contains(err.Error(), "mounted over it") {
		t.Errorf("below another: %v", err)
	}
	for _, d := range []Device{devices[1], devices[0], devices[0], "999:999"} {
		if err := Detach(dir, d, false); err != nil {
			t.Errorf("%s: %v", d, err)
		}
	}
	if err := unix.Unmount(dir, 0); !errors.Is(err, unix.EINVAL) {
		t.Errorf("something is left: %v", err)
	}
}
