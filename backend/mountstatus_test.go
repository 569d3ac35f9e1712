package backend_test

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/backend"
)

// TestMountStatus: who asks gets what is so now, also where the run directory has a path
// that is too long for a socket's address, and many at a time.
func TestMountStatus(t *testing.T) {
	parent := t.TempDir()
	for _, name := range []string{"run", strings.Repeat("long/", 40) + "run"} {
		path := filepath.Join(parent, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		run := openRun(t, path)
		dir := t.TempDir()
		if _, ok, err := run.Status(t.Context(), dir); ok || err != nil {
			t.Errorf("nobody is there: %v, %v", ok, err)
		}
		claim, err := run.Claim(t.Context(), dir)
		if err != nil {
			t.Fatal(err)
		}
		now := backend.MountStatus{Layers: []backend.LayerStatus{{Digest: "sha256:00", By: "none", Size: 10}}}
		var mu sync.Mutex
		s, err := claim.ServeStatus(func(bool) backend.MountStatus {
			mu.Lock()
			defer mu.Unlock()
			return now
		})
		if err != nil {
			t.Fatal(err)
		}
		var askers sync.WaitGroup
		for range 20 {
			askers.Go(func() {
				if got, ok, err := run.Status(context.Background(), dir); !ok || err != nil || got.Layers[0].Fetched != 0 {
					t.Errorf("%+v, %v, %v", got, ok, err)
				}
			})
		}
		askers.Wait()
		mu.Lock()
		now = backend.MountStatus{Layers: []backend.LayerStatus{{Digest: "sha256:00", By: "whole-blob", Size: 10, Fetched: 10, Verified: 10}}}
		mu.Unlock()
		if got, ok, err := run.Status(t.Context(), dir); !ok || err != nil || !reflect.DeepEqual(got, now) {
			t.Errorf("%+v, %v, %v", got, ok, err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if _, ok, err := run.Status(t.Context(), dir); ok || err != nil {
			t.Errorf("it has ended: %v, %v", ok, err)
		}
		// A server takes the place of one that was killed.
		again, err := claim.ServeStatus(func(bool) backend.MountStatus { return now })
		if err != nil {
			t.Fatal(err)
		}
		if err := again.Close(); err != nil {
			t.Error(err)
		}
		if err := claim.Release(); err != nil {
			t.Error(err)
		}
		if left, err := os.ReadDir(path); err != nil || len(left) != 0 {
			t.Errorf("left: %v, %v", left, err)
		}
	}
}

// TestStatusOfAStoppedServer: a server that does not answer costs who asks no more than a
// moment, and is said.
func TestStatusOfAStoppedServer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run")
	run := openRun(t, path)
	dir := t.TempDir()
	claim, err := run.Claim(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer claim.Release()
	l, err := net.Listen("unix", strings.TrimSuffix(claim.LogPath(), ".log")+".sock")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	begin := time.Now()
	if _, ok, err := run.Status(t.Context(), dir); ok || !errors.Is(err, backend.ErrNoAnswer) || !strings.Contains(err.Error(), dir) {
		t.Errorf("%v, %v", ok, err)
	}
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
}

// TestStatusForWhoListens: those who ask and do not listen are not in the way of others, however long the answer is; and
// those who say nothing, and wait, are answered.
func TestStatusForWhoListens(t *testing.T) {
	run := openRun(t, filepath.Join(t.TempDir(), "run"))
	dir := t.TempDir()
	claim, err := run.Claim(t.Context(), dir)
	must(t, err)
	defer claim.Release()
	long := backend.MountStatus{Layers: []backend.LayerStatus{{Digest: strings.Repeat("x", 4<<20)}}}
	s, err := claim.ServeStatus(func(metrics bool) backend.MountStatus {
		now := long
		if metrics {
			now.Metrics = "counted 1"
		}
		return now
	})
	must(t, err)
	defer func() { must(t, s.Close()) }()
	path := strings.TrimSuffix(claim.LogPath(), ".log") + ".sock"
	for range 5 {
		deaf, err := net.Dial("unix", path)
		must(t, err)
		defer deaf.Close()
	}
	if got, ok, err := run.Status(t.Context(), dir); !ok || err != nil || !reflect.DeepEqual(got, long) {
		t.Errorf("%v, %v", ok, err)
	}
	if got, ok, err := run.StatusAndMetrics(t.Context(), dir); !ok || err != nil || got.Metrics != "counted 1" || len(got.Layers) != 1 {
		t.Errorf("with metrics: %q, %v, %v", got.Metrics, ok, err)
	}
	silent, err := net.Dial("unix", path)
	must(t, err)
	defer silent.Close()
	must(t, silent.SetDeadline(time.Now().Add(20*time.Second)))
	var got backend.MountStatus
	if err := json.NewDecoder(silent).Decode(&got); err != nil || !reflect.DeepEqual(got, long) {
		t.Errorf("who says nothing: %v", err)
	}
}

// TestAmend changes the record that is there, and makes none.
func TestAmend(t *testing.T) {
	run := openRun(t, filepath.Join(t.TempDir(), "run"))
	dir := t.TempDir()
	claim, err := run.Claim(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer claim.Release()
	wrong := func(r *backend.Record) { r.Wrong = "wrong" }
	if err := claim.Amend(wrong); err != nil {
		t.Error(err)
	}
	if _, ok, err := run.Find(dir); ok || err != nil {
		t.Errorf("there is a record: %v, %v", ok, err)
	}
	if err := claim.Write(backend.Record{Dir: dir, Reference: "r"}); err != nil {
		t.Fatal(err)
	}
	if err := claim.Amend(wrong); err != nil {
		t.Error(err)
	}
	if e, ok, err := run.Find(dir); !ok || err != nil || e.Wrong != "wrong" || e.Reference != "r" {
		t.Errorf("%+v, %v, %v", e, ok, err)
	}
}

func openRun(t *testing.T, path string) *backend.RunDir {
	t.Helper()
	run, err := backend.OpenRunDir(func(name string) string {
		if name == "EROFS_OCI_RUN_DIR" {
			return path
		}
		return ""
	})
	if err != nil {
		t.Fatal(err)
	}
	return run
}
