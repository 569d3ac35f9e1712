package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"testing"

	"github.com/erofs-oci/erofs-oci/backend"
)

// TestSupervisorsExitCode: a supervisor ends as its server did, where that found the bytes
// to be wrong.
func TestSupervisorsExitCode(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o700))
	run, err := backend.OpenRunDir(func(name string) string {
		if name == "EROFS_OCI_RUN_DIR" {
			return dir
		}
		return ""
	})
	must(t, err)
	for code, want := range map[int]int{0: 0, exitFailure: exitFailure, exitUsage: exitFailure, exitWrong: exitWrong, 9: exitFailure} {
		worker := exec.Command("sh", "-c", fmt.Sprintf("exit %d", code))
		must(t, worker.Start())
		s := &supervisor{run: run, dir: t.TempDir(), log: slog.New(slog.DiscardHandler)}
		err := s.watch(t.Context(), worker, nil)
		if (err == nil) != (want == 0) || err != nil && exitCode(err) != want {
			t.Errorf("its server ended with %d: %v, want %d", code, err, want)
		}
	}
}

// TestUndone: wrong bytes are left out, wherever they stand, and no text is torn apart.
func TestUndone(t *testing.T) {
	lost, full, wrong := errors.New("lost"), errors.New("full"), &wrongError{errors.New("changed")}
	for want, err := range map[string]error{
		"":                   errors.Join(wrong, errors.Join(nil, wrong)),
		"lost":               lost,
		"lost; full":         errors.Join(errors.Join(lost, wrong), full),
		"write: lost (full)": errors.Join(wrong, fmt.Errorf("write: %w (%w)", lost, full)),
	} {
		if got := undone(err); got != want {
			t.Errorf("%q: %q, want %q", err, got, want)
		}
	}
}
