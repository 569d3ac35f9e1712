package main

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

// TestSocketPath: of many who find a socket that was left one gets its place, and nobody who is served loses it: neither
// to the others nor to the end of whoever had it before.
func TestSocketPath(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	for range 20 {
		left, err := listenPrivately(path)
		must(t, err)
		must(t, left.Close())
		var won atomic.Pointer[socketListener]
		var starts sync.WaitGroup
		for range 8 {
			starts.Go(func() {
				l, err := listenAt(path)
				switch {
				case err == nil:
					if !won.CompareAndSwap(nil, l.(*socketListener)) {
						t.Error("a second one has the place")
					}
				case !errors.Is(err, syscall.EADDRINUSE):
					t.Error(err)
				}
			})
		}
		starts.Wait()
		l := won.Load()
		if l == nil {
			t.Fatal("nobody has the place")
		}
		if st, err := os.Lstat(path); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%v, %v", st, err)
		}
		must(t, l.Close())
		must(t, l.Close())
		if _, err := os.Lstat(path); !os.IsNotExist(err) {
			t.Errorf("the socket is left: %v", err)
		}
	}

	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
	old, err := listenAt(path)
	must(t, err)
	must(t, os.Remove(path)) // somebody tidies up
	next, err := listenAt(path)
	must(t, err)
	must(t, old.Close())
	conn, err := net.Dial("unix", path)
	must(t, err)
	must(t, conn.Close())
	must(t, next.Close())

	long := filepath.Join(t.TempDir(), strings.Repeat("x", 108))
	if _, err := listenAt(long); err == nil || !strings.Contains(err.Error(), "that of a socket may have 107") {
		t.Errorf("a long path: %v", err)
	}
}
